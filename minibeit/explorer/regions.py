"""Squares of patches that are masked one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WORK = 2.2e12  # products of all passes together: some ten seconds of two cores
BATCH = 8
Compute = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Regions:
    """The squares of `side` x `side` patches that cover a grid; those at its right and bottom edge may be smaller."""

    grid: tuple[int, int]
    side: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return -(-self.grid[0] // self.side), -(-self.grid[1] // self.side)

    @property
    def count(self) -> int:
        """How many regions there are."""
        return self.shape[0] * self.shape[1]

    def masks(self) -> np.ndarray:  # -> (count, P) bool
        """The patches of each region."""
        row, column = np.divmod(np.arange(self.grid[0] * self.grid[1]), self.grid[1])
        region = row // self.side * self.shape[1] + column // self.side
        return region == np.arange(self.count)[:, None]


def regions_for(grid: tuple[int, int], parameters: int, side: int | None = None, most: float = WORK) -> Regions:
    """The regions of a grid: single patches if the passes of a model of so many parameters stay within `most`, else
    the smallest squares with which they do.  `side` settles it.  Raises ValueError for a side that is no side.
    """
    if side is not None:
        if not 1 <= side <= max(grid):
            raise ValueError(f"mask_side: expected 1 to {max(grid)} patches, the grid's longer side, found {side}")
        return Regions(grid, side)
    one_pass = 2 * parameters * (1 + grid[0] * grid[1])
    fitting = (Regions(grid, side) for side in range(1, max(grid)))
    return next((regions for regions in fitting if regions.count * one_pass <= most), Regions(grid, max(grid)))


def covered(pixels: np.ndarray, masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Copies of an image, one for each mask, with its patches replaced by the image's mean colour.

    (C, height, width), (n, P) -> (n, C, height, width)
    """
    height, width = pixels.shape[1] // grid[0], pixels.shape[2] // grid[1]
    wide = masks.reshape(-1, 1, *grid).repeat(height, axis=2).repeat(width, axis=3)
    return np.where(wide, pixels.mean((1, 2), keepdims=True), pixels).astype(pixels.dtype)


def in_batches(masks: np.ndarray, compute: Compute, progress: Callable[[int, int], None]) -> list[np.ndarray]:
    """`compute` of all masks, some at a time; `progress` is told how many of them are done."""
    results = []
    for first in range(0, len(masks), BATCH):
        results.append(compute(masks[first : first + BATCH]))
        progress(min(first + BATCH, len(masks)), len(masks))
    return results
