"""Matrix products by direct calls of cuBLAS, which give control over strides, accumulation and precision of sums.

CuPy's own `matmul` copies arrays that are not contiguous, cannot accumulate, and does not support bfloat16.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .. import tf32_allowed
from .device import cupy

# cuBLAS's numbers for data types, fixed by its binary interface.
_TYPES = {"f": 0, "d": 1, "e": 2, "H": 14}  # by dtype.char, as .name is slow; uint16 holds the bits of bfloat16
_SUMS_IN_FLOAT32, _SUMS_IN_FLOAT64, _TF32 = 68, 70, 77
_DEFAULT_ALGORITHM = -1


def product(x: Any, weight: Any, y: Any, accumulate: bool = False) -> None:
    """y = x W^T, or y += x W^T; x (n, k), W (m, k), y (n, m), each with contiguous rows.

    Sums are float32, or float64 for float64 arrays; float32 operands are not rounded to TF32 unless MINIBEIT_TF32=1.
    y may be float32 if x and W are float16 or bfloat16.
    """
    if len(x) and len(weight):
        _single_product(x, weight, y, start=float(accumulate))


def batched_product(
    x: Any, weight: Any, y: Any, scale: float = 1.0, transposed: bool = True, turned: bool = False
) -> None:
    """y_i = scale x_i W_i^T for every i, or scale x_i W_i unless `transposed`, with x_i^T in place of x_i if `turned`.

    x (batch, n, k) or (batch, k, n), W (batch, m, k) or (batch, k, m), y (batch, n, m), each with contiguous rows.
    """
    batch, n, m = y.shape
    k = x.shape[1] if turned else x.shape[2]
    if batch == 0 or n == 0 or m == 0:
        return
    if k == 0:
        y[...] = 0
        return
    if batch == 1:  # of which cuBLAS knows more ways, such as to share a long sum between blocks
        _single_product(x, weight, y, scale, transposed, turned)
        return
    compute, factor, zero = _precision(x, scale, 0.0)
    cublas, handle = _cublas()
    cublas.gemmStridedBatchedEx(
        handle, int(transposed), int(turned), m, n, k, factor,
        weight.data.ptr, _type(weight), _row(weight), _step(weight), x.data.ptr, _type(x), _row(x), _step(x),
        zero, y.data.ptr, _type(y), _row(y), _step(y), batch, compute, _DEFAULT_ALGORITHM,
    )  # fmt: skip


def _single_product(
    x: Any, weight: Any, y: Any, scale: float = 1.0, transposed: bool = True, turned: bool = False, start: float = 0.0
) -> None:
    """`batched_product` of one matrix, whose axes are the last two, plus `start` y."""
    n, m = y.shape[-2:]
    k = x.shape[-2] if turned else x.shape[-1]
    compute, factor, start_at = _precision(x, scale, start)
    cublas, handle = _cublas()
    cublas.gemmEx(
        handle, int(transposed), int(turned), m, n, k, factor,
        weight.data.ptr, _type(weight), _row(weight), x.data.ptr, _type(x), _row(x),
        start_at, y.data.ptr, _type(y), _row(y), compute, _DEFAULT_ALGORITHM,
    )  # fmt: skip


def _cublas() -> tuple[Any, int]:
    from cupy.cuda import cublas

    return cublas, cupy.cuda.device.get_cublas_handle()


def _precision(x: Any, factor: float, start: float) -> tuple[int, int, int]:
    """cuBLAS's compute type, and the addresses of the two factors in main memory, in the dtype of the sums."""
    if x.dtype == np.float64:
        return _SUMS_IN_FLOAT64, _address(factor, "float64"), _address(start, "float64")
    tf32 = x.dtype == np.float32 and tf32_allowed()
    return _TF32 if tf32 else _SUMS_IN_FLOAT32, _address(factor, "float32"), _address(start, "float32")


_kept: list[Any] = []


@cache
def _address(value: float, dtype: str) -> int:
    _kept.append(np.array(value, dtype))
    return _kept[-1].ctypes.data


def _type(array: Any) -> int:
    return _TYPES[array.dtype.char]


def _row(array: Any) -> int:
    """Elements from one row to the next; cuBLAS requires at least the row's length, even for a single row."""
    return max(array.strides[-2] // array.itemsize, array.shape[-1])


def _step(array: Any) -> int:
    """Elements from one matrix of a batch to the next."""
    return array.strides[0] // array.itemsize
