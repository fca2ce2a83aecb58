"""Reader of ExecuTorch `.pte` programs: maps the file, parses its metadata, copies no data, needs no torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InputError, MissingDataError, ProgramFormatError
from .flatfile import FlatBuffer, Segment, SegmentedFile, Source, Table, check_identifier
from .ptd import DataFile, ScalarType, TensorLayout, read_layout
from .pte_records import (
    Allocation,
    BoolList,
    BufferDevice,
    Chain,
    Delegate,
    DelegateCall,
    DoubleList,
    EValue,
    ExecutionPlan,
    FreeCall,
    Instruction,
    IntList,
    JumpFalseCall,
    KernelCall,
    MoveCall,
    Operator,
    OptionalTensorList,
    ShapeDynamism,
    TensorList,
    TensorLocation,
    TensorMeta,
)

__all__ = [
    "Allocation",
    "BoolList",
    "BufferDevice",
    "Chain",
    "DataFile",
    "Delegate",
    "DelegateCall",
    "DoubleList",
    "EValue",
    "ExecutionPlan",
    "FreeCall",
    "Instruction",
    "IntList",
    "JumpFalseCall",
    "KernelCall",
    "MoveCall",
    "Operator",
    "OptionalTensorList",
    "Program",
    "ScalarType",
    "Segment",
    "ShapeDynamism",
    "TensorLayout",
    "TensorList",
    "TensorLocation",
    "TensorMeta",
]

_IDENTIFIER = b"ET12"
_HEADER_MAGIC = b"eh00"
_HEADER = struct.Struct("<4sIQQ")  # magic, length, program size, segment base
_HEADER_OFFSET = 8
_SEGMENT_SIZE = struct.Struct("<Q")  # follows in headers that are long enough
_NEWEST_VERSION = 0
_INLINE = 0  # BackendDelegateDataReference.location
_SEGMENT = 1
_SHAPE_DYNAMISMS = {int(member): member for member in ShapeDynamism}
_TENSOR_LOCATIONS = {int(member): member for member in TensorLocation}


@dataclass(frozen=True)
class _Extent:
    """What the header says: where the metadata end, and where the segments lie."""

    metadata_end: int
    segment_base: int
    segment_size: int


def _read_header(view: memoryview, label: str) -> _Extent:
    # A program without any segment (constant methods only) is written without the header.
    if bytes(view[_HEADER_OFFSET : _HEADER_OFFSET + 4]) != _HEADER_MAGIC:
        return _Extent(len(view), 0, 0)
    end = _HEADER_OFFSET + _HEADER.size
    if len(view) < end + _SEGMENT_SIZE.size:
        raise ProgramFormatError(f"{label}: truncated inside the header: the file has {len(view)} bytes")
    _, length, program_size, base = _HEADER.unpack_from(view, _HEADER_OFFSET)
    if length < _HEADER.size:
        raise ProgramFormatError(f"{label}: the header says it has {length} bytes, expected {_HEADER.size} or more")
    has_size = length >= _HEADER.size + _SEGMENT_SIZE.size
    return _Extent(program_size, base, _SEGMENT_SIZE.unpack_from(view, end)[0] if has_size else 0)


# ---- one method ----


class _PlanReader:
    """Turns the tables of one method into records, checking every index on the way."""

    def __init__(self, table: Table, name: str, processed: Callable[[Table | None, str], memoryview]) -> None:
        self._table = table
        self._name = name
        self._processed = processed
        self._buffer_sizes: tuple[int, ...] = table.numbers(8, "q")
        self._values: tuple[EValue, ...] = ()
        self._operators: tuple[Operator, ...] = ()
        self._delegates: tuple[Delegate, ...] = ()

    def read(self) -> ExecutionPlan:
        """Reads the whole method."""
        table = self._table
        value_tables = table.tables(2)
        self._value_count = len(value_tables)
        self._values = tuple(self._value(i, value) for i, value in enumerate(value_tables))
        self._operators = tuple(Operator(op.string(0) or "", op.string(1) or "") for op in table.tables(6))
        self._delegates = tuple(self._delegate(i, delegate) for i, delegate in enumerate(table.tables(7)))
        container = table.table(1)
        return ExecutionPlan(
            name=self._name,
            values=self._values,
            inputs=self._indices(table.numbers(3, "i"), "inputs"),
            outputs=self._indices(table.numbers(4, "i"), "outputs"),
            chains=tuple(self._chain(i, chain) for i, chain in enumerate(table.tables(5))),
            operators=self._operators,
            delegates=self._delegates,
            non_const_buffer_sizes=self._buffer_sizes,
            non_const_buffer_devices=tuple(
                BufferDevice(device.integer(0), device.integer(1, "b"), device.integer(2, "b"))
                for device in table.tables(9)
            ),
            input_spec=(container.string(0) if container else None) or "",
            output_spec=(container.string(1) if container else None) or "",
        )

    def _error(self, message: str) -> ProgramFormatError:
        return self._table.error(f"method {self._name!r}: {message}")

    def _indices(self, items: tuple[int, ...], where: str, lowest: int = 0) -> tuple[int, ...]:
        if items and (min(items) < lowest or max(items) >= self._value_count):
            bad = next(i for i in items if not lowest <= i < self._value_count)
            raise self._error(f"{where} refer to value {bad} but there are {self._value_count} values")
        return items

    def _index(self, index: int, count: int, where: str, of: str) -> int:
        if not 0 <= index < count:
            raise self._error(f"{where} refers to {of} {index} but there are {count}")
        return index

    # -- values --

    def _value(self, index: int, evalue: Table) -> EValue:
        kind = evalue.integer(0, "B")
        reader = _VALUE_READERS.get(kind)
        table = evalue.table(1)
        if reader is None or table is None:
            raise self._error(f"value {index} has the unknown type {kind}" if table else f"value {index} is empty")
        return reader(self, table, f"value {index}")

    def _tensor(self, table: Table, where: str) -> TensorMeta:
        layout = read_layout(table, (0, 2, 3), f"method {self._name!r}: {where}")
        extra = table.table(9)
        dynamism, location = table.integer(8, "b"), extra.integer(2, "b") if extra else 0
        if dynamism not in _SHAPE_DYNAMISMS or location not in _TENSOR_LOCATIONS:
            raise self._error(f"{where} has the unknown shape dynamism {dynamism} or data location {location}")
        planned_bytes = 0 if dynamism == ShapeDynamism.DYNAMIC_UNBOUND else layout.nbytes
        name = extra.string(1) if extra else None
        if location == TensorLocation.EXTERNAL and not name:
            raise self._error(f"{where} is external but has no name to look it up by")
        return TensorMeta(
            scalar_type=layout.scalar_type,
            sizes=layout.sizes,
            dim_order=layout.dim_order,
            shape_dynamism=_SHAPE_DYNAMISMS[dynamism],
            data_buffer_idx=table.integer(5, "I"),
            allocation=self._allocation(table.table(6), planned_bytes, where),
            location=_TENSOR_LOCATIONS[location],
            fully_qualified_name=name,
            mutable_data_segments_idx=extra.integer(0, "Q") if extra else 0,
            storage_offset=table.integer(1),
            requires_grad=table.boolean(4),
            layout=table.integer(7, "b"),
            device_type=extra.integer(3, "b") if extra else 0,
            device_index=extra.integer(4, "b") if extra else 0,
        )

    def _allocation(self, table: Table | None, nbytes: int, where: str) -> Allocation | None:
        if table is None:
            return None
        memory_id = table.integer(0, "I")
        offset = table.integer(1, "I") | table.integer(2, "I") << 32
        if not 0 < memory_id < len(self._buffer_sizes):
            raise self._error(f"{where} is planned in memory {memory_id} of {len(self._buffer_sizes)}")
        if offset + nbytes > self._buffer_sizes[memory_id]:
            raise self._error(
                f"{where} is planned up to byte {offset + nbytes} of memory {memory_id}, "
                f"which has {self._buffer_sizes[memory_id]} bytes"
            )
        return Allocation(memory_id, offset)

    def _int_list(self, table: Table, where: str) -> IntList:
        return IntList(self._indices(table.numbers(0, "q"), f"the items of {where}"))

    def _tensor_list(self, table: Table, where: str) -> TensorList:
        return TensorList(self._indices(table.numbers(0, "i"), f"the items of {where}"))

    def _optional_tensor_list(self, table: Table, where: str) -> OptionalTensorList:
        return OptionalTensorList(self._indices(table.numbers(0, "i"), f"the items of {where}", lowest=-1))

    # -- delegates and instructions --

    def _delegate(self, index: int, table: Table) -> Delegate:
        specs = {spec.string(0) or "": bytes(spec.view(1)) for spec in table.tables(2)}
        processed = self._processed(table.table(1), f"method {self._name!r}: delegate {index}")
        return Delegate(table.string(0) or "", processed, specs)

    def _chain(self, index: int, table: Table) -> Chain:
        where = f"chain {index}"
        tables = table.tables(2)
        instructions = tuple(
            self._instruction(instruction, len(tables), f"{where} instruction {i}")
            for i, instruction in enumerate(tables)
        )
        inputs = self._indices(table.numbers(0, "i"), f"the inputs of {where}")
        return Chain(inputs, self._indices(table.numbers(1, "i"), f"the outputs of {where}"), instructions)

    def _instruction(self, instruction: Table, count: int, where: str) -> Instruction:
        kind = instruction.integer(0, "B")
        table = instruction.table(1)
        if table is None:
            raise self._error(f"{where} is empty")
        first = table.integer(0)
        if kind == 1:
            self._index(first, len(self._operators), where, "operator")
            return KernelCall(first, self._indices(table.numbers(1, "i"), f"the arguments of {where}"))
        if kind == 2:
            self._index(first, len(self._delegates), where, "delegate")
            return DelegateCall(first, self._indices(table.numbers(1, "i"), f"the arguments of {where}"))
        if kind not in (3, 4, 5):
            raise self._error(f"{where} has the unknown type {kind}")
        self._index(first, self._value_count, where, "value")
        if kind == 3:
            return MoveCall(first, self._index(table.integer(1), self._value_count, where, "value"))
        if kind == 4:
            # One past the last instruction is a jump to the end.
            return JumpFalseCall(first, self._index(table.integer(1), count + 1, where, "instruction"))
        return FreeCall(first)


_VALUE_READERS: dict[int, Callable[[_PlanReader, Table, str], EValue]] = {
    1: lambda reader, table, where: None,
    2: lambda reader, table, where: table.integer(0, "q"),
    3: lambda reader, table, where: table.boolean(0),
    4: lambda reader, table, where: table.double(0),
    5: _PlanReader._tensor,
    6: lambda reader, table, where: table.string(0) or "",
    7: _PlanReader._int_list,
    8: lambda reader, table, where: DoubleList(table.numbers(0, "d")),
    9: lambda reader, table, where: BoolList(tuple(map(bool, table.numbers(0, "B")))),
    10: _PlanReader._tensor_list,
    11: _PlanReader._optional_tensor_list,
}


# ---- the program ----


@dataclass(frozen=True)
class _Subsegments:
    """Where stored tensors lie inside one segment; the index 0 is reserved."""

    segment_index: int
    offsets: tuple[int, ...]


class Program(SegmentedFile):
    """An open `.pte` file. Opening maps it and reads the table of contents; methods are parsed when first asked for."""

    _kind = "program"

    def __init__(self, source: Source) -> None:
        """Opens a path, the bytes of a file, or a binary file object (read from its beginning)."""
        super().__init__(source)
        check_identifier(self._view, _IDENTIFIER, ".pte", self.label)
        extent = _read_header(self._view, self.label)
        self._check_metadata_end(extent.metadata_end)
        root = FlatBuffer(self._view, extent.metadata_end, self.label).root()
        self.version = self._check_version(root.integer(0, "I"))
        self._load_program_segments(root, extent)
        self._constants_inline = tuple(table.view(0) for table in root.tables(2))
        self._delegates_inline = tuple(table.view(0) for table in root.tables(3))
        self._constants = self._subsegments(root.table(5), "the constant segment")
        self._mutables = tuple(
            self._subsegments(table, f"mutable data segment {i}") for i, table in enumerate(root.tables(6))
        )
        for entry in root.tables(7):
            key = entry.string(0) or ""
            self._segment_of[key] = self._check_segment(entry.integer(1, "I"), f"named data {key!r}")
        self._plan_tables = {table.string(0) or "": table for table in root.tables(1)}
        self._plans: dict[str, ExecutionPlan] = {}
        self.method_names: tuple[str, ...] = tuple(self._plan_tables)

    def _check_version(self, version: int) -> int:
        if version > _NEWEST_VERSION:
            raise ProgramFormatError(
                f"{self.label}: schema version {version} is newer than this reader knows ({_NEWEST_VERSION}); "
                "update executorch-webgpu"
            )
        return version

    def _load_program_segments(self, root: Table, extent: _Extent) -> None:
        tables = root.tables(4)
        if not extent.segment_base and any(table.integer(1, "Q") for table in tables):  # empty ones need no place
            raise ProgramFormatError(
                f"{self.label}: the program has {len(tables)} segments but no {_HEADER_MAGIC!r} header that says "
                "where they are; the file is damaged, copy or export it again"
            )
        self._load_segments(tables, extent.segment_base, extent.segment_size)

    def _subsegments(self, table: Table | None, what: str) -> _Subsegments:
        if table is None:
            return _Subsegments(0, ())
        found = _Subsegments(table.integer(0, "I"), table.numbers(1, "Q"))
        if found.offsets:
            self._check_segment(found.segment_index, what)
        return found

    # -- methods --

    def plan(self, name: str = "forward") -> ExecutionPlan:
        """The method called `name`; parsed on first use, then kept."""
        found = self._plans.get(name)
        if found is None:
            if name not in self.method_names:
                raise InputError(f"{self.label}: no method {name!r}; the program has {', '.join(self.method_names)}")
            self._check_open()
            found = self._plans[name] = _PlanReader(self._plan_tables[name], name, self._delegate_blob).read()
        return found

    @property
    def plans(self) -> tuple[ExecutionPlan, ...]:
        """All methods, in file order (alphabetical)."""
        return tuple(self.plan(name) for name in self.method_names)

    def _delegate_blob(self, reference: Table | None, who: str) -> memoryview:
        if reference is None:
            raise ProgramFormatError(f"{self.label}: {who} has no data")
        location, index = reference.integer(0, "b"), reference.integer(1, "I")
        if location == _SEGMENT:
            return self.segment(self._check_segment(index, who))
        if location != _INLINE or index >= len(self._delegates_inline):
            raise ProgramFormatError(
                f"{self.label}: {who} refers to data {index} in place {location}, but the program has "
                f"{len(self._delegates_inline)} inline blobs; the file is damaged, copy or export it again"
            )
        return self._delegates_inline[index]

    # -- stored tensors --

    def constant_data(self, tensor: TensorMeta) -> memoryview:
        """The bytes of a constant tensor stored in the program, not copied."""
        self._check_open()
        if tensor.is_external or not tensor.is_constant:
            raise InputError(f"{self.label}: the tensor is not a constant stored in the program; use tensor_data()")
        index = tensor.data_buffer_idx
        if self._constants_inline:
            if index >= len(self._constants_inline):
                raise self._no_buffer(index, len(self._constants_inline), "constant")
            return self._cut(self._constants_inline[index], 0, tensor.nbytes, f"constant {index}")
        return self._stored(self._constants, index, tensor.nbytes, "constant")

    def initial_data(self, tensor: TensorMeta) -> memoryview | None:
        """The bytes that a mutable tensor starts with, not copied; None if it starts undefined."""
        self._check_open()
        if tensor.is_external or tensor.allocation is None or not tensor.data_buffer_idx:
            return None
        which = tensor.mutable_data_segments_idx
        if which >= len(self._mutables):
            raise self._no_buffer(which, len(self._mutables), "mutable data segment")
        return self._stored(self._mutables[which], tensor.data_buffer_idx, tensor.nbytes, "mutable tensor")

    def tensor_data(self, tensor: TensorMeta, data_files: Sequence[DataFile] = ()) -> memoryview | None:
        """The stored bytes of any tensor: constant, initial value, or external (by name). None if none are stored."""
        if tensor.is_external:
            return self._external_data(tensor, data_files)
        if tensor.is_constant:
            return self.constant_data(tensor)
        return self.initial_data(tensor)

    def find_named_data(self, key: str, data_files: Sequence[DataFile] = ()) -> memoryview:
        """The bytes under `key` in this program or else in the first of `data_files` that has it."""
        for file in (self, *data_files):
            if key in file:
                return file.named_data(key)
        tried = ", ".join(file.label for file in (self, *data_files))
        fix = "are they from the same export?" if data_files else "pass the .ptd written by the same export"
        raise MissingDataError(f"no data named {key!r} in {tried}; {fix}")

    def _external_data(self, tensor: TensorMeta, data_files: Sequence[DataFile]) -> memoryview:
        key = tensor.fully_qualified_name or ""
        data = self.find_named_data(key, data_files)
        for file in data_files:
            layout = file.layout(key) if key in file and key not in self else None
            if layout and layout != TensorLayout(tensor.scalar_type, tensor.sizes, tensor.dim_order):
                raise ProgramFormatError(
                    f"{file.label}: {key!r} is {layout.scalar_type.name} {list(layout.sizes)} but {self.label} expects "
                    f"{tensor.scalar_type.name} {list(tensor.sizes)}; use the .ptd written by the same export"
                )
            if layout:
                break
        return self._cut(data, 0, tensor.nbytes, f"named data {key!r}")

    def _stored(self, place: _Subsegments, index: int, nbytes: int, what: str) -> memoryview:
        if index >= len(place.offsets):
            raise self._no_buffer(index, len(place.offsets), what)
        return self._cut(self.segment(place.segment_index), place.offsets[index], nbytes, f"{what} {index}")

    def _cut(self, data: memoryview, offset: int, nbytes: int, what: str) -> memoryview:
        if offset + nbytes > len(data):
            raise ProgramFormatError(
                f"{self.label}: {what} needs bytes {offset} to {offset + nbytes} but only {len(data)} are stored"
            )
        return data[offset : offset + nbytes]

    def _no_buffer(self, index: int, count: int, what: str) -> ProgramFormatError:
        return ProgramFormatError(f"{self.label}: a tensor refers to {what} {index} but the program has {count}")

    def close(self) -> None:
        """Gives the file back; may be called twice. Views handed out stay valid and keep the map until they go."""
        # These point into the map too. Parsed methods stay usable, their delegate blobs keep the map.
        self._plan_tables = {}
        self._constants_inline = self._delegates_inline = ()
        super().close()
