"""The learning rate as a function of the step: a linear warm-up, then cosine or polynomial decay."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cosine:
    """Warm-up from 0 to `peak` in `warmup` steps, both ends included, then half a cosine towards `floor`.

    step = 0 ... steps - 1; `floor` itself would be reached at `steps`.  Source: cosine_scheduler in microsoft/unilm
    beit/utils.py.  Raises ValueError for numbers that make no schedule.
    """

    peak: float
    steps: int
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self.peak, self.steps, self.warmup)

    def __call__(self, step: int) -> float:
        """The rate of a step."""
        if step < self.warmup:
            return self.peak * (step / (self.warmup - 1) if self.warmup > 1 else 0.0)
        progress = min(1.0, (step - self.warmup) / max(self.steps - self.warmup, 1))
        return self.floor + 0.5 * (self.peak - self.floor) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Polynomial:
    """(peak - floor) (1 - step / steps)^power + floor, times a factor that rises from `ratio` to 1 in `warmup` steps.

    Source: PolyLrUpdaterHook of mmcv, with its linear warm-up.  Raises ValueError for numbers that make no schedule.
    """

    peak: float
    steps: int
    warmup: int = 0
    power: float = 1.0
    floor: float = 0.0
    ratio: float = 1e-6

    def __post_init__(self) -> None:
        _check(self.peak, self.steps, self.warmup)

    def __call__(self, step: int) -> float:
        """The rate of a step."""
        rate = (self.peak - self.floor) * max(0.0, 1 - step / self.steps) ** self.power + self.floor
        if step < self.warmup:
            rate *= 1 - (1 - step / self.warmup) * (1 - self.ratio)
        return rate


def _check(peak: float, steps: int, warmup: int) -> None:
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"learning rate: expected a number above 0, found {peak}")
    if steps < 1:
        raise ValueError(f"steps: expected at least one, found {steps}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup: expected 0 to {steps} steps, the whole run, found {warmup}")
