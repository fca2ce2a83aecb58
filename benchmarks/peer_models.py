"""Models with random weights for the engines that `executorch-webgpu bench --compare` runs, in the shapes of
`examples.export_llama`.

    python -m benchmarks.peer_models gguf llama1b-q4_0.gguf      # for llama-bench; Q4_0 matrices, embedding included
    python -m benchmarks.peer_models checkpoint llama1b          # a folder as `transformers` saves it, float16

The folder is what ONNX Runtime GenAI's model builder reads; docs/BENCHMARKS_PEERS.md has its command line. Both are
written with numpy alone, one tensor at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.export_llama import SHAPES

from .options import command, count32

Array = np.ndarray[Any, Any]
BLOCK = 32
"""Elements with one scale in Q4_0."""
ALIGNMENT = 32
CODE_DEVIATION = 4.61
"""Standard deviation of the integers -8 to 7, all equally frequent."""


@dataclass(frozen=True)
class Sizes:
    """Of a Llama with tied embeddings, from an entry of `SHAPES`."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    norm_eps: float
    rope_theta: float
    context: int

    @classmethod
    def of(cls, shape: str, context: int) -> Sizes:
        """The hidden size is 2/3 of four times `dim`, times the multiplier, rounded up: the rule of Llama 3's code."""
        p = SHAPES[shape]
        multiple = p["multiple_of"]
        hidden = int(p["ffn_dim_multiplier"] * int(8 * p["dim"] / 3))
        return cls(
            p["dim"], p["n_layers"], p["n_heads"], p["n_kv_heads"], multiple * math.ceil(hidden / multiple),
            p["vocab_size"], p["norm_eps"], p["rope_theta"], context,
        )  # fmt: skip

    @property
    def head(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class Tensor:
    """A parameter [rows, columns], or [columns] of a norm, with its names in both formats."""

    gguf: str
    checkpoint: str
    shape: tuple[int, ...]


def tensors(s: Sizes) -> Iterator[Tensor]:
    """All parameters. The output layer is the embedding."""
    yield Tensor("token_embd.weight", "model.embed_tokens.weight", (s.vocabulary, s.dim))
    kv = s.kv_heads * s.head
    for i in range(s.layers):
        for gguf, name, shape in (
            ("attn_norm", "input_layernorm", (s.dim,)),
            ("attn_q", "self_attn.q_proj", (s.dim, s.dim)),
            ("attn_k", "self_attn.k_proj", (kv, s.dim)),
            ("attn_v", "self_attn.v_proj", (kv, s.dim)),
            ("attn_output", "self_attn.o_proj", (s.dim, s.dim)),
            ("ffn_norm", "post_attention_layernorm", (s.dim,)),
            ("ffn_gate", "mlp.gate_proj", (s.hidden, s.dim)),
            ("ffn_up", "mlp.up_proj", (s.hidden, s.dim)),
            ("ffn_down", "mlp.down_proj", (s.dim, s.hidden)),
        ):
            yield Tensor(f"blk.{i}.{gguf}.weight", f"model.layers.{i}.{name}.weight", shape)
    yield Tensor("output_norm.weight", "model.norm.weight", (s.dim,))


def rope_factors(s: Sizes) -> Array:
    """f32[head / 2]: what Llama 3.2 divides its rotary frequencies by (factor 32 over 8,192 original positions).

    As `rope_type: llama3` of its configuration says: frequencies with wavelengths above 8,192 are divided by 32, those
    below 8,192 / 4 stay, and between them the quotient is interpolated.
    """
    factor, low, high, original = 32.0, 1.0, 4.0, 8192.0
    wave = 2 * np.pi * s.rope_theta ** (np.arange(0, s.head, 2) / s.head)
    smooth = np.clip((original / wave - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# -- GGUF version 3: header, metadata, tensor infos, padding, data

U32, F32, STRING = 4, 6, 8
"""Types of metadata."""
F32_TENSOR, Q4_0_TENSOR = 0, 2
Q4_0 = np.dtype([("scale", "<f2"), ("codes", "u1", (BLOCK // 2,))])


def write_gguf(path: Path, s: Sizes, seed: int = 0) -> None:
    """Matrices in Q4_0, norms and rotary factors in f32; no tokenizer, but the number of tokens."""
    metadata: dict[str, int | float | str] = {
        "general.architecture": "llama", "general.name": "random weights", "general.alignment": ALIGNMENT,
        "llama.block_count": s.layers, "llama.context_length": s.context, "llama.embedding_length": s.dim,
        "llama.feed_forward_length": s.hidden, "llama.attention.head_count": s.heads,
        "llama.attention.head_count_kv": s.kv_heads, "llama.attention.layer_norm_rms_epsilon": s.norm_eps,
        "llama.rope.freq_base": s.rope_theta, "llama.rope.dimension_count": s.head, "llama.vocab_size": s.vocabulary,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip
    random = np.random.default_rng(seed)
    found = [Tensor("rope_freqs.weight", "", (s.head // 2,)), *tensors(s)]
    infos, offset = b"", 0
    for tensor in found:
        rank, size = len(tensor.shape), math.prod(tensor.shape)
        infos += _string(tensor.gguf) + struct.pack(f"<I{rank}Q", rank, *reversed(tensor.shape))
        infos += struct.pack("<IQ", F32_TENSOR if rank == 1 else Q4_0_TENSOR, offset)
        offset += _padded(4 * size if rank == 1 else size // BLOCK * Q4_0.itemsize)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(found), len(metadata)))
        file.write(_metadata(metadata) + infos)
        file.write(bytes(_padded(file.tell()) - file.tell()))
        for tensor in found:
            data = _gguf_data(tensor, s, random)
            file.write(data.tobytes() + bytes(_padded(data.nbytes) - data.nbytes))


def _gguf_data(tensor: Tensor, s: Sizes, random: np.random.Generator) -> Array:
    """Random codes with a constant scale that keeps the variance of what is multiplied; ones for norms."""
    if tensor.gguf == "rope_freqs.weight":
        return rope_factors(s)
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, "<f4")
    made = np.empty(math.prod(tensor.shape) // BLOCK, Q4_0)
    made["scale"] = tensor.shape[-1] ** -0.5 / CODE_DEVIATION
    made["codes"] = random.integers(0, 256, made["codes"].shape, np.uint8)
    return made


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _metadata(values: Mapping[str, int | float | str]) -> bytes:
    out = b""
    for key, value in values.items():
        if isinstance(value, str):
            out += _string(key) + struct.pack("<I", STRING) + _string(value)
        else:
            kind, code = (F32, "f") if isinstance(value, float) else (U32, "I")
            out += _string(key) + struct.pack(f"<I{code}", kind, value)
    return out


# -- a folder as `transformers` writes it


def write_checkpoint(folder: Path, s: Sizes, seed: int = 0) -> None:
    """`config.json`, `model.safetensors` in float16, and a tokenizer with a word for each token."""
    folder.mkdir(parents=True, exist_ok=True)
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "vocab_size": s.vocabulary, "hidden_size": s.dim, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head, "intermediate_size": s.hidden, "hidden_act": "silu",
        "rms_norm_eps": s.norm_eps, "rope_theta": s.rope_theta, "rope_scaling": scaling, "tie_word_embeddings": True,
        "max_position_embeddings": s.context, "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip
    words = {f"t{i}": i for i in range(s.vocabulary)}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t0", "eos_token": "t1", "unk_token": "t0"}
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors(s):
        end = offset + 2 * math.prod(tensor.shape)
        header[tensor.checkpoint] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    random = np.random.default_rng(seed)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors(s):
            data = np.ones(tensor.shape, np.float32)
            if data.ndim == 2:
                data = random.standard_normal(tensor.shape, np.float32) * np.float32(tensor.shape[-1] ** -0.5)
            file.write(data.astype("<f2").tobytes())


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the command line asks for; the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("gguf", "checkpoint"))
    parser.add_argument("path", type=Path, help="the file, or the folder of the checkpoint")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument(
        "--context", type=count32, default=131072, help="the longest text that the model claims to read"
    )
    options = parser.parse_args(arguments)
    write = write_gguf if options.kind == "gguf" else write_checkpoint
    write(options.path, Sizes.of(options.shape, options.context))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
