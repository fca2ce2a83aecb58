"""Elementwise operators: one line of a table each. Kernel: `elementwise.wgsl`, with the parts whose functions a rule
names.

The expression of a rule is WGSL in the operands x, y, z (of type T) and the four numbers `params.p`. Floats are
computed in f32 and integers in i32, whatever the storage. bfloat16 (and float16 on devices without it) is stored as f32
and not rounded between operators.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from .. import wgsl
from ..backend.graph import FLOATS, INTEGERS, Arg, Graph, Node, Ref, Sym
from .base import Dispatch, Live, Lowering, register
from .strides import MAX_RANK, broadcast_strides, merge, pad

WORKGROUP = 64
_PARTS = ("elementwise_exponential", "elementwise_angles", "elementwise_remainders")
"""Shader files with functions for rules; functions of the kernel's own file need none."""
DENSE, SINGLE, STRIDED, NUMBER, LIVE = range(5)
INT_LOW, INT_HIGH = -(2**31), 2**31 - 1

Chooser = Callable[[Graph, Node], "Rule"]


@dataclass(frozen=True)
class Rule:
    """How an elementwise operator is computed.

    Attributes:
        f: expression for floats; None: refuses them.
        i: expression for integers and booleans (i32); None: refuses them.
        args: names of the arguments that are x, y and z: tensors, numbers, SymInts or None.
        compute: what T is: `out`: as the result's dtype; `float`: f32; `in`: f32 if an operand is floating, and the
            result is bool.
        p: names of literal arguments that become `params.p`.
        clamp: integer literals beyond 32 bits saturate (right where they only bound).
        divides: name of the argument that must not be an integer literal 0.
        result: the WGSL type of the expression where it is not what `compute` says.
    """

    f: str | None
    i: str | None = None
    args: tuple[str, ...] = ("self",)
    compute: str = "out"
    p: tuple[str, ...] = ()
    clamp: bool = False
    divides: str = ""
    result: str = ""


def _floating(graph: Graph, arg: Arg) -> bool:
    return graph.value(arg).dtype in FLOATS if isinstance(arg, Ref) else isinstance(arg, float)


def _types(graph: Graph, node: Node, rule: Rule) -> tuple[str, str]:
    """(T, R): the WGSL types of the operands and of the expression."""
    if rule.compute == "float":
        kind = "f32"
    elif rule.compute == "in":
        kind = "f32" if any(_floating(graph, node.args[name]) for name in rule.args) else "i32"
    else:
        kind = "f32" if graph.values[node.outputs[0]].dtype in FLOATS else "i32"
    return kind, rule.result or ("bool" if rule.compute == "in" else kind)


def refuse_literal(arg: Arg, kind: str, saturate: bool = False) -> str | None:
    """The reason why a number cannot be computed with in `kind` (f32 or i32), or None."""
    if isinstance(arg, Sym | bool | None) or (kind == "f32" and isinstance(arg, int | float)):
        return None
    if isinstance(arg, float):
        return None if arg.is_integer() and INT_LOW <= arg <= INT_HIGH else f"the number {arg} in an integer operation"
    if isinstance(arg, int):
        fits = saturate or INT_LOW <= arg <= INT_HIGH
        return None if fits else f"the integer {arg} does not fit the GPU's 32-bit integers"
    return f"an argument {arg!r} is not a number"


def _refuse(graph: Graph, node: Node, rule: Rule) -> str | None:
    kind, _ = _types(graph, node, rule)
    out = graph.values[node.outputs[0]]
    if len(out.shape) > MAX_RANK:
        return f"{len(out.shape)} dimensions; at most {MAX_RANK} are supported"
    if (rule.f if kind == "f32" else rule.i) is None:
        return f"{node.op} on {'floating' if kind == 'f32' else 'integer'} values"
    for name in rule.args:
        arg = node.args[name]
        if isinstance(arg, Ref):
            if kind == "i32" and _floating(graph, arg):
                return f"argument {name} is {graph.value(arg).dtype}, but the result is {out.dtype}"
            continue
        reason = refuse_literal(arg, kind, rule.clamp)
        if reason is not None:
            return reason
    for name in rule.p:
        if not isinstance(node.args[name], int | float):
            return f"argument {name} must be a literal number"
    divisor = node.args[rule.divides] if rule.divides else 1
    if kind == "i32" and isinstance(divisor, int | float) and divisor == 0:
        return "integer division by zero"
    return None


def bits(value: int | float, kind: str) -> int:
    """The 32 bits of a number as f32 (infinite beyond its range) or i32 (saturated)."""
    if kind == "i32":
        return min(max(int(value), INT_LOW), INT_HIGH) & 0xFFFFFFFF
    return int(struct.unpack("<I", struct.pack("<f", to_f32(value)))[0])


def to_f32(value: int | float) -> float:
    """`value`, or an infinity beyond the range of f32."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _narrow(value: int | float, dtype: str) -> float:
    """A number as PyTorch sees it next to a tensor of a narrow floating dtype."""
    if dtype == "f16":
        try:
            return float(struct.unpack("<e", struct.pack("<e", value))[0])
        except OverflowError:
            return math.copysign(math.inf, value)
    pattern = bits(value, "f32")
    if dtype == "bf16" and pattern & 0x7F800000 != 0x7F800000:
        pattern = (pattern + 0x7FFF + ((pattern >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", pattern))[0])


FINISH = {
    "bool": "fn finish(v: R) -> Out { return u32(!(v == R(0))); }",
    "u8": "fn finish(v: R) -> Out { return v & 255; }",
    "i8": "fn finish(v: R) -> Out { return extractBits(v, 0u, 8u); }",
    "i16": "fn finish(v: R) -> Out { return extractBits(v, 0u, 16u); }",
}


def finish(result: str, dtype: str) -> str:
    """The WGSL function that turns a result of type R into what a tensor of `dtype` stores."""
    if result == "bool":
        return "fn finish(v: R) -> Out { return u32(v); }"
    return FINISH.get(dtype, "fn finish(v: R) -> Out { return Out(v); }")


def _comparison_dtype(ctx: Lowering, node: Node, rule: Rule) -> str:
    """The narrow dtype to which numbers are rounded before they are compared, or f32."""
    dtypes = {ctx.dtype(arg) for name in rule.args if isinstance(arg := node.args[name], Ref)} & FLOATS
    return next(iter(dtypes)) if rule.compute == "in" and len(dtypes) == 1 else "f32"


def _lower(ctx: Lowering, node: Node, rule: Rule) -> Iterator[Dispatch]:
    out = ctx.out(node)
    shape = ctx.shape(out)
    count = math.prod(shape)
    if count == 0:
        return
    kind, result = _types(ctx.graph, node, rule)
    narrow = _comparison_dtype(ctx, node, rule)
    bindings = {"out": out.value}
    types = {"A": "u32", "B": "u32", "C": "u32", "Out": ctx.wgsl_type(out), "T": kind, "R": result}
    modes = {"A_MODE": NUMBER, "B_MODE": NUMBER, "C_MODE": NUMBER}
    scalars: dict[str, int | Live] = {"scalar_a": 0, "scalar_b": 0, "scalar_c": 0}
    strides = [(0,) * len(shape)] * 3
    for index, (slot, name) in enumerate(zip("abc", rule.args, strict=False)):
        arg = node.args[name]
        mode = slot.upper() + "_MODE"
        if isinstance(arg, Ref):
            bindings[slot] = arg.value
            types[slot.upper()] = ctx.wgsl_type(arg)
            own = ctx.shape(arg)
            elements = math.prod(own)
            modes[mode] = DENSE if elements == count else SINGLE if elements == 1 else STRIDED
            if modes[mode] == STRIDED:
                strides[index] = broadcast_strides(own, shape)
        elif isinstance(arg, Sym):
            modes[mode] = LIVE
            scalars["scalar_" + slot] = ctx.live(arg)
        elif isinstance(arg, int | float):
            scalars["scalar_" + slot] = bits(_narrow(arg, narrow) if kind == "f32" else arg, kind)
    sizes, merged = merge(shape, *strides) if STRIDED in modes.values() else ((), [(), (), ()])
    expression = rule.f if kind == "f32" else rule.i
    numbers = tuple(to_f32(value) for name in rule.p if isinstance(value := node.args[name], int | float))
    yield Dispatch(
        "elementwise",
        bindings,
        {
            "count": count,
            **scalars,
            "inf": math.inf,
            "nan": math.nan,
            "p": numbers + (0.0,) * (4 - len(numbers)),
            "shape": pad(sizes, 1),
            "strides_a": pad(merged[0]),
            "strides_b": pad(merged[1]),
            "strides_c": pad(merged[2]),
        },
        ctx.grid_1d(count, WORKGROUP),
        overrides={"WG": WORKGROUP, "RANK": len(sizes), **modes},
        types=types,
        body=_body(expression or "") + finish(result, ctx.dtype(out)),
    )


@cache
def _functions(part: str) -> frozenset[str]:
    return frozenset(re.findall(r"^fn (\w+)", wgsl.source(part), re.M))


@cache
def _body(expression: str) -> str:
    """`apply`, after the parts whose functions it calls (no part calls another's)."""
    called = set(re.findall(r"\w+", expression))
    parts = [wgsl.source(part) for part in _PARTS if called & _functions(part)]
    return "".join([*parts, f"fn apply(x: T, y: T, z: T) -> R {{ return {expression}; }}\n"])


def _register(name: str, rule: Rule | Chooser) -> None:
    def chosen(graph: Graph, node: Node) -> Rule:
        return rule if isinstance(rule, Rule) else rule(graph, node)

    def supports(graph: Graph, node: Node) -> str | None:
        return _refuse(graph, node, chosen(graph, node))

    def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
        return _lower(ctx, node, chosen(ctx.graph, node))

    register(name, supports=supports, lower=lower)


# -- one operand


def _gelu(graph: Graph, node: Node) -> Rule:
    return Rule("gelu_tanh(x)" if node.args["approximate"] == "tanh" else "gelu_(x)")


def _bitwise_not(graph: Graph, node: Node) -> Rule:
    return Rule(None, "1 - x" if graph.values[node.outputs[0]].dtype == "bool" else "~x")


def _clamp(graph: Graph, node: Node) -> Rule:
    low, high = node.args.get("min"), node.args.get("max")
    floats = integers = "x"
    if low is not None:
        floats, integers = "maximum(x, y)", "max(x, y)"
    if high is not None:
        floats, integers = f"minimum({floats}, z)", f"min({integers}, z)"
    given = {"y": "min", "z": "max"}
    names = tuple(name for name in given.values() if name in node.args)
    if names == ("max",):  # clamp_max has no argument min
        floats, integers = "minimum(x, y)", "min(x, y)"
    return Rule(floats, integers, ("self", *names), clamp=True)


TRIPLE = ("self", "tensor1", "tensor2")

UNARY: dict[str, Rule | Chooser] = {
    "neg": Rule("-x", "-x"),
    "abs": Rule("abs(x)", "abs(x)"),
    "exp": Rule("exp_(x)", compute="float"),
    "exp2": Rule("exp2_(x)", compute="float"),
    "expm1": Rule("expm1_(x)", compute="float"),
    "log": Rule("log_(x)", compute="float"),
    "log2": Rule("log2_(x)", compute="float"),
    "log10": Rule("log10_(x)", compute="float"),
    "log1p": Rule("log1p_(x)", compute="float"),
    "sqrt": Rule("sqrt(x)", compute="float"),
    "rsqrt": Rule("inverseSqrt(x)", compute="float"),
    "reciprocal": Rule("1.0 / x", compute="float"),
    "sin": Rule("sin_(x)", compute="float"),
    "cos": Rule("cos_(x)", compute="float"),
    "tan": Rule("tan_(x)", compute="float"),
    "tanh": Rule("tanh_(x)", compute="float"),
    "sinh": Rule("sinh_(x)", compute="float"),
    "cosh": Rule("cosh_(x)", compute="float"),
    "asin": Rule("asin_(x)", compute="float"),
    "acos": Rule("acos_(x)", compute="float"),
    "atan": Rule("atan_(x)", compute="float"),
    "asinh": Rule("asinh_(x)", compute="float"),
    "acosh": Rule("acosh_(x)", compute="float"),
    "atanh": Rule("atanh_(x)", compute="float"),
    "erf": Rule("erf_(x)", compute="float"),
    "sigmoid": Rule("sigmoid_(x)", compute="float"),
    "silu": Rule("x * sigmoid_(x)"),
    "gelu": _gelu,
    "relu": Rule("maximum(x, 0.0)", "max(x, 0)"),
    "relu6": Rule("minimum(maximum(x, 0.0), 6.0)", "clamp(x, 0, 6)"),
    "hardtanh": Rule("minimum(maximum(x, y), z)", "min(max(x, y), z)", ("self", "min_val", "max_val"), clamp=True),
    "leaky_relu": Rule("select(x, x * params.p.x, x < 0.0)", p=("negative_slope",)),
    "elu": Rule(
        "select(x, params.p.x * expm1_(x * params.p.z), x <= 0.0) * params.p.y", p=("alpha", "scale", "input_scale")
    ),
    "hardswish": Rule("x * minimum(maximum(x + 3.0, 0.0), 6.0) / 6.0"),
    "hardsigmoid": Rule("minimum(maximum(x + 3.0, 0.0), 6.0) / 6.0"),
    "softplus": Rule(
        "select(softplus_(x * params.p.x) / params.p.x, x, x * params.p.x > params.p.y)", p=("beta", "threshold")
    ),
    "mish": Rule("mish_(x)"),
    "log_sigmoid": Rule("-softplus_(-x)"),
    "sign": Rule("select(select(0.0, 1.0, x > 0.0), -1.0, x < 0.0)", "sign(x)"),
    "floor": Rule("floor(x)", "x"),
    "ceil": Rule("ceil(x)", "x"),
    "round": Rule("round(x)", "x"),
    "trunc": Rule("trunc(x)", "x"),
    "frac": Rule("x - trunc(x)"),
    "square": Rule("x * x", "x * x"),
    "bitwise_not": _bitwise_not,
    "logical_not": Rule("x == 0.0", "x == 0", compute="in"),
    "isnan": Rule("is_nan(x)", "false", compute="in"),
    "isinf": Rule("is_inf(x)", "false", compute="in"),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "addcmul": Rule("x + params.p.x * y * z", "x + i32(params.p.x) * y * z", TRIPLE, p=("value",)),
    "addcdiv": Rule("x + params.p.x * (y / z)", None, TRIPLE, p=("value",)),
}
"""Operators whose only overload is `default` (operands may still be several)."""

# -- two operands

PAIR = ("self", "other")


def _pow(graph: Graph, node: Node) -> Rule:
    exponent = node.args["exponent"]
    args = ("self", "exponent")
    simple: dict[int | float, str] = {1: "x", 2: "x * x", 3: "x * x * x", 4: "(x * x) * (x * x)"}
    floats: dict[int | float, str] = {
        **simple,
        0.5: "sqrt(x)",
        -0.5: "inverseSqrt(x)",
        -1: "1.0 / x",
        -2: "1.0 / (x * x)",
    }
    if isinstance(exponent, int | float) and not isinstance(exponent, bool):
        # a square root differs from a power at -inf and -0 only: PyTorch, too, takes the root
        integer = simple.get(exponent, "pow_i(x, y)") if exponent >= 0 else None
        return Rule(floats.get(exponent, "pow_(x, y)"), integer, args)
    return Rule("pow_(x, y)", "pow_i(x, y)", args)


def _scaled(sign: str, reverse: bool = False) -> Chooser:
    """add, sub, rsub: `alpha` scales the right operand (the left one in rsub)."""

    def rule(graph: Graph, node: Node) -> Rule:
        one, two = ("y", "x") if reverse else ("x", "y")
        if node.args.get("alpha", 1) == 1:
            return Rule(f"{one} {sign} {two}", f"{one} {sign} {two}", PAIR)
        return Rule(f"{one} {sign} z * {two}", f"{one} {sign} z * {two}", (*PAIR, "alpha"))

    return rule


FLOOR = Rule("floor_divide_(x, y)", "floor_divide_i(x, y)", PAIR, divides="other")


def _div(graph: Graph, node: Node) -> Rule:
    mode = node.args.get("rounding_mode")
    if mode is None:
        return Rule("x / y", None, PAIR, "float")
    return FLOOR if mode == "floor" else Rule("trunc(x / y)", "x / y", PAIR, divides="other")


def _compare(sign: str) -> Rule:
    return Rule(f"x {sign} y", f"x {sign} y", PAIR, "in")


def _both(text: str) -> Rule:
    # naga compares NaN != 0 as false, so "is true" is written as !(x == 0)
    return Rule(text.replace("0", "0.0"), text, PAIR, "in")


def _choose(no: str, yes: str, args: tuple[str, ...]) -> Rule:
    return Rule(f"select({no}, {yes}, z != 0.0)", f"select({no}, {yes}, z != 0)", args)


BINARY: dict[str, tuple[Rule | Chooser, str]] = {
    "add": (_scaled("+"), "Tensor Scalar"),
    "sub": (_scaled("-"), "Tensor Scalar"),
    "rsub": (_scaled("-", reverse=True), "Tensor Scalar"),
    "mul": (Rule("x * y", "x * y", PAIR), "Tensor Scalar"),
    "div": (_div, "Tensor Scalar Tensor_mode Scalar_mode"),
    "floor_divide": (FLOOR, "default Scalar"),
    "fmod": (Rule("fmod_(x, y)", "fmod_i(x, y)", PAIR, divides="other"), "Tensor Scalar"),
    "remainder": (Rule("remainder_(x, y)", "remainder_i(x, y)", PAIR, divides="other"), "Tensor Scalar Scalar_Tensor"),
    "minimum": (Rule("minimum(x, y)", "min(x, y)", PAIR), "default"),
    "maximum": (Rule("maximum(x, y)", "max(x, y)", PAIR), "default"),
    "min": (Rule("minimum(x, y)", "min(x, y)", PAIR), "other"),
    "max": (Rule("maximum(x, y)", "max(x, y)", PAIR), "other"),
    "atan2": (Rule("atan2_(x, y)", None, PAIR, "float"), "default"),
    "bitwise_and": (Rule(None, "x & y", PAIR), "Tensor Scalar Scalar_Tensor"),
    "bitwise_or": (Rule(None, "x | y", PAIR), "Tensor Scalar Scalar_Tensor"),
    "bitwise_xor": (Rule(None, "x ^ y", PAIR), "Tensor Scalar Scalar_Tensor"),
    "bitwise_left_shift": (Rule(None, "shift_left(x, y)", PAIR), "Tensor Tensor_Scalar Scalar_Tensor"),
    "bitwise_right_shift": (Rule(None, "shift_right(x, y)", PAIR), "Tensor Tensor_Scalar Scalar_Tensor"),
    "logical_and": (_both("!(x == 0 || y == 0)"), "default"),
    "logical_or": (_both("!(x == 0 && y == 0)"), "default"),
    "logical_xor": (_both("(x == 0) != (y == 0)"), "default"),
    "eq": (_compare("=="), "Tensor Scalar"),
    "ne": (Rule("!(x == y)", "x != y", PAIR, "in"), "Tensor Scalar"),
    "lt": (_compare("<"), "Tensor Scalar"),
    "le": (_compare("<="), "Tensor Scalar"),
    "gt": (_compare(">"), "Tensor Scalar"),
    "ge": (_compare(">="), "Tensor Scalar"),
    "pow": (_pow, "Tensor_Scalar Scalar Tensor_Tensor"),
    "clamp": (_clamp, "Tensor"),
    "clamp_min": (_clamp, "Tensor"),
    "clamp_max": (_clamp, "Tensor"),
    "where": (_choose("y", "x", (*PAIR, "condition")), "self ScalarSelf ScalarOther Scalar"),
    "masked_fill": (_choose("x", "y", ("self", "value", "mask")), "Scalar Tensor"),
}
"""Rule and overloads."""

# -- casts

CASTS = ("aten._to_copy.default", "dim_order_ops._to_dim_order_copy.default", "aten.to.dtype")

_WIDENING = {"bf16": ("f32",), "f32": ("bf16", "f16"), "f16": ("f32",)}
_WIDENING |= {"bool": (), "i64": ("i32",), "i32": ("i64",), "i16": ("i32", "i64")}
_WIDENING |= {"i8": ("i16", "i32", "i64"), "u8": ("i16", "i32", "i64")}


def _cast(graph: Graph, node: Node) -> Rule:
    source, target = graph.value(node.args["self"]).dtype, graph.values[node.outputs[0]].dtype
    if source not in FLOATS:
        if target in FLOATS:
            return Rule(None, "f32(x)", compute="in", result="f32")
        return Rule(None, "x", compute="in", result="i32")
    if target in INTEGERS:
        return Rule("to_int(x)", compute="in", result="i32")
    return Rule("x", compute="in", result="f32")


def cast_view(graph: Graph, node: Node) -> str | None:
    """`self` where a device stores its values exactly as the result's dtype stores them.

    float32 to bfloat16 counts: bfloat16 is kept in f32, and is rounded where it leaves the device. So do float16 and
    float32, which are alike between operators; the pass that assigns storage declines where one is no temporary.
    """
    source, target = graph.value(node.args["self"]).dtype, graph.values[node.outputs[0]].dtype
    return "self" if source == target or target in _WIDENING.get(source, ()) else None


def _register_all() -> None:
    for name, rule in UNARY.items():
        _register(f"aten.{name}.default", rule)
    for name, (rule, overloads) in BINARY.items():
        for overload in overloads.split():
            _register(f"aten.{name}.{overload}", rule)
    register(
        *CASTS,
        supports=lambda graph, node: _refuse(graph, node, _cast(graph, node)),
        lower=lambda ctx, node: _lower(ctx, node, _cast(ctx.graph, node)),
        view=cast_view,
    )


_register_all()
