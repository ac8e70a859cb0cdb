"""The pretended `cupy.ndarray` and the functions on it, calculated by NumPy when their turn in the stream comes.

As in CuPy a NumPy array is accepted nowhere but in `asarray`, `array`, `set` and index arrays, and a device array
becomes a NumPy array by `get` or `asnumpy` alone; each such copy is counted, and so is the hidden one of `bool(x)`,
`float(x)`, `x.item()` and of an index with a mask.

What waits in a stream keeps no array alive: it knows addresses alone, as on a GPU.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from .memory import SPOILT, MemoryPointer, allocator
from .queues import HazardError, Use, caller, launch
from .streams import Device, Stream, get_current_stream
from .world import world

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

    def use(self, write: bool) -> Use:
        """That a job reads or writes the bytes between the array's first and last."""
        steps = [(n - 1) * step for n, step in zip(self.shape, self.strides)]
        first, end = (int(self.data.ptr) + sum(f(step, 0) for step in steps) for f in (min, max))
        return self.data.mem.use(write, first, end + self.itemsize if self.size else first)

    # To the host: counted
    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        world.note_copy("download", self.nbytes)
        owned = out is None
        if owned:
            out = np.empty_like(self._host, order=order)
        elif not isinstance(out, np.ndarray) or out.dtype != self.dtype:
            raise TypeError(f"{getattr(out, 'dtype', type(out))} array cannot be obtained from {self.dtype} array")
        elif out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
        _download(self, out, stream, owned)
        if blocking:
            (stream or get_current_stream()).synchronize()
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {arr.shape}")
        world.note_copy("upload", arr.nbytes)
        fill(self, np.array(arr), stream)

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
        given = [self]
        index, host = _index(key, given), self._host
        return _launched("getitem", lambda: host[index], lambda: host[_tame(index)], given)

    def __setitem__(self, key: Any, value: Any) -> None:
        given: list[ndarray] = []
        index, host = _index(key, given), self._host
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        value = _unwrapped(value, given)
        np.broadcast_to(value, np.broadcast_shapes(np.shape(value), host[_tame(index)].shape))
        launch("setitem", lambda: host.__setitem__(index, value), [self.use(True), *(x.use(False) for x in given)])

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


FUNCTIONS: dict[str, Callable] = {}  # of the module by name; functions.py fills it


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


def _is_view(result: Any, given: list[ndarray]) -> bool:
    """Whether NumPy's result lies in the memory of an array that was given."""
    return isinstance(result, np.ndarray) and _owner(result, given) is not None


def _owner(result: np.ndarray, given: list[ndarray]) -> ndarray | None:
    address = result.__array_interface__["data"][0]
    for x in given:
        memory = x.data.mem
        if result is x._host or (result.size and memory.ptr <= address < memory.ptr + memory.size):
            return x
    return None


def wrapped(result: Any, given: list[ndarray]) -> Any:
    """NumPy's result as a device array: one of those given, a view of its memory, or an array of its own."""
    if isinstance(result, (list, tuple)):
        return type(result)(wrapped(part, given) for part in result)
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    result = np.asanyarray(result)
    owner = _owner(result, given)
    if owner is None:
        made = _like(result)
        fill(made, result)
        return made
    if result is owner._host:
        return owner
    view = object.__new__(ndarray)
    view.data = owner.data + (result.__array_interface__["data"][0] - owner.data.ptr)
    view._host = result
    return view


def _like(result: np.ndarray) -> ndarray:
    """A device array of that shape, dtype and, if no bytes lie between its numbers, layout."""
    made = ndarray(result.shape, result.dtype)
    made._host = _host_view(made.data, result.shape, result.dtype, result.strides if _dense(result) else None)
    return made


def fill(x: ndarray, value: Any, stream: Stream | None = None) -> None:
    """Queues x = value, of the host, which nobody changes meanwhile."""
    host = x._host
    launch("an upload", lambda: np.copyto(host, value, casting="unsafe"), [x.use(True)], stream and stream.queue)


def _download(x: ndarray, out: np.ndarray, stream: Stream | None, weak: bool) -> None:
    """Queues out = x.  Until then `out` is spoilt; if `weak` it must still be there by then."""
    spoilt = np.frombuffer(SPOILT * x.itemsize, x.dtype)[0] if x.size else 0
    if world.asynchronous:
        out[...] = spoilt
    host, place, before = x._host, caller(), out.tobytes() if world.asynchronous else b""
    target = weakref.ref(out) if weak else lambda: out

    def run() -> None:
        there = target()
        if there is None or (world.asynchronous and there.tobytes() != before):
            raise HazardError(f"host memory was changed or freed before a download (asked for at {place}) wrote it")
        there[...] = host

    launch("a download", run, [x.use(False)], stream and stream.queue)


def _dense(x: np.ndarray) -> bool:
    """Whether the strides are those of a contiguous array with its axes in some order."""
    return bool(x.size) and x.transpose(np.argsort(x.strides, kind="stable")[::-1]).flags.c_contiguous


def _index(key: Any, given: list[ndarray]) -> Any:
    """An index for NumPy; its device arrays are added to `given`.

    Host arrays and lists are uploads; a mask is a download, as its count is the result's length.
    """
    if isinstance(key, tuple):
        return tuple(_index(part, given) for part in key)
    if isinstance(key, ndarray):
        check_device(key)
        if key.dtype == bool:
            return key.get()
        given.append(key)
        return key._host
    if isinstance(key, (np.ndarray, list)):
        world.note_copy("upload", np.asarray(key).nbytes)
        return np.array(key)
    return key


def _tame(index: Any) -> Any:
    """An index with which a result's shape can be found before the numbers in it are known."""
    if isinstance(index, tuple):
        return tuple(map(_tame, index))
    return np.zeros_like(index) if isinstance(index, np.ndarray) and index.dtype != bool else index


def call(function: Callable, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """`function` of NumPy on device arrays, without NumPy's warnings; sums of float16 are added up in float32."""
    world.check()
    given: list[ndarray] = []
    arguments = [_unwrapped(x, given) for x in args]
    options = {name: _unwrapped(x, given) for name, x in kwargs.items()}
    name = getattr(function, "__name__", "copy")
    world.launches.append(name)
    tamed = [*arguments[:1], *map(_tame, arguments[1:])] if function in (np.take, np.take_along_axis) else arguments

    def calculate() -> Any:
        return _calculated(function, arguments, options)

    def show() -> Any:
        return _calculated(function, tamed, options)

    if out is None:
        return _launched(name, calculate, show, given)
    if not isinstance(out, ndarray):
        raise TypeError(f"Unsupported type {type(out)}")
    check_device(out)
    host = out._host
    if world.asynchronous:
        np.copyto(np.empty_like(host), show(), casting="same_kind")  # raises what is wrong with shapes and dtypes now
    run = lambda: np.copyto(host, calculate(), casting="same_kind")  # noqa: E731
    launch(name, run, [out.use(True), *(x.use(False) for x in given)])
    return out


def _calculated(function: Callable, arguments: list, options: dict[str, Any]) -> Any:
    narrow = arguments and getattr(arguments[0], "dtype", None) == np.float16
    with np.errstate(all="ignore"):
        if narrow and function in (np.sum, np.prod, np.matmul, np.dot, np.mean) and options.get("dtype") is None:
            wide = [x.astype(np.float32) if getattr(x, "dtype", None) == np.float16 else x for x in arguments]
            return np.asarray(function(*wide, **options)).astype(np.float16)
        return function(*arguments, **options)


def _launched(name: str, calculate: Callable[[], Any], show: Callable[[], Any], given: list[ndarray]) -> Any:
    """The device array that `calculate` will fill.

    `show` is the same with whatever is in memory now: it tells shape, dtype and layout, and which results are views,
    which need no work.  A result that is no array (a truth, several arrays) is waited for.
    """
    if not world.asynchronous:
        return wrapped(calculate(), given)
    shown = show()
    parts = shown if isinstance(shown, (list, tuple)) else [shown]
    if all(_is_view(part, given) for part in parts):
        return wrapped(shown, given)
    uses = [x.use(False) for x in given]
    if not isinstance(shown, (np.ndarray, np.generic)):
        launch(name, lambda: None, uses)
        get_current_stream().synchronize()
        return wrapped(calculate(), given)
    made = _like(np.asanyarray(shown))
    host = made._host
    launch(name, lambda: np.copyto(host, calculate()), [made.use(True), *uses])
    return made


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
