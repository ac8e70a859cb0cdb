"""The kernels of the .cu files, compiled per dtype and device on first use, and their launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from .device import cupy

FILES = ("kernels.cu", "attention.cu", "maps.cu")
HALF_FILES = ("attend.cu",)  # only where products read float16 or bfloat16
LEARNED_FILES = ("kernels.cu", "learned.cu")  # of training, which are compiled by themselves
LEARNED_HALF_FILES = ("attend.cu", "attend_backward.cu")
THREADS = 256  # at most, in a block that processes one row
ROWS_OF_A_BLOCK = 4  # if each row has its own warp
CHANNEL_THREADS = 128  # in a block with one thread per channel
ROWS_OF_A_SUM = 128  # that one block of a kernel by `sum_columns` adds up
_WARP = 32

# dtype of a model -> (dtype of the arrays that model code sees, of what products read, STORAGE, C++ type, its header).
# NumPy has no bfloat16: such arrays hold its bits as uint16 and are handled by kernels and cuBLAS alone.
DEVICE_TYPES: dict[str, tuple[str, str, int, str, str]] = {
    "float32": ("float32", "float32", 0, "float", ""),
    "float64": ("float64", "float64", 0, "double", ""),
    "float16": ("float32", "float16", 1, "__half", "#include <cuda_fp16.h>\n"),
    "bfloat16": ("float32", "uint16", 2, "__nv_bfloat16", "#include <cuda_bf16.h>\n"),
}
_BY_CHARACTER = {"f": "float32", "d": "float64", "e": "float16", "H": "bfloat16"}  # dtype.name is slow to ask for

ACTIVATIONS = {
    "linear": 0, "gelu": 1, "gelu_python": 1, "relu": 2, "gelu_accurate": 3, "gelu_fast": 3, "gelu_new": 3,
    "gelu_python_tanh": 3, "gelu_pytorch_tanh": 3, "gelu_10": 4, "hardswish": 5, "laplace": 6, "leaky_relu": 7,
    "mish": 8, "quick_gelu": 9, "relu2": 10, "relu6": 11, "sigmoid": 12, "silu": 13, "swish": 13, "sqrtsoftplus": 14,
    "tanh": 15,
}  # fmt: skip
PLAIN, GELU, RELU = 0, 1, 2

_BY_WIDTH = (
    *("layer_norm", "residual", "split_heads", "merge_heads"),
    *("pad", "finish_padded", "spread", "interleave", "max_pool"),
)
_ALONE = ("softmax", "average_pool", "winograd_input", "winograd_output")
_HALF = ("spread_bias", "attend")
_ALL = (
    *(f"{name}<{width}>" for name in _BY_WIDTH for width in (1, 4)),
    *(f"bias_activation<{width}, {type_}>" for type_ in "AT" for width in (1, 4, 8)),
    *(f"convert<{width}, {types}>" for types in ("A, T", "T, A") for width in (1, 4)),
    *(f"resize<{width}, {taps}>" for taps in (2, 4) for width in (1, 4)),
    *_ALONE,
)
_LEARNED_BY_WIDTH = (
    *("to_operand", "layer_norm_backward", "layer_norm_sums", "activation_kept", "activation_backward"),
    "residual_backward",
)
_LEARNED = (
    *(f"{name}<{width}>" for name in _LEARNED_BY_WIDTH for width in (1, 4)),
    *("softmax_backward", "add_scores", "table_backward", "cross_entropy_backward", "soft_cross_entropy_backward"),
)
_LEARNED_HALF = ("attend_dots", "attend_backward_queries", "attend_backward_keys", "attend_backward_bias")


def names(dtype: str, learned: bool = False) -> tuple[str, ...]:
    """The kernels for a model's dtype, or those of its training."""
    every, halves = (_LEARNED, _LEARNED_HALF) if learned else (_ALL, _HALF)
    return (*every, *halves) if DEVICE_TYPES[dtype][2] else every


def source(dtype: str, learned: bool = False) -> str:
    """The CUDA C++ text for a model's dtype, or for its training."""
    seen, _, storage, type_, header = DEVICE_TYPES[dtype]
    sums = "double" if seen == "float64" else "float"
    head = f"#define STORAGE {storage}\n{header}typedef {sums} A;\ntypedef {type_} T;\n"
    every, halves = (LEARNED_FILES, LEARNED_HALF_FILES) if learned else (FILES, HALF_FILES)
    files = (*every, *halves) if storage else every
    return head + "".join(resources.files(__package__).joinpath(name).read_text() for name in files)


@cache
def _module(dtype: str, learned: bool, device: int) -> Any:
    options = {"options": ("--std=c++17",), "name_expressions": names(dtype, learned)}
    return cupy.RawModule(code=source(dtype, learned), **options)


@cache
def _function(name: str, dtype: str, device: int) -> Callable[..., None]:
    learned = name in _LEARNED or name in _LEARNED_HALF
    return _module(dtype, learned, device).get_function(name)


def kernel(name: str, dtype: str) -> Callable[..., None]:
    """The kernel `name` (one of `names`) for a model's dtype on the current device."""
    return _function(name, dtype, cupy.cuda.runtime.getDevice())


def along_rows(
    name: str, dtype: str, rows: int, length: int, *args: Any, suffix: str = "", unit: int = 0, most: int = 4
) -> None:
    """Launches `name<W suffix>` with a block for each of `rows` rows of `length` elements.

    W, the elements per load, is 8 (if `most` is) or 4 if `unit`, the length of a contiguous run (by default the row),
    is a multiple of it, else 1.
    """
    if rows == 0 or length == 0:
        return
    width = _width(unit or length, most, args)
    kernel(f"{name}<{width}{suffix}>", dtype)((rows,), (block_size(length // width),), args)


def warp_by_row(name: str, dtype: str, rows: int, length: int, *args: Any) -> None:
    """Launches `name<W>` with a warp for each of `rows` rows of `length` elements, W as in `along_rows`."""
    if rows == 0 or length == 0:
        return
    blocks = -(-rows // ROWS_OF_A_BLOCK)
    kernel(f"{name}<{_width(length, 4, args)}>", dtype)((blocks,), (ROWS_OF_A_BLOCK * _WARP,), args)


def over_channels(name: str, dtype: str, rows: int, channels: int, *args: Any) -> None:
    """Launches `name` with a thread for each channel of each of `rows` rows."""
    if rows and channels:
        kernel(name, dtype)((rows, -(-channels // CHANNEL_THREADS)), (CHANNEL_THREADS,), args)


def by_columns(
    name: str, dtype: str, rows: int, columns: int, *args: Any, sums: bool = True, kinds: int = 1
) -> Any:  # -> (kinds, columns) float64
    """Launches `name<W>`, a kernel by `sum_columns`, W as in `along_rows`; returns its sums over all rows if wanted."""
    width = _width(columns, 4, args)
    grid = -(-columns // (_WARP * width)), -(-rows // ROWS_OF_A_SUM)
    partial = cupy.empty((grid[1], kinds, columns)) if sums else None
    if rows and columns:
        kernel(f"{name}<{width}>", dtype)(grid, (THREADS,), (or_null(partial), rows, columns, *args))
    return None if partial is None else partial.sum(0)


def or_null(array: Any | None) -> Any:
    """An optional argument of a kernel: a null pointer if None."""
    return 0 if array is None else array


def block_size(count: int) -> int:
    """Threads for `count` work items: whole warps, at most THREADS."""
    return min(THREADS, max(1, -(-count // _WARP)) * _WARP)


def _width(length: int, most: int, args: tuple[Any, ...]) -> int:
    """How many elements may be read at a time from rows of that length, given the alignment of the arguments."""
    arrays = [a for a in args if isinstance(a, cupy.ndarray)]
    for width in (8, 4):
        if width <= most and length % width == 0 and all(a.data.ptr % (width * a.itemsize) == 0 for a in arrays):
            return width
    return 1


# What the ops begin and end with -------------------------------------------------------------------------------------


def compute_dtype(dtype: str) -> Any:
    """The NumPy dtype of the arrays that model code of a model of that dtype handles."""
    return np.dtype(DEVICE_TYPES[dtype][0])


def model_dtype(x: Any) -> str:
    """The dtype of the model that an operand of a product belongs to."""
    return _BY_CHARACTER[x.dtype.char]


def storage_dtype(dtype: str) -> Any:
    """The NumPy dtype of the operands of products in a model of that dtype."""
    return np.dtype(DEVICE_TYPES[dtype][1])


def to_storage(x: Any, dtype: str) -> Any:
    """`x`, contiguous, as an operand of products in a model of that dtype."""
    return _converted(x, dtype, storage_dtype(dtype), "A, T")


def to_compute(x: Any, dtype: str) -> Any:
    """`x`, contiguous, in the dtype that model code handles."""
    return _converted(x, dtype, compute_dtype(dtype), "T, A")


def _converted(x: Any, dtype: str, wanted: Any, types: str) -> Any:
    x = cupy.ascontiguousarray(x)
    if x.dtype == wanted:
        return x
    y = cupy.empty(x.shape, wanted)
    if x.size:
        width = _width(x.size, 4, (x, y))
        blocks = -(-x.size // (width * THREADS))
        kernel(f"convert<{width}, {types}>", dtype)((blocks,), (THREADS,), (x, y, x.size))
    return y
