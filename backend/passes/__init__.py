"""Passes over records: each takes a graph and returns an equal, cheaper one. No torch is needed here.

`OPTIONAL` passes can be switched off by name (`WebGPUPartitioner(disable_passes=...)`); the others are part of the
translation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ..graph import Graph
from .attention import canonical_attention, peel_attention
from .cleanup import cancel_permutes, merge_equal_nodes, remove_unused
from .group_query import expand_group_query
from .linear import fuse_linear, fuse_swiglu
from .norm import fuse_rms_norm
from .project import fuse_projections
from .quantized import Constants, fuse_quantized
from .quantized_attention import expand_quantized_attention
from .rope_cache import fuse_rope_cache
from .rotary import fuse_rope
from .storage import assign_storage

Pass = Callable[[Graph], Graph]

PACKING = "fuse_quantized"
"""The optional pass that writes constants anew."""

OPTIONAL: Mapping[str, Pass] = {
    "merge_equal_nodes": merge_equal_nodes,
    "fuse_linear": fuse_linear,
    PACKING: lambda graph: graph,
    "fuse_rms_norm": fuse_rms_norm,
    "fuse_rope": fuse_rope,
    "fuse_swiglu": fuse_swiglu,
    "fuse_projections": fuse_projections,
    "cancel_permutes": cancel_permutes,
    "peel_attention": peel_attention,
    "fuse_rope_cache": fuse_rope_cache,
}


def run_passes(graph: Graph, disabled: Collection[str] = (), constants: Constants | None = None) -> Graph:
    """The graph that is serialised: attention in canonical form, optional passes applied, storage assigned.

    Args:
        constants: content of the constants, to which packed ones are added; None: quantised weights stay as they are.
    Raises:
        ValueError: `disabled` names no optional pass.
        QuantizationError: quantised weights that mean nothing (`fuse_quantized`).
    """
    unknown = set(disabled) - set(OPTIONAL)
    if unknown:
        raise ValueError(f"no pass named {sorted(unknown)}; there are {sorted(OPTIONAL)}")
    graph = remove_unused(canonical_attention(expand_quantized_attention(expand_group_query(graph))))
    for name, apply in OPTIONAL.items():
        if name in disabled:
            continue
        if name == PACKING and constants is not None:
            graph = fuse_quantized(graph, constants)
        graph = remove_unused(apply(graph))
    return assign_storage(graph)
