"""The model's own small arithmetic on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .device import cupy

Array = Any


def add(x: Array, y: Array) -> Array:  # (...), (...) -> (...)
    """See `reference.add`."""
    return x + y


def dropout(x: Array, keep: Array) -> Array:  # (...), (...) -> (...)
    """See `reference.dropout`."""
    return x * keep


def mask_tokens(x: Array, mask: Array, mask_token: Array) -> Array:  # (B, P, D) -> (B, P, D)
    """See `reference.mask_tokens`."""
    w = cupy.asarray(mask)[:, :, None].astype(x.dtype)
    return x * (1 - w) + mask_token * w


def mean_patches(x: Array) -> Array:  # (B, N, D) -> (B, D)
    """See `reference.mean_patches`."""
    return x[:, 1:].mean(1, dtype=np.float64).astype(x.dtype, copy=False)


def tokens_to_map(x: Array, grid: tuple[int, int]) -> Array:  # (B, N, D) -> (B, D, gh, gw)
    """See `reference.tokens_to_map`."""
    B, _, D = x.shape
    return x[:, 1:].transpose(0, 2, 1).reshape(B, D, *grid)


def first_token(x: Array) -> Array:  # (B, N, D) -> (B, D)
    """See `reference.first_token`."""
    return x[:, 0]


def recompute(function: Callable[..., Any], ops: Any, args: tuple[Any, ...]) -> Any:
    """See `reference.recompute`."""
    return function(ops, *args)
