"""Matrix products x W^T with packed weights; bias, activation, layer scale and residual are applied to the hot tile."""

from __future__ import annotations

import numpy as np
from numba import njit

from .kernels import task_kernel
from .memory import padded, rows
from .micro import MR, NR, STEPS, multiply_tile, prefetch_tile
from .pack import PackedLinear
from .pool import run
from .vector import LANES, arguments, fma, gelu, load, load_float, maximum, splat, store, store_float

PLAIN, GELU, RELU, RESIDUAL = 0, 1, 2, 3  # what follows + bias
ROW_BLOCK = 17 * MR  # rows that one task keeps in the second-level cache
TILE_BYTES = MR * NR * 4
_TASKS = 64
_SMALL = 1 << 20  # multiplications; some ten microseconds
_VECTOR = 4 * LANES
_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(error_model="numpy")
def _finish_tile(tile, count, mode, scale, residual, residual_bytes, c, c_bytes):
    """C[0:count, 0:NR] = f(tile); `scale` 0 stands for ones.  All addresses point at the tile's first column."""
    for j in range(0, NR * 4, _VECTOR):
        if mode == RESIDUAL:
            factor = load(scale + j) if scale != 0 else splat(_ONE)
            for i in range(count):
                value = load(tile + i * NR * 4 + j)
                store(c + i * c_bytes + j, fma(value, factor, load(residual + i * residual_bytes + j)))
        elif mode == GELU:
            for i in range(count):
                store(c + i * c_bytes + j, gelu(load(tile + i * NR * 4 + j)))
        elif mode == RELU:
            for i in range(count):
                store(c + i * c_bytes + j, maximum(splat(_ZERO), load(tile + i * NR * 4 + j)))


@njit(error_model="numpy")
def _finish_last_tile(tile, count, mode, scale, residual, residual_bytes, c, c_bytes, columns):
    """The same for a panel that reaches beyond the last column: f on the tile, then number by number."""
    if mode in (GELU, RELU):
        _finish_tile(tile, count, mode, 0, 0, 0, tile, NR * 4)
    for i in range(count):
        for n in range(columns):
            value = load_float(tile + (i * NR + n) * 4)
            if mode == RESIDUAL:
                factor = load_float(scale + 4 * n) if scale != 0 else _ONE
                value = value * factor + load_float(residual + i * residual_bytes + 4 * n)
            store_float(c + i * c_bytes + 4 * n, value)


def _product_kernel(args, task, thread):
    """One block of rows times one group of panels, of one of several products that differ only in addresses.

    Row i of block n of product p goes to
    c + n * c_block_bytes + i * c_bytes + p // 2 * c_pair_bytes + p % 2 * c_odd_bytes.
    """
    (
        scratch, scratch_bytes, a, a_bytes, count, steps, weights, bias, out, c, c_bytes, mode, scale, residual,
        residual_bytes, by_panel, group, block, c_block_bytes, a_product_bytes, c_pair_bytes, c_odd_bytes,
    ) = arguments(args, 22)  # fmt: skip
    tile = scratch + thread * scratch_bytes
    panels = (out + NR - 1) // NR
    groups, blocks = (panels + group - 1) // group, (count + block - 1) // block
    nth, here, first = task // (groups * blocks), task // groups % blocks, task % groups * group
    if by_panel != 0:  # all row blocks of one panel, then the next panel
        here, first = task % blocks, task // blocks % groups * group
    first_row, last = here * block, min(first + group, panels)
    rows_here = min(block, count - first_row)
    tiles = (rows_here + MR - 1) // MR
    ahead_step = (NR * 4 + tiles - 1) // tiles
    a += nth * a_product_bytes + first_row * a_bytes
    c += here * c_block_bytes + nth // 2 * c_pair_bytes + nth % 2 * c_odd_bytes
    residual += first_row * residual_bytes
    weights += nth * panels * steps * NR * 4
    for panel in range(first, last):
        b = weights + panel * steps * NR * 4
        following = b + steps * NR * 4 if panel + 1 < panels else b
        column, columns = panel * NR * 4, out - panel * NR
        scale_here = scale + column if scale != 0 else 0
        for i in range(0, rows_here, MR):
            rows = min(MR, rows_here - i)
            ahead = following + i // MR * steps * ahead_step
            here, residual_here = c + i * c_bytes + column, residual + i * residual_bytes + column
            direct = mode == PLAIN and columns >= NR
            target, target_bytes = (here, c_bytes) if direct else (tile, NR * 4)
            addend, addend_bytes = bias + column, 0
            prefetch_tile(here, c_bytes)
            if mode == RESIDUAL:
                prefetch_tile(residual_here, residual_bytes)
            for k in range(0, steps, STEPS):
                multiply_tile(
                    rows, a + i * a_bytes + 4 * k, a_bytes, b + k * NR * 4, NR * 4, target, target_bytes,
                    min(STEPS, steps - k), addend, addend_bytes, ahead + k * ahead_step, ahead_step,
                )  # fmt: skip
                addend, addend_bytes = target, target_bytes
            if columns < NR:
                _finish_last_tile(tile, rows, mode, scale_here, residual_here, residual_bytes, here, c_bytes, columns)
            elif not direct:
                _finish_tile(tile, rows, mode, scale_here, residual_here, residual_bytes, here, c_bytes)


_product = task_kernel(_product_kernel)


def product(
    x: np.ndarray,
    layer: PackedLinear,
    mode: int = PLAIN,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:  # (..., in) -> (..., out)
    """f(x W^T + b) in float32, f being `mode`: nothing, GELU, ReLU, or residual + scale * ( ).

    The result's rows may lie further apart than their length (see `memory.padded`).
    """
    x_rows, count, x_bytes = rows(x)
    y = padded((*x.shape[:-1], layer.out))
    y_bytes = rows(y)[2]
    if scale is not None:
        scale = np.ascontiguousarray(scale, np.float32)
    residual_address = residual_bytes = 0
    if residual is not None:
        residual, _, residual_bytes = rows(residual)
        residual_address = residual.ctypes.data
    by_panel, group, block = task_layout(count, layer.panels.shape[0])
    run_products(
        1, (x_rows.ctypes.data, x_bytes, count, layer.steps, *layer.addresses, layer.out),
        (y.ctypes.data, y_bytes, mode, 0 if scale is None else scale.ctypes.data, residual_address, residual_bytes),
        (by_panel, group, block, block * y_bytes, 0, 0, 0),
    )  # fmt: skip
    return y


def run_products(number: int, inputs: tuple[int, ...], outputs: tuple[int, ...], layout: tuple[int, ...]) -> None:
    """Runs `number` products; see `_product_kernel` for the arguments, in its order."""
    count, out, group, block = inputs[2], inputs[6], layout[1], layout[2]
    panels = -(-out // NR)
    tasks = number * -(-count // block) * -(-panels // group)
    small = number * count * inputs[3] * out < _SMALL
    run(_product, tasks, (*inputs, *outputs, *layout), TILE_BYTES, small)


def task_layout(count: int, panels: int) -> tuple[int, int, int]:
    """(by panel?, panels per task, rows per task) for a product of `count` rows.

    Some 64 tasks or more where there is work for them, so that a thread that lost time is not waited for.  Few rows go
    panel by panel, so that a weight comes from memory once; many go block by block, so that a block of rows stays in
    the second-level cache while the panels pass.  Blocks are of equal height, so that none is a narrow rest.
    """
    tiles = -(-count // MR)
    few = count < 1.5 * ROW_BLOCK
    blocks = min(-(-_TASKS // panels), max(1, tiles // 4)) if few else round(count / ROW_BLOCK)
    block = -(-tiles // blocks) * MR
    return int(few), 1 if few else panel_group(panels, -(-count // block)), block


def panel_group(panels: int, blocks: int) -> int:
    """Panels per task for `blocks` blocks of rows."""
    return max(1, min(8, panels * blocks // _TASKS))
