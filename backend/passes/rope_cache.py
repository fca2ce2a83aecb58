"""Rotary embeddings of query and key and the writes of key and value into their caches as one `webgpu.rope_cache`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ops.attention import canonical
from ...ops.attention_decode import SIZES_WORDS
from ...ops.rope_cache import supports
from ..graph import Arg, Graph, Node, Ref, Value
from .match import COPY
from .rewrite import Editor, Links

_WRITE = "llama.update_cache.default"
_ROPE = "webgpu.rope"
_CAT = "aten.cat.default"


@dataclass(frozen=True)
class _Layer:
    """The four nodes that one `webgpu.rope_cache` replaces, copies of the rotated query and key that it makes needless,
    and where it goes: the place of the last of the four."""

    query: Node
    key: Node
    key_write: Node
    value_write: Node
    copies: tuple[Node, ...]
    place: int

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.query, self.key, self.key_write, self.value_write, *self.copies


def fuse_rope_cache(graph: Graph) -> Graph:
    """Find attentions whose query is a rotary embedding and whose key and value are caches just written at the same
    position, the key rotated by the same table; the four nodes before become one, which also sizes attention's grids.

    All new values may have more readers, the caches usually have (they are what the mutable buffers become), but only
    after the last of the four nodes, where the new one goes. The rotated key has none but the write. Copies between a
    rotary embedding and its reader go as well, if they have no other reader.
    """
    links = Links(graph)
    editor = Editor(graph)
    gone: dict[int, _Layer] = {}  # outputs of nodes that are replaced
    made: dict[int, Node] = {}  # place -> new node
    sized: dict[int, Node] = {}  # output of an attention -> it with sizes
    for node in graph.nodes:
        layer = _match(links, node) if node.op == "webgpu.attention" else None
        if layer is None or any(gone.keys() & set(part.outputs) for part in layer.nodes):
            continue
        sizes = editor.add_value(Value("temp", "i32", (SIZES_WORDS,), f"{node.name}.sizes"))
        fused = _fused(graph, node, layer, sizes)
        if supports(replace(graph, values=tuple(editor.values)), fused) is not None:
            continue
        gone.update((output, layer) for part in layer.nodes for output in part.outputs)
        made[layer.place] = fused
        sized[node.outputs[0]] = replace(node, args={**node.args, "query": Ref(layer.query.outputs[0]), "sizes": sizes})
    for number, node in enumerate(graph.nodes):
        if number in made:
            editor.nodes.append(made[number])
        elif not gone.keys() & set(node.outputs):
            editor.nodes.append(sized.get(node.outputs[0], node))
    return editor.finish()


def _match(links: Links, attention: Node) -> _Layer | None:
    args = canonical(attention, links.graph)
    query, query_copies = _rotated(links, args["query"], attention)
    key_write, value_write = links.made_by(args["key"], _WRITE), links.made_by(args["value"], _WRITE)
    if query is None or key_write is None or value_write is None or args["sizes"] is not None:
        return None
    key, key_copies = _rotated(links, key_write.args["value"], key_write)
    if key is None or _table(links, query) != _table(links, key):
        return None
    if not key_copies and links.only_reader(key.outputs[0]) is not key_write:
        return None
    if {query.args["layout"], key.args["layout"], args["q_layout"], args["kv_layout"]} != {"bshd"}:
        return None
    start = args["start_pos"]
    if key_write.args["start_pos"] != start or value_write.args["start_pos"] != start or key_write is value_write:
        return None
    place = max(links.position[node.outputs[0]] for node in (query, key, key_write, value_write))
    new = (key_write.outputs[0], value_write.outputs[0], *(() if query_copies else query.outputs))
    if any(reader <= place for value in new for reader in links.readers.get(value, ())):
        return None
    return _Layer(query, key, key_write, value_write, (*query_copies, *key_copies), place)


def _rotated(links: Links, arg: Arg, reader: Node) -> tuple[Node | None, tuple[Node, ...]]:
    """The rotary embedding that `reader` reads as `arg`, and the copies on the way, from the reader on.

    None where there is no such embedding, or where something else reads a copy or what is copied.
    """
    copies: list[Node] = []
    while (copy := links.made_by(arg, *COPY, _CAT)) is not None:
        source = _copied(copy)
        if source is None or links.only_reader(copy.outputs[0]) is not reader:
            return None, ()
        copies.append(copy)
        reader, arg = copy, source
    rope = links.made_by(arg, _ROPE)
    if rope is not None and copies and links.only_reader(rope.outputs[0]) is not reader:
        return None, ()
    return rope, tuple(copies)


def _copied(node: Node) -> Arg:
    """What a copy copies; also a concatenation of one tensor, which partial rotary embeddings of all elements leave."""
    if node.op != _CAT:
        return node.args["self"]
    tensors = node.args["tensors"]
    return tensors[0] if isinstance(tensors, tuple) and len(tensors) == 1 else None


def _table(links: Links, rope: Node) -> tuple[Arg, ...]:
    """What decides how a vector of a position turns."""
    args = rope.args
    rot = args.get("rot") or links.value(args["input"]).shape[-1]
    return args["cos"], args["sin"], args.get("start", 0), rot, args["interleaved"]


def _fused(graph: Graph, attention: Node, layer: _Layer, sizes: Ref) -> Node:
    query, key_write, value_write = layer.query, layer.key_write, layer.value_write
    limits = canonical(attention, graph)
    args: dict[str, Arg] = {
        "query": query.args["input"],
        "key": layer.key.args["input"],
        "value": value_write.args["value"],
        "key_cache": key_write.args["cache"],
        "value_cache": value_write.args["cache"],
        **{name: query.args[name] for name in ("cos", "sin", "interleaved", "layout")},
        "start": query.args.get("start", 0),
        "rot": query.args.get("rot"),
        "start_pos": key_write.args["start_pos"],
        "kv_limit": limits["kv_limit"],
        "window": limits["window"],
    }
    outputs = (query.outputs[0], key_write.outputs[0], value_write.outputs[0], sizes.value)
    return Node("webgpu.rope_cache", args, outputs, query.name)
