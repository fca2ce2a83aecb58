"""The records of an ExecuTorch program as plain frozen dataclasses; `pte.Program` makes them.

Every `int` named `..._index`, and the items of `inputs`, `outputs` and `args`, are indices into the lists of the
`ExecutionPlan` they belong to; the reader has checked that they are in range.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from .ptd import ScalarType


class ShapeDynamism(enum.IntEnum):
    """Whether a tensor's sizes may change at run time, and what the stored sizes then mean."""

    STATIC = 0
    DYNAMIC_BOUND = 1
    """The stored sizes are upper bounds."""
    DYNAMIC_UNBOUND = 2
    """The stored sizes mean nothing."""


class TensorLocation(enum.IntEnum):
    """Where a tensor's stored data are."""

    SEGMENT = 0
    """In this program file (if it has stored data at all)."""
    EXTERNAL = 1
    """Outside the program (or in its named data), under the tensor's fully qualified name."""


@dataclass(frozen=True)
class Allocation:
    """A planned place: `offset` bytes into the memory `memory_id` (1 or more, see `non_const_buffer_sizes`)."""

    memory_id: int
    offset: int


@dataclass(frozen=True)
class TensorMeta:
    """A tensor value: its type and shape, and where its memory and its stored data are."""

    scalar_type: ScalarType
    sizes: tuple[int, ...]
    """Sizes by dimension; upper bounds when the shape is dynamic."""
    dim_order: tuple[int, ...]
    """Dimensions from outer to inner; (0, 1, 2, ...) is contiguous."""
    shape_dynamism: ShapeDynamism
    data_buffer_idx: int
    """Above 0: which stored buffer holds the constant, or the initial value if there is an `allocation`."""
    allocation: Allocation | None
    """None for constants, and for inputs whose memory the caller brings."""
    location: TensorLocation = TensorLocation.SEGMENT
    fully_qualified_name: str | None = None
    mutable_data_segments_idx: int = 0
    storage_offset: int = 0
    requires_grad: bool = False
    layout: int = 0
    device_type: int = 0
    """0 is CPU, 1 is CUDA."""
    device_index: int = 0

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """The number of elements (the most there can be, when the shape is dynamic)."""
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        """The bytes of all elements (the most there can be, when the shape is dynamic)."""
        return self.numel * self.scalar_type.itemsize

    @property
    def is_dynamic(self) -> bool:
        """True if the sizes may change at run time."""
        return self.shape_dynamism != ShapeDynamism.STATIC

    @property
    def is_contiguous(self) -> bool:
        """True if memory follows the order of the dimensions."""
        return self.dim_order == tuple(range(len(self.sizes)))

    @property
    def is_external(self) -> bool:
        """True if the data are stored under `fully_qualified_name`."""
        return self.location == TensorLocation.EXTERNAL

    @property
    def has_data(self) -> bool:
        """True if data are stored for this tensor: it is a constant, or mutable with an initial value."""
        return self.is_external or self.data_buffer_idx > 0

    @property
    def is_constant(self) -> bool:
        """True if the tensor has stored data that no one writes to."""
        return self.has_data and self.allocation is None


@dataclass(frozen=True)
class IntList:
    """A list of ints. The items are *indices of int values* in the plan, since ints may be computed at run time."""

    items: tuple[int, ...]


@dataclass(frozen=True)
class DoubleList:
    """A list of floats, the items themselves."""

    items: tuple[float, ...]


@dataclass(frozen=True)
class BoolList:
    """A list of bools, the items themselves."""

    items: tuple[bool, ...]


@dataclass(frozen=True)
class TensorList:
    """A list of tensors, as indices of tensor values in the plan."""

    items: tuple[int, ...]


@dataclass(frozen=True)
class OptionalTensorList:
    """A list of tensors, as indices of values in the plan; -1 is None, and so is an index of a None value."""

    items: tuple[int, ...]


EValue = (
    int | bool | float | str | TensorMeta | IntList | DoubleList | BoolList | TensorList | OptionalTensorList | None
)
"""What a slot of `ExecutionPlan.values` may hold."""


@dataclass(frozen=True)
class KernelCall:
    """Run operator `op_index` on the values `args` (the outputs come last)."""

    op_index: int
    args: tuple[int, ...]


@dataclass(frozen=True)
class DelegateCall:
    """Run delegate `delegate_index` on the values `args` (its inputs, then its outputs)."""

    delegate_index: int
    args: tuple[int, ...]


@dataclass(frozen=True)
class MoveCall:
    """Make value `move_to` the same as value `move_from`."""

    move_from: int
    move_to: int


@dataclass(frozen=True)
class JumpFalseCall:
    """Continue at `destination_instruction` of this chain if the bool value `cond_value_index` is false."""

    cond_value_index: int
    destination_instruction: int


@dataclass(frozen=True)
class FreeCall:
    """The memory of the dynamic tensor `value_index` is no longer needed."""

    value_index: int


Instruction = KernelCall | DelegateCall | MoveCall | JumpFalseCall | FreeCall
"""One step of a chain."""


@dataclass(frozen=True)
class Chain:
    """Instructions to run in order. Programs have one chain so far."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Operator:
    """An operator by name ("aten::add") and overload ("out")."""

    name: str
    overload: str

    @property
    def full_name(self) -> str:
        """The name as ExecuTorch prints it: "aten::add.out"."""
        return f"{self.name}.{self.overload}" if self.overload else self.name


@dataclass(frozen=True)
class Delegate:
    """A lowered part of the program: the backend's name, its blob (not copied) and its compile specs."""

    id: str
    processed: memoryview
    compile_specs: Mapping[str, bytes]


@dataclass(frozen=True)
class BufferDevice:
    """Says that the planned memory `buffer_index` is on a device other than the default CPU."""

    buffer_index: int
    device_type: int
    device_index: int


@dataclass(frozen=True)
class ExecutionPlan:
    """One method of the program."""

    name: str
    values: tuple[EValue, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    chains: tuple[Chain, ...]
    operators: tuple[Operator, ...]
    delegates: tuple[Delegate, ...]
    non_const_buffer_sizes: tuple[int, ...]
    """Sizes of the planned memories, by memory id; entry 0 is reserved."""
    non_const_buffer_devices: tuple[BufferDevice, ...]
    input_spec: str
    """How inputs nest: the torch pytree spec as JSON."""
    output_spec: str
    """How outputs nest: the torch pytree spec as JSON."""

    @property
    def is_constant(self) -> bool:
        """True for constant methods (metadata such as `get_max_seq_len`): no input, nothing to run."""
        return not self.inputs and not any(chain.instructions for chain in self.chains)

    @property
    def output_values(self) -> tuple[EValue, ...]:
        """The output values as stored; the result itself when `is_constant`."""
        return tuple(self.values[i] for i in self.outputs)
