"""Forward and backward of ops on weights that are learned: plain arrays in the dtype of model code, on the device.

What passes from op to op in the forward is what passes in inference: in half precision the results of layer norms,
activations and attention have the dtype of products' operands, and so has what is kept for the backward.  Gradients
have the dtype of model code.  Sums go in a fixed order.  Formulas: `ops/backward`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...params import LayerNorm, Linear
from . import rows
from .device import cupy
from .gemm import batched_product, product
from .kernels import (
    ACTIVATIONS,
    along_rows,
    by_columns,
    compute_dtype,
    or_null,
    storage_dtype,
    to_compute,
    to_storage,
    warp_by_row,
)
from .prepare import DeviceLinear, DeviceNorm

__all__ = [
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_activation_backward",
    "linear_activation_forward",
    "linear_backward",
    "linear_forward",
    "linear_residual_backward",
    "linear_residual_forward",
]

Array = Any


# Layer norm -----------------------------------------------------------------------------------------------------------


def layer_norm_forward(dtype: str, x: Array, norm: LayerNorm, eps: float) -> tuple[Array, None]:
    """As in inference; nothing is kept."""
    weight, bias = map(cupy.ascontiguousarray, (norm.weight, norm.bias))
    return rows.layer_norm(x, DeviceNorm(weight, bias, dtype), eps), None


def layer_norm_backward(dtype: str, g: Array, saved: None, x: Array, norm: LayerNorm, eps: float) -> tuple[Any, ...]:
    """In float64, as `backward.layer_norm_backward`: one kernel for dx, one for the sums over rows."""
    x, g, D = to_compute(x, dtype), cupy.ascontiguousarray(g), x.shape[-1]
    count = x.size // D
    dx, moments = cupy.empty(x.shape, x.dtype), cupy.empty((count, 2))
    weight = cupy.ascontiguousarray(norm.weight)
    warp_by_row("layer_norm_backward", dtype, count, D, g, x, weight, dx, moments, count, D, float(eps))
    d_weight, d_bias = by_columns("layer_norm_sums", dtype, count, D, g, x, moments, kinds=2).astype(x.dtype)
    return dx, LayerNorm(d_weight, d_bias), None


# Linear layers --------------------------------------------------------------------------------------------------------


def linear_forward(dtype: str, x: Array, layer: Any) -> tuple[Array, None]:
    """x W^T + b."""
    return rows.linear(x, leaf(layer, dtype)), None


def linear_backward(dtype: str, g: Array, saved: None, x: Array, layer: Any) -> tuple[Any, ...]:
    """dx = g W,  dW = g^T x,  db = sum of g."""
    operand, sums = operand_and_sums(g.reshape(-1, g.shape[-1]), dtype, layer.bias is not None)
    return _gradients(dtype, operand, x, layer, sums)


def linear_activation_forward(dtype: str, x: Array, layer: Linear, activation: str) -> tuple[Array, Array]:
    """(f(z), z) with z = x W^T + b, both as operands of products."""
    x, weight = to_storage(x, dtype), _matrix(layer.weight, dtype)
    out = len(weight)
    z, y = (cupy.empty((*x.shape[:-1], out), storage_dtype(dtype)) for _ in range(2))
    product(x.reshape(-1, x.shape[-1]), weight, z.reshape(-1, out))
    bias = or_null(None if layer.bias is None else cupy.ascontiguousarray(layer.bias))
    along_rows("activation_kept", dtype, z.size // out, out, z, bias, y, out, ACTIVATIONS[activation])
    return y, z


def linear_activation_backward(
    dtype: str, g: Array, saved: Array, x: Array, layer: Linear, activation: str
) -> tuple[Any, ...]:
    """That of the linear layer for g f'(z)."""
    operand, g, out = cupy.empty_like(saved), cupy.ascontiguousarray(g), g.shape[-1]
    args, wanted = (g, saved, operand, ACTIVATIONS[activation]), layer.bias is not None
    sums = by_columns("activation_backward", dtype, g.size // out, out, *args, sums=wanted)
    return (*_gradients(dtype, operand.reshape(-1, out), x, layer, sums), None)


def linear_residual_forward(
    dtype: str, x: Array, layer: Linear, scale: Array | None, residual: Array, keep: Array | None = None
) -> tuple[Array, None]:
    """residual + scale (x W^T + b) keep."""
    return rows.linear_residual(x, leaf(layer, dtype), scale, residual, keep), None


def linear_residual_backward(
    dtype: str,
    g: Array,
    saved: None,
    x: Array,
    layer: Linear,
    scale: Array | None,
    residual: Array,
    keep: Array | None = None,
) -> tuple[Any, ...]:
    """As `backward.linear_residual_backward`, whose dscale needs no branch kept."""
    out = g.shape[-1]
    a, count = cupy.ascontiguousarray(g), g.size // out
    share = rows.shared_rows(keep, count)
    if share is None:
        a, keep, share = a * keep, None, count
    if scale is None and keep is None:
        return (*linear_backward(dtype, a, None, x, layer), None, g)
    scale, keep = (None if x is None else cupy.ascontiguousarray(x, g.dtype) for x in (scale, keep))
    plain = cupy.empty((count, out), storage_dtype(dtype))
    scaled = None if scale is None else cupy.empty_like(plain)
    args = a, or_null(keep), share, or_null(scale), plain, or_null(scaled)
    sums = by_columns("residual_backward", dtype, count, out, *args, sums=layer.bias is not None)
    if scale is None:
        return (*_gradients(dtype, plain, x, layer, sums), None, g)
    sums = None if sums is None else sums[0].astype(g.dtype)
    G = weight_gradient(plain, x, dtype)
    dscale = (G * layer.weight).sum(1, dtype=np.float64).astype(g.dtype) + (0 if sums is None else layer.bias * sums)
    bias = None if sums is None else scale * sums
    dx = input_gradient(scaled, layer.weight, dtype).reshape(x.shape)
    return dx, Linear(scale[:, None] * G, bias), dscale, g


def leaf(layer: Any, dtype: str) -> DeviceLinear:
    """A layer as ops of inference take it."""
    bias = None if layer.bias is None else cupy.ascontiguousarray(layer.bias)
    return DeviceLinear(_matrix(layer.weight, dtype), bias, dtype)


def operand_and_sums(g: Array, dtype: str, sums: bool) -> tuple[Array, Array | None]:
    """(g (n, out) as an operand of products, its sums over rows (1, out) in float64, if they are wanted)."""
    g = cupy.ascontiguousarray(g)
    operand = None if g.dtype == storage_dtype(dtype) else cupy.empty(g.shape, storage_dtype(dtype))
    if operand is None and not sums:
        return g, None
    found = by_columns("to_operand", dtype, *g.shape, g, or_null(operand), sums=sums)
    return g if operand is None else operand, found


def input_gradient(g: Array, weight: Array, dtype: str) -> Array:  # (n, out), (out, ...) -> (n, in)
    """g W, for an operand g."""
    w = _matrix(weight, dtype)
    dx = cupy.empty((len(g), w.shape[1]), compute_dtype(dtype))
    batched_product(g[None], w[None], dx[None], transposed=False)
    return dx


def weight_gradient(g: Array, x: Array, dtype: str) -> Array:  # (n, out), (..., in) -> (out, in)
    """g^T x, for an operand g."""
    x = to_storage(x.reshape(-1, x.shape[-1]), dtype)
    dw = cupy.empty((g.shape[1], x.shape[1]), compute_dtype(dtype))
    batched_product(g[None], x[None], dw[None], transposed=False, turned=True)
    return dw


def _gradients(dtype: str, g: Array, x: Array, layer: Any, sums: Array | None) -> tuple[Array, Any]:
    """(dx, the gradient of the layer) for an operand g (n, out) and its sums over rows."""
    dw = weight_gradient(g, x, dtype).reshape(layer.weight.shape)
    bias = None if sums is None else sums[0].astype(dw.dtype)
    return input_gradient(g, layer.weight, dtype).reshape(x.shape), type(layer)(dw, bias)


def _matrix(weight: Array, dtype: str) -> Array:  # (out, ...) -> (out, in)
    return to_storage(weight.reshape(len(weight), -1), dtype)
