"""`benchmarks.peer_models`: the files say what they hold, and `transformers` computes with the checkpoint."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import peer_models
from benchmarks.peer_models import Sizes
from examples.export_llama import SHAPES

TINY = Sizes.of("tiny", 1024)
F32, Q4_0 = 0, 2


class Reader:
    """A GGUF file, read by its specification: little-endian, strings with a length of 64 bits before them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        magic, version, tensors, entries = self.take("<4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string()
            (kind,) = self.take("<I")
            self.metadata[key] = self.string() if kind == 8 else self.take({4: "<I", 6: "<f"}[kind])[0]
        infos = []
        for _ in range(tensors):
            name = self.string()
            (rank,) = self.take("<I")
            shape = self.take(f"<{rank}Q")[::-1]
            infos.append((name, shape, *self.take("<IQ")))
        alignment = self.metadata["general.alignment"]
        self.start = -(-self.at // alignment) * alignment
        self.tensors = {name: (shape, kind, offset) for name, shape, kind, offset in infos}
        assert all(offset % alignment == 0 for *_, offset in infos)

    def take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return found

    def string(self) -> str:
        (length,) = self.take("<Q")
        (text,) = self.take(f"<{length}s")
        return str(text.decode())

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """Widened to f32: (code - 8) * scale, the low halves of a block's bytes before the high ones."""
        shape, kind, offset = self.tensors[name]
        size, at = math.prod(shape), self.start + offset
        if kind == F32:
            return np.frombuffer(self.data, "<f4", size, at).reshape(shape)
        blocks = np.frombuffer(self.data, np.uint8, size // 32 * 18, at).reshape(-1, 18)
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32) - 8
        return (codes * blocks[:, :2].copy().view("<f2").astype(np.float32)).reshape(shape)


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    peer_models.main(["gguf", str(path), "--shape", "tiny", "--context", "1024"])
    found = Reader(path.read_bytes())
    assert found.metadata | {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
        "llama.feed_forward_length": TINY.hidden, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.vocab_size": 288, "llama.context_length": 1024,
        "tokenizer.ggml.model": "none",
    } == found.metadata  # fmt: skip
    assert len(found.tensors) == 2 * 9 + 3
    assert "output.weight" not in found.tensors  # the embedding is used
    assert found.tensors["token_embd.weight"][:2] == ((288, 64), Q4_0)
    assert found.tensors["blk.1.attn_k.weight"][:2] == ((32, 64), Q4_0)
    for name, (shape, kind, _) in found.tensors.items():
        values = found.values(name)
        if kind == Q4_0:
            assert values.std() == pytest.approx(shape[-1] ** -0.5, rel=0.1)
        elif name != "rope_freqs.weight":
            assert (values == 1).all()
    *_, (shape, _, offset) = found.tensors.values()
    assert len(found.data) == found.start + offset + 4 * math.prod(shape)


def test_checkpoint(tmp_path: Path) -> None:
    peer_models.main(["checkpoint", str(tmp_path), "--shape", "tiny", "--context", "1024"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name: p.shape for name, p in model.named_parameters()} == {
        t.checkpoint: t.shape for t in peer_models.tensors(TINY)
    }
    for parameter in model.parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(parameter.shape[-1] ** -0.5, rel=0.1)
        else:
            assert (parameter == 1).all()
    with torch.no_grad():
        logits = model(torch.tensor([[3, 1, 4, 1, 5]])).logits
    assert logits.shape == (1, 5, 288)
    assert logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(tmp_path)("t5 t287").input_ids == [5, 287]
    plain = TINY.rope_theta ** -(np.arange(0, TINY.head, 2) / TINY.head)
    assert model.model.rotary_emb.inv_freq.numpy() == pytest.approx(plain / peer_models.rope_factors(TINY), rel=1e-5)


def test_sizes_are_those_of_the_exported_programs() -> None:
    assert Sizes.of("1b", 1) == Sizes(2048, 16, 32, 8, 8192, 128256, 1e-5, 500000.0, 1)
    assert {name: Sizes.of(name, 1).hidden for name in SHAPES} == {"1b": 8192, "3b": 8192, "tiny": 256}
