"""A checkpoint file as one read-only block of bytes: mapped into memory, never copied, never executed."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import strict_json
from ...errors import CheckpointError

MAX_JSON = 2 << 20  # the header of BEiT-large takes 60 KB; parsing may take 24 times the text in memory
MAX_NAME = 1000


@dataclass(frozen=True)
class Source:
    """The bytes of one file, and its name in errors."""

    name: str
    data: memoryview

    @property
    def size(self) -> int:
        return len(self.data)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {message}")

    def part(self, start: int, length: int, what: str) -> memoryview:
        """The bytes [start, start + length); refused if the file does not have all of them."""
        if start < 0 or length < 0 or start + length > self.size:
            raise self.error(
                f"{what} should be {length:,} bytes at offset {start:,}, but the file has {self.size:,}; "
                "it is truncated or damaged"
            )
        return self.data[start : start + length]


def open_source(file: str | os.PathLike[str] | bytes | bytearray | memoryview, name: str | None = None) -> Source:
    """Maps a regular file into memory, or wraps bytes already there.

    A FIFO or a device is refused before it is opened, since opening one may block forever.
    Raises FileNotFoundError for a missing file and CheckpointError for one that cannot be read.
    """
    if isinstance(file, (bytes, bytearray, memoryview)):
        return Source(name or "<bytes>", memoryview(file).cast("B").toreadonly())
    path = os.fspath(file)
    name = name or str(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{name}: is not a regular file")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{name}: the file is empty")
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no such file") from None
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(name)}: cannot be opened ({error})") from None
    return Source(name, memoryview(mapped))


def shown(text: Any) -> str:
    """An untrusted string made safe for an error message: quoted, escaped and short."""
    text = text if isinstance(text, str) else type(text).__name__
    return repr(text if len(text) <= 80 else text[:77] + "...")


def parse_json(source: Source, text: memoryview, what: str) -> dict[str, Any]:
    """A JSON object of at most MAX_JSON bytes; see `strict_json.parse_json`.  Raises CheckpointError."""
    if len(text) > MAX_JSON:
        raise source.error(f"{what} has {len(text):,} bytes, more than the {MAX_JSON:,} that are read")
    try:
        value = strict_json.parse_json(bytes(text), MAX_JSON, most_values=MAX_JSON)
    except ValueError as error:
        raise source.error(f"{what} {error}") from None
    if not isinstance(value, dict):
        raise source.error(f"{what} is not a JSON object")
    return value


def file_in_folder(folder: Path, name: str, source: str) -> Path:
    """The path of a file that is named inside a folder: a plain name, and not a link out of the folder.

    The only exception is the Hub cache, whose snapshots are links into `models--*/blobs`.
    """
    if not name or name in (".", "..") or any(sign in name for sign in "/\\:\0"):
        raise CheckpointError(f"{source}: names the file {shown(name)}, which is not a plain file name in its folder")
    path = folder / name
    try:
        target = path.resolve(strict=True)
        inside = target.is_relative_to(folder.resolve())
    except FileNotFoundError:
        raise CheckpointError(f"{source}: names the file {shown(name)}, which is not in its folder") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{source}: names the file {shown(name)}, which cannot be found ({error})") from None
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not inside and not in_cache:
        raise CheckpointError(f"{source}: {shown(name)} is a link to {target} outside its folder; copy the file there")
    return path
