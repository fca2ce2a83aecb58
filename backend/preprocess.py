"""`WebGPUBackend`: turns the subgraphs that ExecuTorch hands over into blobs and named data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram

from ..ops.base import check_node
from .graph import Graph
from .passes import run_passes
from .passes.quantized import ORIGIN
from .serialize import serialize
from .translate import DTYPES, Translation, translate

DISABLED_PASSES = "disabled_passes"
"""Compile spec: names of optional passes to leave out, comma-separated."""
EXTERNAL_TAG = "external_tag"
"""Compile spec: name of the `.ptd` file that the weights go to; absent: they stay in the `.pte`."""
_ALIGNMENT = 16


class NotDelegable(RuntimeError):
    """A subgraph was handed to `WebGPUBackend` that its partitioner would not have chosen."""


@dataclass(frozen=True)
class Lowered:
    """A delegate ready to be written: the graph and the tensors that its data keys name."""

    graph: Graph
    tensors: dict[str, torch.Tensor]
    tags: dict[str, str | None]


def lower(program: ExportedProgram, specs: Iterable[CompileSpec] = ()) -> Lowered:
    """Records of a subgraph, after all passes, with content keys for the data.

    Raises:
        NotDelegable: a node has no kernel or no translation; names each with its reason.
    """
    options = {spec.key: bytes(spec.value).decode() for spec in specs}
    translation = translate(program)
    problems = [f"{node.name}: {reason}" for node, reason in translation.refused.items()]
    for node in translation.graph.nodes:
        reason = check_node(translation.graph, node)
        if reason is not None:
            problems.append(f"{node.name} ({node.op}): {reason}")
    if problems:
        raise NotDelegable("this subgraph cannot run on WebGPU:\n  " + "\n  ".join(problems))
    disabled = [n for n in options.get(DISABLED_PASSES, "").split(",") if n]
    graph = run_passes(translation.graph, disabled, _Constants(translation.tensors))
    return _with_content_keys(graph, translation, options.get(EXTERNAL_TAG) or None)


class _Constants(MutableMapping[str, tuple[str, Any]]):
    """What passes see of the tensors: numpy arrays on their memory, bfloat16 as its 16 bits."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> tuple[str, Any]:
        tensor = self._tensors[key].detach().cpu().contiguous()
        bits = tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor
        return DTYPES[tensor.dtype], bits.numpy()

    def __setitem__(self, key: str, content: tuple[str, Any]) -> None:
        """Words are kept as int32, which has the same bytes."""
        _, array = content
        self._tensors[key] = torch.from_numpy(array.view("<i4"))

    def __delitem__(self, key: str) -> None:
        del self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _with_content_keys(graph: Graph, translation: Translation, tag: str | None) -> Lowered:
    """Name each tensor by the hash of its bytes: equal weights of several methods become one entry."""
    values = list(graph.values)
    tensors: dict[str, torch.Tensor] = {}
    tags: dict[str, str | None] = {}
    for index, value in enumerate(values):
        if value.data is None:
            continue
        if value.data not in translation.tensors:
            raise NotDelegable(
                f"{value.name}: the program holds no content for this tensor (it was exported with fake weights)"
            )
        tensor = translation.tensors[value.data].detach().cpu().contiguous()
        key = content_key(tensor)
        origin = value.data.partition(ORIGIN)[0]  # packed weights go where their integers were told to go
        placeholder = next((p for p in translation.placeholders.values() if p.name == origin), None)
        custom = (placeholder.meta.get("custom") or {}) if placeholder is not None else {}
        tensors[key] = tensor
        tags[key] = custom.get("delegate_constant_tag", tag) if value.kind == "constant" else None
        values[index] = replace(value, data=key)
    return Lowered(replace(graph, values=tuple(values)), tensors, tags)


def content_key(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype and bytes. Shapes do not count: equal bytes are one buffer on the GPU."""
    digest = hashlib.sha256(str(tensor.dtype).encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")


def finish(lowered: Lowered, model_id: str) -> PreprocessResult:
    """Blob and named data of a delegate."""
    store = NamedDataStore()
    for key, tensor in lowered.tensors.items():
        store.add_named_data(key, bytes(tensor_bytes(tensor)), alignment=_ALIGNMENT, external_tag=lowered.tags[key])
    blob = serialize(replace(lowered.graph, model_id=model_id))
    return PreprocessResult(processed_bytes=blob, data_store_output=store.get_named_data_store_output())


def model_id(graphs: Iterable[Graph]) -> str:
    """A name for delegates lowered together, from their content (so that equal exports give equal files)."""
    digest = hashlib.sha256()
    for graph in graphs:
        digest.update(serialize(graph))
    return digest.hexdigest()[:32]


class WebGPUBackend(BackendDetails):
    """The backend class; ExecuTorch finds it by its name, which is also the backend id in the `.pte`."""

    @classmethod
    def copy_exported_program_for_preprocess(
        cls, edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> ExportedProgram:
        """The program itself: nothing here changes it, and a copy would double the weights in memory."""
        return edge_program

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """Lower one subgraph. Raises NotDelegable."""
        lowered = lower(edge_program, compile_specs)
        return finish(lowered, model_id([lowered.graph]))

    @classmethod
    def preprocess_multimethod(
        cls, edge_programs: dict[str, list[ExportedProgram]], compile_specs: dict[str, list[list[CompileSpec]]]
    ) -> dict[str, list[PreprocessResult]]:
        """Lower the subgraphs of all methods under one model id, by which the runtime knows that they may share
        state."""
        lowered = {
            name: [lower(program, specs) for program, specs in zip(programs, compile_specs[name], strict=True)]
            for name, programs in edge_programs.items()
        }
        shared = model_id(item.graph for name in sorted(lowered) for item in lowered[name])
        return {name: [finish(item, shared) for item in items] for name, items in lowered.items()}
