"""safetensors: eight bytes of header length, a JSON header, then the tensors without gaps.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ...files import atomic_write
from .file_bytes import Source, parse_json, shown
from .lazy_tensors import (
    FLOATS,
    MAX_RANK,
    STORED,
    Stored,
    TensorInfo,
    Tensors,
    checked_shape,
    gather,
    narrowed,
)

# Code in the file -> dtype, in the order in which the safetensors package writes them.
DTYPE_OF_CODE = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "F32": "float32", "U32": "uint32", "I32": "int32",
    "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ORDER = list(DTYPE_OF_CODE.values())
CODE_OF_DTYPE = {name: code for code, name in DTYPE_OF_CODE.items()}


def read_safetensors(source: Source) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file, as views of it, and its `__metadata__`."""
    (length,) = struct.unpack("<Q", source.part(0, 8, "the header length"))
    header = parse_json(source, source.part(8, length, "the header"), "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise source.error("the header's __metadata__ is not a map from text to text")
    body = source.data[8 + length :]
    spans = []
    stored = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(source, name, entry)
        if end > len(body):
            raise source.error(
                f"tensor {shown(name)} ends at byte {end:,} of the data, but the file holds {len(body):,}; "
                "it is truncated or damaged"
            )
        spans.append((begin, end, name))
        stored[name] = Stored(dtype, shape, body[begin:end])
    _check_spans(source, sorted(spans), len(body))
    return gather(source, stored), metadata


def _entry(source: Source, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise source.error(f"the header entry of tensor {shown(name)} is not {{dtype, shape, data_offsets}}")
    code, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPE_OF_CODE:
        raise source.error(f"tensor {shown(name)} has dtype {shown(code)}; known are {', '.join(DTYPE_OF_CODE)}")
    shape = checked_shape(source, name, entry["shape"])
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise source.error(f"the data_offsets of tensor {shown(name)} are not two integers")
    begin, end = offsets
    needed = TensorInfo(DTYPE_OF_CODE[code], shape).nbytes
    if begin < 0 or end - begin != needed:
        raise source.error(
            f"tensor {shown(name)} of shape {list(shape)} and dtype {code} takes {needed:,} bytes, "
            f"but its data_offsets are [{begin}, {end}]"
        )
    return DTYPE_OF_CODE[code], shape, begin, end


def _check_spans(source: Source, spans: list[tuple[int, int, str]], size: int) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise source.error(f"tensor {shown(name)} at data byte {begin:,} {kind}, which ends at {position:,}")
        position = end
    if position != size:
        raise source.error(f"{size - position:,} bytes follow the last tensor")


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
    alignment: int = 8,
) -> None:
    """Writes tensors, one at a time, to a safetensors file that appears complete or not at all.

    `dtype` ("float32", "float16", "bfloat16"; None keeps each) is that of the floating-point tensors; integers keep
    theirs. With None, the bfloat16 tensors of a `Tensors` stay bfloat16. Only one tensor is in memory at a time; each
    is read twice unless `tensors` is a `Tensors`. The order (widest dtypes first, as in the safetensors package) keeps
    every tensor aligned; for an `alignment` of more than 8 bytes, tensors whose size is no multiple of it come last and
    are not aligned.
    `metadata` defaults to {"format": "pt"}, without which transformers refuses the file.
    Raises CheckpointError naming the tensor for a dtype that the format lacks and for a value beyond the dtype's range.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)} or None")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist; create it first")
    infos = {name: _written(name, tensors, dtype) for name in tensors}
    uneven = {name for name in infos if alignment > 8 and infos[name].nbytes % alignment}
    names = sorted(infos, key=lambda name: (name in uneven, ORDER.index(infos[name].dtype), name))
    with atomic_write(path) as file:
        metadata = {"format": "pt"} if metadata is None else metadata
        file.write(_header({name: infos[name] for name in names}, metadata, alignment))
        for name in names:
            array = np.asarray(tensors[name])
            if infos[name].dtype in FLOATS:
                array = narrowed(name, array, infos[name].dtype)
            stored = "|b1" if infos[name].dtype == "bool" else STORED[infos[name].dtype]
            if array.shape != infos[name].shape:
                raise CheckpointError(f"tensor {shown(name)} changed its shape while it was being written")
            file.write(np.ascontiguousarray(array, stored).reshape(-1).view(np.uint8).data)


def _written(name: str, tensors: Mapping[str, np.ndarray], dtype: str | None) -> TensorInfo:
    """The dtype and shape that a tensor will have in the file."""
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(f"a tensor cannot be called {shown(name)} in a safetensors file")
    if isinstance(tensors, Tensors):
        info = tensors.info(name)
    else:
        array = np.asarray(tensors[name])
        info = TensorInfo(array.dtype.name, array.shape)
    if info.dtype not in CODE_OF_DTYPE or len(info.shape) > MAX_RANK:
        raise CheckpointError(
            f"tensor {shown(name)} has dtype {info.dtype} and {len(info.shape)} dimensions; "
            f"possible are {', '.join(CODE_OF_DTYPE)} and at most {MAX_RANK}"
        )
    return TensorInfo(dtype, info.shape) if dtype and info.dtype in FLOATS else info


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], alignment: int) -> bytes:
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise TypeError("metadata must map text to text")
        header["__metadata__"] = dict(metadata)
    position = 0
    for name, info in infos.items():
        end = position + info.nbytes
        header[name] = {"dtype": CODE_OF_DTYPE[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(len(text) + 8) % alignment)
    return struct.pack("<Q", len(text)) + text
