"""Exports the story model through ExecuTorch's own Llama export.

Heavy imports happen inside the functions. As a script it writes a program without any delegate, or with ``--webgpu``
lowered to the WebGPU delegate::

    python -m examples.stories.export stories.pte --dtype fp32
    python -m examples.stories.export drafts.pte --logits all --webgpu

With ``--batch`` it writes one for ragged batches instead, lowered to the WebGPU delegate (`examples.stories.ragged`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.stories.llama import MODEL_DIR, load_settings

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.exir.backend.partitioner import Partitioner
    from executorch.extension.llm.export.builder import LLMEdgeManager
    from torch.export import ExportedProgram
    from torch.nn import Module

DTYPES = ("fp32", "fp16")


def export_manager(
    dtype: str = "fp32",
    *,
    directory: str | Path = MODEL_DIR,
    max_seq_len: int | None = None,
    dynamic_shape: bool = True,
    use_sdpa_with_kv_cache: bool = True,
    full_logits: bool = False,
    options: dict[str, Any] | None = None,
    quantize: Callable[[Module], object] | None = None,
) -> LLMEdgeManager:
    """Runs ExecuTorch's Llama preparation, ``export()`` and canonical optimisations on a saved model.

    Args:
        dtype: ``"fp32"`` or ``"fp16"``.
        directory: The model's folder.
        max_seq_len: Context and cache length; the model's own by default. A single call accepts up to one token less.
        dynamic_shape: Accept any number of tokens per call; otherwise exactly one.
        use_sdpa_with_kv_cache: Emit ExecuTorch's custom cache update and attention ops.
        full_logits: Return logits of every token, [1, seq, vocab], not only of the last one, [1, vocab].
        options: Further settings of ``LlmConfig`` by dotted name, e.g. ``{"quantization.qmode": "8da4w"}``.
        quantize: Called with the eager model before it is exported, to change its weights in place.

    Returns:
        The manager; ``model`` is the eager model, ``pre_autograd_graph_module`` holds the graph and ``metadata`` the
        constant methods (``get_bos_id``, ``get_eos_ids``, ``get_max_seq_len``, ...).
    """
    import torch
    from executorch.examples.models.llama.export_llama_lib import _prepare_for_llama_export
    from executorch.extension.llm.export.config.llm_config import DtypeOverride, LlmConfig, ModelType
    from safetensors.torch import load_file

    directory = Path(directory)
    settings = load_settings(directory)
    length = max_seq_len or settings["max_context"]
    with tempfile.TemporaryDirectory(prefix="stories-") as scratch:
        checkpoint = Path(scratch) / "checkpoint.pth"
        torch.save({k: v.float() for k, v in load_file(directory / "model.safetensors").items()}, checkpoint)
        config = LlmConfig()
        config.base.model_class = ModelType.llama3
        config.base.checkpoint = str(checkpoint)
        config.base.params = str(directory / "params.json")
        config.base.metadata = json.dumps({"get_bos_id": settings["bos_id"], "get_eos_ids": settings["stop_ids"]})
        config.model.dtype_override = DtypeOverride(dtype)
        config.model.use_kv_cache = True
        config.model.use_sdpa_with_kv_cache = use_sdpa_with_kv_cache
        config.model.enable_dynamic_shape = dynamic_shape
        config.export.max_seq_length = config.export.max_context_length = length
        config.export.output_dir = scratch
        config.debug.generate_full_logits = full_logits
        for name, value in (options or {}).items():
            *parents, last = name.split(".")
            target: Any = config
            for parent in parents:
                target = getattr(target, parent)
            if not hasattr(target, last):
                raise ValueError(f"unknown LlmConfig setting {name!r}")
            setattr(target, last, value)
        manager = _prepare_for_llama_export(config)
        # The checkpoint is memory-mapped: give the model its own memory before the file goes away.
        with torch.no_grad():
            for parameter in manager.model.parameters():
                parameter.data = parameter.data.clone()
        if quantize is not None:
            quantize(manager.model)
        manager = manager.export()
        manager.run_canonical_optimizations()
    return manager


def export_program(dtype: str = "fp32", **settings: Any) -> tuple[ExportedProgram, dict[str, Any]]:
    """Exports the model.

    Args:
        dtype: ``"fp32"`` or ``"fp16"``.
        **settings: As for `export_manager`.

    Returns:
        The program and its constant methods. Inputs of the program: tokens, int64 [1, seq], and
        ``{"input_pos": int64 [1]}``; output: logits [1, vocab_size] of the last token, float32 or float16.
    """
    manager = export_manager(dtype, **settings)
    return exported(manager), dict(manager.metadata)


def exported(manager: LLMEdgeManager) -> ExportedProgram:
    """The program of a manager that `export_manager` gave."""
    import torch

    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]), torch.no_grad():
        return torch.export.export(
            manager.pre_autograd_graph_module,
            manager.example_inputs,
            kwargs=manager.example_kwarg_inputs,
            dynamic_shapes=manager.dynamic_shapes,
            strict=True,
        )


def export_to_pte(
    path: str | Path, partitioners: Sequence[Partitioner] = (), dtype: str = "fp32", **settings: Any
) -> Path:
    """Exports the model, lowers it and writes the program.

    Args:
        path: The .pte file to write.
        partitioners: Partitioners to delegate with; none leaves a program for the portable and custom-op kernels.
        dtype: ``"fp32"`` or ``"fp16"``.
        **settings: As for `export_manager`.

    Returns:
        The path written.
    """
    lowered = lower(*export_program(dtype, **settings), partitioners)
    path = Path(path)
    with path.open("wb") as file:
        lowered.write_to_file(file)
    return path


def lower(
    program: ExportedProgram, metadata: dict[str, Any], partitioners: Sequence[Partitioner] = ()
) -> ExecutorchProgramManager:
    """Lowers what `export_program` gave.

    Args:
        program: The program.
        metadata: Its constant methods.
        partitioners: Partitioners to delegate with.

    Returns:
        The lowered program.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    edge = to_edge_transform_and_lower(
        program,
        partitioner=list(partitioners),
        constant_methods=metadata,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .pte file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the model")
    parser.add_argument(
        "--logits", choices=("last", "all"), default="last", help="all: of every token, as speculative decoding needs"
    )
    parser.add_argument("--webgpu", action="store_true", help="lower it to the WebGPU delegate")
    parser.add_argument("--batch", type=int, help="rows of a program whose rows have lengths of their own")
    args = parser.parse_args()
    if args.batch is not None:
        from examples.stories.ragged import export_ragged

        program = export_ragged(args.batch, args.dtype, directory=args.model)
        args.path.write_bytes(program.buffer)
        print(args.path)
        return
    partitioners: list[Partitioner] = []
    if args.webgpu:
        from executorch_webgpu.partitioner import WebGPUPartitioner

        partitioners.append(WebGPUPartitioner())
    every = args.logits == "all"
    print(export_to_pte(args.path, partitioners, dtype=args.dtype, directory=args.model, full_logits=every))


if __name__ == "__main__":
    main()
