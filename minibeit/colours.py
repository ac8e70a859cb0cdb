"""Colours for classes."""

from __future__ import annotations

import numpy as np

from .labels import palette

Colour = tuple[int, int, int]
ADE20K_CLASSES = 150
DARKEST, PALEST = 0.35, 0.95  # lightness in Oklab, 0 to 1


def class_colours(count: int) -> list[Colour]:
    """A colour per class: ADE20K's own for its 150 classes, otherwise colours as distinct as possible."""
    return palette("ade20k") if count == ADE20K_CLASSES else distinct_colours(count)


def distinct_colours(count: int) -> list[Colour]:
    """`count` colours, always the same, neither dark nor pale, each as far as possible from those before it.

    Chosen by farthest points in the Oklab space (Ottosson 2020), whose distances approximate perceived differences.
    """
    levels = np.linspace(0, 255, 14).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    places = _oklab(grid)
    clear = (places[:, 0] > DARKEST) & (places[:, 0] < PALEST)
    grid, places = grid[clear], places[clear]
    nearest = np.full(len(grid), np.inf)
    for taken in _oklab(np.array([[0.0, 0, 0], [255, 255, 255]])):
        nearest = np.minimum(nearest, np.sum((places - taken) ** 2, axis=1))
    colours = []
    for _ in range(count):
        best = int(nearest.argmax())
        colours.append((int(grid[best, 0]), int(grid[best, 1]), int(grid[best, 2])))
        nearest = np.minimum(nearest, np.sum((places - places[best]) ** 2, axis=1))
    return colours


def _oklab(rgb: np.ndarray) -> np.ndarray:  # (n, 3) 0..255 -> (n, 3)
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    mixed = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    return np.cbrt(linear @ cones.T) @ mixed.T
