"""3x3 convolution by Winograd's F(4x4, 3x3) in NumPy: with products of bfloat16 for int8 models, of float32 to measure.

Tiles of 6x6 pixels and kernels are transformed in float32 and stored; sums and the transform back are float32.  Points
0, +-11/16, +-3/2 and infinity, as the fast backend has them.  Source: Lavin and Gray 2015.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .low_precision import rounded

NEAR, FAR = 11 / 16, 3 / 2
_N, _F = NEAR**2, FAR**2
_INPUT = np.array(
    [
        [_N * _F, 0, -(_N + _F), 0, 1, 0],
        [0, -NEAR * _F, -_F, NEAR, 1, 0],
        [0, NEAR * _F, -_F, -NEAR, 1, 0],
        [0, -FAR * _N, -_N, FAR, 1, 0],
        [0, FAR * _N, -_N, -FAR, 1, 0],
        [0, _N * _F, 0, -(_N + _F), 0, 1],
    ]
)
_OUTPUT = np.array(
    [
        [1, 1, 1, 1, 1, 0],
        [0, NEAR, -NEAR, FAR, -FAR, 0],
        [0, _N, _N, _F, _F, 0],
        [0, NEAR**3, -(NEAR**3), FAR**3, -(FAR**3), 1],
    ]
)
_KERNEL = np.array(
    [
        [1 / (_N * _F), 0, 0],
        *(
            [1 / (2 * _N * (_N - _F)), sign * NEAR / (2 * _N * (_N - _F)), _N / (2 * _N * (_N - _F))]
            for sign in (1, -1)
        ),
        *([1 / (2 * _F * (_F - _N)), sign * FAR / (2 * _F * (_F - _N)), _F / (2 * _F * (_F - _N))] for sign in (1, -1)),
        [0, 0, 1],
    ]
)


def short_conv(
    x: np.ndarray, weight: np.ndarray, stored: Callable[[np.ndarray], np.ndarray] = rounded
) -> np.ndarray:  # (B, C, h, w), (out, C, 3, 3) -> (B, out, h, w)
    """The convolution of `weight` with x, zeros beyond the border; `stored` rounds what is multiplied, to bfloat16."""
    B, C, h, w = x.shape
    down, across = -(-h // 4), -(-w // 4)
    source = np.pad(x, ((0, 0), (0, 0), (1, 4 * down - h + 1), (1, 4 * across - w + 1)))
    tiles = np.lib.stride_tricks.sliding_window_view(source, (6, 6), (2, 3))[
        :, :, ::4, ::4
    ]  # (B, C, down, across, 6, 6)
    b, a = _INPUT.astype(x.dtype), _OUTPUT.astype(x.dtype)
    inputs = stored(b @ tiles @ b.T).transpose(4, 5, 0, 2, 3, 1).reshape(36, -1, C)
    kernels = stored((_KERNEL @ weight.astype(np.float64) @ _KERNEL.T).astype(x.dtype))
    products = inputs @ kernels.transpose(2, 3, 1, 0).reshape(36, C, -1)  # (36, tiles, out)
    back = a @ products.reshape(6, 6, -1).transpose(2, 0, 1) @ a.T  # (tiles * out, 4, 4)
    y = back.reshape(B, down, across, -1, 4, 4).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(B, -1, 4 * down, 4 * across)[:, :, :h, :w]
