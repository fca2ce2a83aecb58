"""References of models that round activations to 8 bits, where a value at a tie may fall to either side.

Two computations of the same value differ by their rounding errors, and where it lies between two codes, the smaller
difference decides which one is taken. So the reference of a call is the set of results that it gives with some of the
values that lie within NEAR of a tie rounded to the other side; a result has to agree with one of them, as with the
reference of any other model, and the caches of that one are those that the next call goes on with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.reference import Reference

NEAR = 2e-4
"""Of a step between two codes. Errors of float32 in the value, some 1e-6 of the largest in its row, are 1e-4 steps."""
MOST = 4
"""Values of a call that may be rounded to the other side."""

Place = tuple[int, int, float]
"""Elements of the tensor, number of the element, its value: projections that each round one tensor round it alike."""
Outputs = tuple[torch.Tensor, ...]


class Ties(TorchDispatchMode):
    """Rounds the values at `flipped` to the other side; `near` are those whose side is open, the closest first."""

    def __init__(self, flipped: frozenset[Place]) -> None:
        super().__init__()
        self.flipped = flipped
        self._found: dict[Place, float] = {}

    @property
    def near(self) -> list[Place]:
        return sorted(self._found, key=lambda place: self._found[place])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name != "aten::round":
            return result
        value = args[0].double().reshape(-1)
        distance = (value - value.floor() - 0.5).abs()
        for index in (distance < NEAR).nonzero().reshape(-1).tolist():
            place = (value.numel(), index, float(value[index]))
            self._found[place] = float(distance[index])
            if place in self.flipped:
                flat = result.view(-1)
                flat[index] = 2 * value[index].floor() + 1 - flat[index]
        return result


def agreeing(
    oracle: Reference, tokens: np.ndarray[Any, Any], position: int, errors: Callable[[Outputs], torch.Tensor]
) -> tuple[float, int]:
    """Run the reference so that it agrees with a result, if it can.

    Args:
        errors: the errors of the result's elements beside the outputs of a reference, in units of the tolerance.
    Returns:
        The largest error beside the nearest reference, and how many values that rounds to the other side.
    """
    before = oracle.state()

    def run(flipped: frozenset[Place]) -> tuple[torch.Tensor, list[Place]]:
        oracle.restore(before)
        with Ties(flipped) as ties:
            found = oracle(tokens, position)
        return errors(found if isinstance(found, tuple) else (found,)), ties.near

    flipped: frozenset[Place] = frozenset()
    found, near = run(flipped)
    while float(found.max()) > 1 and len(flipped) < MOST:
        least, chosen = float(found.square().sum()), flipped
        for place in near:
            if place not in flipped:
                other, _ = run(flipped | {place})
                if float(other.square().sum()) < least:
                    least, chosen = float(other.square().sum()), flipped | {place}
                if float(other.max()) <= 1:
                    break
        ended = chosen == flipped
        flipped = chosen
        found, near = run(flipped)  # leaves the caches of this reference
        if ended:
            break
    return float(found.max()), len(flipped)
