"""The command line: `run`, `bench`, `devices` and `inspect`, and how errors are shown."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..runtime.errors import DeviceError, InputError, WebGPUDelegateError
from ..runtime.gpu.device import INSTALL_HINT

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEBUG = "executorch_webgpu.debug"


class _Commands(click.Group):
    """A group that shows the package's errors and unreadable files as one line, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly
        except (WebGPUDelegateError, OSError) as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise click.ClickException(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split())


def _new_file(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A file to write after a long measurement: what would make that fail is said before."""
    if value is not None and value != "-" and (Path(value).is_dir() or not Path(value).absolute().parent.is_dir()):
        raise click.ClickException(f"{param.opts[0]} {value} cannot be written: it is a folder, or in no folder")
    return value


def _debug(command: _Command) -> _Command:
    """Add --debug, which may stand before or after a command's name."""

    def note(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[_DEBUG] = True

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=note, help="Show a traceback for errors."
    )(command)


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        parts = [f"{name} {importlib.metadata.version(name)}" for name in ("executorch-webgpu", "wgpu", "numpy")]
        click.echo(f"{parts[0]} ({', '.join(parts[1:])})")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show versions.")
@_debug
def cli() -> None:
    """Run ExecuTorch programs (.pte) that were lowered for WebGPU, and look at what is in them."""


@cli.command()
@click.argument("model", metavar="MODEL.pte")
@click.option("--tokenizer", required=True, metavar="FILE", help="The model's tokenizer.json.")
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="Text to continue; - reads it from standard input.")
@click.option("--data", multiple=True, metavar="FILE", help="A .ptd file with external weights; may be given again.")
@click.option("--method", default="forward", show_default=True, help="The decoder's method.")
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(min=0), help="Default: up to a stop or the model's capacity."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token always.")
@click.option(
    "--top-k", type=int, default=0, show_default=True, help="Draw from the k most likely tokens; 0: from all."
)
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest with this total.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Least likelihood relative to the best token."
)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less.")
@click.option("--seed", type=int, help="Makes a run with a temperature repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given again.")
@click.option("--adapter", metavar="NAME", help="Part of the name of the adapter to use; see `devices`.")
@click.option(
    "--steps-per-submit",
    type=click.IntRange(min=0),
    metavar="N",
    help="Decode steps that the GPU runs without the host; default: by their time; 0: one by one, chosen by the host.",
)
@click.option(
    "--speculate",
    metavar="HOW",
    help="Draft tokens and verify several at a time, same text: ngram or ngram:K looks K tokens up in the text "
    "so far; DRAFT.pte or DRAFT.pte:K generates them with a smaller model of the same vocabulary.",
)
@click.option("--stats", is_flag=True, help="Afterwards show speed, memory and kernel times on standard error.")
@click.option("--stream/--no-stream", default=True, show_default=True, help="Show text as it comes, or all at the end.")
@_debug
def run(
    model: str,
    tokenizer: str,
    prompt: str,
    data: tuple[str, ...],
    method: str,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    adapter: str | None,
    steps_per_submit: int | None,
    speculate: str | None,
    stats: bool,
    stream: bool,
) -> None:
    """Continue a text with a language model. The new text goes to standard output, all else to standard error."""
    from ..runtime import Device, Generator, Runtime, Sampling, Tokenizer
    from ..runtime.decoding.generate import generate_text
    from .drafters import drafter
    from .progress import loading
    from .stats import report
    from .tables import console

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = _read() if prompt == "-" else prompt
    if not text:
        raise InputError("the prompt is empty")
    codec = Tokenizer(tokenizer)
    runtime = Runtime(Device.create(adapter)) if adapter else Runtime.get()
    with runtime.load_program(model, list(data)) as program:
        with loading(console(stderr=True)) as progress:
            loaded = program.load_method(method, progress=progress)
        generator = Generator(loaded, program, steps_per_submit=steps_per_submit)
        with drafter(speculate, runtime) as drafts:
            result = generate_text(
                generator,
                codec,
                text,
                max_new_tokens=max_new_tokens,
                stop=stop,
                sampling=sampling,
                on_text=_write if stream else None,
                speculate=drafts,
            )
        _write("\n" if stream else f"{result.text}\n")
        if stats:
            report(generator, result)


def _read() -> str:
    """Standard input as UTF-8, without the line end that closes it."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on standard input is not UTF-8: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _write(text: str) -> None:
    """To standard output at once; characters that its encoding lacks become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=False)
    sys.stdout.flush()


@cli.command()
@click.argument("model", metavar="MODEL.pte")
@click.option("--data", multiple=True, metavar="FILE", help="A .ptd file with external weights; may be given again.")
@click.option("--method", default="forward", show_default=True, help="The decoder's method.")
@click.option(
    "--prefill",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens of a prompt; default: 512 or what fits. 0: none.",
)
@click.option(
    "--decode", type=click.IntRange(min=0), metavar="N", help="Steps of a run; default: 128 or what fits. 0: none."
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    metavar="N",
    help="Rows in the caches when steps begin; default: 512, or what fits. Caches with a row for each position are not "
    "filled first: what stands in them costs no time.",
)
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Sequences, which the program must be made for.")
@click.option("--random-weights", is_flag=True, help="Weights that are in no file get random values, made on the GPU.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Runs that count.")
@click.option("--warm-up", type=click.FloatRange(min=0), default=0.5, show_default=True, help="Seconds of runs before.")
@click.option(
    "--compare",
    multiple=True,
    metavar="PEER[=WHERE]",
    help="Also run llama-bench[=BINARY] (with --gguf) or onnxruntime-genai=FOLDER; may be given again.",
)
@click.option("--gguf", metavar="FILE", help="The model for llama-bench.")
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    callback=_new_file,
    help="Write everything measured as JSON; - for standard output.",
)
@click.option("--trace", metavar="FILE", callback=_new_file, help="Write the profiled calls as a Chrome trace.")
@click.option("--adapter", metavar="NAME", help="Part of the name of the adapter to use; see `devices`.")
@_debug
def bench(
    model: str,
    data: tuple[str, ...],
    method: str,
    prefill: int | None,
    decode: int | None,
    depth: int | None,
    batch: int | None,
    random_weights: bool,
    repetitions: int,
    warm_up: float,
    compare: tuple[str, ...],
    gguf: str | None,
    json_file: str | None,
    trace: str | None,
    adapter: str | None,
) -> None:
    """Time a language model: a prompt, steps, and each kernel of both."""
    from ..runtime import Device, Runtime
    from . import bench_tables, peers
    from .bench import Work, measure
    from .chrome_trace import write
    from .decoders import find_decoder
    from .progress import loading
    from .tables import console

    runtime = Runtime(Device.create(adapter)) if adapter else Runtime.get()
    device, status = runtime.device, console(stderr=True)
    with runtime.load_program(model, list(data), random_weights=random_weights) as program:
        began = time.perf_counter()
        with loading(status) as progress:
            loaded = program.load_method(method, progress=progress)
        took = time.perf_counter() - began
        decoder = find_decoder(loaded, program.constants, batch)
        work = Work.fit(decoder, prefill, decode, depth, repetitions, warm_up)
        with status.status("measuring") as line:
            report = measure(model, device, decoder, work, took, program.random_count, line.update)
            job = peers.Job(work.prefill, work.decode, work.depth, repetitions, gguf, warm_up)
            failed: list[peers.PeerError] = []
            for peer in compare:
                line.update(peer)
                try:
                    report.peers.append(peers.run(peer, job))
                except peers.PeerError as error:  # what was measured is shown nevertheless
                    failed.append(error)
        if trace is not None:
            if report.no_profile is not None:
                raise DeviceError(f"no trace: {report.no_profile}")
            steps = {"prefill": report.prefill, "step": report.decode}
            write(trace, {name: phase.times for name, phase in steps.items() if phase is not None}, {"program": model})
        text = json.dumps(report.record(), indent=2)
        if json_file == "-":
            click.echo(text)
        else:
            if json_file is not None:
                Path(json_file).write_text(f"{text}\n", encoding="utf-8")
            bench_tables.show(console(), report)
        if failed:
            raise peers.PeerError("; ".join(map(str, failed)))


@cli.command()
@_debug
def devices() -> None:
    """List the adapters that programs can run on. Exits with 1 if there is none."""
    from ..runtime.gpu.device import adapters, choose_adapter
    from .tables import console, device_table

    found = adapters()
    if not found:
        raise DeviceError(f"no WebGPU adapter: neither a GPU nor a software Vulkan driver was found. {INSTALL_HINT}")
    problem = None
    try:
        default = choose_adapter().summary
    except DeviceError as error:  # the environment names an adapter that is not there
        default, problem = None, error
    console().print(device_table(found, default))
    if problem is not None:
        raise problem


@cli.command()
@click.argument("model", metavar="MODEL.pte")
@click.option("--data", multiple=True, metavar="FILE", help="A .ptd file with external weights; may be given again.")
@click.option("--method", metavar="NAME", help="Show this method only.")
@click.option("--graph", is_flag=True, help="Also print the graph of each delegate.")
@click.option("--verify", is_flag=True, help="Hash the weights: are they what was exported?")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (with --graph: the graphs' text as well).")
@_debug
def inspect(model: str, data: tuple[str, ...], method: str | None, graph: bool, verify: bool, as_json: bool) -> None:
    """Show what a program holds: methods, delegates, weights. Needs no GPU."""
    from .contents import describe_program
    from .tables import console, show_contents

    found = describe_program(model, data, method, graph, verify)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show_contents(console(), found)
