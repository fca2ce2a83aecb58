"""Exports a Hugging Face decoder for batches whose rows have lengths of their own.

    python -m examples.export_ragged batch.pte --model meta-llama/Llama-3.2-1B --batch 8 --capacity 4096
    python -m examples.export_ragged small.pte --batch 1 --capacity 8448 --cache int8     random weights, a small Llama

`executorch_webgpu.runtime.BatchGenerator` runs the program, `executorch-webgpu bench FILE.pte --depth 8192` times it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from executorch_webgpu.llm.ragged import export_ragged

CACHES = {"f32": torch.float32, "f16": torch.float16, "int8": torch.int8, "int4": torch.uint8}


def small() -> PreTrainedModel:
    """Four layers whose attention is that of an 8B Llama (32 query and 8 KV heads of 128) and the rest small."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, head_dim=128, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=4,
        intermediate_size=256, vocab_size=512, max_position_embeddings=16384,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .pte file to write")
    parser.add_argument("--model", help="name or folder of a Hugging Face model; without one, a small random Llama")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--capacity", type=int, default=2048, help="rows of each cache")
    parser.add_argument("--longest", type=int, help="most tokens of a row in one call")
    parser.add_argument("--logits", choices=("last", "all"), default="last")
    parser.add_argument("--cache", choices=sorted(CACHES), help="how keys and values are kept; default: as the model")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model).eval() if options.model else small()
    program = export_ragged(
        model, options.batch, options.capacity, max_tokens=options.longest, logits=options.logits,
        cache_dtype=CACHES[options.cache] if options.cache else None,
    )  # fmt: skip
    options.path.write_bytes(program.buffer)
    print(f"{options.path}: {options.path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
