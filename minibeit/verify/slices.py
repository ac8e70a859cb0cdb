"""The error of single slices (a feature, a token, a head, a channel), beside what float32 loses in the same slice.

A fault that is small and local, such as one wrong weight or a feature in half precision beneath one that is a thousand
times larger, drowns in the error of the whole array.  In its own slice it stands alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import budget

LEAST = 32  # different elements of a slice; the rms of fewer scatters
MANY = 1 << 16  # elements of an array; so many are taken to be different


@dataclass(frozen=True)
class SliceError:
    """The slice that is furthest off: its place, and its rms error in units of the yardstick's in that slice."""

    axis: int
    index: int
    ratio: float


def worst_slice(found: np.ndarray, single: np.ndarray, exact: np.ndarray, activated: bool = False) -> SliceError | None:
    """The slice of `found` with the largest error beside that of `single`; None if all slices are too small.

    All are arrays of one shape: the array under test, and what float32 and float64 make of its own inputs.
    `activated`: whether an activation was applied, after which values next to nothing are no measure.
    """
    # The values of alike tokens, masked or drawn from few, are one draw each.
    size = exact.size if exact.size > MANY else np.unique(exact).size
    axes = [axis for axis, n in enumerate(exact.shape) if n > 1 and size // n >= LEAST]
    if not axes:
        return None
    errors = _sums(found, exact)
    yard = _sums(single, exact)
    truth = _sums(exact, None)
    worst = SliceError(0, 0, 0.0)
    for axis in axes:
        # Tokens can be alike, as masked ones are, and a slice of them is one draw, which the yardstick may have right
        # by luck; so it counts as no less than the median slice, which a few large ones do not move.  Of
        # x (1 + erf(x)) / 2 engines lose in proportion to x where the result is next to nothing.
        usual = float(np.mean(yard[axis]) if activated else np.median(yard[axis]))
        least = np.maximum((budget.FLOOR * budget.EPS32) ** 2 * truth[axis], usual)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.nan_to_num(np.sqrt(errors[axis] / np.maximum(yard[axis], least)), nan=0.0, posinf=np.inf)
        at = int(ratios.argmax())
        if ratios[at] > worst.ratio:
            worst = SliceError(axis, at, float(ratios[at]))
    return worst


def _sums(a: np.ndarray, b: np.ndarray | None) -> list[np.ndarray]:
    """For each axis, the sum over all others of (a - b)^2, in float64; matrix by matrix, so that no copy is made."""
    sums = [np.zeros(n) for n in a.shape]
    for place in np.ndindex(a.shape[:-2]):
        gap = a[place].astype(np.float64)
        if b is not None:
            gap -= b[place]
        np.square(gap, out=gap)
        rows = gap.sum(-1)
        for axis, index in enumerate(place):
            sums[axis][index] += rows.sum()
        if a.ndim > 1:
            sums[-2] += rows
            sums[-1] += gap.sum(-2)
        else:
            sums[-1] += gap
    return sums
