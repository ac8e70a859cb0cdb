"""One block of a matrix product x W^T; what follows the product is applied while the tile is hot."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..arguments import GELU, PLAIN, PRODUCT, RELU, RESIDUAL
from ..target import LANES, MR, NR
from .micro import multiply_tile
from .vector import fma, gelu, load, load_float, maximum, reader, splat, store, store_float

_VECTOR = 4 * LANES
_ZERO, _ONE = np.float32(0), np.float32(1)
_read = reader(PRODUCT)


@njit(error_model="numpy")
def finish_tile(tile, count, mode, scale, residual, residual_bytes, y, y_bytes):
    """y[0:count, 0:NR] = f(tile); `scale` 0 stands for ones.  All addresses point at the tile's first column."""
    for i in range(count):
        row, target = tile + i * NR * 4, y + i * y_bytes
        if mode == RESIDUAL:
            for j in range(0, NR * 4, _VECTOR):
                factor = load(scale + j) if scale != 0 else splat(_ONE)
                store(target + j, fma(load(row + j), factor, load(residual + i * residual_bytes + j)))
        elif mode == GELU:
            for j in range(0, NR * 4, _VECTOR):
                store(target + j, gelu(load(row + j)))
        elif mode == RELU:
            for j in range(0, NR * 4, _VECTOR):
                store(target + j, maximum(splat(_ZERO), load(row + j)))


@njit(error_model="numpy")
def finish_last_tile(tile, count, mode, scale, residual, residual_bytes, y, y_bytes, columns):
    """The same for a panel that reaches beyond the last column: f on the tile, then element by element."""
    if mode in (GELU, RELU):
        finish_tile(tile, count, mode, 0, 0, 0, tile, NR * 4)
    for i in range(count):
        for n in range(columns):
            value = load_float(tile + (i * NR + n) * 4)
            if mode == RESIDUAL:
                factor = load_float(scale + 4 * n) if scale != 0 else _ONE
                value = value * factor + load_float(residual + i * residual_bytes + 4 * n)
            store_float(y + i * y_bytes + 4 * n, value)


def product(args, task, thread):
    """One block of rows times one group of panels, of one of several products that differ only in addresses.

    Units of rows are split evenly into blocks; `side` neighbouring blocks share one pass over the panels.  Row i of
    unit n of product p goes to y + n * y_unit_bytes + i * y_bytes + p // 2 * y_pair_bytes + p % 2 * y_odd_bytes.
    """
    p = _read(args, thread)
    tile, side, blocks, unit, steps = p.scratch, p.side, p.blocks, p.unit, p.steps
    x_bytes, y_bytes, residual_bytes, mode = p.x_bytes, p.y_bytes, p.residual_bytes, p.mode
    panels, units = (p.out + NR - 1) // NR, (p.count + unit - 1) // unit
    groups = (panels + p.group - 1) // p.group
    nth, first = task // (groups * blocks), task // side % groups * p.group
    beside = task % side
    block = task // (side * groups) % (blocks // side) * side + beside
    first_unit = block * units // blocks
    first_row, last = first_unit * unit, min(first + p.group, panels)
    rows_here = min((block + 1) * units // blocks * unit, p.count) - first_row
    tiles = (rows_here + MR - 1) // MR
    ahead_step = (NR * 4 + side * tiles - 1) // (side * tiles)
    x = p.x + nth * p.x_product_bytes + first_row * x_bytes
    y = p.y + first_unit * p.y_unit_bytes + nth // 2 * p.y_pair_bytes + nth % 2 * p.y_odd_bytes
    residual = p.residual + first_row * residual_bytes
    weights = p.panels + nth * panels * p.panel_bytes
    for panel in range(first, last):
        b = weights + panel * p.panel_bytes
        following = b + p.panel_bytes if panel + 1 < panels else b
        column, columns = panel * NR * 4, p.out - panel * NR
        scale_here = p.scale + column if p.scale != 0 else 0
        for i in range(0, rows_here, MR):
            rows = min(MR, rows_here - i)
            ahead = following + (beside * tiles + i // MR) * steps * ahead_step
            here, residual_here = y + i * y_bytes + column, residual + i * residual_bytes + column
            direct = mode == PLAIN and columns >= NR
            target, target_bytes = (here, y_bytes) if direct else (tile, NR * 4)
            addend, addend_bytes = (here, y_bytes) if p.accumulate != 0 else (p.bias + column, 0)
            touch, touch_bytes = here, y_bytes  # first, as it may be the addend; the residual comes last
            for k in range(0, steps, p.steps_per_sum):
                multiply_tile(
                    rows, x + i * x_bytes + 4 * k, x_bytes, b + k * NR * 4, target, target_bytes,
                    min(p.steps_per_sum, steps - k), addend, addend_bytes, ahead + k * ahead_step, ahead_step,
                    touch, touch_bytes,
                )  # fmt: skip
                addend, addend_bytes = target, target_bytes
                if mode == RESIDUAL:
                    touch, touch_bytes = residual_here, residual_bytes
            if columns < NR:
                finish_last_tile(tile, rows, mode, scale_here, residual_here, residual_bytes, here, y_bytes, columns)
            elif not direct:
                finish_tile(tile, rows, mode, scale_here, residual_here, residual_bytes, here, y_bytes)
