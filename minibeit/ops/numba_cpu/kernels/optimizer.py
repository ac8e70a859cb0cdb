"""One step of AdamW on some of the weights."""

from __future__ import annotations

import numpy as np

from ..gradient_arguments import ADAMW, CHUNK
from ..target import LANES
from .vector import divide, fma, load, load_float, reader, root, splat, sqrt, store, store_float

_read = reader(ADAMW)


def adamw(args, task, thread):
    """Weights task * CHUNK ...; the formula is in `reference.adamw`, the factors are those of `optimizer.adamw`."""
    p = _read(args, thread)
    weights, gradient, mean, square, numbers = p.weights, p.gradient, p.mean, p.square, p.factors
    keep, grow_mean = load_float(numbers), load_float(numbers + 4)
    beta2, grow_square = load_float(numbers + 8), load_float(numbers + 12)
    root_scale, eps, rate = load_float(numbers + 16), load_float(numbers + 20), load_float(numbers + 24)
    last = min((task + 1) * CHUNK, p.count)
    whole = task * CHUNK + (last - task * CHUNK) // LANES * LANES
    for i in range(task * CHUNK, whole, LANES):
        g, m, v = load(gradient + 4 * i), load(mean + 4 * i), load(square + 4 * i)
        m = fma(g - m, splat(grow_mean), m)
        v = fma(g * g, splat(grow_square), v * splat(beta2))
        below = fma(root(v), splat(root_scale), splat(eps))
        w = load(weights + 4 * i) * splat(keep)
        store(mean + 4 * i, m)
        store(square + 4 * i, v)
        store(weights + 4 * i, w - divide(m * splat(rate), below))
    for i in range(whole, last):
        one, m_one, v_one = load_float(gradient + 4 * i), load_float(mean + 4 * i), load_float(square + 4 * i)
        m_one += (one - m_one) * grow_mean
        v_one = v_one * beta2 + one * one * grow_square
        store_float(mean + 4 * i, m_one)
        store_float(square + 4 * i, v_one)
        below_one = sqrt(v_one) * root_scale + eps
        store_float(weights + 4 * i, load_float(weights + 4 * i) * keep - np.float32(m_one * rate) / below_one)
