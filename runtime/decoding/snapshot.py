"""What a session holds, kept elsewhere: copies of its state on the GPU, and files.

A cache with a row for each position is copied and stored as far as it is in use; other state (recurrent state, ring
buffers) as a whole.

A session file is a safetensors file: `tokens` i32[n], `logits` f32[V] where those of the last token are known, and
`state.NAME` for each mutable buffer, in the type in which the device keeps it (a device without f16 keeps f32), a cache
[B, C, H, D] as [B, rows, H, D], or as [1, rows, H, D] where the session is a row of a batch. Its metadata: `format`,
`version`, `model` (see `model_id`), `methods`, `capacity`, `run` (tokens whose rows are in the state), `seed`,
`stopped`, `floor` (see `Content`), and `sha256` of all the rest.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import wgpu

from ...backend.graph import Value
from ..errors import InputError, UnsupportedError
from ..gpu.buffers import State
from ..gpu.device import Device
from ..gpu.host import STORAGE
from ..gpu.random_weights import RandomWeights
from ..methods.method import Method

Array = np.ndarray[Any, Any]
FORMAT, VERSION = "executorch-webgpu session", 1
_PREFIX = "state."


@dataclass(frozen=True)
class Content:
    """A session without its state.

    Attributes:
        tokens: all ids.
        run: the first so many are in the state.
        logits: f32[V] of the last token that was run; None if not known.
        seed: of the random numbers, where the sampling settings name none.
        stopped: whether the last token was a stop token.
        floor: first position that ring buffers hold.
    """

    tokens: tuple[int, ...]
    run: int
    logits: Array | None
    seed: int
    stopped: bool
    floor: int = 0


class Snapshot:
    """A session at one moment, with a copy of its state on the GPU. Made by `Generator.snapshot`.

    Attributes:
        length: number of tokens.
        tokens: all ids.
    """

    def __init__(self, content: Content, state: State, model: str, outside: list[dict[int, Any]]) -> None:
        self.content = content
        self.state = state
        self.model = model
        self.outside = outside
        """What each method keeps outside of its delegates."""

    @property
    def length(self) -> int:
        return len(self.content.tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.content.tokens

    def close(self) -> None:
        """Free the copy; the snapshot cannot be restored afterwards."""
        self.state.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- which part of a buffer is in use


@dataclass(frozen=True)
class Used:
    """Which rows of a state are in use.

    Attributes:
        rows: the first so many positions of every cache; None: everything of every buffer.
        capacity: positions that a cache has at least; it tells the axis of positions.
        sequence: the only index of the first axis, that of batch rows, which is in use; None: all are.
    """

    rows: int | None
    capacity: int
    sequence: int | None = None

    def axis(self, value: Value) -> int | None:
        """The axis of positions of a cache [B, C, H, D] or [B, H, C, D]; None where it is unknown, or all is in use."""
        if self.rows is None or len(value.shape) != 4:
            return None
        long = [axis for axis in (1, 2) if _size(value, axis) >= self.capacity]
        return long[0] if len(long) == 1 else None

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of the part in use."""
        axis = self.axis(value)
        found = [_size(value, i) for i in range(len(value.shape))]
        if axis is not None and self.rows is not None:
            found[axis] = self.rows
        if self.sequence is not None:
            found[0] = 1
        return tuple(found)

    def _cut(self, value: Value) -> int:
        """The axis from which on elements in use stand together."""
        return max(self.axis(value) or 0, 0 if self.sequence is None else 1)

    def block(self, value: Value) -> int:
        """Elements from the beginning of a contiguous piece to that of the next."""
        return prod(_size(value, i) for i in range(self._cut(value), len(value.shape)))

    def runs(self, value: Value) -> Iterator[tuple[int, int]]:
        """(first element, elements) of each contiguous piece in use."""
        shape, cut, block = self.shape(value), self._cut(value), self.block(value)
        used, count = prod(shape[cut:]), prod(shape[:cut])
        first = count * (self.sequence or 0)
        for number in range(first, first + count):
            if used:
                yield number * block, used

    def parts(self, device: Device) -> Callable[[Value, int], Iterator[tuple[int, int]]]:
        """For `State.copy_from`: (first byte, bytes) of each piece in use, multiples of 4."""

        def found(value: Value, limit: int) -> Iterator[tuple[int, int]]:
            item = STORAGE[device.limits.wgsl_type(value.dtype)].itemsize
            for first, count in self.runs(value):
                start, end = _aligned(first * item, (first + count) * item)
                yield start, min(end, limit) - start

        return found


def _size(value: Value, axis: int) -> int:
    size = value.shape[axis]
    assert isinstance(size, int), f"{value.name} has a dynamic size"
    return size


def _aligned(start: int, end: int) -> tuple[int, int]:
    return start // 4 * 4, -(-end // 4) * 4


# -- to and from the host


def download(state: State, used: Used) -> dict[str, Array]:
    """The parts of a state's buffers that are in use, by name, in the device's own types."""
    found = {}
    for name, buffer in state.buffers().items():
        value = state.values()[name]
        kind = STORAGE[state.device.limits.wgsl_type(value.dtype)]
        runs = list(used.runs(value))
        pieces = list(used.parts(state.device)(value, buffer.size))
        data = _read(state.device, buffer, pieces)
        array = np.empty(sum(count for _, count in runs), kind)
        place, offset = 0, 0
        for (first, count), (start, size) in zip(runs, pieces, strict=True):
            array[place : place + count] = np.frombuffer(data, kind, count, offset + first * kind.itemsize - start)
            place, offset = place + count, offset + size
        found[name] = array.reshape(used.shape(value))
    return found


def _read(device: Device, buffer: Any, pieces: list[tuple[int, int]]) -> bytes:
    """Pieces of a buffer, one after the other."""
    total = sum(size for _, size in pieces)
    if not total:
        return b""
    with device.lock:
        usage = wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
        staging = device.buffer(total, "read-back", "part of a state", usage)
        try:
            encoder = device.gpu.create_command_encoder(label="read a state")
            offset = 0
            for start, size in pieces:
                encoder.copy_buffer_to_buffer(buffer, start, staging, offset, size)
                offset += size
            device.gpu.queue.submit([encoder.finish()])
            return bytes(device.gpu.queue.read_buffer(staging, 0, total))
        finally:
            device.release(staging, "read-back")


def upload(state: State, used: Used, arrays: Mapping[str, Array]) -> None:
    """Write what `download` gave; what is not in use stays as it was."""
    with state.device.lock:
        for name, buffer in state.buffers().items():
            value = state.values()[name]
            kind = STORAGE[state.device.limits.wgsl_type(value.dtype)]
            flat = np.ascontiguousarray(arrays[name]).reshape(-1)
            runs = list(used.runs(value))
            if any((first * kind.itemsize) % 4 or (count * kind.itemsize) % 4 for first, count in runs):
                # writes are in units of 4 bytes
                whole = np.frombuffer(_read(state.device, buffer, [(0, buffer.size)]), kind).copy()
                _scatter(runs, flat, whole)
                state.device.write(buffer, whole)
                continue
            place = 0
            for first, count in runs:
                state.device.write(buffer, flat[place : place + count], first * kind.itemsize)
                place += count


def _scatter(runs: list[tuple[int, int]], flat: Array, whole: Array) -> None:
    place = 0
    for first, count in runs:
        whole[first : first + count] = flat[place : place + count]
        place += count


# -- files


def model_id(methods: Iterable[Method]) -> str:
    """SHA-256 of methods' graphs, which name their weights by content: equal for equal programs, whatever other methods
    they have (`files.identity` names whole programs). With random weights for missing ones it is another model."""
    found = hashlib.sha256()
    for method in methods:
        for part in method.plan.delegates:
            found.update(hashlib.sha256(part.processed).digest())
        if isinstance(method.weights, RandomWeights) and method.weights.made:
            found.update(b"random weights")
    return found.hexdigest()


def check_path(value: Any) -> Path:
    """A file's name. Raises InputError for anything else."""
    if not isinstance(value, str | PathLike) or isinstance(os.fspath(value), bytes):
        raise InputError(f"path is {value!r}, expected the name of a file")
    return Path(value)


def check_target(value: Any) -> Path:
    """As `check_path`, of a file that can be written: OSError where there is a folder, or none to put it in."""
    path = check_path(value)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, expected the name of a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    return path


def _safetensors(what: str) -> Any:
    """The library's module for numpy. Raises UnsupportedError where it is not installed."""
    try:
        importlib.import_module("safetensors")
        return importlib.import_module(what)
    except ImportError as error:
        raise UnsupportedError(
            "saving and loading sessions needs the safetensors package: pip install 'executorch-webgpu[sessions]'"
        ) from error


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Array]) -> str:
    found = hashlib.sha256(json.dumps({k: v for k, v in sorted(metadata.items()) if k != "sha256"}).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def save(
    path: str | PathLike[str], content: Content, state: Mapping[str, Array], model: str, capacity: int, methods: str
) -> None:
    """Write a session file; one of that name is replaced when the new one is complete.

    Raises:
        InputError: `path` is no file's name.
        UnsupportedError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    library = _safetensors("safetensors.numpy")
    tensors = {"tokens": np.array(content.tokens, np.int32), **{_PREFIX + name: a for name, a in state.items()}}
    if content.logits is not None:
        tensors["logits"] = content.logits.astype(np.float32)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": model,
        "methods": methods,
        "capacity": str(capacity),
        "run": str(content.run),
        "seed": str(content.seed),
        "stopped": str(int(content.stopped)),
        "floor": str(content.floor),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    target = check_target(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        library.save_file(tensors, name, metadata)
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Expected:
    """What a session file must fit.

    Attributes:
        model: see `model_id`.
        capacity: most tokens.
        vocabulary: number of logits.
        state: name -> type of each mutable buffer.
        by_position: whether the buffers are caches of which only rows in use are stored.
        sequence: the batch row that becomes the session; None: it is no row of a batch.
    """

    model: str
    capacity: int
    vocabulary: int
    state: Mapping[str, Value]
    by_position: bool
    sequence: int | None = None


def load(path: str | PathLike[str], expected: Expected, device: Device) -> tuple[Content, dict[str, Array], Used]:
    """Read a session file and check it whole.

    Returns:
        The content; its state as `upload` takes it; the rows in use.
    Raises:
        InputError: no session file; truncated or damaged; of another version or another model; longer than the
            capacity. Says which.
        UnsupportedError: safetensors is not installed.
        OSError: the file cannot be read.
    """
    metadata, tensors = _read_file(path)
    if metadata.get("sha256") != _digest(metadata, tensors):
        raise InputError(f"{path}: the session file is damaged: its content does not fit its checksum")
    try:
        run, seed, capacity = int(metadata["run"]), int(metadata["seed"]), int(metadata["capacity"])
        ids = [int(token) for token in tensors["tokens"]]
        stopped, methods, floor = metadata["stopped"] == "1", metadata["methods"], int(metadata["floor"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: the session file is incomplete: {error}") from error
    content = Content(tuple(ids), run, tensors.get("logits"), seed, stopped, floor)
    if len(ids) > expected.capacity:
        raise InputError(
            f"{path}: the session has {len(ids):,} tokens (its program takes {capacity:,}), but this program takes "
            f"{expected.capacity:,}"
        )
    if metadata.get("model") != expected.model:
        raise InputError(
            f"{path}: the session belongs to another model, or to another export of it ({methods}, "
            f"{str(metadata.get('model'))[:12]}; this one is {expected.model[:12]})"
        )
    used = Used(run if expected.by_position else None, expected.capacity, expected.sequence)
    arrays = {name.removeprefix(_PREFIX): array for name, array in tensors.items() if name.startswith(_PREFIX)}
    _check(path, content, arrays, expected, used, device)
    arrays = {
        name: array.astype(STORAGE[device.limits.wgsl_type(expected.state[name].dtype)])
        for name, array in arrays.items()
    }
    return replace(content, logits=None if content.logits is None else content.logits.copy()), arrays, used


def _read_file(path: str | PathLike[str]) -> tuple[dict[str, str], dict[str, Array]]:
    library = _safetensors("safetensors")
    with check_path(path).open("rb"):  # a missing or unreadable file is an OSError that names it
        pass
    try:
        with library.safe_open(str(path), framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") == FORMAT and metadata.get("version") == str(VERSION):
                return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise InputError(f"{path}: no session file, or a truncated or damaged one: {error}") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but no session")
    raise InputError(
        f"{path}: a session of format version {metadata.get('version')}; this package reads version {VERSION}"
    )


def _check(
    path: str | PathLike[str], content: Content, arrays: Mapping[str, Array], expected: Expected, used: Used,
    device: Device,
) -> None:  # fmt: skip
    """InputError where what is in a file does not fit together."""

    def require(good: bool, what: str) -> None:
        if not good:
            raise InputError(f"{path}: {what}")

    length = len(content.tokens)
    require(0 <= content.run <= length, f"{content.run} of {length} tokens were run")
    require(0 <= content.seed < 2**64, f"the seed is {content.seed}")
    require(all(0 <= token < expected.vocabulary for token in content.tokens), "a token outside the vocabulary")
    require(
        content.logits is None or content.logits.shape == (expected.vocabulary,),
        f"logits of shape {None if content.logits is None else list(content.logits.shape)}",
    )
    missing, extra = sorted(set(expected.state) - set(arrays)), sorted(set(arrays) - set(expected.state))
    require(not missing and not extra, f"state is missing {missing}, and {extra} is not this program's")
    for name, value in expected.state.items():
        shape, given = used.shape(value), arrays[name]
        require(given.shape == shape, f"state {name} has shape {list(given.shape)}, expected {list(shape)}")
        kind = STORAGE[device.limits.wgsl_type(value.dtype)]
        require(given.dtype.kind == kind.kind, f"state {name} is {given.dtype}, expected {kind}")
