"""Elementwise operators of one operand: accuracy, special values, dtypes, angles, overflow and tails."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from executorch_webgpu.ops.base import find
from executorch_webgpu.ops.elementwise import UNARY
from tests.harness import DEVICES, device
from tests.ops.aten import SPECIAL, Case, check, integers, randn

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
both_devices = pytest.mark.parametrize("on", DEVICES)


def _gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Without the cancellation that costs PyTorch's own formula the negative tail."""
    if approximate == "none":
        return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


# operator -> further arguments, a list of variants; every operator of the table UNARY whose only tensor is self
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gelu": [{"approximate": "none"}, {"approximate": "tanh"}],
    "hardtanh": [{}, {"min_val": -0.5, "max_val": 2.5}],
    "leaky_relu": [{}, {"negative_slope": 0.3}],
    "elu": [{}, {"alpha": 1.5, "scale": 2.0, "input_scale": 0.5}],
    "softplus": [{}, {"beta": 2.0, "threshold": 5.0}],
    "clamp": [{"min": -0.5}, {"max": 0.75}, {"min": -1, "max": 1}, {"min": 2.0, "max": -2.0}, {"max": math.inf}],
    "clamp_min": [{"min": 0.25}],
    "clamp_max": [{"max": -0.25}],
}
SEVERAL_TENSORS = ("addcmul", "addcdiv")
POSITIVE = ("log", "log2", "log10", "sqrt", "rsqrt", "acosh")
UNIT = ("asin", "acos", "atanh")
INTEGER_ONLY = ("bitwise_not",)
INTEGERS_TOO: tuple[str, ...] = (
    "neg",
    "abs",
    "relu",
    "sign",
    "floor",
    "ceil",
    "round",
    "trunc",
    "square",
    "logical_not",
)
INTEGERS_TOO += ("isnan", "isinf", "exp", "sigmoid")
ABSOLUTE = {"sin": 1.5e-7, "cos": 1.5e-7, "tan": 1e-6, "mish": 1e-37}
"""Near a zero crossing away from the origin only the absolute error is small."""


def domain(name: str) -> torch.Tensor:
    """Inputs: ordinary ones where the function has values, tiny ones, and the special numbers."""
    x = torch.cat(
        [
            randn(150, scale=3.0),
            randn(150, scale=0.4, seed=1),
            randn(20, scale=1e-4, seed=2),
            randn(20, scale=30.0, seed=3),
        ]
    )
    if name in POSITIVE:
        x = torch.cat([x.abs(), 1 + x.abs() * 1e-3, x.abs() * 1e20])
    if name in UNIT:
        x = x.clamp(-1, 1)
    if name == "log1p":
        x = torch.cat([x.abs(), -x.abs().clamp(0, 0.999)])
    return torch.cat([x, SPECIAL])


def unary_cases(name: str) -> list[Case]:
    op = f"aten.{name}.default"
    cases = []
    for kwargs in VARIANTS.get(name, [{}]):
        reference = _gelu if name == "gelu" else None
        if name not in INTEGER_ONLY:
            for dtype in FLOATS:
                x = domain(name).to(dtype)
                # torch squares and scales in its own dtype; ours keeps f32 until the store
                cases.append(Case(op, (x, *kwargs.values()), reference=reference, atol=ABSOLUTE.get(name, 1e-37)))
                if name == "gelu":  # the exponent of the tanh form is rounded: relative error |exponent| * 2e-7
                    cases[-1] = Case(
                        op, (x,), kwargs, reference, atol=1e-12 if kwargs["approximate"] == "tanh" else 1e-37
                    )
        if name in (*INTEGERS_TOO, *INTEGER_ONLY):
            cases += [Case(op, (integers(3, 5, low=0 if t is torch.uint8 else -9, dtype=t),)) for t in INTS]
        if name in ("logical_not", "bitwise_not", "isnan", "exp"):
            cases.append(Case(op, (integers(7, low=0, high=2, dtype=torch.bool),)))
    return cases


@both_devices
@pytest.mark.parametrize("name", [name for name in UNARY if name not in SEVERAL_TENSORS])
def test_unary(name: str, on: str) -> None:
    check(unary_cases(name), device(on))


@both_devices
def test_angles_up_to_32768(on: str) -> None:
    """RoPE positions: no error grows with the angle, not even far beyond what two parts of pi/2 could reduce."""
    positions = torch.arange(0, 32769, 7, dtype=torch.float32)
    angles = torch.cat([positions, randn(4000, scale=9000.0), -positions[::9], torch.logspace(4, 38, 400)])
    check([Case(f"aten.{f}.default", (angles,), rtol=0.0, atol=1.2e-7) for f in ("sin", "cos")], device(on))


@both_devices
def test_overflow_and_tails(on: str) -> None:
    far = torch.tensor([-1e30, -200.0, -104.0, -90.0, -20.0, 20.0, 88.0, 88.7, 89.0, 89.4, 200.0, 1e30])
    names = (
        "tanh",
        "sigmoid",
        "silu",
        "exp",
        "sinh",
        "cosh",
        "softplus",
        "mish",
        "log_sigmoid",
        "erf",
        "expm1",
        "asinh",
        "atan",
    )
    # 1e-37: results below the normal range may be flushed to zero
    check([Case(f"aten.{name}.default", (far,)) for name in names], device(on))
    tail = torch.linspace(-12.5, 12.5, 401)
    check([Case("aten.gelu.default", (tail,), {"approximate": "none"}, _gelu, rtol=3e-6)], device(on))
    check([Case("aten.gelu.default", (tail,), {"approximate": "tanh"}, _gelu, rtol=4e-5)], device(on))


def test_every_table_line_is_registered() -> None:
    for name in UNARY:
        assert find(f"aten.{name}.default") is not None
        assert getattr(torch.ops.aten, name).default is not None
