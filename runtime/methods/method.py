"""A loaded method: walks the program's instructions, runs delegates on the GPU and what stayed outside with torch."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backend.graph import Graph
from ...backend.serialize import BACKEND_ID, BlobError, deserialize
from ..errors import InputError, ProgramFormatError, UnsupportedError
from ..files.ptd import DataFile
from ..files.pte import (
    BoolList,
    DelegateCall,
    DoubleList,
    ExecutionPlan,
    FreeCall,
    IntList,
    JumpFalseCall,
    KernelCall,
    MoveCall,
    OptionalTensorList,
    ScalarType,
    ShapeDynamism,
    TensorList,
    TensorMeta,
)
from ..files.pte import Program as ProgramFile
from ..gpu.buffers import DataSource, State, Weights
from ..gpu.device import Device
from ..gpu.host import NUMPY, bf16_to_f32, is_torch, to_host, to_user
from ..gpu.labels import InputLabels
from . import outside
from .delegate import Delegate, KernelTime
from .foresight import Foresight, instructions, truth

_DTYPES = {
    ScalarType.FLOAT: "f32", ScalarType.HALF: "f16", ScalarType.BFLOAT16: "bf16", ScalarType.DOUBLE: "f64",
    ScalarType.LONG: "i64", ScalarType.INT: "i32", ScalarType.SHORT: "i16", ScalarType.CHAR: "i8",
    ScalarType.BYTE: "u8", ScalarType.BOOL: "bool",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Type of a method's tensor input or output; sizes are upper bounds where dynamic."""

    sizes: tuple[int, ...]
    dtype: str
    dynamic: bool

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.sizes, dtype=np.int64)) * NUMPY[self.dtype].itemsize


@dataclass(frozen=True)
class MethodMeta:
    """Inputs and outputs of a method; None stands for one that is no tensor (an integer)."""

    name: str
    inputs: tuple[TensorInfo | None, ...]
    outputs: tuple[TensorInfo | None, ...]

    def num_inputs(self) -> int:
        return len(self.inputs)

    def num_outputs(self) -> int:
        return len(self.outputs)

    def input_tensor_meta(self, index: int) -> TensorInfo:
        """Type of input `index`; IndexError past the end, TypeError if it is no tensor."""
        return _tensor(self.inputs[index])

    def output_tensor_meta(self, index: int) -> TensorInfo:
        """Type of output `index`, as `input_tensor_meta`."""
        return _tensor(self.outputs[index])


def _tensor(info: TensorInfo | None) -> TensorInfo:
    if info is None:
        raise TypeError("this argument is no tensor")
    return info


def describe(plan: ExecutionPlan) -> MethodMeta:
    """The metadata of an execution plan."""

    def info(what: str, number: int, index: int) -> TensorInfo | None:
        value = plan.values[index]
        if not isinstance(value, TensorMeta):
            return None
        if value.scalar_type not in _DTYPES:
            raise UnsupportedError(
                f"{what} {number} of method {plan.name} is of type {value.scalar_type.name}, which is not supported: "
                f"let the model take and give one of {', '.join(_DTYPES.values())} (for complex numbers "
                "torch.view_as_real), and convert inside"
            )
        return TensorInfo(value.sizes, _DTYPES[value.scalar_type], value.shape_dynamism != ShapeDynamism.STATIC)

    return MethodMeta(
        plan.name,
        tuple(info("input", number, index) for number, index in enumerate(plan.inputs)),
        tuple(info("output", number, index) for number, index in enumerate(plan.outputs)),
    )


class Method:
    """A method of a program, ready to execute on a device. Made by `Program.load_method`.

    Attributes:
        metadata: types of inputs and outputs.
        delegates: the loaded delegates, in the program's order.
        state: the mutable buffers; give it to another method of the same program to share them.
        identity: of the program, as `files.identity` names programs.
        family: all methods over the same weights.
        closed: whether its GPU memory was freed.
    """

    def __init__(
        self,
        file: ProgramFile,
        data_files: Sequence[DataFile],
        name: str,
        device: Device,
        weights: Weights,
        state: State | None,
        identity: str,
        like: Method | None = None,
        family: weakref.WeakSet[Method] | None = None,
    ) -> None:
        self.file = file
        self.data_files = data_files
        self.weights = weights
        self.identity = identity
        self.closed = False
        self.plan = file.plan(name)
        self.metadata = describe(self.plan)
        self.device = device
        self._own_state = state is None
        self.state = State(device, identity) if state is None else state
        self.state.require_program(identity)
        self._check_operators()
        source: DataSource = lambda key: file.find_named_data(key, data_files)  # noqa: E731
        twins = [None] * len(self.plan.delegates) if like is None else like.delegates
        graphs = [self._graph(number) if twin is None else twin.graph for number, twin in enumerate(twins)]
        self.delegates: list[Delegate] = []
        self._stored: dict[int, Any] = {}
        held = self.state.buffers()
        try:
            for graph, twin in zip(graphs, twins, strict=True):
                self.delegates.append(Delegate(graph, device, source, weights, self.state, twin))
        except BaseException:
            self.close()
            if not self._own_state:
                self.state.keep(held)  # nothing is left of this method in a state that others use
            raise
        if self.state.program is None:
            self.state.program = identity
        self._label_inputs()
        # holds nothing of `self`: a method that nobody needs is freed at once, not by the garbage collector
        self._foresight = Foresight(
            self.plan, self.delegates, _pair, functools.partial(_call_kernel, self.plan, self._stored), _host_dtype
        )
        self._copied = outside.copied_inputs(self.plan)
        self.family: weakref.WeakSet[Method] = weakref.WeakSet() if family is None else family
        self.family.add(self)

    def _graph(self, number: int) -> Graph:
        try:
            return deserialize(self.plan.delegates[number].processed)
        except BlobError as error:
            raise ProgramFormatError(f"method {self.plan.name}, delegate {number}: {error}") from error

    def _label_inputs(self) -> None:
        """Let the delegates' messages number inputs as the method's caller does."""
        numbers = {index: number for number, index in enumerate(self.plan.inputs)}
        for call in instructions(self.plan):
            if isinstance(call, DelegateCall):
                delegate = self.delegates[call.delegate_index]
                given = call.args[: len(delegate.graph.inputs)]
                delegate.labels = InputLabels(delegate.graph, [numbers.get(index) for index in given])

    def new_state(self) -> State:
        """A further set of this method's mutable buffers, with their initial content.

        Raises:
            InputError: the method was closed.
            DeviceError: the device is out of memory; nothing is left of the state.
        """
        self._require_open()
        state = State(self.device, self.identity)
        try:
            for delegate in self.delegates:
                delegate.fill_state(state)
        except BaseException:
            state.close()
            raise
        return state

    def on_state(self, state: State | None = None) -> Method:
        """The same method on another state: weights, temporaries and compiled kernels are shared, and freed with the
        last method that uses them. The caller closes it.

        Args:
            state: None for a new one, which belongs to the new method.
        Raises:
            InputError: the method or the state was closed; the state is none, on another device, or another
                program's.
            DeviceError: the device is out of memory; a buffer of that name has another type.
        """
        self._require_open()
        if state is not None:
            State.check(state, self.device, self.identity)
        with self.device.lock:
            return Method(
                self.file, self.data_files, self.name, self.device, self.weights, state, self.identity, self,
                self.family,
            )  # fmt: skip

    def stored(self) -> dict[int, Any]:
        """A copy of what is kept between calls outside of the delegates."""
        return _copied(self._stored)

    def copy_stored(self, stored: Mapping[int, Any]) -> None:
        """Keep what another one of the same method kept."""
        copied = _copied(stored)
        self._stored.clear()
        self._stored.update(copied)

    def forget_stored(self) -> None:
        """Outside of the delegates, the next call is like the first."""
        self._stored.clear()

    def _require_open(self) -> None:
        if self.closed:
            raise InputError(f"method {self.name} was closed: load it again")

    @property
    def name(self) -> str:
        return self.plan.name

    def _check_operators(self) -> None:
        foreign = sorted({part.id for part in self.plan.delegates} - {BACKEND_ID})
        if foreign:
            raise UnsupportedError(
                f"method {self.plan.name} has parts delegated to {foreign}; this runtime executes {BACKEND_ID} only"
            )
        used = {i.op_index for i in instructions(self.plan) if isinstance(i, KernelCall)}
        outside.require([self.plan.operators[i] for i in sorted(used)])
        outside.check_types(self.plan)

    def outside(self) -> list[str]:
        """Names of the operators that are not delegated, in the order of execution."""
        return [
            self.plan.operators[i.op_index].full_name for i in instructions(self.plan) if isinstance(i, KernelCall)
        ]  # fmt: skip

    # -- execution

    def execute(self, inputs: Sequence[Any] = (), last_row: bool = False) -> list[Any]:
        """Run the method once.

        Args:
            inputs: numpy arrays, torch tensors or Python numbers, flat, in the method's order.
            last_row: of the first output, logits [..., S, V], only the last row is wanted: where that saves reading the
                others back, the output is [..., 1, V].
        Returns:
            The outputs: torch tensors if any input was one, else numpy arrays (bfloat16 as float32); integers as int.
        Raises:
            InputError: an input is wrong; nothing was submitted and the state is as before. In a method of several
                parts this holds for what follows from the inputs: not for sizes and positions that an operator outside
                of the delegates computes after the first of them has run.
            DeviceError: the GPU failed.
        """
        cut = self._first_output if last_row else None
        return self._run(inputs, lambda delegate, given: delegate.execute(given, cut))

    @functools.cached_property
    def _first_output(self) -> int | None:
        """Which output of the only delegate is the method's first; None where there is more to it."""
        calls = list(instructions(self.plan))
        if len(calls) != 1 or not isinstance(calls[0], DelegateCall):
            return None
        results = list(calls[0].args[len(self.delegates[0].graph.inputs) :])
        return results.index(self.plan.outputs[0]) if self.plan.outputs[0] in results else None

    def profile(self, inputs: Sequence[Any] = ()) -> tuple[list[Any], list[KernelTime]]:
        """As `execute`, with the GPU time of every dispatch. Raises DeviceError where the device has no timestamps."""
        times: list[KernelTime] = []

        def call(delegate: Delegate, given: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
            outputs, found = delegate.profile(given)
            times.extend(found)
            return outputs

        return self._run(inputs, call), times

    def _run(
        self, inputs: Sequence[Any], call: Callable[[Delegate, list[tuple[str, Any]]], list[tuple[str, Any]]]
    ) -> list[Any]:
        self._require_open()
        if not isinstance(inputs, Sequence) or isinstance(inputs, str | bytes):
            raise InputError(f"inputs of type {type(inputs).__name__}, expected a list with one value for each input")
        torch_wanted = any(is_torch(value) for value in inputs)
        slots = self._bind(inputs)
        first = self._foresight.first
        for number, chain in enumerate(self.plan.chains):
            position = 0
            while position < len(chain.instructions):
                instruction = chain.instructions[position]
                if instruction is first:
                    self._foresight.check(number, position, slots)
                position += 1
                if isinstance(instruction, DelegateCall):
                    self._call_delegate(instruction, slots, call)
                elif isinstance(instruction, KernelCall):
                    _call_kernel(self.plan, self._stored, instruction, slots)
                elif isinstance(instruction, MoveCall):
                    slots[instruction.move_to] = slots[instruction.move_from]
                elif isinstance(instruction, JumpFalseCall):
                    if not truth(slots[instruction.cond_value_index]):
                        position = instruction.destination_instruction
                elif isinstance(instruction, FreeCall):
                    slots[instruction.value_index] = None
        return [self._user(slots[index], index, torch_wanted) for index in self.plan.outputs]

    def _bind(self, inputs: Sequence[Any]) -> list[Any]:
        """Value slots with the inputs and stored tensors filled in; InputError for what the metadata rule out."""
        if len(inputs) != len(self.plan.inputs):
            raise InputError(f"method {self.name} takes {len(self.plan.inputs)} inputs, got {len(inputs)}")
        slots: list[Any] = list(self.plan.values)
        for position, (index, value) in enumerate(zip(self.plan.inputs, inputs, strict=True)):
            info = self.metadata.inputs[position]
            if info is None:
                slots[index] = _number(position, value, self.plan.values[index])
                continue
            dtype, array = to_host(value)
            _check_input(position, info, dtype, array)
            slots[index] = (dtype, array.copy() if index in self._copied else array)
        for index, value in enumerate(self.plan.values):
            if isinstance(slots[index], TensorMeta) and index not in self.plan.inputs:
                stored = self._stored_tensor(index, value)
                if stored is not None:
                    slots[index] = stored
        return slots

    def _stored_tensor(self, index: int, meta: Any) -> Any:
        """A constant, or a tensor outside the delegates that keeps its content between calls."""
        if index not in self._stored:
            data = self.file.tensor_data(meta, self.data_files) if meta.has_data else None
            if data is None:
                return None
            dtype = _host_dtype(meta)
            if dtype is None:  # only torch works with it
                self._stored[index] = outside.tensor(meta, data)
                return self._stored[index]
            array = np.frombuffer(data, NUMPY[dtype], meta.numel).reshape(meta.sizes)
            if not meta.is_constant:
                array = array.copy()
            self._stored[index] = (dtype, array)
        return self._stored[index]

    def _call_delegate(
        self,
        instruction: DelegateCall,
        slots: list[Any],
        call: Callable[[Delegate, list[tuple[str, Any]]], list[tuple[str, Any]]],
    ) -> None:
        delegate = self.delegates[instruction.delegate_index]
        count = len(delegate.graph.inputs)
        given = [_pair(slots[index]) for index in instruction.args[:count]]
        for index, (dtype, value) in zip(instruction.args[count:], call(delegate, given), strict=False):
            slots[index] = value if isinstance(value, int) else (dtype, value)

    def _user(self, value: Any, index: int, torch_wanted: bool) -> Any:
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            return to_user(value[0], value[1], torch_wanted)
        if is_torch(value) and not torch_wanted:
            dtype, array = to_host(value)
            return bf16_to_f32(array) if dtype == "bf16" else array
        return value

    def reset(self) -> None:
        """Give every mutable buffer its initial content: the next call is like the first."""
        self.state.reset()
        self.forget_stored()

    def close(self) -> None:
        """Free the method's GPU memory; its state too, unless it was given one."""
        for delegate in self.delegates:
            delegate.close()
        self.delegates.clear()
        self.closed = True
        if self._own_state:
            self.state.close()


def _copied(stored: Mapping[int, Any]) -> dict[int, Any]:
    """Arrays with their dtypes, and torch tensors, as own ones."""
    return {
        index: (kept[0], kept[1].copy()) if isinstance(kept, tuple) else kept.clone() for index, kept in stored.items()
    }


def _host_dtype(meta: TensorMeta) -> str | None:
    """The host dtype of a tensor; None where there is none, and torch alone can hold it."""
    return _DTYPES.get(meta.scalar_type)


def _call_kernel(plan: ExecutionPlan, stored: dict[int, Any], instruction: KernelCall, slots: list[Any]) -> None:
    """Execute what stayed outside of the delegates.

    Args:
        stored: what is kept between calls.
        slots: values by index; results are stored here.
    """
    operator = plan.operators[instruction.op_index]
    with_torch = outside.available()
    if with_torch:
        outside.load_torch(operator.full_name)

    if with_torch:
        for index in outside.inputs(operator, instruction.args):
            if isinstance(slots[index], TensorMeta):  # read before anything wrote it: a buffer that starts as zeros
                slots[index] = stored[index] = outside.empty(slots[index], slots[index].sizes)
    outside.run(operator, instruction.args, slots, plan.values, functools.partial(_resolve, slots, with_torch))


def _resolve(slots: Sequence[Any], with_torch: bool, value: Any) -> Any:
    """An argument as a kernel takes it."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return to_user(value[0], value[1], with_torch)
    if isinstance(value, IntList | TensorList):
        return [_resolve(slots, with_torch, slots[i]) for i in value.items]
    if isinstance(value, OptionalTensorList):
        return [None if i < 0 else _resolve(slots, with_torch, slots[i]) for i in value.items]
    if isinstance(value, DoubleList | BoolList):
        return list(value.items)
    return value


def _pair(value: Any) -> tuple[str, Any]:
    """A slot's content as (host dtype, array)."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return value
    if isinstance(value, TensorMeta):
        raise ProgramFormatError("a delegate reads a tensor that nothing has written")
    return to_host(value)


def _number(position: int, value: Any, prototype: Any) -> Any:
    """An integer, bool or float input that the program takes as such."""
    if hasattr(value, "item") and getattr(value, "size", 2) == 1:
        value = value.item()
    wanted = bool if isinstance(prototype, bool) else float if isinstance(prototype, float) else int
    if isinstance(value, bool) != (wanted is bool) or not isinstance(
        value, int if wanted is not float else float | int
    ):
        raise InputError(f"input {position}: {value!r} is no {wanted.__name__}")
    return value


def _check_input(position: int, info: TensorInfo, dtype: str, array: np.ndarray[Any, Any]) -> None:
    if dtype != info.dtype:
        raise InputError(f"input {position}: dtype {dtype}, expected {info.dtype}")
    if array.ndim != len(info.sizes):
        raise InputError(
            f"input {position}: rank {array.ndim} with shape {list(array.shape)}, expected rank {len(info.sizes)}"
        )
    for axis, (size, bound) in enumerate(zip(array.shape, info.sizes, strict=True)):
        if size > bound or (not info.dynamic and size != bound):
            limit = "at most" if info.dynamic else "exactly"
            raise InputError(f"input {position}: size {size} at axis {axis}, this program takes {limit} {bound}")
