"""One block of a matrix product x W^T; what follows the product is applied while the tile is hot."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..gemm import GELU, PLAIN, RELU, RESIDUAL
from ..target import LANES, MR, NR
from .micro import multiply_tile
from .vector import arguments, fma, gelu, load, load_float, maximum, splat, store, store_float

_VECTOR = 4 * LANES
_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(error_model="numpy")
def _finish_tile(tile, count, mode, scale, residual, residual_bytes, c, c_bytes):
    """C[0:count, 0:NR] = f(tile); `scale` 0 stands for ones.  All addresses point at the tile's first column."""
    for i in range(count):
        row, target = tile + i * NR * 4, c + i * c_bytes
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


def product(args, task, thread):
    """One block of rows times one group of panels, of one of several products that differ only in addresses.

    Rows come in units of `unit` rows, which are parted evenly into `blocks`; `side` blocks after one another go through
    the panels side by side.  `at_once` steps are summed in registers, then added to those before.  With `onto` the
    product is added to what is in C, in place of the bias.  Row i of unit n of product p goes to
    c + n * c_unit_bytes + i * c_bytes + p // 2 * c_pair_bytes + p % 2 * c_odd_bytes.
    """
    (
        scratch, scratch_bytes, a, weights, bias, c, scale, residual, a_bytes, count, steps, out, c_bytes, mode,
        residual_bytes, side, blocks, group, unit, c_unit_bytes, a_product_bytes, c_pair_bytes, c_odd_bytes,
        panel_bytes, at_once, onto,
    ) = arguments(args, 26)  # fmt: skip
    tile = scratch + thread * scratch_bytes
    panels, units = (out + NR - 1) // NR, (count + unit - 1) // unit
    groups = (panels + group - 1) // group
    nth, first = task // (groups * blocks), task // side % groups * group
    beside = task % side
    block = task // (side * groups) % (blocks // side) * side + beside
    first_unit = block * units // blocks
    first_row, last = first_unit * unit, min(first + group, panels)
    rows_here = min((block + 1) * units // blocks * unit, count) - first_row
    tiles = (rows_here + MR - 1) // MR
    ahead_step = (NR * 4 + side * tiles - 1) // (side * tiles)
    a += nth * a_product_bytes + first_row * a_bytes
    c += first_unit * c_unit_bytes + nth // 2 * c_pair_bytes + nth % 2 * c_odd_bytes
    residual += first_row * residual_bytes
    weights += nth * panels * panel_bytes
    for panel in range(first, last):
        b = weights + panel * panel_bytes
        following = b + panel_bytes if panel + 1 < panels else b
        column, columns = panel * NR * 4, out - panel * NR
        scale_here = scale + column if scale != 0 else 0
        for i in range(0, rows_here, MR):
            rows = min(MR, rows_here - i)
            ahead = following + (beside * tiles + i // MR) * steps * ahead_step
            here, residual_here = c + i * c_bytes + column, residual + i * residual_bytes + column
            direct = mode == PLAIN and columns >= NR
            target, target_bytes = (here, c_bytes) if direct else (tile, NR * 4)
            addend, addend_bytes = (here, c_bytes) if onto != 0 else (bias + column, 0)
            touch, touch_bytes = here, c_bytes  # first, as it may be the addend; the residual comes last
            for k in range(0, steps, at_once):
                multiply_tile(
                    rows, a + i * a_bytes + 4 * k, a_bytes, b + k * NR * 4, target, target_bytes,
                    min(at_once, steps - k), addend, addend_bytes, ahead + k * ahead_step, ahead_step,
                    touch, touch_bytes,
                )  # fmt: skip
                addend, addend_bytes = target, target_bytes
                if mode == RESIDUAL:
                    touch, touch_bytes = residual_here, residual_bytes
            if columns < NR:
                _finish_last_tile(tile, rows, mode, scale_here, residual_here, residual_bytes, here, c_bytes, columns)
            elif not direct:
                _finish_tile(tile, rows, mode, scale_here, residual_here, residual_bytes, here, c_bytes)
