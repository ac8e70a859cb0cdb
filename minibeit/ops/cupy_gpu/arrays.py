"""Arrays on the device, and the way there and back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .device import cupy
from .kernels import DTYPES, model_dtype, visible

Array = Any


def num_threads(count: int | None) -> AbstractContextManager[Any]:
    """Context of a call; `count` is for CPUs.  `get_ops` binds a model's ops to `device.session` in its place."""
    return nullcontext()


def stage(x: Any, dtype: str) -> Array:
    """See `reference.stage`: what comes from main memory stays there, to be checked before it is uploaded."""
    return asarray(x, dtype) if isinstance(x, cupy.ndarray) else np.asarray(x, _numpy_dtype(dtype))


def asarray(x: Any, dtype: str) -> Array:
    """See `reference.asarray`; for float16 and bfloat16 the array is float32, which all but products calculate in."""
    wanted = _numpy_dtype(dtype)
    if isinstance(x, cupy.ndarray):
        return x.astype(wanted, copy=False)
    return cupy.asarray(np.ascontiguousarray(x, wanted).reshape(np.shape(x)))


def _numpy_dtype(dtype: Any) -> Any:
    return np.dtype(DTYPES[dtype][0]) if isinstance(dtype, str) and dtype in DTYPES else np.dtype(dtype)


def to_host(x: Array) -> np.ndarray:
    """See `reference.to_host`; what products read in float16 or bfloat16 comes back as float32."""
    if not isinstance(x, cupy.ndarray):
        return x
    if x.dtype.char in "eH":
        x = visible(x, model_dtype(x))
    return x.get()


def arange(stop: int) -> Array:
    """See `reference.arange`."""
    return cupy.arange(stop, dtype=np.int32)


def zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """See `reference.zeros`."""
    return cupy.zeros(shape, _numpy_dtype(dtype))


def concatenate(arrays: Sequence[Array], axis: int) -> Array:
    """See `reference.concatenate`."""
    if axis != 0:
        batch = max(array.shape[0] for array in arrays)
        arrays = [cupy.broadcast_to(array, (batch, *array.shape[1:])) for array in arrays]
    return cupy.concatenate(arrays, axis)


def all_finite(x: Array) -> bool:
    """See `reference.all_finite`; looks where the array is."""
    if isinstance(x, cupy.ndarray):
        return bool(cupy.isfinite(x).all())
    flat = x.reshape(-1)
    if flat.dtype.kind == "f" and np.isfinite(np.dot(flat, flat)):  # one quick pass; squares may overflow, though
        return True
    return bool(np.isfinite(flat).all())
