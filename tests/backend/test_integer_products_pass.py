"""`join_integer_products`: which chains around `_int_mm` become products with packed weights, and that numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.backend.passes.cleanup import remove_unused
from executorch_webgpu.backend.passes.quantized import Constants, fuse_quantized
from executorch_webgpu.ops.base import check_node
from tests.harness import DEVICES, GraphBuilder, device, run

M, K, N = 3, 20, 6
INT_MM, FAKE, PACKED = "aten._int_mm.default", "webgpu.fake_quantize", "webgpu.linear_packed"


class Layer:
    """x [1, M, K] through a layer as torchao spells it; what is not as usual is named.

    shift, taken: what is added for unsigned bytes, and the factor of the sums that are taken off; None: signed bytes.
    mapping, low, high: of the activations. corrected: the zero point's part is taken off (and asymmetric).
    other: one of "scale", "sums", "rows", "columns", "reader": that part is another than the layer's.
    """

    def __init__(
        self, shift: int | None = 128, taken: int = 128, mapping: str = "SYMMETRIC", low: int = -128, high: int = 127,
        corrected: bool = False, other: str = "",
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(5)
        b = self.b = GraphBuilder()
        self.constants: Constants = {}
        weight = self.constant("weight", "i8", rng.integers(-128, 128, (N, K)).astype(np.int8))
        twin = self.constant("twin", "i8", rng.integers(-128, 128, (N, K)).astype(np.int8))
        scales = self.constant("scales", "f32", rng.uniform(0.01, 0.02, (N, 1)).astype(np.float32))
        bias = self.constant("bias", "f32", rng.standard_normal(N).astype(np.float32))
        x = b.input("f32", (1, M, K))
        block = (1, M, K) if other == "rows" else (1, 1, K)
        count = (1, 1, 1) if other == "rows" else (1, M, 1)
        span: dict[str, Arg] = {"quant_min": low, "quant_max": high}

        def choose(source: Any) -> Any:
            args: dict[str, Arg] = {
                "input": source, "mapping_type": mapping, "block_size": block, "target_dtype": "i8", **span,
                "eps": 2.0**-23, "scale_dtype": "f32", "zero_point_dtype": "i8", "keepdim": True,
            }  # fmt: skip
            return b.node("torchao.choose_qparams_affine.default", args, ("f32", count), ("i8", count))

        scale, zero = choose(x)
        q = b.node(
            "torchao.quantize_affine.default",
            {"input": x, "block_size": block, "scale": scale, "zero_point": zero, "output_dtype": "i8", **span},
            ("i8", (1, M, K)),
        )
        q = self.view(q, "i8", (M, K))
        turned = b.node("aten.permute_copy.default", {"self": weight, "dims": (1, 0)}, ("i8", (K, N)))
        if shift is not None:
            q = self.cast(q, "i32", (M, K))
            q = b.node("aten.add.Tensor", {"self": q, "other": self.number(shift), "alpha": 1}, ("i32", (M, K)))
            q = self.cast(q, "u8", (M, K))
        y = b.node(INT_MM, {"self": q, "mat2": turned}, ("i32", (M, N)))
        self.outputs = [y] if other == "reader" else []
        if shift is not None:
            summed = b.node("aten.permute_copy.default", {"self": twin, "dims": (1, 0)}, ("i8", (K, N)))
            args: dict[str, Arg] = {"self": summed if other == "sums" else turned, "dim": (0,), "keepdim": True}
            sums = b.node("aten.sum.dim_IntList", args | {"dtype": "i32"}, ("i32", (1, N)))
            sums = b.node("aten.mul.Tensor", {"self": sums, "other": self.number(taken)}, ("i32", (1, N)))
            y = b.node("aten.sub.Tensor", {"self": y, "other": sums, "alpha": 1}, ("i32", (M, N)))
        y = self.cast(y, "f32", (M, N))
        if other == "scale":
            scale, _ = choose(b.node("aten.neg.default", {"self": x}, ("f32", (1, M, K))))
        rows = (1, 1) if other == "rows" else (M, 1)
        y = self.times(y, self.view(scale, "f32", rows))
        if corrected:
            sums = b.node(
                "aten.sum.dim_IntList", {"self": weight, "dim": (-1,), "keepdim": False, "dtype": None}, ("i64", (N,))
            )
            zeros = self.cast(self.view(zero, "i8", rows), "f32", rows)
            part = b.node("aten.mul.Tensor", {"self": zeros, "other": self.view(scale, "f32", rows)}, ("f32", rows))
            part = self.times(part, self.cast(sums, "f32", (N,)))
            y = b.node("aten.sub.Tensor", {"self": y, "other": part, "alpha": 1}, ("f32", (M, N)))
        if other == "columns":
            scales = self.constant("one", "f32", np.full((1,), 0.5, np.float32))
            y = self.times(y, scales)
        else:
            y = self.times(y, self.view(scales, "f32", (N,)))
        y = self.view(y, "f32", (1, M, N))
        y = b.node("aten.add.Tensor", {"self": y, "other": bias, "alpha": 1}, ("f32", (1, M, N)))
        self.graph = b.graph(y, *self.outputs)
        assert [check_node(self.graph, node) for node in self.graph.nodes] == [None] * len(self.graph.nodes)

    def constant(self, name: str, dtype: str, array: Any) -> Any:
        self.constants[name] = (dtype, array)
        return self.b.stored("constant", dtype, array, name)

    def number(self, value: int) -> Any:
        return self.cast(self.constant(f"n{len(self.b.values)}", "i64", np.array(value, np.int64)), "i32", ())

    def cast(self, source: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        return self.b.node("aten._to_copy.default", {"self": source, "dtype": dtype}, (dtype, shape))

    def view(self, source: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        return self.b.node("aten.view_copy.default", {"self": source, "size": shape}, (dtype, shape))

    def times(self, one: Any, other: Any) -> Any:
        return self.b.node("aten.mul.Tensor", {"self": one, "other": other}, ("f32", (M, N)))

    def after(self) -> Graph:
        graph = remove_unused(fuse_quantized(self.graph, self.constants))
        assert [check_node(graph, node) for node in graph.nodes] == [None] * len(graph.nodes)
        self.b.data |= {key: np.ascontiguousarray(array).tobytes() for key, (_, array) in self.constants.items()}
        return graph


FOUND: dict[str, dict[str, Any]] = {
    "unsigned": {}, "signed": {"shift": None}, "fewer codes": {"shift": None, "low": -64, "high": 63},
    "asymmetric": {"mapping": "ASYMMETRIC", "corrected": True},
}  # fmt: skip
LEFT: dict[str, dict[str, Any]] = {
    "another shift": {"shift": 127, "taken": 127}, "another shift taken off": {"taken": 127},
    "sums of another weight": {"other": "sums"}, "scales of something else": {"other": "scale"},
    "a scale for all rows": {"other": "rows"}, "a scale for all columns": {"other": "columns"},
    "the product is read elsewhere": {"other": "reader"}, "no correction": {"mapping": "ASYMMETRIC"},
    "a zero that nothing takes off": {"low": -100, "high": 20},
}  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_has_the_same_numbers(name: str, on: str) -> None:
    layer = Layer(**FOUND[name])
    after = layer.after()
    assert [node.op for node in after.nodes] == [FAKE, PACKED]
    x = np.random.default_rng(2).standard_normal((1, M, K)).astype(np.float32)
    x[0, 1] = 0
    [want], [got] = (run(layer.b, graph, device(on), x) for graph in (layer.graph, after))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name: str) -> None:
    layer = Layer(**LEFT[name])
    assert [node.op for node in layer.after().nodes] == [node.op for node in remove_unused(layer.graph).nodes]
