"""Backward of layer norm for some rows."""

from __future__ import annotations

import numpy as np

from ..arguments import ROWS
from ..gradient_arguments import LAYER_NORM_BACKWARD
from ..target import LANES
from .vector import fma, load, load_float, reader, splat, sqrt, store, store_float, sum_lanes

_ZERO, _ONE = np.float32(0), np.float32(1)
_read = reader(LAYER_NORM_BACKWARD)


def layer_norm_backward(args, task, thread):
    """dx of ROWS rows, and their part of the sums of g h and g."""
    p = _read(args, thread)
    weight, width, eps = p.weight, p.width, load_float(p.eps)
    whole = width // LANES * LANES
    inverse = _ONE / np.float32(width)
    d_weight = p.parts + task * 8 * width
    d_bias = d_weight + 4 * width
    for k in range(2 * width):
        store_float(d_weight + 4 * k, _ZERO)
    for row in range(task * ROWS, min((task + 1) * ROWS, p.count)):
        source, cotangent, target = p.x + row * p.x_bytes, p.g + row * p.g_bytes, p.dx + row * p.dx_bytes
        total = splat(_ZERO)
        for k in range(0, whole, LANES):
            total = total + load(source + 4 * k)
        mean = sum_lanes(total)
        for k in range(whole, width):
            mean += load_float(source + 4 * k)
        mean *= inverse
        total = splat(_ZERO)
        for k in range(0, whole, LANES):
            centred = load(source + 4 * k) - splat(mean)
            total = fma(centred, centred, total)
        var = sum_lanes(total)
        for k in range(whole, width):
            var += (load_float(source + 4 * k) - mean) ** 2
        scale = _ONE / sqrt(var * inverse + eps)
        total, products = splat(_ZERO), splat(_ZERO)
        for k in range(0, whole, LANES):
            h = (load(source + 4 * k) - splat(mean)) * splat(scale)
            a = load(cotangent + 4 * k) * load(weight + 4 * k)
            total = total + a
            products = fma(a, h, products)
        a_mean, ah_mean = sum_lanes(total), sum_lanes(products)
        for k in range(whole, width):
            a_one = load_float(cotangent + 4 * k) * load_float(weight + 4 * k)
            a_mean += a_one
            ah_mean += a_one * (load_float(source + 4 * k) - mean) * scale
        a_mean *= inverse
        ah_mean *= inverse
        for k in range(0, whole, LANES):
            h = (load(source + 4 * k) - splat(mean)) * splat(scale)
            given = load(cotangent + 4 * k)
            rest = given * load(weight + 4 * k) - splat(a_mean) - h * splat(ah_mean)
            store(target + 4 * k, rest * splat(scale))
            store(d_weight + 4 * k, fma(given, h, load(d_weight + 4 * k)))
            store(d_bias + 4 * k, load(d_bias + 4 * k) + given)
        for k in range(whole, width):
            h_one = (load_float(source + 4 * k) - mean) * scale
            one = load_float(cotangent + 4 * k)
            store_float(target + 4 * k, (one * load_float(weight + 4 * k) - a_mean - h_one * ah_mean) * scale)
            store_float(d_weight + 4 * k, load_float(d_weight + 4 * k) + one * h_one)
            store_float(d_bias + 4 * k, load_float(d_bias + 4 * k) + one)
