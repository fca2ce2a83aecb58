"""Many sequences over one program: does anything grow? And what drafts are worth.

    python -m benchmarks.sessions MODEL.pte                   20 generators, 1,000 steps each, in turns
    python -m benchmarks.sessions MODEL.pte --speculate 7     repeating text with and without drafts of 7 tokens

The first prints a JSON line for each generator that was destroyed: bytes of GPU memory, live Python objects, resident
memory of the process in KiB (where the system tells) and seconds; all but the seconds should be those of the line
before. It ends with status 1 if GPU memory or objects grew. The second needs a program that gives the logits of every
token; the text is a part of the model's own, which it is made to repeat. It ends with status 1 if drafts changed it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from executorch_webgpu.runtime import GenerationResult, Generator, NGram, Program, Runtime, UnsupportedError
from executorch_webgpu.runtime.decoding.speculative import find_part

from .options import command, count, naturals

ALLOWED = 200
"""Python objects that may be more at the end than after the first quarter: caches of the interpreter."""


def resident_kib() -> int | None:
    """Resident memory of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next((int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS")), None)


def turns(program: Program, generators: int, steps: int, together: int, prompt: Sequence[int]) -> bool:
    """Generators in turns; every third one forks, every fifth one chooses on the host. Returns whether nothing grew."""
    memory, seen = program.runtime.device.memory, []
    for number in range(generators):
        began = time.perf_counter()
        with Generator(program, steps_per_submit=0 if number % 5 == 4 else None) as generator:
            done = 0
            while done < steps:
                if generator.room is not None and generator.room < 2:
                    generator.rewind_to(0)
                if generator.length == 0:
                    generator.append_tokens(prompt)
                done += len(generator.generate((), min(together, steps - done), ()).tokens)
                if number % 3 == 0:
                    with generator.fork() as fork:
                        fork.generate((), 2, ())
        gc.collect()
        line = {
            "generator": number,
            "steps": done,
            "seconds": round(time.perf_counter() - began, 3),
            "gpu_bytes": memory.total,
            "objects": len(gc.get_objects()),
            "resident_kib": resident_kib(),
        }
        seen.append((memory.total, line["objects"]))
        print(json.dumps(line), flush=True)
    quarter = max(len(seen) // 4, 1)
    first, last = seen[quarter - 1], seen[-1]
    assert isinstance(first[1], int)
    assert isinstance(last[1], int)
    return last[0] <= max(size for size, _ in seen[:quarter]) and last[1] <= first[1] + ALLOWED


def speculation(program: Program, most: int, tokens: int, repetitions: int, prompt: Sequence[int]) -> bool:
    """Tokens per second with and without drafts, each the median of some runs over the same text, which take turns: a
    GPU that idles between drafts lowers its clock, and the host's speed changes as well, so both must see the same.
    Returns whether the tokens are equal."""
    with Generator(program) as generator:
        room = generator.capacity or 1 << 30
        generator.append_tokens(prompt)
        part = [*prompt, *generator.generate((), min(32, room // 8), ()).tokens]
        text = (part * 3)[: max(room - tokens, len(part) + 2)]
        drafters = {"plain": None, "n-gram": NGram(most)}
        results: dict[str, list[GenerationResult]] = {name: [] for name in drafters}
        for _ in range(repetitions + 1):
            for name, drafter in drafters.items():
                generator.reset()
                generator.append_tokens(text)
                results[name].append(generator.generate((), min(tokens, room - len(text)), (), speculate=drafter))
    medians = {}
    for name, found in results.items():
        measured = found[1:]  # the first run compiles kernels
        rates = [len(one.tokens) / (one.prefill_seconds + one.decode_seconds) for one in measured]
        medians[name] = statistics.median(rates)
        line: dict[str, object] = {
            "decoding": name,
            "tokens": len(found[-1].tokens),
            "tokens_per_second": round(medians[name], 1),
            "least": round(min(rates), 1),
            "most": round(max(rates), 1),
        }
        drafts = found[-1].speculation
        if drafts is not None:
            line |= {"drafted": drafts.drafted, "accepted": drafts.accepted, "calls": drafts.calls}
            line["times_plain"] = round(medians[name] / medians["plain"], 2)
            line["equal"] = results["plain"][-1].tokens == found[-1].tokens
        print(json.dumps(line), flush=True)
    return len({one.tokens for found in results.values() for one in found}) == 1


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sessions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", action="append", default=[], help="a .ptd file")
    parser.add_argument("--generators", type=count, default=20)
    parser.add_argument("--steps", type=count, default=1000, help="of each generator")
    parser.add_argument("--together", type=count, default=100, help="tokens of one `generate`")
    parser.add_argument("--prompt", type=naturals, default=[1, 2, 3], help="token ids: 1,2,3")
    parser.add_argument("--speculate", type=count, metavar="K", help="compare with drafts of K tokens instead")
    parser.add_argument("--tokens", type=count, default=256, help="of a text with --speculate")
    parser.add_argument("--repetitions", type=count, default=5)
    args = parser.parse_args(arguments)
    with Runtime.get().load_program(args.model, args.data) as program:
        if args.speculate is not None:
            try:
                with Generator(program) as generator:
                    find_part(generator)
            except UnsupportedError as error:
                parser.error(str(error))
            return int(not speculation(program, args.speculate, args.tokens, args.repetitions, args.prompt))
        return int(not turns(program, args.generators, args.steps, args.together, args.prompt))


if __name__ == "__main__":
    sys.exit(main())
