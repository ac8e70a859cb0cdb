"""What is wrong with a gradient: common mistakes, recognised by the pattern of the numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CLOSE = 1e-4  # relative: a form that explains a wrong gradient leaves no more than rounding


def diagnose(name: str, found: Mapping[str, np.ndarray], exact: np.ndarray) -> str:
    """A sentence on the wrong gradient found[name] beside the right one; "" where no form is recognised."""
    wrong, right = found[name].astype(np.float64), exact.astype(np.float64)
    if not wrong.any():
        return "it is zero throughout: the gradient was forgotten or the array detached"
    if wrong.ndim == 2 and wrong.shape[0] == wrong.shape[1] and _close(wrong, right.T):
        return "it is the transposed gradient: the factors of dW = dy^T x were swapped"
    factor = float((wrong * right).sum() / max((right * right).sum(), 1e-300))
    if abs(factor - 1) > CLOSE and _close(wrong, factor * right):
        return f"it is {factor:.4g} times the right gradient: a factor is missing or too many"
    if _close(wrong, right):
        return ""  # too near for a form to be told from rounding
    along = _factors(wrong, right)
    if along is not None:
        return f"every slice along axis {along} has a factor of its own: a scale or a weight is missing or too many"
    missing = right - wrong
    for other, array in found.items():
        if other != name and array.shape == wrong.shape and other.startswith("cotangent.") and _close(missing, array):
            return f"{other} is missing in it: the gradient of a residual connection was dropped"
    return ""


def _factors(wrong: np.ndarray, right: np.ndarray) -> int | None:
    """The axis along which the two differ by one factor a slice."""
    for axis in range(wrong.ndim if wrong.ndim > 1 else 0):
        others = tuple(i for i in range(wrong.ndim) if i != axis)
        if wrong.size == wrong.shape[axis]:
            continue
        squares = np.maximum((right * right).sum(others, keepdims=True), 1e-300)
        factors = (wrong * right).sum(others, keepdims=True) / squares
        if _close(wrong, factors * right):
            return axis
    return None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.linalg.norm(a - b)) <= CLOSE * float(np.linalg.norm(b)) and bool(b.any())
