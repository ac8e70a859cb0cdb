"""How far one array is from another: the numbers of a report's line, computed in pieces so that no copy is made.

All sums are float64.  `found` is the array under test, `truth` the float64 run's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PIECE = 1 << 18  # elements compared at a time: a piece and what is made of it stay in the cache
ULP_EDGES = (0.5, 1, 2, 4, 8, 16, 64, 256, 4096, 65536)  # of the histogram's bins, in units of the last place
HEAT = 64  # rows and columns of a heat map at most


@dataclass
class Difference:
    """`found` beside `truth`, element by element and as a whole."""

    size: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0  # |found - truth| / |truth| where the truth is not 0
    rms_rel: float = 0.0  # rms(found - truth) / rms(truth)
    rms_truth: float = 0.0
    cosine: float = 1.0
    worst: tuple[int, ...] = ()  # index of the largest difference
    worst_found: float = math.nan
    worst_truth: float = math.nan
    ulps: list[int] = field(default_factory=lambda: [0] * (len(ULP_EDGES) + 1))
    nan_found: int = 0
    nan_truth: int = 0
    inf_found: int = 0
    inf_truth: int = 0

    @property
    def finite(self) -> bool:
        """Whether both sides are finite numbers throughout."""
        return not (self.nan_found or self.nan_truth or self.inf_found or self.inf_truth)

    @property
    def peak_rel(self) -> float:
        """The largest difference in units of the truth's rms."""
        return self.max_abs / max(self.rms_truth, 1e-300)

    @property
    def worst_size(self) -> float:
        """The truth's element at the largest difference, in units of the truth's rms."""
        return abs(self.worst_truth) / max(self.rms_truth, 1e-300)


def difference(found: np.ndarray, truth: np.ndarray) -> Difference:
    """All statistics.  Raises ValueError for arrays of different shapes; NaN or Inf make `rms_rel` infinite."""
    if found.shape != truth.shape:
        raise ValueError(f"cannot compare shapes {found.shape} and {truth.shape}")
    d = Difference(size=found.size)
    spacing_of = found.dtype if found.dtype in (np.float16, np.float32, np.float64) else np.dtype(np.float32)
    error2 = truth2 = found2 = product = 0.0
    worst = -1
    for start, a, b in _pieces(found, truth):
        _count_special(d, a, b)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            gap = np.abs(a - b)
            gap[(a == b)] = 0  # equal infinities
            size = np.abs(b)
            error2 += float(gap @ gap)
            truth2, found2, product = truth2 + float(b @ b), found2 + float(a @ a), product + float(a @ b)
            ratio = np.divide(gap, size, out=np.zeros_like(gap), where=size > 0)
            d.max_rel = max(d.max_rel, float(ratio.max()))
            _count_ulps(d.ulps, gap, size, spacing_of)
        ranked = np.nan_to_num(gap, nan=np.inf)
        at = int(ranked.argmax())
        if ranked[at] > d.max_abs or worst < 0:
            worst, d.max_abs = start + at, float(ranked[at])
            d.worst_found, d.worst_truth = float(a[at]), float(b[at])
    if worst >= 0:
        d.worst = tuple(int(i) for i in np.unravel_index(worst, found.shape))
    if d.size:
        d.rms_truth = math.sqrt(truth2 / d.size) if math.isfinite(truth2) else math.inf
        d.rms_rel = _relative(error2, truth2)
        norm = math.sqrt(truth2) * math.sqrt(found2) if d.finite else 0.0
        d.cosine = product / norm if norm else (1.0 if error2 == 0 else 0.0)
    return d


def distance(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(rms, largest) difference relative to the truth's rms: two numbers of `difference`, in a fraction of its time."""
    error2 = truth2 = largest = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for _, a, b in _pieces(found, truth):
            gap = a - b
            error2, truth2 = error2 + float(gap @ gap), truth2 + float(b @ b)
            largest = max(largest, float(np.abs(gap, out=gap).max()))
    rms = math.sqrt(truth2 / max(found.size, 1)) if math.isfinite(truth2) else math.inf
    return _relative(error2, truth2), largest / max(rms, 1e-300)


def heat_map(found: np.ndarray, truth: np.ndarray) -> np.ndarray | None:
    """Largest |difference| over everything but the last two axes, reduced to at most HEAT x HEAT; None below 2-D."""
    if found.ndim < 2 or found.shape != truth.shape or not found.size:
        return None
    h, w = found.shape[-2:]
    flat_found, flat_truth = found.reshape(-1, h, w), truth.reshape(-1, h, w)
    gap = np.zeros((h, w))
    for a, b in zip(flat_found, flat_truth):
        np.fmax(gap, np.abs(a - b.astype(np.float64)), out=gap)
    for axis, length in enumerate((h, w)):
        if length > HEAT:
            gap = np.maximum.reduceat(gap, np.arange(HEAT) * length // HEAT, axis=axis)
    return gap


def _relative(error2: float, truth2: float) -> float:
    if not math.isfinite(error2) or not math.isfinite(truth2):
        return math.inf
    return math.sqrt(error2 / truth2) if truth2 else (0.0 if error2 == 0 else math.inf)


def _pieces(found: np.ndarray, truth: np.ndarray) -> Iterator[tuple[int, Any, Any]]:
    """(index of the first element, found, truth) of flat float64 pieces, in the order of the elements."""
    start = 0
    for a, b in _blocks(found, truth):
        for i in range(0, a.size, PIECE):
            yield start + i, a[i : i + PIECE].astype(np.float64), b[i : i + PIECE].astype(np.float64)
        start += a.size


def _blocks(found: np.ndarray, truth: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Flat parts of both; views that are not contiguous are copied one part at a time."""
    whole = found.flags.c_contiguous and truth.flags.c_contiguous
    if whole or found.ndim < 2 or found.size <= PIECE:
        yield found.reshape(-1), truth.reshape(-1)
    else:
        for parts in zip(found, truth):
            yield from _blocks(*parts)


def _count_special(d: Difference, a: np.ndarray, b: np.ndarray) -> None:
    if not (math.isfinite(a.sum()) and math.isfinite(b.sum())):
        d.nan_found += int(np.isnan(a).sum())
        d.nan_truth += int(np.isnan(b).sum())
        d.inf_found += int(np.isinf(a).sum())
        d.inf_truth += int(np.isinf(b).sum())


def _count_ulps(bins: list[int], gap: np.ndarray, size: np.ndarray, dtype: np.dtype) -> None:
    """Adds the differences, in steps of `dtype` at the truth's magnitude, to the histogram."""
    info = np.finfo(dtype)
    _, exponent = np.frexp(np.maximum(size, float(info.tiny)))
    steps = np.ldexp(gap, info.nmant + 1 - exponent)
    places = np.searchsorted(ULP_EDGES, np.nan_to_num(steps, nan=np.inf))
    for i, count in enumerate(np.bincount(places, minlength=len(bins))):
        bins[i] += int(count)
