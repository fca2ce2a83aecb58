"""The operators: one module a family, each registering `supports` and `lower` (see `base`). No torch, no wgpu."""

from .base import Check, Dispatch, ElementCheck, Limits, Live, Lowering, Op, check_node, find, load_all, register

__all__ = [
    "Check",
    "Dispatch",
    "ElementCheck",
    "Limits",
    "Live",
    "Lowering",
    "Op",
    "check_node",
    "find",
    "load_all",
    "register",
]
