"""3x3 convolution by Winograd's F(2x2, 3x3): 16 multiplications per tile instead of 36, in float32.

Output tiles of 2x2 come from input tiles of 4x4:  Y = A^T [ (G g G^T) * (B^T d B) ] A, where * is elementwise; summed
over input channels, that is one matrix product for each of the 16 elements of a tile.  Points 0, 1, -1 and infinity.
F(4x4, 3x3), which the CPU backend uses, saves twice as much but is less accurate: single elements of a large map have
10 times the error of the direct sum, here twice.  Source: Lavin and Gray 2015.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .device import cupy
from .gemm import batched_product
from .kernels import or_null, over_channels

Array = Any
TILE, POINTS = 2, 16
WORK_BYTES = 1 << 30  # of transformed tiles at a time
_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float64) / 2


def transformed(weight: np.ndarray) -> np.ndarray:  # (out, C, 3, 3) -> (16, out, C)
    """G g G^T of every kernel, in float64."""
    out, C = weight.shape[:2]
    half = np.tensordot(_G, np.float64(weight), (1, 2))  # (4, out, C, 3)
    return np.ascontiguousarray(np.tensordot(half, _G, (3, 1)).transpose(0, 3, 1, 2)).reshape(POINTS, out, C)


def convolve(x: Array, weight: Array, bias: Array | None, y: Array, add: bool, kind: int) -> None:
    """y = f(conv(x) + bias), or f(y + conv(x)) if `add`; x (B, h, w, C), y (B, h, w, out), weight (16, out, C)."""
    B, h, w, C = x.shape
    out = y.shape[3]
    tiles = B * -(-h // TILE) * -(-w // TILE)
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
