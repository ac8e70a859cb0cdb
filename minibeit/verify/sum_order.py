"""What the gradient of a convolution's weights loses where its places are added up one after the other in float32.

NumPy adds them up in blocks or pairs, which loses a few times less: over n places the rounding errors of a plain sum
grow with the square root of n.  PyTorch's convolutions add up plainly, and are right to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .difference import distance

SAMPLES = 64  # elements of the weights' gradient that are added up
CONVOLUTIONS = ("conv2d", "relu_conv2d", "relu_conv2d_residual")


def losses(op: str, g: np.ndarray, x: np.ndarray, conv: Any, gain: Any = 1.0) -> tuple[Any, Any]:
    """(rms, largest) relative errors of the weights' gradient and of the bias's, for the cotangent g (B, out, h, w)."""
    g = np.asarray(g * gain, np.float32)
    x = np.asarray(x if op == "conv2d" else np.maximum(x, 0), np.float32)
    out, C, kh, kw = conv.weight.shape
    h, w = x.shape[2:]
    wide = np.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)))
    rng = np.random.default_rng(0)
    places = zip(*(rng.integers(n, size=SAMPLES) for n in (out, C, kh, kw)))
    products = np.stack([(g[:, o] * wide[:, c, i : i + h, j : j + w]).reshape(-1) for o, c, i, j in places])
    return _in_order(products), _in_order(g.swapaxes(0, 1).reshape(out, -1))


def _in_order(terms: np.ndarray) -> tuple[float, float]:  # (sums, terms)
    return distance(np.add.accumulate(terms, 1)[:, -1], terms.sum(1, dtype=np.float64))
