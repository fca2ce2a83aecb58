"""Perplexity of the story model on held-out stories: eager PyTorch on the CPU against the program on the GPU.

    python -m examples.stories.perplexity --stories 32 --markdown docs/PERPLEXITY.md

Each variant is one module: ExecuTorch's Llama with the shipped weights, quantised by torchao's `quantize_` where the
variant says so. That very module is evaluated eagerly, exported with logits of every token, lowered to one delegate
and evaluated on the GPU. A story is one call from position 0, with the questions and answers that follow it.
Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from examples.stories import data
from examples.stories.evaluate import load_tokenizer
from examples.stories.export import export_manager, exported, lower
from examples.stories.llama import MODEL_DIR, load_settings

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from executorch_webgpu.runtime import Runtime

Logits = Callable[["Tensor"], "Tensor"]
"""Token ids int64 [1, S] -> logits [1, S, vocab] of a sequence that begins at position 0."""

GROUP = 32
"""Columns that share a scale in four bits."""


def _int8(model: Module) -> None:
    """Integers of 8 bits with a scale a row, of linear layers and of the table of tokens."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    quantize_(model, IntxWeightOnlyConfig(torch.int8, PerAxis(0)), _has_matrix)


def _int4(model: Module) -> None:
    """Integers of 4 bits with a scale for each `GROUP` columns, of linear layers and of the table of tokens."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)), _has_matrix)


def _has_matrix(module: Module, name: str) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding)


VARIANTS: dict[str, tuple[str, Callable[[Module], None] | None]] = {
    "fp32": ("fp32", None),
    "fp16": ("fp16", None),
    "int8": ("fp32", _int8),
    "4bit": ("fp32", _int4),
}
"""Name -> type of the model, quantisation."""


@dataclass(frozen=True)
class Row:
    """A variant evaluated.

    Attributes:
        variant: Its name.
        tokens: How many tokens were predicted.
        eager: Perplexity of the eager module: exp of the mean negative log likelihood of a token.
        gpu: Perplexity of the program.
        packed: Matrices of the delegate that are stored as packed integers.
    """

    variant: str
    tokens: int
    eager: float
    gpu: float
    packed: int

    @property
    def difference(self) -> float:
        """Of the two, relative to the eager one."""
        return self.gpu / self.eager - 1


def stories(count: int, directory: Path = MODEL_DIR) -> list[list[int]]:
    """Token ids of the first held-out stories, each with `bos_id` in front and cut to the model's context."""
    tokenizer, settings = load_tokenizer(directory), load_settings(directory)
    texts = (data.document_text(data.make_story(data.EVAL_SEED_START + number)) for number in range(count))
    longest = settings["max_context"] - 1  # tokens that one call of the program takes
    return [[settings["bos_id"], *tokenizer.encode(text).ids][:longest] for text in texts]


def perplexity(logits: Logits, documents: Sequence[Sequence[int]]) -> tuple[float, int]:
    """(perplexity, tokens predicted): of every token of a document but the first; log likelihoods in float64."""
    import torch

    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([document])
        likely = logits(ids).double()[0, :-1].log_softmax(-1)
        total -= float(likely.gather(1, ids[0, 1:, None]).sum())
        count += len(document) - 1
    return math.exp(total / count), count


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Leaves out what ExecuTorch's eager kernels print for each call."""
    with tempfile.TemporaryFile() as hole:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(hole.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def measure(
    variant: str, documents: Sequence[Sequence[int]], runtime: Runtime | None = None, directory: Path = MODEL_DIR
) -> Row:
    """Evaluates one variant on both sides.

    Args:
        variant: A key of `VARIANTS`.
        documents: Token ids, at least two each.
        runtime: Where the program runs; the default GPU without it.
        directory: The model's folder.

    Raises:
        RuntimeError: The program is not one delegate.
    """
    import torch

    from executorch_webgpu.partitioner import WebGPUPartitioner
    from executorch_webgpu.runtime import Runtime

    dtype, quantize = VARIANTS[variant]
    manager = export_manager(dtype, directory=directory, full_logits=True, quantize=quantize)
    start = {"input_pos": torch.zeros(1, dtype=torch.int64)}
    with torch.no_grad(), _without_notes():
        eager, tokens = perplexity(lambda ids: manager.model(ids, start), documents)
    pte = lower(exported(manager), dict(manager.metadata), [WebGPUPartitioner()]).buffer
    with (runtime or Runtime()).load_program(bytes(pte)) as program:
        method = program.load_method("forward")
        if len(method.delegates) != 1 or method.outside():
            raise RuntimeError(f"{len(method.delegates)} delegates, and outside of them {method.outside()}")
        values = method.delegates[0].graph.values
        packed = sum(value.kind == "constant" and value.dtype == "u32" for value in values)
        gpu, _ = perplexity(lambda ids: torch.as_tensor(method.execute([ids, start["input_pos"]])[0]), documents)
    return Row(variant, tokens, eager, gpu, packed)


def table(rows: Sequence[Row]) -> str:
    """The results in Markdown."""
    lines = ["| variant | tokens | eager, CPU | GPU | difference |", "|---|---|---|---|---|"]
    lines += [f"| {r.variant} | {r.tokens:,} | {r.eager:.6f} | {r.gpu:.6f} | {r.difference:+.1e} |" for r in rows]
    return "\n".join(lines) + "\n"


def page(rows: Sequence[Row], count: int, device: str) -> str:
    """A page of documentation with the results."""
    return f"""# Perplexity

Made by `python -m examples.stories.perplexity --stories {count} --markdown FILE` on {device}.

The shipped story model on its first {count} held-out stories (seeds from {data.EVAL_SEED_START:,} on, with their
questions and answers; training used smaller ones). Eager PyTorch on the CPU and the exported delegate on the GPU have
the same module:

- fp32, fp16: weights in that type. In fp16 PyTorch rounds to float16 after every operator; the delegate keeps weights
  and caches in float16 and computes in float32.
- int8: torchao's `quantize_`, 8 bits a weight and a scale a row. 4bit: 4 bits and a scale for each {GROUP} columns. The
  table of tokens as well; everything else in float32.

{table(rows)}"""


def main() -> None:
    """Command-line entry point."""
    from executorch_webgpu.runtime import Runtime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names separated by commas")
    parser.add_argument("--stories", type=int, default=32, help="how many held-out stories")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the model")
    parser.add_argument("--markdown", type=Path, help="also write a page of documentation there")
    args = parser.parse_args()
    names = args.variants.split(",")
    unknown = sorted(set(names) - set(VARIANTS))
    if unknown:
        parser.error(f"no variant {unknown}; there are {', '.join(VARIANTS)}")
    if args.stories < 1:
        parser.error("--stories must be at least 1")
    runtime, documents = Runtime(), stories(args.stories, args.model)
    rows = [measure(name, documents, runtime, args.model) for name in names]
    print(table(rows), end="")
    if args.markdown is not None:
        args.markdown.write_text(page(rows, args.stories, runtime.device.name), encoding="utf-8")


if __name__ == "__main__":
    main()
