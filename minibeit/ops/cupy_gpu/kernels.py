"""The kernels of kernels.cu and maps.cu, compiled for a dtype and a device when needed, and how they are launched."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from .device import cupy

FILES = ("kernels.cu", "maps.cu")
THREADS = 256  # at most, of a block that walks along a row
CHANNEL_THREADS = 128  # of a block that serves a stretch of channels, one each
_WARP = 32

# dtype of a model -> (dtype of the arrays that model code sees, of what products read, STORAGE, C++ type, its header).
# NumPy has no bfloat16: such arrays hold its bits as uint16 and are handled by kernels and cuBLAS alone.
DTYPES: dict[str, tuple[str, str, int, str, str]] = {
    "float32": ("float32", "float32", 0, "float", ""),
    "float64": ("float64", "float64", 0, "double", ""),
    "float16": ("float32", "float16", 1, "__half", "#include <cuda_fp16.h>\n"),
    "bfloat16": ("float32", "uint16", 2, "__nv_bfloat16", "#include <cuda_bf16.h>\n"),
}
MODEL_DTYPE = {"float32": "float32", "float64": "float64", "float16": "float16", "uint16": "bfloat16"}

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
NAMES = (
    *(f"{name}<{width}>" for name in _BY_WIDTH for width in (1, 4)),
    *(f"bias_activation<{width}, {type_}>" for type_ in "AT" for width in (1, 4)),
    *(f"convert<{width}, {types}>" for types in ("A, T", "T, A") for width in (1, 4)),
    *(f"resize<{width}, {taps}>" for taps in (2, 4) for width in (1, 4)),
    *_ALONE,
)


def source(dtype: str) -> str:
    """The CUDA C++ text for a model's dtype."""
    seen, _, storage, type_, header = DTYPES[dtype]
    sums = "double" if seen == "float64" else "float"
    head = f"#define STORAGE {storage}\n{header}typedef {sums} A;\ntypedef {type_} T;\n"
    folder = resources.files(__package__)
    return head + "".join(folder.joinpath(name).read_text() for name in FILES)


@cache
def _module(dtype: str, device: int) -> Any:
    return cupy.RawModule(code=source(dtype), options=("--std=c++17",), name_expressions=NAMES)


@cache
def _function(name: str, dtype: str, device: int) -> Callable[..., None]:
    return _module(dtype, device).get_function(name)


def kernel(name: str, dtype: str) -> Callable[..., None]:
    """The kernel `name` (one of `NAMES`) for a model's dtype on the current device."""
    return _function(name, dtype, cupy.cuda.runtime.getDevice())


def along_rows(name: str, dtype: str, rows: int, length: int, *args: Any, suffix: str = "", unit: int = 0) -> None:
    """Launches `name<W suffix>` with a block for each of `rows` rows of `length` numbers.

    W is 4 where `unit` (by default the row), a stretch that lies together in memory, is a multiple of 4.
    """
    if rows == 0 or length == 0:
        return
    width = 4 if (unit or length) % 4 == 0 and _aligned(args) else 1
    kernel(f"{name}<{width}{suffix}>", dtype)((rows,), (block_size(length // width),), args)


def over_channels(name: str, dtype: str, rows: int, channels: int, *args: Any) -> None:
    """Launches `name` with a thread for each channel of each of `rows` rows."""
    if rows and channels:
        kernel(name, dtype)((rows, -(-channels // CHANNEL_THREADS)), (CHANNEL_THREADS,), args)


def or_null(array: Any | None) -> Any:
    """An argument of a kernel that may be missing: then a null pointer."""
    return 0 if array is None else array


def block_size(count: int) -> int:
    """Threads for `count` pieces of work: whole warps, at most THREADS."""
    return min(THREADS, max(1, -(-count // _WARP)) * _WARP)


def _aligned(args: tuple[Any, ...]) -> bool:
    """Whether four numbers at a time may be read from the start of every array on (views may begin anywhere)."""
    return all(a.data.ptr % (4 * a.itemsize) == 0 for a in args if isinstance(a, cupy.ndarray))


# What the ops begin and end with -------------------------------------------------------------------------------------


def seen_dtype(dtype: str) -> Any:
    """The NumPy dtype of the arrays that model code sees in a model of that dtype."""
    return np.dtype(DTYPES[dtype][0])


def product_dtype(dtype: str) -> Any:
    """The NumPy dtype of the arrays that products read in a model of that dtype."""
    return np.dtype(DTYPES[dtype][1])


def operand(x: Any, dtype: str) -> Any:
    """`x`, contiguous, as products of a model of that dtype read it."""
    return _converted(x, dtype, product_dtype(dtype), "A, T")


def visible(x: Any, dtype: str) -> Any:
    """`x`, contiguous, in the dtype that model code sees."""
    return _converted(x, dtype, seen_dtype(dtype), "T, A")


def _converted(x: Any, dtype: str, wanted: Any, types: str) -> Any:
    x = cupy.ascontiguousarray(x)
    if x.dtype == wanted:
        return x
    y = cupy.empty(x.shape, wanted)
    if x.size:
        width = 4 if x.size % 4 == 0 and _aligned((x, y)) else 1
        blocks = -(-x.size // (width * THREADS))
        kernel(f"convert<{width}, {types}>", dtype)((blocks,), (THREADS,), (x, y, x.size))
    return y
