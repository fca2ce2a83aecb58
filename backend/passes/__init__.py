"""Passes over records: each takes a graph and returns an equal, cheaper one. No torch is needed here.

`OPTIONAL` passes can be switched off by name (`WebGPUPartitioner(disable_passes=...)`); the others are part of the
translation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ..graph import Graph
from .activations import keep_codes
from .attention import canonical_attention, peel_attention
from .bf16 import NAME as STORE_BF16
from .bf16 import store_bf16
from .cleanup import cancel_permutes, merge_equal_nodes, remove_unused
from .group_query import expand_group_query
from .linear import fuse_linear, fuse_swiglu
from .norm import fuse_rms_norm
from .project import fuse_projections
from .project_cache import fuse_project_cache
from .quantized import Constants, fuse_quantized
from .quantized_attention import expand_quantized_attention
from .rope_cache import fuse_rope_cache
from .rotary import fuse_rope
from .storage import assign_storage

Pass = Callable[[Graph], Graph]

PACKING: Mapping[str, Callable[[Graph, Constants], Graph]] = {
    "fuse_quantized": fuse_quantized,
    STORE_BF16: store_bf16,
}
"""The optional passes that write constants anew; without their content they do nothing."""

OPTIONAL: Mapping[str, Pass] = {
    "merge_equal_nodes": merge_equal_nodes,
    "fuse_linear": fuse_linear,
    **{name: lambda graph: graph for name in PACKING},
    "fuse_rms_norm": fuse_rms_norm,
    "fuse_rope": fuse_rope,
    "fuse_swiglu": fuse_swiglu,
    "fuse_projections": fuse_projections,
    "keep_codes": keep_codes,
    "cancel_permutes": cancel_permutes,
    "peel_attention": peel_attention,
    "fuse_rope_cache": fuse_rope_cache,
    "fuse_project_cache": fuse_project_cache,
}


def run_passes(graph: Graph, disabled: Collection[str] = (), constants: Constants | None = None) -> Graph:
    """The graph that is serialised: attention in canonical form, optional passes applied, storage assigned.

    Args:
        constants: content of the constants, to which packed ones are added; None: weights stay as they are.
    Raises:
        ValueError: `disabled` names no optional pass.
        QuantizationError: quantised weights that mean nothing (`fuse_quantized`).
    """
    unknown = set(disabled) - set(OPTIONAL)
    if unknown:
        raise ValueError(f"no pass named {sorted(unknown)}; there are {sorted(OPTIONAL)}")
    graph = remove_unused(canonical_attention(expand_quantized_attention(expand_group_query(graph), constants)))
    for name, apply in OPTIONAL.items():
        if name in disabled:
            continue
        if name in PACKING and constants is not None:
            graph = PACKING[name](graph, constants)
        graph = remove_unused(apply(graph))
    return assign_storage(graph)
