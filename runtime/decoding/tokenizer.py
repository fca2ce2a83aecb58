"""Text to token ids and back: `tokenizer.json` files, and decoding of a growing sequence."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError, ProgramFormatError, UnsupportedError

BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 5
"""Tokens decoded before a new one, so that it keeps the space before its word."""


class TextCodec(Protocol):
    """What text generation needs of a tokenizer; `Tokenizer` is one."""

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, special tokens included."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        ...


class Tokenizer:
    """A `tokenizer.json` (Hugging Face `tokenizers`).

    Attributes:
        stop_ids: ids that end a text as the files next to the tokenizer say (`generation_config.json`:
            `eos_token_id`, `tokenizer_config.json`: `eos_token`); empty without those files.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Read a file.

        Raises:
            UnsupportedError: the `tokenizers` package is not installed.
            ProgramFormatError: not a tokenizer file.
            OSError: the file cannot be read.
        """
        try:
            library = importlib.import_module("tokenizers")
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                "reading a tokenizer.json needs the `tokenizers` package: pip install 'executorch-webgpu[cli]'"
            ) from error
        data = Path(path).read_bytes()
        try:
            self._tokenizer: Any = library.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ProgramFormatError(f"{path}: not a tokenizer.json: {error}") from error
        self.stop_ids = self._find_stops(Path(path).parent)

    def _find_stops(self, folder: Path) -> frozenset[int]:
        found: set[int] = set()
        ids = _read_json(folder / "generation_config.json").get("eos_token_id")
        for value in ids if isinstance(ids, list) else [ids]:
            if isinstance(value, int):
                found.add(value)
        token = _read_json(folder / "tokenizer_config.json").get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        return frozenset(found if number is None else found | {number})

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt; the file's post-processor adds special tokens such as the one that begins a text."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out, incomplete characters become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none (such files are optional)."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class TextStream:
    """Turns ids that arrive one by one into text, and stops at stop strings.

    A character that is spread over several tokens comes out when it is complete, and text that may be the beginning
    of a stop string when that is decided. The pieces together are the text up to the stop string, which is left out.

    Args:
        codec: decodes ids.
        prompt: the ids before, so that the first piece keeps the space before its word.
        stops: strings that end the text.
    Attributes:
        stopped: the stop string that was found, else None.
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise InputError(f"stop strings {list(stops)!r}: each must be a text that is not empty")
        self.codec = codec
        self.stops = tuple(stops)
        self.stopped: str | None = None
        self._ids = list(prompt[-_CONTEXT:])
        self._known = len(self._ids)
        """Ids whose text has been taken."""
        self._start = 0
        """Ids from here on are decoded; those up to `_known` serve as context only."""
        self._held = ""
        """Text not yet handed out because it may begin a stop string."""

    def push(self, token: int) -> str:
        """The text that has become certain with one more id; often empty, and always so after a stop string."""
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(BROKEN):  # more bytes of this character may follow
            return ""
        self._advance(text)
        return self._release(text)

    def finish(self) -> str:
        """The rest, when no more ids come. A character that was cut off in the middle is dropped."""
        if self.stopped is not None:
            return ""
        text = self._new_text().rstrip(BROKEN)
        self._advance(text)
        out = self._release(text)
        if self.stopped is None:
            out, self._held = out + self._held, ""
        return out

    def _new_text(self) -> str:
        before = self.codec.decode(self._ids[self._start : self._known])
        return self.codec.decode(self._ids[self._start :])[len(before) :]

    def _advance(self, text: str) -> None:
        # Ids without text (special tokens) are no context: a decoder that drops the first space would drop the next
        # one too.
        if text:
            self._start = self._known
        self._known = len(self._ids)

    def _release(self, text: str) -> str:
        """Add text to what is held, and return what no stop string can begin in."""
        self._held += text
        places = [(self._held.find(stop), -len(stop), stop) for stop in self.stops if stop in self._held]
        if places:
            place, _, self.stopped = min(places)
            out, self._held = self._held[:place], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with (shorter than `stop`)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
