"""Projections with what stands before and after them as `webgpu.project`: norm, sibling layers, gate, residual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...ops.norm import DEFAULT_EPS
from ...ops.project import MAX_WEIGHTS, NAME, supports
from ..graph import Arg, Graph, Node, Ref
from .match import ADD, NORMS, operands
from .rewrite import Editor, Links

_PACKED = "webgpu.linear_packed"
_LINEAR = ("aten.linear.default", "webgpu.linear", _PACKED)
_SWIGLU = "webgpu.swiglu"


@dataclass(frozen=True)
class _Group:
    """The nodes that one `webgpu.project` replaces, what it computes, and the position where it goes."""

    linears: tuple[Node, ...]
    gate: Node | None
    residual: Node | None
    norm: Node | None
    place: int

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (*self.linears, *(node for node in (self.gate, self.residual, self.norm) if node is not None))


def fuse_projections(graph: Graph) -> Graph:
    """Linear layers of one input, two or three at a time, as one node; with them the RMSNorm that nothing else reads,
    the SwiGLU of two of them, and the sum with a residual after one of them or after the SwiGLU.

    Each part is taken or left by itself. A single linear layer with none of them stays as it is.
    """
    links = Links(graph)
    gone: set[int] = set()
    made: dict[int, list[Node]] = {}
    for group in _groups(links):
        node = _fused(group)
        if gone & _outputs(group.nodes) or supports(graph, node) is not None:
            continue
        gone |= _outputs(group.nodes)
        made.setdefault(group.place, []).append(node)
    editor = Editor(graph)
    for number, node in enumerate(graph.nodes):
        editor.nodes.extend(made.get(number, ()))
        if not gone.intersection(node.outputs):
            editor.nodes.append(node)
    return editor.finish()


def _outputs(nodes: Sequence[Node]) -> set[int]:
    return {output for node in nodes for output in node.outputs}


def _groups(links: Links) -> Iterator[_Group]:
    """Candidates in the order in which they are to be tried: those that hold most first."""
    by_input: dict[int, list[Node]] = {}
    for node in links.graph.nodes:
        if _is_projection(links, node):
            by_input.setdefault(next(node.inputs()), []).append(node)
    for nodes in by_input.values():
        gates = [pair for pair in (_pair(links, node) for node in nodes) if pair is not None]
        paired = {output for gate, up, _ in gates for output in (*gate.outputs, *up.outputs)}
        rest = [node for node in nodes if node.outputs[0] not in paired]
        for gate, up, swiglu in gates:
            yield from _with_parts(links, (gate, up), swiglu)
        for first in range(0, len(rest), MAX_WEIGHTS):
            several = tuple(rest[first : first + MAX_WEIGHTS])
            if len(several) > 1:
                yield from _with_parts(links, several, None)
        for node in rest:
            yield from _with_parts(links, (node,), None)


def _is_projection(links: Links, node: Node) -> bool:
    """Whether a node is a linear layer x w^T with a matrix w, a bias of one row or none."""
    return (
        node.op in _LINEAR
        and node.args.get("transposed", True) is True
        and isinstance(node.args["input"], Ref)
        and len(links.value(node.args["weight"]).shape) == 2
    )


def _pair(links: Links, gate: Node) -> tuple[Node, Node, Node] | None:
    """(gate, up, SwiGLU of both) for a linear layer that is the gate of one of the same input."""
    swiglu = links.only_reader(gate.outputs[0])
    if swiglu is None or swiglu.op != _SWIGLU or swiglu.args["gate"] != Ref(gate.outputs[0]):
        return None
    up = links.made_by(swiglu.args["up"], *_LINEAR)
    if up is None or not _is_projection(links, up) or up.args["input"] != gate.args["input"] or up is gate:
        return None
    return (gate, up, swiglu) if links.only_reader(up.outputs[0]) is swiglu else None


def _with_parts(links: Links, linears: tuple[Node, ...], gate: Node | None) -> Iterator[_Group]:
    """Groups with norm and residual, with one of them, without."""
    norm = _norm(links, linears)
    last = gate if gate is not None else linears[0] if len(linears) == 1 else None
    residual = None if last is None else _residual(links, last)
    for more in (residual, None) if residual is not None else (None,):
        for before in (norm, None) if norm is not None else (None,):
            if len(linears) == 1 and more is None and before is None:
                continue
            end = more if more is not None else gate
            place = _place(links, linears, before) if end is None else links.position[end.outputs[0]]
            if place is not None:
                yield _Group(linears, gate, more, before, place)


def _norm(links: Links, linears: tuple[Node, ...]) -> Node | None:
    """The norm that makes the input, if only these layers read it."""
    norm = links.made_by(linears[0].args["input"], *NORMS)
    if norm is None:
        return None
    axes = norm.args.get("normalized_shape", (None,))
    if not isinstance(axes, tuple) or len(axes) != 1:
        return None
    readers = {reader for output in norm.outputs for reader in links.readers.get(output, [])}
    return norm if readers == {links.position[node.outputs[0]] for node in linears} else None


def _eps(norm: Node) -> Arg:
    eps = norm.args.get("eps")
    return DEFAULT_EPS if eps is None else eps


def _residual(links: Links, last: Node) -> Node | None:
    """The sum of equal shapes that alone reads a result."""
    result = last.outputs[0]
    add = links.only_reader(result)
    if add is None or add.op not in ADD:
        return None
    mine, total = links.graph.values[result], links.graph.values[add.outputs[0]]
    for one, other in operands(add):
        if one == Ref(result) and isinstance(other, Ref) and other != one:
            value = links.value(other)
            if (value.shape, value.dtype) == (mine.shape, mine.dtype) == (total.shape, total.dtype):
                return add
    return None


def _place(links: Links, linears: tuple[Node, ...], norm: Node | None) -> int | None:
    """Where the first of sibling layers stands, if all they need is there by then."""
    place = min(links.position[node.outputs[0]] for node in linears)
    needed = [value for node in linears for value in node.inputs()]
    needed += [] if norm is None else list(norm.inputs())
    return place if all(links.position.get(value, -1) < place for value in needed) else None


def _fused(group: _Group) -> Node:
    first, end = group.linears[0], group.residual or group.gate
    args: dict[str, Arg] = {
        "input": first.args["input"] if group.norm is None else group.norm.args["input"],
        "weights": tuple(node.args["weight"] for node in group.linears),
        "formats": _formats(group.linears),
        "biases": _biases(group.linears),
        "norm_weight": None if group.norm is None else group.norm.args.get("weight"),
        "norm_eps": None if group.norm is None else _eps(group.norm),
        "residual": _other(group),
        "gated": group.gate is not None,
    }
    outputs = tuple(node.outputs[0] for node in group.linears) if end is None else end.outputs
    return Node(NAME, args, outputs, (end or first).name)


def _formats(linears: Sequence[Node]) -> Arg:
    """Of packed weights."""
    found: tuple[Arg, ...] = tuple(node.args["format"] if node.op == _PACKED else None for node in linears)
    return None if all(form is None for form in found) else found


def _biases(linears: Sequence[Node]) -> Arg:
    found: tuple[Arg, ...] = tuple(node.args.get("bias") for node in linears)
    return None if all(bias is None for bias in found) else found


def _other(group: _Group) -> Arg:
    """What a residual adds to the projection."""
    if group.residual is None:
        return None
    result = Ref((group.gate or group.linears[0]).outputs[0])
    return next(other for one, other in operands(group.residual) if one == result)
