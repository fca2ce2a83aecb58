"""Operators whose result has the elements of their argument in the same order: views, which move nothing.

The pass that assigns storage asks the view rule and may decline; a node whose result has its own storage copies.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..backend.graph import Dim, Graph, Node, Ref, Value
from .base import Dispatch, Lowering, register
from .copies import copy_all


def argument(graph: Graph, node: Node) -> Value:
    """The tensor argument `self`."""
    return graph.value(node.args["self"])


def result(graph: Graph, node: Node) -> Value:
    """The first result."""
    return graph.values[node.outputs[0]]


def without_ones(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The sizes that are not known to be 1: two tensors with equal ones hold their elements in the same order."""
    return tuple(dim for dim in shape if dim != 1)


def same_elements(graph: Graph, node: Node) -> str | None:
    """View rule: `self` where the only result has its dtype and, apart from sizes 1, provably its sizes."""
    if len(node.outputs) != 1:
        return None
    own, made = argument(graph, node), result(graph, node)
    return "self" if own.dtype == made.dtype and without_ones(own.shape) == without_ones(made.shape) else None


def always(graph: Graph, node: Node) -> str | None:
    """View rule: `self` (a reshape keeps the order of the elements whatever the sizes)."""
    return "self" if argument(graph, node).dtype == result(graph, node).dtype else None


def supports(graph: Graph, node: Node) -> str | None:
    own, made = argument(graph, node), result(graph, node)
    if own.dtype != made.dtype:
        return f"reinterpreting {own.dtype} as {made.dtype} is not supported: the GPU may store them wider"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    argument_ref = node.args["self"]
    assert isinstance(argument_ref, Ref)
    yield from copy_all(ctx, argument_ref, ctx.out(node))


NAMES = (
    "aten.view.default",
    "aten.view_copy.default",
    "aten.reshape.default",
    "aten._reshape_alias.default",
    "aten._reshape_copy.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.unsqueeze.default",
    "aten.unsqueeze_copy.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.squeeze_copy.default",
    "aten.squeeze_copy.dim",
    "aten.squeeze_copy.dims",
    "aten.alias.default",
    "aten.alias_copy.default",
    "aten.clone.default",
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
    "aten.detach.default",
    "aten.detach_copy.default",
    "aten.contiguous.default",
    "dim_order_ops._clone_dim_order.default",
)
"""All of these keep every element and its order."""

register(*NAMES, supports=supports, lower=lower, view=always)
