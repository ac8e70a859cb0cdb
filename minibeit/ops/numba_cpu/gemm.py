"""Matrix products x W^T with packed weights; bias, activation, layer scale and residual are applied to the hot tile."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .machine_code import Kernel
from .memory import NOTHING, Operand, operand, result
from .operands import contiguous, rows
from .pack import PackedLinear
from .pool import get_num_threads
from .queue import run
from .target import LANES, MR, NR, STEPS

PLAIN, GELU, RELU, RESIDUAL = 0, 1, 2, 3  # what follows + bias
ROW_BLOCK = (204 if LANES == 16 else 102) // MR * MR  # rows that one task keeps in the second-level cache
TILE_BYTES = MR * NR * 4
_TASKS = 96
_LONG = 2000  # steps; two longer panels would not fit a second-level cache, so their products go in two halves
_SMALL = 1 << 20  # multiplications; some ten microseconds


_product = Kernel("minibeit.ops.numba_cpu.kernels.gemm", "product")


def product(
    x: np.ndarray,
    layer: PackedLinear,
    mode: int = PLAIN,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    at_once: int = STEPS,
) -> np.ndarray:  # (..., in) -> (..., out)
    """f(x W^T + b) in float32, f being `mode`: nothing, GELU, ReLU, or residual + scale * ( ).

    `at_once` products are summed in one go.  The result's rows may lie further apart than their length (see
    `memory.result`).
    """
    x_rows, count, x_bytes = rows(x)
    y, c, y_bytes = result((*x.shape[:-1], layer.out))
    factors, addend, addend_bytes = NOTHING, NOTHING, 0
    if scale is not None:
        factors = operand(contiguous(scale))
    if residual is not None:
        addend, _, addend_bytes = rows(residual)
    layout = row_layout(count, layer.panels.shape[0], y_bytes)
    (panels, bias), out, steps = layer.operands, layer.out, layer.steps
    panel_bytes = 4 * NR * steps
    half = steps // 2 if steps > _LONG and out % NR == 0 else 0
    if half:
        whole = (*layout, panel_bytes, at_once, 0)
        run_products(1, (x_rows, panels, bias, c), (x_bytes, count, half, out), (y_bytes, PLAIN, 0), whole)
        x_rows, panels = x_rows.at(4 * half), panels.at(4 * NR * half)
    operands, sizes = (x_rows, panels, bias, c, factors, addend), (x_bytes, count, steps - half, out)
    run_products(1, operands, sizes, (y_bytes, mode, addend_bytes), (*layout, panel_bytes, at_once, half))
    return y


def run_products(
    number: int,
    operands: tuple[Operand, ...],
    sizes: tuple[int, int, int, int],
    outputs: tuple[int, int, int],
    layout: tuple[int, ...],
) -> None:
    """Runs `number` products; see `kernels/gemm.py` for the arguments, in its order.  Scale and residual may lack."""
    (_, count, steps, out), blocks, group = sizes, layout[1], layout[2]
    panels = -(-out // NR)
    tasks = number * blocks * -(-panels // group)
    small = number * count * steps * out < _SMALL
    if len(operands) == 4:
        operands = (*operands, NOTHING, NOTHING)
    run(_product, tasks, operands, (*sizes, *outputs, *layout), TILE_BYTES, small)


def row_layout(count: int, panels: int, c_bytes: int) -> tuple[int, ...]:
    """The layout of one product whose rows all lie `c_bytes` apart, but for its last three numbers."""
    return (*task_layout(count, panels, get_num_threads()), MR, MR * c_bytes, 0, 0, 0)


@lru_cache(maxsize=256)
def task_layout(count: int, panels: int, threads: int) -> tuple[int, int, int]:
    """(blocks of rows side by side, blocks, panels per task) for a product of `count` rows on `threads` threads.

    Rows are cut into stripes that stay in a second-level cache while the panels pass, each thread having stripes of its
    own where that leaves them high enough.  A stripe goes as several blocks side by side where it takes that to make
    some 100 tasks, so that a thread that lost time is not waited for.
    """
    stripes = max(1, round(count / ROW_BLOCK))
    shared_out = -(-stripes // threads) * threads
    if count >= shared_out * ROW_BLOCK * 0.45:
        stripes = shared_out
    group = panel_group(panels, stripes)
    side = min(-(-_TASKS // (stripes * panels)), max(1, count // (4 * MR * stripes)))
    return side, stripes * side, group


def panel_group(panels: int, blocks: int) -> int:
    """Panels per task for `blocks` blocks of rows."""
    return max(1, min(8, panels * blocks // _TASKS))
