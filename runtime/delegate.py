"""A delegate: one graph loaded on a device, and the steps that execute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import wgpu

from ..backend.graph import Graph, Ref, Sym, Value, dims, evaluate, free_symbols
from . import native
from .buffers import DataSource, LiveTable, Pool, ReadBack, State, Weights
from .device import Device
from .errors import DeviceError, InputError
from .host import STORAGE, from_storage, to_storage
from .plan import Plan, Planner

HostArray = np.ndarray[Any, Any]
MAX_PLANS = 64
"""Plans kept per delegate; the least recently used is dropped first."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """GPU time of one dispatch of a profiled step."""

    node: str
    kernel: str
    nanoseconds: int


class Delegate:
    """Executes one graph.

    Args:
        graph: the delegated subgraph.
        device: where it runs.
        source: gives the bytes of a data key.
        weights: buffers of constants, shared by the delegates of a program.
        state: mutable buffers.
    Raises:
        MissingDataError, DeviceError: weights are missing or do not fit; what was uploaded for this delegate alone is
        freed by
            closing `weights`.
    """

    def __init__(self, graph: Graph, device: Device, source: DataSource, weights: Weights, state: State) -> None:
        self.graph = graph
        self.device = device
        self.source = source
        self.weights = weights
        self.state = state
        self.pool = Pool(device)
        self.live = LiveTable(device)
        self.read_back = ReadBack(device)
        self.planner = Planner(graph, device, self.pool, self.live, self._fixed)
        self.closed = False
        self.companion: Any = None
        """What decodes with this on the GPU (`resident.Resident`), kept for the next generator, freed with it."""
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._key_symbols: tuple[Sym, ...] = ()
        self._ranges = {r.symbol: r for r in graph.symbols}
        self._symbols = tuple(self._collect_symbols())
        self._check_fits()
        for index, value in enumerate(graph.values):
            if value.kind in ("constant", "mutable") and value.alias is None:
                self._fixed(index)

    def _check_fits(self) -> None:
        """Refuse a graph whose stored tensors this device cannot bind, before anything is uploaded."""
        for value in self.graph.values:
            if value.kind in ("constant", "mutable") and value.alias is None:
                count = int(np.prod([d for d in value.shape if isinstance(d, int)], dtype=np.int64))
                size = count * STORAGE[self.device.limits.wgsl_type(value.dtype)].itemsize
                limit = min(self.device.limits.max_binding, self.device.limits.max_buffer)
                if size > limit:
                    raise DeviceError(
                        f"{value.kind} {value.name} {value.dtype}{list(value.shape)} needs {size:,} bytes, but "
                        f"this device binds at most {limit:,} ({self.device.name}); "
                        "use another device or a smaller model"
                    )
                if value.data is not None:
                    self.source(value.data)  # MissingDataError before the first upload

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

    def _fixed(self, index: int) -> Any:
        value = self.graph.values[index]
        return (self.weights if value.kind == "constant" else self.state).get(value, self.source)

    # -- inputs

    def bind(self, inputs: Sequence[tuple[str, HostArray]]) -> dict[Sym, int]:
        """Check the inputs against the graph and return the values of its free symbols.

        Raises:
            InputError: count, dtype, rank, static size, symbol range or inconsistent dynamic sizes; names input and
            limit.
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

        def free(symbol: Sym) -> int:
            if symbol not in env:
                env[symbol] = self.element(symbol, inputs, free)
            return env[symbol]

        for symbol in self._symbols:
            self.check_range(symbol, free(symbol))
        for position, (index, (_, array)) in enumerate(zip(graph.inputs, inputs, strict=True)):
            value = graph.values[index]
            for axis, dim in enumerate(value.shape):
                expected = evaluate(dim, free)
                if expected != array.shape[axis]:
                    raise InputError(
                        f"input {position} ({value.name}): size {array.shape[axis]} at axis {axis}, expected {expected}"
                        + (f" (= {dim})" if isinstance(dim, Sym) else "")
                    )
        return env

    def _check_type(self, position: int, value: Value, dtype: str, array: HostArray) -> None:
        wanted = "i64" if value.kind == "symint" else value.dtype
        if dtype != wanted:
            raise InputError(f"input {position} ({value.name}): dtype {dtype}, expected {wanted}")
        if array.ndim != len(value.shape):
            raise InputError(
                f"input {position} ({value.name}): rank {array.ndim} with shape {list(array.shape)}, "
                f"expected rank {len(value.shape)}"
            )

    def element(self, symbol: Sym, inputs: Sequence[tuple[str, HostArray]], free: Callable[[Sym], int]) -> int:
        """The value of a `scalar` symbol: an element of an integer input."""
        position = evaluate(symbol.args[0], free)
        element = evaluate(symbol.args[1], free)
        array = inputs[position][1].reshape(-1)
        if not 0 <= element < array.size:
            raise InputError(f"input {position}: element {element} is needed, but the input has {array.size}")
        return int(array[element])

    def check_range(self, symbol: Sym, value: int) -> None:
        """InputError if a symbol's value is outside the range of the export."""
        bounds = self._ranges.get(symbol)
        if bounds is None:
            return
        if value < bounds.low or (bounds.high is not None and value > bounds.high):
            name = self.graph.values[self.graph.inputs[int(str(symbol.args[0]))]].name
            high = "unbounded" if bounds.high is None else bounds.high
            what = f"size at axis {symbol.args[1]}" if symbol.op == "input_dim" else "value"
            raise InputError(
                f"input {symbol.args[0]} ({name}): {what} is {value}, outside [{bounds.low}, {high}] of the export"
            )

    def check(self, plan: Plan, inputs: Sequence[tuple[str, HostArray]], env: dict[Sym, int]) -> None:
        """The plan's own checks: positions and sizes that kernels must not see out of range.

        Raises:
            InputError: one fails; says what and the limits.
        """
        for check in plan.checks:
            value = evaluate(check.dim, env.__getitem__)
            if not check.low <= value <= check.high:
                raise InputError(f"{check.what}: {value} is outside [{check.low}, {check.high}]")
        for item in plan.element_checks:
            position = self.graph.inputs.index(item.value)
            array = inputs[position][1]
            if array.size and not (item.low <= int(array.min()) and int(array.max()) <= item.high):
                wrong = array[(array < item.low) | (array > item.high)].reshape(-1)[0]
                raise InputError(
                    f"input {position} ({self.graph.values[item.value].name}): {item.what}: {int(wrong)} is outside "
                    f"[{item.low}, {item.high}]"
                )

    # -- plans

    def plan(self, env: dict[Sym, int]) -> Plan:
        """The plan for these symbol values, from the cache or made now."""
        key = tuple(env[s] for s in self._key_symbols)
        plan = self._plans.get(key)
        if plan is not None and plan.generation == self.planner.generation:
            self._plans[key] = self._plans.pop(key)  # most recently used last
            return plan
        free = self._lookup(env)
        lowered = self.planner.lowered(free)
        symbols = frozenset(self._key_symbols).union(*(node.used for node in lowered)) if lowered else frozenset()
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

    def execute(self, inputs: Sequence[tuple[str, HostArray]]) -> list[tuple[str, HostArray | int]]:
        """Run one step.

        Args:
            inputs: (host dtype, array) in the order of the graph's inputs.
        Returns:
            (host dtype, own array) for each output; an integer output is ("i64", int).
        Raises:
            InputError: before anything is submitted; the state is as it was.
            DeviceError: the device failed.
        """
        env = self._bound(inputs)
        return self.run(self.plan(env), inputs, env)

    def run(
        self, plan: Plan, inputs: Sequence[tuple[str, HostArray]], env: dict[Sym, int]
    ) -> list[tuple[str, HostArray | int]]:
        """`execute` with a plan and symbol values that fit the inputs."""
        self.write(plan, inputs, env)
        encoder = self.device.gpu.create_command_encoder(label="step")
        compute = encoder.begin_compute_pass(label="step")
        native.encode(compute, plan.records)
        compute.end()
        return self._finish(encoder, plan, env)

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
        results: list[int] = []
        encoder = self.device.gpu.create_command_encoder(label="profile")
        sets = []
        for start in range(0, count, 2000):  # a query set holds at most 4,096 queries
            part = plan.launches[start : start + 2000]
            queries = self.device.gpu.create_query_set(type="timestamp", count=2 * len(part))
            for i, launch in enumerate(part):
                stamps = {
                    "query_set": queries,
                    "beginning_of_pass_write_index": 2 * i,
                    "end_of_pass_write_index": 2 * i + 1,
                }
                compute = encoder.begin_compute_pass(label=launch.node, timestamp_writes=stamps)
                _launch(compute, launch)
                compute.end()
            usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
            resolved = self.device.gpu.create_buffer(size=16 * len(part), usage=usage)
            encoder.resolve_query_set(queries, 0, 2 * len(part), resolved, 0)
            sets.append((resolved, 16 * len(part)))
        outputs = self._finish(encoder, plan, env)
        for resolved, size in sets:
            stamps_read = np.frombuffer(self.device.gpu.queue.read_buffer(resolved, 0, size), np.uint64)
            period = native.timestamp_period(self.device.gpu)
            results += [round((int(end) - int(begin)) * period) for begin, end in stamps_read.reshape(-1, 2)]
            resolved.destroy()
        times = [KernelTime(launch.node, launch.kernel, ns) for launch, ns in zip(plan.launches, results, strict=True)]
        return outputs, times

    def _bound(self, inputs: Sequence[tuple[str, HostArray]]) -> dict[Sym, int]:
        if self.closed:
            raise InputError("this delegate was closed: load the method again")
        return self.bind(inputs)

    def write(self, plan: Plan, inputs: Sequence[tuple[str, HostArray]], env: dict[Sym, int]) -> None:
        """Check the numbers of a step, then queue the writes of its inputs and live scalars.

        Raises:
            InputError: a number is out of range; nothing was written.
        """
        converted = []
        for position, (index, (dtype, array)) in enumerate(zip(self.graph.inputs, inputs, strict=True)):
            value = self.graph.values[index]
            kind = self.device.limits.wgsl_type(dtype)
            converted.append((index, to_storage(dtype, array, kind, f"input {position} ({value.name})")))
        self.check(plan, inputs, env)
        for index, data in converted:
            if index in plan.buffers and data.nbytes:
                self.device.write(plan.buffers[index], data)
        self.live.write(lambda dim: evaluate(dim, env.__getitem__))

    def _finish(self, encoder: Any, plan: Plan, env: dict[Sym, int]) -> list[tuple[str, HostArray | int]]:
        """Copy the outputs out, submit, wait, convert."""
        shapes: list[tuple[str, str, tuple[int, ...], int, int] | int] = []
        total = 0
        for output in self.graph.outputs:
            if not isinstance(output, Ref):
                shapes.append(evaluate(output, env.__getitem__))
                continue
            value = self.graph.values[output.value]
            shape = tuple(evaluate(dim, env.__getitem__) for dim in value.shape)
            kind = self.device.limits.wgsl_type(self.graph.storage_dtype(output.value))
            size = -(-int(np.prod(shape, dtype=np.int64)) * STORAGE[kind].itemsize // 8) * 8
            shapes.append((value.dtype, kind, shape, total, size))
            total += size
        if total:
            target = self.read_back.reserve(total)
            for output, entry in zip(self.graph.outputs, shapes, strict=True):
                if isinstance(output, Ref) and not isinstance(entry, int) and entry[4]:
                    encoder.copy_buffer_to_buffer(plan.buffers[output.value], 0, target, entry[3], entry[4])
        submission = native.submit(self.device.gpu.queue, encoder.finish())
        self.device.counters.submits += 1
        self.device.counters.dispatches += len(plan.launches)
        data = self.read_back.read(submission, total) if total else b""
        results: list[tuple[str, HostArray | int]] = []
        for entry in shapes:
            if isinstance(entry, int):
                results.append(("i64", entry))
                continue
            dtype, kind, shape, offset, size = entry
            results.append((dtype, from_storage(dtype, data[offset : offset + size], kind, shape)))
        return results

    def close(self) -> None:
        """Free the delegate's own GPU memory (weights and state belong to the program)."""
        if self.companion is not None:
            self.companion.close()
            self.companion = None
        self.closed = True
        self._drop_plans()
        self.pool.close()
        self.live.close()
        self.read_back.close()


def _launch(compute: Any, launch: Any) -> None:
    compute.set_pipeline(launch.pipeline)
    compute.set_bind_group(0, launch.bind_group)
    if launch.indirect is not None:
        compute.dispatch_workgroups_indirect(launch.indirect, launch.indirect_offset)
    else:
        compute.dispatch_workgroups(*launch.grid)
