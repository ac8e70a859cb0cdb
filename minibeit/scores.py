"""What a classifier's logits say: probabilities, or predicted numbers."""

from __future__ import annotations

import numpy as np

from .ops.reference import softmax


def scores(logits: np.ndarray, problem: str | None) -> np.ndarray:  # (..., K) -> (..., K) float64
    """Probabilities for the logits; for regression the logits themselves.

    `problem` is the config's `problem_type`.  Without one, one output means regression, as in the model's loss, and
    several single-label.
    """
    x = np.asarray(logits, np.float64)
    if is_regression(problem, x.shape[-1]):
        return x
    if problem == "multi_label_classification":
        return 0.5 * (1 + np.tanh(0.5 * x))  # the sigmoid, without overflow
    return softmax(x)


def is_regression(problem: str | None, outputs: int) -> bool:
    """Whether a head of so many outputs predicts numbers instead of classes."""
    return problem == "regression" or (problem is None and outputs == 1)
