"""Tensors as stored in a checkpoint file, converted to NumPy arrays on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import CheckpointError
from .file_bytes import Source, shown

# Name of a stored dtype -> how its bytes are read. NumPy has no bfloat16: its bits are read as uint16.
STORED = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2",
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1",
    "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|u1",
}  # fmt: skip
ITEMSIZE = {name: np.dtype(code).itemsize for name, code in STORED.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")
MAX_RANK = 16
MAX_ELEMENTS = 1 << 48
SLACK = 64 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, known before it is read; `dtype` is the stored one, such as "bfloat16"."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return count(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Stored(TensorInfo):
    """A tensor within a block of bytes: `offset` in bytes, `strides` in bytes (None: C order)."""

    data: memoryview | Callable[[], memoryview] = field(repr=False, default=memoryview(b""))
    offset: int = 0
    strides: tuple[int, ...] | None = None

    def read(self) -> np.ndarray:
        """A read-only array: a view of the file where NumPy has the dtype and the data is aligned, else a copy."""
        if count(self.shape) == 0:
            array = np.zeros(self.shape, STORED[self.dtype])
        else:
            data = self.data() if callable(self.data) else self.data
            array = np.ndarray(self.shape, STORED[self.dtype], data, self.offset, self.strides)
        if self.dtype == "bfloat16":
            array = bfloat16_to_float32(array)
        elif self.dtype == "bool":
            array = array.astype(bool)
        elif not array.flags.aligned:
            array = array.copy()
        array.flags.writeable = False
        return array


class Tensors(Mapping[str, np.ndarray]):
    """The named tensors of a checkpoint, each read on request.

    `tensors[name]` is a read-only array of the stored dtype (bfloat16 becomes float32), a view of the mapped file
    where possible; nothing is cached, so a second request converts again.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def info(self, name: str) -> TensorInfo:
        """The stored dtype and the shape of a tensor, without reading it."""
        stored = self._stored[name]
        return TensorInfo(stored.dtype, stored.shape)

    def read(self, name: str, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
        """A tensor with floating-point elements in `dtype`; integers and booleans keep theirs.

        Raises CheckpointError if a value is beyond the range of `dtype`.
        """
        array = self[name]
        return narrowed(name, array, np.dtype(dtype).name) if array.dtype.kind == "f" else array

    @property
    def nbytes(self) -> int:
        """The total size of all tensors in their stored dtypes."""
        return sum(stored.nbytes for stored in self._stored.values())

    def stored(self) -> dict[str, Stored]:
        """The tensors as the file holds them (to join several files without reading any)."""
        return dict(self._stored)


def gather(source: Source, stored: Mapping[str, Stored]) -> Tensors:
    """The tensors of one file; refused if they are much larger than the file (many tensors on one storage)."""
    tensors = Tensors(stored)
    if tensors.nbytes > allowed_bytes(source):
        raise source.error(f"the tensors take {tensors.nbytes:,} bytes, but the file has only {source.size:,}")
    return tensors


def allowed_bytes(source: Source) -> int:
    """How many bytes a file may decompress to."""
    return SLACK + 8 * source.size


def count(shape: tuple[int, ...]) -> int:
    """The number of elements, in Python integers, which cannot overflow."""
    product = 1
    for length in shape:
        product *= length
    return product


def checked_shape(source: Source, name: str, shape: Any) -> tuple[int, ...]:
    """An untrusted shape as a tuple of plain non-negative integers whose product is a possible size."""
    if not isinstance(shape, (list, tuple)) or len(shape) > MAX_RANK:
        raise source.error(f"the shape of tensor {shown(name)} is not a list of at most {MAX_RANK} integers")
    if any(type(length) is not int or not 0 <= length < MAX_ELEMENTS for length in shape):
        raise source.error(f"the shape of tensor {shown(name)} holds something other than sizes")
    if count(tuple(length or 1 for length in shape)) >= MAX_ELEMENTS:
        raise source.error(f"the shape of tensor {shown(name)} has more elements than any model")
    return tuple(shape)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits held as uint16: exact, since bfloat16 is the upper half of a float32."""
    wide = np.empty(bits.shape, np.uint32)
    np.left_shift(bits, np.uint32(16), out=wide, casting="unsafe", dtype=np.uint32)
    return wide.view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of float32 values, rounded to the nearest, ties to even; NaN keeps sign and payload."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)  # at least 1-D: scalars would warn of overflow
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # or a payload in the lower half alone would give infinity
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).reshape(np.shape(values))


def narrowed(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Floating-point elements in another dtype ("bfloat16" as uint16 bits); values that would overflow are refused."""
    with np.errstate(all="ignore"):  # an overflow is refused below, a signalling NaN turns quiet, tiny values are 0
        if dtype == "bfloat16":
            result = float32_to_bfloat16(array.astype(np.float32, copy=False))
            infinite = (result & 0x7FFF) == 0x7F80
        else:
            result = array.astype(dtype, copy=False)
            narrower = result.dtype.itemsize < array.dtype.itemsize
            infinite = np.isinf(result) if narrower else np.zeros((), bool)
    if infinite.any() and np.count_nonzero(infinite) != np.count_nonzero(np.isinf(array)):
        raise CheckpointError(f"tensor {shown(name)} has values beyond the range of {dtype}; save it as float32")
    return result
