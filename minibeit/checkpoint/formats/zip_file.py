"""Zip archives of tensors: stored entries are views of the file, deflated ones are decompressed within a limit.

Stricter than `zipfile`, which trusts the names and sizes in a file: no entry may overlap another, share a name, be
encrypted or have a path out of the folder, and together they may not decompress to far more than the file's size.
Format: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from .file_bytes import Source, shown
from .lazy_tensors import allowed_bytes

MAX_ENTRIES = 20_000
STORE, DEFLATE = 0, 8
FORBIDDEN_FLAGS = 0x0001 | 0x0020 | 0x0040 | 0x2000  # encrypted, patched, strongly encrypted, masked headers


@dataclass
class Entry:
    """One file of an archive; `size` is that of its uncompressed content."""

    source: Source
    name: str
    raw: memoryview
    size: int
    method: int
    crc: int
    _content: memoryview | None = field(default=None, repr=False)

    def data(self) -> memoryview:
        """The content: a view if stored, else decompressed once and kept. Stored entries are not checksummed."""
        if self.method == STORE:
            return self.raw
        if self._content is None:
            content = self._inflate(self.size + 1)
            if len(content) != self.size or zlib.crc32(content) != self.crc:
                raise self.source.error(f"entry {shown(self.name)} does not unpack to the content it declares")
            self._content = memoryview(content)
        return self._content

    def head(self, length: int) -> memoryview:
        """The first bytes of the content, without decompressing the rest."""
        if self.method == STORE or self._content is not None:
            return self.data()[:length]
        return memoryview(self._inflate(length))

    def _inflate(self, limit: int) -> bytes:
        try:
            return zlib.decompressobj(-15).decompress(self.raw, limit)
        except zlib.error as error:
            raise self.source.error(f"entry {shown(self.name)} cannot be unpacked ({error})") from None


def read_zip(source: Source) -> dict[str, Entry]:
    """The entries of an archive by name, all checked; none is decompressed."""
    number, size, offset = _end(source)
    if number > MAX_ENTRIES or number * 46 > size:
        raise source.error(f"the zip directory claims {number:,} entries in {size:,} bytes")
    directory = source.part(offset, size, "the zip directory")
    entries: dict[str, Entry] = {}
    spans = []
    position = 0
    for _ in range(number):
        entry, start, stop, position = _entry(source, directory, position, offset)
        if entry.name in entries:
            raise source.error(f"the archive has the entry {shown(entry.name)} twice")
        entries[entry.name] = entry
        spans.append((start, stop, entry.name))
    reached = 0
    for start, stop, name in sorted(spans):
        if start < reached:
            raise source.error(f"the archive entry {shown(name)} overlaps another")
        reached = stop
    unpacked = sum(entry.size for entry in entries.values() if entry.method == DEFLATE)
    if unpacked > allowed_bytes(source):
        raise source.error(f"the archive unpacks to {unpacked:,} bytes, far more than its {source.size:,}")
    return entries


def _end(source: Source) -> tuple[int, int, int]:
    """Number of entries, size and offset of the central directory."""
    tail_start = max(0, source.size - 22 - 0xFFFF)
    found = bytes(source.data[tail_start:]).rfind(b"PK\5\6")
    if found < 0 or tail_start + found + 22 > source.size:
        raise source.error("the zip archive has no end record; it is truncated or damaged")
    position = tail_start + found
    disk, start_disk, here, number, size, offset, comment = struct.unpack_from("<4x4H2LH", source.data, position)
    if position + 22 + comment != source.size:
        raise source.error("the end record of the zip archive is not at its end; it is truncated or damaged")
    if position >= 20 and source.data[position - 20 : position - 16] == b"PK\6\7":
        (position,) = struct.unpack_from("<8xQ", source.data, position - 20)
        record = source.part(position, 56, "the zip64 end record")
        if record[:4] != b"PK\6\6":
            raise source.error("the zip64 end record is not where the archive says")
        disk, start_disk, here, number, size, offset = struct.unpack_from("<16x2L4Q", record)
    if disk or start_disk or here != number:
        raise source.error("the zip archive is split over several files")
    if offset + size > position:
        raise source.error("the zip directory reaches beyond its end record; the file is truncated or damaged")
    return number, size, offset


def _entry(source: Source, directory: memoryview, position: int, limit: int) -> tuple[Entry, int, int, int]:
    """One directory entry, the bytes [start, stop) of the file it covers, and where the next one begins."""
    if position + 46 > len(directory) or directory[position : position + 4] != b"PK\1\2":
        raise source.error("the zip directory is damaged")
    (flags, method, crc, packed, size, name_length, extra_length, comment_length, start) = struct.unpack_from(
        "<8x2H4x3L3H8xL", directory, position
    )
    names_end = position + 46 + name_length
    following = names_end + extra_length + comment_length
    if following > len(directory):
        raise source.error("the zip directory is damaged")
    name = _name(source, bytes(directory[position + 46 : names_end]))
    size, packed, start = _zip64(source, directory[names_end : names_end + extra_length], size, packed, start)
    if flags & FORBIDDEN_FLAGS or method not in (STORE, DEFLATE):
        raise source.error(f"the archive entry {shown(name)} is encrypted or packed in another way than deflate")
    if method == STORE and packed != size:
        raise source.error(f"the archive entry {shown(name)} declares two different sizes")
    local = source.part(start, 30, "a zip entry")
    signature, local_method, local_name, local_extra = struct.unpack_from("<4s4xH16x2H", local)
    content = start + 30 + local_name + local_extra
    same_name = source.data[start + 30 : start + 30 + local_name] == directory[position + 46 : names_end]
    if signature != b"PK\3\4" or local_method != method or not same_name:
        raise source.error(f"the archive entry {shown(name)} is not what the zip directory says")
    if content + packed > limit:
        raise source.error(f"the archive entry {shown(name)} reaches into the zip directory")
    raw = source.part(content, packed, f"the archive entry {shown(name)}")
    return Entry(source, name, raw, size, method, crc), start, content + packed, following


def _zip64(source: Source, extra: memoryview, *fields: int) -> list[int]:
    """Size, compressed size and offset; those with all 32 bits set are read, in this order, from the zip64 field."""
    position = 0
    wide: memoryview = extra[:0]
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = extra[position + 4 : position + 4 + length]
        position += 4 + length
    result = []
    for value in fields:
        if value == 0xFFFFFFFF:
            if len(wide) < 8:
                raise source.error("a zip64 field of the archive is missing; the file is damaged")
            (value,) = struct.unpack_from("<Q", wide)
            wide = wide[8:]
        result.append(value)
    return result


def _name(source: Source, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise source.error("an archive entry has a name that is not UTF-8") from None
    outside = name[:1] in ("", "/") or name[1:2] == ":" or ".." in name.split("/")
    if outside or "\\" in name or "\0" in name:
        raise source.error(f"the archive entry {shown(name)} has a name that leads out of its folder")
    return name


def packed_reader(entry: Entry) -> memoryview | Callable[[], memoryview]:
    """A tensor's access to its entry: the bytes if stored, else a function that decompresses them."""
    return entry.raw if entry.method == STORE else entry.data
