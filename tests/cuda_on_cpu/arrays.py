"""The pretended `cupy.ndarray` and the functions on it, calculated by NumPy.

As in CuPy a NumPy array is accepted nowhere but in `asarray`, `array`, `set` and index arrays, and a device array
becomes a NumPy array by `get` or `asnumpy` alone; each such copy is counted, and so is the hidden one of `bool(x)`,
`float(x)`, `x.item()` and of an index with a mask.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from .world import Device, MemoryPointer, allocator, world

KINDS = "biufc"


def _host_view(pointer: MemoryPointer, shape: tuple[int, ...], dtype: np.dtype, strides: Any = None) -> np.ndarray:
    room = pointer.mem.ptr + pointer.mem.size - pointer.ptr
    raw = (ctypes.c_char * room).from_address(pointer.ptr)
    return np.ndarray(shape, dtype, raw, 0, strides)


class ndarray:
    """An array in a device's memory."""

    __array_priority__ = 100
    __slots__ = ("__weakref__", "_host", "data")

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: str = "C"
    ) -> None:
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)
        dtype = np.dtype(dtype)
        if dtype.kind not in KINDS and dtype.name != "bfloat16":
            raise ValueError(f"Unsupported dtype {dtype}")
        self.data = memptr or allocator[0](math.prod(shape) * dtype.itemsize)
        if strides is None and order == "F":
            strides = np.empty(shape, np.int8, order="F").strides
            strides = tuple(s * dtype.itemsize for s in strides)
        self._host = _host_view(self.data, shape, dtype, strides)

    # What it looks like
    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    device = property(lambda self: Device(self.data.device_id))
    T = property(lambda self: call(np.transpose, self))
    real = property(lambda self: call(np.real, self))

    @property
    def flags(self) -> SimpleNamespace:
        flags = self._host.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, forc=flags.forc)

    # To the host: counted
    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        world.note_copy("download", self.nbytes)
        if out is None:
            return np.array(self._host, order=order)
        if not isinstance(out, np.ndarray) or out.dtype != self.dtype:
            raise TypeError(f"{getattr(out, 'dtype', type(out))} array cannot be obtained from {self.dtype} array")
        if out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
        out[...] = self._host
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {arr.shape}")
        world.note_copy("upload", arr.nbytes)
        self._host[...] = arr

    def item(self, *args: Any) -> Any:
        return self.get().item(*args)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __repr__(self) -> str:  # for a debugger: not counted
        return f"device {self.data.device_id} {self._host!r}"

    __format__ = lambda self, spec: format(self.get(), spec)  # noqa: E731

    # NumPy's protocols
    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        if "out" in kwargs:
            (kwargs["out"],) = kwargs["out"]
        return call(ufunc, *inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function.__name__ not in FUNCTIONS:
            return NotImplemented
        return call(function, *args, **kwargs)

    # Indexing
    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> ndarray:
        return _wrapped(self._host[_index(key)], [self])

    def __setitem__(self, key: Any, value: Any) -> None:
        index = _index(key)
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self._host[index] = _unwrapped(value, [self])

    # Methods that are functions
    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        return call(np.reshape, self, shape[0] if len(shape) == 1 else shape, order=order)

    def transpose(self, *axes: Any) -> ndarray:
        axes = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        return call(np.transpose, self, axes or None)

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> ndarray:
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        return call(lambda x: x.astype(dtype, order=order), self)

    def copy(self, order: str = "C") -> ndarray:
        return call(lambda x: x.copy(order), self)

    def fill(self, value: Any) -> None:
        if isinstance(value, (np.ndarray, list, tuple)) and np.ndim(value):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self[...] = value

    def view(self, dtype: Any = None) -> ndarray:
        return call(lambda x: x.view() if dtype is None else x.view(dtype), self)

    def flatten(self, order: str = "C") -> ndarray:
        return call(lambda x: x.flatten(order), self)


def _method(function: Callable) -> Callable:
    return lambda self, *args, **kwargs: call(function, self, *args, **kwargs)


_METHODS = (
    "all any argmax argmin clip cumsum dot max mean min prod ravel repeat round squeeze std sum swapaxes take var"
)
for _name in _METHODS.split():
    setattr(ndarray, _name, _method(getattr(np, _name)))


# Calling NumPy ------------------------------------------------------------------------------------------------------


def check_device(x: ndarray) -> None:
    """Raises ValueError for an array of another device than the current one."""
    if x.data.device_id != world.current:
        raise ValueError(
            f"The device where the array resides ({x.data.device_id}) is different from the current device "
            f"({world.current}). Peer access is unavailable between these devices."
        )


def _unwrapped(x: Any, found: list[ndarray]) -> Any:
    """`x` with device arrays replaced by what NumPy can read; they are added to `found`."""
    if isinstance(x, ndarray):
        check_device(x)
        found.append(x)
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, (list, tuple)) and any(isinstance(part, (ndarray, np.ndarray)) for part in x):
        return type(x)(_unwrapped(part, found) for part in x)
    return x


def _wrapped(result: Any, given: list[ndarray]) -> Any:
    """NumPy's result as a device array: one of those given, a view of its memory, or an array of its own."""
    if isinstance(result, (list, tuple)):
        return type(result)(_wrapped(part, given) for part in result)
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    result = np.asanyarray(result)
    address = result.__array_interface__["data"][0]
    for x in given:
        if result is x._host:
            return x
        memory = x.data.mem
        if result.size and memory.ptr <= address < memory.ptr + memory.size:
            view = object.__new__(ndarray)
            view.data = MemoryPointer(memory, address - memory.ptr)
            view._host = result
            return view
    made = ndarray(result.shape, result.dtype)
    made._host = _host_view(made.data, result.shape, result.dtype, result.strides if _dense(result) else None)
    made._host[...] = result
    return made


def _dense(x: np.ndarray) -> bool:
    """Whether the strides are those of a contiguous array with its axes in some order."""
    return bool(x.size) and x.transpose(np.argsort(x.strides, kind="stable")[::-1]).flags.c_contiguous


def _index(key: Any) -> Any:
    """An index with its device arrays as NumPy arrays; host arrays and lists are uploads, a mask's count a download."""
    if isinstance(key, tuple):
        return tuple(_index(part) for part in key)
    if isinstance(key, ndarray):
        check_device(key)
        if key.dtype == bool:
            world.note_copy("download", 8)
        return key._host
    if isinstance(key, (np.ndarray, list)):
        world.note_copy("upload", np.asarray(key).nbytes)
    return key


def call(function: Callable, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """`function` of NumPy on device arrays, without NumPy's warnings; sums of float16 are added up in float32."""
    world.check()
    given: list[ndarray] = []
    arguments = [_unwrapped(x, given) for x in args]
    options = {name: _unwrapped(x, given) for name, x in kwargs.items()}
    world.launches.append(getattr(function, "__name__", "copy"))
    narrow = arguments and getattr(arguments[0], "dtype", None) == np.float16
    with np.errstate(all="ignore"):
        if narrow and function in (np.sum, np.prod, np.matmul, np.dot, np.mean) and options.get("dtype") is None:
            wide = [x.astype(np.float32) if getattr(x, "dtype", None) == np.float16 else x for x in arguments]
            result = np.asarray(function(*wide, **options)).astype(np.float16)
        else:
            result = function(*arguments, **options)
    if out is None:
        return _wrapped(result, given)
    if not isinstance(out, ndarray):
        raise TypeError(f"Unsupported type {type(out)}")
    check_device(out)
    np.copyto(out._host, result, casting="same_kind")
    return out


def _operator(ufunc: np.ufunc, swapped: bool = False) -> Callable:
    def binary(self: ndarray, other: Any) -> Any:
        return call(ufunc, other, self) if swapped else call(ufunc, self, other)

    return binary


def _in_place(ufunc: np.ufunc) -> Callable:
    return lambda self, other: call(ufunc, self, other, out=self)


_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide, "floordiv": np.floor_divide,
    "mod": np.remainder, "pow": np.power, "matmul": np.matmul, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift,
}  # fmt: skip
_COMPARE = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
for _name, _ufunc in _BINARY.items():
    setattr(ndarray, f"__{_name}__", _operator(_ufunc))
    setattr(ndarray, f"__r{_name}__", _operator(_ufunc, swapped=True))
    setattr(ndarray, f"__i{_name}__", _in_place(_ufunc))
for _name, _full in _COMPARE.items():
    setattr(ndarray, f"__{_name}__", _operator(getattr(np, _full)))
for _name, _ufunc in {"neg": np.negative, "invert": np.invert, "abs": np.absolute}.items():
    setattr(ndarray, f"__{_name}__", _method(_ufunc))
ndarray.__hash__ = None


# Functions of the module --------------------------------------------------------------------------------------------

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
FUNCTIONS: dict[str, Callable] = {}


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
    return array(a, dtype, order=order)


def array(obj: Any, dtype: Any = None, copy: Any = True, order: Any = "K", **kwargs: Any) -> ndarray:
    """A new device array, from the host or from another."""
    if isinstance(obj, ndarray):
        return obj.astype(dtype or obj.dtype)
    host = np.asarray(obj, dtype, order="C" if order is None else order)
    made = ndarray(host.shape, host.dtype, order="F" if host.flags.fnc else "C")
    world.note_copy("upload", host.nbytes)
    made._host[...] = host
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
    return a.get(stream, order, out) if isinstance(a, ndarray) else np.asarray(a, order=order)


def filled(shape: Any, value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    """An array of one value."""
    dtype = np.asarray(value).dtype if dtype is None else dtype
    made = ndarray(shape, dtype, order=order)
    made._host[...] = value
    world.launches.append("fill")
    return made


def arange(*args: Any, dtype: Any = None) -> ndarray:
    """NumPy's arange, made on the device."""
    return _wrapped(np.arange(*args, dtype=dtype), [])


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
