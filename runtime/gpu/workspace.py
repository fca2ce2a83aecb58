"""What the twins of a delegate share: the same graph on several states needs its temporaries only once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ...backend.graph import Graph
from .buffers import LiveTable, Pool, ReadBack
from .device import Device
from .plan import NodeCache

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class _Closable(Protocol):
    def close(self) -> None: ...


_Kept = TypeVar("_Kept", bound=_Closable)


class _OnDevice(Protocol):
    @property
    def device(self) -> Device: ...


_Self = TypeVar("_Self", bound=_OnDevice)


def locked(
    method: Callable[Concatenate[_Self, _Args], _Result],
) -> Callable[Concatenate[_Self, _Args], _Result]:
    """A method that no other thread may interrupt: the device's lock is held while it runs."""

    @functools.wraps(method)
    def guarded(self: _Self, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with self.device.lock:
            return method(self, *args, **kwargs)

    return guarded


class Workspace:
    """Temporaries, live scalars, read-back buffer and lowered nodes of a graph, shared by delegates that run one after
    the other on different states; freed with the last of them.

    Attributes:
        holder: who wrote inputs and live scalars last and counts on finding them; None: nobody.
        users: open delegates.
    """

    def __init__(self, graph: Graph, device: Device) -> None:
        self.device = device
        self.pool = Pool(device)
        self.live = LiveTable(device)
        self.read_back = ReadBack(device)
        self.nodes = NodeCache(graph, device)
        self._holder: weakref.ref[object] | None = None
        self.users = 0
        self._kept: dict[Hashable, tuple[Hashable, Any]] = {}

    @property
    def holder(self) -> object:
        return None if self._holder is None else self._holder()

    @holder.setter
    def holder(self, value: object) -> None:
        # weakly: a delegate's finalizer holds this, and a holder holds its delegate
        self._holder = None if value is None else weakref.ref(value)

    def keep(self, kind: Hashable, key: Hashable, make: Callable[[], _Kept]) -> _Kept:
        """What was made for `key` before; else what `make` gives, in place of what the kind's last key got."""
        found = self._kept.get(kind)
        if found is None or found[0] != key:
            if found is not None:
                found[1].close()
                del self._kept[kind]
            found = self._kept[kind] = (key, make())
        kept: _Kept = found[1]
        return kept

    def keeps(self, item: object) -> bool:
        """Whether `item` is what `keep` gave last for its kind: not closed meanwhile."""
        return any(found is item for _, found in self._kept.values())

    def join(self) -> None:
        """One more delegate uses this."""
        self.users += 1

    def leave(self) -> None:
        """One delegate less; the last one frees everything. May run in any thread, without the device's lock, wherever
        the last reference to a delegate goes: it touches only what no delegate uses any more."""
        self.users -= 1
        if self.users == 0:
            self.holder = None
            for _, item in self._kept.values():
                item.close()
            self._kept.clear()
            self.pool.close()
            self.live.close()
            self.read_back.close()
