"""Arrays on the device, uploads and downloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from ...foreign import as_real
from ...machine import usable_cpus
from ...params import table_rows
from .. import reference
from .device import cupy
from .kernels import DEVICE_TYPES, model_dtype, to_compute

Array = Any
PIECE_BYTES = 2 << 20  # threads check and copy large arrays in main memory in pieces of this size
MOST_THREADS = 8


def num_threads(count: int | None) -> AbstractContextManager[Any]:
    """Context of a call; `count` is for CPUs.  `get_ops` binds a model's ops to `device.session` in its place."""
    return nullcontext()


def stage(x: Any, dtype: str) -> Array:
    """See `reference.stage`: an array in main memory stays there, to be checked before it is uploaded."""
    return asarray(x, dtype) if isinstance(x, cupy.ndarray) else as_real(x, _numpy_dtype(dtype))


def asarray(x: Any, dtype: str) -> Array:
    """See `reference.asarray`; for float16 and bfloat16 the array is float32, since only products use those dtypes.

    A mask in main memory stays there: how many patches it marks has to be known there, and to ask a device is to wait.
    """
    wanted = _numpy_dtype(dtype)
    if isinstance(x, cupy.ndarray):
        return x.astype(wanted, copy=False)
    if wanted.kind == "b":
        return np.asarray(x, wanted)
    return _upload(np.ascontiguousarray(x, wanted).reshape(np.shape(x)))


def _upload(x: np.ndarray) -> Array:
    """`x`, contiguous, on the device.

    A device copies from pinned memory only.  CuPy copies an array there with one thread, which for a batch of images
    takes longer than the upload itself; here several threads do, and pieces are uploaded while others are being copied.
    """
    if x.nbytes < 2 * PIECE_BYTES:
        return cupy.asarray(x)
    y = cupy.empty(x.shape, x.dtype)
    pinned, stream = cupy.cuda.alloc_pinned_memory(x.nbytes), cupy.cuda.get_current_stream()
    source, staged = x.reshape(-1).view(np.uint8), np.frombuffer(pinned, np.uint8, x.nbytes)

    def move(piece: slice) -> slice:
        staged[piece] = source[piece]
        return piece

    try:
        for piece in _piece_by_piece(move, x.nbytes, PIECE_BYTES):
            (y.data + piece.start).copy_from_host_async(pinned.ptr + piece.start, piece.stop - piece.start, stream)
    finally:
        stream.synchronize()  # before the pinned memory goes back to its pool, also when a copy is interrupted
    return y


def _piece_by_piece(work: Callable[[slice], Any], size: int, piece: int) -> Iterator[Any]:
    """The results of `work` on each piece of 0 to size, in order; several pieces are shared among threads."""
    pieces = [slice(start, min(start + piece, size)) for start in range(0, size, piece)]
    return _threads().map(work, pieces) if len(pieces) > 1 else map(work, pieces)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_THREADS, usable_cpus()), "minibeit-upload")


def _numpy_dtype(dtype: Any) -> Any:
    return np.dtype(DEVICE_TYPES[dtype][0]) if isinstance(dtype, str) and dtype in DEVICE_TYPES else np.dtype(dtype)


def to_host(x: Array) -> np.ndarray:
    """See `reference.to_host`; float16 and bfloat16 arrays are returned as float32."""
    if not isinstance(x, cupy.ndarray):
        return x
    if x.dtype.char in "eH":
        x = to_compute(x, model_dtype(x))
    return x.get()


def concatenate(arrays: Sequence[Array], axis: int) -> Array:
    """See `reference.concatenate`."""
    if axis != 0:
        batch = max(array.shape[0] for array in arrays)
        arrays = [cupy.broadcast_to(array, (batch, *array.shape[1:])) for array in arrays]
    return cupy.concatenate(arrays, axis)


def all_finite(x: Array, most: float | None = None) -> bool:
    """See `reference.all_finite`; checks on the host or on the device, wherever the array is."""
    if isinstance(x, cupy.ndarray):
        return bool((cupy.isfinite(x) if most is None else cupy.absolute(x) <= most).all())
    flat = x.reshape(-1)
    pieces = _piece_by_piece(
        lambda piece: reference.all_finite(flat[piece], most), flat.size, PIECE_BYTES // x.itemsize
    )
    return all(pieces)


def finite_on_host(x: Array, most: float | None = None) -> bool:
    """`all_finite` of an array in main memory.  One on the device passes: looking at it would wait for the device."""
    return isinstance(x, cupy.ndarray) or all_finite(x, most)


def tokens_to_map(x: Array, grid: tuple[int, int]) -> Array:  # (B, N, D) -> (B, D, gh, gw)
    """See `reference.tokens_to_map`."""
    B, _, D = x.shape
    return x[:, 1:].transpose(0, 2, 1).reshape(B, D, *grid)


def argmax_channels(x: Array) -> Array:  # (B, C, h, w) -> (B, h, w) int64
    """See `reference.argmax_channels`."""
    return cupy.argmax(x, axis=1).astype(np.int64, copy=False)


def masked_patches(x: Array, mask: Array) -> Array:  # (B, P, D), (B, P) -> (n, D)
    """See `reference.masked_patches`."""
    return x[marked(mask)]


def marked(mask: Array) -> Any:  # (B, P)
    """An index of the patches that a mask marks; for a mask in main memory the device is not asked."""
    return mask if isinstance(mask, cupy.ndarray) else tuple(cupy.asarray(axis) for axis in np.nonzero(mask))


def relative_position_index(grid: tuple[int, int]) -> Array:  # -> (N, N) int32
    """See `reference.relative_position_index`."""
    gh, gw = grid
    P, R = gh * gw, table_rows(grid)
    patches = cupy.arange(P, dtype=np.int32)
    row, column = patches // gw, patches % gw
    index = cupy.zeros((P + 1, P + 1), np.int32)
    index[1:, 1:] = (row[:, None] - row + gh - 1) * (2 * gw - 1) + column[:, None] - column + gw - 1
    index[0, :] = R - 3
    index[:, 0] = R - 2
    index[0, 0] = R - 1
    return index
