"""One step of the optimizer on a flat vector of weights."""

from __future__ import annotations

import math

import numpy as np


def adamw(
    weights: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    factors: tuple[float, float, tuple[float, float], float],
    step: int,
) -> None:  # (n,) each
    """One step of AdamW; updates weights, means and squares in place.

    With factors (rate, decay, (b1, b2), eps), t the number of the step from 1 on and g the gradient:

        w = w (1 - rate decay),  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
        w = w - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019.
    """
    rate, decay, (b1, b2), eps = factors
    weights *= 1 - rate * decay
    mean += (1 - b1) * (gradient - mean)
    square *= b2
    square += (1 - b2) * np.square(gradient)
    root = np.sqrt(square)
    root /= math.sqrt(1 - b2**step)
    root += eps
    weights -= rate / (1 - b1**step) * mean / root
