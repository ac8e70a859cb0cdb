"""Convolutions of maps with any odd kernel, as a tokenizer has them: ReLU before, a residual after.

1x1 kernels are products, 3x3 ones go by Winograd where the channels fill whole vectors, and all others are products of
windows: what the kernel sees of the map at every pixel, as one long row.  A map is (B, C, h, w) to the caller and
channels-last in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import gemm
from .arguments import PLAIN, RESIDUAL
from .maps import to_channels_first, to_channels_last
from .memory import aligned_copy, padded, release_pages
from .pack import PackedLinear, pack_matrix, padded_bias
from .packed import Packed
from .target import LANES
from .winograd import After, PackedWinograd, convolve, pack_winograd

_WINDOW_BYTES = 8 << 20  # of windows at a time, which a third-level cache holds


@dataclass(frozen=True)
class PackedWindows(Packed):
    """A convolution as a linear layer on windows (kernel height, kernel width, C)."""

    linear: PackedLinear
    kernel: tuple[int, int]
    source: Any = None


@dataclass(frozen=True)
class PackedTiles(Packed):
    """A 3x3 convolution in Winograd's form, with a bias (out,)."""

    tiles: PackedWinograd
    bias: np.ndarray
    kernel: tuple[int, int] = (3, 3)
    source: Any = None


PACKED = (PackedLinear, PackedTiles, PackedWindows)


def pack_conv(layer: Any, keep_source: bool, winograd: bool) -> Any:
    """A float32 convolution of odd kernel (out, C, kh, kw), packed; `winograd` allows that form for 3x3."""
    out, C, kh, kw = layer.weight.shape
    source = layer if keep_source else None
    if winograd and (kh, kw) == (3, 3) and out % LANES == 0 and C % LANES == 0:
        bias = np.zeros(out, np.float32) if layer.bias is None else layer.bias
        tiles = pack_winograd(layer.weight, np.ones(out, np.float32))
        release_pages(layer.weight)
        return PackedTiles(tiles, aligned_copy(bias), source=source)
    matrix = layer.weight.transpose(0, 2, 3, 1).reshape(out, -1)
    linear = PackedLinear(pack_matrix(matrix), padded_bias(layer.bias, out), out, source)
    return linear if kh == kw == 1 else PackedWindows(linear, (kh, kw), source)


def convolve_map(
    x: np.ndarray, layer: Any, relu: bool, gain: float = 1.0, residual: np.ndarray | None = None
) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """conv(x), or residual + gain * conv(x); with `relu` of max(0, x)."""
    source, addend = to_channels_last(x), None if residual is None else to_channels_last(residual)
    if isinstance(layer, PackedTiles):
        y = padded((*source.shape[:3], layer.tiles.out))
        convolve(source, layer.tiles, layer.bias, After(gain=gain, residual=addend), y, relu_before=relu)
        return to_channels_first(y)
    if isinstance(layer, PackedLinear):
        return to_channels_first(_product(_relu(source) if relu else source, layer, gain, addend))
    return to_channels_first(_by_windows(source, layer, relu, gain, addend))


def _product(
    x: np.ndarray, layer: PackedLinear, gain: float, residual: np.ndarray | None, into: np.ndarray | None = None
) -> np.ndarray:
    if residual is None:
        return gemm.product(x, layer, PLAIN, into=into)
    return gemm.product(x, layer, RESIDUAL, np.full(layer.out, gain, np.float32), residual, into=into)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0, out=padded(x.shape))


def _by_windows(
    x: np.ndarray, layer: PackedWindows, relu: bool, gain: float, residual: np.ndarray | None
) -> np.ndarray:  # (B, h, w, C) -> (B, h, w, out)
    """Product by product for as many images as _WINDOW_BYTES allows."""
    (B, h, w, _), windows = x.shape, windows_of(x, *layer.kernel)
    slices = image_slices(B, windows[0].size)
    work = np.empty((slices[0].stop, *windows.shape[1:]), np.float32)
    y = padded((B, h, w, layer.linear.out))
    for images in slices:
        here = work[: images.stop - images.start]
        np.maximum(windows[images], 0, out=here) if relu else np.copyto(here, windows[images])
        addend = None if residual is None else residual[images]
        _product(here.reshape(*here.shape[:3], -1), layer.linear, gain, addend, y[images])
    return y


def image_slices(B: int, elements: int) -> list[slice]:
    """Slices of the batch with at most _WINDOW_BYTES of `elements` for each image, and at least one image."""
    count = min(B, max(1, _WINDOW_BYTES // (4 * elements)))
    return [slice(first, min(first + count, B)) for first in range(0, B, count)]


def windows_of(x: np.ndarray, kh: int, kw: int) -> np.ndarray:  # (B, h, w, C) -> (B, h, w, kh, kw C)
    """What a kernel sees of the map at every pixel, zeros beyond the border; a view."""
    B, h, w, C = x.shape
    around = np.zeros((B, h + kh - 1, w + kw - 1, C), np.float32)
    around[:, kh // 2 : kh // 2 + h, kw // 2 : kw // 2 + w] = x
    image, row, pixel, _ = around.strides
    strides = (image, row, pixel, row, 4)
    return np.lib.stride_tricks.as_strided(around, (B, h, w, kh, kw * C), strides, writeable=False)
