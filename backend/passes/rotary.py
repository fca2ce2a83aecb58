"""Rotary position embedding, spelled out by exporters as slices, products and concatenations, as `webgpu.rope`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..graph import Arg, Graph, Node, Ref, make_dim
from .match import ADD, CAST, MUL, SQUEEZE, SUB, UNSQUEEZE, VIEW, operands, sliced, swaps_middle, uncast
from .rewrite import Editor, Links, map_nodes

NARROW = {"f32", "f16", "bf16"}


@dataclass(frozen=True)
class _Rope:
    """What a match found: x and the two tables as they are multiplied, broadcast against x."""

    x: Arg
    cos: Arg
    sin: Arg
    interleaved: bool
    rot: int


def fuse_rope(graph: Graph) -> Graph:
    """Interleaved pairs (Llama checkpoints), half-split pairs (Hugging Face), and partial rotary of either.

    A cast of x to float32 before and of the result back after are folded in; a permute [B,S,H,D] -> [B,H,S,D] of x is
    moved behind, where
    attention and cache writes take it in.
    """
    links = Links(graph)
    editor = Editor(graph)
    folded: set[int] = set()

    def change(node: Node) -> list[Node] | None:
        if folded.intersection(node.outputs):
            return []
        found = _interleaved(links, node) or _partial(links, node) or _half_split(links, Ref(node.outputs[0]))
        made = None if found is None else _build(links, editor, node, found)
        if made is None:
            return None
        follower = links.only_reader(node.outputs[0])
        if follower is not None and follower.op in CAST and {_dtype(links, node), _dtype(links, follower)} <= NARROW:
            folded.update(follower.outputs)
            made[-1] = replace(made[-1], outputs=follower.outputs)
        return made

    return map_nodes(graph, change, editor)


def _dtype(links: Links, node: Node) -> str:
    return links.graph.values[node.outputs[0]].dtype


def _build(links: Links, editor: Editor, node: Node, found: _Rope) -> list[Node] | None:
    """The fused node, and a permute after it if x came through one; None where the tables do not fit."""
    layout = _layout(links, found)
    if layout is None:
        return None
    cos, start = _table(links, found.cos)
    sin, other = _table(links, found.sin)
    if start != other or links.value(cos).shape != links.value(sin).shape:
        cos, sin, start = found.cos, found.sin, 0
    x = uncast(links, found.x)
    args: dict[str, Arg] = {"cos": cos, "sin": sin, "start": start, "rot": found.rot, "interleaved": found.interleaved}
    permute = links.made_by(x)
    if layout == "bhsd" and permute is not None and swaps_middle(links, permute):
        source = uncast(links, permute.args["self"])
        shape = links.value(source).shape
        turned = editor.temp(Ref(node.outputs[0]), f"{node.name}.bshd", shape=shape)
        rope = Node("webgpu.rope", {"input": source, **args, "layout": "bshd"}, (turned.value,), node.name)
        return [
            rope,
            Node("aten.permute_copy.default", {"self": turned, "dims": (0, 2, 1, 3)}, node.outputs, node.name),
        ]
    return [replace(node, op="webgpu.rope", args={"input": x, **args, "layout": layout})]


def _layout(links: Links, found: _Rope) -> str | None:
    """Which axis of x the table's rows run along: 1 ("bshd") or 2 ("bhsd")."""
    x, table = links.value(found.x).shape, links.value(found.cos).shape
    if len(x) != 4 or len(table) > 4:
        return None
    table = (1,) * (4 - len(table)) + table
    if (
        table[0] != 1
        or links.value(found.sin).shape[-len(links.value(found.cos).shape) :] != links.value(found.cos).shape
    ):
        return None
    if table[2] == 1 and table[1] == x[1]:
        return "bshd"
    if table[1] == 1 and table[2] == x[2]:
        return "bhsd"
    return None


def _table(links: Links, arg: Arg) -> tuple[Arg, Arg]:
    """(whole table, first row) behind the rows in use: reshapes of a slice of a [rows, width] table; else the rows
    themselves and 0."""
    current = uncast(links, arg)
    while True:
        node = links.made_by(current, *VIEW, *UNSQUEEZE)
        if node is None:
            break
        before, after = links.value(node.args["self"]).shape, links.value(current).shape
        if [d for d in before if d != 1] != [d for d in after if d != 1]:
            return arg, 0
        current = uncast(links, node.args["self"])
    piece = sliced(links, current, 0) if len(links.value(current).shape) == 2 else None
    if piece is None:
        return arg, 0
    source, start, end = piece
    rows = links.value(current).shape[0]
    if not isinstance(end, int) and end != make_dim("add", start, rows) and end != make_dim("add", rows, start):  # type: ignore[arg-type]
        return arg, 0
    return source, start  # type: ignore[return-value]


def _interleaved(links: Links, node: Node) -> _Rope | None:
    """view(cat(unsqueeze(a*c - b*s), unsqueeze(a*s + b*c))) with a, b the even and odd elements of x."""
    if node.op not in VIEW:
        return None
    cat = links.made_by(node.args["self"], "aten.cat.default", "aten.stack.default")
    parts = cat.args["tensors"] if cat is not None else None
    if cat is None or not isinstance(parts, tuple) or len(parts) != 2:
        return None
    if cat.op == "aten.cat.default":
        unsqueezed = [links.made_by(p, *UNSQUEEZE, *VIEW) for p in parts]
        if None in unsqueezed:
            return None
        parts = tuple(u.args["self"] for u in unsqueezed if u is not None)
    real, imaginary = links.made_by(parts[0], *SUB), links.made_by(parts[1], *ADD)
    if real is None or imaginary is None or real.args.get("alpha", 1) != 1:
        return None
    for a, cos in operands(links.made_by(real.args["self"], *MUL)):
        for b, sin in operands(links.made_by(real.args["other"], *MUL)):
            if not _products(links, imaginary, (a, sin), (b, cos)):
                continue
            x, y = _element_of_pair(links, a, 0), _element_of_pair(links, b, 1)
            if x is not None and x == y and links.value(x).shape == links.graph.values[node.outputs[0]].shape:
                size = links.value(x).shape[-1]
                return _Rope(x, cos, sin, True, size) if isinstance(size, int) else None
    return None


def _products(links: Links, total: Node, first: tuple[Arg, Arg], second: tuple[Arg, Arg]) -> bool:
    """Whether a sum is first[0] * first[1] + second[0] * second[1], in any order."""
    wanted = [{_key(a), _key(b)} for a, b in (first, second)]
    for one, other in operands(total):
        found = [links.made_by(one, *MUL), links.made_by(other, *MUL)]
        sets = [{_key(n.args["self"]), _key(n.args["other"])} for n in found if n is not None]
        if sets == wanted:
            return True
    return False


def _key(arg: Arg) -> object:
    return arg.value if isinstance(arg, Ref) else repr(arg)


def _element_of_pair(links: Links, arg: Arg, which: int) -> Arg:
    """x [.., D] if `arg` is its elements `which`, `which` + 2, ...: squeeze(slice(view(x, [.., D/2, 2]), last axis,
    which))."""
    node = links.made_by(arg, *SQUEEZE, *VIEW, "aten.select_copy.int", "aten.select.int")
    if node is None:
        return None
    if node.op.startswith("aten.select"):
        pairs, index = node.args["self"], node.args["index"]
        if (
            index != which
            or int(str(node.args["dim"])) % len(links.value(pairs).shape) != len(links.value(pairs).shape) - 1
        ):
            return None
    else:
        piece = sliced(links, node.args["self"], -1)
        if piece is None or piece[1:] != (which, which + 1):
            return None
        pairs = piece[0]
    view = links.made_by(pairs, *VIEW)
    if view is None or links.value(pairs).shape[-1] != 2:
        return None
    return view.args["self"]


def _half_split(links: Links, arg: Arg) -> _Rope | None:
    """x * cos + cat(-x[h:], x[:h]) * sin."""
    total = links.made_by(arg, *ADD)
    for straight, turned in operands(total):
        for x, cos in operands(links.made_by(straight, *MUL)):
            for rotated, sin in operands(links.made_by(turned, *MUL)):
                shape = links.value(x).shape if isinstance(x, Ref) else ()
                size = shape[-1] if len(shape) == 4 else None
                if (
                    isinstance(size, int)
                    and _is_rotated(links, rotated, x, size // 2)
                    and isinstance(cos, Ref)
                    and isinstance(sin, Ref)
                ):
                    return _Rope(x, cos, sin, False, size)
    return None


def _is_rotated(links: Links, arg: Arg, x: Arg, half: int) -> bool:
    cat = links.made_by(arg, "aten.cat.default")
    parts = cat.args["tensors"] if cat is not None else None
    if cat is None or not isinstance(parts, tuple) or len(parts) != 2:
        return False
    negated = links.made_by(parts[0], "aten.neg.default")
    upper = sliced(links, negated.args["self"], -1) if negated is not None else None
    lower = sliced(links, parts[1], -1)
    return upper == (x, half, 2 * half) and lower == (x, 0, half)


def _partial(links: Links, node: Node) -> _Rope | None:
    """cat(rope(x[:rot]), x[rot:]) along the last axis."""
    parts = node.args.get("tensors")
    if node.op != "aten.cat.default" or not isinstance(parts, tuple) or len(parts) != 2:
        return None
    inner = _half_split(links, uncast(links, parts[0]))
    rest = sliced(links, uncast(links, parts[1]), -1)
    if inner is None or rest is None:
        return None
    turned = sliced(links, uncast(links, inner.x), -1)
    size = links.value(rest[0]).shape[-1]
    if turned is None or turned[0] != rest[0] or turned[1:] != (0, inner.rot) or rest[1:] != (inner.rot, size):
        return None
    return replace(inner, x=rest[0])
