"""Layer norm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from .kernels import task_kernel
from .memory import padded, rows
from .pool import run
from .vector import LANES, arguments, fma, load, load_float, splat, store, store_float, sum_lanes

_ROWS = 32  # rows per task
_SMALL = 1 << 16  # numbers; some microseconds
_ONE = np.float32(1)


def _layer_norm_kernel(args, task, thread):
    """Two passes over a row that stays in the first-level cache; sums in LANES parts, then the rest one by one."""
    _, _, x, x_bytes, count, width, weight, bias, y, y_bytes, eps_at = arguments(args, 11)
    eps = load_float(eps_at)
    whole = width // LANES * LANES
    inverse = _ONE / np.float32(width)
    for row in range(task * _ROWS, min((task + 1) * _ROWS, count)):
        source, target = x + row * x_bytes, y + row * y_bytes
        total = splat(np.float32(0))
        for k in range(0, whole, LANES):
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
        scale = _ONE / np.float32(math.sqrt(var * inverse + eps))
        for k in range(0, whole, LANES):
            centred = (load(source + 4 * k) - splat(mean)) * splat(scale)
            store(target + 4 * k, fma(centred, load(weight + 4 * k), load(bias + 4 * k)))
        for k in range(whole, width):
            centred = (load_float(source + 4 * k) - mean) * scale
            store_float(target + 4 * k, centred * load_float(weight + 4 * k) + load_float(bias + 4 * k))


_layer_norm = task_kernel(_layer_norm_kernel)


@dataclass(frozen=True)
class PackedNorm:
    """A layer norm's weight and bias (D,), contiguous, with their addresses."""

    weight: np.ndarray
    bias: np.ndarray
    source: Any = None  # the layer as it was, kept on request
    addresses: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", (self.weight.ctypes.data, self.bias.ctypes.data))


@lru_cache(maxsize=64)
def _constant(value: float) -> tuple[np.ndarray, int]:
    """A float32 in memory and its address: kernels take nothing but integers."""
    array = np.array([value], np.float32)
    return array, array.ctypes.data


def layer_norm_rows(x: np.ndarray, norm: PackedNorm, eps: float) -> np.ndarray:  # (..., D)
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis of a float32 array."""
    x_rows, count, x_bytes = rows(x)
    y = padded(x.shape)
    _kept, eps_address = _constant(eps)
    arguments = (
        x_rows.ctypes.data, x_bytes, count, x.shape[-1], *norm.addresses, y.ctypes.data, rows(y)[2], eps_address,
    )  # fmt: skip
    run(_layer_norm, -(-count // _ROWS), arguments, small=x.size < _SMALL)
    return y
