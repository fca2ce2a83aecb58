"""Tiny decoders for sessions: other dtypes than those of `tiny_decoder`, state that is no cache by position, and
programs of two methods. Lowered to `.pte` once per process.

`build("f16")` and `build("i32")` are `tiny_decoder`'s Llama with f16 caches, or with i32 tokens and positions;
`build("recurrent")` has a state that every token mixes into; `build("ring")` sliding-window attention over a ring
buffer, as ExecuTorch's exporter makes it; `build("long")` caches of LONG rows, and all logits; `build("cut")` caches
that are cut at the position before attention, and all logits; `build("both")` the methods `prefill` (S dynamic, all
logits) and `decode` (one token); `build("exact")` the same with a prefill of exactly EXACT tokens.
"""

from __future__ import annotations

from functools import cache

import torch

from tests import tiny_decoder
from tests.tiny_decoder import CAPACITY, DIM, HEAD, HEADS, KV_HEADS, LONGEST, STOP, VOCAB

RING, WINDOW, LONG = 16, 8, 80
"""Rows of the ring, tokens that one sees; most tokens of the long program and of the ring's."""
EXACT = 4
"""Tokens of a call of the prefill method that takes exactly so many."""


class F16(tiny_decoder.Llama):
    """Weights and caches in f16; logits f16."""

    def __init__(self) -> None:
        super().__init__()
        self.half()


class I32(tiny_decoder.Llama):
    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.long(), input_pos.long())


class Prefill(tiny_decoder.Llama):
    """Returns every token's logits f32[1, S, VOCAB]."""

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        start = tiny_decoder._start(input_pos, tokens.shape[1])
        return self.step(tokens, self.positions.narrow(0, start, tokens.shape[1]), start)


class Cut(Prefill):
    """Reads its caches up to the last token, in operators of their own: sizes inside follow from the position."""

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, start: int) -> torch.Tensor:
        length = tokens.shape[1]
        x = torch.nn.functional.embedding(tokens, self.embedding) + positions
        places = torch.arange(length) + start
        for kept, weight in ((self.k_cache, self.k), (self.v_cache, self.v)):
            kept.index_copy_(1, places, torch.nn.functional.linear(x, weight).view(1, length, KV_HEADS, HEAD))
        k, v = (kept.narrow(1, 0, start + length)[0, :, 0] for kept in (self.k_cache, self.v_cache))
        q = torch.nn.functional.linear(x, self.q).view(length, HEADS, HEAD).transpose(0, 1)
        hidden = torch.arange(start + length)[None] > places[:, None]
        scores = (q @ k.transpose(0, 1) * HEAD**-0.5).masked_fill(hidden, -1e9).softmax(-1)
        y = (scores @ v).transpose(0, 1).reshape(1, length, HEADS * HEAD)
        return torch.nn.functional.linear(x + y, self.out)


class Long(tiny_decoder.Decoder):
    """Caches of LONG rows; positions count little, so that texts repeat themselves. Returns every token's logits
    f32[1, S, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(7)
        self.positions = torch.nn.Parameter(0.05 * torch.randn(LONG, DIM, generator=source))
        self.register_buffer("k_cache", torch.zeros(1, LONG, KV_HEADS, HEAD))
        self.register_buffer("v_cache", torch.zeros(1, LONG, KV_HEADS, HEAD))

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        start, length = _start(input_pos, tokens.shape[1]), tokens.shape[1]
        return self.step(tokens, self.positions.narrow(0, start, length), start)


def _start(position: torch.Tensor, length: int) -> int:
    start = position[0].item()
    torch._check(start >= 0)
    torch._check(start < LONG)
    torch._check(start + length <= LONG)
    return start


class Recurrent(torch.nn.Module):
    """h = 0.9 h + embedding, logits = out tanh(h); one token a call. The position is only checked."""

    def __init__(self) -> None:
        super().__init__()
        source = tiny_decoder.Decoder()
        self.embedding, self.positions = source.embedding, source.positions
        self.out = torch.nn.Parameter(source.out[:, :DIM].detach().clone())
        self.register_buffer("h", torch.zeros(1, DIM))

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(tokens, self.embedding)[:, 0]
        h = self.h * 0.9 + x + self.positions[input_pos]
        self.h.copy_(h)
        return torch.nn.functional.linear(torch.tanh(h), self.out)


class Ring(tiny_decoder.Decoder):
    """Attention over the last WINDOW tokens, kept in RING rows; positions enter by the rows' age alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.positions = torch.nn.Parameter(torch.randn(LONG, DIM, generator=generator))
        self.register_buffer("k_cache", torch.zeros(1, RING, KV_HEADS, HEAD))
        self.register_buffer("v_cache", torch.zeros(1, RING, KV_HEADS, HEAD))
        self.register_buffer("cache_positions", torch.zeros(RING, dtype=torch.long))

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        start = _start(input_pos, length)
        x = torch.nn.functional.embedding(tokens, self.embedding) + self.positions.narrow(0, start, length)
        q = torch.nn.functional.linear(x, self.q).view(1, length, HEADS, HEAD)
        k = torch.nn.functional.linear(x, self.k).view(1, length, KV_HEADS, HEAD)
        v = torch.nn.functional.linear(x, self.v).view(1, length, KV_HEADS, HEAD)
        seen = torch.arange(length) + start
        rows = seen % RING
        old = torch.where(torch.arange(RING) < start, self.cache_positions, torch.full((RING,), -1))
        self.cache_positions.copy_(old)
        self.cache_positions.index_copy_(0, rows, seen)
        torch.ops.llama.update_cache_with_indices(k, self.k_cache, start, rows[None])
        torch.ops.llama.update_cache_with_indices(v, self.v_cache, start, rows[None])
        age = seen.view(-1, 1) - self.cache_positions
        visible = (self.cache_positions >= 0) & (age >= 0) & (age < WINDOW)
        mask = torch.where(visible, 0, float("-inf"))
        y = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, start, mask, 0.0, False)
        return torch.nn.functional.linear(x + y.reshape(1, length, HEADS * HEAD), self.out)[:, -1]


@cache
def build(kind: str) -> bytes:
    """Export and lower; every method becomes one delegate."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    from executorch_webgpu.partitioner import WebGPUPartitioner

    modules: dict[str, tuple[torch.nn.Module, int | None]] = {
        "f16": {"forward": (F16(), None)},
        "i32": {"forward": (I32(), None)},
        "recurrent": {"forward": (Recurrent(), 1)},
        "ring": {"forward": (Ring(), None)},
        "long": {"forward": (Long(), None)},
        "cut": {"forward": (Cut(), None)},
        "both": {"prefill": (Prefill(), None), "decode": (tiny_decoder.Static(), 1)},
        "exact": {"prefill": (Prefill(), EXACT), "decode": (tiny_decoder.Static(), 1)},
    }[kind]  # fmt: skip
    dtype = torch.int32 if kind == "i32" else torch.int64
    programs = {}
    for name, (module, length) in modules.items():
        seq = torch.export.Dim("seq", min=1, max=LONGEST)
        example = (torch.arange(length or 3, dtype=dtype)[None], torch.tensor([2], dtype=dtype))
        with torch.no_grad():
            programs[name] = torch.export.export(
                module.eval(), example, dynamic_shapes=None if length else ({1: seq}, None), strict=True
            )
    edge = to_edge_transform_and_lower(
        programs,
        partitioner=[WebGPUPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods={
            "get_max_context_len": LONG if kind in ("ring", "long") else CAPACITY,
            "get_vocab_size": VOCAB,
            "get_eos_ids": [STOP],
        },
    )
    return bytes(edge.to_executorch().buffer)
