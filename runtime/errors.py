"""The exceptions that the runtime raises; every one derives from `WebGPUDelegateError`."""

from __future__ import annotations


class WebGPUDelegateError(RuntimeError):
    """Base of every error that this package raises on purpose; catch it to catch them all."""


class ProgramFormatError(WebGPUDelegateError):
    """A `.pte` or `.ptd` file cannot be read: truncated, corrupt, of another format, or newer than this reader."""


class MissingDataError(WebGPUDelegateError):
    """A named piece of data (usually an external weight) is in neither the `.pte` nor any `.ptd` that was given."""


class DeviceError(WebGPUDelegateError):
    """The GPU cannot do it: no adapter, device lost, out of memory, or a device limit is too small."""


class InputError(WebGPUDelegateError, ValueError):
    """An argument is wrong: count, dtype, rank, size, unknown method name, or a position out of range."""


class UnsupportedError(WebGPUDelegateError):
    """The program is valid but this runtime cannot run it (an undelegated operator without torch, a newer blob...)."""
