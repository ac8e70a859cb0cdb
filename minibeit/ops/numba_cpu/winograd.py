"""3x3 convolution by Winograd's F(4x4, 3x3): 36 products of tiles in place of 144.

Output tiles of 4x4 come from input tiles of 6x6:  Y = A^T [ (G g G^T) * (B^T d B) ] A, where * multiplies number by
number; summed over input channels that is one matrix product for each of the 36 places.  Points 0, 1, -1, 2, -2 and
infinity.  Relative error about 1.4e-6 against 2e-7 of the direct sum.  Source: Lavin and Gray 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from .gemm import PLAIN, panel_group, run_products
from .kernels import task_kernel
from .memory import aligned, padded
from .micro import MR, NR
from .pack import padded_bias
from .pool import run
from .vector import LANES, arguments, fma, load, load_float, maximum, splat, store, store_float

POINTS = 36
_CHUNK = 12 * MR  # tiles in work at a time: 36 * 204 * 768 floats are 23 MB
_VECTOR = 4 * LANES
_ZERO = np.float32(0)


@dataclass(frozen=True)
class PackedWinograd:
    """A 3x3 convolution's transformed weights, (36, ceil(out / NR), in, NR)."""

    panels: np.ndarray
    out: int
    source: Any = None

    @property
    def channels(self) -> int:
        return self.panels.shape[2]


@njit(error_model="numpy")
def _input_line(source, source_step, target, target_step):
    """B^T d of six vectors."""
    d0, d1, d2 = load(source), load(source + source_step), load(source + 2 * source_step)
    d3, d4, d5 = load(source + 3 * source_step), load(source + 4 * source_step), load(source + 5 * source_step)
    two, four, five = splat(np.float32(2)), splat(np.float32(4)), splat(np.float32(-5))
    even, odd = fma(splat(np.float32(-4)), d2, d4), fma(splat(np.float32(-4)), d1, d3)
    store(target, fma(four, d0, fma(five, d2, d4)))
    store(target + target_step, even + odd)
    store(target + 2 * target_step, even - odd)
    even, odd = d4 - d2, two * (d3 - d1)
    store(target + 3 * target_step, even + odd)
    store(target + 4 * target_step, even - odd)
    store(target + 5 * target_step, fma(four, d1, fma(five, d3, d5)))


@njit(error_model="numpy")
def _output_line(source, source_step, target, target_step):
    """A^T m of six vectors: four."""
    m0, m1, m2 = load(source), load(source + source_step), load(source + 2 * source_step)
    m3, m4, m5 = load(source + 3 * source_step), load(source + 4 * source_step), load(source + 5 * source_step)
    sum1, difference1, sum2, difference2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    store(target, m0 + sum1 + sum2)
    store(target + target_step, fma(splat(np.float32(2)), difference2, difference1))
    store(target + 2 * target_step, fma(splat(np.float32(4)), sum2, sum1))
    store(target + 3 * target_step, fma(splat(np.float32(8)), difference2, difference1) + m5)


def _input_kernel(args, task, thread):
    """Transforms one tile of the map, all channels."""
    (
        scratch, scratch_bytes, x, pixel, row, image, height, width, channels, v, tile_bytes, point_bytes,
        first_tile,
    ) = arguments(args, 13)  # fmt: skip
    work = scratch + thread * scratch_bytes
    down, across = (height + 3) // 4, (width + 3) // 4
    nth = first_tile + task
    top, left = nth // across % down * 4 - 1, nth % across * 4 - 1
    x += nth // (across * down) * image
    column = work + POINTS * _VECTOR
    target = v + task * tile_bytes
    for c in range(0, channels * 4, _VECTOR):
        for j in range(6):
            if left + j < 0 or left + j >= width:
                for i in range(6):
                    store(work + (i * 6 + j) * _VECTOR, splat(_ZERO))
                continue
            here = x + c + (left + j) * pixel
            if top >= 0 and top + 6 <= height:
                _input_line(here + top * row, row, work + j * _VECTOR, 6 * _VECTOR)
                continue
            for i in range(6):
                inside = top + i >= 0 and top + i < height
                store(column + i * _VECTOR, load(here + (top + i) * row) if inside else splat(_ZERO))
            _input_line(column, _VECTOR, work + j * _VECTOR, 6 * _VECTOR)
        for i in range(6):
            _input_line(work + i * 6 * _VECTOR, _VECTOR, target + c + i * 6 * point_bytes, point_bytes)


def _output_kernel(args, task, thread):
    """Transforms one tile of products back and puts it into the map: f(products + bias, or + what is there)."""
    (
        scratch, scratch_bytes, m, tile_bytes, point_bytes, channels, y, pixel, row, image, height, width, bias, relu,
        first_tile,
    ) = arguments(args, 15)  # fmt: skip
    work = scratch + thread * scratch_bytes
    down, across = (height + 3) // 4, (width + 3) // 4
    nth = first_tile + task
    top, left = nth // across % down * 4, nth % across * 4
    y += nth // (across * down) * image + top * row + left * pixel
    line = work + 24 * _VECTOR
    source = m + task * tile_bytes
    for c in range(0, channels * 4, _VECTOR):
        for j in range(6):
            _output_line(source + c + j * point_bytes, 6 * point_bytes, work + j * _VECTOR, 6 * _VECTOR)
        for i in range(min(4, height - top)):
            _output_line(work + i * 6 * _VECTOR, _VECTOR, line, _VECTOR)
            for j in range(min(4, width - left)):
                target = y + c + i * row + j * pixel
                value = load(line + j * _VECTOR) + load(bias + c if bias != 0 else target)
                store(target, maximum(splat(_ZERO), value) if relu != 0 else value)


def _weight_kernel(args, task, thread):
    """G g G^T in float64 of the kernels of one panel of output channels, times the batch norm's scale."""
    scratch, scratch_bytes, weight, out_bytes, in_bytes, out, channels, scale, panels = arguments(args, 9)
    point_bytes = (out + NR - 1) // NR * channels * NR * 4
    half = scratch + thread * scratch_bytes  # G g: 6 x 3
    for k in range(channels):
        for j in range(NR):
            o = task * NR + j
            target = panels + (task * channels + k) * NR * 4 + 4 * j
            if o >= out:
                for p in range(POINTS):
                    store_float(target + p * point_bytes, _ZERO)
                continue
            g = weight + o * out_bytes + k * in_bytes
            factor = np.float64(load_float(scale + 4 * o))
            for b in range(3):
                _weight_line(
                    load_float(g + 4 * b) * factor, load_float(g + 4 * (3 + b)) * factor,
                    load_float(g + 4 * (6 + b)) * factor, half + 4 * b, 12,
                )  # fmt: skip
            for a in range(6):
                line = half + 12 * a
                _weight_line(
                    np.float64(load_float(line)), np.float64(load_float(line + 4)), np.float64(load_float(line + 8)),
                    target + 6 * a * point_bytes, point_bytes,
                )  # fmt: skip


@njit(error_model="numpy")
def _weight_line(g0, g1, g2, target, step):
    """G g of three numbers: six."""
    outer, far = (g0 + g2) / -6.0, g0 / 24.0 + g2 / 6.0
    store_float(target, np.float32(g0 / 4.0))
    store_float(target + step, np.float32(outer - g1 / 6.0))
    store_float(target + 2 * step, np.float32(outer + g1 / 6.0))
    store_float(target + 3 * step, np.float32(far + g1 / 12.0))
    store_float(target + 4 * step, np.float32(far - g1 / 12.0))
    store_float(target + 5 * step, np.float32(g2))


_transform_input, _transform_output = task_kernel(_input_kernel), task_kernel(_output_kernel)
_transform_weight = task_kernel(_weight_kernel)


def pack_winograd(weight: np.ndarray, scale: np.ndarray) -> PackedWinograd:
    """Transformed weights of a convolution (out, in, 3, 3) whose outputs are multiplied by `scale` (out,)."""
    out, channels = weight.shape[:2]
    panels = aligned((POINTS, -(-out // NR), channels, NR))
    if weight.strides[2:] != (12, 4):
        weight = np.ascontiguousarray(weight)
    addresses = (weight.ctypes.data, *weight.strides[:2], out, channels, scale.ctypes.data, panels.ctypes.data)
    run(_transform_weight, panels.shape[1], addresses, 6 * 3 * 4)
    return PackedWinograd(panels, out)


def convolve(x: np.ndarray, layer: PackedWinograd, bias: np.ndarray | None, relu: bool, y: np.ndarray) -> None:
    """y = f(conv(x) + bias), or f(y + conv(x)) without `bias`; x (B, h, w, C), y (B, h, w, out), f ReLU or nothing."""
    B, h, w, C = x.shape
    total = B * -(-h // 4) * -(-w // 4)
    chunk = min(_CHUNK, total)
    v, m = padded((POINTS, chunk, C)), padded((POINTS, chunk, layer.out))
    zeros = padded_bias(None, layer.out)
    group = panel_group(layer.panels.shape[1], POINTS)
    for first in range(0, total, chunk):
        tiles = min(chunk, total - first)
        run(_transform_input, tiles, (
            x.ctypes.data, x.strides[2], x.strides[1], x.strides[0], h, w, C,
            v.ctypes.data, v.strides[1], v.strides[0], first,
        ), (POINTS + 6) * _VECTOR)  # fmt: skip
        run_products(
            POINTS, (v.ctypes.data, v.strides[1], tiles, C, layer.panels.ctypes.data, zeros.ctypes.data, layer.out),
            (m.ctypes.data, m.strides[1], PLAIN, 0, 0, 0),
            (0, group, _CHUNK, 0, v.strides[0], 2 * m.strides[0], m.strides[0]),
        )  # fmt: skip
        run(_transform_output, tiles, (
            m.ctypes.data, m.strides[1], m.strides[0], layer.out,
            y.ctypes.data, y.strides[2], y.strides[1], y.strides[0], h, w,
            0 if bias is None else bias.ctypes.data, int(relu), first,
        ), 30 * _VECTOR)  # fmt: skip
