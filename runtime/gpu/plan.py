"""A plan: all dispatches of a method for one set of sizes, with pipelines, bind groups and buffers, ready to be
encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import wgpu

from ...backend.graph import Dim, Graph, Sym, evaluate
from ...ops.base import Check, Dispatch, ElementCheck, Live, Lowering, find, viewed, with_node
from ..errors import DeviceError, InputError
from . import native
from .buffers import LiveTable, Pool, storage_size
from .device import Device
from .kernel import Kernel, KernelKey
from .windows import Windows, followed

ScratchId = tuple[int, int]
"""(node index, value index): a temporary of one node's dispatches."""
MAX_KEPT = 64
"""Sizes for which a node's dispatches are kept: about the plans of a delegate."""
Storage = int | ScratchId
Bound = tuple[Any, int, int]
"""(buffer, first byte, bytes from there on)."""


@dataclass(frozen=True)
class Lowered:
    """What one node became: its dispatches, scratch temporaries (value index -> dtype, count), host checks, and results
    that are windows (value index -> root in whose buffer, from which byte on)."""

    dispatches: tuple[Dispatch, ...]
    scratch: dict[int, tuple[str, int]]
    checks: tuple[Check, ...]
    element_checks: tuple[ElementCheck, ...]
    used: frozenset[Sym]
    windows: dict[int, tuple[int, int]]


class NodeCache:
    """Lowers nodes; a node is lowered again only when a symbol that it looked at has another value.

    What was lowered is kept for the last MAX_KEPT sets of values of each node.
    """

    def __init__(self, graph: Graph, device: Device) -> None:
        self.graph = graph
        self.device = device
        self.windows = Windows(graph, device)
        self._known: list[dict[tuple[Sym, ...], dict[tuple[int, ...], Lowered]]] = [{} for _ in graph.nodes]

    def lower(self, index: int, free: Callable[[Sym], int]) -> Lowered:
        for symbols, results in self._known[index].items():
            values = tuple(free(s) for s in symbols)
            hit = results.pop(values, None)
            if hit is not None:
                results[values] = hit  # most recently used last
                return hit
        made = self._lower(index, free)
        symbols = tuple(sorted(made.used, key=str))
        results = self._known[index].setdefault(symbols, {})
        results[tuple(free(s) for s in symbols)] = made
        if len(results) > MAX_KEPT:
            del results[next(iter(results))]
        return made

    def _lower(self, index: int, free: Callable[[Sym], int]) -> Lowered:
        node = self.graph.nodes[index]
        op = find(node.op)
        if op is None:
            raise DeviceError(f"{node.name}: the program uses operator {node.op}, which this version has no kernel for")
        ctx = Lowering(self.graph, self.device.limits, free)
        ctx.node = node
        ctx.may_window = partial(self.windows.offset, index)
        for output in node.outputs:  # sizes of results decide buffer sizes, whether a kernel looks at them or not
            for dim in self.graph.values[output].shape:
                if ctx.int(dim) < 0:
                    raise InputError(f"{node.name}: {dim}, a size of its result, is {ctx.int(dim)}")
        view = self.graph.values[node.outputs[0]].alias is not None and viewed(self.graph, node) is not None
        dispatches = [] if view else [with_node(d, node) for d in op.lower(ctx, node) if 0 not in d.grid]
        return Lowered(
            tuple(dispatches), ctx.scratch_values, tuple(ctx.checks), tuple(ctx.element_checks), frozenset(ctx.used),
            ctx.windows,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """A dispatch made ready: what the encoder needs, and its node and kernel for messages and profiles."""

    pipeline: Any
    bind_group: Any
    grid: tuple[int, int, int]
    indirect: Any
    node: str
    kernel: str
    indirect_offset: int = 0


@dataclass
class Plan:
    """See the module's docstring.

    Attributes:
        records: the launches in the form that a step encodes.
        buffers: value index -> GPU buffer of its storage.
        generation: of pool and live table when it was made; outdated if theirs differ.
        live: the expressions that its kernels read from the live table.
        symbols: those whose values it was made for: with others it is another plan.
        dropped: its params were freed; it must not be encoded any more.
    """

    launches: list[Launch]
    records: native.Recording
    checks: tuple[Check, ...]
    element_checks: tuple[ElementCheck, ...]
    buffers: dict[int, Any]
    generation: tuple[int, int]
    params: Any
    scratch_bytes: int
    live: frozenset[Dim]
    symbols: frozenset[Sym]
    dropped: bool = False

    @cached_property
    def elements(self) -> list[Sym]:
        """Of `symbols`, those that are elements of inputs, not sizes: a step with other numbers may need another
        plan."""
        return sorted((symbol for symbol in self.symbols if symbol.op == "scalar"), key=str)


class Planner:
    """Builds plans for one graph."""

    def __init__(self, graph: Graph, device: Device, pool: Pool, live: LiveTable, fixed: Callable[[int], Any]) -> None:
        """`fixed(value index)` gives the buffer of a constant or mutable root."""
        self.graph = graph
        self.device = device
        self.pool = pool
        self.live = live
        self.fixed = fixed
        self.nodes = NodeCache(graph, device)

    @property
    def generation(self) -> tuple[int, int]:
        return (self.pool.generation, self.live.generation)

    def lowered(self, free: Callable[[Sym], int]) -> list[Lowered]:
        return [self.nodes.lower(i, free) for i in range(len(self.graph.nodes))]

    def build(self, lowered: list[Lowered], free: Callable[[Sym], int]) -> Plan:
        """A plan with everything bound.

        Raises:
            DeviceError: a tensor or a kernel does not fit this device; nothing has been submitted then.
        """
        windows = {result: window for node in lowered for result, window in node.windows.items()}
        sizes, last = self._liveness(lowered, free, windows)
        slots, slot_sizes = assign(sizes, last)
        taken = self.pool.take(slot_sizes)
        where: dict[Storage, Any] = {storage: taken[slot] for storage, slot in slots.items()}
        for index in range(len(self.graph.values)):
            root = self.graph.root(index)
            if root not in where and self.graph.values[root].kind in ("constant", "mutable"):
                where[root] = self.fixed(root)
        every = [(number, dispatch) for number, node in enumerate(lowered) for dispatch in node.dispatches]
        placed = [(number, *self._place_live(dispatch)) for number, dispatch in every]
        live_buffer = self.live.ready()
        params, offsets, kernels = self._pack(placed)
        launches = []
        for (number, dispatch, window), offset, kernel in zip(placed, offsets, kernels, strict=True):
            resolve = self._resolver(number, dispatch, where, sizes, windows)
            group = self._bind(kernel, dispatch, resolve, params, offset, live_buffer, window)
            indirect, begin, _ = (None, 0, 0) if dispatch.indirect is None else resolve(dispatch.indirect)
            launches.append(
                Launch(
                    kernel.pipeline, group, dispatch.grid, indirect, dispatch.node, dispatch.kernel,
                    begin + 4 * dispatch.indirect_word,
                )
            )  # fmt: skip
        roots = {i: where[self.graph.root(i)] for i in range(len(self.graph.values)) if self.graph.root(i) in where}
        return Plan(
            launches,
            native.Recording(launches),
            tightest(check for node in lowered for check in node.checks),
            tuple(dict.fromkeys(c for node in lowered for c in node.element_checks)),
            roots,
            self.generation,
            params,
            sum(size for storage, size in sizes.items() if isinstance(storage, tuple)),
            frozenset(live.dim for _, dispatch in every for live in _live(dispatch).values()),
            frozenset().union(*(node.used for node in lowered)),
        )

    def _liveness(
        self, lowered: list[Lowered], free: Callable[[Sym], int], windows: Mapping[int, tuple[int, int]]
    ) -> tuple[dict[Storage, int], dict[Storage, tuple[int, int]]]:
        """Byte sizes, and (first, last) node index, of every pooled storage; what is read through a window is alive."""
        graph, end = self.graph, len(self.graph.nodes)
        sizes: dict[Storage, int] = {}
        span: dict[Storage, tuple[int, int]] = {}

        def root(index: int) -> int:
            return followed(windows, graph.root(index))[0]

        def touch(index: int, when: int) -> None:
            place = root(index)
            value = graph.values[place]
            if value.kind not in ("temp", "input"):
                return
            count = 1
            for dim in value.shape:
                count *= evaluate(dim, free)
            sizes[place] = storage_size(self.device, graph.storage_dtype(place), count)
            first, _ = span.get(place, (when, when))
            span[place] = (first, when)

        # an input that nobody reads, but for its size, gets no buffer and is not written (integers: see below)
        read = {root(index) for node in graph.nodes for index in node.inputs()}
        read |= {root(output.value) for output in graph.outputs if not isinstance(output, int | Sym)}
        integers = [index for index in graph.inputs if graph.values[index].dtype in ("i32", "i64")]
        for index in graph.inputs:
            if root(index) in read or index in integers:
                touch(index, -1)
        for number, node in enumerate(graph.nodes):
            for index in (*node.inputs(), *node.outputs):
                touch(index, number)
            for index, (dtype, count) in lowered[number].scratch.items():
                sizes[(number, index)] = storage_size(self.device, dtype, count)
                span[(number, index)] = (number, number)
        for output in graph.outputs:
            if not isinstance(output, int | Sym):
                touch(output.value, end)
        for index in integers:
            touch(index, end)  # tokens and positions, which the GPU may write for the next step
        return sizes, span

    def _place_live(self, dispatch: Dispatch) -> tuple[Dispatch, int]:
        """The dispatch with slots in the place of live scalars, and the byte offset of their window."""
        wanted = _live(dispatch)
        if not wanted:
            return dispatch, 0
        window, slots = self.live.place([live.dim for live in wanted.values()])
        known = dict(zip(wanted, slots, strict=True))
        params = {name: known.get(name, value) for name, value in dispatch.params.items()}
        consts = {name: known.get(name, value) for name, value in dispatch.consts.items()}
        return replace(dispatch, params=params, consts=consts), window

    def _pack(self, placed: list[tuple[int, Dispatch, int]]) -> tuple[Any, list[int], list[Kernel]]:
        """One uniform buffer with the params of all dispatches, the offset of each, and the compiled kernels."""
        align = max(self.device.limits.uniform_alignment, 16)
        blob, offsets, kernels = bytearray(), [], []
        known: dict[bytes, int] = {}
        for _, dispatch, _ in placed:
            kernel = self.device.kernel(KernelKey.of(dispatch))
            kernels.append(kernel)
            data = b""
            if kernel.interface.params:
                data = kernel.interface.pack(dispatch.params, f"{dispatch.node} ({dispatch.kernel})")
            if data not in known:
                known[data] = len(blob)
                blob += data + bytes(-len(data) % align)
            offsets.append(known[data])
        usage = wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST
        params = self.device.buffer(len(blob), "other", "params", usage)
        if blob:
            self.device.write(params, bytes(blob))
        return params, offsets, kernels

    def _resolver(
        self,
        number: int,
        dispatch: Dispatch,
        where: dict[Storage, Any],
        sizes: dict[Storage, int],
        windows: Mapping[int, tuple[int, int]],
    ) -> Callable[[int], Bound]:
        def resolve(index: int) -> Bound:
            storage: Storage = (number, index)
            begin = 0
            if index < len(self.graph.values):
                storage, begin = followed(windows, self.graph.root(index))
            buffer = where.get(storage)
            if buffer is None:
                raise DeviceError(
                    f"{dispatch.node}: kernel {dispatch.kernel} is bound to value %{index}, which has no storage"
                )
            return buffer, begin, sizes.get(storage, buffer.size) - begin

        return resolve

    def _bind(
        self,
        kernel: Kernel,
        dispatch: Dispatch,
        resolve: Callable[[int], Bound],
        params: Any,
        offset: int,
        live: Any,
        window: int,
    ) -> Any:
        interface = kernel.interface
        unknown = set(dispatch.bindings) - set(interface.bindings)
        if unknown:
            raise DeviceError(f"{dispatch.node}: {dispatch.kernel}.wgsl declares no variable {sorted(unknown)}")
        entries = []
        for binding in interface.bindings.values():
            if binding.name == "params":
                resource = {"buffer": params, "offset": offset, "size": interface.params_size}
            elif binding.name == "live":
                resource = {"buffer": live, "offset": window, "size": 256}
            elif binding.name in dispatch.bindings:
                buffer, begin, size = resolve(dispatch.bindings[binding.name])
                if size > self.device.limits.max_binding:
                    raise DeviceError(
                        f"{dispatch.node}: the tensor at {dispatch.kernel}.{binding.name} has {size:,} bytes, but "
                        f"this device binds at most {self.device.limits.max_binding:,} ({self.device.name}); "
                        "use another device or a smaller model"
                    )
                resource = {"buffer": buffer, "offset": begin, "size": size}
            elif binding.writes:
                raise DeviceError(
                    f"{dispatch.node}: {dispatch.kernel}.wgsl writes {binding.name}, but nothing is bound to it"
                )
            else:
                resource = {"buffer": self.device.null_buffer, "offset": 0, "size": 256}
            entries.append({"binding": binding.index, "resource": resource})
        try:
            group = self.device.gpu.create_bind_group(
                label=f"{dispatch.node} {dispatch.kernel}", layout=kernel.layout, entries=entries
            )
        except Exception as error:
            raise DeviceError(f"{dispatch.node}: binding {dispatch.kernel} failed: {error}") from error
        self.device.counters.bind_groups += 1
        return group


def _live(dispatch: Dispatch) -> dict[str, Live]:
    """Params and consts that are live scalars, by name (no name is both)."""
    given = [*dispatch.params.items(), *dispatch.consts.items()]
    return {name: value for name, value in given if isinstance(value, Live)}


def tightest(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Of the checks of each expression, the first with the largest lower limit and the first with the smallest upper
    one: a number that passes these passes all."""
    lows: dict[Dim, Check] = {}
    highs: dict[Dim, Check] = {}
    for check in checks:
        if check.dim not in lows or check.low > lows[check.dim].low:
            lows[check.dim] = check
        if check.dim not in highs or check.high < highs[check.dim].high:
            highs[check.dim] = check
    return tuple(dict.fromkeys(check for dim in lows for check in (lows[dim], highs[dim])))


def assign(sizes: dict[Storage, int], span: dict[Storage, tuple[int, int]]) -> tuple[dict[Storage, int], list[int]]:
    """Share slots among storages whose lifetimes do not meet.

    Returns (storage -> slot, byte size of each slot). Best fit: the smallest free slot that is large enough, else the
    largest
    free one, which grows.
    """
    order = sorted(sizes, key=lambda s: (span[s][0], -sizes[s], str(s)))
    slots: dict[Storage, int] = {}
    slot_sizes: list[int] = []
    busy_until: list[int] = []
    for storage in order:
        first, last = span[storage]
        free = [i for i, until in enumerate(busy_until) if until < first]
        fitting = [i for i in free if slot_sizes[i] >= sizes[storage]]
        if fitting:
            slot = min(fitting, key=lambda i: slot_sizes[i])
        elif free:
            slot = max(free, key=lambda i: slot_sizes[i])
            slot_sizes[slot] = sizes[storage]
        else:
            slot = len(slot_sizes)
            slot_sizes.append(0)
            busy_until.append(0)
            slot_sizes[slot] = sizes[storage]
        busy_until[slot] = last
        slots[storage] = slot
    return slots, slot_sizes
