"""The record of `executorch_webgpu::group_query_attention`, expanded by the passes and loaded on a test device."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from executorch_webgpu.backend.graph import Arg, Graph, Ref, Sym
from executorch_webgpu.backend.passes import run_passes
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.ops.group_query_attention import NAME, NUMBERS, TENSORS
from executorch_webgpu.runtime.gpu.host import f32_to_bf16, to_host, to_user
from tests.harness import GraphBuilder, device
from tests.llm.cases import Array, Case
from tests.ops.aten import SHORT
from tests.ops.copy_cases import poison

INPUTS = ("query", "key", "value", "attn_bias", "past", "q_len")
CACHES = ("key_cache", "value_cache")
STATE = (*CACHES, "key_scales", "value_scales")
S = Sym("input_dim", (0, 1))


def array(tensor: torch.Tensor) -> Array:
    """The bytes of a tensor, as numpy holds them."""
    if tensor.dtype == torch.bfloat16:
        return f32_to_bf16(tensor.float().numpy())
    return tensor.numpy()


def build(case: Case, given: dict[str, Any]) -> tuple[GraphBuilder, Graph]:
    """A graph with the record alone. The number of rows is a symbol; tables and weights are constants."""
    b, args = GraphBuilder(), dict[str, Arg]()
    for name in INPUTS:
        tensor = given[name]
        if tensor is not None:
            rows = name in ("query", "key", "value")
            shape = (tensor.shape[0], S, *tensor.shape[2:]) if rows else tuple(tensor.shape)
            args[name] = b.input(SHORT[tensor.dtype], shape)
    for name in TENSORS:
        tensor = given.get(name)
        if tensor is not None and name not in INPUTS:
            kind = "mutable" if name in STATE else "constant"
            args[name] = b.stored(kind, SHORT[tensor.dtype], array(tensor), name)
    args = {**dict.fromkeys(TENSORS), **args, **{name: given[name] for name in NUMBERS}}
    tail = (case.heads * case.v_size,) if case.packed or case.flat else (case.heads, case.v_size)
    state = [name for name in STATE if given.get(name) is not None]
    caches = [(SHORT[given[name].dtype], tuple(given[name].shape)) for name in state]
    out, *made = b.node(NAME, args, (SHORT[case.dtype], (case.batch, S, *tail)), *caches)
    mutations = [(args[name], new) for name, new in zip(state, made, strict=True)]
    pairs = tuple((old.value, new.value) for old, new in mutations if isinstance(old, Ref))
    return b, b.graph(out, mutations=pairs)


class Compiled:
    """A case on a device. Calls may have any number of rows; caches start as the case's."""

    def __init__(self, case: Case, given: dict[str, Any], on: str, disabled: Collection[str] = ()) -> None:
        self.case, self.device = case, device(on)
        state = {name: given[name] for name in STATE if given.get(name) is not None}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.dtypes = {name: SHORT[tensor.dtype] for name, tensor in state.items()}
        b, graph = build(case, given)
        assert check_node(graph, graph.nodes[0]) is None
        self.graph = self.changed(run_passes(graph, disabled))
        for node in self.graph.nodes:
            assert check_node(self.graph, node) is None, node
        self.delegate = b.load(self.graph, self.device)

    def changed(self, graph: Graph) -> Graph:
        """The graph that is loaded; a class derived from this one may change it."""
        return graph

    def __call__(self, given: dict[str, Any]) -> Array:
        """The result, float32 (float16 as itself). Temporaries hold NaN before."""
        poison(self.delegate)
        feeds = [to_host(given[name]) for name in INPUTS if given[name] is not None]
        [(dtype, found)] = self.delegate.execute(feeds)
        return np.asarray(to_user(dtype, np.asarray(found), False))

    def cache(self, name: str) -> Array:
        """What the GPU holds of a cache or its scales, as it holds it: float32 or float16; packed integers as bytes."""
        raw = bytes(self.device.gpu.queue.read_buffer(self.delegate.state.buffers()[name]))
        half = self.device.limits.wgsl_type(self.dtypes[name]) == "f16"
        kind: type[np.generic] = np.float16 if half else np.float32
        kind = {"i8": np.int8, "u8": np.uint8}.get(self.dtypes[name], kind)
        return np.frombuffer(raw, kind)[: int(np.prod(self.shapes[name]))].reshape(self.shapes[name])

    def close(self) -> None:
        self.delegate.close()
        self.delegate.state.close()
        self.delegate.weights.close()
