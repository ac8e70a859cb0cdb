"""The relative position bias: one learned number per head and per offset between two patches.

It depends on the weights and the patch grid, never on the image, so it is made once per grid.  The (H, N, N) bias is
not made at all: an attention op gets the (R, H) table and the (N, N) index into its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..params import table_rows

Array = Any
Grid = tuple[int, int]


@dataclass(frozen=True)
class PositionBias:
    """bias[h, a, b] = table[index[a, b], h], for query token a and key token b."""

    table: Array  # (R, H)
    index: Array  # (N, N) int32
    grid: Grid  # (gh, gw)


def relative_position_index(ops: Any, grid: Grid) -> Array:  # -> (N, N) int32
    """Row of the bias table for every pair of tokens (query, key).

    Two patches at (ha, wa) and (hb, wb): (ha - hb + gh - 1) (2 gw - 1) + (wa - wb + gw - 1).  The last three rows are
    for [CLS] to a patch (R - 3), a patch to [CLS] (R - 2) and [CLS] to itself (R - 1).
    Source: BEiT section 2.1; Attention in microsoft/unilm beit/modeling_finetune.py.
    """
    gh, gw = grid
    P, R = gh * gw, table_rows(grid)
    row, column = ops.arange(P) // gw, ops.arange(P) % gw  # (P,) each
    down = row[:, None] - row[None, :] + gh - 1  # (P, P), 0 ... 2 gh - 2
    right = column[:, None] - column[None, :] + gw - 1
    index = ops.zeros((P + 1, P + 1), "int32")
    index[1:, 1:] = down * (2 * gw - 1) + right
    index[0, :] = R - 3
    index[:, 0] = R - 2
    index[0, 0] = R - 1
    return index


def resize_table(ops: Any, table: Array, old: Grid, new: Grid, compat: str | None = None) -> Array:  # (R, H) -> (R', H)
    """The table for another grid: bilinear between offsets, the three rows of the CLS token unchanged.

    transformers reads the offsets as (width, height) when it resizes, and always resizes: wrong for every grid that is
    not square, even at its native size.  `compat="transformers"` does the same.
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


def position_biases(
    ops: Any, shared: Array | None, tables: list[Array | None], old: Grid, new: Grid, compat: str | None = None
) -> tuple[PositionBias | None, ...]:
    """The bias of every block for grid `new`.  A shared table is added to a block's own: both are read alike."""
    if shared is None and all(table is None for table in tables):
        return (None,) * len(tables)
    index = relative_position_index(ops, new)

    def resized(table: Array | None) -> Array | None:
        return None if table is None else resize_table(ops, table, old, new, compat)

    common = resized(shared)
    biases = []
    for table in map(resized, tables):
        total = table if common is None else common if table is None else ops.add(common, table)
        biases.append(PositionBias(total, index, new))
    return tuple(biases)
