"""Flax checkpoints: MessagePack maps whose arrays are extension type 1, read in place.

Formats: the MessagePack specification, and flax/serialization.py (`msgpack_serialize`).
"""

from __future__ import annotations

import math
import struct
from typing import Any

from .file_bytes import Source, shown
from .lazy_tensors import STORED, Stored, TensorInfo, checked_shape

MAX_DEPTH = 32
MAX_VALUES = 200_000
CHUNKED = "__msgpack_chunked_array__"
FIXED = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
LENGTHS = {
    0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I"), 0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"), 0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"), 0xDC: ("list", ">H"),
    0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip


def read_msgpack(source: Source) -> Any:
    """The nested maps of a Flax checkpoint, with arrays as `Stored`."""
    reader = Reader(source, source.data)
    value = reader.value(0)
    if reader.position != source.size:
        raise source.error(f"{source.size - reader.position:,} bytes follow the msgpack value")
    return value


class Reader:
    """Reads one MessagePack value from a block of bytes; lengths are checked against the bytes left."""

    def __init__(self, source: Source, data: memoryview) -> None:
        self.source, self.data = source, data
        self.position = 0
        self.values = 0

    def take(self, length: int) -> memoryview:
        start = self.position
        if length > len(self.data) - start:
            raise self.source.error(f"the msgpack data is cut off: {length:,} bytes expected at offset {start:,}")
        self.position = start + length
        return self.data[start : self.position]

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return value

    def value(self, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise self.source.error(f"has more than {MAX_VALUES:,} msgpack values or {MAX_DEPTH} levels of them")
        code = self.take(1)[0]
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code <= 0x8F:
            return self.map(code & 0x0F, depth)
        if code <= 0x9F:
            return self.list(code & 0x0F, depth)
        if code <= 0xBF:
            return self.text(code & 0x1F)
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in FIXED:
            return self.number(FIXED[code])
        if 0xD4 <= code <= 0xD8:
            return self.extension(1 << (code - 0xD4), depth)
        if code not in LENGTHS:
            raise self.source.error(f"the byte 0x{code:02x} at offset {self.position - 1:,} is not msgpack")
        kind, layout = LENGTHS[code]
        length = self.number(layout)
        if kind == "bin":
            return self.take(length)
        if kind == "str":
            return self.text(length)
        if kind == "ext":
            return self.extension(length, depth)
        return self.list(length, depth) if kind == "list" else self.map(length, depth)

    def text(self, length: int) -> str:
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise self.source.error("holds msgpack text that is not UTF-8") from None

    def list(self, length: int, depth: int) -> list[Any]:
        self.require(length)
        return [self.value(depth + 1) for _ in range(length)]

    def map(self, length: int, depth: int) -> Any:
        self.require(2 * length)
        result: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self.source.error(f"has a msgpack key of type {type(key).__name__} instead of text")
            if key in result:
                raise self.source.error(f"has the msgpack key {shown(key)} twice")
            result[key] = self.value(depth + 1)
        return self.joined(result) if result.get(CHUNKED) is True else result

    def require(self, values: int) -> None:
        """Refuses a container that claims more values than there are bytes left."""
        if values > len(self.data) - self.position:
            raise self.source.error(f"a msgpack container claims {values:,} values, more than the bytes left")

    def extension(self, length: int, depth: int) -> Stored:
        kind = self.number(">b")
        payload = self.take(length)
        if kind not in (1, 3):
            raise self.source.error(f"holds a msgpack extension of type {kind}; Flax arrays have 1, its scalars 3")
        inner = Reader(self.source, payload)
        inner.values = self.values  # one shared budget, or each array could spend it all
        fields = inner.value(depth + 1)  # the depth counts on: an extension may contain extensions
        self.values = inner.values
        if not isinstance(fields, list) or len(fields) != 3 or inner.position != len(payload):
            raise self.source.error("holds a msgpack array that is not [shape, dtype, bytes]")
        shape, dtype, data = fields
        shape = checked_shape(self.source, "of a msgpack array", shape)
        if not isinstance(dtype, str) or dtype not in STORED or not isinstance(data, memoryview):
            raise self.source.error(f"holds a msgpack array of dtype {shown(dtype)}; known are {', '.join(STORED)}")
        info = TensorInfo(dtype, shape)
        if len(data) != info.nbytes:
            raise self.source.error(
                f"a msgpack array of shape {list(shape)} and dtype {dtype} takes {info.nbytes:,} bytes, "
                f"not {len(data):,}"
            )
        return Stored(dtype, shape, data)

    def joined(self, parts: dict[str, Any]) -> Stored:
        """An array of more than 2^30 bytes, which Flax splits into flat chunks; they are joined when it is read."""
        shape = checked_shape(self.source, "of a chunked array", _in_order(parts.get("shape")))
        chunks = _in_order(parts.get("chunks"))
        chunks = chunks if isinstance(chunks, list) else []
        blocks = [block for chunk in chunks if isinstance(block := getattr(chunk, "data", None), memoryview)]
        if not blocks or len(blocks) != len(chunks):
            raise self.source.error("holds a chunked array without chunks")
        dtypes = {chunk.dtype for chunk in chunks}
        if len(dtypes) != 1 or sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
            raise self.source.error(f"the chunks of an array do not make up its shape {list(shape)}")
        return Stored(dtypes.pop(), shape, lambda: memoryview(b"".join(blocks)))


def _in_order(value: Any) -> Any:
    """Flax writes tuples as maps from "0", "1", ... to their items."""
    if isinstance(value, dict) and list(value) == [str(index) for index in range(len(value))]:
        return list(value.values())
    return value
