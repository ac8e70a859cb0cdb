"""Gradients from first principles in float64: differences of the forward, and loops for what differences cannot tell.

Nothing here comes from `minibeit.ops.backward`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np


def differences(f: Callable[[], float], array: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """df/d array, element by element, by the five-point formula; its error is about step^4 and EPS64 / step.

    `f` takes no argument: it reads `array`, which is changed and put back in place.
    """
    found = np.empty(array.shape)
    flat, out = array.reshape(-1), found.reshape(-1)
    for i in range(flat.size):
        kept = flat[i]
        values = []
        for offset in (1, -1, 2, -2):
            flat[i] = kept + offset * step
            values.append(f())
        flat[i] = kept
        out[i] = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)
    return found


def linear(g: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx, dweight, dbias) of x W^T + b for rows x (n, in) and g (n, out), by the chain rule element by element."""
    (n, inputs), outputs = x.shape, weight.shape[0]
    dx, dw, db = np.zeros_like(x), np.zeros_like(weight), np.zeros(outputs)
    for i, o in itertools.product(range(inputs), range(outputs)):
        dw[o, i] = math.fsum(g[row, o] * x[row, i] for row in range(n))
    for row, i in itertools.product(range(n), range(inputs)):
        dx[row, i] = math.fsum(g[row, o] * weight[o, i] for o in range(outputs))
    for o in range(outputs):
        db[o] = math.fsum(g[:, o].tolist())
    return dx, dw, db


def bias_table(d_bias: np.ndarray, index: np.ndarray, rows: int) -> np.ndarray:  # (H, N, N), (N, N) -> (rows, H)
    """Gradient of the table whose rows `index` gathers, from that of the gathered bias: repeated rows add up."""
    out = np.zeros((rows, len(d_bias)))
    for h, (a, b) in itertools.product(range(len(d_bias)), np.ndindex(index.shape)):
        out[index[a, b], h] += d_bias[h, a, b]
    return out


def conv2d(g: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dx, dweight) of a convolution of odd kernel with zero padding, pixel by pixel."""
    B, C, h, w = x.shape
    out, _, kh, kw = weight.shape
    dx, dw = np.zeros_like(x), np.zeros_like(weight)
    for b, o, y, z in itertools.product(range(B), range(out), range(h), range(w)):
        for c, i, j in itertools.product(range(C), range(kh), range(kw)):
            row, column = y + i - kh // 2, z + j - kw // 2
            if 0 <= row < h and 0 <= column < w:
                dx[b, c, row, column] += g[b, o, y, z] * weight[o, c, i, j]
                dw[o, c, i, j] += g[b, o, y, z] * x[b, c, row, column]
    return dx, dw
