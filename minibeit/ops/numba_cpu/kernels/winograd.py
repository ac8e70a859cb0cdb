"""The transforms of Winograd's convolution: weights, tiles of the map, and products back into the map."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..arguments import FAR, NEAR, POINTS, TRANSFORM_INPUT, TRANSFORM_OUTPUT, TRANSFORM_WEIGHT
from ..map_arguments import TRANSFORM_COTANGENT, TRANSFORM_WEIGHT_GRADIENT
from ..target import LANES, NR
from .vector import fma, load, load_float, maximum, reader, splat, store, store_float

_VECTOR = 4 * LANES
_ZERO = np.float32(0)
_NEAR, _NEAR_2, _FAR, _FAR_2 = (np.float32(number) for number in (NEAR, NEAR**2, FAR, FAR**2))
_PER_NEAR, _PER_FAR, _PER_BOTH = (
    np.float32(1 / number)
    for number in (2 * NEAR**2 * (NEAR**2 - FAR**2), 2 * FAR**2 * (FAR**2 - NEAR**2), NEAR**2 * FAR**2)
)
_read_input, _read_output, _read_weight = reader(TRANSFORM_INPUT), reader(TRANSFORM_OUTPUT), reader(TRANSFORM_WEIGHT)
_read_cotangent, _read_gradient = reader(TRANSFORM_COTANGENT), reader(TRANSFORM_WEIGHT_GRADIENT)


@njit(error_model="numpy")
def _input_line(source, step, target, target_step):
    """B^T d of six vectors that lie `step` bytes apart."""
    d0, d1, d2 = load(source), load(source + step), load(source + 2 * step)
    _transform_line(
        d0, d1, d2, load(source + 3 * step), load(source + 4 * step), load(source + 5 * step), target, target_step
    )


@njit(error_model="numpy")
def _relu_line(source, step, target, target_step):
    """B^T max(0, d) of six vectors."""
    d0, d1, d2 = _relu(load(source)), _relu(load(source + step)), _relu(load(source + 2 * step))
    d3, d4, d5 = _relu(load(source + 3 * step)), _relu(load(source + 4 * step)), _relu(load(source + 5 * step))
    _transform_line(d0, d1, d2, d3, d4, d5, target, target_step)


@njit(error_model="numpy")
def _relu(x):
    return maximum(splat(_ZERO), x)


@njit(error_model="numpy")
def _transform_line(d0, d1, d2, d3, d4, d5, target, target_step):
    """B^T d of six vectors."""
    product, sum_ = splat(_NEAR_2 * _FAR_2), splat(-(_NEAR_2 + _FAR_2))
    store(target, fma(product, d0, fma(sum_, d2, d4)))
    even, odd = fma(splat(-_FAR_2), d2, d4), splat(_NEAR) * fma(splat(-_FAR_2), d1, d3)
    store(target + target_step, even + odd)
    store(target + 2 * target_step, even - odd)
    even, odd = fma(splat(-_NEAR_2), d2, d4), splat(_FAR) * fma(splat(-_NEAR_2), d1, d3)
    store(target + 3 * target_step, even + odd)
    store(target + 4 * target_step, even - odd)
    store(target + 5 * target_step, fma(product, d1, fma(sum_, d3, d5)))


@njit(error_model="numpy")
def _output_line(source, source_step, target, target_step):
    """A^T m of six vectors: four."""
    m0, m1, m2 = load(source), load(source + source_step), load(source + 2 * source_step)
    m3, m4, m5 = load(source + 3 * source_step), load(source + 4 * source_step), load(source + 5 * source_step)
    near_even, near_odd, far_even, far_odd = m1 + m2, splat(_NEAR) * (m1 - m2), m3 + m4, splat(_FAR) * (m3 - m4)
    near_2, far_2 = splat(_NEAR_2), splat(_FAR_2)
    store(target, m0 + near_even + far_even)
    store(target + target_step, near_odd + far_odd)
    store(target + 2 * target_step, fma(near_2, near_even, far_2 * far_even))
    store(target + 3 * target_step, fma(near_2, near_odd, fma(far_2, far_odd, m5)))


def transform_input(args, task, thread):
    """Transforms one tile of the map, all channels."""
    p = _read_input(args, thread)
    work, height, width, pixel, row, point_bytes = (
        p.scratch,
        p.height,
        p.width,
        p.pixel_bytes,
        p.row_bytes,
        p.point_bytes,
    )
    down, across = (height + 3) // 4, (width + 3) // 4
    nth = p.first_tile + task
    top, left = nth // across % down * 4 - 1, nth % across * 4 - 1
    x = p.x + nth // (across * down) * p.image_bytes
    column = work + POINTS * _VECTOR
    target = p.v + task * p.tile_bytes
    for c in range(0, p.channels * 4, _VECTOR):
        for j in range(6):
            if left + j < 0 or left + j >= width:
                for i in range(6):
                    store(work + (i * 6 + j) * _VECTOR, splat(_ZERO))
                continue
            pixels = x + c + (left + j) * pixel
            if top >= 0 and top + 6 <= height:
                if p.relu != 0:
                    _relu_line(pixels + top * row, row, work + j * _VECTOR, 6 * _VECTOR)
                else:
                    _input_line(pixels + top * row, row, work + j * _VECTOR, 6 * _VECTOR)
                continue
            for i in range(6):
                inside = top + i >= 0 and top + i < height
                store(column + i * _VECTOR, load(pixels + (top + i) * row) if inside else splat(_ZERO))
            if p.relu != 0:
                _relu_line(column, _VECTOR, work + j * _VECTOR, 6 * _VECTOR)
            else:
                _input_line(column, _VECTOR, work + j * _VECTOR, 6 * _VECTOR)
        here = target + c // (4 * NR) * p.panel_bytes + c % (4 * NR)
        for i in range(6):
            _input_line(work + i * 6 * _VECTOR, _VECTOR, here + i * 6 * point_bytes, point_bytes)


def transform_output(args, task, thread):
    """Transforms one tile of products back and puts it into the map: f(products + bias, or + what is there), or
    residual + gain * (products + bias)."""
    p = _read_output(args, thread)
    work, height, width, pixel, row, point_bytes = (
        p.scratch,
        p.height,
        p.width,
        p.pixel_bytes,
        p.row_bytes,
        p.point_bytes,
    )
    down, across = (height + 3) // 4, (width + 3) // 4
    nth = p.first_tile + task
    top, left = nth // across % down * 4, nth % across * 4
    y = p.y + nth // (across * down) * p.image_bytes + top * row + left * pixel
    residual = p.residual + nth // (across * down) * p.residual_image_bytes
    residual += top * p.residual_row_bytes + left * p.residual_pixel_bytes
    line = work + 24 * _VECTOR
    source = p.m + task * p.tile_bytes
    for c in range(0, p.channels * 4, _VECTOR):
        for j in range(6):
            _output_line(source + c + j * point_bytes, 6 * point_bytes, work + j * _VECTOR, 6 * _VECTOR)
        for i in range(min(4, height - top)):
            _output_line(work + i * 6 * _VECTOR, _VECTOR, line, _VECTOR)
            for j in range(min(4, width - left)):
                target = y + c + i * row + j * pixel
                value = load(line + j * _VECTOR) + load(p.bias + c if p.bias != 0 else target)
                if p.residual != 0:
                    there = residual + c + i * p.residual_row_bytes + j * p.residual_pixel_bytes
                    value = fma(splat(load_float(p.gain)), value, load(there))
                store(target, maximum(splat(_ZERO), value) if p.relu != 0 else value)


def transform_weight(args, task, thread):
    """G g G^T in float64 of the kernels of one panel of output channels, times the batch norm's scale."""
    p = _read_weight(args, thread)
    point_bytes = (p.out + NR - 1) // NR * p.channels * NR * 4
    half, tap = p.scratch, p.tap_bytes  # G g: 6 x 3
    for k in range(p.channels):
        for j in range(NR):
            o = task * NR + j
            target = p.panels + (task * p.channels + k) * NR * 4 + 4 * j
            if o >= p.out:
                for point in range(POINTS):
                    store_float(target + point * point_bytes, _ZERO)
                continue
            g = p.weight + o * p.out_bytes + k * p.in_bytes
            factor = np.float64(load_float(p.scale + 4 * o))
            for b in range(3):
                _weight_line(
                    load_float(g + tap * b) * factor, load_float(g + tap * (3 + b)) * factor,
                    load_float(g + tap * (6 + b)) * factor, half + 4 * b, 12,
                )  # fmt: skip
            for a in range(6):
                line = half + 12 * a
                _weight_line(
                    np.float64(load_float(line)), np.float64(load_float(line + 4)), np.float64(load_float(line + 8)),
                    target + 6 * a * point_bytes, point_bytes,
                )  # fmt: skip


@njit(error_model="numpy")
def _weight_line(g0, g1, g2, target, step):
    """G g of three elements: six."""
    near, far = 2 * NEAR**2 * (NEAR**2 - FAR**2), 2 * FAR**2 * (FAR**2 - NEAR**2)
    near_even, far_even = g0 + g2 * NEAR**2, g0 + g2 * FAR**2
    store_float(target, np.float32(g0 / (NEAR**2 * FAR**2)))
    store_float(target + step, np.float32((near_even + g1 * NEAR) / near))
    store_float(target + 2 * step, np.float32((near_even - g1 * NEAR) / near))
    store_float(target + 3 * step, np.float32((far_even + g1 * FAR) / far))
    store_float(target + 4 * step, np.float32((far_even - g1 * FAR) / far))
    store_float(target + 5 * step, np.float32(g2))


# Backward -----------------------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _cotangent_line(source, source_step, target, target_step):
    """A g of four vectors: six."""
    g0, g1 = load(source), load(source + source_step)
    g2, g3 = load(source + 2 * source_step), load(source + 3 * source_step)
    store(target, g0)
    even, odd = fma(splat(_NEAR_2), g2, g0), splat(_NEAR) * fma(splat(_NEAR_2), g3, g1)
    store(target + target_step, even + odd)
    store(target + 2 * target_step, even - odd)
    even, odd = fma(splat(_FAR_2), g2, g0), splat(_FAR) * fma(splat(_FAR_2), g3, g1)
    store(target + 3 * target_step, even + odd)
    store(target + 4 * target_step, even - odd)
    store(target + 5 * target_step, g3)


@njit(error_model="numpy")
def _weight_gradient_line(source, source_step, target, target_step):
    """G^T u of six vectors: three."""
    u0, u1, u2 = load(source), load(source + source_step), load(source + 2 * source_step)
    u3, u4, u5 = load(source + 3 * source_step), load(source + 4 * source_step), load(source + 5 * source_step)
    near, far = splat(_PER_NEAR), splat(_PER_FAR)
    near_even, near_odd, far_even, far_odd = near * (u1 + u2), near * (u1 - u2), far * (u3 + u4), far * (u3 - u4)
    store(target, fma(splat(_PER_BOTH), u0, near_even + far_even))
    store(target + target_step, fma(splat(_NEAR), near_odd, splat(_FAR) * far_odd))
    store(target + 2 * target_step, fma(splat(_NEAR_2), near_even, fma(splat(_FAR_2), far_even, u5)))


def transform_cotangent(args, task, thread):
    """A dY A^T of one tile of the cotangent dY, all channels; zeros beyond the border."""
    p = _read_cotangent(args, thread)
    tile, half, height, width, point_bytes = p.scratch, p.scratch + 16 * _VECTOR, p.height, p.width, p.point_bytes
    down, across = (height + 3) // 4, (width + 3) // 4
    nth = p.first_tile + task
    top, left = nth // across % down * 4, nth % across * 4
    g = p.g + nth // (across * down) * p.image_bytes + top * p.row_bytes + left * p.pixel_bytes
    target = p.m + task * p.tile_bytes
    for c in range(0, p.channels * 4, _VECTOR):
        for i in range(4):
            for j in range(4):
                inside = top + i < height and left + j < width
                value = load(g + i * p.row_bytes + j * p.pixel_bytes + c) if inside else splat(_ZERO)
                store(tile + (i * 4 + j) * _VECTOR, value)
        for j in range(4):
            _cotangent_line(tile + j * _VECTOR, 4 * _VECTOR, half + j * _VECTOR, 4 * _VECTOR)
        for i in range(6):
            _cotangent_line(half + i * 4 * _VECTOR, _VECTOR, target + c + i * 6 * point_bytes, point_bytes)


def transform_weight_gradient(args, task, thread):
    """G^T dU G, the nine taps of every input channel of output channel `task`."""
    p = _read_gradient(args, thread)
    half, taps = p.scratch, p.scratch + 18 * _VECTOR
    point_bytes = p.point_bytes
    u, weight = p.u + task * p.channels * 4, p.weight + task * p.out_bytes
    for c in range(0, p.channels * 4, _VECTOR):
        for j in range(6):
            _weight_gradient_line(u + c + j * point_bytes, 6 * point_bytes, half + j * _VECTOR, 6 * _VECTOR)
        for i in range(3):
            _weight_gradient_line(half + i * 6 * _VECTOR, _VECTOR, taps + i * 3 * _VECTOR, _VECTOR)
        for tap in range(9):
            for lane in range(LANES):
                store_float(weight + (c // 4 + lane) * 36 + 4 * tap, load_float(taps + tap * _VECTOR + 4 * lane))
