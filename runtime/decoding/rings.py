"""Ring buffers of sliding-window attention: how far back a sequence can go in them, proven from the graph's records.

ExecuTorch exports a window of W tokens as caches [B, R, H, D] whose row p mod R belongs to position p, and a buffer
[R] with the position that each row holds (`CachePositionsManager` of `executorch.examples.models.llama.attention`):

    seen = arange(S) + start,  rows = seen mod R
    positions = where(arange(R) < start, positions, -1), then positions[rows] = seen
    key, value caches: update_cache_with_indices(..., rows)
    mask = where(positions >= 0 and seen - positions >= 0 and seen - positions < W, 0, -inf)

So a token at position x sees those of x - W + 1 to x, and what rows hold of positions after x is masked. Nothing else
may read the buffers. Anything that differs is not recognised, and such a state cannot go back.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...backend.graph import Arg, Dim, Graph, Node, Ref, Sym, Value
from ..methods.method import Method

_SAME = ("aten.unsqueeze_copy.default", "aten.view_copy.default", "aten._to_copy.default", "aten.alias_copy.default",
         "aten.clone.default", "aten.squeeze_copy.dims")  # fmt: skip
"""Operators that keep the elements in their order; dtypes are integers here."""


@dataclass(frozen=True)
class Rings:
    """The ring buffers of a program.

    Attributes:
        rows: of a ring, R; the fewest of all.
        window: tokens that one sees, W; the most of all.
    """

    rows: int
    window: int

    def floor(self, floor: int, run: int) -> int:
        """The first position that the rings hold when `run` tokens were run, given the first before."""
        return max(floor, run - self.rows)

    def oldest(self, floor: int) -> int:
        """The first position at which a token can be run: all that it sees is there."""
        return floor + self.window - 1 if floor else 0


def find_rings(method: Method, capacity: int | None) -> Rings | None:
    """The rings of a method whose other buffers are caches with a row for each of `capacity` positions.

    None where there are none, or where it is not proven that going back does no harm.
    """
    if capacity is None or method.outside():
        return None
    found: list[Rings] = []
    for delegate in method.delegates:
        rings = _Matcher(delegate.graph).rings(capacity)
        if rings is None:
            return None
        found += rings
    return Rings(min(r.rows for r in found), max(r.window for r in found)) if found else None


class _Matcher:
    """Recognises the records of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made = {index: node for node in graph.nodes for index in node.outputs}
        self.readers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for index in set(node.inputs()):
                self.readers.setdefault(index, []).append(node)

    def rings(self, capacity: int) -> list[Rings] | None:
        """None if some buffer is neither a cache by position nor part of a ring."""
        found = []
        updates = dict(self.graph.mutations)
        for index, value in enumerate(self.graph.values):
            if value.kind != "mutable" or value.alias is not None or _by_position(value, capacity):
                continue
            after = updates.get(index)
            ring = None
            if after is not None and len(value.shape) == 1:
                ring = self._positions(index, after)
            elif after is not None and len(value.shape) == 4:
                ring = self._cache(index, after)
            if ring is None:
                return None
            found.append(ring)
        return found

    # -- the two kinds of buffers

    def _positions(self, index: int, after: int) -> Rings | None:
        """A buffer [R] of positions: its update is as expected, and it is read for masks alone."""
        rows = self.graph.values[index].shape[0]
        update = self._seen(after)
        if update is None or update[0] != index or not isinstance(rows, int) or update[1] != rows:
            return None
        windows = []
        for node in self.readers.get(after, []):
            for mask in self._masks_from(node):
                window = self._window(Ref(mask), after)
                if window is None:
                    return None
                windows.append(window)
        return Rings(rows, max(windows)) if windows else None

    def _cache(self, index: int, after: int) -> Rings | None:
        """A cache [B, R, H, D]: written at rows seen mod R, read by attention under a ring's mask alone."""
        node, rows = self.made.get(after), self.graph.values[index].shape[1]
        if node is None or node.op != "llama.update_cache_with_indices.default" or node.args["cache"] != Ref(index):
            return None
        seen = self._rows(node.args["indices"])
        if seen is None or not isinstance(rows, int) or seen[1] != rows or self.readers[index] != [node]:
            return None
        windows = []
        for reader in self.readers.get(after, []):
            if reader.op != "webgpu.attention" or reader.args["kv_layout"] != "bshd":
                return None
            found = self._mask_buffer(reader.args["attn_mask"])
            update = None if found is None else self._seen(found[0])
            if found is None or update is None or update[1:] != (rows, seen[0]):
                return None
            windows.append(found[1])
        return Rings(rows, max(windows)) if windows else None

    # -- parts

    def _through(self, arg: Arg) -> Node | None:
        """The node that made a value, read through operators that change nothing."""
        node = self._node(arg)
        while node is not None and node.op in _SAME:
            node = self._node(node.args["self"])
        return node

    def _node(self, arg: Arg) -> Node | None:
        return self.made.get(arg.value) if isinstance(arg, Ref) else None

    def _new(self, arg: Arg) -> Dim | None:
        """The start of `arange(S) + start`; None if it is something else."""
        node = self._through(arg)
        if node is None or node.op != "aten.add.Tensor" or node.args["alpha"] != 1:
            return None
        for one, other in ((node.args["self"], node.args["other"]), (node.args["other"], node.args["self"])):
            scalar = self._through(other)
            if self._arange(one) is not None and scalar is not None and scalar.op == "aten.scalar_tensor.default":
                start = scalar.args["s"]
                return start if isinstance(start, int | Sym) else None
        return None

    def _arange(self, arg: Arg) -> Dim | None:
        """The end of `arange(0, end)`."""
        node = self._through(arg)
        if node is None or node.op != "aten.arange.start_step" or (node.args["start"], node.args["step"]) != (0, 1):
            return None
        end = node.args["end"]
        return end if isinstance(end, int | Sym) else None

    def _rows(self, arg: Arg) -> tuple[Dim, int] | None:
        """(start, R) of `(arange(S) + start) mod R`."""
        node = self._through(arg)
        if node is None or node.op != "aten.remainder.Scalar":
            return None
        start, rows = self._new(node.args["self"]), node.args["other"]
        return None if start is None or not isinstance(rows, int) else (start, rows)

    def _seen(self, after: int) -> tuple[int, int, Dim] | None:
        """(buffer, R, start) of an update of positions, whose buffer nothing else reads."""
        node = self.made.get(after)
        if node is None or node.op != "aten.index_put.default" or node.args["accumulate"] is not False:
            return None
        indices = node.args["indices"]
        place = self._rows(indices[0]) if isinstance(indices, tuple) and len(indices) == 1 else None
        start = self._new(node.args["values"])
        if place is None or start is None or place[0] != start:
            return None
        kept, copied = self._node(node.args["self"]), None
        if kept is not None and kept.op == "aten.copy.default":
            copied, kept = kept, self._node(kept.args["src"])
        if kept is None or kept.op != "aten.where.self":
            return None
        buffer, none = kept.args["self"], self._node(kept.args["other"])
        before = self._node(kept.args["condition"])
        good = (
            isinstance(buffer, Ref)
            and none is not None
            and (none.op, none.args.get("fill_value")) == ("aten.full.default", -1)
            and before is not None
            and (before.op, before.args.get("other")) == ("aten.lt.Scalar", start)
            and self._arange(before.args["self"]) == place[1]
        )
        if not good or not isinstance(buffer, Ref):
            return None
        allowed = [item for item in (kept, copied) if item is not None]
        between = [index for item in allowed for index in item.outputs]
        if any(reader not in allowed for reader in self.readers[buffer.value]):
            return None
        if any(reader not in (*allowed, node) for index in between for reader in self.readers.get(index, [])):
            return None
        return buffer.value, place[1], start

    def _masks_from(self, node: Node) -> list[int]:
        """The masks (results of `where`) that follow from a comparison; [-1] if anything else does."""
        if node.op == "aten.where.self":
            return list(node.outputs)
        if node.op not in (
            "aten.sub.Tensor", "aten.ge.Scalar", "aten.lt.Scalar", "aten.bitwise_and.Tensor", "aten.logical_and.default"
        ):  # fmt: skip
            return [-1]
        following = [reader for index in node.outputs for reader in self.readers.get(index, [])]
        return [mask for reader in following for mask in self._masks_from(reader)]

    def _window(self, mask: Arg, after: int) -> int | None:
        """W of a mask over the positions `after`."""
        found = self._mask_buffer(mask)
        return found[1] if found is not None and found[0] == after else None

    def _mask_buffer(self, mask: Arg) -> tuple[int, int] | None:
        """(positions, W) of a mask as in the module's docstring."""
        node = self._through(mask)
        if node is None or node.op != "aten.where.self":
            return None
        values = [self._scalar(node.args[name]) for name in ("self", "other")]
        if values != [0, float("-inf")]:
            return None
        terms = self._terms(node.args["condition"])
        held: set[int] = set()
        kinds: set[str] = set()
        window = 0
        for term in terms:
            what, limit = self._node(term.args["self"]), term.args["other"]
            source = term.args["self"]
            if what is not None and what.op == "aten.sub.Tensor" and what.args["alpha"] == 1:
                positions = what.args["other"]
                update = self._seen(positions.value) if isinstance(positions, Ref) else None
                if update is None or self._new(what.args["self"]) != update[2] or not isinstance(positions, Ref):
                    return None
                held.add(positions.value)
                if term.op == "aten.ge.Scalar" and limit == 0:
                    kinds.add("causal")
                elif term.op == "aten.lt.Scalar" and isinstance(limit, int) and limit > 0:
                    kinds.add("window")
                    window = limit
                else:
                    return None
            elif isinstance(source, Ref) and (term.op, limit) == ("aten.ge.Scalar", 0):
                held.add(source.value)
                kinds.add("filled")
            else:
                return None
        if kinds != {"causal", "window", "filled"} or len(held) != 1:
            return None
        return held.pop(), window

    def _terms(self, arg: Arg) -> list[Node]:
        """The comparisons that a condition is the conjunction of."""
        node = self._node(arg)
        if node is None:
            return []
        if node.op in ("aten.bitwise_and.Tensor", "aten.logical_and.default"):
            return [*self._terms(node.args["self"]), *self._terms(node.args["other"])]
        return [node] if node.op in ("aten.ge.Scalar", "aten.lt.Scalar") else []

    def _scalar(self, arg: Arg) -> object:
        node = self._node(arg)
        if node is not None and node.op == "aten.scalar_tensor.default":
            return node.args["s"]
        return None


def _by_position(value: Value, capacity: int) -> bool:
    return len(value.shape) == 4 and any(isinstance(size, int) and size >= capacity for size in value.shape[1:3])
