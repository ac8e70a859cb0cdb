"""Backward of the ops that move, join, add or drop, and of the few methods of arrays that model code uses.

What here calls only methods of arrays serves arrays on a GPU as well (`cupy_gpu/halves.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

__all__ = [
    "add_backward",
    "concatenate_backward",
    "dropout_backward",
    "mask_tokens_backward",
    "masked_patches_backward",
    "mean_patches_backward",
    "part_backward",
    "reshape_backward",
    "tokens_to_map_backward",
    "total",
    "transpose_backward",
]


def total(x: np.ndarray, axis: Any, keepdims: bool = False) -> np.ndarray:
    """Sum over `axis`, accumulated in float64 and rounded once."""
    return x.sum(axis, dtype=np.float64, keepdims=keepdims)[...].astype(x.dtype, copy=False)  # no scalar of NumPy's


def unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:  # (...) -> shape
    """The cotangent of an array of `shape` that was broadcast to the shape of g: the sum over its copies."""
    lead = g.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, size in enumerate(shape) if size == 1 and g.shape[lead + i] != 1)
    return total(g, axes, keepdims=True).reshape(shape) if axes else g


def pieces_of(g: np.ndarray, sizes: Sequence[int], axis: int) -> list[np.ndarray]:
    """`g` cut along an axis into pieces of these sizes."""
    ends = list(accumulate(sizes))
    before = (slice(None),) * (axis % g.ndim)
    return [g[before + (slice(end - size, end),)] for size, end in zip(sizes, ends)]


def add_backward(g: np.ndarray, saved: None, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dx = g, dy = g, each summed over the axes along which it was broadcast."""
    return unbroadcast(g, x.shape), unbroadcast(g, y.shape)


def dropout_backward(g: np.ndarray, saved: None, x: np.ndarray, keep: Any) -> tuple[np.ndarray, None]:
    """dx = g keep; the factors are constants."""
    return unbroadcast(g * keep, x.shape), None


def mask_tokens_backward(
    g: np.ndarray, saved: None, x: np.ndarray, mask: np.ndarray, mask_token: np.ndarray
) -> tuple[np.ndarray, None, np.ndarray]:
    """dx = g (1 - w), dmask_token = sum over images and patches of g w."""
    w = mask[:, :, None].astype(g.dtype)
    return g * (1 - w), None, total(g * w, (0, 1)).reshape(mask_token.shape)


def mean_patches_backward(g: np.ndarray, saved: None, x: np.ndarray) -> tuple[np.ndarray]:
    """dx of every patch token = g / P; 0 for the CLS token."""
    dx = np.empty_like(x)
    dx[:, 0] = 0
    dx[:, 1:] = (g / (x.shape[1] - 1))[:, None]
    return (dx,)


def tokens_to_map_backward(
    g: np.ndarray, saved: None, x: np.ndarray, grid: tuple[int, int]
) -> tuple[np.ndarray, None]:  # (B, D, gh, gw) -> (B, N, D)
    """The map as tokens again; 0 for the CLS token."""
    dx = np.zeros_like(x)
    dx[:, 1:] = g.reshape(*g.shape[:2], -1).transpose(0, 2, 1)
    return dx, None


def masked_patches_backward(
    g: np.ndarray, saved: None, x: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, None]:  # (n, D) -> (B, P, D)
    """g for the patches that the mask marks, 0 for all others."""
    return part_backward(g, saved, x, mask)


def concatenate_backward(
    g: np.ndarray, saved: None, arrays: Sequence[np.ndarray], axis: int
) -> tuple[list[np.ndarray], None]:
    """Every array's piece of g; that of one whose first axis was broadcast is summed over it."""
    pieces = pieces_of(g, [array.shape[axis] for array in arrays], axis)
    return [unbroadcast(piece, array.shape) for piece, array in zip(pieces, arrays)], None


def part_backward(g: np.ndarray, saved: None, x: np.ndarray, index: Any) -> tuple[np.ndarray, None]:
    """For x[index], `index` of integers, slices or a mask, which name no element twice: g there, 0 elsewhere."""
    dx = np.zeros_like(x)
    dx[index] = g
    return dx, None


def reshape_backward(g: np.ndarray, saved: None, x: np.ndarray, shape: Any) -> tuple[np.ndarray, None]:
    """g in the shape of x."""
    return g.reshape(x.shape), None


def transpose_backward(g: np.ndarray, saved: None, x: np.ndarray, axes: Any) -> tuple[np.ndarray, None]:
    """g with its axes back in their places."""
    return g.transpose(tuple(np.argsort(axes).tolist())), None
