"""A delegate: one graph loaded on a device, and the steps that execute it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import wgpu

from ...backend.graph import Graph, Ref, Sym, Value, dims, evaluate, free_symbols
from ...backend.passes.large import split_large, with_parts
from ...ops.base import Check
from ..errors import DeviceError, InputError
from ..gpu import native
from ..gpu.buffers import DataSource, State, Weights
from ..gpu.device import Device
from ..gpu.host import STORAGE, to_storage
from ..gpu.labels import InputLabels
from ..gpu.plan import Plan, Planner
from ..gpu.upload import check_size, static_numel
from ..gpu.workspace import Workspace, locked
from .output_parts import OutputPart

HostArray = np.ndarray[Any, Any]
MAX_PLANS = 64
"""Plans kept per delegate; the least recently used is dropped first."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """GPU time of one dispatch of a profiled step; `begin` counts from the beginning of the step's first dispatch."""

    node: str
    kernel: str
    nanoseconds: int
    begin: int = 0


class Delegate:
    """Executes one graph.

    Args:
        graph: the delegated subgraph.
        device: where it runs.
        source: gives the bytes of a data key.
        weights: buffers of constants, shared by the delegates of a program.
        state: mutable buffers.
        like: an open delegate of the same graph on another state; temporaries, live scalars and lowered nodes are
            shared with it.
    Raises:
        MissingDataError, DeviceError: weights are missing or do not fit; closing `weights` frees what was uploaded.
    """

    def __init__(
        self,
        graph: Graph,
        device: Device,
        source: DataSource,
        weights: Weights,
        state: State,
        like: Delegate | None = None,
    ) -> None:
        if like is None:
            _check_data(graph, source, weights)
            graph = split_large(graph, _largest(device), lambda value: _stored_size(device, value))
        self.graph = graph
        self.labels = InputLabels(graph)
        self.device = device
        self.source = with_parts(source)
        self.weights = weights
        self.state = state
        shared = Workspace(graph, device) if like is None else like.workspace
        self.workspace: Workspace = shared
        self.pool, self.live, self.read_back = shared.pool, shared.live, shared.read_back
        # holds nothing of `self`: a delegate that nobody needs is freed at once, not by the garbage collector
        fixed = functools.partial(_stored_buffer, graph, weights, state, self.source)
        self.planner = Planner(graph, device, self.pool, self.live, fixed)
        self.planner.nodes = shared.nodes
        self.closed = False
        self.companion: Any = None
        """What decodes with this on the GPU (`resident.Resident`), kept for the next generator, freed with it."""
        self._plans: dict[tuple[int, ...], Plan] = {}
        sizes = (symbol for index in graph.inputs for dim in graph.values[index].shape for symbol in free_symbols(dim))
        self._key_symbols: tuple[Sym, ...] = tuple(sorted(set(sizes), key=str))
        """What plans depend on: sizes of inputs, and what lowering nodes looked at."""
        self._ranges = {r.symbol: r for r in graph.symbols}
        self._symbols: tuple[Sym, ...] = tuple(self._collect_symbols()) if like is None else like._symbols
        if like is None:
            self._check_fits()
        stored = [index for index, value in enumerate(graph.values) if value.alias is None]
        weights.load((graph.values[i] for i in stored if graph.values[i].kind == "constant"), self.source)
        for index in stored:
            if graph.values[index].kind == "mutable":
                fixed(index)
        shared.join()
        self._leave = weakref.finalize(self, shared.leave)
        self._leave.atexit = False

    def _check_fits(self) -> None:
        """Refuse a graph whose stored tensors this device cannot bind, before anything is uploaded."""
        limit = _largest(self.device)
        for value in self.graph.values:
            if value.kind not in ("constant", "mutable") or value.alias is not None:
                continue
            size = _stored_size(self.device, value)
            if size > limit:
                raise DeviceError(
                    f"{value.kind} {value.name} {value.dtype}{list(value.shape)} needs {size:,} bytes, but this device "
                    f"binds at most {limit:,} ({self.device.name}); use another device or a smaller model"
                )

    def _collect_symbols(self) -> dict[Sym, None]:
        """Every free symbol that sizes, arguments or outputs mention."""
        found: dict[Sym, None] = {r.symbol: None for r in self.graph.symbols}
        for position, index in enumerate(self.graph.inputs):
            for axis, dim in enumerate(self.graph.values[index].shape):
                if isinstance(dim, Sym):
                    found[Sym("input_dim", (position, axis))] = None
                    found.update(dict.fromkeys(free_symbols(dim)))
        mentioned = [dim for value in self.graph.values for dim in value.shape]
        mentioned += [sym for node in self.graph.nodes for arg in node.args.values() for sym in dims(arg)]
        mentioned += [output for output in self.graph.outputs if not isinstance(output, Ref)]
        for dim in mentioned:
            found.update(dict.fromkeys(free_symbols(dim)))
        return found

    def fill_state(self, state: State) -> None:
        """Make this graph's mutable buffers in a state, as far as they are missing there."""
        for value in self.graph.values:
            if value.kind == "mutable" and value.alias is None:
                state.get(value, self.source)

    # -- inputs

    def bind(self, inputs: Sequence[tuple[str, HostArray]]) -> dict[Sym, int]:
        """Check the inputs against the graph and return the values of its free symbols.

        Raises:
            InputError: count, dtype, rank, static size, symbol range, inconsistent sizes; names input and limit.
        """
        graph = self.graph
        if len(inputs) != len(graph.inputs):
            raise InputError(f"this delegate takes {len(graph.inputs)} inputs, got {len(inputs)}")
        env: dict[Sym, int] = {}
        for position, (index, (dtype, array)) in enumerate(zip(graph.inputs, inputs, strict=True)):
            value = graph.values[index]
            self._check_type(position, value, dtype, array)
            for axis, size in enumerate(array.shape):
                env[Sym("input_dim", (position, axis))] = size

        free = functools.partial(self._value, env, inputs)
        for symbol in self._symbols:
            self.check_range(symbol, free(symbol))
        for position, (index, (_, array)) in enumerate(zip(graph.inputs, inputs, strict=True)):
            value = graph.values[index]
            for axis, dim in enumerate(value.shape):
                expected = evaluate(dim, free)
                if expected != array.shape[axis]:
                    raise InputError(
                        f"{self.labels.of(position)}: size {array.shape[axis]} at axis {axis}, expected {expected}"
                        + (f" (= {self.labels.named(dim)})" if isinstance(dim, Sym) else "")
                    )
        return env

    def _value(self, env: dict[Sym, int], inputs: Sequence[tuple[str, HostArray]], symbol: Sym) -> int:
        """The value of a free symbol, kept in `env`."""
        if symbol not in env:
            env[symbol] = self.element(symbol, inputs, functools.partial(self._value, env, inputs))
        return env[symbol]

    def _check_type(self, position: int, value: Value, dtype: str, array: HostArray) -> None:
        wanted = "i64" if value.kind == "symint" else value.dtype
        if dtype != wanted:
            raise InputError(f"{self.labels.of(position)}: dtype {dtype}, expected {wanted}")
        if array.ndim != len(value.shape):
            raise InputError(
                f"{self.labels.of(position)}: rank {array.ndim} with shape {list(array.shape)}, "
                f"expected rank {len(value.shape)}"
            )

    def element(self, symbol: Sym, inputs: Sequence[tuple[str, HostArray]], free: Callable[[Sym], int]) -> int:
        """The value of a `scalar` symbol: an element of an integer input."""
        position = evaluate(symbol.args[0], free)
        element = evaluate(symbol.args[1], free)
        array = inputs[position][1].reshape(-1)
        if not 0 <= element < array.size:
            label = self.labels.of(position)
            raise InputError(f"{label}: element {element} is needed, but it has {array.size} elements")
        return int(array[element])

    def check_range(self, symbol: Sym, value: int) -> None:
        """InputError if a symbol's value is outside the range of the export."""
        bounds = self._ranges.get(symbol)
        if bounds is None:
            return
        if value < bounds.low or (bounds.high is not None and value > bounds.high):
            high = "unbounded" if bounds.high is None else bounds.high
            what = f"size at axis {symbol.args[1]}" if symbol.op == "input_dim" else "value"
            label = self.labels.of(int(str(symbol.args[0])))
            raise InputError(f"{label}: {what} is {value}, outside [{bounds.low}, {high}] of the export")

    def check(
        self,
        plan: Plan,
        inputs: Sequence[tuple[str, HostArray]],
        env: dict[Sym, int],
        unknown: Collection[int] = (),
    ) -> None:
        """The plan's own checks: positions and sizes that kernels must not see out of range.

        Args:
            unknown: positions of inputs whose elements are not looked at.
        Raises:
            InputError: one fails; says what and the limits.
        """
        self._check_sizes(plan.checks, env)
        for item in plan.element_checks:
            position = self.graph.inputs.index(item.value)
            other = None if item.plus is None else self.graph.inputs.index(item.plus)
            if position in unknown or other in unknown:
                continue
            array = inputs[position][1].reshape(-1)
            more = None if other is None else inputs[other][1].reshape(-1)
            found = array if more is None else array.astype(np.int64) + more
            if found.size and not (item.low <= int(found.min()) and int(found.max()) <= item.high):
                at = int(np.flatnonzero((found < item.low) | (found > item.high))[0])
                shown = f"{array[at]}" if more is None else f"{array[at]} + {more[at]} = {found[at]}"
                raise InputError(
                    f"{self.labels.of(position)}: {self.labels.named(item.what)}: {shown} is outside "
                    f"[{item.low}, {item.high}] ({item.each} {at})"
                )

    def _check_sizes(self, checks: Iterable[Check], env: dict[Sym, int]) -> None:
        for check in checks:
            value = evaluate(check.dim, env.__getitem__)
            if not check.low <= value <= check.high:
                raise InputError(f"{self.labels.named(check.what)}: {value} is outside [{check.low}, {check.high}]")

    # -- plans

    @locked
    def plan(self, env: dict[Sym, int]) -> Plan:
        """The plan for these symbol values, from the cache or made now. Raises InputError for sizes out of range."""
        key = tuple(env[s] for s in self._key_symbols)
        plan = self._plans.get(key)
        if plan is not None and plan.generation == self.planner.generation:
            self._plans[key] = self._plans.pop(key)  # most recently used last
            return plan
        free = self._lookup(env)
        lowered = self.planner.lowered(free)
        symbols = frozenset(self._key_symbols).union(*(node.used for node in lowered))
        if any(symbol.op == "scalar" for symbol in symbols):  # sizes may be anything: look before memory is made
            self._check_sizes((check for node in lowered for check in node.checks), env)
        if len(symbols) != len(self._key_symbols):
            self._key_symbols = tuple(sorted(symbols, key=str))
            self._drop_plans()
            key = tuple(env[s] for s in self._key_symbols)
        if key in self._plans:
            self._drop(key)
        plan = self.planner.build(lowered, free)
        if plan.generation != self.planner.generation:  # the live buffer was made or the pool grew while building
            raise AssertionError("a plan was outdated as it was made")
        self._plans[key] = plan
        while len(self._plans) > MAX_PLANS:
            self._drop(next(iter(self._plans)))
        return plan

    @staticmethod
    def _lookup(env: dict[Sym, int]) -> Callable[[Sym], int]:
        def free(symbol: Sym) -> int:
            if symbol not in env:
                raise DeviceError(f"the program uses {symbol}, which no input gives")
            return env[symbol]

        return free

    def _drop(self, key: tuple[int, ...]) -> None:
        plan = self._plans.pop(key)
        plan.dropped = True
        self.device.release(plan.params, "other")

    def _drop_plans(self) -> None:
        for key in list(self._plans):
            self._drop(key)

    # -- execution

    @locked
    def execute(
        self, inputs: Sequence[tuple[str, HostArray]], last_row_of: int | None = None
    ) -> list[tuple[str, HostArray | int]]:
        """Run one step.

        Args:
            inputs: (host dtype, array) in the order of the graph's inputs.
            last_row_of: number of an output [..., S, V] of which only the last row is read back, as [..., 1, V] with
                ones in front; None: every output is read whole.
        Returns:
            (host dtype, own array) for each output; an integer output is ("i64", int).
        Raises:
            InputError: before anything is submitted; the state is as it was.
            DeviceError: the device failed.
        """
        env = self._bound(inputs)
        return self.run(self.plan(env), inputs, env, last_row_of)

    @locked
    def run(
        self,
        plan: Plan,
        inputs: Sequence[tuple[str, HostArray]],
        env: dict[Sym, int],
        last_row_of: int | None = None,
    ) -> list[tuple[str, HostArray | int]]:
        """`execute` with a plan and symbol values that fit the inputs."""
        self.write(plan, inputs, env)
        encoder = self.device.gpu.create_command_encoder(label="step")
        compute = encoder.begin_compute_pass(label="step")
        plan.records.encode(compute)
        compute.end()
        return self._finish(encoder, plan, env, last_row_of)

    @locked
    def profile(
        self, inputs: Sequence[tuple[str, HostArray]]
    ) -> tuple[list[tuple[str, HostArray | int]], list[KernelTime]]:
        """Run one step with a timestamp around every dispatch; slower than `execute`, same results.

        Raises:
            DeviceError: the device has no timestamps; else as `execute`.
        """
        if "timestamp-query" not in self.device.features:
            raise DeviceError(f"{self.device.name} has no timestamp queries")
        env = self._bound(inputs)
        plan = self.plan(env)
        self.write(plan, inputs, env)
        count = len(plan.launches)
        results: list[tuple[int, int]] = []
        encoder = self.device.gpu.create_command_encoder(label="profile")
        sets = []
        for start in range(0, count, 2000):  # a query set holds at most 4,096 queries
            part = plan.launches[start : start + 2000]
            queries = self.device.gpu.create_query_set(type="timestamp", count=2 * len(part))
            for i, launch in enumerate(part):
                stamps = {"query_set": queries}
                stamps |= {"beginning_of_pass_write_index": 2 * i, "end_of_pass_write_index": 2 * i + 1}
                compute = encoder.begin_compute_pass(label=launch.node, timestamp_writes=stamps)
                _launch(compute, launch)
                compute.end()
            usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
            resolved = self.device.gpu.create_buffer(size=16 * len(part), usage=usage)
            encoder.resolve_query_set(queries, 0, 2 * len(part), resolved, 0)
            sets.append((resolved, 16 * len(part)))
        outputs = self._finish(encoder, plan, env)
        first = 0
        for resolved, size in sets:
            stamps_read = np.frombuffer(self.device.gpu.queue.read_buffer(resolved, 0, size), np.uint64)
            period = native.timestamp_period(self.device.gpu)
            first = first if results else int(stamps_read[0])
            results += [
                (round((int(end) - int(begin)) * period), round((int(begin) - first) * period))
                for begin, end in stamps_read.reshape(-1, 2)
            ]
            resolved.destroy()
        times = [KernelTime(x.node, x.kernel, *found) for x, found in zip(plan.launches, results, strict=True)]
        return outputs, times

    @locked
    def rehearse(self, inputs: Sequence[tuple[str, HostArray]], unknown: Collection[int]) -> dict[Sym, int]:
        """Make the plan of a step and check its numbers as `execute` does; nothing is written or submitted.

        Args:
            unknown: positions of inputs whose elements do not count, only dtype and shape; none of `elements_read`.
        Returns:
            The values of the symbols.
        Raises:
            InputError, DeviceError: as `execute`.
        """
        env = self._bound(inputs)
        plan = self.plan(env)
        self._stored_inputs(inputs, unknown)
        self.check(plan, inputs, env, unknown)
        return env

    @property
    def elements_read(self) -> frozenset[int]:
        """Positions of inputs of which the host reads elements to know sizes and positions."""
        return frozenset(int(str(symbol.args[0])) for symbol in self._symbols if symbol.op == "scalar")

    def _bound(self, inputs: Sequence[tuple[str, HostArray]]) -> dict[Sym, int]:
        if self.closed:
            raise InputError("this delegate was closed: load the method again")
        self.state.require_open()
        return self.bind(inputs)

    def write(self, plan: Plan, inputs: Sequence[tuple[str, HostArray]], env: dict[Sym, int]) -> None:
        """Check the numbers of a step, then queue the writes of its inputs and live scalars.

        Raises:
            InputError: a number is out of range; nothing was written.
        """
        converted = self._stored_inputs(inputs)
        self.check(plan, inputs, env)
        self.workspace.holder = None
        for index, data in converted:
            if index in plan.buffers and data.nbytes:
                self.device.write(plan.buffers[index], data)
        self.live.write(lambda dim: evaluate(dim, env.__getitem__))

    def _stored_inputs(
        self, inputs: Sequence[tuple[str, HostArray]], unknown: Collection[int] = ()
    ) -> list[tuple[int, HostArray]]:
        """(value index, bytes to upload) of each input; InputError for integers that do not fit."""
        kind = self.device.limits.wgsl_type
        return [
            (index, to_storage(dtype, array, kind(dtype), self.labels.of(position)))
            for position, (index, (dtype, array)) in enumerate(zip(self.graph.inputs, inputs, strict=True))
            if position not in unknown
        ]

    def _finish(
        self, encoder: Any, plan: Plan, env: dict[Sym, int], last_row_of: int | None = None
    ) -> list[tuple[str, HostArray | int]]:
        """Copy the outputs out, submit, wait, convert."""
        parts: list[OutputPart | int] = []
        total = 0
        for number, output in enumerate(self.graph.outputs):
            if not isinstance(output, Ref):
                parts.append(evaluate(output, env.__getitem__))
                continue
            value = self.graph.values[output.value]
            shape = tuple(evaluate(dim, env.__getitem__) for dim in value.shape)
            kind = self.device.limits.wgsl_type(self.graph.storage_dtype(output.value))
            end = int(np.prod(shape, dtype=np.int64)) * STORAGE[kind].itemsize
            start = 0
            if number == last_row_of and end:
                start = end - shape[-1] * STORAGE[kind].itemsize
                shape = (*(1 for _ in shape[:-1]), shape[-1])
            made = OutputPart(value.dtype, kind, shape, plan.buffers[output.value], start, end, total)
            parts.append(made)
            total += -(-made.size // 8) * 8
        target = self.read_back.reserve(total) if total else None
        for part in parts:
            if not isinstance(part, int) and part.size:
                encoder.copy_buffer_to_buffer(part.buffer, part.first, target, part.offset, part.size)
        submission = native.submit(self.device.gpu.queue, encoder.finish())
        self.device.counters.submits += 1
        self.device.counters.dispatches += len(plan.launches)
        data = memoryview(self.read_back.read(submission, total) if total else b"")
        return [("i64", part) if isinstance(part, int) else (part.dtype, part.read(data)) for part in parts]

    @locked
    def close(self) -> None:
        """Free the delegate's own GPU memory (weights and state belong to the program)."""
        if self.closed:
            return
        if self.companion is not None:
            self.companion.close()
            self.companion = None
        self.closed = True
        self._drop_plans()
        self._leave()


def _stored_buffer(graph: Graph, weights: Weights, state: State, source: DataSource, index: int) -> Any:
    """The buffer of a constant or mutable value, made on first use."""
    value = graph.values[index]
    return (weights if value.kind == "constant" else state).get(value, source)


def _check_data(graph: Graph, source: DataSource, weights: Weights) -> None:
    """MissingDataError where the content of a stored tensor is nowhere, or of another size than the tensor's."""
    for value in graph.values:
        if value.kind == "constant" and value.alias is None:
            weights.check(value, source)
        elif value.kind == "mutable" and value.data is not None:
            check_size(value, source(value.data))


def _largest(device: Device) -> int:
    """Bytes of the largest tensor that a kernel can be bound to."""
    return min(device.limits.max_binding, device.limits.max_buffer)


def _stored_size(device: Device, value: Value) -> int:
    """Bytes of a constant or mutable value on the device."""
    return static_numel(value) * STORAGE[device.limits.wgsl_type(value.dtype)].itemsize


def _launch(compute: Any, launch: Any) -> None:
    compute.set_pipeline(launch.pipeline)
    compute.set_bind_group(0, launch.bind_group)
    if launch.indirect is not None:
        compute.dispatch_workgroups_indirect(launch.indirect, launch.indirect_offset)
    else:
        compute.dispatch_workgroups(*launch.grid)
