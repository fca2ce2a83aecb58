"""Matrix products in numbers: `Product`, into which every operator of matmul.py is put."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from ..backend.graph import Arg, Node
from .base import Lowering, Param
from .gemm import Four


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product in numbers.

    Attributes:
        a, b, out, bias: value indices; bias may be None.
        a_type, b_type, bias_type, out_type: WGSL element types.
        m, n, k: sizes of one matrix product.
        b_nk: B is [.., N, K] (as the weight of a linear layer) instead of [.., K, N].
        sizes: batch sizes, outermost first, padded with 1 in front.
        a_strides, b_strides, bias_strides: elements per step of each batch index, 0 where broadcast.
        bias_row, bias_col: elements per row and column of the bias, 0 where broadcast.
        alpha, beta: factors of the product and of the bias.
    """

    a: int
    b: int
    out: int
    a_type: str
    b_type: str
    out_type: str
    m: int
    n: int
    k: int
    b_nk: bool
    bias: int | None = None
    bias_type: str = "f32"
    sizes: Four = (1, 1, 1, 1)
    a_strides: Four = (0, 0, 0, 0)
    b_strides: Four = (0, 0, 0, 0)
    bias_strides: Four = (0, 0, 0, 0)
    bias_row: int = 0
    bias_col: int = 0
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def batch(self) -> int:
        return prod(self.sizes)

    def params(self) -> dict[str, Param]:
        """The fields that all kernels of the family share."""
        return {
            "sizes": self.sizes,
            "a_strides": self.a_strides,
            "b_strides": self.b_strides,
            "bias_strides": self.bias_strides,
            "m": self.m,
            "n": self.n,
            "k": self.k,
            "bias_row": self.bias_row,
            "bias_col": self.bias_col,
            "alpha": self.alpha,
            "beta": self.beta,
        }

    def bindings(self) -> dict[str, int]:
        found = {"a": self.a, "b": self.b, "out": self.out}
        return found if self.bias is None else {**found, "bias": self.bias}

    def types(self) -> dict[str, str]:
        return {"A": self.a_type, "B": self.b_type, "Bias": self.bias_type, "Out": self.out_type}


def batch_strides(shape: Sequence[int], batch: Sequence[int], matrix: int) -> list[int]:
    """Element strides of an operand's batch axes `shape`, aligned right to the result's `batch` axes.

    `matrix` is the number of elements of one matrix of the operand. Broadcast axes get 0.
    """
    strides = [0] * len(batch)
    step = matrix
    for i, size in enumerate(reversed(shape)):
        strides[-1 - i] = 0 if size == 1 else step
        step *= size
    return strides


def collapse(sizes: Sequence[int], operands: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Drop axes of size 1, merge neighbours that all operands walk as one; returns (sizes, strides of each operand)."""
    kept_sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in operands]
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        steps = [strides[axis] for strides in operands]
        if kept_sizes and all(have[-1] == step * size for have, step in zip(kept, steps, strict=True)):
            kept_sizes[-1] *= size
            for have, step in zip(kept, steps, strict=True):
                have[-1] = step
        else:
            kept_sizes.append(size)
            for have, step in zip(kept, steps, strict=True):
                have.append(step)
    return kept_sizes, kept


def _four(values: Sequence[int], fill: int) -> Four:
    padded = [fill] * (4 - len(values)) + list(values)
    return padded[0], padded[1], padded[2], padded[3]


def make_product(
    ctx: Lowering,
    node: Node,
    a: Arg,
    b: Arg,
    *,
    b_nk: bool = False,
    bias: Arg = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Product:
    """The `Product` of two value arguments whose shapes broadcast as `torch.matmul`'s.

    A vector A is one row, a vector B one column. With `b_nk`, B's last two axes are [N, K]. `bias` is broadcast to the
    result's shape.
    """
    out = ctx.out(node)
    a_shape, b_shape = ctx.shape(a), ctx.shape(b)
    a_vector, b_vector = len(a_shape) == 1, len(b_shape) == 1
    m, k = (1, a_shape[0]) if a_vector else (a_shape[-2], a_shape[-1])
    n = 1 if b_vector else b_shape[-2 if b_nk else -1]
    out_shape = list(ctx.shape(out))
    if b_vector:
        out_shape.append(1)
    if a_vector:
        out_shape.insert(len(out_shape) - 1, 1)
    batch = out_shape[:-2]
    a_steps = batch_strides(a_shape[:-2], batch, m * k)
    b_steps = batch_strides(b_shape[:-2], batch, k * n)
    bias_steps, bias_row, bias_col = [0] * len(batch), 0, 0
    if bias is not None:
        shape = list(ctx.shape(bias))
        if b_vector and shape:
            shape.append(1)
        shape = [1] * (2 - len(shape)) + shape
        bias_col = 0 if shape[-1] == 1 else 1
        bias_row = 0 if shape[-2] == 1 else shape[-1]
        bias_steps = batch_strides(shape[:-2], batch, shape[-2] * shape[-1])
    sizes, (a_steps, b_steps, bias_steps) = collapse(batch, (a_steps, b_steps, bias_steps))
    made = Product(
        ctx.id(a),
        ctx.id(b),
        out.value,
        ctx.wgsl_type(a),
        ctx.wgsl_type(b),
        ctx.wgsl_type(out),
        m,
        n,
        k,
        b_nk or b_vector,
        None if bias is None else ctx.id(bias),
        "f32" if bias is None else ctx.wgsl_type(bias),
        _four(sizes, 1),
        _four(a_steps, 0),
        _four(b_steps, 0),
        _four(bias_steps, 0),
        bias_row,
        bias_col,
        alpha,
        beta,
    )
    return simplify(made)


def simplify(p: Product) -> Product:
    """The same product, with a batch over one B folded into the rows, or a single column turned into a single row."""
    shared = not any(p.b_strides) and not any(p.bias_strides) and p.bias_row == 0
    if p.batch > 1 and shared and p.sizes[:3] == (1, 1, 1) and p.a_strides[3] == p.m * p.k:
        none = (0, 0, 0, 0)
        p = replace(p, m=p.batch * p.m, sizes=(1, 1, 1, 1), a_strides=none, b_strides=none, bias_strides=none)
    if p.n == 1:
        p = replace(p, b_nk=True)  # one column is one row of [N, K]
    if p.n == 1 and p.m > 1:  # A's rows are then the columns of a transposed product; B and the result are vectors
        p = replace(
            p,
            a=p.b,
            b=p.a,
            a_type=p.b_type,
            b_type=p.a_type,
            m=1,
            n=p.m,
            a_strides=p.b_strides,
            b_strides=p.a_strides,
            bias_row=p.bias_col,
            bias_col=p.bias_row,
        )
    return p
