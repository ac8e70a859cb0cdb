"""What engines of low precision lose, imitated in NumPy: the yardstick for traces in bfloat16, float16 and int8.

16 bits: parameters, the inputs of every op and, where an engine keeps its results so, the results are rounded; products
are added up in float32; scores and probabilities of attention are rounded as PyTorch's eager attention rounds them.
int8: the weights of products are rounded to 255 steps, one scale for each output channel; their inputs likewise, with
one scale for each array, which is the coarsest that engines do (dynamically, or calibrated well).  Everything between
products is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..config import BeitConfig
from ..ops.low_precision import migrated, rounded
from ..ops.table import ARITHMETIC, names_of
from ..params import Attention, ConvBatchNorm, LayerNorm, flatten, shapes, unflatten
from .float64_model import float32_model

HALVES = ("bfloat16", "float16")
PRECISIONS = (*HALVES, "int8")
STEPS = 127  # of int8, on either side of 0
FEW = 16  # elements; fewer are on a coarse grid by chance
QUANTISED = (
    "linear", "linear_activation", "linear_residual", "project_qkv", "attention", "conv2d", "conv_bn_relu",
    "conv_bn_relu_resized", "relu_conv2d", "relu_conv2d_residual", "conv_transpose", "conv_transpose_bn_gelu",
)  # fmt: skip


def half(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to "float16" or "bfloat16", in float64."""
    return _half32(x, dtype).astype(np.float64)


def _half32(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to "float16" or "bfloat16", in float32, which holds both exactly."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    return rounded(x.astype(np.float32, copy=False))


def int8(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """`x` rounded to 255 steps of one scale, or of one for each index of `axis`: symmetric, as products need it."""
    others = None if axis is None else tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    largest = np.abs(x).max(axis=others, keepdims=True, initial=0)
    scale = np.where(largest > 0, largest / STEPS, 1).astype(x.dtype)
    return np.rint(x / scale) * scale


def stored_as(x: np.ndarray) -> str | None:
    """The 16-bit precision in which every element of `x` can be stored, bfloat16 first; None for neither."""
    if x.size < FEW or x.dtype.kind != "f":
        return None
    return next((dtype for dtype in HALVES if np.array_equal(half(x, dtype), x)), None)


def imitations(config: BeitConfig, task: str, arrays: Mapping[str, np.ndarray], precision: str) -> tuple[Any, Any]:
    """Two NumPy models that compute in one of PRECISIONS; of 16 bits the second rounds the results of ops as well."""
    if precision not in HALVES:
        model = float32_model(config, task, arrays)
        return (_with_ops(model, {name: _quantised(name, getattr(model.ops, name)) for name in QUANTISED}),) * 2
    arrays = {name: _rounded(array, precision) for name, array in arrays.items()}
    made = []
    for stored in (False, True):
        model = float32_model(config, task, arrays)
        changed = {name: _halved(name, getattr(model.ops, name), precision, stored) for name in names_of(ARITHMETIC)}
        made.append(_with_ops(model, changed))
    return made[0], made[1]


def _with_ops(model: Any, changed: Mapping[str, Callable[..., Any]]) -> Any:
    model.ops = SimpleNamespace(**{**vars(model.ops), **changed})
    return model


def migrated_arrays(config: BeitConfig, task: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters with scales moved from norms to weights as minibeit's int8 moves them: the same function, to the
    bit, but other numbers between a norm and the products after it."""
    params = unflatten(shapes(config, task), arrays)
    blocks = tuple(migrated(block) for block in params.beit.encoder)
    return dict(flatten(replace(params, beit=replace(params.beit, encoder=blocks))))


def _rounded(x: Any, precision: str) -> Any:
    """Arrays rounded, alone or in lists and tuples; anything else unchanged."""
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        return type(x)(_rounded(part, precision) for part in x)
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        return _half32(x, precision)
    return x


def _halved(name: str, op: Callable[..., Any], precision: str, stored: bool) -> Callable[..., Any]:
    """An op on rounded arrays; parameters are rounded before, once."""
    run = _eager_attention(precision) if name == "attention" else op

    def call(*args: Any, **kwargs: Any) -> Any:
        result = run(*(_rounded(arg, precision) for arg in args), **kwargs)
        return _rounded(result, precision) if stored else result

    return call


def _eager_attention(precision: str) -> Callable[..., Any]:
    """`reference.attention` whose scores, bias and probabilities are rounded one after the other."""
    from ..ops.reference import relative_position_index, softmax

    def attention(q: Any, k: Any, v: Any, bias: Any, return_probs: bool = False, keep: Any = None) -> Any:
        B, H, N, d = q.shape
        context = np.empty((B, N, H, d), q.dtype)
        probs = np.empty((B, H, N, N), q.dtype) if return_probs else None
        index = None if bias is None else relative_position_index(bias.grid)
        for h in range(H):
            scores = _rounded(q[:, h] @ k[:, h].swapaxes(1, 2), precision) * q.dtype.type(d**-0.5)
            if index is not None:
                scores = _rounded(scores + bias.table[:, h][index], precision)
            p = _rounded(softmax(scores), precision)
            if probs is not None:
                probs[:, h] = p
            context[:, :, h] = p @ v[:, h]
        context = context.reshape(B, N, H * d)
        return context if probs is None else (context, probs)

    return attention


def _quantised(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """An op whose products are of integers: weights by output channel, inputs by array."""

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "attention":
            return op(int8(x), int8(args[0]), int8(args[1]), *args[2:], **kwargs)
        inputs = [int8(part) for part in x] if isinstance(x, list) else int8(x)
        layer = _with_int8_weights(args[0], 1 if "transpose" in name else 0)
        return op(inputs, layer, *args[1:], **kwargs)

    return call


def _with_int8_weights(layer: Any, axis: int) -> Any:
    """A layer with its weights rounded along the axis of its output channels; norms stay as they are."""
    if isinstance(layer, LayerNorm):
        return layer
    if isinstance(layer, Attention):
        names = ("query", "key", "value")
        return replace(layer, **{name: _with_int8_weights(getattr(layer, name), axis) for name in names})
    if isinstance(layer, ConvBatchNorm):
        return replace(layer, conv=_with_int8_weights(layer.conv, axis))
    return replace(layer, weight=int8(layer.weight, axis))
