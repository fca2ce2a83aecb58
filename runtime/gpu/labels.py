"""How messages name the inputs of a delegate: by the numbers that the method's caller knows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...backend.graph import Graph

_SYMBOL = re.compile(r"\bin(\d+)(?=\[|\.shape)")
"""An input in the text of a `Sym`: `in0[0]`, `in1.shape[2]`."""


class InputLabels:
    """Names of a graph's inputs.

    Args:
        numbers: for each input the number of the method's input that it is, None for what other parts of the program
            compute. None: the graph's own order, for delegates without a method.
    """

    def __init__(self, graph: Graph, numbers: Sequence[int | None] | None = None) -> None:
        self.names = [graph.values[index].name for index in graph.inputs]
        self._numbers = range(len(self.names)) if numbers is None else numbers

    def of(self, position: int) -> str:
        """`input 2 (tokens)`; `tensor getitem` for what the method computes outside of the delegate."""
        number, name = self._numbers[position], self.names[position]
        return f"tensor {name}" if number is None else f"input {number} ({name})"

    def named(self, text: object) -> str:
        """A text about symbols with the inputs' names: `start_pos in0[0]` becomes `start_pos input_pos[0]`."""
        return _SYMBOL.sub(lambda found: self.names[int(found[1])], str(text))
