"""The tokens that a tokenizer chooses: right or wrong, but where logits are as good as equal either choice is right."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import budget
from .budget import Yardstick
from .difference import difference
from .judging import Row
from .low_precision import HALVES


def whole(found: Any) -> Any:
    """Tokens that were stored as floats, as integers; anything else unchanged."""
    if found is None or found.dtype.kind != "f" or not np.array_equal(found, np.rint(found)):
        return found
    return found.astype(np.int64)


def usable(found: np.ndarray, shape: tuple[int, ...], vocabulary: int) -> bool:
    """Whether these are tokens of that shape."""
    whole_numbers = found.dtype.kind in "iu" and found.shape == shape
    return whole_numbers and found.min(initial=0) >= 0 and found.max(initial=0) < vocabulary


def undecided(found: np.ndarray | None, exact: np.ndarray, single: np.ndarray, stored: str | None) -> float:
    """How far apart two logits may be and still be exchanged by rounding.

    Nothing where the candidate's logits are known, since it chose by them; a step of theirs where they were `stored` in
    16 bits; what float32 loses at most (`single` beside `exact`) where they are not there.
    """
    if found is None:
        return budget.PEAK_FACTOR * float(np.abs(single - exact).max(initial=0))
    dtype = stored or found.dtype.name
    return budget.EPS[dtype] * float(np.abs(exact).max(initial=0)) if dtype in HALVES else 0.0


def judge(row: Row, found: np.ndarray, logits: np.ndarray, truth: np.ndarray, slack: float) -> None:
    """Gives `row` its status: `found` (B, h, w) beside `logits` (B, V, h, w), which they should be the largest of.

    A token is right if its logit is at most `slack` below the largest.  `truth` are the tokens of the float64 run.
    """
    V = logits.shape[1]
    if not usable(found, truth.shape, V):
        row.status = "shape"
        row.note = f"expected integers from 0 to {V - 1} of shape {truth.shape}, found {found.dtype} of {found.shape}"
        return
    theirs = np.take_along_axis(logits, found[:, None].astype(np.int64), 1)[:, 0]
    wrong = logits.max(1) - theirs > slack
    expected = np.where(wrong, logits.argmax(1), found)
    row.own = row.total = difference(found, expected)
    row.inherited = 0.0
    row.own_yard = row.total_yard = Yardstick((0.0, 0.0))
    row.own_limit = row.total_limit = row.own_ratio = row.total_ratio = 0.0
    others = int((found != truth).sum())
    if wrong.any():
        row.status = "own"
        row.note = f"{int(wrong.sum())} of {found.size} tokens are not those of the largest logit"
    elif others:
        row.note = f"{others} of {found.size} tokens are not those of the float64 run, by errors of the logits"
