"""The row of one array, and the verdict over it: its own and its total error beside what float32 loses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import budget
from .budget import Yardstick
from .difference import Difference, difference, distance
from .slices import SliceError, worst_slice

NOTED = ("missing", "extra")  # not compared, which convicts nobody: what is there is judged over longer steps
ACTIVATED = {"linear_activation", "conv_bn_relu", "conv_bn_relu_resized", "conv_transpose_bn_gelu"}


@dataclass
class Row:
    """One recorded array: what was found and what it means.

    `status`: "ok"; "own" (its own error is out of budget); "total" (only what it inherits is); "shape" (it could not be
    compared); "missing" and "extra" (the same, and no fault); "nan"; "nan on both sides"; "yardstick" (PyTorch departs
    from the reference).
    """

    name: str
    status: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    ops: tuple[str, ...] = ()  # the ops that made it
    since: str = ""  # the array from which the truth started, where the candidate lacks some between; "input" at first
    own: Difference | None = None
    total: Difference | None = None
    inherited: float = math.nan  # relative rms: the truth's op on the candidate's inputs beside the truth
    own_yard: Yardstick | None = None
    total_yard: Yardstick | None = None
    leeway: float = 1.0  # factor of the own limits, the error budget of the ops
    own_limit: float = math.nan
    total_limit: float = math.nan
    own_ratio: float = math.nan  # times the yardstick's error
    total_ratio: float = math.nan
    slice: SliceError | None = None  # the feature, token, head or channel that is furthest off
    note: str = ""
    heat: np.ndarray | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok" or self.status in NOTED

    @property
    def guilty(self) -> bool:
        """Whether what is wrong was made here: its own error is out of budget, or it could not be compared."""
        return not self.ok and self.status not in ("total", "yardstick")

    @property
    def is_choice(self) -> bool:
        """Whether it holds tokens, which are right or wrong and have no error."""
        return self.own is not None and self.own_limit == 0


def judge(
    row: Row,
    found: np.ndarray,
    exact: np.ndarray,
    truth: np.ndarray,
    yards: tuple[Yardstick, Yardstick],
    leeway: tuple[float, float] = (1.0, 1.0),
    single: np.ndarray | None = None,
    held_to: str | None = None,
) -> None:
    """Gives `row` its numbers and status: `found` beside `exact`, the float64 op on the candidate's own inputs, and
    beside `truth`, the float64 run.

    `yards` and `leeway`, factors of the budget, are those of the own and of the total error.  With `single`, what
    float32 makes of the candidate's own inputs, every slice is judged as well.  `held_to` is the precision that the
    yardstick has not allowed for yet, by default that of the array.
    """
    dtype = held_to or row.dtype
    row.own, row.total = difference(found, exact), difference(found, truth)
    row.inherited, row.leeway = distance(exact, truth)[0], leeway[0]
    row.own_yard, row.total_yard = yards
    row.own_limit = budget.own_limit(row.own_yard, found.size, dtype, leeway[0])
    row.own_ratio = budget.ratio(row.own.rms_rel, row.own_yard.shown, found.size, dtype)
    row.total_limit = budget.total_limit(row.total_yard, found.size, dtype, leeway[1])
    row.total_ratio = budget.ratio(row.total.rms_rel, row.total_yard.shown, found.size, dtype)
    if not row.own.finite:
        _judge_special(row, row.own)
    elif _own_is_off(row, found, exact, single, dtype, leeway[0]):
        row.status = "own"
    elif row.own_yard.suspicious:
        row.status = "yardstick"
        row.note = (
            f"itself departs from the float64 reference here by {row.own_yard.shown:.1e}, more than rounding can: "
            "the two define this step differently"
        )
    elif row.total.rms_rel > row.total_limit:
        row.status = "total"


def _judge_special(row: Row, d: Difference) -> None:
    if (d.nan_found, d.inf_found) == (d.nan_truth, d.inf_truth):
        row.status = "nan on both sides"
        row.note = (
            f"{d.nan_found} NaN and {d.inf_found} infinite values on both sides: weights or input are not finite, "
            "so nothing can be said about the implementation"
        )
    else:
        row.status = "nan"
        row.note = (
            f"{d.nan_found} NaN and {d.inf_found} infinite values where the float64 op has {d.nan_truth} and "
            f"{d.inf_truth}: an overflow, a division by zero or memory that was never written"
        )


def _own_is_off(
    row: Row, found: np.ndarray, exact: np.ndarray, single: np.ndarray | None, dtype: str, leeway: float
) -> bool:
    assert row.own is not None and row.own_yard is not None
    peak_limit = budget.peak_limit(row.own_yard, dtype, leeway, row.own.worst_size)
    if row.own.rms_rel > row.own_limit or row.own.peak_rel > peak_limit:
        return True
    if single is None:
        return False
    worst = worst_slice(found, single, exact, activated=not ACTIVATED.isdisjoint(row.ops))
    if worst is None or worst.ratio <= budget.slice_limit(dtype, leeway):
        return False
    row.slice = worst
    return True
