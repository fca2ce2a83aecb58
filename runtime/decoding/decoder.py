"""How a decoder method is called: found from the types of its inputs and outputs, never from a model's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...backend.graph import Sym, evaluate
from ..errors import InputError, UnsupportedError
from ..files.pte import DelegateCall
from ..gpu.host import to_host
from ..methods.delegate import Delegate
from ..methods.method import Method, TensorInfo
from .token_ids import constant_size

Array = np.ndarray[Any, Any]
_DTYPES: dict[str, type[np.integer[Any]]] = {"i64": np.int64, "i32": np.int32}
_POSITIONS = 2**31 - 2
"""More than any cache has."""
_EXPECTED = (
    "expected (tokens i64[1, S], input_pos i64[1]), as ExecuTorch exports Llama, or "
    "(input_ids i64[1, S], cache_position i64[S]), as Hugging Face models are exported, with S dynamic or 1"
)


_EXPECTED_RAGGED = (
    "expected (tokens i64[B, S], past i32[B], q_len i32[B]) with S dynamic or 1, as executorch_webgpu.llm.ragged "
    "exports models"
)


@dataclass(frozen=True)
class Ragged:
    """How to call a decoder of B rows, each a sequence with a length of its own.

    Attributes:
        rows: B.
        chunk: the most tokens of a row that one call takes; 1 for a program with static sizes.
        vocabulary: number of logits.
        capacity: the most tokens a row may have.
        every: whether the logits of every token come back, [B, S, V], not only of each row's last one, [B, V].
        dtypes: host dtypes of tokens, past and q_len.
        shapes: those of past and q_len, each with B elements.
        note: as `Convention.note`.
    """

    rows: int
    chunk: int
    vocabulary: int
    capacity: int
    every: bool
    dtypes: tuple[str, str, str] = ("i64", "i32", "i32")
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((-1,), (-1,))
    note: str = ""

    def inputs(self, ids: Sequence[Sequence[int]], past: Sequence[int], size: int) -> list[Array]:
        """The arguments of one call: row b gets `ids[b]`, at most `size` of them (none: it stays idle), at `past[b]`.

        Args:
            size: tokens of a row, S; what is behind a row's own is 0.
        """
        tokens = np.zeros((self.rows, size), _DTYPES[self.dtypes[0]])
        for row, given in enumerate(ids):
            tokens[row, : len(given)] = given
        lengths = (past, [len(given) for given in ids])
        rest = zip(lengths, self.dtypes[1:], self.shapes, strict=True)
        return [tokens, *(np.array(words, _DTYPES[dtype]).reshape(shape) for words, dtype, shape in rest)]

    def last_logits(self, output: Any, row: int, count: int) -> Array:
        """A row's logits [V] of the last of `count` new tokens, from an output of a call; a view."""
        found: Array = np.asarray(output)
        logits: Array = found[row, count - 1] if self.every else found[row]
        return logits


@dataclass(frozen=True)
class Convention:
    """How to call a decoder method.

    Attributes:
        every_position: the second input is the position of each token, i64[S]; else that of the first, i64[1].
        chunk: the most tokens one call takes; 1 for a program with static sizes.
        vocabulary: number of logits.
        capacity: the most tokens a sequence may have; None if the program does not limit it.
        rewindable: whether all state is caches with a row for each position, so that going back is only counting.
        dtypes: host dtypes of the two inputs.
        ragged: the convention of a program for batches, of one row.
        note: what messages about the capacity end with: in parentheses, the program's own number where it is larger
            than what the program can run, and what limits it; empty else.
    """

    every_position: bool
    chunk: int
    vocabulary: int
    capacity: int | None
    rewindable: bool
    dtypes: tuple[str, str] = ("i64", "i64")
    ragged: Ragged | None = None
    note: str = ""

    def inputs(self, ids: Sequence[int], position: int) -> list[Array]:
        """The arguments of one call that puts `ids` (at most `chunk`) at `position` and after."""
        if self.ragged is not None:
            return self.ragged.inputs([ids], [position], len(ids))
        end = position + (len(ids) if self.every_position else 1)
        rows = np.arange(position, end, dtype=_DTYPES[self.dtypes[1]])
        return [np.array([ids], _DTYPES[self.dtypes[0]]), rows]

    @staticmethod
    def last_logits(output: Any) -> Array:
        """The logits [V] of the last token, from an output [1, V] or [1, S, V]."""
        rows: Array = np.asarray(output)
        last: Array = rows.reshape(-1, rows.shape[-1])[-1].copy()  # its own: the rest may be large
        return last


def find_convention(method: Method, constants: Mapping[str, Any], prompts: bool = False) -> Convention:
    """The convention of a method.

    Args:
        prompts: it may take exactly so many tokens a call, because another method takes single ones.
        constants: constant methods of the program; `get_max_context_len`, else `get_max_seq_len`, gives the
            capacity. Without them, and where they name more than that, it is the number of positions that the range
            checks of the program's kernels let pass: rows of caches that have one for each position, of tables of
            embeddings, and ranges of the export. Ring buffers take any position; what only later parts of a program of
            several delegates refuse is not seen.
    Raises:
        UnsupportedError: it is no decoder for one sequence at a time; says what its inputs and outputs are.
        InputError: the capacity is no positive integer.
    """
    meta, names = method.metadata, input_names(method)
    shown = ", ".join(f"{name} {show(info)}" for name, info in zip(names, meta.inputs, strict=True)) or "none"

    def refuse(why: str) -> UnsupportedError:
        return UnsupportedError(f"method {meta.name} cannot generate text: {why}. Its inputs: {shown}; {_EXPECTED}")

    if _looks_ragged(method):
        ragged, rewindable = _ragged(method, constants)
        if ragged.rows != 1:
            raise refuse(f"it takes batches of {ragged.rows} rows with lengths of their own; BatchGenerator runs those")
        return Convention(
            False, ragged.chunk, ragged.vocabulary, ragged.capacity, rewindable, ragged.dtypes[:2], ragged, ragged.note
        )  # fmt: skip
    if len(meta.inputs) != 2:
        raise refuse(f"it has {len(meta.inputs)} inputs, not 2")
    tokens, positions = meta.inputs
    if tokens is None or tokens.dtype not in _DTYPES or len(tokens.sizes) != 2:
        raise refuse(f"the first input ({names[0]}) is no integer tensor of rank 2")
    if positions is None or positions.dtype not in _DTYPES or len(positions.sizes) != 1:
        raise refuse(f"the second input ({names[1]}) is no integer tensor of rank 1")
    batch, chunk = tokens.sizes
    if batch != 1:
        raise refuse(f"{names[0]} has a batch of {batch}; only 1 is supported")
    if not tokens.dynamic and chunk != 1 and not prompts:
        raise refuse(f"{names[0]} takes exactly {chunk} tokens a call; export it with a dynamic size, or with 1")
    if not positions.dynamic and positions.sizes[0] not in ((1, chunk) if prompts else (1,)):
        raise refuse(f"{names[1]} takes exactly {positions.sizes[0]} positions")
    if positions.dynamic and positions.sizes[0] < chunk:
        chunk = positions.sizes[0]
    found = meta.outputs[0] if meta.outputs else None
    if (
        found is None
        or found.dtype not in ("f32", "f16", "bf16", "f64")
        or len(found.sizes) not in (2, 3)
        or found.sizes[0] != 1
    ):
        raise refuse(f"its first output is {show(found)}, not logits f32[1, V] or f32[1, S, V]")
    each = positions.dynamic or positions.sizes[0] > 1
    draft = Convention(each, chunk, found.sizes[-1], None, False, (tokens.dtype, positions.dtype))
    name, named = _named_size(constants, ("get_max_context_len", "get_max_seq_len"))
    capacity = _checked_capacity(method, draft, 1 if tokens.dynamic else chunk, named)
    note = ""
    if named is not None and capacity is not None and capacity < named:
        note = f" ({name} is {named:,}, but the program takes positions up to {capacity - 1:,} only)"
    rewindable = capacity is not None and _by_position(method, capacity)
    return replace(draft, capacity=capacity, rewindable=rewindable, note=note)


def find_ragged(method: Method, constants: Mapping[str, Any]) -> Ragged:
    """The convention of a method for batches of rows with lengths of their own.

    Args:
        constants: constant methods of the program; `get_max_context_len` gives the capacity, as far as the caches have
            so many rows.
    Raises:
        UnsupportedError: it is no such decoder; says what its inputs and outputs are. Or its state is more than caches
            with a row for each position, so that rows cannot be reused.
        InputError: the capacity is no positive integer.
    """
    ragged, rewindable = _ragged(method, constants)
    if not rewindable:
        raise UnsupportedError(
            f"method {method.metadata.name} keeps state that is not a cache with a row for each position: a batch row "
            "cannot start anew"
        )
    return ragged


def _looks_ragged(method: Method) -> bool:
    """Whether a method has the three inputs of `find_ragged`, whatever their sizes."""
    given = method.metadata.inputs
    return len(given) == 3 and all(info is not None and info.dtype in _DTYPES for info in given)


def _ragged(method: Method, constants: Mapping[str, Any]) -> tuple[Ragged, bool]:
    """(how a method for batches is called, whether its state is caches by position); raises as `find_ragged`."""
    meta, names = method.metadata, input_names(method)
    shown = ", ".join(f"{name} {show(info)}" for name, info in zip(names, meta.inputs, strict=True)) or "none"

    def refuse(why: str) -> UnsupportedError:
        return UnsupportedError(
            f"method {meta.name} cannot generate text for a batch: {why}. Its inputs: {shown}; {_EXPECTED_RAGGED}"
        )

    if len(meta.inputs) != 3:
        raise refuse(f"it has {len(meta.inputs)} inputs, not 3")
    tokens, *lengths = meta.inputs
    if tokens is None or tokens.dtype not in _DTYPES or len(tokens.sizes) != 2:
        raise refuse(f"the first input ({names[0]}) is no integer tensor of rank 2")
    rows, chunk = tokens.sizes
    for name, info in zip(names[1:], lengths, strict=True):
        if info is None or info.dtype not in _DTYPES or not info.sizes or math.prod(info.sizes) != rows:
            raise refuse(f"{name} is no integer tensor with one element for each of {rows} rows")
    if not tokens.dynamic and chunk != 1:
        raise refuse(f"{names[0]} takes exactly {chunk} tokens a row; export it with a dynamic size, or with 1")
    found = meta.outputs[0] if meta.outputs else None
    if (
        found is None
        or found.dtype not in ("f32", "f16", "bf16", "f64")
        or len(found.sizes) not in (2, 3)
        or found.sizes[0] != rows
    ):
        raise refuse(f"its first output is {show(found)}, not logits f32[{rows}, V] or f32[{rows}, S, V]")
    name, named = _named_size(constants, ("get_max_context_len",))
    known = [
        node.args["capacity"]
        for delegate in method.delegates
        for node in delegate.graph.nodes
        if node.op == "webgpu.lengths"
    ]
    sizes = [size for size in (named, *known) if isinstance(size, int)]
    if not sizes:
        raise refuse("neither a constant method get_max_context_len nor its caches say how many tokens a row has")
    capacity, note = min(sizes), ""
    if named is not None and capacity < named:
        note = f" ({name} is {named:,}, but the caches have {capacity:,} rows)"
    past, q_len = (info for info in lengths if info is not None)
    made = Ragged(
        rows,
        chunk,
        found.sizes[-1],
        capacity,
        len(found.sizes) == 3,
        (tokens.dtype, past.dtype, q_len.dtype),
        (past.sizes, q_len.sizes),
        note,
    )
    return replace(made, chunk=min(chunk, capacity)), _by_position(method, capacity)


def show(info: TensorInfo | None) -> str:
    """A type in words: `i64[1, <=8]`; every size of a dynamic tensor above 1 is a bound."""
    if info is None:
        return "no tensor"
    sizes = [f"<={size}" if info.dynamic and size != 1 else str(size) for size in info.sizes]
    return f"{info.dtype}[{', '.join(sizes)}]"


def input_names(method: Method) -> list[str]:
    """Names of a method's inputs, as far as its delegates know them; `input 0` and so on else."""
    names = [f"input {i}" for i in range(len(method.plan.inputs))]
    for delegate, given, _ in calls(method):
        for place, index in zip(given, delegate.graph.inputs, strict=True):
            if place is not None:
                names[place] = delegate.graph.values[index].name
    return names


def calls(method: Method) -> list[tuple[Delegate, list[int | None], list[int]]]:
    """Each call of a delegate: the numbers of the method's inputs that it gets (None for other values), and the value
    slots of its results."""
    place = {index: number for number, index in enumerate(method.plan.inputs)}
    found = []
    for chain in method.plan.chains:
        for call in chain.instructions:
            if isinstance(call, DelegateCall):
                delegate = method.delegates[call.delegate_index]
                count = len(delegate.graph.inputs)
                given = [place.get(index) for index in call.args[:count]]
                found.append((delegate, given, list(call.args[count:])))
    return found


def _named_size(constants: Mapping[str, Any], names: Sequence[str]) -> tuple[str, int | None]:
    """The first of these constant methods that there is, and its value; the last name and None without one."""
    name = next((name for name in names if name in constants), names[-1])
    return name, constant_size(constants, (name,))


def _checked_capacity(method: Method, convention: Convention, size: int, most: int | None) -> int | None:
    """How many tokens the range checks of the delegates let pass, run `size` at a time (more than 1 where a method
    takes exactly so many); nothing is executed.

    Args:
        most: no more are looked for; None: as many as there may be.
    Returns:
        At most `most`; that itself, or None for any number, where no check refuses a position, or already the first,
        so that running it says why.
    """
    accepts = [
        _position_check(delegate, [int(place) for place in given if place is not None], convention, size)
        for delegate, given, _ in calls(method)
        if None not in given
    ]

    def accept(position: int) -> bool:
        return all(one(position) for one in accepts)

    low, high = 0, max((_POSITIONS if most is None else most) - size + 1, 0)
    if high == 0 or accept(high - 1) or not accept(0):
        return most
    while low < high:  # the first position that some check refuses
        middle = (low + high) // 2
        low, high = (middle + 1, high) if accept(middle) else (low, middle)
    return low + size - 1


def _position_check(
    delegate: Delegate, given: Sequence[int], convention: Convention, size: int
) -> Callable[[int], bool]:
    """A test whether a delegate takes `size` tokens at a position and after."""

    def inputs(position: int) -> list[tuple[str, Array]]:
        arrays = convention.inputs([0] * size, position)
        return [to_host(arrays[place]) for place in given]

    try:
        env = delegate.bind(inputs(0))
    except InputError:
        return lambda position: False
    with delegate.device.lock:  # nodes are lowered, not bound: the first call decides how large temporaries are
        lowered = delegate.planner.lowered(env.__getitem__)
    checks = dict.fromkeys(check for node in lowered for check in node.checks)
    element_checks = dict.fromkeys(check for node in lowered for check in node.element_checks)

    def accept(position: int) -> bool:
        arrays = inputs(position)
        try:
            env: dict[Sym, int] = delegate.bind(arrays)
        except InputError:
            return False
        if any(not check.low <= evaluate(check.dim, env.__getitem__) <= check.high for check in checks):
            return False
        for check in element_checks:
            array = arrays[delegate.graph.inputs.index(check.value)][1]
            if not (check.low <= int(array.min()) and int(array.max()) <= check.high):
                return False
        return True

    return accept


def _by_position(method: Method, capacity: int) -> bool:
    """Whether every mutable buffer is a cache [B, C, H, D] or [B, H, C, D] with a row for each position.

    What is left of later positions then does no harm; recurrent state and ring buffers cannot go back.
    """
    if method.outside():
        return False  # a buffer may be updated there
    return all(
        len(value.shape) == 4 and any(isinstance(size, int) and size >= capacity for size in value.shape[1:3])
        for delegate in method.delegates
        for value in delegate.graph.values
        if value.kind == "mutable" and value.alias is None
    )
