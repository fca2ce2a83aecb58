"""Removal of what nothing needs and of what is computed twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..graph import Graph, Node, Ref
from .match import permutation
from .rewrite import Links, rename


def remove_unused(graph: Graph) -> Graph:
    """Drop nodes whose results reach no output and no mutable value, and values that nothing names (inputs stay)."""
    needed = {o.value for o in graph.outputs if isinstance(o, Ref)} | {source for _, source in graph.mutations}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.inputs())
    kept.reverse()
    named = {*graph.inputs, *needed, *(t for t, _ in graph.mutations), *(o for node in kept for o in node.outputs)}
    for index in sorted(named, reverse=True):
        alias = graph.values[index].alias
        if alias is not None:
            named.add(alias)
    order = sorted(named)
    new = {old: position for position, old in enumerate(order)}
    values = tuple(
        replace(graph.values[old], alias=None if graph.values[old].alias is None else new[graph.values[old].alias])  # type: ignore[index]
        for old in order
    )
    nodes = tuple(replace(rename(node, new), outputs=tuple(new[o] for o in node.outputs)) for node in kept)
    return replace(
        graph,
        values=values,
        nodes=nodes,
        inputs=tuple(new[i] for i in graph.inputs),
        outputs=tuple(Ref(new[o.value]) if isinstance(o, Ref) else o for o in graph.outputs),
        mutations=tuple((new[t], new[s]) for t, s in graph.mutations),
    )


def merge_equal_nodes(graph: Graph) -> Graph:
    """Compute once what several nodes compute from the same values (every layer slices and casts the same rotary
    tables).

    Records are in single-assignment form here: a mutable value read before and after its update is two values, so equal
    arguments mean equal results.
    """
    known: dict[tuple[object, ...], Node] = {}
    mapping: dict[int, int] = {}
    nodes = []
    for original in graph.nodes:
        node = rename(original, mapping)
        # repr tells 1, 1.0 and True apart, which compare equal
        key = (
            node.op,
            repr(sorted(node.args.items())),
            tuple((graph.values[o].dtype, graph.values[o].shape) for o in node.outputs),
        )
        same = known.get(key)
        if same is None:
            known[key] = node
            nodes.append(node)
        else:
            mapping.update(zip(original.outputs, same.outputs, strict=True))
    return redirect(replace(graph, nodes=tuple(nodes)), mapping)


def redirect(graph: Graph, mapping: Mapping[int, int]) -> Graph:
    """The graph with values read under other names, outputs and mutations included."""
    return replace(
        graph,
        nodes=tuple(rename(node, mapping) for node in graph.nodes),
        outputs=tuple(Ref(mapping.get(o.value, o.value)) if isinstance(o, Ref) else o for o in graph.outputs),
        mutations=tuple((t, mapping.get(s, s)) for t, s in graph.mutations),
    )


def cancel_permutes(graph: Graph) -> Graph:
    """Let readers of permute(permute(x)) read x where the two cancel; fusions leave such pairs behind.

    An RMSNorm of the last axis between the two does not mind: some models normalise the heads of query and key after
    the permute that attention wants.
    """
    links = Links(graph)
    mapping: dict[int, int] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        order = permutation(links, node)
        inner = links.made_by(node.args.get("self")) if order is not None else None
        norm = None
        if inner is not None and inner.op == "webgpu.rms_norm" and links.only_reader(inner.outputs[0]) is node:
            norm, inner = inner, links.made_by(inner.args["input"])
        first = permutation(links, inner) if inner is not None else None
        if (
            order is None
            or inner is None
            or first is None
            or tuple(first[i] for i in order) != tuple(range(len(order)))
            or (norm is not None and order[-1] != len(order) - 1)
        ):
            continue
        source = inner.args["self"]
        if not isinstance(source, Ref):
            continue
        source = Ref(mapping.get(source.value, source.value))
        if norm is None:
            mapping[node.outputs[0]] = source.value
        else:
            nodes[-1] = replace(norm, args={**norm.args, "input": source}, outputs=node.outputs)
    return redirect(replace(graph, nodes=tuple(nodes)), mapping)
