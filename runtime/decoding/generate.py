"""Text generation with a decoder program: from a prompt's text to the text that follows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from os import PathLike

from ..methods.program import Runtime, Source
from .arguments import check_callback
from .generator import GenerationResult, Generator
from .sampling import GREEDY, Sampling
from .speculative import Drafter
from .tokenizer import TextCodec, TextStream, Tokenizer

__all__ = ["GenerationResult", "Generator", "generate", "generate_text"]


def generate_text(
    generator: Generator,
    tokenizer: TextCodec,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    on_text: Callable[[str], object] | None = None,
    speculate: Drafter | None = None,
) -> GenerationResult:
    """Continue a text.

    Args:
        generator: its sequence is continued; the prompt is appended to it.
        stop: strings that end the text; they are left out.
        stop_ids: None: those that the program names and those that a `Tokenizer` found next to its file.
        on_text: called with each new piece of text, in whole characters; the pieces together are the result's text.
        speculate: drafts tokens that are verified together; see `speculative.py`.
    Raises:
        InputError: the prompt does not fit, or an option is wrong; nothing was run.
        DeviceError: the GPU failed.
    """
    if stop_ids is None:
        stop_ids = generator.stop_ids | getattr(tokenizer, "stop_ids", frozenset())
    check_callback("on_text", on_text)
    prompt_ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer, [*generator.tokens, *prompt_ids], stop)
    pieces: list[str] = []

    def emit(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    def on_token(token: int) -> bool:
        emit(stream.push(token))
        return stream.stopped is not None

    result = generator.generate(prompt_ids, max_new_tokens, stop_ids, sampling, on_token, speculate)
    emit(stream.finish())
    reason = result.stop_reason if stream.stopped is None else "stop_string"
    return replace(result, stop_reason=reason, text="".join(pieces))


def generate(
    pte: Source,
    prompt: str,
    tokenizer: TextCodec | str | PathLike[str],
    *,
    data: Source | Sequence[Source] | None = None,
    method: str = "forward",
    runtime: Runtime | None = None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    on_text: Callable[[str], object] | None = None,
) -> GenerationResult:
    """Load a program, continue a text, free the program.

    Args:
        pte, data: the `.pte`, and the `.ptd` file or files with its weights.
        tokenizer: a `tokenizer.json`, or an object with `encode(text) -> ids` and `decode(ids) -> text`.
        runtime: where it runs; None: the process-wide one.
        max_new_tokens, stop, stop_ids, sampling, on_text: as for `generate_text`.
    Returns:
        The result; its `text` is what was generated, without the prompt.
    Raises:
        WebGPUDelegateError: one of its subclasses says what is wrong with the program, the tokenizer, the prompt or
            the device.
        OSError: a file cannot be read.
    """
    codec = Tokenizer(tokenizer) if isinstance(tokenizer, str | PathLike) else tokenizer
    with (runtime or Runtime.get()).load_program(pte, data) as program:
        generator = Generator(program.load_method(method), program)
        return generate_text(
            generator,
            codec,
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_ids=stop_ids,
            sampling=sampling,
            on_text=on_text,
        )
