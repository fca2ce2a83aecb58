"""A compact Llama in plain PyTorch whose checkpoints load unchanged in ExecuTorch's own Llama example.

Parameter names and the rotary layout (adjacent pairs rotate together) are those of Meta's Llama checkpoints, as
`executorch.examples.models.llama` expects them, so the state dict of `Llama` is a valid ``base.checkpoint`` and the
JSON of `LlamaConfig` a valid ``base.params`` there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""Folder of the shipped model: model.safetensors, params.json, config.json and tokenizer.json."""


@dataclass
class LlamaConfig:
    """Model dimensions, with the field names of ExecuTorch's ``ModelArgs``."""

    dim: int = 256
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 32
    hidden_dim: int = 512
    vocab_size: int = 1024
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @staticmethod
    def load(path: str | Path) -> LlamaConfig:
        """Reads a params.json."""
        return LlamaConfig(**json.loads(Path(path).read_text(encoding="utf-8")))

    def save(self, path: str | Path) -> None:
        """Writes a params.json."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Root-mean-square normalisation over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x of shape [..., dim]; the result has x's dtype."""
        y = x.float()
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight.type_as(x)


def rope_table(config: LlamaConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each float32 of shape [length, head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(length).float(), 1.0 / config.rope_theta**exponent)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[2i], x[2i+1]) of x [batch, seq, heads, head_dim] by the tables [seq, head_dim / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).type_as(x)


KVCache = list[tuple[Tensor, Tensor]]
"""Per layer, the keys and values seen so far, each [batch, n_kv_heads, seq, head_dim]."""


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attends over the past and x.

        Args:
            x: [batch, seq, dim].
            cos: Rotary cosines of x's positions, [seq, head_dim / 2].
            sin: Rotary sines, likewise.
            past: Earlier keys and values; with a past of non-zero length, seq must be 1.

        Returns:
            The output [batch, seq, dim] and the extended keys and values.
        """
        batch, seq, _ = x.shape
        q = apply_rope(self.wq(x).view(batch, seq, self.n_heads, self.head_dim), cos, sin).transpose(1, 2)
        k = apply_rope(self.wk(x).view(batch, seq, self.n_kv_heads, self.head_dim), cos, sin).transpose(1, 2)
        v = self.wv(x).view(batch, seq, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        groups = self.n_heads // self.n_kv_heads
        out = F.scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), is_causal=past is None
        )
        return self.wo(out.transpose(1, 2).reshape(batch, seq, -1)), (k, v)


class FeedForward(nn.Module):  # type: ignore[misc]
    """SwiGLU feed-forward layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., dim] to [..., dim]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):  # type: ignore[misc]
    """One transformer layer with pre-normalisation."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Arguments and results as in `Attention.forward`."""
        out, cache = self.attention(self.attention_norm(x), cos, sin, past)
        x = x + out
        return x + self.feed_forward(self.ffn_norm(x)), cache


class Llama(nn.Module):  # type: ignore[misc]
    """The language model.

    Args:
        config: Model dimensions.
        max_context: How many positions the rotary table covers.
    """

    def __init__(self, config: LlamaConfig, max_context: int = 640) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rope_table(config, max_context)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh weights: normal, scaled by the fan-in, smaller for projections that add to the residual."""
        for name, parameter in self.named_parameters():
            if name == "tok_embeddings.weight":
                nn.init.normal_(parameter, std=0.3)
            elif parameter.ndim == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                scale = (2 * self.config.n_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)

    def forward_cached(self, tokens: Tensor, past: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """Runs the model on new tokens.

        Args:
            tokens: int64 [batch, seq].
            past: What an earlier call returned, to continue from; seq must then be 1.

        Returns:
            Logits [batch, seq, vocab_size] and the cache to continue with.
        """
        start = past[0][0].shape[2] if past else 0
        cos, sin = self.cos[start : start + tokens.shape[1]], self.sin[start : start + tokens.shape[1]]
        x = self.tok_embeddings(tokens)
        cache: KVCache = []
        for i, layer in enumerate(self.layers):
            x, layer_cache = layer(x, cos, sin, past[i] if past else None)
            cache.append(layer_cache)
        return self.output(self.norm(x)), cache

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab_size] of int64 tokens [batch, seq], without a past."""
        return self.forward_cached(tokens)[0]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def generate(self, prompt: list[int], max_new_tokens: int, stop_ids: set[int]) -> list[int]:
        """Continues a prompt greedily.

        Args:
            prompt: Token ids, the start-of-text id included.
            max_new_tokens: Most tokens to add.
            stop_ids: Generation ends before the first of these, which is not returned.

        Returns:
            The new token ids.
        """
        tokens = torch.tensor([prompt], device=self.cos.device)
        past: KVCache | None = None
        new: list[int] = []
        while len(new) < max_new_tokens:
            logits, past = self.forward_cached(tokens, past)
            token = int(logits[0, -1].argmax())
            if token in stop_ids:
                break
            new.append(token)
            tokens = tokens.new_tensor([[token]])
        return new


def load_model(directory: str | Path = MODEL_DIR) -> Llama:
    """Loads a saved model in float32 (the stored weights are float16)."""
    from safetensors.torch import load_file

    directory = Path(directory)
    settings = load_settings(directory)
    model = Llama(LlamaConfig.load(directory / "params.json"), settings["max_context"])
    model.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
    model.eval()
    return model


def load_settings(directory: str | Path = MODEL_DIR) -> dict[str, Any]:
    """Reads config.json: ``bos_id``, ``eos_id``, ``stop_ids`` (end of a story or answer) and ``max_context``."""
    settings: dict[str, Any] = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return settings
