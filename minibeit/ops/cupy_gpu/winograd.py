"""3x3 convolution by Winograd's F(4x4, 3x3): 36 products of tiles in place of 144, in float32.

Output tiles of 4x4 come from input tiles of 6x6:  Y = A^T [ (G g G^T) * (B^T d B) ] A, where * multiplies number by
number; summed over input channels that is one matrix product for each of the 36 places.  Points 0, 1, -1, 2, -2 and
infinity.  Relative error about 1.4e-6 against 2e-7 of the direct sum.  Source: Lavin and Gray 2015.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .device import cupy
from .gemm import batched_product
from .kernels import or_null, over_channels

Array = Any
POINTS = 36
WORK_BYTES = 1 << 30  # of transformed tiles at a time
_G = np.array(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float64
) / np.array([[24], [24], [24], [24], [24], [24]])  # fmt: skip


def transformed(weight: np.ndarray) -> np.ndarray:  # (out, C, 3, 3) -> (36, out, C)
    """G g G^T of every kernel, in float64."""
    out, C = weight.shape[:2]
    half = np.tensordot(_G, np.float64(weight), (1, 2))  # (6, out, C, 3)
    return np.ascontiguousarray(np.tensordot(half, _G, (3, 1)).transpose(0, 3, 1, 2)).reshape(POINTS, out, C)


def convolve(x: Array, weight: Array, bias: Array | None, y: Array, add: bool, kind: int) -> None:
    """y = f(conv(x) + bias), or f(y + conv(x)) where `add`; x (B, h, w, C), y (B, h, w, out), weight (36, out, C)."""
    B, h, w, C = x.shape
    out = y.shape[3]
    tiles = B * -(-h // 4) * -(-w // 4)
    at_once = min(tiles, max(1, WORK_BYTES // (POINTS * (C + out) * x.itemsize)))
    for first in range(0, tiles, at_once):
        count = min(at_once, tiles - first)
        v, m = cupy.empty((POINTS, count, C), x.dtype), cupy.empty((POINTS, count, out), x.dtype)
        over_channels("winograd_input", "float32", count, C, x, v, h, w, C, first, count)
        batched_product(v, weight, m)
        over_channels(
            "winograd_output", "float32", count, out,
            m, or_null(bias), y, h, w, out, first, count, int(add), kind,
        )  # fmt: skip
