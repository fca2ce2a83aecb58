"""Exports a Llama of any size, with random weights, through ExecuTorch's own Llama export.

The weights are made here and named as external data, so that the program itself is a few MiB however large the model
is. `executorch-webgpu bench FILE.pte --random-weights` times it on another machine; with --data the weights are written
as well, and the program runs as any other.

    python -m examples.export_llama llama1b.pte --dtype fp16 --context 10240
    python -m examples.export_llama llama1b-4bit.pte --set quantization.qmode=4w --set quantization.group_size=32

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from executorch.extension.llm.export.builder import LLMEdgeManager

DTYPES = ("fp32", "fp16", "bf16")
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
        "ffn_dim_multiplier": 1.5, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    },
    "3b": {
        "dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
        "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    },
    "tiny": {
        "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 288, "multiple_of": 32,
        "ffn_dim_multiplier": 1.5, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    },
}  # fmt: skip
"""Sizes of Llama 3.2 as its `params.json` gives them, and a small one of the same shape."""
DATA_NAME = "weights"


def write_checkpoint(params: Mapping[str, Any], dtype: str, path: Path, seed: int = 0) -> None:
    """Random weights in Meta's names, one tensor at a time in memory: norms near 1, matrices that keep the variance.

    Embedding and output layer are one tensor, as in Llama 3.2's smaller models; ExecuTorch's export keeps both names.
    """
    import torch
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = construct_transformer(ModelArgs(max_seq_len=8, max_context_len=8, **params))
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name == "output.weight":
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        noise = 1 + 0.1 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
        found[name] = noise.to(kind)
    if "output.weight" in dict(model.named_parameters()):
        found["output.weight"] = found["tok_embeddings.weight"]
    torch.save(found, path)


def export_manager(
    params: Mapping[str, Any],
    folder: Path,
    *,
    dtype: str = "fp16",
    context: int = 10240,
    longest: int = 4096,
    dynamic_shape: bool = True,
    full_logits: bool = False,
    options: Mapping[str, Any] | None = None,
) -> LLMEdgeManager:
    """Runs ExecuTorch's Llama preparation, `export()` and canonical optimisations.

    Args:
        params: the model's sizes, in the names of its `params.json`.
        folder: for the checkpoint, which is mapped into memory and must stay there until the program is written.
        context: rows of the caches. longest: tokens of one call.
        options: further settings of `LlmConfig` by dotted name, e.g. `{"quantization.qmode": "4w"}`.
    Raises:
        ValueError: there is no such setting.
    """
    from executorch.examples.models.llama.export_llama_lib import _prepare_for_llama_export
    from executorch.extension.llm.export.config.llm_config import DtypeOverride, LlmConfig, ModelType

    config = LlmConfig()
    config.base.model_class = ModelType.llama3_2
    config.base.checkpoint = str(folder / "checkpoint.pth")
    config.base.params = str(folder / "params.json")
    config.base.metadata = json.dumps({"get_bos_id": 0, "get_eos_ids": [1]})
    config.model.dtype_override = DtypeOverride(dtype)
    config.model.use_kv_cache = config.model.use_sdpa_with_kv_cache = True
    config.model.enable_dynamic_shape = dynamic_shape
    config.debug.generate_full_logits = full_logits
    config.export.max_seq_length = min(longest + 1, context)  # the export takes one token less
    config.export.max_context_length = context
    config.export.output_dir = str(folder)
    for name, value in (options or {}).items():
        *parents, last = name.split(".")
        target: Any = config
        for parent in parents:
            target = getattr(target, parent, None)
        if not hasattr(target, last):
            raise ValueError(f"unknown LlmConfig setting {name!r}")
        setattr(target, last, value)
    (folder / "params.json").write_text(json.dumps(dict(params)), encoding="utf-8")
    write_checkpoint(params, dtype, folder / "checkpoint.pth")
    manager = _prepare_for_llama_export(config).export()
    manager.run_canonical_optimizations()
    return manager


def export(
    path: str | Path, params: Mapping[str, Any], data: str | Path | None = None, **settings: Any
) -> tuple[Path, list[str]]:
    """Exports, lowers the whole model for WebGPU and writes the program.

    Args:
        path: the `.pte` to write; it holds no weights.
        params, settings: as for `export_manager`.
        data: also write the weights to this `.ptd`.
    Returns:
        The path, and the operators that stayed outside the delegate.
    """
    import torch
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    from executorch_webgpu.partitioner import WebGPUPartitioner

    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="export-llama-") as scratch:
        manager = export_manager(params, Path(scratch), **settings)
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]), torch.no_grad():
            program = torch.export.export(
                manager.pre_autograd_graph_module,
                manager.example_inputs,
                kwargs=manager.example_kwarg_inputs,
                dynamic_shapes=manager.dynamic_shapes,
                strict=True,
            )
        partitioner = WebGPUPartitioner(external_weights=DATA_NAME)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[partitioner],
            constant_methods=dict(manager.metadata),
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        lowered = edge.to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True,
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
        with path.open("wb") as file:
            lowered.write_to_file(file)
        if data is not None:
            lowered.write_tensor_data_to_file(scratch)
            shutil.move(Path(scratch) / f"{DATA_NAME}.ptd", data)
    return path, sorted(partitioner.refused)


def setting(text: str) -> tuple[str, Any]:
    """`name=value` with the value as JSON where it is JSON, else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .pte file to write")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--params", type=Path, help="a params.json with other sizes")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--context", type=int, default=10240, help="rows of the caches")
    parser.add_argument("--longest", type=int, default=4096, help="most tokens of one call")
    parser.add_argument("--full-logits", action="store_true", help="logits of every token, not only of the last")
    parser.add_argument("--set", action="append", type=setting, default=[], metavar="NAME=VALUE", dest="options",
                        help="a setting of LlmConfig, e.g. quantization.qmode=4w; may be given again")  # fmt: skip
    parser.add_argument("--data", type=Path, help="also write the weights to this .ptd")
    args = parser.parse_args()
    params = json.loads(args.params.read_text(encoding="utf-8")) if args.params else SHAPES[args.shape]
    path, outside = export(
        args.path, params, args.data, dtype=args.dtype, context=args.context, longest=args.longest,
        full_logits=args.full_logits, options=dict(args.options),
    )  # fmt: skip
    print(f"{path}: {path.stat().st_size:,} bytes; outside the delegate: {', '.join(outside) or 'nothing'}")


if __name__ == "__main__":
    main()
