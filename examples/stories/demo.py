"""The demonstration: export the story model, lower it to one WebGPU delegate, let it write and answer on this GPU.

    python -m examples.stories.demo                                 # what `make demo` runs
    python -m examples.stories.demo --questions 200 --compare       # each answer against eager PyTorch

The program is exported once and kept under build/ until the model or the package's code changes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.stories import data
from examples.stories.evaluate import MAX_ANSWER_TOKENS, Report, evaluate
from examples.stories.llama import MODEL_DIR, load_settings
from executorch_webgpu.cli.stats import by_kernel
from executorch_webgpu.runtime import Device, DeviceError, Generator, Runtime, Sampling, Tokenizer
from executorch_webgpu.runtime.decoding.tokenizer import TextStream

ROOT = Path(__file__).resolve().parents[2]
STORY_SEED = 20_000_001
"""A held-out story (see `data`) for the questions that the demo shows."""


def fingerprint(dtype: str) -> str:
    """Changes with the model, the exporting code and the package: names the cached program."""
    digest = hashlib.sha256(dtype.encode())
    folders = ("backend", "partitioner", "ops", "examples/stories")
    kinds = (".py", ".fbs", ".json", ".safetensors")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def program_path(dtype: str, console: Console) -> Path:
    """The lowered program, exported now if there is none for this state of the code."""
    path = ROOT / "build" / f"stories-{dtype}-{fingerprint(dtype)}.pte"
    if path.exists():
        console.print(f"program: {path.relative_to(ROOT)} (exported before)")
        return path
    console.print("exporting the model with ExecuTorch and lowering it to WebGPU (half a minute) ...")
    start = time.perf_counter()
    from examples.stories.export import export_to_pte
    from executorch_webgpu.partitioner import WebGPUPartitioner

    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".tmp")
    export_to_pte(partial, partitioners=[WebGPUPartitioner()], dtype=dtype)
    partial.replace(path)
    seconds, size = time.perf_counter() - start, path.stat().st_size / 1e6
    console.print(f"program: {path.relative_to(ROOT)} ({size:.1f} MB) in {seconds:.0f} s")
    return path


def greedy(generator: Generator) -> Callable[[list[int], int, set[int]], list[int]]:
    """A greedy `evaluate.Generate`. What the prompt shares with the sequence so far stays in the KV cache."""

    def generate(prompt: list[int], limit: int, stops: set[int]) -> list[int]:
        shared = 0
        for old, new in zip(generator.tokens, prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        generator.rewind_to(shared)
        return list(generator.generate(prompt[shared:], limit, stops).tokens)

    return generate


def write_story(generator: Generator, tokenizer: Tokenizer, console: Console) -> None:
    """Stream a new story, sampled with a fixed seed."""
    settings = load_settings(MODEL_DIR)
    prompt = "Once upon a time"
    console.print(f"\n[bold]A story[/bold]\n{prompt}", end="")
    ids = [settings["bos_id"], *tokenizer.encode(prompt)]
    stream = TextStream(tokenizer, ids)

    def show(token: int) -> None:
        console.print(stream.push(token), end="", markup=False, highlight=False, soft_wrap=True)

    generator.reset()
    generator.generate(ids, 160, settings["stop_ids"], Sampling(temperature=0.7, top_k=40, seed=7), show)
    console.print(stream.finish())


def answer_questions(generator: Generator, tokenizer: Tokenizer, console: Console) -> None:
    """Ask about a held-out story and print it with the answers."""
    settings, story = load_settings(MODEL_DIR), data.make_story(STORY_SEED)
    console.print(f"\n[bold]Questions about a story[/bold]\n{story.text}", highlight=False)
    generate = greedy(generator)
    for question, expected in story.questions[:5]:
        ids = [settings["bos_id"], *tokenizer.encode(data.prompt_text(story, question))]
        given = tokenizer.decode(generate(ids, MAX_ANSWER_TOKENS, set(settings["stop_ids"]))).strip()
        mark = "[green]right[/green]" if given == expected else f"[red]expected {expected}[/red]"
        console.print(f"  {question} [bold]{given}[/bold] ({mark})", highlight=False)


def speed(generator: Generator, tokenizer: Tokenizer, console: Console) -> None:
    """Prefill and decode speed after warm-up, and where the time of a decode step goes."""
    settings, story = load_settings(MODEL_DIR), data.make_story(STORY_SEED)
    ids = [settings["bos_id"], *tokenizer.encode(story.text)]
    for _ in range(2):  # the first round compiles kernels
        generator.reset()
        result = generator.generate(ids, 32, ())
    device = generator.method.device
    console.print(f"\n[bold]Speed[/bold] on {device.name}", highlight=False)
    console.print(f"prefill: {result.prompt_tokens} tokens, {result.prefill_tokens_per_second:,.0f} tokens/s")
    console.print(f"decode: {result.decode_steps} tokens, {result.decode_tokens_per_second:,.1f} tokens/s")
    memory = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(device.memory.by_purpose.items()) if size)
    console.print(f"GPU memory: {memory}; peak {device.memory.peak / 1e6:.1f} MB")
    try:
        generator.profile_step()
        times = generator.profile_step()
    except DeviceError as error:
        console.print(f"no kernel times: {error}")
        return
    table = Table("kernel", "dispatches", "us", "share", title="One decode step")
    total = sum(t.nanoseconds for t in times)
    for kernel, count, nanoseconds in by_kernel(times):
        table.add_row(kernel, str(count), f"{nanoseconds / 1e3:,.0f}", f"{nanoseconds / max(total, 1):.0%}")
    console.print(table)


def compare(report: Report, count: int, console: Console) -> bool:
    """Whether eager PyTorch gives the same answers."""
    from examples.stories.llama import load_model

    eager = evaluate(load_model(MODEL_DIR).generate, count)
    same = [a.given == b.given for a, b in zip(report.answers, eager.answers, strict=True)]
    console.print(f"eager PyTorch: {eager}\nthe same answers: {sum(same)} of {len(same)}")
    return all(same)


def main() -> int:
    """Command-line entry point; 1 if answers are wrong more often than 1 in 20, or differ from eager PyTorch's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--questions", type=int, default=20, help="held-out questions to count right answers on")
    parser.add_argument("--compare", action="store_true", help="put the same questions to eager PyTorch")
    parser.add_argument("--adapter", help="part of an adapter's name")
    options = parser.parse_args()
    console = Console()
    try:
        device = Device.create(options.adapter) if options.adapter else Device.default()
    except DeviceError as error:
        console.print(f"{error}", style="red")
        return 1
    console.print(f"adapter: {device.name}", highlight=False)
    program = Runtime(device).load_program(program_path(options.dtype, console))
    method = program.load_method("forward")
    console.print(f"delegates: {len(method.delegates)}, operators outside: {method.outside() or 'none'}")
    generator, tokenizer = Generator(method, program), Tokenizer(MODEL_DIR / "tokenizer.json")
    write_story(generator, tokenizer, console)
    answer_questions(generator, tokenizer, console)
    speed(generator, tokenizer, console)
    report = evaluate(greedy(generator), options.questions)
    console.print(f"\nheld-out questions: {report}")
    same = compare(report, options.questions, console) if options.compare else True
    return 0 if same and report.accuracy > 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
