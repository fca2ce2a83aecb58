"""`Runtime` and `Program`: the entry points, named as in `executorch.runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, BinaryIO

from .buffers import State, Weights
from .device import Device
from .method import Method, MethodMeta, describe
from .ptd import DataFile
from .pte import Program as ProgramFile

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

    def load_program(self, data: Source, data_path: Source | Sequence[Source] | None = None) -> Program:
        """Open a program.

        Args:
            data: a `.pte`: path (memory-mapped), bytes, or binary file.
            data_path: the `.ptd` file or files with its external weights.
        Raises:
            ProgramFormatError: truncated, foreign or too new.
        """
        several = isinstance(data_path, list | tuple)
        paths: Sequence[Any] = data_path if several else [] if data_path is None else [data_path]  # type: ignore[assignment]
        return Program(ProgramFile(data), [DataFile(path) for path in paths], self)


class Program:
    """An open program: its methods share one copy of the weights on the GPU.

    Attributes:
        file: the parsed `.pte`.
    """

    def __init__(self, file: ProgramFile, data_files: Sequence[DataFile], runtime: Runtime) -> None:
        self.file = file
        self.data_files = list(data_files)
        self.runtime = runtime
        self._weights: Weights | None = None
        self._methods: list[Method] = []

    @property
    def method_names(self) -> set[str]:
        """All methods, constant ones included."""
        return set(self.file.method_names)

    @property
    def constants(self) -> dict[str, Any]:
        """Constant methods (`get_max_seq_len` and the like) by name, with their value (a list for several)."""
        found = {}
        for plan in self.file.plans:
            if plan.is_constant:
                values = list(plan.output_values)
                found[plan.name] = values[0] if len(values) == 1 else values
        return found

    def metadata(self, method_name: str) -> MethodMeta:
        """Types of a method's inputs and outputs, without loading it. Raises InputError for an unknown name."""
        return describe(self.file.plan(method_name))

    def load_method(self, name: str = "forward", state: State | None = None) -> Method:
        """Load a method: upload the weights that are not there yet, prepare its state.

        Args:
            state: mutable buffers of another method of this program to share; None for own ones.
        Raises:
            InputError: no such method.
            MissingDataError, DeviceError, UnsupportedError: it cannot run here; everything that was uploaded for it
            is freed.
        """
        device = self.runtime.device
        fresh = self._weights is None
        if self._weights is None:
            self._weights = Weights(device)
        try:
            method = Method(self.file, self.data_files, name, device, self._weights, state)
        except BaseException:
            if fresh:
                self._weights.close()
                self._weights = None
            raise
        self._methods.append(method)
        return method

    def close(self) -> None:
        """Free all GPU memory of the program and its methods."""
        for method in self._methods:
            method.close()
        self._methods.clear()
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
