"""Tiny random Hugging Face decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.models.et_llama import random_weights
from tests.models.hf import _TINY as SETTINGS
from tests.models.hf import FAMILIES, VOCAB

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereConfig", {}),  # interleaved rotary embedding
    "glm": ("GlmConfig", {"head_dim": 32}),  # partial, interleaved
    "gpt2": ("GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}),  # learned positions
    "gpt_oss": ("GptOssConfig", {"head_dim": 32, "num_local_experts": 4, "sliding_window": 16}),  # sinks
    "deepseek": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
    ),  # its rotary embedding is a function of another name
    "gptj": ("GPTJConfig", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "granite_moe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 192, "word_embed_proj_dim": 128}),
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of two layers, vocabulary `VOCAB` and 128 positions, the same at every call."""
    import transformers

    name, extra = (FAMILIES | OTHERS)[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SETTINGS, **extra, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for key, value in random_weights(model).items():
            norm = value.dim() == 1 and not key.endswith(("bias", "sinks"))
            model.get_parameter(key).copy_(value - 1.0 if norm and family.startswith("gemma") else value)
    return model.to(dtype).eval()


def prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: Sequence[Sequence[int]], length: int, pad: int = 0) -> torch.Tensor:
    """Token rows [B, length], padded on the right."""
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
