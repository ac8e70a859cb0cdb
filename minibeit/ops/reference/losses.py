"""Losses: one number for a batch, the mean over what counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cross_entropy(logits: np.ndarray, labels: np.ndarray, ignore_index: int) -> np.ndarray:  # (n, K), (n,) -> ()
    """Mean of -log softmax(logits)[label] over the labels that are not `ignore_index`; NaN if there are none.

    Raises ValueError for a label outside 0 to K - 1.
    """
    K = logits.shape[1]
    counted = labels != ignore_index
    logits, labels = logits[counted], labels[counted]
    if labels.size and not (labels.min() >= 0 and labels.max() < K):
        wrong = labels[(labels < 0) | (labels >= K)][0]
        raise ValueError(f"labels: expected class numbers 0 to {K - 1} (or {ignore_index} to ignore), found {wrong}")
    if not labels.size:
        return np.array(np.nan, logits.dtype)
    shifted = logits - logits.max(1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(1))
    return (log_sums - shifted[np.arange(len(labels)), labels]).mean()


def mse_loss(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:  # (...), (...) -> ()
    """Mean of (prediction - target)^2."""
    return np.square(prediction - target.astype(prediction.dtype)).mean()


def bce_with_logits(logits: np.ndarray, target: np.ndarray) -> np.ndarray:  # (...), (...) -> ()
    """Mean binary cross-entropy of sigmoid(logits) against targets in [0, 1], in a form that cannot overflow."""
    target = target.astype(logits.dtype)
    return (np.maximum(logits, 0) - logits * target + np.log1p(np.exp(-np.abs(logits)))).mean()


def weighted_sum(losses: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:  # k x () -> ()
    """The sum of weight * loss."""
    total = losses[0] * losses[0].dtype.type(weights[0])
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        total = total + loss * loss.dtype.type(weight)
    return total
