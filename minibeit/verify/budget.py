"""The error budget: what float32 arithmetic may lose, measured on this very input instead of guessed.

Two questions are asked about every recorded array, and answered with the help of a float64 run of the reference.

- own error: how far the array is from what the float64 op makes of the *candidate's own* inputs.  Nothing that went
  wrong earlier counts, so it convicts or acquits this op alone.
- total error: how far it is from the float64 run of the whole network, own and inherited together.

The yardstick is what float32 loses at the same place: PyTorch's run if there is one, and NumPy's op on the candidate's
own inputs.  Within budget is up to OWN_FACTOR and TOTAL_FACTOR times that; a yardstick counts as FLOOR rounding steps
at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)

# Float32 implementations of one op that differ in nothing but the order of their sums were measured up to 2.3 times as
# far from the truth as each other (300 random models, numba, NumPy and PyTorch); the mildest mistake people make (an
# epsilon of 1e-6 for 1e-12 at unit variance) costs 7 times.
OWN_FACTOR = 4.0
TOTAL_FACTOR = 6.0  # one run is one draw of many errors that are alike: measured up to 3.2
PEAK_FACTOR = 8.0  # for the largest single difference, which scatters more than a mean: measured up to 3.1

# For the worst of all slices (features, tokens, heads, channels) of at least 32 elements: measured up to 3.8.
SLICE_FACTOR = 8.0

# Rounding a result once costs 0.29 EPS (uniform error over a step); an op that was lucky is no yardstick.
FLOOR = 0.5
FEW = 64  # elements; the rms of fewer scatters, so the floor is higher
FEW_FLOOR = 1.0
PEAK_FLOOR = 2.0

# A yardstick more than this far from NumPy's float32 computes something else: rounding never differs that much.
SUSPICIOUS = 16.0

# (v / 255 - mean) / std rounds three or four times, in whatever order; one grey level is thousands of steps.
PIXEL_STEPS = 16

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": EPS32, "float64": 2.0**-52}


@dataclass(frozen=True)
class Yardstick:
    """Relative errors of the yardsticks at one array: (rms, peak), both relative to the truth's rms."""

    numpy: tuple[float, float]
    torch: tuple[float, float] | None = None

    @property
    def suspicious(self) -> bool:
        """Whether the other implementation departs from the reference by more than rounding can."""
        if self.torch is None:
            return False
        return not self.torch[0] <= SUSPICIOUS * max(self.numpy[0], EPS32)

    @property
    def rms(self) -> float:
        return self._larger(0)

    @property
    def peak(self) -> float:
        return self._larger(1)

    @property
    def shown(self) -> float:
        """The rms that reports show next to the candidate's: PyTorch's if it ran, else NumPy's."""
        return self.numpy[0] if self.torch is None else self.torch[0]

    def _larger(self, which: int) -> float:
        if self.torch is None or self.suspicious or not math.isfinite(self.torch[which]):
            return self.numpy[which]
        return max(self.numpy[which], self.torch[which])


def scatters(x: np.ndarray) -> bool:
    """Whether an array has so few different numbers, such as a map of one pixel enlarged, that its rms is one draw."""
    return x.size < FEW or (x.size < FEW * FEW and np.unique(x).size < FEW)


def own_limit(yard: Yardstick, size: int, dtype: str, leeway: float = 1.0) -> float:
    """The largest relative rms error of one op within budget; `leeway` is its `error_budget` in the table of ops."""
    return OWN_FACTOR * max(yard.rms, _floor(size)) * _scale(dtype) * leeway


def total_limit(yard: Yardstick, size: int, dtype: str, leeway: float = 1.0) -> float:
    """The largest relative rms error of the run so far within budget; `leeway` is the widest of its ops."""
    return TOTAL_FACTOR * max(yard.rms, _floor(size)) * _scale(dtype) * leeway


def peak_limit(yard: Yardstick, dtype: str, leeway: float = 1.0, size: float = 0.0) -> float:
    """The largest single difference within budget, in units of the truth's rms, at an element of that `size`."""
    limit = PEAK_FACTOR * max(yard.peak, PEAK_FLOOR * EPS32, size * EPS32) * _scale(dtype)
    return limit * leeway


def slice_limit(dtype: str, leeway: float = 1.0) -> float:
    """The largest rms error of one slice within budget, in units of the yardstick's in that slice."""
    return SLICE_FACTOR * _scale(dtype) * leeway


def pixel_limit(expected: np.ndarray) -> float:
    """The largest difference between two sides' pixels that is rounding."""
    return PIXEL_STEPS * EPS32 * max(1.0, float(np.abs(expected).max(initial=0)))


def ratio(error: float, yard: float, size: int, dtype: str = "float32") -> float:
    """ "x times as far from the truth as the yardstick", luck below the floor not counted."""
    return error / (max(yard, _floor(size)) * _scale(dtype))


def _floor(size: int) -> float:
    return (FLOOR if size >= FEW else FEW_FLOOR) * EPS32


def _scale(dtype: str) -> float:
    """A trace in another precision is held to that precision."""
    return EPS.get(dtype, EPS32) / EPS32
