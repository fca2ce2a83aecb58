"""Sizes and integers of an exported program (sympy expressions over torch's symbols) as `Dim` records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import CeilToInt, CleanDiv, FloorDiv, FloorToInt, Max, Min, Mod, PythonMod

from .graph import Dim, Sym, SymbolRange, make_dim


class Unresolved(Exception):
    """A size or integer depends on something that the delegate's inputs do not tell; the text says what."""


class Symbols:
    """Maps torch's symbols to records and their expressions to `Dim`s."""

    def __init__(self) -> None:
        self._known: dict[sympy.Symbol, Dim] = {}
        self._given: dict[sympy.Expr, Dim] = {}

    def define_inputs(self, shapes: Iterable[tuple[int, Iterable[Any]]]) -> None:
        """Learn symbols from inputs, as `define`.

        Args:
            shapes: (input position, sizes).
        """
        found = [
            (size.node.expr, Sym("input_dim", (position, axis)))
            for position, sizes in shapes
            for axis, size in enumerate(sizes)
            if isinstance(size, torch.SymInt)
        ]
        for expr, here in sorted(found, key=lambda pair: not isinstance(pair[0], sympy.Symbol)):  # plain symbols first
            self.define(expr, here)

    def define(self, expr: Any, dim: Dim) -> None:
        """Say what a size or an integer of the program is: a size of an input, an `item()` result, a SymInt input.

        A plain symbol is then known. An expression is known as a whole, and solved for its only unknown symbol if that
        occurs linearly: what crosses the border of a delegate may be `s - 1` while its nodes need `s`.
        """
        if isinstance(expr, sympy.Symbol):
            self._known.setdefault(expr, dim)
        elif isinstance(expr, sympy.Expr) and not expr.is_Integer:
            self._given.setdefault(expr, dim)
        while any(self._solve(given, here) for given, here in self._given.items()):
            pass  # what was solved may leave another expression with one unknown

    def _solve(self, expr: sympy.Expr, here: Dim) -> bool:
        """Whether the expression gave a symbol that was unknown."""
        unknown = [s for s in expr.free_symbols if s not in self._known]
        if len(unknown) != 1:
            return False
        symbol = unknown[0]
        slope = sympy.diff(expr, symbol) if expr.is_polynomial(symbol) else None
        if slope is None or not slope.is_Integer or slope == 0:
            return False
        try:
            rest = self.dim(sympy.expand(expr - slope * symbol))
        except Unresolved:
            return False
        self._known[symbol] = make_dim("floordiv", make_dim("sub", here, rest), int(slope))
        return True

    def of(self, value: int | torch.SymInt) -> Dim:
        """The `Dim` of an int or SymInt. Raises Unresolved."""
        return value if isinstance(value, int) else self.dim(value.node.expr)

    def dim(self, expr: sympy.Expr) -> Dim:
        """The `Dim` of an expression. Raises Unresolved."""
        if expr.is_Integer:
            return int(expr)
        if isinstance(expr, sympy.Symbol):
            if expr not in self._known:
                raise Unresolved(f"symbol {expr} is given by no input")
            return self._known[expr]
        if expr in self._given and not expr.free_symbols <= self._known.keys():
            return self._given[expr]
        args = expr.args
        if isinstance(expr, sympy.Add):
            return self._fold("add", args)
        if isinstance(expr, sympy.Mul):
            return self._fold("mul", args)
        if isinstance(expr, sympy.Pow) and args[1].is_Integer and args[1] > 0:
            return self._fold("mul", [args[0]] * int(args[1]))
        if isinstance(expr, FloorDiv | CleanDiv):
            return make_dim("floordiv", self.dim(args[0]), self.dim(args[1]))
        if isinstance(expr, Mod | PythonMod | sympy.Mod):
            return make_dim("mod", self.dim(args[0]), self.dim(args[1]))
        if isinstance(expr, Max | sympy.Max):
            return self._fold("max", args)
        if isinstance(expr, Min | sympy.Min):
            return self._fold("min", args)
        if isinstance(expr, FloorToInt | CeilToInt) and args[0].is_integer:
            return self.dim(args[0])
        raise Unresolved(f"size expression {expr} ({type(expr).__name__}) is not supported")

    def _fold(self, op: str, args: Iterable[sympy.Expr]) -> Dim:
        """Left fold, integers last so that `s + 1` reads so."""
        ordered = sorted(args, key=lambda a: (bool(a.is_Integer), str(a)))
        result = self.dim(ordered[0])
        for arg in ordered[1:]:
            if op == "add" and arg.could_extract_minus_sign():
                result = make_dim("sub", result, self.dim(-arg))
            else:
                result = make_dim(op, result, self.dim(arg))
        return result

    def ranges(self, constraints: dict[sympy.Symbol, Any]) -> tuple[SymbolRange, ...]:
        """Bounds of the input sizes that the export gives.

        A lower bound of 2 is torch's specialisation on 0 and 1, not a limit of the program: 1 is accepted there.
        Bounds of
        integers read from tensors are left out: torch derives them from the same specialisation (`u0 <= capacity -
        2`); operators
        check positions themselves.
        """
        found = {}
        for symbol, dim in self._known.items():
            bounds = constraints.get(symbol)
            if bounds is None or not isinstance(dim, Sym) or dim.op != "input_dim":
                continue
            low = int(bounds.lower) if bounds.lower.is_Integer else 0
            high = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
            found[dim] = SymbolRange(dim, 1 if low <= 2 else low, high)
        return tuple(found.values())
