"""Reads the structures in a MATLAB file, version 5 to 7.2, as much of it as the devkit of ImageNet needs.

Format: MathWorks, "MAT-File Format", chapter 1, level 5.  Nothing is run, and every length is checked.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = 128
LARGEST = 64 << 20  # bytes of an element when it is decompressed; the devkit's has half a megabyte
MATRIX, COMPRESSED, UTF8, UTF16 = 14, 15, 16, 17
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q", UTF8: "B", UTF16: "H"}
STRUCT, CHAR = 2, 4  # classes of a matrix


def read_structs(path: Path, name: str) -> list[dict[str, Any]]:
    """The elements of the structure array `name`: text fields as str, single numbers as such, others as lists.

    Raises ValueError, naming the file, if it is no such file or has no such array.
    """
    data = path.read_bytes()
    if len(data) < HEADER or data[126:128] not in (b"IM", b"MI"):
        raise ValueError(f"{path}: expected a MATLAB file of version 5, found something else")
    order = "<" if data[126:128] == b"IM" else ">"
    try:
        for kind, body in _elements(data[HEADER:], order):
            if kind == COMPRESSED:
                inflater = zlib.decompressobj()
                ((kind, body),) = _elements(inflater.decompress(body, LARGEST), order)
            if kind == MATRIX:
                found, value = _matrix(body, order)
                if found == name and isinstance(value, list):
                    return value
    except (struct.error, zlib.error, ValueError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: the MATLAB file is damaged or of a kind that is not read ({error})") from None
    raise ValueError(f"{path}: expected a structure array called {name}, found none")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each data element, one after the other."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:  # a small element: type and size in one word, then up to four bytes
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        if at + 8 + size > len(data):
            raise ValueError("an element ends behind its container")
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)


def _matrix(body: bytes, order: str) -> tuple[str, Any]:
    """(name, value) of an array."""
    if not body:
        return "", []
    parts = list(_elements(body, order))
    flags, shape = _numbers(parts[0], order), _numbers(parts[1], order)
    name = bytes(parts[2][1]).decode("ascii")
    kind, count = flags[0] & 0xFF, 1
    for length in shape:
        count *= length
    if kind == STRUCT:
        (width,) = _numbers(parts[3], order)
        table = parts[4][1]
        fields = [table[i : i + width].split(b"\0")[0].decode("ascii") for i in range(0, len(table), width)]
        values = [_matrix(content, order)[1] for _, content in parts[5:]]
        if len(values) != count * len(fields):
            raise ValueError(f"{len(values)} values for {count} x {len(fields)} fields")
        return name, [dict(zip(fields, values[i : i + len(fields)])) for i in range(0, len(values), len(fields))]
    if kind == CHAR:
        encoding = {UTF8: "utf-8", UTF16: "utf-16-le" if order == "<" else "utf-16-be"}.get(parts[3][0])
        text = parts[3][1].decode(encoding) if encoding else "".join(map(chr, _numbers(parts[3], order)))
        return name, text
    numbers = _numbers(parts[3], order)
    return name, numbers[0] if count == 1 else list(numbers)


def _numbers(element: tuple[int, bytes], order: str) -> tuple[Any, ...]:
    kind, content = element
    code = NUMBERS.get(kind)
    if code is None:
        raise ValueError(f"numbers of type {kind}")
    return struct.unpack(f"{order}{len(content) // struct.calcsize(code)}{code}", content)
