"""The records of a delegated subgraph: plain frozen dataclasses, without torch and without wgpu.

A `Graph` is what the blob inside a `.pte` holds. Sizes and scalars are a `Dim`: an int, or a `Sym` expression over
the sizes
and the integer elements of the graph's inputs. `str(graph)` prints it readably.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Union

FORMAT_VERSION = 1
"""Version of the records. A reader refuses a newer one."""

FREE_OPS = ("input_dim", "scalar")
ARITHMETIC_OPS = ("add", "sub", "mul", "floordiv", "mod", "min", "max")

DTYPES = ("f32", "f16", "bf16", "f64", "i64", "i32", "u32", "i16", "i8", "u8", "bool")
"""`u32` is internal: words of packed weights (`ops/packed.py`); no operator of an export takes or gives it."""

FLOATS = frozenset(("f32", "f16", "bf16", "f64"))
INTEGERS = frozenset(("i64", "i32", "i16", "i8", "u8"))
ITEM_SIZE = {
    "f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i64": 8, "i32": 4, "u32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip
"""Bytes per element as the host and the file see it (the GPU may store an element wider)."""


@dataclass(frozen=True, slots=True)
class Sym:
    """An integer that is known only when the inputs are.

    Attributes:
        op: `input_dim` with args (input index, axis): a size of an input; `scalar` with args (input index, flat
            element index): an integer element of an input (a SymInt input is its element 0); or one of `add`, `sub`,
            `mul`,
            `floordiv`, `mod`, `min`, `max` with two args.
        args: ints or nested symbols.
    """

    op: str
    args: tuple[Dim, ...]

    def __str__(self) -> str:
        if self.op == "input_dim":
            return f"in{self.args[0]}.shape[{self.args[1]}]"
        if self.op == "scalar":
            return f"in{self.args[0]}[{self.args[1]}]"
        signs = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
        left, right = self.args
        if self.op in signs:
            return f"({left} {signs[self.op]} {right})"
        return f"{self.op}({left}, {right})"


Dim = Union[int, Sym]


def fold(op: str, left: int, right: int) -> int:
    """The value of an arithmetic `Sym` operation on ints (Python's floor semantics for `floordiv` and `mod`)."""
    if op == "add":
        return left + right
    if op == "sub":
        return left - right
    if op == "mul":
        return left * right
    if op == "floordiv":
        return left // right
    if op == "mod":
        return left % right
    if op == "min":
        return min(left, right)
    if op == "max":
        return max(left, right)
    raise ValueError(f"unknown symbol operation {op!r}")


def make_dim(op: str, left: Dim, right: Dim) -> Dim:
    """`left op right`, folded to an int where both sides are ints and simplified for neutral elements."""
    if isinstance(left, int) and isinstance(right, int):
        return fold(op, left, right)
    if op in ("add", "sub") and right == 0 and isinstance(right, int):
        return left
    if op == "add" and left == 0 and isinstance(left, int):
        return right
    if op == "sub" and left == right:
        return 0
    if op == "mul":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and one in (0, 1):
                return other if one == 1 else 0
    if op == "floordiv" and right == 1 and isinstance(right, int):
        return left
    return Sym(op, (left, right))


def product(dims: Iterable[Dim]) -> Dim:
    """The product of sizes: an element count."""
    total: Dim = 1
    for dim in dims:
        total = make_dim("mul", total, dim)
    return total


def evaluate(dim: Dim, free: Callable[[Sym], int]) -> int:
    """The value of `dim`, given the values of its free symbols (`input_dim` and `scalar`)."""
    if isinstance(dim, int):
        return dim
    if dim.op in FREE_OPS:
        return free(dim)
    left, right = dim.args
    return fold(dim.op, evaluate(left, free), evaluate(right, free))


def free_symbols(dim: Dim) -> Iterator[Sym]:
    """The `input_dim` and `scalar` symbols in `dim` (a `scalar`'s own element index is looked into as well)."""
    if isinstance(dim, int):
        return
    if dim.op in FREE_OPS:
        yield dim
    for arg in dim.args:
        yield from free_symbols(arg)


@dataclass(frozen=True, slots=True)
class Ref:
    """A node argument that is a value: its index in `Graph.values`."""

    value: int


Arg = Union[Ref, int, float, bool, str, None, Sym, tuple["Arg", ...]]
"""A typed node argument. Literal types survive: an int 1 is never a float 1.0 or True."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor (or integer) of the graph.

    Attributes:
        kind: `input`, `constant`, `mutable` (a buffer kept between calls), `temp`, or `symint` (an integer input).
        dtype: one of `DTYPES`; what the host sees. How a device stores it is the runtime's business.
        shape: sizes; () for a scalar.
        name: for messages: the name of the parameter, buffer, input or node.
        data: key of the bytes (row-major, little-endian, host dtype) of a constant, or of the initial content of a
        mutable
            value; None for a mutable value that starts as zeros.
        alias: the value whose storage this one shares (a view, or the result of an in-place write), else None.
    """

    kind: str
    dtype: str
    shape: tuple[Dim, ...]
    name: str
    data: str | None = None
    alias: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        op: the operator with its overload, as ATen or the custom library names it (`aten.add.Tensor`,
            `llama.update_cache.default`), or `webgpu.<name>` for what a fusion pass made.
        args: every argument of the operator's schema by name, defaults filled in.
        outputs: indices of the values it defines.
        name: the node's name in the exported program, for messages.
    """

    op: str
    args: Mapping[str, Arg]
    outputs: tuple[int, ...]
    name: str = ""

    def inputs(self) -> Iterator[int]:
        """The values this node reads, in argument order."""
        for arg in self.args.values():
            yield from refs(arg)


def refs(arg: Arg) -> Iterator[int]:
    """The values an argument names."""
    if isinstance(arg, Ref):
        yield arg.value
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs(item)


def dims(arg: Arg) -> Iterator[Sym]:
    """The symbols an argument holds."""
    if isinstance(arg, Sym):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from dims(item)


@dataclass(frozen=True, slots=True)
class SymbolRange:
    """Bounds of a free symbol, both inclusive. `high` is None where the export gives none."""

    symbol: Sym
    low: int
    high: int | None


@dataclass(frozen=True)
class Graph:
    """A delegated subgraph.

    Attributes:
        values, nodes: nodes stand in execution order.
        inputs: value indices in the order of the delegate's arguments (unused ones kept).
        outputs: a `Ref`, or a `Dim` for an integer output, in the order of the delegate's results.
        mutations: (mutable value, value it takes on at the end of a call). Pairs that already share storage need no
        copy.
        symbols: bounds of the free symbols.
        model_id: the same for all methods lowered together: names their shared state.
    """

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Ref | int | Sym, ...]
    mutations: tuple[tuple[int, int], ...] = ()
    symbols: tuple[SymbolRange, ...] = ()
    model_id: str = ""
    format_version: int = FORMAT_VERSION
    _roots: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def root(self, index: int) -> int:
        """The value that owns the storage of value `index`."""
        found = self._roots.get(index)
        if found is None:
            alias = self.values[index].alias
            found = index if alias is None else self.root(alias)
            self._roots[index] = found
        return found

    def storage_dtype(self, index: int) -> str:
        """The dtype in which a device keeps a value: its own, but float32 for float16 temporaries between operators.

        Weights, caches and inputs of a float16 model stay float16 (they are the bytes that count); what flows between
        its operators is not rounded at each of them, so results are closer to exact ones than float16 gives.
        """
        value = self.values[index]
        return "f32" if value.dtype == "f16" and self.values[self.root(index)].kind == "temp" else value.dtype

    def value(self, arg: Arg) -> Value:
        """The value an argument names; TypeError if the argument is no `Ref`."""
        if not isinstance(arg, Ref):
            raise TypeError(f"expected a value, got {arg!r}")
        return self.values[arg.value]

    def __str__(self) -> str:
        lines = [f"graph (format {self.format_version}, model {self.model_id or '-'})"]
        lines += [f"  symbol {r.symbol} in [{r.low}, {'inf' if r.high is None else r.high}]" for r in self.symbols]
        for index, value in enumerate(self.values):
            if value.kind == "temp":
                continue
            lines.append(
                f"  {value.kind} %{index} {value.name}: {_type(value)}" + (f" @{value.data[:12]}" if value.data else "")
            )
        for node in self.nodes:
            outs = ", ".join(f"%{o}: {_type(self.values[o])}{self._alias(o)}" for o in node.outputs)
            args = ", ".join(f"{k}={_show(v)}" for k, v in node.args.items())
            lines.append(f"  {outs} = {node.op}({args})")
        lines += [f"  mutate %{target} <- %{source}" for target, source in self.mutations]
        lines.append("  return " + ", ".join(_show(o) for o in self.outputs))
        return "\n".join(lines)

    def _alias(self, index: int) -> str:
        alias = self.values[index].alias
        return "" if alias is None else f" in %{alias}"


def _type(value: Value) -> str:
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def _show(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return f"%{arg.value}"
    if isinstance(arg, tuple):
        return "(" + ", ".join(map(_show, arg)) + ")"
    return repr(arg) if isinstance(arg, str) else str(arg)
