"""What the nodes of a graph must move and compute at least, for rates next to their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..backend.graph import Graph, Node, Ref, Sym, evaluate, refs
from ..ops.base import Limits
from ..runtime.methods.delegate import KernelTime

_PRODUCTS = {
    "webgpu.project": "input",
    "webgpu.project_cache": "input",
    "webgpu.linear": "input",
    "webgpu.linear_packed": "input",
    "aten.linear.default": "input",
    "aten.mm.default": "self",
    "aten.bmm.default": "self",
    "aten.matmul.default": "self",
    "aten.addmm.default": "mat1",
    "aten.baddbmm.default": "batch1",
}
"""Matrix products, and the argument whose last axis is summed over."""
_TABLES = ("aten.embedding", "webgpu.embedding", "webgpu.rope", "llama.update_cache", "webgpu.update_cache")
"""Beginnings of operators that touch few rows of what they are given: only what they make is counted, twice."""
_LITTLE = {"webgpu.project_cache": ("key_cache", "value_cache", "cos", "sin")}
"""Arguments that a matrix product touches few rows of: they are not counted."""
_ITEM = {"f16": 2, "f32": 4, "i32": 4, "u32": 4}


@dataclass(frozen=True)
class Cost:
    """Bytes to move between memory and the GPU's cores, and floating-point operations (None: not counted)."""

    bytes: int
    flops: int | None = None


@dataclass(frozen=True)
class KernelCost:
    """All dispatches of a kernel in a step.

    Attributes:
        bytes, flops: of the nodes whose longest dispatch is one of this kernel; None: not known.
    """

    kernel: str
    count: int
    nanoseconds: int
    bytes: int | None
    flops: int | None

    @property
    def gb_per_second(self) -> float | None:
        return None if self.bytes is None or not self.nanoseconds else self.bytes / self.nanoseconds

    @property
    def gflop_per_second(self) -> float | None:
        return None if not self.flops or not self.nanoseconds else self.flops / self.nanoseconds


def node_cost(graph: Graph, node: Node, limits: Limits, free: Callable[[Sym], int], keys: int) -> Cost:
    """What a node must move and compute.

    Constants count once in whole, activations once for each node that reads or writes them, caches with the rows that
    are in use, and operators that look rows up with what they make. A matrix product of x [.., K] to [.., N] is 2 K N
    operations a row, attention 2 (D_k + D_v) a query and key that it sees.

    Args:
        free: values of symbols.
        keys: rows of the caches in use after the step.
    """

    def numel(index: int) -> int:
        total = 1
        for dim in graph.values[index].shape:
            total *= evaluate(dim, free)
        return total

    def size(index: int) -> int:
        return numel(index) * _ITEM[limits.wgsl_type(graph.storage_dtype(index))]

    made = sum(size(index) for index in node.outputs if not _mutable(graph, index))
    if node.op.startswith(_TABLES):
        return Cost(2 * made)
    total, rows = made, 1
    little = _LITTLE.get(node.op, ())
    for index in dict.fromkeys(index for name, arg in node.args.items() if name not in little for index in refs(arg)):
        root = graph.values[graph.root(index)]
        if root.kind == "mutable" and len(root.shape) == 4:
            capacity = max(evaluate(dim, free) for dim in root.shape[1:3])
            total += size(index) * min(keys, capacity) // max(capacity, 1)
        else:
            total += size(index)
    if node.op == "webgpu.attention":
        query, key, value = (node.args[name] for name in ("query", "key", "value"))
        assert isinstance(query, Ref)
        width, wide = (evaluate(graph.value(x).shape[-1], free) for x in (key, value))
        axis = 1 if str(node.args.get("q_layout", "bshd")).startswith("bs") else 2
        rows = evaluate(graph.value(query).shape[axis], free)
        pairs = rows * (keys - rows) + rows * (rows + 1) // 2
        return Cost(total, 2 * (width + wide) * pairs * numel(query.value) // max(width * rows, 1))
    summed = node.args.get(_PRODUCTS.get(node.op, ""))
    if isinstance(summed, Ref):
        inner = evaluate(graph.value(summed).shape[-1], free)
        twice = 2 if node.args.get("gated") is True else 1
        results = sum(numel(index) for index in node.outputs)
        if little:  # query is a result, key and value stand in the caches
            columns = [evaluate(graph.values[index].shape[0], free) for index in refs(node.args["weights"])]
            results = numel(node.outputs[0]) * sum(columns) // columns[0]
        return Cost(total, 2 * inner * twice * results)
    return Cost(total)


def _mutable(graph: Graph, index: int) -> bool:
    return graph.values[graph.root(index)].kind == "mutable"


def by_kernel(times: Sequence[KernelTime], costs: Sequence[tuple[Cost, int]] | None = None) -> list[KernelCost]:
    """Times added up for each kernel, the longest first.

    Args:
        costs: of each node in the order of the times, with the number of its dispatches; None: not known.
    """
    owner: list[Cost | None] = [None] * len(times)
    first = 0
    for cost, count in costs or ():
        if count:
            longest = max(range(first, first + count), key=lambda i: times[i].nanoseconds)
            owner[longest] = cost
        first += count
    found: dict[str, list[int]] = {}
    for number, time in enumerate(times):
        found.setdefault(time.kernel, []).append(number)
    result = []
    for kernel, numbers in found.items():
        known = [cost for cost in (owner[i] for i in numbers) if cost is not None]
        flops = [cost.flops for cost in known if cost.flops is not None]
        result.append(
            KernelCost(
                kernel,
                len(numbers),
                sum(times[i].nanoseconds for i in numbers),
                sum(cost.bytes for cost in known) if known else None,
                sum(flops) if flops else None,
            )
        )
    return sorted(result, key=lambda item: (-item.nanoseconds, item.kernel))
