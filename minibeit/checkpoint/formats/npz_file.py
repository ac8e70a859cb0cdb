"""NumPy .npz archives, written, and read without NumPy's own reader, which may run pickles and trusts a file's sizes.

Format: numpy/lib/format.py, versions 1 to 3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...files import atomic_write
from .file_bytes import Source, shown
from .lazy_tensors import ITEMSIZE, STORED, Stored, TensorInfo, checked_shape
from .zip_file import Entry, packed_reader

MAX_HEADER = 10_000
HEADER = re.compile(
    r"\{'descr': '([<>|=]?[A-Za-z]\d*)', 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,400})\),? *\}\s*"
)
NPY_DTYPES = {code.lstrip("<|"): name for name, code in STORED.items() if name not in ("bfloat16", "bool")} | {
    "b1": "bool"
}


def read_npz(source: Source, entries: dict[str, Entry]) -> dict[str, Stored]:
    """The arrays of an archive by name: views of the file, or decompressed one at a time if it is compressed."""
    stored = {}
    for name, entry in entries.items():
        if not name.endswith(".npy"):
            raise source.error(f"holds the entry {shown(name)}, which is not a .npy array")
        stored[name[: -len(".npy")]] = _array(source, entry)
    return stored


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays, numbers and texts by name, uncompressed, to a file that appears complete or not at all.

    numpy.savez does the same, but before NumPy 2 it leaves the archive open if the disk is full.
    """
    import zipfile  # only to write

    with atomic_write(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        for name, value in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(value), allow_pickle=False)


def _array(source: Source, entry: Entry) -> Stored:
    head = bytes(entry.head(12 + MAX_HEADER))
    if len(head) < 12 or head[:6] != b"\x93NUMPY" or head[6] not in (1, 2, 3):
        raise source.error(f"the entry {shown(entry.name)} is not a .npy array of version 1 to 3")
    start = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:start], "little")
    match = HEADER.fullmatch(head[start : start + length].decode("latin-1"))
    if length > MAX_HEADER or match is None:
        raise source.error(f"the header of {shown(entry.name)} is not that of a plain array")
    descr, fortran, sizes = match.groups()
    dtype = NPY_DTYPES.get(descr.lstrip("<|="))
    if dtype is None:
        raise source.error(
            f"{shown(entry.name)} has the NumPy dtype {shown(descr)}; Python objects, texts and big-endian are not read"
        )
    lengths = [size.strip() for size in sizes.split(",") if size.strip()]
    if any(len(size) > 18 or not size.isdigit() for size in lengths):
        raise source.error(f"the shape in {shown(entry.name)} is not a list of sizes")
    shape = checked_shape(source, entry.name, [int(size) for size in lengths])
    offset = start + length
    if entry.size - offset != TensorInfo(dtype, shape).nbytes:
        raise source.error(
            f"{shown(entry.name)} of shape {list(shape)} and dtype {dtype} takes {TensorInfo(dtype, shape).nbytes:,} "
            f"bytes, but has {entry.size - offset:,}"
        )
    return Stored(dtype, shape, packed_reader(entry), offset, _fortran(dtype, shape) if fortran == "True" else None)


def _fortran(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, stride = [], ITEMSIZE[dtype]
    for length in shape:
        strides.append(stride)
        stride *= length
    return tuple(strides)
