"""The fast backward of ops, on plain float32 parameters; the NumPy definition serves what the kernels cannot.

They read arrays that other ops made, so none of them is queued.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...params import Attention, Conv, LayerNorm, Linear, ReluConv
from .. import backward as reference
from ..activations import ACTIVATIONS
from ..backward.activations import derivative
from . import gemm
from .attention import can_fuse
from .attention_gradients import attend_backward
from .conv_gradients import conv_gradients
from .gradient_arguments import COMBINE_DERIVATIVE, COMBINE_GELU, COMBINE_PRODUCT
from .gradients import (
    column_panels,
    combined,
    input_gradient,
    scaled_gradient,
    turned,
    weight_gradient,
)
from .norm import norm_gradients
from .prepare import is_float32, pack_linear
from .queue import synchronous

__all__ = [
    "attention_backward",
    "conv2d_backward",
    "layer_norm_backward",
    "linear_activation_backward",
    "linear_activation_forward",
    "linear_backward",
    "linear_residual_backward",
    "project_qkv_backward",
    "relu_conv2d_backward",
    "relu_conv2d_residual_backward",
]

_GELUS = ("gelu", "gelu_python")


@synchronous
def layer_norm_backward(
    g: np.ndarray, saved: None, x: np.ndarray, norm: Any, eps: float
) -> tuple[np.ndarray, Any, None]:
    """See `reference.layer_norm_backward`."""
    if not is_float32(g, x, norm.weight, norm.bias) or x.size == 0:
        return reference.layer_norm_backward(g, None, x, norm, eps)
    dx, d_weight, d_bias = norm_gradients(g, x, norm.weight, eps)
    return dx, LayerNorm(d_weight, d_bias), None


@synchronous
def linear_backward(g: np.ndarray, saved: None, x: np.ndarray, layer: Any) -> tuple[np.ndarray, Any]:
    """See `reference.linear_backward`."""
    if not _fits(g, x, layer):
        return reference.linear_backward(g, None, x, layer)
    return _linear_backward(g, x, layer)


@synchronous
def linear_activation_forward(x: np.ndarray, layer: Any, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """See `reference.linear_activation_forward`."""
    if not _fits(x, x, layer):
        return reference.linear_activation_forward(x, layer, activation)
    z = gemm.product(x, pack_linear([layer], False))
    return (combined(z, z, COMBINE_GELU) if activation in _GELUS else ACTIVATIONS[activation](z)), z


@synchronous
def linear_activation_backward(
    g: np.ndarray, saved: np.ndarray, x: np.ndarray, layer: Any, activation: str
) -> tuple[np.ndarray, Any, None]:
    """See `reference.linear_activation_backward`."""
    if not _fits(g, x, layer) or not is_float32(saved):
        return reference.linear_activation_backward(g, saved, x, layer, activation)
    if activation in _GELUS:
        return (*_linear_backward(combined(g, saved, COMBINE_DERIVATIVE), x, layer), None)
    return (*_linear_backward(g * derivative(activation, saved), x, layer), None)


@synchronous
def linear_residual_backward(
    g: np.ndarray,
    saved: None,
    x: np.ndarray,
    layer: Any,
    scale: np.ndarray | None,
    residual: np.ndarray,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, Any, np.ndarray | None, np.ndarray]:
    """See `reference.linear_residual_backward`."""
    if not _fits(g, x, layer) or not is_float32(scale, keep):
        return reference.linear_residual_backward(g, None, x, layer, scale, residual, keep)
    a = g if keep is None else g * keep
    if scale is None:
        return (*_linear_backward(a, x, layer), None, g)
    dx = input_gradient(combined(a, scale, COMBINE_PRODUCT), layer.weight)
    a_turned = turned(a)
    dw = weight_gradient(a_turned, column_panels(x), x.shape[-1])
    dscale = scaled_gradient(dw, layer.weight, scale)
    if layer.bias is None:
        return dx, Linear(dw, None), dscale, g
    return dx, Linear(dw, scale * a_turned.sums), dscale + layer.bias * a_turned.sums, g


@synchronous
def project_qkv_backward(
    g: tuple[np.ndarray, np.ndarray, np.ndarray], saved: None, x: np.ndarray, p: Any, num_heads: int
) -> tuple[np.ndarray, Any, None]:
    """See `reference.project_qkv_backward`; the panels of x serve all three layers."""
    layers = p.query, p.key, p.value
    if not all(_fits(part, x, layer) for part, layer in zip(g, layers)):
        return reference.project_qkv_backward(g, None, x, p, num_heads)
    dx, grads, panels = None, [], column_panels(x)
    for part, layer in zip(g, layers):
        columns = part.transpose(0, 2, 1, 3).reshape(*x.shape[:-1], -1)  # a view of what `attention_backward` made
        dx = input_gradient(columns, layer.weight, dx)
        grads.append(_layer_gradient(columns, panels, x, layer))
    query, key, value = grads
    return dx, Attention(query, key, value, output=None), None  # type: ignore[arg-type, return-value]


@synchronous
def attention_backward(
    g: Any,
    saved: None,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: Any | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """See `reference.attention_backward`; probabilities of a few query rows are alive at a time in each thread."""
    if return_probs or keep is not None or not is_float32(g, q, k, v) or not q.size or not can_fuse(q, k, v, bias):
        return reference.attention_backward(g, None, q, k, v, bias, return_probs, keep)
    dq, dk, dv, dtable = attend_backward(g, q, k, v, bias)
    return dq, dk, dv, None if bias is None else replace(bias, table=dtable)


@synchronous
def conv2d_backward(g: np.ndarray, saved: None, x: np.ndarray, conv: Any) -> tuple[np.ndarray, Any]:
    """See `reference.conv2d_backward`."""
    if not _fits_map(g, x, conv):
        return reference.conv2d_backward(g, None, x, conv)
    dx, dw, db = conv_gradients(g, x, conv.weight, relu=False)
    return dx, Conv(dw, None if conv.bias is None else db)


@synchronous
def relu_conv2d_backward(g: np.ndarray, saved: None, x: np.ndarray, conv: Any) -> tuple[np.ndarray, Any]:
    """See `reference.relu_conv2d_backward`."""
    if not _fits_map(g, x, conv):
        return reference.relu_conv2d_backward(g, None, x, conv)
    dx, dw, db = conv_gradients(g, x, conv.weight, relu=True)
    return dx, ReluConv(dw, db)


def relu_conv2d_residual_backward(
    g: np.ndarray, saved: None, x: np.ndarray, conv: Any, gain: float, residual: np.ndarray
) -> tuple[np.ndarray, Any, None, np.ndarray]:
    """See `reference.relu_conv2d_residual_backward`."""
    return (*relu_conv2d_backward(g * g.dtype.type(gain), None, x, conv), None, g)


def _linear_backward(g: np.ndarray, x: np.ndarray, layer: Any) -> tuple[np.ndarray, Any]:
    dx = input_gradient(g, layer.weight.reshape(len(layer.weight), -1))
    return dx.reshape(x.shape), _layer_gradient(g, column_panels(x), x, layer)


def _layer_gradient(g: np.ndarray, panels: np.ndarray, x: np.ndarray, layer: Any) -> Any:
    g_turned = turned(g)
    dw = weight_gradient(g_turned, panels, x.shape[-1]).reshape(layer.weight.shape)
    return type(layer)(dw, None if layer.bias is None else g_turned.sums)


def _fits(g: np.ndarray | None, x: np.ndarray, layer: Any) -> bool:
    if g is None or not is_float32(g, x, layer.weight, layer.bias):
        return False
    return g.size > 0 and x.size > 0 and layer.weight.flags.c_contiguous


def _fits_map(g: np.ndarray, x: np.ndarray, conv: Any) -> bool:
    kh, kw = conv.weight.shape[2:]
    return is_float32(g, x, conv.weight, conv.bias) and g.size > 0 and x.size > 0 and kh % 2 == 1 and kw % 2 == 1
