"""Weights in column panels, the layout that the matrix product reads."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...files import mapped_file
from .machine_code import Kernel
from .memory import aligned
from .packed import Packed
from .pool import run
from .target import NR


@dataclass(frozen=True)
class PackedLinear(Packed):
    """A linear layer y = x W^T + b: W (out, in) as panels (ceil(out / NR), in, NR), the last one padded with zeros."""

    panels: np.ndarray
    bias: np.ndarray  # (panels * NR,), zeros where the layer has none or the panel is padding
    out: int
    source: Any = None  # the layer as it was, kept on request
    addresses: tuple[int, int] = field(init=False, repr=False, compare=False)  # of panels and bias

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", (self.panels.ctypes.data, self.bias.ctypes.data))

    @property
    def steps(self) -> int:
        """Length of the sum: the layer's input width."""
        return self.panels.shape[1]

    def weight(self) -> np.ndarray:
        """W (out, in) as it was before packing."""
        return self.panels.transpose(0, 2, 1).reshape(-1, self.steps)[: self.out]


_pack = Kernel("minibeit.ops.numba_cpu.kernels.pack", "pack")


def pack_matrix(matrix: np.ndarray, into: np.ndarray | None = None, scale: np.ndarray | None = None) -> np.ndarray:
    """Panels (ceil(out / NR), in, NR) of a float32 matrix (out, in) of any strides, its rows times `scale` (out,)."""
    out, steps = matrix.shape
    panels = -(-out // NR)
    if into is None:
        into = aligned((panels, steps, NR))
    if is_hollow(matrix):
        return into
    addresses = (matrix.ctypes.data, matrix.strides[0], out, steps, matrix.strides[1], into.ctypes.data)
    run(_pack, panels, (*addresses, 0 if scale is None else scale.ctypes.data))
    return into


def is_hollow(array: np.ndarray) -> bool:
    """Whether an array is one number seen many times: it stands for a shape, and packing it would be wasted."""
    return array.size > 1 and not any(array.strides)


def padded_bias(bias: np.ndarray | None, out: int) -> np.ndarray:
    """The bias with zeros up to a whole number of panels."""
    result = np.zeros(-(-out // NR) * NR, np.float32)
    if bias is not None:
        result[:out] = bias
    return result


def release_pages(array: np.ndarray) -> None:
    """Lets the system drop the pages of a memory-mapped array; they are read again from the file if needed.

    Does nothing for any other array: there it would lose the data.
    """
    if not sys.platform.startswith("linux") or mapped_file(array) is None:
        return
    page = mmap.PAGESIZE
    start = -(-array.ctypes.data // page) * page  # whole pages inside the array only
    length = (array.ctypes.data + array.nbytes - start) // page * page
    if array.flags.c_contiguous and length > 0:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 4)  # 4 is MADV_DONTNEED
