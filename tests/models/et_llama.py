"""Tiny random models through ExecuTorch's own Llama exporter (executorch.examples.models.llama)."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.models.config import Built, Config
from tests.models.reference import Reference

VOCAB = 300
CONTEXT = 128
_TINY: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB}

# family -> (model_class of the exporter, what its params json adds to _TINY)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3_2": (
        "llama3_2",
        {"ffn_dim_multiplier": 1.5, "multiple_of": 64, "rope_theta": 500000.0, "use_scaled_rope": True},
    ),
    "smollm2": ("smollm2", {"hidden_dim": 192, "rope_theta": 10000.0, "use_scaled_rope": False, "use_hf_rope": False}),
    "qwen3": (
        "qwen3_0_6b",
        {
            "hidden_dim": 192,
            "head_dim": 64,
            "norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "use_hf_rope": True,
            "use_qk_norm": True,
            "qk_norm_before_rope": True,
        },
    ),
    "qwen2_5": (
        "qwen2_5_0_5b",
        {
            "hidden_dim": 192,
            "norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "use_hf_rope": True,
            "attention_qkv_bias": True,
        },
    ),
    "phi_4_mini": (
        "phi_4_mini",
        {"hidden_dim": 192, "rope_theta": 10000.0, "use_hf_rope": True, "partial_rotary_factor": 0.75},
    ),
}


# quantisation of the exporter: name -> (qmode, group size, bits and group size of the embedding)
QUANTIZED: dict[str, tuple[str | None, int | None, str | None]] = {
    "4w": ("4w", 32, None),
    "4w_e8": ("4w", 64, "8,0"),
    "8da4w_e4": ("8da4w", 32, "4,32"),
    "8da4w_row": ("8da4w", 128, "2,32"),
    "int8": ("int8", None, None),
    "int8_e4": ("int8", None, "4,64"),
    "e8": (None, None, "8,32"),
}


def _configs() -> tuple[Config, ...]:
    """The cross product of families, dtypes, shapes and attention spellings, then the single variants."""
    out = []
    for family in FAMILIES:
        for dtype in ("fp32", "fp16", "bf16"):
            for shape in ("dynamic", "static"):
                for attention in ("custom", "plain"):
                    core = (dtype, shape, attention) == ("fp32", "dynamic", "custom") or family == "llama3_2"
                    core = core or (family == "qwen3" and dtype != "bf16")
                    name = f"et_{family}_{dtype}_{shape}_{attention}"
                    out.append(Config(name, family, "et_llama", dtype, shape, attention, core))

    def variant(suffix: str, family: str, dtype: str, shape: str, attention: str, core: bool, **options: Any) -> None:
        name = f"et_{family}_{dtype}_{shape}_{attention}_{suffix}"
        out.append(Config(name, family, "et_llama", dtype, shape, attention, core, tuple(options.items())))

    for name, (qmode, group, embedding) in QUANTIZED.items():
        for dtype in ("fp32", "fp16"):
            if dtype == "fp16" and qmode is not None and qmode.startswith("8da"):
                continue  # torchao quantises activations in the model's type, which rounds scales to eleven bits
            core = dtype == "fp32" or name == "4w"
            quantized = {"qmode": qmode, "group_size": group, "embedding_quantize": embedding}
            variant(name, "llama3_2", dtype, "dynamic", "custom", core, **quantized)
    for attention in ("custom", "plain"):
        variant("default_edge", "llama3_2", "fp16", "dynamic", attention, True, edge="default")
    for dtype in ("fp32", "fp16"):
        first = dtype == "fp32"
        variant("full_logits", "llama3_2", dtype, "dynamic", "custom", first, full_logits=True)
        variant("full_logits", "qwen3", dtype, "dynamic", "plain", False, full_logits=True)
        variant("no_cache", "llama3_2", dtype, "dynamic", "none", first, no_cache=True, full_logits=True)
        variant("ring", "llama3_2", dtype, "dynamic", "custom", first, local_global=(0, 16), max_seq=16)
        variant("ring", "llama3_2", dtype, "static", "custom", first, local_global=(0, 16), max_seq=16)
        variant("ring", "llama3_2", dtype, "dynamic", "plain", first, local_global=(0, 16), max_seq=16)
        variant("sink", "llama3_2", dtype, "dynamic", "custom", first, sink="4,28", max_seq=16)
        variant("sink", "llama3_2", dtype, "static", "custom", first, sink="4,28", max_seq=16)
    return tuple(out)


CONFIGS = _configs()


def _checkpoint(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random fp32 weights for the parameters of the model that `params` describes."""
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    with torch.device("meta"):
        model = construct_transformer(ModelArgs(max_seq_len=8, max_context_len=8, **params))
    return random_weights(model)


def random_weights(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """fp32 weights that keep activations near 1 for every parameter of `model` (which may be on the meta device)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            weights[name] = (0.0 if name.endswith("bias") else 1.0) + 0.1 * noise
        elif "embed" in name:
            weights[name] = 0.3 * noise  # may be tied to the output layer
        else:
            weights[name] = noise * parameter.shape[-1] ** -0.5
    return weights


def _llm_config(config: Config, folder: Path) -> Any:
    """The exporter's LlmConfig of a configuration, with its checkpoint and params files in `folder`."""
    from executorch.extension.llm.export.config.llm_config import DtypeOverride, LlmConfig, ModelType

    model_class, extra = FAMILIES[config.family]
    params = {**_TINY, **extra}
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(_checkpoint(params), folder / "consolidated.pth")
    llm = LlmConfig()
    llm.base.model_class = ModelType(model_class)
    llm.base.params = str(folder / "params.json")
    llm.base.checkpoint = str(folder / "consolidated.pth")
    llm.base.metadata = json.dumps({"get_bos_id": 1, "get_eos_ids": [2]})
    llm.model.dtype_override = DtypeOverride(config.dtype)
    llm.model.enable_dynamic_shape = config.shape == "dynamic"
    llm.model.use_kv_cache = not config.option("no_cache", False)
    llm.model.use_sdpa_with_kv_cache = config.attention == "custom"
    if config.option("local_global"):
        llm.model.local_global_attention = list(config.option("local_global"))
    llm.model.use_attention_sink = config.option("sink")
    llm.quantization.qmode = config.option("qmode")
    llm.quantization.group_size = config.option("group_size")
    llm.quantization.embedding_quantize = config.option("embedding_quantize")
    llm.quantization.use_hqq = False  # slow, and only another choice of scales
    llm.debug.generate_full_logits = config.option("full_logits", False)
    llm.export.max_seq_length = config.option("max_seq", CONTEXT)
    llm.export.max_context_length = CONTEXT
    llm.export.output_dir = str(folder)
    return llm


def _dequantized(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights that only are stored as integers (activations are not) replaced by their exact values."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(weight, "qdata") or weight.activation_quantization is not None:
            continue
        rows = weight.qdata.shape[0]
        scale, zero = (
            part.float().reshape(rows, -1).repeat_interleave(weight.block_size[1], 1)
            for part in (weight.scale, weight.zero_point)
        )
        module.weight = torch.nn.Parameter((weight.qdata.float() - zero) * scale, requires_grad=False)
    return model


def build(config: Config) -> Built:
    """Exports as `python -m executorch.extension.llm.export.export_llm` does, up to the exported program."""
    from executorch.examples.models.llama.export_llama_lib import _prepare_for_llama_export
    from executorch.exir import EdgeCompileConfig
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        manager = _prepare_for_llama_export(_llm_config(config, Path(folder)))
    cached = not config.option("no_cache", False)
    model = manager.model.eval()
    upcast = _dequantized(copy.deepcopy(model)).float()
    eager = copy.deepcopy(model)

    def make_inputs(tokens: np.ndarray, position: int) -> tuple[torch.Tensor, ...]:
        """tokens [S] -> (i64 [1, S], i64 [1]); without a cache only the first."""
        first = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        if cached:
            return first, torch.tensor([position], dtype=torch.int64)
        if position:
            raise ValueError("a program without a cache takes the whole sequence from position 0")
        return (first,)

    def caller(module: torch.nn.Module) -> Any:
        def call(tokens: np.ndarray, position: int) -> torch.Tensor:
            inputs = make_inputs(tokens, position)
            return module(inputs[0], {"input_pos": inputs[1]}) if cached else module(inputs[0])

        return call

    manager = manager.export()
    manager.run_canonical_optimizations()
    exported = manager._export(manager.pre_autograd_graph_module)
    dynamic = config.shape == "dynamic"
    compile_config = manager._get_edge_config()
    if config.option("edge") == "default":  # keeps dim_order ops, as a plain to_edge(program) does
        compile_config = EdgeCompileConfig(_check_ir_validity=False)
    longest = manager.max_seq_len - 1 if dynamic else (1 if cached else manager.max_seq_len)
    return Built(
        config=config,
        exported=exported,
        edge_kwargs={
            "compile_config": compile_config,
            "transform_passes": None,
            "constant_methods": manager.metadata,
        },
        make_inputs=make_inputs,
        reference=Reference(eager, caller(eager)),
        oracle=Reference(upcast, caller(upcast), precise=True),
        max_context=CONTEXT if cached else longest,
        max_seq=longest,
        min_seq=1 if dynamic else longest,
        vocab=VOCAB,
        stateful=cached,
        logits="all" if config.option("full_logits", False) else "last",
    )
