"""The pass that expands group-query attention: the records it makes mean what the operator means.

They are computed here record by record in float64, by PyTorch, as their modules document them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from executorch_webgpu.backend.graph import Arg, Graph, Node, Ref, evaluate
from executorch_webgpu.backend.passes import OPTIONAL, run_passes
from executorch_webgpu.backend.passes.cleanup import remove_unused
from executorch_webgpu.backend.passes.group_query import expand_group_query
from tests.llm.cases import FORMS, Case, arguments, close, reference
from tests.llm.records import CACHES, INPUTS, build

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float64}


class Interpreter:
    """Values of a graph by index; tensors are float64, or integers."""

    def __init__(self, graph: Graph, given: dict[str, Any]) -> None:
        self.graph = graph
        self.values: dict[int, torch.Tensor] = {}
        feeds = [given[name] for name in INPUTS if given[name] is not None]
        self.values.update(zip(graph.inputs, map(wide, feeds), strict=True))
        for index, value in enumerate(graph.values):
            if value.data is not None:
                self.values[index] = wide(given[value.data])
        self.rows = feeds[0].shape[1]

    def run(self) -> dict[str, torch.Tensor]:
        """The result, and the new caches by name."""
        for node in self.graph.nodes:
            found = OPERATORS[node.op](self, {name: self.arg(arg) for name, arg in node.args.items()}, node)
            self.values.update(zip(node.outputs, found, strict=True))
        [out] = self.graph.outputs
        assert isinstance(out, Ref)
        caches = {self.graph.values[old].name: self.values[new] for old, new in self.graph.mutations}
        return {"out": self.values[out.value], **caches}

    def arg(self, arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return self.values[arg.value]
        if isinstance(arg, tuple):
            return tuple(self.arg(item) for item in arg)
        return arg if not hasattr(arg, "op") else evaluate(arg, lambda symbol: self.rows)  # type: ignore[arg-type]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def sliced(_: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    return [args["self"].narrow(args["dim"], args["start"], args["end"] - args["start"])]


def padded(_: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    return [torch.nn.functional.pad(args["self"], args["pad"], value=args["value"])]


def cast(_: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    return [args["self"].to(DTYPES[args["dtype"]]).double()]


def normed(_: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    x = args["input"]
    return [torch.nn.functional.rms_norm(x, x.shape[-1:], args["weight"], args["eps"])]


def lengths(_: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    past = args["past"].reshape(-1)
    new = torch.full_like(past, args["rows"]) if args["q_len"] is None else args["q_len"].reshape(-1)
    assert bool(((past >= 0) & (new >= 0) & (new <= args["rows"]) & (past + new <= args["capacity"])).all())
    return [torch.stack([past, new, 0 * past, 0 * past], 1)]


def write(interpreter: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    return [written(args["cache"], args["value"], args["lengths"])]


def written(cache: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    cache = cache.clone()
    for b, (past, new, *_) in enumerate(rows.tolist()):
        cache[b, past : past + new] = value[b, :new]
    return cache


def rope_cache(interpreter: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    assert (args["start"], args["start_pos"], args["layout"]) == (0, 0, "bshd")

    def turned(x: torch.Tensor) -> torch.Tensor:
        rows = args["lengths"][:, :1] + torch.arange(x.shape[1])
        c, s = (args[name][rows.clamp(max=args[name].shape[0] - 1)][:, :, None] for name in ("cos", "sin"))
        rot, half = args["rot"], args["rot"] // 2
        pairs = (slice(0, rot, 2), slice(1, rot, 2)) if args["interleaved"] else (slice(0, half), slice(half, rot))
        a, b, x = x[..., pairs[0]], x[..., pairs[1]], x.clone()
        x[..., pairs[0]], x[..., pairs[1]] = a * c - b * s, b * c + a * s
        return x

    dtype = DTYPES[interpreter.graph.value(node.args["key_cache"]).dtype]
    key = turned(args["key"]).to(dtype).double()
    caches = (
        written(args["key_cache"], key, args["lengths"]),
        written(args["value_cache"], args["value"], args["lengths"]),
    )
    return [turned(args["query"]), *caches, torch.zeros(8)]


def attention(_: Interpreter, args: dict[str, Any], node: Node) -> list[torch.Tensor]:
    assert {args[name] for name in ("q_layout", "kv_layout", "out_layout")} == {"bshd"}
    q, k, v = args["query"], args["key"], args["value"]
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * (q.shape[3] ** -0.5 if args["scale"] is None else args["scale"])
    if args["softcap"]:
        scores = args["softcap"] * torch.tanh(scores / args["softcap"])
    past, new = args["lengths"][:, 0, None, None], args["lengths"][:, 1, None, None]
    i, j = torch.arange(q.shape[1])[None, :, None], torch.arange(k.shape[1])[None, None]
    seen = (j <= past + i if args["kv_limit"] == "causal" else j < past + new) & (i < new)
    if args["window"]:
        seen = seen & (j > past + i - args["window"])
    seen = seen[:, None].expand(scores.shape)
    if args["attn_mask"] is not None:
        mask = args["attn_mask"]
        mask = mask if mask.shape[-1] == 1 else mask[..., : k.shape[1]]
        seen, scores = (seen & mask, scores) if mask.dtype == torch.bool else (seen, scores + mask)
    weights = torch.where(seen, scores, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if args["sink"] is not None:
        total = total + args["sink"][None, :, None, None].exp()
    return [torch.einsum("bhst,bthd->bshd", weights / total.clamp(min=1e-300), v)]


OPERATORS: dict[str, Callable[[Interpreter, dict[str, Any], Node], list[torch.Tensor]]] = {
    "aten.slice_copy.Tensor": sliced,
    "aten.view_copy.default": lambda _, args, node: [args["self"].reshape(args["size"])],
    "aten.constant_pad_nd.default": padded,
    "aten._to_copy.default": cast,
    "aten.full.default": lambda _, args, node: [torch.full(args["size"], args["fill_value"], dtype=torch.float64)],
    "webgpu.rms_norm": normed,
    "webgpu.lengths": lengths,
    "webgpu.update_cache": write,
    "webgpu.rope_cache": rope_cache,
    "webgpu.attention": attention,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_records_mean_what_the_operator_means(name: str) -> None:
    case: Case = FORMS[name]
    given = arguments(case)
    given |= {cache: given[cache].clamp(max=100) for cache in CACHES}  # its float64 weights would overflow
    want, keys, values = reference(case, given)
    _, graph = build(case, given)
    found = Interpreter(remove_unused(expand_group_query(graph)), given).run()
    # not rounded between the records, other than the operator's own result
    close(found["out"], want, given["key_cache"].dtype)
    close(found["key_cache"], keys, given["key_cache"].dtype)
    close(found["value_cache"], values, given["value_cache"].dtype)


@pytest.mark.parametrize("disabled", [(), tuple(OPTIONAL)])
def test_always_expanded(disabled: tuple[str, ...]) -> None:
    _, graph = build(FORMS["everything"], arguments(FORMS["everything"]))
    ops = [node.op for node in run_passes(graph, disabled).nodes]
    assert [op for op in ops if op.startswith("webgpu.")] == [
        "webgpu.rms_norm",
        "webgpu.rms_norm",
        "webgpu.lengths",
        "webgpu.rope_cache",
        "webgpu.attention",
    ]
    assert not any(op.startswith("executorch_webgpu.") for op in ops)


def test_caches_are_written_in_place() -> None:
    for name in ("packed", "half-split rotary"):
        _, graph = build(FORMS[name], arguments(FORMS[name]))
        done = run_passes(graph)
        assert all(done.root(new) == old for old, new in done.mutations)


def test_a_short_bias_limits_the_lengths() -> None:
    """Seven columns for 16 cache rows: the host lets no row grow above them."""
    _, graph = build(FORMS["short bias"], arguments(FORMS["short bias"]))
    nodes = {node.op: node for node in expand_group_query(graph).nodes}
    assert nodes["webgpu.lengths"].args["capacity"] == 7
    assert nodes["aten.constant_pad_nd.default"].args["pad"] == (0, 9)
