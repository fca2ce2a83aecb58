"""Records of the export catalogue: what a configuration is and what building one yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.models.reference import Reference

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    """One export configuration. `name` is unique; everything needed to build it is in the record.

    source: "bare", "et_llama" or "hf". dtype: a key of DTYPES. shape: "dynamic" or "static".
    attention: how cache and attention are spelled, see the CONFIGS of each source.
    core: part of the small set that covers every distinct graph pattern once; the rest are cross products.
    options: further choices of the source as (key, value) pairs.
    """

    name: str
    family: str
    source: str
    dtype: str
    shape: str
    attention: str
    core: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rounds_activations(self) -> bool:
        """Whether layers quantise their inputs to 8 bits at run time."""
        return "8da" in self.name

    def option(self, key: str, default: Any = None) -> Any:
        return dict(self.options).get(key, default)


@dataclass
class Built:
    """An exported configuration with its inputs and its references.

    exported: ready for to_edge or to_edge_transform_and_lower.
    edge_kwargs: compile_config, transform_passes, constant_methods as the real client passes them (transform_passes
        only exists on to_edge_transform_and_lower; `to_edge_kwargs()` has those of to_edge).
    make_inputs: (tokens int64 [S], position) -> the tensors of the plan's inputs, in flat plan order.
    reference: eager module in the config's dtype, with caches of its own.
    oracle: the same weights upcast to fp32 (attention in fp64), with caches of its own: compare with it.
    max_context: positions a sequence may occupy. max_seq: largest S of one call. min_seq: smallest S of one call
        (equal to max_seq when static).
    vocab: token ids are in [0, vocab).
    stateful: False when each call starts from position 0 with the whole sequence (no cache).
    logits: "last" ([1, V]), "all" ([1, S, V]) or "other" (bare modules: any tensors).
    seconds: time of the build.
    """

    config: Config
    exported: torch.export.ExportedProgram
    edge_kwargs: dict[str, Any]
    make_inputs: Callable[[np.ndarray, int], tuple[torch.Tensor, ...]]
    reference: Reference
    oracle: Reference
    max_context: int
    max_seq: int
    min_seq: int
    vocab: int
    stateful: bool = True
    logits: str = "last"
    seconds: float = 0.0
    notes: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_edge_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `to_edge` (route A), which has no transform_passes."""
        return {key: value for key, value in self.edge_kwargs.items() if key != "transform_passes"}
