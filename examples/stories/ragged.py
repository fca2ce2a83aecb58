"""The story model for batches whose rows have lengths of their own; see `executorch_webgpu.llm.ragged`.

As a script of `examples.stories.export`, with a batch, it writes such a program::

    python -m examples.stories.export stories.pte --batch 8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.stories.llama import MODEL_DIR, Llama, load_model, load_settings, rope_table
from executorch_webgpu.llm.group_query_attention import group_query_attention, last_rows
from executorch_webgpu.llm.ragged import lower_ragged

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class RaggedLlama(nn.Module):  # type: ignore[misc]
    """(tokens int64 [B, S], past int32 [B], q_len int32 [B]) -> logits.

    Args:
        model: whose parameters it uses.
        batch: B.
        capacity: rows of the caches.
        logits: "last": [B, vocab_size] of each row's last new token; "all": [B, S, vocab_size].
    """

    def __init__(self, model: Llama, batch: int, capacity: int, logits: str = "last") -> None:
        super().__init__()
        if logits not in ("last", "all"):
            raise ValueError(f"logits is {logits!r}; it must be 'last' or 'all'")
        self.model, self.last_only = model, logits == "last"
        config, dtype = model.config, model.output.weight.dtype
        cos, sin = rope_table(config, capacity)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        shape = (batch, capacity, config.n_kv_heads, config.head_dim)
        for number in range(config.n_layers):
            for name in ("key", "value"):
                self.register_buffer(f"{name}_cache_{number}", torch.zeros(shape, dtype=dtype), persistent=False)

    def forward(self, tokens: Tensor, past: Tensor, q_len: Tensor) -> Tensor:
        """See the class."""
        config = self.model.config
        x = self.model.tok_embeddings(tokens)
        for number, layer in enumerate(self.model.layers):
            attention, y = layer.attention, layer.attention_norm(x)
            y = group_query_attention(
                attention.wq(y),
                attention.wk(y),
                attention.wv(y),
                self.get_buffer(f"key_cache_{number}"),
                self.get_buffer(f"value_cache_{number}"),
                past,
                q_len,
                config.n_heads,
                config.n_kv_heads,
                cos=self.cos,
                sin=self.sin,
                interleaved=True,
            )
            x = x + attention.wo(y)
            x = x + layer.feed_forward(layer.ffn_norm(x))
        if self.last_only:
            x = last_rows(x, q_len)
        logits: Tensor = self.model.output(self.model.norm(x))
        return logits


def export_ragged(
    batch: int,
    dtype: str = "fp32",
    *,
    directory: str | Path = MODEL_DIR,
    capacity: int | None = None,
    max_tokens: int | None = None,
    logits: str = "last",
    partitioner: Any = None,
) -> Any:
    """Lowers the saved model for ragged batches.

    Args:
        batch: Rows of every call.
        dtype: ``"fp32"`` or ``"fp16"``: of weights and caches.
        directory: The model's folder.
        capacity: Rows of the caches; the model's context by default.
        max_tokens: Most tokens of a row in one call; the capacity by default.
        logits: ``"last"`` or ``"all"``; see `RaggedLlama`.
        partitioner: A ``WebGPUPartitioner``; one with default options if None.

    Returns:
        The ``ExecutorchProgramManager``. Its weights have the same content, and so the same names, as those of
        `examples.stories.export.export_program` in the same dtype.
    """
    settings = load_settings(directory)
    capacity = capacity or settings["max_context"]
    module = RaggedLlama(load_model(directory).to(DTYPES[dtype]), batch, capacity, logits).eval()
    return lower_ragged(
        module,
        batch,
        capacity,
        module.model.config.vocab_size,
        max_tokens=max_tokens,
        constant_methods={"get_bos_id": settings["bos_id"], "get_eos_ids": settings["stop_ids"]},
        partitioner=partitioner,
    )
