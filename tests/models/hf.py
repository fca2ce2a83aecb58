"""Tiny random Hugging Face models through optimum-executorch's CausalLMExportableModule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.models.config import Built, Config
from tests.models.et_llama import random_weights
from tests.models.reference import Reference

VOCAB = 300
CONTEXT = 128
SLIDING_WINDOW = 16
_TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# family -> (transformers configuration class, what it adds to _TINY)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    ),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
# attention -> (use_custom_kv_cache, use_custom_sdpa)
ATTENTION: dict[str, tuple[bool, bool]] = {
    "custom": (True, True),
    "custom_sdpa": (False, True),
    "custom_kv": (True, False),
    "plain": (False, False),
}


# quantisation by optimum-executorch: name -> (linear layers, group size or 0 for rows, embedding, its group size)
QUANTIZED: dict[str, tuple[str | None, int, str | None, int]] = {
    "8da4w_e8": ("8da4w", 32, "8w", 0),
    "4w_e4": ("4w", 32, "4w", 32),
    "8da8w": ("8da8w", 0, None, 0),
    "8w_e8": ("8w", 0, "8w", 0),
}


def _configs() -> tuple[Config, ...]:
    out = []
    for family in FAMILIES:
        for attention in ATTENTION:
            for dtype in ("fp32", "fp16", "bf16"):
                if family.startswith("gemma") and attention == "custom_kv":
                    continue  # see UNEXPORTABLE
                core = attention == "custom" and dtype == "fp32"
                core = core or (family == "llama" and dtype != "bf16")
                core = core or (dtype, attention) == ("fp32", "plain")
                name = f"hf_{family}_{dtype}_dynamic_{attention}"
                out.append(Config(name, family, "hf", dtype, "dynamic", attention, core))
    for dtype in ("fp32", "fp16"):
        for attention in ("custom", "plain"):
            name = f"hf_llama_{dtype}_static_{attention}"
            out.append(Config(name, "llama", "hf", dtype, "static", attention, dtype == "fp32"))
    for name in QUANTIZED:
        for family in ("llama", "qwen3"):
            full = f"hf_{family}_fp32_dynamic_custom_{name}"
            option = (("quantized", name),)
            out.append(Config(full, family, "hf", "fp32", "dynamic", "custom", family == "llama", option))
    default = (("edge", "default"),)
    out.append(
        Config("hf_llama_fp16_dynamic_plain_default_edge", "llama", "hf", "fp16", "dynamic", "plain", True, default)
    )
    return tuple(out)


CONFIGS = _configs()
UNEXPORTABLE: dict[str, str] = {
    "hf_gemma2_*_custom_kv, hf_gemma3_*_custom_kv": "torch.export fails in scaled_dot_product_attention: the mask that "
    "transformers makes for a sliding layer has 16 columns (the window), the ring cache 32 rows (twice the window)",
}


def _context(config: Config) -> int:
    """Positions that the exported program is good for.

    Upstream limits of gemma: gemma2's ring layers get a causal custom_sdpa over a ring of twice the window; it aborts
    behind its end. Without the custom cache the graph only has the branch in which the sliding window is not full.
    """
    if not config.family.startswith("gemma"):
        return CONTEXT
    if config.attention != "custom":
        return SLIDING_WINDOW
    return 2 * SLIDING_WINDOW if config.family == "gemma2" else CONTEXT


def _model(config: Config, dtype: torch.dtype) -> Any:
    """A random model as optimum-executorch's text-generation task loads it.

    It computes in `dtype`; the weights are rounded to the configuration's dtype whatever that is.
    """
    import optimum.exporters.executorch.convert  # noqa: F401  registers the attention "custom_sdpa"
    import transformers

    class_name, extra = FAMILIES[config.family]
    settings = getattr(transformers, class_name)(**{**_TINY, **extra})
    settings.use_cache = True
    model = transformers.AutoModelForCausalLM.from_config(
        settings,
        dtype=dtype,
        attn_implementation="custom_sdpa" if ATTENTION[config.attention][1] else "sdpa",
    ).eval()
    with torch.no_grad():
        for name, value in random_weights(model).items():
            norm = value.dim() == 1 and not name.endswith("bias")
            offset = 1.0 if norm and config.family.startswith("gemma") else 0.0  # gemma scales by 1 + weight
            model.get_parameter(name).copy_((value - offset).to(config.torch_dtype))
    if config.option("quantized"):
        from optimum.exporters.executorch.quantization import quantize_model_

        linear, group, embedding, rows = QUANTIZED[config.option("quantized")]
        quantize_model_(model, linear, group, None, embedding, rows, "affine")
    model.generation_config = transformers.GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=CONTEXT,
        cache_config={"batch_size": 1, "max_cache_len": CONTEXT},
    )
    return model


class _Eager:
    """The module that optimum-executorch exports, kept eager."""

    def __init__(self, model: Any, config: Config) -> None:
        from optimum.executorch.attentions.custom_kv_cache import replace_with_et_custom_kv_cache
        from optimum.exporters.executorch.integrations import CausalLMExportableModule
        from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

        kv, sdpa = ATTENTION[config.attention]
        self._wrapper = CausalLMExportableModule(model, CONTEXT, kv, sdpa)
        self.module = TorchExportableModuleForDecoderOnlyLM(model)
        if kv:
            replace_with_et_custom_kv_cache(self.module.model, model.config, model.generation_config, model.dtype)

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer, and the caches that are attributes of a transformers cache object."""
        inner = self.module.model
        cache = getattr(inner, "static_cache", None) or inner.cache
        found = list(inner.buffers())
        for layer in getattr(cache, "kv_cache", []):
            found += list(layer.buffers())
        for layer in cache.layers:
            found += [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        return list({id(tensor): tensor for tensor in found}.values())

    def counting(self) -> list[Any]:
        """transformers' sliding window layers, which count in Python."""
        inner = self.module.model
        layers = (getattr(inner, "static_cache", None) or inner.cache).layers
        return [layer for layer in layers if hasattr(layer, "cumulative_length")]

    def restart(self) -> None:
        """Resets what sliding window layers count."""
        for layer in self.counting():
            layer.cumulative_length = 0

    def __call__(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self._wrapper._register_custom_attention(self.module)  # a global table, so again before each call
        return self.module.model(input_ids=tokens, cache_position=position)


def make_inputs(tokens: np.ndarray, position: int) -> tuple[torch.Tensor, ...]:
    """tokens [S] -> (input_ids i64 [1, S], cache_position i64 [S])."""
    ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
    return ids, torch.arange(position, position + ids.shape[1], dtype=torch.int64)


def _reference(eager: _Eager, precise: bool) -> Reference:
    def call(tokens: np.ndarray, position: int) -> torch.Tensor:
        return eager(*make_inputs(tokens, position))

    return Reference(eager.module, call, precise, eager.buffers, eager.restart if eager.counting() else None)


def build(config: Config) -> Built:
    """Exports as optimum-executorch's recipes do, up to the exported program."""
    from executorch.exir import EdgeCompileConfig
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from optimum.executorch.passes.remove_padding_idx_embedding_pass import RemovePaddingIdxEmbeddingPass
    from optimum.exporters.executorch.integrations import CausalLMExportableModule

    model = _model(config, config.torch_dtype)
    kv, sdpa = ATTENTION[config.attention]
    eager = _Eager(_model(config, config.torch_dtype), config)
    oracle = _Eager(_model(config, torch.float32), config)
    exportable = CausalLMExportableModule(model, CONTEXT, kv, sdpa, config.shape == "static")
    exported = exportable.export()["model"]
    ids = next(node for node in exported.graph.nodes if node.name == "input_ids").meta["val"]
    dynamic = not isinstance(ids.shape[1], int)
    longest = min(CONTEXT, getattr(model.config, "sliding_window", None) or CONTEXT) - 1 if dynamic else 1
    return Built(
        config=config,
        exported=exported,
        edge_kwargs={
            "compile_config": EdgeCompileConfig(
                _check_ir_validity=False, _skip_dim_order=config.option("edge") != "default"
            ),
            "transform_passes": [RemovePaddingIdxEmbeddingPass()],
            "constant_methods": exportable.metadata,
        },
        make_inputs=make_inputs,
        reference=_reference(eager, precise=False),
        oracle=_reference(oracle, precise=True),
        max_context=_context(config),
        max_seq=longest,
        min_seq=1,
        vocab=VOCAB,
        logits="all",
    )
