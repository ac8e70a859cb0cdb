"""Losses: one number per batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cross_entropy(
    logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> np.ndarray:  # (n, K), (n,) -> ()
    """Mean of -log softmax(logits)[label] over the labels that are not `ignore_index`; NaN if there are none.

    With `smoothing` s the target of a row is 1 - s for its label plus s / K for every class.
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
    own = shifted[np.arange(len(labels)), labels]
    if smoothing:
        own = (1 - logits.dtype.type(smoothing)) * own + logits.dtype.type(smoothing) * shifted.mean(1)
    return (log_sums - own).mean()


def soft_cross_entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:  # (n, K), (n, K) -> ()
    """Mean over rows of -sum target log softmax(logits); a row's targets need not be 0 and 1 (mixup, cutmix)."""
    shifted = logits - logits.max(1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(1, keepdims=True))
    return (target.astype(logits.dtype) * (log_sums - shifted)).sum(1).mean()


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


# Training a tokenizer -------------------------------------------------------------------------------------------------


def gumbel_softmax(
    logits: np.ndarray, noise: np.ndarray, temperature: float
) -> np.ndarray:  # (B, V, h, w), (B, V, h, w) -> (B, V, h, w)
    """softmax((logits + noise) / temperature) over the V tokens: with `noise` from the Gumbel distribution a relaxed
    sample of the categorical distribution softmax(logits), nearer to one token the lower the temperature.

    Source: Jang et al. 2017; Maddison et al. 2017.
    """
    x = (logits + noise.astype(logits.dtype)) / logits.dtype.type(temperature)
    powers = np.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def divergence_from_uniform(logits: np.ndarray) -> np.ndarray:  # (B, V, h, w) -> ()
    """Kullback-Leibler divergence of softmax(logits) over the V tokens from the uniform distribution, in nats: the
    mean over places of sum q log(q V).
    """
    shifted = logits - logits.max(1, keepdims=True)
    powers = np.exp(shifted)
    log_sums = np.log(powers.mean(1, keepdims=True))  # less log V
    return (powers / powers.sum(1, keepdims=True) * (shifted - log_sums)).sum(1).mean()


def logit_laplace_loss(
    statistics: np.ndarray, pixels: np.ndarray
) -> np.ndarray:  # (B, 2 C, height, width), (B, C, height, width) -> ()
    """Mean over all elements of -log p(pixel), in nats, for the logit-Laplace distribution.

    The first C channels of `statistics` are the means mu, the others the logarithms s of the scales:
    -log p(x) = |logit(x) - mu| exp(-s) + s + log(2 x (1 - x)).  Pixels must lie between 0 and 1, both excluded.
    Source: Ramesh et al. 2021, appendix A.3.
    """
    C = pixels.shape[1]
    x = pixels.astype(statistics.dtype)
    mean, s = statistics[:, :C], statistics[:, C:]
    distance = np.abs(np.log(x / (1 - x)) - mean)
    return (distance * np.exp(-s) + s + np.log(2 * x * (1 - x))).mean()
