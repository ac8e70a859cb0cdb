"""The relative position bias: one learned number per head and per offset between two patches.

It depends on the weights and the patch grid, never on the image.  The (H, N, N) bias is never stored: attention gets
the (R, H) table and looks up its rows with the grid's `relative_position_index` (see ops/reference/arrays.py).
"""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..ops import Ops, PositionBias
from ..params import Beit

Array = Any
Grid = tuple[int, int]


def resize_table(ops: Ops, table: Array, old: Grid, new: Grid, compat: str | None = None) -> Array:  # (R, H) -> (R', H)
    """The table for another grid: bilinear between offsets, the three rows of the CLS token unchanged.

    transformers always resizes, and swaps height and width of the offsets: wrong for every grid that is not square,
    even at its native size.  `compat="transformers"` does the same.
    """
    height, width = 2 * old[0] - 1, 2 * old[1] - 1
    if compat == "transformers":
        height, width = width, height
    target = 2 * new[0] - 1, 2 * new[1] - 1
    if (height, width) == target:
        return table
    H = table.shape[1]
    maps = table[:-3].reshape(1, height, width, H).transpose(0, 3, 1, 2)  # (1, H, 2 gh - 1, 2 gw - 1)
    rows = ops.resize_bilinear(maps, target).transpose(0, 2, 3, 1).reshape(-1, H)
    return ops.concatenate([rows, table[-3:]], axis=0)


def position_biases(ops: Ops, p: Beit, config: BeitConfig, grid: Grid) -> list[PositionBias | None]:
    """The bias of every block for `grid`: the block's own table, the shared one, or the sum of both."""

    def resized(table: Array | None) -> Array | None:
        return None if table is None else resize_table(ops, table, config.grid, grid, config.compat)

    shared = resized(p.shared_bias_table)
    biases = []
    for own in (resized(block.bias_table) for block in p.encoder):
        table = own if shared is None else shared if own is None else ops.add(shared, own)
        biases.append(None if table is None else PositionBias(table, grid))
    return biases
