"""Squares of patches that are masked one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Floating-point operations of all passes together: some ten seconds of two cores, of one GPU.
WORK, WORK_IN_INT8, WORK_ON_GPU = 2.2e12, 7e12, 2e14
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

    def apart(self, least: int) -> np.ndarray:  # -> (n, P) bool
        """The masks of all regions, joined where there are `least` patches or more between them."""
        step = 1 + -(-least // self.side)
        row, column = np.divmod(np.arange(self.count), self.shape[1])
        group = row % step * step + column % step
        masks = self.masks()
        return np.stack([masks[group == number].any(0) for number in np.unique(group)])


def regions_for(grid: tuple[int, int], one_pass: float, side: int | None = None, most: float = WORK) -> Regions:
    """The regions of a grid: single patches if all passes, of `one_pass` operations each, stay within `most`, else the
    smallest squares with which they do.  `side` settles it.  Raises ValueError for a side that is no side.
    """
    if side is not None:
        if not 1 <= side <= max(grid):
            raise ValueError(f"mask_side: expected 1 to {max(grid)} patches, the grid's longer side, found {side}")
        return Regions(grid, side)
    fitting = (Regions(grid, side) for side in range(1, max(grid)))
    return next((regions for regions in fitting if regions.count * one_pass <= most), Regions(grid, max(grid)))


def operations(model: Any, grid: tuple[int, int]) -> float:
    """The floating-point operations of a forward pass: two for each parameter and token, and attention's products."""
    config, tokens = model.config, 1 + grid[0] * grid[1]
    attention = 4 * tokens * tokens * config.hidden_size * config.num_hidden_layers
    return 2 * model.num_parameters() * tokens + attention


def work_of(model: Any) -> float:
    """How many operations all passes of a model may take together."""
    if model.ops.backend == "cupy":
        return WORK_ON_GPU
    return WORK_IN_INT8 if model.dtype == "int8" else WORK


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
