"""Matrix products x W^T with packed weights; bias, activation, layer scale and residual are applied to the hot tile."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .arguments import PLAIN, PRODUCT
from .machine_code import Kernel
from .memory import NOTHING, operand, result
from .operands import contiguous, rows
from .pack import PackedLinear
from .pool import get_num_threads
from .queue import run
from .target import LANES, MR, NR, STEPS

ROW_BLOCK = (204 if LANES == 16 else 102) // MR * MR  # rows that one task keeps in the second-level cache
TILE_BYTES = MR * NR * 4
_TASKS = 96
_LONG = 2000  # steps; two longer panels would not fit a second-level cache, so their products go in two halves
_SMALL = 1 << 20  # multiplications; some ten microseconds


_product = Kernel("minibeit.ops.numba_cpu.kernels.gemm", "product", arguments=PRODUCT)


def product(
    x: np.ndarray,
    layer: PackedLinear,
    mode: int = PLAIN,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    steps_per_sum: int = STEPS,
    into: np.ndarray | None = None,
) -> np.ndarray:  # (..., in) -> (..., out)
    """f(x W^T + b) in float32, f being `mode`: nothing, GELU, ReLU, or residual + scale * ( ).

    Sums are made of partial sums of `steps_per_sum` products.  The distance between the result's rows may be more than
    their length (see `memory.result`).  The result is written into `into`, whole images of such an array, if given.
    """
    x_rows, count, x_bytes = rows(x)
    y, y_rows, y_bytes = result((*x.shape[:-1], layer.out)) if into is None else (into, *rows(into)[::2])
    factors, addend, addend_bytes = NOTHING, NOTHING, 0
    if scale is not None:
        factors = operand(contiguous(scale))
    if residual is not None:
        addend, _, addend_bytes = rows(residual)
    (panels, bias), out, steps, threads = layer.operands, layer.out, layer.panels.shape[1], get_num_threads()
    half = steps // 2 if steps > _LONG and out % NR == 0 else 0
    if half:
        operands = PRODUCT.operands(x=x_rows, panels=panels, bias=bias, y=y_rows, scale=NOTHING, residual=NOTHING)
        tasks, numbers, small = _one_product(
            count, half, out, x_bytes, y_bytes, PLAIN, 0, 4 * NR * steps, steps_per_sum, False, threads
        )
        run(_product, tasks, operands, numbers, TILE_BYTES, small)
        x_rows, panels = x_rows.at(4 * half), panels.at(4 * NR * half)
    operands = PRODUCT.operands(x=x_rows, panels=panels, bias=bias, y=y_rows, scale=factors, residual=addend)
    tasks, numbers, small = _one_product(
        count, steps - half, out, x_bytes, y_bytes, mode, addend_bytes, 4 * NR * steps, steps_per_sum, half > 0, threads
    )
    run(_product, tasks, operands, numbers, TILE_BYTES, small)
    return y


@lru_cache(maxsize=256)
def _one_product(
    count: int,
    steps: int,
    out: int,
    x_bytes: int,
    y_bytes: int,
    mode: int,
    residual_bytes: int,
    panel_bytes: int,
    steps_per_sum: int,
    accumulate: bool,
    threads: int,
) -> tuple[int, tuple[int, ...], bool]:
    """(tasks, the kernel's numbers, whether they are `small` work), the same from block to block and image to image."""
    return _work(
        1, x_bytes=x_bytes, count=count, steps=steps, out=out, y_bytes=y_bytes, mode=mode,
        residual_bytes=residual_bytes, panel_bytes=panel_bytes, steps_per_sum=steps_per_sum,
        accumulate=int(accumulate), **row_layout(count, -(-out // NR), y_bytes, threads),
    )  # fmt: skip


def run_products(products: int, operands: tuple[Any, ...], **numbers: int) -> None:
    """Runs `products` products that differ only in addresses; operands and numbers are those of `PRODUCT`."""
    tasks, values, small = _work(products, **numbers)
    run(_product, tasks, operands, values, TILE_BYTES, small)


def _work(products: int, **numbers: int) -> tuple[int, tuple[int, ...], bool]:
    count, steps, out = numbers["count"], numbers["steps"], numbers["out"]
    panels = -(-out // NR)
    tasks = products * numbers["blocks"] * -(-panels // numbers["group"])
    return tasks, PRODUCT.numbers(**numbers), products * count * steps * out < _SMALL


def row_layout(count: int, panels: int, y_bytes: int, threads: int) -> dict[str, int]:
    """The numbers of `PRODUCT` for one product of rows that lie `y_bytes` apart: its tasks and where they write."""
    side, blocks, group = task_layout(count, panels, threads)
    return {
        "side": side, "blocks": blocks, "group": group, "unit": MR, "y_unit_bytes": MR * y_bytes,
        "x_product_bytes": 0, "y_pair_bytes": 0, "y_odd_bytes": 0,
    }  # fmt: skip


@lru_cache(maxsize=256)
def task_layout(count: int, panels: int, threads: int) -> tuple[int, int, int]:
    """(neighbouring blocks of rows that share a pass, blocks, panels per task) of `count` rows on `threads` threads.

    Rows are split into stripes that stay in a second-level cache while the panels pass, each thread having stripes of
    its own where that leaves them high enough.  A stripe is split into several neighbouring blocks where it takes that
    to make some 100 tasks, so that a thread that lost time is not waited for.
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
