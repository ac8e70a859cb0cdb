"""What a parameter's gradient loses where rows or places are added up one after the other in float32.

NumPy's products add them up in blocks, and the reference's other sums are float64: over n terms the rounding errors of
a plain sum grow with the square root of n.  PyTorch and other engines add up in float32, and are right to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..ops import reference
from ..ops.backward.activations import derivative
from ..params import BATCH_NORM_EPS, Attention, ConvBatchNorm
from .difference import distance

SAMPLES = 64  # elements of a matrix's gradient that are added up, and features where there are many terms
MOST_TERMS = 1 << 22  # of which every feature is added up
Loss = tuple[float, float]  # (rms, largest) relative error


def losses(op: str, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The `Loss` of each parameter in the place it has among the op's arguments; `given` are those of its backward."""
    return LOSSES[op](*given) if op in LOSSES else ()


# Rows -----------------------------------------------------------------------------------------------------------------


def _layer_norm(g: np.ndarray, saved: None, x: np.ndarray, norm: Any, eps: float) -> tuple[Any, ...]:
    centred = x - x.mean(-1, keepdims=True)
    h = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
    return None, replace(norm, weight=_of_rows(g * h), bias=_of_rows(g))


def _linear(g: np.ndarray, saved: Any, x: np.ndarray, layer: Any) -> tuple[Any, ...]:
    bias = None if layer.bias is None else _of_rows(g)
    return None, replace(layer, weight=_of_products(_rows(g), _rows(x)), bias=bias)


def _linear_activation(g: np.ndarray, saved: Any, x: np.ndarray, layer: Any, activation: str) -> tuple[Any, ...]:
    return _linear(g * derivative(activation, saved), None, x, layer)


def _linear_residual(
    g: np.ndarray, saved: None, x: np.ndarray, layer: Any, scale: Any, residual: Any, keep: Any = None
) -> tuple[Any, ...]:
    a = g if keep is None else g * keep
    if scale is None:
        return _linear(a, None, x, layer)
    return (*_linear(a * scale, None, x, layer), _of_rows(a * reference.linear(x, layer)))


def _project_qkv(g: tuple[Any, ...], saved: None, x: np.ndarray, p: Attention, num_heads: int) -> tuple[Any, ...]:
    columns = (part.transpose(0, 2, 1, 3).reshape(x.shape) for part in g)
    query, key, value = (_linear(part, None, x, layer)[1] for part, layer in zip(columns, (p.query, p.key, p.value)))
    return None, Attention(query, key, value, output=None)  # type: ignore[arg-type]


def _mask_tokens(g: np.ndarray, saved: None, x: np.ndarray, mask: np.ndarray, mask_token: Any) -> tuple[Any, ...]:
    return None, None, _of_rows(g[mask])


# Maps -----------------------------------------------------------------------------------------------------------------


def _conv2d(g: np.ndarray, saved: None, x: np.ndarray, conv: Any, *rest: Any) -> tuple[Any, ...]:
    bias = None if conv.bias is None else _of_rows(_places(g))
    return None, replace(conv, weight=_of_taps(g, x, conv.weight.shape), bias=bias)


def _relu_conv2d(g: np.ndarray, saved: None, x: np.ndarray, conv: Any, gain: Any = 1.0, *rest: Any) -> tuple[Any, ...]:
    return _conv2d(g * g.dtype.type(gain), None, np.maximum(x, 0), conv)


def _conv_bn_relu(g: np.ndarray, saved: Any, x: np.ndarray, layer: ConvBatchNorm) -> tuple[Any, ...]:
    y, moments, positive = saved
    dy, bn = _batch_norm(g * positive, moments, y, layer.bn)
    return None, ConvBatchNorm(_conv2d(dy, None, x, layer.conv)[1], bn)


def _conv_bn_relu_resized(g: np.ndarray, saved: Any, maps: Any, layer: ConvBatchNorm, size: Any) -> tuple[Any, ...]:
    return _conv_bn_relu(g, saved[1], saved[0], layer)


def _conv_transpose(g: np.ndarray, saved: None, x: np.ndarray, deconv: Any) -> tuple[Any, ...]:
    B, C, h, w = x.shape
    squares = g.reshape(B, -1, h, 2, w, 2).transpose(0, 2, 4, 1, 3, 5).reshape(B * h * w, -1)
    return None, replace(deconv, weight=_of_products(_places(x), squares), bias=_of_rows(_places(g)))


def _conv_transpose_bn_gelu(g: np.ndarray, saved: Any, x: np.ndarray, deconv: Any, bn: Any) -> tuple[Any, ...]:
    y, moments, z = saved
    dy, d_bn = _batch_norm(g * derivative("gelu", z), moments, y, bn)
    return (*_conv_transpose(dy, None, x, deconv), d_bn)


def _batch_norm(g: np.ndarray, moments: Any, x: np.ndarray, bn: Any) -> tuple[np.ndarray, Any]:
    """(the cotangent of x, with running statistics; the losses)."""
    r = (1 / np.sqrt(moments.var + BATCH_NORM_EPS))[:, None, None]
    hat = (x - moments.mean[:, None, None]) * r
    made = replace(
        bn, weight=_of_rows(_places(g * hat)), bias=_of_rows(_places(g)), running_mean=None, running_var=None
    )
    return g * (bn.weight[:, None, None] * r), made


LOSSES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "layer_norm": _layer_norm,
    "linear": _linear,
    "linear_activation": _linear_activation,
    "linear_residual": _linear_residual,
    "project_qkv": _project_qkv,
    "mask_tokens": _mask_tokens,
    "conv2d": _conv2d,
    "relu_conv2d": _relu_conv2d,
    "relu_conv2d_residual": _relu_conv2d,
    "conv_bn_relu": _conv_bn_relu,
    "conv_bn_relu_resized": _conv_bn_relu_resized,
    "conv_transpose": _conv_transpose,
    "conv_transpose_bn_gelu": _conv_transpose_bn_gelu,
}


# Sums -----------------------------------------------------------------------------------------------------------------


def _of_rows(terms: np.ndarray) -> Loss:  # (..., features)
    """Of the sum over rows."""
    rows = _rows(terms)
    if rows.size > MOST_TERMS:
        rows = rows[:, :: max(rows.shape[1] // SAMPLES, 1)]
    return _in_order(rows.T)


def _of_products(g: np.ndarray, x: np.ndarray) -> Loss:  # (n, out), (n, in)
    """Of some elements of g^T x."""
    rng = np.random.default_rng(0)
    o, c = (rng.integers(side.shape[1], size=SAMPLES) for side in (g, x))
    return _in_order(np.float32(g[:, o]).T * np.float32(x[:, c]).T)


def _of_taps(g: np.ndarray, x: np.ndarray, shape: tuple[int, ...]) -> Loss:
    """Of some elements of a kernel (out, in, kh, kw) for the cotangent g of the result and the input x."""
    g, x = np.asarray(g, np.float32), np.asarray(x, np.float32)
    kh, kw = shape[2:]
    h, w = x.shape[2:]
    wide = np.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)))
    rng = np.random.default_rng(0)
    places = zip(*(rng.integers(n, size=SAMPLES) for n in shape))
    return _in_order(np.stack([(g[:, o] * wide[:, c, i : i + h, j : j + w]).reshape(-1) for o, c, i, j in places]))


def _in_order(terms: np.ndarray) -> Loss:  # (sums, terms)
    terms = np.asarray(terms, np.float32)
    if not terms.shape[1]:
        return 0.0, 0.0
    return distance(np.add.accumulate(terms, 1)[:, -1], terms.sum(1, dtype=np.float64))


def _rows(x: np.ndarray) -> np.ndarray:  # (..., n) -> (rows, n)
    return x.reshape(-1, x.shape[-1])


def _places(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B h w, C)
    return x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])
