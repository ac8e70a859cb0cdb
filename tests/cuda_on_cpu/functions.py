"""The functions of the pretended module, by NumPy's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import FUNCTIONS, call, fill, ndarray, wrapped
from .streams import get_current_stream
from .world import world

_UFUNCS = (
    "abs absolute add arctan ceil clip cos divide equal exp exp2 expm1 fabs floor floor_divide fmax fmin greater "
    "greater_equal invert isfinite isinf isnan less less_equal log log1p log2 logical_and logical_not logical_or "
    "maximum minimum mod multiply negative not_equal power remainder rint sign sin sqrt square subtract tanh "
    "true_divide"
)
_OTHERS = (
    "all amax amin any argmax argmin argsort broadcast_to concatenate cumsum diff dot einsum expand_dims flip "
    "hstack matmul max mean min moveaxis nan_to_num pad prod ravel repeat reshape roll rollaxis sort split squeeze "
    "stack std sum swapaxes take take_along_axis tensordot tile transpose triu var vstack where"
)


def _function(name: str) -> Callable:
    made = getattr(np, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        return call(made, *args, **kwargs)

    function.__name__ = name
    return function


for _name in (_UFUNCS + " " + _OTHERS).split():
    FUNCTIONS[_name] = _function(_name)


def asarray(a: Any, dtype: Any = None, order: Any = None, blocking: bool = False) -> ndarray:
    """`a` itself if it is a device array of that dtype, else a copy; from the host it is a counted upload."""
    if isinstance(a, ndarray):
        return a if dtype is None or np.dtype(dtype) == a.dtype else a.astype(dtype)
    return array(a, dtype, order=order, blocking=blocking)


def array(
    obj: Any, dtype: Any = None, copy: Any = True, order: Any = "K", blocking: bool = False, **kwargs: Any
) -> ndarray:
    """A new device array, from the host or from another."""
    if isinstance(obj, ndarray):
        return obj.astype(dtype or obj.dtype)
    host = np.asarray(obj, dtype, order="C" if order is None else order)
    made = ndarray(host.shape, host.dtype, order="F" if host.flags.fnc else "C")
    world.note_copy("upload", host.nbytes)
    fill(made, np.array(host) if world.asynchronous else host)  # CuPy moves it to memory of its own first
    if blocking:
        get_current_stream().synchronize()
    return made


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    """`a` itself if it is contiguous and of that dtype, else a copy; a single number becomes an array of one."""
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected cupy._core.core._ndarray_base, got {type(a)})")
    dtype = a.dtype if dtype is None else np.dtype(dtype)
    a = a if a.ndim else a.reshape(1)
    return a if a.flags.c_contiguous and a.dtype == dtype else a.astype(dtype, order="C")


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
    """`a` on the host: a counted download."""
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a, order=order)


def filled(shape: Any, value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    """An array of one value."""
    dtype = np.asarray(value).dtype if dtype is None else dtype
    made = ndarray(shape, dtype, order=order)
    fill(made, value)
    world.launches.append("fill")
    return made


def arange(*args: Any, dtype: Any = None) -> ndarray:
    """NumPy's arange, made on the device."""
    return wrapped(np.arange(*args, dtype=dtype), [])


FUNCTIONS.update(
    asarray=asarray,
    array=array,
    ascontiguousarray=ascontiguousarray,
    asnumpy=asnumpy,
    arange=arange,
    empty=lambda shape, dtype=float, order="C": ndarray(shape, dtype, order=order),
    zeros=lambda shape, dtype=float, order="C": filled(shape, 0, dtype, order),
    ones=lambda shape, dtype=float, order="C": filled(shape, 1, dtype, order),
    full=lambda shape, fill_value, dtype=None, order="C": filled(shape, fill_value, dtype, order),
    empty_like=lambda a, dtype=None: ndarray(a.shape, dtype or a.dtype),
    zeros_like=lambda a, dtype=None: filled(a.shape, 0, dtype or a.dtype),
    ones_like=lambda a, dtype=None: filled(a.shape, 1, dtype or a.dtype),
    full_like=lambda a, fill_value, dtype=None: filled(a.shape, fill_value, dtype or a.dtype),
    nonzero=lambda a: (world.note_copy("download", 8), call(np.nonzero, a))[1],
    array_equal=lambda a, b: call(np.array_equal, a, b),
)
