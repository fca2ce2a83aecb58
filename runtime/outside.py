"""Instructions that stayed outside the delegate, executed with torch when torch is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from .errors import UnsupportedError
from .pte import Operator

_HINT = "Delegate it (see what the partitioner refused), or install torch, which then executes it on the CPU."


def available() -> bool:
    """Whether torch can be imported."""
    return importlib.util.find_spec("torch") is not None


def load_torch(what: str) -> Any:
    """The torch module; UnsupportedError naming what needs it where it is missing."""
    if not available():
        raise UnsupportedError(f"{what} stayed outside the WebGPU delegate and torch is not installed. {_HINT}")
    return importlib.import_module("torch")


def require(operators: Sequence[Operator]) -> None:
    """Check that every outside operator can be executed; UnsupportedError names all that cannot."""
    missing = [op.full_name for op in operators if _PRIM.get(op.full_name) is None and not _resolvable(op)]
    if missing:
        why = "" if available() else " and torch is not installed"
        raise UnsupportedError(
            f"operators {missing} stayed outside the WebGPU delegate{why or ' and torch does not know them'}. {_HINT}"
        )


def _resolvable(op: Operator) -> bool:
    return available() and _overload(op) is not None


def _overload(op: Operator) -> Any:
    torch = importlib.import_module("torch")
    namespace, _, name = op.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else getattr(packet, op.overload or "default", None)


def inputs(op: Operator, args: Sequence[int]) -> list[int]:
    """The value indices among a call's arguments that it reads (or changes in place), results left out."""
    if op.full_name in _PRIM:
        return list(args[:-1])
    schema = _overload(op)._schema
    return [index for index, argument in zip(args, schema.arguments, strict=False) if not argument.is_out]


def run(
    op: Operator, args: Sequence[int], slots: list[Any], dtypes: Callable[[int], Any], resolve: Callable[[Any], Any]
) -> None:
    """Execute one kernel call.

    Args:
        op, args: operator and value indices as the program has them: inputs, then results (which the program may
        repeat).
        slots: values by index; results are stored here as torch tensors or numbers.
        dtypes: value index -> torch dtype of a tensor value.
        resolve: turns a list value of the program into a list of slot contents.
    """
    prim = _PRIM.get(op.full_name)
    if prim is not None:
        inputs = [resolve(slots[i]) for i in args[:-1]]
        slots[args[-1]] = prim(*inputs)
        return
    function = _overload(op)
    given: list[Any] = []
    keywords: dict[str, Any] = {}
    outs = []
    for index, argument in zip(args, function._schema.arguments, strict=False):
        if argument.is_out:
            torch = importlib.import_module("torch")
            keywords[argument.name] = torch.empty(0, dtype=dtypes(index))
            outs.append(index)
        elif argument.kwarg_only:
            keywords[argument.name] = as_torch(resolve(slots[index]))
        else:
            given.append(as_torch(resolve(slots[index])))
    result = function(*given, **keywords)
    results = result if isinstance(result, tuple | list) else (result,)
    for index, value in zip(outs or args[len(function._schema.arguments) :], results, strict=False):
        slots[index] = value


def as_torch(value: Any) -> Any:
    """numpy arrays (also inside lists) as torch tensors; anything else unchanged."""
    if isinstance(value, list):
        return [as_torch(item) for item in value]
    if hasattr(value, "__array_interface__") and hasattr(value, "dtype"):
        torch = importlib.import_module("torch")
        return torch.from_numpy(value.copy() if not value.flags.writeable else value)
    return value


_PRIM: dict[str, Callable[..., Any]] = {
    "executorch_prim::et_view.default": lambda x, size: x.reshape([int(s) for s in size]),
    "executorch_prim::add.Scalar": lambda a, b: a + b,
    "executorch_prim::sub.Scalar": lambda a, b: a - b,
    "executorch_prim::mul.Scalar": lambda a, b: a * b,
    "executorch_prim::floordiv.Scalar": lambda a, b: a // b,
    "executorch_prim::truediv.Scalar": lambda a, b: a / b,
    "executorch_prim::mod.Scalar": lambda a, b: a % b,
    "executorch_prim::neg.Scalar": lambda a: -a,
    "executorch_prim::eq.Scalar": lambda a, b: a == b,
    "executorch_prim::ge.Scalar": lambda a, b: a >= b,
    "executorch_prim::gt.Scalar": lambda a, b: a > b,
    "executorch_prim::le.Scalar": lambda a, b: a <= b,
    "executorch_prim::lt.Scalar": lambda a, b: a < b,
    "executorch_prim::sym_max.Scalar": lambda a, b: max(a, b),
    "executorch_prim::sym_min.Scalar": lambda a, b: min(a, b),
    "aten::sym_size.int": lambda x, dim: int(x.shape[dim]),
    "aten::_local_scalar_dense": lambda x: x.item(),
    "aten::sym_numel": lambda x: int(x.size if hasattr(x, "ctypes") else x.numel()),
}
