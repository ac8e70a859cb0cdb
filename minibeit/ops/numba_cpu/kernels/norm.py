"""Layer norm of some rows."""

from __future__ import annotations

import numpy as np

from ..arguments import LAYER_NORM, ROWS
from ..target import LANES
from .micro import prefetch
from .vector import fma, load, load_float, reader, splat, sqrt, store, store_float, sum_lanes

_ONE = np.float32(1)
_read = reader(LAYER_NORM)


def layer_norm(args, task, thread):
    """Two passes over a row that stays in the first-level cache; sums in LANES parts, then the rest one by one."""
    p = _read(args, thread)
    x_bytes, width, weight, bias = p.x_bytes, p.width, p.weight, p.bias
    eps = load_float(p.eps)
    whole = width // LANES * LANES
    inverse = _ONE / np.float32(width)
    for row in range(task * ROWS, min((task + 1) * ROWS, p.count)):
        source, target = p.x + row * x_bytes, p.y + row * p.y_bytes
        total = splat(np.float32(0))
        for k in range(0, whole, LANES):
            prefetch(source + 2 * x_bytes + 4 * k)  # since it was written the products' weights have passed
            total = total + load(source + 4 * k)
        mean = sum_lanes(total)
        for k in range(whole, width):
            mean += load_float(source + 4 * k)
        mean *= inverse
        total = splat(np.float32(0))
        for k in range(0, whole, LANES):
            centred = load(source + 4 * k) - splat(mean)
            total = fma(centred, centred, total)
        var = sum_lanes(total)
        for k in range(whole, width):
            var += (load_float(source + 4 * k) - mean) ** 2
        scale = _ONE / sqrt(var * inverse + eps)
        for k in range(0, whole, LANES):
            centred = (load(source + 4 * k) - splat(mean)) * splat(scale)
            store(target + 4 * k, fma(centred, load(weight + 4 * k), load(bias + 4 * k)))
        for k in range(whole, width):
            centred = (load_float(source + 4 * k) - mean) * scale
            store_float(target + 4 * k, centred * load_float(weight + 4 * k) + load_float(bias + 4 * k))
