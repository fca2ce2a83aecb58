"""What a method's delegates would refuse, found out before the first of them changes anything.

A method of several parts runs one after the other, and each checks its own inputs. So that an error of a later one
leaves the state of all as it was, the instructions that are left are walked once beforehand: delegates check the
numbers that are known by then and make their plans; of what is not computed yet the shape counts, where the program or
the delegate that will compute it tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backend.graph import Ref, evaluate
from ..files.pte import (
    DelegateCall,
    ExecutionPlan,
    FreeCall,
    IntList,
    JumpFalseCall,
    KernelCall,
    MoveCall,
    ShapeDynamism,
    TensorMeta,
)
from ..gpu.host import NUMPY
from . import outside
from .delegate import Delegate

_SMALL = 4096
"""Most elements of integer tensors that are computed for the checks alone."""


@dataclass(frozen=True)
class _Unseen:
    """A tensor that is not computed yet."""

    dtype: str
    shape: tuple[int, ...]

    def array(self) -> np.ndarray[Any, Any]:
        """An array of that type which takes no memory."""
        return np.broadcast_to(np.zeros((), NUMPY[self.dtype]), self.shape)


class _Unknown:
    """A value of which nothing is known."""


_UNKNOWN = _Unknown()


def instructions(plan: ExecutionPlan) -> Iterator[Any]:
    """All instructions of a plan, in their order."""
    for chain in plan.chains:
        yield from chain.instructions


def first_effect(plan: ExecutionPlan) -> Any:
    """The first instruction that may change state, where a delegate that may refuse its inputs comes after it; None
    where there is no such delegate, and nothing to foresee."""
    found = None
    for instruction in instructions(plan):
        if found is not None and isinstance(instruction, DelegateCall):
            return found
        if found is None and (
            isinstance(instruction, DelegateCall)
            or (isinstance(instruction, KernelCall) and outside.written(plan.operators[instruction.op_index], ()) != [])
        ):
            found = instruction
    return None


class Foresight:
    """Walks what is left of a method's call.

    Args:
        plan: the method's.
        delegates: the method's.
        host: value slot -> (host dtype, array) of what it holds.
        kernel: executes an instruction outside of the delegates on given slots.
        dtype: type of a tensor value -> host dtype, None if the GPU has none.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        delegates: Sequence[Delegate],
        host: Callable[[Any], tuple[str, Any]],
        kernel: Callable[[KernelCall, list[Any]], None],
        dtype: Callable[[TensorMeta], str | None],
    ) -> None:
        self.plan = plan
        self.delegates = delegates
        self.first = first_effect(plan)
        self._host = host
        self._kernel = kernel
        self._dtype = dtype

    def check(self, chain: int, position: int, slots: Sequence[Any]) -> None:
        """Check what delegates will be given, from an instruction on.

        Args:
            slots: values before that instruction; they stay as they are.
        Raises:
            InputError, DeviceError: a delegate would raise it.
        """
        seen = list(slots)
        for number, part in enumerate(self.plan.chains[chain:]):
            at = position if number == 0 else 0
            while at < len(part.instructions):
                instruction = part.instructions[at]
                at += 1
                if isinstance(instruction, DelegateCall):
                    self._delegate(instruction, seen)
                elif isinstance(instruction, KernelCall):
                    self._outside(instruction, seen)
                elif isinstance(instruction, MoveCall):
                    seen[instruction.move_to] = seen[instruction.move_from]
                elif isinstance(instruction, FreeCall):
                    seen[instruction.value_index] = None
                elif isinstance(instruction, JumpFalseCall):
                    condition = seen[instruction.cond_value_index]
                    if not _known(condition) or isinstance(condition, TensorMeta):
                        return  # which way it goes is not known yet
                    if not truth(condition):
                        if instruction.destination_instruction < at:
                            return  # a loop: its next turn sees other values
                        at = instruction.destination_instruction

    def _delegate(self, call: DelegateCall, seen: list[Any]) -> None:
        delegate = self.delegates[call.delegate_index]
        count = len(delegate.graph.inputs)
        results = call.args[count:]
        given: list[tuple[str, Any]] = []
        unknown = set()
        for position, index in enumerate(call.args[:count]):
            value = self._typed(seen[index])
            if isinstance(value, _Unseen):
                unknown.add(position)
                given.append((value.dtype, value.array()))
            elif _known(value):
                given.append(self._host(value))
        if len(given) < count or unknown & delegate.elements_read:
            self._forget(results, seen)
            return
        env = delegate.rehearse(given, unknown)
        for index, output in zip(results, delegate.graph.outputs, strict=False):
            if isinstance(output, Ref):
                value = delegate.graph.values[output.value]
                seen[index] = _Unseen(value.dtype, tuple(evaluate(d, env.__getitem__) for d in value.shape))
            else:
                seen[index] = evaluate(output, env.__getitem__)

    def _outside(self, call: KernelCall, seen: list[Any]) -> None:
        operator = self.plan.operators[call.op_index]
        reads = outside.inputs(operator, call.args)
        results = [index for index in call.args if index not in reads]
        if all(self._at_hand(seen[index], seen) for index in reads) and (
            outside.is_scalar(operator)
            or (
                outside.is_pure(operator)
                and any(isinstance(seen[index], tuple) or hasattr(seen[index], "shape") for index in reads)
                and all(self._is_small(self.plan.values[index]) for index in results)
            )
        ):
            self._kernel(call, seen)
            return
        for index in outside.written(operator, call.args):
            value = self._typed(seen[index])
            if _known(value) and not isinstance(value, TensorMeta):
                dtype, array = self._host(value)
                seen[index] = _Unseen(dtype, array.shape)
        self._forget(results, seen)

    def _forget(self, results: Sequence[int], seen: list[Any]) -> None:
        """Of what something computes that is not foreseen only what the program says about it is known."""
        for index in results:
            prototype = self.plan.values[index]
            seen[index] = prototype if isinstance(prototype, TensorMeta) else _UNKNOWN

    def _typed(self, value: Any) -> Any:
        """A value; for a tensor that is not computed yet its type if the program fixes it, else `_UNKNOWN`."""
        if not isinstance(value, TensorMeta):
            return value
        dtype = self._dtype(value)
        if dtype is None or value.shape_dynamism != ShapeDynamism.STATIC:
            return _UNKNOWN
        return _Unseen(dtype, value.sizes)

    def _at_hand(self, value: Any, seen: Sequence[Any]) -> bool:
        """Whether a value can be computed with here: a number, or a small integer tensor that exists."""
        if isinstance(value, IntList):
            return all(self._at_hand(seen[index], seen) for index in value.items)
        if isinstance(value, TensorMeta) or not _known(value):
            return False
        if value is None or isinstance(value, bool | int | float | str):
            return True
        if isinstance(value, tuple) or hasattr(value, "shape"):
            dtype, array = self._host(value)
            return array.dtype.kind in "iub" and dtype != "bf16" and array.size <= _SMALL
        return False

    @staticmethod
    def _is_small(prototype: Any) -> bool:
        return (
            isinstance(prototype, TensorMeta)
            and prototype.numel <= _SMALL
            and prototype.scalar_type.numpy_dtype is not None
            and prototype.scalar_type.numpy_dtype.kind in "iub"
        )


def truth(value: Any) -> bool:
    """What a jump makes of a bool, or of a bool tensor, which must be true everywhere."""
    found = value[1] if isinstance(value, tuple) else value
    return bool(found.all() if hasattr(found, "all") else found)


def _known(value: Any) -> bool:
    return not isinstance(value, _Unknown | _Unseen)
