"""Instructions that stayed outside the delegate, executed with torch when torch is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UnsupportedError
from ..files.pte import ExecutionPlan, KernelCall, MoveCall, Operator, ScalarType, TensorMeta

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


def written(op: Operator, args: Sequence[int]) -> list[int]:
    """As `inputs`, those that it changes in place; without `args` their places in the schema."""
    if op.full_name in _PRIM:
        return []
    arguments = _overload(op)._schema.arguments
    return [
        index
        for index, argument in zip(args or range(len(arguments)), arguments, strict=False)
        if not argument.is_out and argument.alias_info is not None and argument.alias_info.is_write
    ]


def is_scalar(op: Operator) -> bool:
    """Whether an operator computes with numbers and sizes alone."""
    return op.full_name in _PRIM and op.full_name != _VIEW


def is_pure(op: Operator) -> bool:
    """Whether an operator of torch's own may be executed twice: it writes its results only, and draws no random
    numbers."""
    if op.full_name in _PRIM:
        return True
    if not op.name.startswith("aten::") or written(op, ()):
        return False
    torch = importlib.import_module("torch")
    drawing = torch.Tag.nondeterministic_seeded
    packet = _overload(op).overloadpacket
    return all(drawing not in getattr(packet, name).tags for name in packet.overloads())


def torch_dtype(scalar_type: ScalarType) -> str | None:
    """Torch's name for an element type; None for the quantised ones, which programs keep as integers."""
    numpy_dtype = scalar_type.numpy_dtype
    return _TORCH_ONLY.get(scalar_type.name) if numpy_dtype is None else str(numpy_dtype.name)


def copied_inputs(plan: ExecutionPlan) -> frozenset[int]:
    """Value indices of a method's inputs that its operators outside of the delegates might write to: such inputs are
    copied, the caller's tensors stay as they are."""
    calls = [i for chain in plan.chains for i in chain.instructions if isinstance(i, KernelCall)]
    if not any(written(plan.operators[call.op_index], ()) for call in calls):
        return frozenset()
    moved = {i.move_from for chain in plan.chains for i in chain.instructions if isinstance(i, MoveCall)}
    return frozenset(plan.inputs) & (moved | {index for call in calls for index in call.args})


def check_types(plan: ExecutionPlan) -> None:
    """UnsupportedError if torch has no form of a tensor between the operators outside; names them."""
    bad: dict[str, set[str]] = {}
    for call in (i for chain in plan.chains for i in chain.instructions if isinstance(i, KernelCall)):
        for index in call.args:
            value = plan.values[index]
            if isinstance(value, TensorMeta) and torch_dtype(value.scalar_type) is None:
                bad.setdefault(value.scalar_type.name, set()).add(plan.operators[call.op_index].full_name)
    if bad:
        kind, names = next(iter(bad.items()))
        raise UnsupportedError(
            f"operators {sorted(names)} stayed outside the WebGPU delegate and work on tensors of type {kind}, which "
            "torch cannot hold for them; express that part of the model with other types"
        )


def run(
    op: Operator, args: Sequence[int], slots: list[Any], metas: Sequence[Any], resolve: Callable[[Any], Any]
) -> None:
    """Execute one kernel call.

    Args:
        op, args: operator and value indices as the program has them: inputs, then results (which the program may
        repeat).
        slots: values by index; results are stored here as torch tensors or numbers.
        metas: values by index as the program describes them.
        resolve: turns a list value of the program into a list of slot contents.

    Torch's operators give results the size that they need. Kernels of other libraries were made for ExecuTorch, whose
    tensors keep their rank and shrink only: their results begin with the program's sizes, the upper bounds. Such
    kernels only log what they find wrong with their arguments.
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
            sizes = [0] if op.name.startswith("aten::") else metas[index].sizes
            keywords[argument.name] = empty(metas[index], sizes)
            outs.append(index)
        elif argument.kwarg_only:
            keywords[argument.name] = as_torch(resolve(slots[index]))
        else:
            given.append(as_torch(resolve(slots[index])))
    result = function(*given, **keywords)
    results = result if isinstance(result, tuple | list) else (result,)
    for index, value in zip(outs or args[len(function._schema.arguments) :], results, strict=False):
        slots[index] = value


def empty(meta: TensorMeta, sizes: Sequence[int]) -> Any:
    """A torch tensor of a value's type, filled with zeros."""
    torch = importlib.import_module("torch")
    return torch.zeros(list(sizes), dtype=getattr(torch, str(torch_dtype(meta.scalar_type))))


def tensor(meta: TensorMeta, data: Any) -> Any:
    """A torch tensor with a copy of stored bytes."""
    torch = importlib.import_module("torch")
    return torch.frombuffer(
        bytearray(data), dtype=getattr(torch, str(torch_dtype(meta.scalar_type))), count=meta.numel
    ).reshape(meta.sizes)


def as_torch(value: Any) -> Any:
    """numpy arrays (also inside lists) as torch tensors; anything else unchanged."""
    if isinstance(value, list):
        return [as_torch(item) for item in value]
    if hasattr(value, "__array_interface__") and hasattr(value, "dtype"):
        torch = importlib.import_module("torch")
        return torch.from_numpy(value.copy() if not value.flags.writeable else value)
    return value


_TORCH_ONLY = {
    "BFLOAT16": "bfloat16", "COMPLEX32": "complex32", "FLOAT8E5M2": "float8_e5m2", "FLOAT8E4M3FN": "float8_e4m3fn",
    "FLOAT8E5M2FNUZ": "float8_e5m2fnuz", "FLOAT8E4M3FNUZ": "float8_e4m3fnuz",
}  # fmt: skip
"""Torch's names for element types that numpy lacks."""
_VIEW = "executorch_prim::et_view.default"
_PRIM: dict[str, Callable[..., Any]] = {
    _VIEW: lambda x, size: x.reshape([int(s) for s in size]),
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
