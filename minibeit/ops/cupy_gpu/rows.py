"""Ops on rows: layer norm, and linear layers fused with the operations that follow them.

In float16 and bfloat16 models the operands and direct results of products have that dtype; the residual stream, the
logits and all other arrays of model code are float32.
"""

from __future__ import annotations

from typing import Any

from .device import cupy
from .gemm import product
from .kernels import (
    ACTIVATIONS,
    PLAIN,
    along_rows,
    compute_dtype,
    or_null,
    storage_dtype,
    to_compute,
    to_storage,
    warp_by_row,
)
from .prepare import DeviceLinear, DeviceNorm

Array = Any


def layer_norm(x: Array, norm: DeviceNorm, eps: float) -> Array:  # (..., D) -> (..., D)
    """See `reference.layer_norm`.  The result has the dtype of products' operands."""
    x = to_compute(x, norm.dtype)
    y = cupy.empty(x.shape, storage_dtype(norm.dtype))
    D = x.shape[-1]
    rows = x.size // max(D, 1)
    warp_by_row("layer_norm", norm.dtype, rows, D, x, norm.weight, norm.bias, y, rows, D, float(eps))
    return y


def linear(x: Array, layer: DeviceLinear) -> Array:  # (..., in) -> (..., out)
    """See `reference.linear`."""
    y = _product(x, layer, compute_dtype(layer.dtype))
    if layer.bias is not None:
        bias_activation(y, layer, PLAIN, "A")
    return y


def linear_activation(x: Array, layer: DeviceLinear, activation: str) -> Array:  # (..., in) -> (..., out)
    """See `reference.linear_activation`.  The result has the dtype of products' operands."""
    y = _product(x, layer, storage_dtype(layer.dtype))
    bias_activation(y, layer, ACTIVATIONS[activation], "T")
    return y


def linear_residual(
    x: Array, layer: DeviceLinear, scale: Array | None, residual: Array, keep: Array | None = None
) -> Array:  # (..., in) -> (..., out)
    """See `reference.linear_residual`."""
    rows = residual.size // residual.shape[-1]
    share = shared_rows(keep, rows)
    if share is None:
        y = linear(x, layer)
        return residual + (y if scale is None else y * scale) * keep
    branch = _product(x, layer, storage_dtype(layer.dtype))
    residual = to_compute(residual, layer.dtype)
    y = cupy.empty(branch.shape, residual.dtype)
    out = y.shape[-1]
    scale, keep = (None if x is None else cupy.ascontiguousarray(x, residual.dtype) for x in (scale, keep))
    args = (branch, or_null(layer.bias), or_null(scale), residual, or_null(keep), share, y, out)
    along_rows("residual", layer.dtype, rows, out, *args)
    return y


def shared_rows(keep: Array | None, rows: int) -> int | None:
    """How many rows share a factor of `keep`, as an image's in stochastic depth do; None if a row has several."""
    if keep is None:
        return rows
    count = max(keep.size, 1)
    return rows // count if keep.size == keep.shape[0] and rows % count == 0 else None


def mask_tokens(x: Array, mask: Array, mask_token: Array) -> Array:  # (B, P, D), (B, P), (1, 1, D) -> (B, P, D)
    """See `reference.mask_tokens`."""
    w = cupy.asarray(mask)[:, :, None].astype(x.dtype)
    return x * (1 - w) + mask_token * w


def add(x: Array, y: Array) -> Array:  # (...), (...) -> (...)
    """See `reference.add`."""
    return x + y


def dropout(x: Array, keep: Array) -> Array:  # (...), (...) -> (...)
    """See `reference.dropout`."""
    return x * keep


def mean_patches(x: Array) -> Array:  # (B, N, D) -> (B, D)
    """See `reference.mean_patches`."""
    return x[:, 1:].mean(1, dtype="float64").astype(x.dtype, copy=False)


def _product(x: Array, layer: DeviceLinear, dtype: Any) -> Array:
    x = to_storage(x, layer.dtype)
    y = cupy.empty((*x.shape[:-1], len(layer.weight)), dtype)
    product(x.reshape(-1, x.shape[-1]), layer.weight, y.reshape(-1, y.shape[-1]))
    return y


def bias_activation(y: Array, layer: DeviceLinear, kind: int, type_: str) -> None:
    """y = f(y + bias) in place."""
    out = y.shape[-1]
    args = (y, or_null(layer.bias), out, kind)
    most = 8 if y.itemsize == 2 else 4  # 16 bytes at a time
    along_rows("bias_activation", layer.dtype, y.size // out, out, *args, suffix=f", {type_}", most=most)
