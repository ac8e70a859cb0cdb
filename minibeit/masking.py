"""Block-wise masking: which patches are hidden from a BEiT in pre-training."""

from __future__ import annotations

import math

import numpy as np

TRIES = 10
PAPER_PATCHES, PAPER_LEAST = 14 * 14, 16  # the paper's grid, and its smallest block there


def block_mask(
    grid: tuple[int, int],
    count: int,
    rng: np.random.Generator,
    least: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """A boolean mask (gh, gw) of at most `count` patches, made of rectangular blocks.

    Until `count` patches are masked, a block is drawn: its area uniform between `least` and the number still to mask,
    its height / width log-uniform in `aspect`, its position uniform.  It is accepted if both sides are shorter than the
    grid's, it masks at least one new patch, and the total does not exceed `count`.  After ten rejections in a row the
    mask is left as it is, so some have a few patches fewer (with 75 on 14x14 a third of the masks; 74.5 on average).
    `least` defaults to 16 for the 14x14 patches of the paper and is scaled with the number of patches.
    Raises ValueError for a count that exceeds the grid.
    Source: BEiT section 2.3, algorithm 1, as its published code draws it (unilm beit/masking_generator).
    """
    gh, gw = grid
    if gh < 1 or gw < 1 or not 0 <= count <= gh * gw:
        raise ValueError(f"count: expected 0 to {gh * gw} patches of a grid of {gh}x{gw}, found {count}")
    if least is None:
        least = max(1, round(PAPER_LEAST * gh * gw / PAPER_PATCHES))
    mask = np.zeros(grid, bool)
    while mask.sum() < count and _add_block(mask, int(count - mask.sum()), rng, least, aspect):
        pass
    return mask


def nonempty_block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:  # -> (gh, gw)
    """A `block_mask` of at least one patch, even where every block was too large for the grid."""
    mask = block_mask(grid, count, rng)
    if not mask.any():
        mask.flat[rng.integers(mask.size)] = True
    return mask


def _add_block(mask: np.ndarray, most: int, rng: np.random.Generator, least: int, aspect: tuple[float, float]) -> bool:
    """Masks one more block of at most `most` new patches; False if every try was rejected."""
    gh, gw = mask.shape
    for _ in range(TRIES):
        area = rng.uniform(min(least, most), max(least, most))
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < height <= max(gh - 1, 1) and 0 < width <= max(gw - 1, 1)):  # a side of one patch cannot be smaller
            continue
        top, left = rng.integers(gh - height + 1), rng.integers(gw - width + 1)
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - block.sum() <= most:
            block[...] = True
            return True
    return False
