"""`Runtime` and `Program`: the entry points, named as in `executorch.runtime`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from os import PathLike
from typing import Any, BinaryIO

from ..files.identity import program_identity
from ..files.integrity import verify_data
from ..files.ptd import DataFile
from ..files.pte import Program as ProgramFile
from ..gpu.buffers import State, Weights
from ..gpu.device import Device
from ..gpu.random_weights import RandomWeights
from ..gpu.upload import Progress
from .method import Method, MethodMeta, describe

Source = str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO


class Runtime:
    """Loads programs onto a device. `Runtime.get()` is the process-wide one, on the best adapter."""

    _instance: Runtime | None = None

    def __init__(self, device: Device | None = None) -> None:
        self._device = device

    @classmethod
    def get(cls) -> Runtime:
        """The process-wide runtime."""
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    @property
    def device(self) -> Device:
        """The device, made on first use. Raises DeviceError without an adapter."""
        if self._device is None:
            self._device = Device.default()
        return self._device

    def load_program(
        self, data: Source, data_path: Source | Sequence[Source] | None = None, random_weights: bool = False
    ) -> Program:
        """Open a program.

        Args:
            data: a `.pte`: path (memory-mapped), bytes, or binary file.
            data_path: the `.ptd` file or files with its external weights.
            random_weights: weights that are in none of the files get random values, for timing.
        Raises:
            ProgramFormatError: truncated, foreign or too new.
        """
        several = isinstance(data_path, list | tuple)
        paths: Sequence[Any] = data_path if several else [] if data_path is None else [data_path]  # type: ignore[assignment]
        return Program(ProgramFile(data), [DataFile(path) for path in paths], self, random_weights)


class Program:
    """An open program: its methods share one copy of the weights on the GPU.

    Attributes:
        file: the parsed `.pte`.
    """

    def __init__(
        self, file: ProgramFile, data_files: Sequence[DataFile], runtime: Runtime, random_weights: bool = False
    ) -> None:
        self.file = file
        self.random_weights = random_weights
        self.data_files = list(data_files)
        self.runtime = runtime
        self._weights: Weights | None = None
        self._family: weakref.WeakSet[Method] = weakref.WeakSet()
        """All methods over the weights, those on further states too. One that nobody holds any more is gone, and so is
        its GPU memory; only the weights stay."""

    @property
    def method_names(self) -> set[str]:
        """All methods, constant ones included."""
        return set(self.file.method_names)

    @functools.cached_property
    def identity(self) -> str:
        """A name for the program and its weights (see `files.identity`); states are tied to it."""
        return program_identity(self.file, self.data_files, self.random_weights)

    @property
    def constants(self) -> dict[str, Any]:
        """Constant methods (`get_max_seq_len` and the like) by name, with their value (a list for several)."""
        found = {}
        for plan in self.file.plans:
            if plan.is_constant:
                values = list(plan.output_values)
                found[plan.name] = values[0] if len(values) == 1 else values
        return found

    @property
    def random_count(self) -> int:
        """Constants that got random values because their data are in no file (see `Runtime.load_program`)."""
        return self._weights.made if isinstance(self._weights, RandomWeights) else 0

    def metadata(self, method_name: str) -> MethodMeta:
        """Types of a method's inputs and outputs, without loading it. Raises InputError for an unknown name."""
        return describe(self.file.plan(method_name))

    def load_method(
        self, name: str = "forward", state: State | None = None, progress: Progress | None = None
    ) -> Method:
        """Load a method: upload the weights that are not there yet, prepare its state.

        Loading it again costs only the state: the rest is shared with those that were loaded before.

        Args:
            state: mutable buffers of another method of this program to share; None for own ones.
            progress: called with (bytes uploaded, bytes in all) after each piece of the weights.
        Raises:
            InputError: no such method; the state is none, was closed, is on another device, or another program's.
            MissingDataError, DeviceError, UnsupportedError: it cannot run here; everything that was uploaded for it
            is freed.
        """
        device = self.runtime.device
        if state is not None:
            State.check(state, device, self.identity)
        with device.lock:
            return self._load(name, state, device, progress)

    def _load(self, name: str, state: State | None, device: Device, progress: Progress | None) -> Method:
        like = next((method for method in self._family if method.name == name and not method.closed), None)
        if like is not None:
            return like.on_state(state)
        if self._weights is None:
            self._weights = RandomWeights(device) if self.random_weights else Weights(device)
        self._weights.progress = progress
        known = self._weights.known()
        try:
            return Method(
                self.file, self.data_files, name, device, self._weights, state, self.identity, family=self._family
            )
        except BaseException:
            self._weights.keep(known)
            raise
        finally:
            self._weights.progress = None

    def verify_data(self) -> int:
        """Hash the weights, in the program and its data files, and compare with what was exported. Needs no device.

        Returns:
            How many different data were checked.
        Raises:
            ProgramFormatError: some are damaged; names them and their files.
            MissingDataError: some are in none of the files.
        """
        return verify_data(self.file, self.data_files)

    def new_state(self) -> State:
        """An empty set of mutable buffers; a method that is loaded on it makes its own there, or finds those that
        another method has made under the same names. Other programs refuse it."""
        return State(self.runtime.device, self.identity)

    def close(self) -> None:
        """Free all GPU memory of the program and its methods."""
        for method in list(self._family):
            method.close()
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
