"""Small hand-written modules around ExecuTorch's llama cache and attention ops.

attention: "fused" is llama::sdpa_with_kv_cache, "split" is llama::update_cache twice and llama::custom_sdpa.
Inputs q [B, S, Hq, D], k and v [B, S, Hkv, D] are looked up in fixed random tables by token id.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.models.config import Built, Config
from tests.models.reference import Reference

VOCAB = 50
CAPACITY = 64  # rows of a cache
LONGEST = 32  # largest S
WINDOW = 32  # of the ring cache
HQ, HKV, D = 4, 2, 32


def _configs() -> tuple[Config, ...]:
    out = []

    def add(suffix: str, attention: str, dtype: str = "fp32", shape: str = "dynamic", **options: Any) -> None:
        name = f"bare_{attention}_{dtype}_{shape}" + (f"_{suffix}" if suffix else "")
        out.append(Config(name, "bare", "bare", dtype, shape, attention, True, tuple(options.items())))

    for attention in ("fused", "split"):
        for dtype in ("fp32", "fp16", "bf16"):
            for shape in ("dynamic", "static"):
                add("", attention, dtype, shape)
        add("mask", attention, mask=True)
        add("mask", attention, "fp16", mask=True)
        add("mask", attention, shape="static", mask=True)
        add("not_causal", attention, causal=False)
        add("scale", attention, scale=0.3)
        add("keywords", attention, keywords=True, scale=0.3)
        add("two_positions", attention, nodes=2)
        add("constant_position", attention, position="constant")
        add("int_position", attention, position="int")
        add("i32_position", attention, position="i32")
        add("unchecked", attention, position="unchecked")
        add("cache_returned", attention, expose="returned")
        add("cache_read", attention, expose="read")
        add("cache_read_before", attention, expose="before")
        add("batch2", attention, batch=2)
        add("bhsd", attention, bhsd=True)
        add("bhsd", attention, "fp16", bhsd=True)
        add("user_caches", attention, user_caches=True)
        add("default_edge", attention, "fp16", bhsd=True, edge="default")
    add("", "ring")
    add("", "ring", "fp16")
    add("", "ring", shape="static")
    add("batch2", "ring", batch=2)
    return tuple(out)


CONFIGS = _configs()


class Caches(torch.nn.Module):
    """K and V caches [B, C, Hkv, D]."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(batch, CAPACITY, HKV, D, dtype=dtype))
        self.register_buffer("v_cache", torch.zeros(batch, CAPACITY, HKV, D, dtype=dtype))


class Module(torch.nn.Module):
    """One or two attention nodes with caches, spelled as the configuration says."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.nodes = config.option("nodes", 1)
        self.position = config.option("position", "item")
        if not config.option("user_caches", False):
            batch = config.option("batch", 1)
            self.caches = torch.nn.ModuleList(Caches(batch, dtype) for _ in range(self.nodes))

    def _start(self, position: torch.Tensor | int | None, length: int) -> int:
        """The first row to write, from what the configuration calls a position."""
        if self.position == "constant":
            return 5
        start = position if isinstance(position, int | torch.SymInt) else position[0].item()
        if self.position != "unchecked":
            torch._check(start >= 0)
            torch._check(start < CAPACITY)
            torch._check(start + length <= CAPACITY)
        return start

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        start: int,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Writes k and v, attends: -> [B, S, Hq, D]."""
        ops = torch.ops.llama
        causal = mask is None and self.config.option("causal", True)
        scale = self.config.option("scale")
        length = q.shape[1]
        if self.config.attention == "fused":
            if self.config.option("keywords", False):
                return ops.sdpa_with_kv_cache(
                    query=q,
                    key=k,
                    value=v,
                    key_cache=k_cache,
                    value_cache=v_cache,
                    start_pos=start,
                    seq_len=length,
                    is_causal=causal,
                    scale=scale,
                )
            tail = (scale,) if scale is not None else ()
            return ops.sdpa_with_kv_cache(q, k, v, k_cache, v_cache, start, length, mask, 0.0, causal, *tail)
        ops.update_cache(k, k_cache, start)
        ops.update_cache(v, v_cache, start)
        if self.config.option("keywords", False):
            return ops.custom_sdpa(query=q, key=k_cache, value=v_cache, start_pos=start, is_causal=causal, scale=scale)
        tail = (scale,) if scale is not None else ()
        return ops.custom_sdpa(q, k_cache, v_cache, 0 if mask is not None else start, mask, 0.0, causal, *tail)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: tuple[torch.Tensor | int | None, ...],
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.config.option("bhsd", False):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        expose = self.config.option("expose")
        extra = (self.caches[0].k_cache * 2,) if expose == "before" else ()
        out = []
        for caches, position in zip(self.caches, positions, strict=True):
            start = self._start(position, q.shape[1])
            out.append(self._attend(q, k, v, caches.k_cache, caches.v_cache, start, mask))
        if expose == "returned":
            extra = (self.caches[0].k_cache, self.caches[0].v_cache)
        if expose == "read":
            extra = (self.caches[0].k_cache.cos(),)
        if self.config.option("bhsd", False):
            out = [x.transpose(1, 2) for x in out]
        results = (*out, *extra)
        return results if len(results) > 1 else results[0]


class OnePosition(Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_pos: torch.Tensor) -> Any:
        return self.run(q, k, v, (input_pos,))


class IntPosition(Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_pos: int) -> Any:
        return self.run(q, k, v, (input_pos,))


class NoPosition(Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return self.run(q, k, v, (None,))


class Masked(Module):
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_pos: torch.Tensor, mask: torch.Tensor
    ) -> Any:
        return self.run(q, k, v, (input_pos,), mask)


class TwoPositions(Module):
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, input_pos: torch.Tensor, other_pos: torch.Tensor
    ) -> Any:
        return self.run(q, k, v, (input_pos, other_pos))


class UserCaches(Module):
    """Caches are inputs that the program changes in place."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        input_pos: torch.Tensor,
    ) -> torch.Tensor:
        return self._attend(q, k, v, k_cache, v_cache, self._start(input_pos, q.shape[1]), None)


class Ring(Module):
    """update_cache_with_indices twice, custom_sdpa with a mask. indices i64 [B, S], mask f32 [S, C]."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        input_pos: torch.Tensor,
        indices: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        start = input_pos[0].item()
        torch._check(start >= 0)
        caches = self.caches[0]
        torch.ops.llama.update_cache_with_indices(k, caches.k_cache, start, indices)
        torch.ops.llama.update_cache_with_indices(v, caches.v_cache, start, indices)
        return torch.ops.llama.custom_sdpa(q, caches.k_cache, caches.v_cache, 0, mask, 0.0, False)


def _class(config: Config) -> type[Module]:
    if config.attention == "ring":
        return Ring
    if config.option("user_caches", False):
        return UserCaches
    if config.option("mask", False):
        return Masked
    if config.option("nodes", 1) == 2:
        return TwoPositions
    return {"constant": NoPosition, "int": IntPosition}.get(config.option("position", "item"), OnePosition)


class _Inputs:
    """(tokens [S], position) -> inputs, from fixed random tables."""

    def __init__(self, config: Config) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config = config
        self.batch = config.option("batch", 1)
        self.tables = [torch.randn(VOCAB, heads, D, generator=generator) for heads in (HQ, HKV, HKV)]
        self.rows = torch.randn(2, self.batch, CAPACITY, HKV, D, generator=generator)

    def _ring(self, length: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [B, S] of the rows to write and the mask [S, C] after writing them."""
        rows = position + np.arange(length)
        last = position + length - 1
        slots = np.arange(CAPACITY)
        held = last - (last - slots) % CAPACITY  # the position that each slot holds; negative: none
        delta = rows[:, None] - held[None]
        seen = (held[None] >= 0) & (delta >= 0) & (delta < WINDOW)
        mask = torch.from_numpy(np.where(seen, 0.0, -np.inf).astype(np.float32))
        return torch.from_numpy(rows % CAPACITY).repeat(self.batch, 1), mask

    def _mask(self, length: int, position: int) -> torch.Tensor:
        """Causal mask [S, C] with a slope, so that it is not only zeros and infinities."""
        delta = position + np.arange(length)[:, None] - np.arange(CAPACITY)[None]
        return torch.from_numpy(np.where(delta >= 0, -0.05 * delta, -np.inf).astype(np.float32))

    def __call__(self, tokens: np.ndarray, position: int) -> tuple[Any, ...]:
        dtype = self.config.torch_dtype
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        batch = torch.stack([(ids * (1 + 6 * b) + 3 * b) % VOCAB for b in range(self.batch)])
        out: list[Any] = [table[batch].to(dtype) for table in self.tables]
        if self.config.option("bhsd", False):
            out = [x.transpose(1, 2).contiguous() for x in out]
        kind = self.config.option("position", "item")
        length = len(tokens)
        if self.config.option("user_caches", False):
            out += [rows.to(dtype).clone() for rows in self.rows]
        if kind == "int":
            out.append(position)
        elif kind != "constant":
            out.append(torch.tensor([position], dtype=torch.int32 if kind == "i32" else torch.int64))
        if self.config.option("nodes", 1) == 2:
            out.append(torch.tensor([position + 3], dtype=torch.int64))
        if self.config.attention == "ring":
            out += self._ring(length, position)
        if self.config.option("mask", False):
            out.append(self._mask(length, position))
        return tuple(out)


def _dynamic_shapes(config: Config, names: list[str]) -> dict[str, Any]:
    seq = torch.export.Dim("seq", min=1, max=LONGEST)
    axis = 2 if config.option("bhsd", False) else 1
    dynamic = config.shape == "dynamic"
    shapes: dict[str, Any] = dict.fromkeys(names)
    if dynamic:
        shapes |= {name: {axis: seq} for name in ("q", "k", "v")}
        for name, dim in (("mask", 0), ("indices", 1)):
            if name in shapes:
                shapes[name] = {dim: seq}
    if config.option("position") == "int":
        shapes["input_pos"] = torch.export.Dim.DYNAMIC
    return shapes


def build(config: Config) -> Built:
    """Exports one module. The constant position is 5 whatever position is asked for."""
    from executorch.exir import EdgeCompileConfig
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    make_inputs = _Inputs(config)
    length = 3 if config.shape == "dynamic" else 1
    example = make_inputs(np.arange(length), 2)
    module = _class(config)(config, config.torch_dtype).eval()
    names = list(module.forward.__code__.co_varnames[1 : module.forward.__code__.co_argcount])
    with torch.no_grad():
        exported = torch.export.export(module, example, dynamic_shapes=_dynamic_shapes(config, names), strict=True)

    def reference(dtype: torch.dtype, precise: bool) -> Reference:
        eager = _class(config)(config, dtype).eval()

        def call(tokens: np.ndarray, position: int) -> Any:
            floats = (torch.float16, torch.bfloat16)
            inputs = [x.to(dtype) if getattr(x, "dtype", None) in floats else x for x in make_inputs(tokens, position)]
            result = eager(*inputs)
            return tuple(x.clone() for x in result) if isinstance(result, tuple) else result

        return Reference(eager, call, precise)

    default = config.option("edge") == "default"
    compile_config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=not default)
    ring = config.attention == "ring"
    return Built(
        config=config,
        exported=exported,
        edge_kwargs={"compile_config": compile_config, "transform_passes": None, "constant_methods": None},
        make_inputs=make_inputs,
        reference=reference(config.torch_dtype, False),
        oracle=reference(torch.float32, True),
        max_context=1000 if ring else CAPACITY - (3 if config.option("nodes", 1) == 2 else 0),
        max_seq=LONGEST if config.shape == "dynamic" else 1,
        min_seq=1,
        vocab=VOCAB,
        logits="other",
    )
