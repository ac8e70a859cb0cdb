"""Where a gradient jumps: a ReLU at 0, two largest of a square, a pixel met exactly.

Two right runs whose inputs there differ by rounding can take either side.  Such places are found in the float64 run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ops.backward import conv_bn_relu_backward, conv_bn_relu_resized_backward
from ..params import BATCH_NORM_EPS
from . import budget

NEAR = 32 * budget.EPS32  # times the root mean square of an array: nearer to a kink, float32 may be on either side


def undecided(op: str, x: np.ndarray, *args: Any) -> np.ndarray | None:
    """The mask of x's elements whose cotangent may jump, x being the first argument of the op; None for other ops."""
    near = NEAR * float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
    if op in ("relu_conv2d", "relu_conv2d_residual"):
        return np.abs(x) <= near
    if op == "max_pool2x2":
        return _ties(x, near)
    if op == "logit_laplace_loss":
        pixels = args[0].astype(x.dtype)
        means, rest = np.split(x, 2, axis=1)
        return np.concatenate([np.abs(np.log(pixels / (1 - pixels)) - means) <= near, np.zeros(rest.shape, bool)], 1)
    return None


def turned(op: str, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """How the gradients of a convolution with a ReLU of its own change if all its undecided places take the other side.

    `given` are the arguments of the op's backward.  None for other ops, and where every place is decided.
    """
    if op not in ("conv_bn_relu", "conv_bn_relu_resized"):
        return None
    g, saved, x, layer, *rest = given
    resized = op == "conv_bn_relu_resized"
    y, moments, positive = saved[1] if resized else saved
    mean, scale = moments.mean, layer.bn.weight / np.sqrt(moments.var + BATCH_NORM_EPS)
    z = (y - mean[:, None, None]) * scale[:, None, None] + layer.bn.bias[:, None, None]
    near = np.abs(z) <= NEAR * float(np.sqrt(np.mean(np.square(z))))
    if not near.any():
        return None
    change, all_open = g * near * np.where(positive, -1.0, 1.0), (y, moments, np.ones(y.shape, bool))
    if resized:
        return conv_bn_relu_resized_backward(change, (saved[0], all_open), x, layer, *rest)
    return conv_bn_relu_backward(change, all_open, x, layer)


def _ties(x: np.ndarray, near: float) -> np.ndarray:  # (B, C, h, w)
    """All elements that are nearly the largest of their square, where there is more than one."""
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    squares = x[:, :, :h, :w].reshape(*x.shape[:2], h // 2, 2, w // 2, 2)
    close = squares >= squares.max((3, 5), keepdims=True) - near
    tied = close & (close.sum((3, 5), keepdims=True) > 1)
    mask = np.zeros(x.shape, bool)
    mask[:, :, :h, :w] = tied.reshape(*x.shape[:2], h, w)
    return mask


def decided(found: np.ndarray, exact: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, int]:
    """`found` with the elements of `exact` where it took the other side of a kink, and at how many places it did."""
    if mask is None or found.shape != exact.shape or not mask.any():
        return found, 0
    size = float(np.sqrt(np.mean(np.square(exact))))
    jumped = mask & (np.abs(found - exact) > NEAR * size)
    return np.where(jumped, exact, found).astype(found.dtype), int(jumped.sum())
