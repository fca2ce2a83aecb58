"""What an operator is: `supports`, `lower`, and the registry that finds both by the operator's name.

An operator module registers functions for one or several operator names:

    def supports(graph, node): ...   # None, or the reason to refuse; from shapes, dtypes and literals only
    def lower(ctx, node): ...        # yields Dispatch records; sizes are ints here
    register("aten.neg.default", supports=supports, lower=lower)

Neither torch nor wgpu may be imported in this package.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Protocol

from ..backend.graph import FLOATS, Arg, Dim, Graph, Node, Ref, Sym, Value, evaluate, free_symbols, refs
from .bounds import integer_bounds

Grid = tuple[int, int, int]
Int = int
"""For annotations in `Lowering`, where `int` names a method."""


@dataclass(frozen=True)
class Limits:
    """What a device offers, in WebGPU's own terms. The defaults are WebGPU's default limits without optional features.

    Sizes are in bytes, counts in units. `subgroup_size` is the smallest subgroup that a kernel may run with (0: no
    subgroup operations). `cheap_indirect`: an indirect dispatch costs no more than a direct one.
    """

    max_invocations: int = 256
    max_workgroup_memory: int = 16384
    max_workgroups: int = 65535
    max_storage_buffers: int = 8
    max_binding: int = 128 << 20
    max_buffer: int = 256 << 20
    uniform_alignment: int = 256
    storage_alignment: int = 256
    f16: bool = False
    subgroup_size: int = 0
    cheap_indirect: bool = False

    def wgsl_type(self, dtype: str) -> str:
        """How a tensor of host dtype `dtype` is stored on this device: `f32`, `f16`, `i32` or `u32`.

        Integers are i32 (tensors have no other in WGSL), booleans u32 holding 0 or 1, words of packed weights u32,
        bfloat16 f32; float16 is f16 where the device has it, else f32, so that every program runs on every device.
        """
        if dtype == "f16" and self.f16:
            return "f16"
        if dtype in ("f32", "f16", "bf16"):
            return "f32"
        if dtype in ("i64", "i32", "i16", "i8", "u8"):
            return "i32"
        if dtype in ("bool", "u32"):
            return "u32"
        raise ValueError(f"no WGSL storage for dtype {dtype}")


@dataclass(frozen=True, slots=True)
class Live:
    """A params field that holds the slot of a live scalar: the kernel reads the value with
    `live_value(params.<field>)`."""

    dim: Dim


Param = int | float | Live | tuple[int, ...] | tuple[float, ...]
Const = int | float | bool | Live


@dataclass(frozen=True)
class Dispatch:
    """One kernel launch in plain numbers, made by `lower`, never stored.

    Attributes:
        kernel: name of the `.wgsl` file.
        bindings: shader variable -> value index. A variable of the shader left out is bound to a small dummy buffer.
        params: field of the shader's `struct Params` -> number (or tuple for vectors and arrays).
        grid: workgroups in x, y, z. Use `grid_1d` for flat kernels. A size 0 means: nothing to do, not dispatched.
        indirect: value index of a buffer that holds the grid as three u32, instead of `grid`.
        indirect_word: where in it they begin, in units of 4 bytes.
        overrides: WGSL `override` -> value.
        consts: extra `const NAME` declarations (bool -> bool, int -> u32, float -> f32) appended to the shader. A
            `Live` stands for its slot: no param has to be read to find it.
        types: `alias NAME = <wgsl type>` declarations appended; use `ctx.wgsl_type(ref)`.
        body: WGSL function declarations appended (elementwise bodies).
        node: name of the node, for messages and profiles; filled in by the runtime.
    """

    kernel: str
    bindings: Mapping[str, int]
    params: Mapping[str, Param] = field(default_factory=dict)
    grid: Grid = (1, 1, 1)
    indirect: int | None = None
    indirect_word: int = 0
    overrides: Mapping[str, int | float | bool] = field(default_factory=dict)
    consts: Mapping[str, Const] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A host check made before a step is submitted: low <= dim <= high."""

    dim: Dim
    low: int
    high: int
    what: str


@dataclass(frozen=True, slots=True)
class ElementCheck:
    """A host check of every element of an integer input: low <= element <= high.

    `plus`: another integer input of as many elements; what is checked are the sums, element by element. `each` is what
    an element stands for, in messages.
    """

    value: int
    low: int
    high: int
    what: str
    plus: int | None = None
    each: str = "element"


class Lowering:
    """The view of a graph that `lower` sees: concrete sizes, device limits, scratch values and host checks.

    `int(dim)` records that the plan depends on the symbols in `dim`; `live(dim)` keeps a symbol out of the plan: its
    value is
    read by the kernel from the live-scalar buffer at each step.
    """

    def __init__(self, graph: Graph, limits: Limits, free: Callable[[Sym], int]) -> None:
        self.graph = graph
        self.limits = limits
        self.free = free
        self.used: set[Sym] = set()
        self.scratch_values: dict[int, tuple[str, int]] = {}
        self.checks: list[Check] = []
        self.element_checks: list[ElementCheck] = []
        self._next_scratch = len(graph.values)
        self.node: Node | None = None
        self.windows: dict[int, tuple[int, int]] = {}
        self.may_window: Callable[[int, int, int], int | None] = lambda result, source, first: None

    def int(self, dim: Dim) -> int:
        """The value of `dim` now; the plan is keyed by the symbols in it."""
        if isinstance(dim, Sym):
            self.used.update(free_symbols(dim))
        return evaluate(dim, self.free)

    def live(self, dim: Dim) -> Live:
        """A params field value for a scalar that may change every step."""
        return Live(dim)

    def value(self, arg: Arg) -> Value:
        return self.graph.value(arg)

    def id(self, arg: Arg) -> Int:
        """The value index of a `Ref` argument, for `Dispatch.bindings`."""
        if not isinstance(arg, Ref):
            raise TypeError(f"expected a value, got {arg!r}")
        return arg.value

    def shape(self, arg: Arg) -> tuple[Int, ...]:
        """The sizes of a value argument now."""
        return tuple(self.int(dim) for dim in self.value(arg).shape)

    def numel(self, arg: Arg) -> Int:
        total = 1
        for size in self.shape(arg):
            total *= size
        return total

    def dtype(self, arg: Arg) -> str:
        return self.value(arg).dtype

    def wgsl_type(self, arg: Arg) -> str:
        """The WGSL element type in which this device stores a value argument."""
        return self.stored_as(self.id(arg), self.value(arg).dtype)

    def stored_as(self, index: Int, dtype: str) -> str:
        """The WGSL element type of the value, or scratch value, with this index; `dtype` is a scratch value's."""
        known = index < len(self.graph.values)
        return self.limits.wgsl_type(self.graph.storage_dtype(index) if known else dtype)

    def out(self, node: Node, index: Int = 0) -> Ref:
        return Ref(node.outputs[index])

    def shares_storage(self, a: Ref, b: Ref) -> bool:
        """Whether two values are one buffer (a view, or an in-place write)."""
        return self.graph.root(a.value) == self.graph.root(b.value)

    def scratch(self, dtype: str, count: Int) -> Int:
        """A temporary of `count` elements that lives for this node's dispatches only; returns its value index."""
        index = self._next_scratch
        self._next_scratch += 1
        self.scratch_values[index] = (dtype, max(count, 1))
        return index

    def window(self, result: Int, source: Int, first: Int) -> bool:
        """Let a result be the elements of another value from number `first` on, in its buffer. False: it must be
        written.

        Whoever plans a step says whether it can (`may_window` gives the offset in bytes); by default nobody does.
        """
        begin = self.may_window(result, source, first)
        if begin is not None:
            self.windows[result] = (self.graph.root(source), begin)
        return begin is not None

    def require(self, dim: Dim, low: Int, high: Int, what: str) -> None:
        """Check low <= dim <= high on the host before every step (InputError otherwise)."""
        self.checks.append(Check(dim, low, high, what))

    def require_elements(self, arg: Arg, low: Int, high: Int, what: str, each: str = "element") -> None:
        """Check every element of an integer tensor on the host before every step.

        Seen are inputs, views of inputs, and what `bounds.integer_bounds` follows (positions counted up from a live
        scalar or from an input of one element); elements computed otherwise are the kernel's to guard.
        """
        root = self.graph.root(self.id(arg))
        if self.graph.values[root].kind == "input":
            self.element_checks.append(ElementCheck(root, low, high, what, each=each))
            return
        bounds = integer_bounds(self.graph, arg)
        if bounds is None:
            return
        if bounds.base is None:
            self.require(bounds.low, low, high, what)
            self.require(bounds.high, low, high, what)
        elif all(symbol.op == "input_dim" for dim in (bounds.low, bounds.high) for symbol in free_symbols(dim)):
            first, last = self.int(bounds.low), self.int(bounds.high)
            if (first, last) != (0, 0):
                what += f", {first} to {last} more than this"
            self.element_checks.append(ElementCheck(bounds.base, low - first, high - last, what, each=each))

    def require_sums(self, first: Arg, second: Arg, low: Int, high: Int, what: str, each: str = "element") -> None:
        """Check every sum of two integer tensors of as many elements before every step, where both are inputs."""
        roots = [self.graph.root(self.id(arg)) for arg in (first, second)]
        if all(self.graph.values[root].kind == "input" for root in roots):
            self.element_checks.append(ElementCheck(roots[0], low, high, what, roots[1], each))

    def grid_1d(self, items: Int, workgroup: Int) -> Grid:
        """A grid of ceil(items / workgroup) workgroups, folded into x and y where x alone would pass the device's
        limit.

        The kernel computes its flat workgroup index as `wid.x + wid.y * num_workgroups.x` and leaves when past the end.
        """
        groups = -(-items // workgroup)
        return self.fold_grid(groups)

    def fold_grid(self, groups: Int) -> Grid:
        """`groups` workgroups as an (x, y, 1) grid within the limits; x * y >= groups."""
        limit = self.limits.max_workgroups
        if groups <= limit:
            return (groups, 1, 1)
        rows = -(-groups // limit)
        return (-(-groups // rows), rows, 1)


class Supports(Protocol):
    def __call__(self, graph: Graph, node: Node) -> str | None: ...


class Lower(Protocol):
    def __call__(self, ctx: Lowering, node: Node) -> Iterable[Dispatch]: ...


class View(Protocol):
    def __call__(self, graph: Graph, node: Node) -> str | None: ...


@dataclass(frozen=True)
class Op:
    """A registered operator; see `register`."""

    name: str
    supports: Supports
    lower: Lower
    view: View | None = None
    inplace: Mapping[int, str] = field(default_factory=dict)


_REGISTRY: dict[str, Op] = {}


def register(
    *names: str,
    supports: Supports,
    lower: Lower,
    view: View | None = None,
    inplace: Mapping[int, str] | None = None,
) -> None:
    """Register an operator under one or more names.

    Args:
        view: called with (graph, node); returns the name of the argument whose storage the result shares unchanged
        (the first
            value in it, for a list), or None where this node moves data. A node that is a view makes no dispatch.
            Only for
            results whose device storage has the same element type and order.
        inplace: output number -> name of the argument whose storage that output may take over. Where the pass that
        assigns storage
            finds this safe, `ctx.shares_storage(output, argument)` is true in `lower` and only the changed elements
            need
            writing; where not, `lower` must write the whole output.
    Raises:
        ValueError: a name is registered twice.
    """
    for name in names:
        if name in _REGISTRY:
            raise ValueError(f"operator {name} is registered twice")
        _REGISTRY[name] = Op(name, supports, lower, view, dict(inplace or {}))


def load_all() -> Mapping[str, Op]:
    """Import every operator module of the package and return the registry."""
    package = importlib.import_module(__package__ or "executorch_webgpu.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _REGISTRY


_registry = cache(load_all)


def find(name: str) -> Op | None:
    """The operator registered under `name`, or None."""
    return _registry().get(name)


def viewed(graph: Graph, node: Node) -> int | None:
    """The value whose storage a node's (only) result shares because the node is a view, or None."""
    op = find(node.op)
    name = op.view(graph, node) if op is not None and op.view is not None else None
    return None if name is None else next(refs(node.args[name]))


def check_node(graph: Graph, node: Node) -> str | None:
    """The reason to refuse a node, or None: the operator's own answer plus what holds for all operators."""
    op = find(node.op)
    if op is None:
        return "no WebGPU kernel for this operator"
    for index in (*node.inputs(), *node.outputs):
        value = graph.values[index]
        if value.dtype == "f64":
            return f"{value.name}: float64 has no WGSL type; cast it to float32"
        if value.dtype not in FLOATS and value.dtype not in ("i64", "i32", "u32", "i16", "i8", "u8", "bool"):
            return f"{value.name}: dtype {value.dtype} is not supported"
    return op.supports(graph, node)


def with_node(dispatch: Dispatch, node: Node) -> Dispatch:
    """The dispatch labelled with its node."""
    return replace(dispatch, node=node.name or node.op)
