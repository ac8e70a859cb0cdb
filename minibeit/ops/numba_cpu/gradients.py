"""Matrices turned and packed where they are used, the products of a linear layer's backward, GELU, layer scale.

With g the cotangent of y = x W^T + b, all tokens being rows: dx = g W has W in panels, dW = g^T x has g turned and x in
panels.  Weights change at every step, so their panels are made anew for each product and given back after it; that
takes some percent of the product's time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import gemm
from .arguments import PLAIN, PRODUCT, RESIDUAL
from .gradient_arguments import COMBINE, GRADIENT_ROWS, PACK_COLUMNS, SCALE_GRADIENT, TURN
from .machine_code import Kernel
from .memory import NOTHING, Operand, aligned, operand, result
from .operands import contiguous, rows
from .pack import PackedLinear, padded_bias
from .pool import get_num_threads
from .queue import run
from .target import LANES, NR, STEPS

_LONGEST = 2000  # rows of g and x whose products are summed in one go; longer panels leave the second-level cache

_pack_columns = Kernel("minibeit.ops.numba_cpu.kernels.gradients", "pack_columns", arguments=PACK_COLUMNS)
_turn = Kernel("minibeit.ops.numba_cpu.kernels.gradients", "turn", arguments=TURN)
_combine = Kernel("minibeit.ops.numba_cpu.kernels.gradients", "combine", arguments=COMBINE)
_scale_gradient = Kernel("minibeit.ops.numba_cpu.kernels.gradients", "scale_gradient", arguments=SCALE_GRADIENT)


@dataclass(frozen=True)
class Turned:
    """A matrix (rows, columns) turned, and the sums of its columns: what is left of g for dW and db."""

    rows: Operand
    row_bytes: int
    shape: tuple[int, int]  # (columns, rows)
    sums: np.ndarray  # (columns,)


def column_panels(x: np.ndarray) -> np.ndarray:  # (..., n) -> (ceil(n / NR), rows, NR)
    """The matrix of all rows of x in panels of NR of its columns."""
    x_rows, count, row_bytes = rows(x)
    columns = x.shape[-1]
    panels = -(-columns // NR)
    packed = result((panels * count * NR,))[0].reshape(panels, count, NR)
    operands = PACK_COLUMNS.operands(matrix=x_rows, panels=operand(packed))
    run(_pack_columns, panels, operands, PACK_COLUMNS.numbers(row_bytes=row_bytes, rows=count, columns=columns))
    return packed


def turned(g: np.ndarray) -> Turned:  # (..., n)
    """The matrix of all rows of g turned, beside the sums of its columns."""
    g_rows, count, row_bytes = rows(g)
    columns = g.shape[-1]
    _, target, turned_bytes = result((columns, count))
    sums = aligned((columns,))
    operands = TURN.operands(matrix=g_rows, turned=target, sums=operand(sums))
    numbers = TURN.numbers(row_bytes=row_bytes, turned_bytes=turned_bytes, rows=count, columns=columns)
    run(_turn, -(-columns // LANES), operands, numbers)
    return Turned(target, turned_bytes, (columns, count), sums)


def input_gradient(
    g: np.ndarray, weight: np.ndarray, onto: np.ndarray | None = None
) -> np.ndarray:  # (..., out), (out, in) -> (..., in)
    """g W, added to `onto` if given."""
    layer = PackedLinear(column_panels(weight), padded_bias(None, weight.shape[1]), weight.shape[1])
    return gemm.product(g, layer) if onto is None else gemm.product(g, layer, RESIDUAL, None, onto)


def weight_gradient(
    g: Turned,
    panels: np.ndarray,
    columns: int,
    shift: int = 0,
    into: np.ndarray | None = None,
    accumulate: bool = False,
) -> np.ndarray:  # -> (out, columns)
    """g^T x from g turned and x in `column_panels`, written `into` an array or added to it (`columns` whole panels).

    Row r of g meets row r + `shift` of x where there is one.
    """
    out, steps = g.shape
    dw = aligned((out, columns)) if into is None else into
    c, b, bias = operand(dw), operand(panels), operand(padded_bias(None, columns))
    layout = gemm.row_layout(out, panels.shape[0], 4 * columns, get_num_threads())
    begin, common = max(0, -shift), steps - abs(shift)
    parts = -(-common // _LONGEST) if columns % NR == 0 else 1  # a narrower panel cannot be added to what is there
    for part in range(parts):
        first, last = begin + part * common // parts, begin + (part + 1) * common // parts
        operands = PRODUCT.operands(
            x=g.rows.at(4 * first),
            panels=b.at(4 * NR * (first + shift)),
            bias=bias,
            y=c,
            scale=NOTHING,
            residual=NOTHING,
        )
        gemm.run_products(
            1, operands, x_bytes=g.row_bytes, count=out, steps=last - first, out=columns, y_bytes=4 * columns,
            mode=PLAIN, residual_bytes=0, panel_bytes=4 * NR * steps, steps_per_sum=STEPS,
            accumulate=int(part > 0 or accumulate), **layout,
        )  # fmt: skip
    return dw


def combined(a: np.ndarray, b: np.ndarray, mode: int) -> np.ndarray:  # (..., n), (..., n) or (n,) -> (..., n)
    """gelu(a), a gelu'(b) or a b."""
    a_rows, count, a_bytes = rows(a)
    b_rows, _, b_bytes = rows(b)
    y, target, y_bytes = result(a.shape)
    numbers = COMBINE.numbers(
        a_bytes=a_bytes,
        b_bytes=b_bytes if b.ndim > 1 else 0,
        y_bytes=y_bytes,
        count=count,
        width=a.shape[-1],
        mode=mode,
    )
    run(_combine, -(-count // GRADIENT_ROWS), COMBINE.operands(a=a_rows, b=b_rows, y=target), numbers, 8 * LANES)
    return y


def scaled_gradient(gradient: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:  # -> (out,)
    """The sum of G W over each row; then G (out, in), in place, is multiplied by the scale of its rows."""
    count, width = gradient.shape
    g_rows, _, g_bytes = rows(gradient)
    w_rows, _, w_bytes = rows(weight)
    products = aligned((count,))
    operands = SCALE_GRADIENT.operands(
        gradient=g_rows, weight=w_rows, scale=operand(contiguous(scale)), products=operand(products)
    )
    numbers = SCALE_GRADIENT.numbers(g_bytes=g_bytes, w_bytes=w_bytes, count=count, width=width)
    run(_scale_gradient, -(-count // GRADIENT_ROWS), operands, numbers)
    return products
