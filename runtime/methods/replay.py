"""Replay: a step of a delegate captured once and run again with other numbers.

A captured step keeps its plan: pipelines, bind groups, grids. What moves from step to step stands in GPU memory: input
tensors, live scalars, caches, and the sizes of indirect grids, which kernels write. So a replayed step checks that the
inputs have the captured shapes, writes what changed, and encodes the same records. Only where sizes inside the program
follow from elements of inputs (a cache that is cut at the position) does each of their values have a plan of its own.

A plan that a larger call outdated meanwhile (its buffers grew) is bound again by the next replay. Nothing can be
rebound by the caller: inputs are copied into the delegate's own buffers, states belong to one delegate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...backend.graph import Sym
from ..errors import InputError
from ..gpu.plan import Plan
from ..gpu.workspace import locked
from .delegate import Delegate

HostArray = np.ndarray[Any, Any]


class Replay:
    """A captured step of a delegate.

    Args:
        delegate: whose step it is.
        inputs: (host dtype, array) for each input, as for `Delegate.execute`; their shapes are what is captured.
    Raises:
        InputError, DeviceError: as `Delegate.execute`; nothing is run.
    """

    def __init__(self, delegate: Delegate, inputs: Sequence[tuple[str, HostArray]]) -> None:
        self.delegate = delegate
        self.device = delegate.device
        self._env = delegate.bind(inputs)
        self._types = [(dtype, array.shape) for dtype, array in inputs]
        self._scalars = tuple(s for s in self._env if s.op == "scalar")
        self._plan: Plan | None = None
        self.plan()

    @locked
    def plan(self) -> Plan:
        """The plan of the last step, bound to the buffers of now.

        Raises:
            InputError: the delegate was closed.
        """
        if self.delegate.closed:
            raise InputError("this step was captured from a delegate that was closed: load the method, capture again")
        self.delegate.state.require_open()
        plan = self._plan
        if plan is None or plan.dropped or plan.generation != self.delegate.planner.generation:
            plan = self._plan = self.delegate.plan(self._env)
        return plan

    @locked
    def execute(self, inputs: Sequence[tuple[str, HostArray]]) -> list[tuple[str, HostArray | int]]:
        """Run the step with other numbers; as `Delegate.execute`, without finding out what the captured step knows.

        Raises:
            InputError: shapes or dtypes are not the captured ones, a position or size is out of range, the delegate
                was closed. Nothing was submitted then.
            DeviceError: the device failed.
        """
        plan, env = self.prepare(inputs)
        return self.delegate.run(plan, inputs, env)

    def prepare(self, inputs: Sequence[tuple[str, HostArray]]) -> tuple[Plan, dict[Sym, int]]:
        """The plan and the symbol values of a step with other numbers. Raises InputError as `execute`."""
        found = [(dtype, array.shape) for dtype, array in inputs]
        if found != self._types:
            raise InputError(
                f"this step was captured with inputs {_shown(self._types)}, got {_shown(found)}: capture it again"
            )
        env = dict(self._env)
        for symbol in self._scalars:
            env[symbol] = self.delegate.element(symbol, inputs, env.__getitem__)
            self.delegate.check_range(symbol, env[symbol])
        if self._plan is None or any(env[symbol] != self._env[symbol] for symbol in self._plan.elements):
            self._plan, self._env = None, env
        return self.plan(), env


def _shown(types: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for dtype, shape in types)
