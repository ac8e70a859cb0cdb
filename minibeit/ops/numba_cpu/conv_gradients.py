"""The backward of convolutions of maps with odd kernels, channels last.

dx is the convolution of g with the kernels turned around: by Winograd for 3x3 where the channels fill whole vectors,
else tap by tap from one product.  dW is, for each tap, g^T times the map shifted to it.  With both laid out on the
padded map a shift is a constant number of rows, so one packed map serves all taps; few channels would leave the panels
nearly empty, and are taken as windows instead.
"""

from __future__ import annotations

import numpy as np

from .convs import image_slices, windows_of
from .gradients import column_panels, input_gradient, turned, weight_gradient
from .map_gradients import convolution_input_gradient
from .maps import to_channels_first, to_channels_last
from .memory import padded
from .target import LANES, NR


def conv_gradients(
    g: np.ndarray, x: np.ndarray, weight: np.ndarray, relu: bool
) -> tuple[
    np.ndarray, np.ndarray, np.ndarray
]:  # (B, out, h, w), (B, C, h, w) -> (B, C, h, w), (out, C, kh, kw), (out,)
    """(dx, dW, db) of conv(x), or of conv(max(0, x)) with `relu`."""
    g_last, x_last = to_channels_last(g), to_channels_last(x)
    dx = _input(g_last, weight)
    if relu:
        dx *= x_last > 0
        x_last = np.maximum(x_last, 0, out=padded(x_last.shape))
    out, C, kh, kw = weight.shape
    if kh == kw == 1:
        g_turned = turned(g_last)
        dw, db = weight_gradient(g_turned, column_panels(x_last), C).reshape(weight.shape), g_turned.sums
    elif C >= NR:
        dw, db = _by_shifts(g_last, x_last, weight.shape)
    else:
        dw, db = _by_windows(g_last, x_last, weight.shape)
    return to_channels_first(dx), dw, db


def _input(g: np.ndarray, weight: np.ndarray) -> np.ndarray:  # (B, h, w, out) -> (B, h, w, C)
    out, C, kh, kw = weight.shape
    B, h, w, _ = g.shape
    if kh == kw == 1:
        return input_gradient(g, weight.reshape(out, C))
    if (kh, kw) == (3, 3) and out % LANES == 0 and C % LANES == 0:
        return convolution_input_gradient(g, weight)
    matrix = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).reshape(out, -1)
    dx = np.zeros((B, h + kh - 1, w + kw - 1, C), np.float32)
    for images in image_slices(B, h * w * kh * kw * C):
        taps = input_gradient(g[images], matrix).reshape(-1, h, w, kh, kw, C)
        for i in range(kh):
            for j in range(kw):
                dx[images, i : i + h, j : j + w] += taps[:, :, :, i, j]
    return dx[:, kh // 2 : kh // 2 + h, kw // 2 : kw // 2 + w]


def _by_shifts(g: np.ndarray, x: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    out, C, kh, kw = shape
    across = x.shape[2] + kw - 1
    g_turned, panels = turned(_padded(g, kh, kw)), column_panels(_padded(x, kh, kw))
    dw = np.empty(shape, np.float32)
    for i in range(kh):
        for j in range(kw):
            shift = (i - kh // 2) * across + j - kw // 2
            dw[:, :, i, j] = weight_gradient(g_turned, panels, C, shift)
    return dw, g_turned.sums


def _by_windows(g: np.ndarray, x: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Some images at a time, added up in float64."""
    out, C, kh, kw = shape
    dw, db = np.zeros((out, kh * kw * C)), np.zeros(out)
    windows = windows_of(x, kh, kw)
    for images in image_slices(len(x), windows[0].size):
        rows = np.ascontiguousarray(windows[images]).reshape(-1, kh * kw * C)
        g_turned = turned(g[images])
        dw += weight_gradient(g_turned, column_panels(rows), kh * kw * C)
        db += g_turned.sums
    dw = dw.reshape(out, kh, kw, C).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(dw, np.float32), db.astype(np.float32)


def _padded(x: np.ndarray, kh: int, kw: int) -> np.ndarray:  # (B, h, w, C) -> (B, h + kh - 1, w + kw - 1, C)
    return np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
