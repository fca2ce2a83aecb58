"""Projections of query, key and value with the rotary embedding and cache writes after them, as one
`webgpu.project_cache`."""

from __future__ import annotations

from dataclasses import replace

from ...ops import project, rope_cache
from ...ops.base import viewed
from ...ops.project_cache import ARGUMENTS, NAME, supports
from ..graph import Arg, Graph, Node, Ref
from .rewrite import Editor, Links

_PRODUCTS = ("query", "key", "value")
_PER_WEIGHT = ("weights", "formats", "biases")


def fuse_project_cache(graph: Graph) -> Graph:
    """Find every `webgpu.rope_cache` whose query, key and value are the three results of one `webgpu.project`, reshaped
    by views or not; what is between has no other reader.

    The new node stands where the `webgpu.rope_cache` stood, so that readers and writers of caches keep their order.
    """
    links = Links(graph)
    gone: set[int] = set()  # outputs of nodes that are replaced
    made: dict[int, Node] = {}  # place -> new node
    for place, node in enumerate(graph.nodes):
        parts = _parts(links, node) if node.op == rope_cache.NAME else None
        if parts is None:
            continue
        fused = _fused(parts, node)
        if supports(graph, fused) is not None:
            continue
        gone |= {output for part in (parts[0], *parts[1]) for output in part.outputs}
        made[place] = fused
    editor = Editor(graph)
    for place, node in enumerate(graph.nodes):
        if not gone.intersection(node.outputs):
            editor.nodes.append(made.get(place, node))
    return editor.finish()


def _parts(links: Links, writer: Node) -> tuple[Node, list[Node], list[int]] | None:
    """The projections in front of a `webgpu.rope_cache`, the views between, and which of their results query, key and
    value are."""
    if writer.args["layout"] != "bshd":
        return None
    views: list[Node] = []
    results: list[int] = []
    made: Node | None = None
    for name in _PRODUCTS:
        arg, reader = writer.args[name], writer
        while True:
            node = links.made_by(arg)
            if node is None or not isinstance(arg, Ref) or links.only_reader(arg.value) is not reader:
                return None
            if node.op == project.NAME:
                break
            source = viewed(links.graph, node)
            if source is None:
                return None
            views.append(node)
            arg, reader = Ref(source), node
        if made is not None and node is not made:
            return None
        made = node
        results.append(node.outputs.index(arg.value))
    if made is None or sorted(results) != list(range(len(made.outputs))) or made.args.get("residual") is not None:
        return None
    return made, views, results


def _fused(parts: tuple[Node, list[Node], list[int]], writer: Node) -> Node:
    products, _, order = parts
    args: dict[str, Arg] = {name: products.args.get(name) for name in ARGUMENTS if name in products.args}
    for name in _PER_WEIGHT:
        given = args.get(name)
        if isinstance(given, tuple):
            args[name] = tuple(given[i] for i in order)
    args |= {name: writer.args[name] for name in ARGUMENTS if name in writer.args}
    return replace(writer, op=NAME, args=args)
