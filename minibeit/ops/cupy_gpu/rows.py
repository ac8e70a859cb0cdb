"""Ops on rows of numbers: layer norm and linear layers with what follows them in the same kernel.

Where a model is float16 or bfloat16, products read and their direct outputs are of that dtype; the residual stream,
logits and everything else that model code calculates with are float32.
"""

from __future__ import annotations

from typing import Any

from .device import cupy
from .gemm import product
from .kernels import (
    ACTIVATIONS,
    PLAIN,
    along_rows,
    operand,
    or_null,
    product_dtype,
    seen_dtype,
    visible,
    warp_by_row,
)
from .prepare import DeviceLinear, DeviceNorm

Array = Any


def layer_norm(x: Array, norm: DeviceNorm, eps: float) -> Array:  # (..., D) -> (..., D)
    """See `reference.layer_norm`.  The result is what products read."""
    x = visible(x, norm.dtype)
    y = cupy.empty(x.shape, product_dtype(norm.dtype))
    D = x.shape[-1]
    rows = x.size // max(D, 1)
    warp_by_row("layer_norm", norm.dtype, rows, D, x, norm.weight, norm.bias, y, rows, D, float(eps))
    return y


def linear(x: Array, layer: DeviceLinear) -> Array:  # (..., in) -> (..., out)
    """See `reference.linear`."""
    y = _product(x, layer, seen_dtype(layer.dtype))
    if layer.bias is not None:
        bias_activation(y, layer, PLAIN, "A")
    return y


def linear_activation(x: Array, layer: DeviceLinear, activation: str) -> Array:  # (..., in) -> (..., out)
    """See `reference.linear_activation`.  The result is what products read."""
    y = _product(x, layer, product_dtype(layer.dtype))
    bias_activation(y, layer, ACTIVATIONS[activation], "T")
    return y


def linear_residual(
    x: Array, layer: DeviceLinear, scale: Array | None, residual: Array, keep: Array | None = None
) -> Array:  # (..., in) -> (..., out)
    """See `reference.linear_residual`."""
    branch = _product(x, layer, product_dtype(layer.dtype))
    residual = visible(residual, layer.dtype)
    if keep is not None:
        branch = visible(branch, layer.dtype)
        if layer.bias is not None:
            branch = branch + layer.bias
        return residual + keep * (branch if scale is None else branch * scale)
    y = cupy.empty(branch.shape, residual.dtype)
    out = y.shape[-1]
    args = (branch, or_null(layer.bias), or_null(scale), residual, y, out)
    along_rows("residual", layer.dtype, y.size // out, out, *args)
    return y


def _product(x: Array, layer: DeviceLinear, dtype: Any) -> Array:
    x = operand(x, layer.dtype)
    y = cupy.empty((*x.shape[:-1], len(layer.weight)), dtype)
    product(x.reshape(-1, x.shape[-1]), layer.weight, y.reshape(-1, y.shape[-1]))
    return y


def bias_activation(y: Array, layer: DeviceLinear, kind: int, type_: str) -> None:
    """y = f(y + bias) in place."""
    out = y.shape[-1]
    args = (y, or_null(layer.bias), out, kind)
    most = 8 if y.itemsize == 2 else 4  # 16 bytes at a time
    along_rows("bias_activation", layer.dtype, y.size // out, out, *args, suffix=f", {type_}", most=most)
