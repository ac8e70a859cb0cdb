"""Places of files: paths on this machine, and addresses (s3://, gs://, hf://, https://, ...) that fsspec opens."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from .text import one_line

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # at least two letters, so that C:// is a path
FETCHERS = 16  # files that are fetched at once: who fetches mostly waits
TRIES, PAUSE = 3, 0.5  # of a file that cannot be fetched; seconds before the second one, doubled before each further
MOST_BYTES, PIECE = 1 << 30, 1 << 20  # of a file that is fetched, and at a time
# Protocols by which a file appears when it is complete; elsewhere it is written beside its place and renamed.
WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oci", "oss", "memory"}


def is_address(place: str) -> bool:
    """Whether a place is an address (s3://, gs://, hf://, https://, ...) and not a path."""
    return ADDRESS.match(place) is not None


def place(text: str) -> Path:
    """The path or the `Address` that a text names; either is used as a `pathlib.Path` is."""
    return cast(Path, Address(text)) if is_address(text) else Path(text)


def within(folder: Path, text: str) -> Path:
    """What a line of a list in `folder` names: an address, an absolute path, or a place in that folder."""
    other = place(text)
    return other if isinstance(other, Address) or other.is_absolute() else folder / text


class Address:
    """A place that fsspec opens, with as much of `pathlib.Path` as it takes to find, read and write files there.

    What may fail raises FileNotFoundError, OSError with the reason that the address's library gives, or, for an address
    that no library opens, ValueError; all of them one sentence.  What a listing says of its entries is not asked again.
    """

    def __init__(self, text: str, kind: str | None = None) -> None:
        self.text = text if text.endswith("://") else text.rstrip("/")
        if kind is not None:
            self._kind = kind

    # Names

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Address({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __lt__(self, other: Address) -> bool:
        return self.text.split("/") < other.text.split("/")  # as paths are sorted

    def __truediv__(self, name: str) -> Address:
        there = self
        for part in PurePosixPath(name).parts:
            there = there.parent if part == ".." else Address(f"{there.text.rstrip('/')}/{part}")
        return there

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.text.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the name, with its point."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Address:
        """The folder around it; the outermost is its own."""
        folder = self.text.rpartition("/")[0]
        return self if folder.endswith(("/", ":")) else Address(folder)

    def relative_to(self, folder: Address) -> PurePosixPath:
        """The way to it from a folder around it."""
        return PurePosixPath(self.text.removeprefix(f"{folder.text}/"))

    def absolute(self) -> Address:
        """Itself."""
        return self

    resolve = absolute

    @property
    def canonical(self) -> tuple[str, str]:
        """Equal for the same file, however its address is written."""
        files, path = self.opened
        return type(files).__name__, path

    # What is there

    @cached_property
    def opened(self) -> tuple[Any, str]:
        """(fsspec's file system, the path in it)."""
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ImportError(f"{self}: addresses need fsspec, which is missing: pip install fsspec") from None
        if "::" in self.text:
            raise ValueError(f"{self}: cannot be opened (addresses within others, with ::, are not supported)")
        try:
            files, path = url_to_fs(self.text)
        except (ImportError, ValueError) as error:  # no library for it, or no such protocol
            raise ValueError(f"{self}: cannot be opened ({_reason(error)})") from error
        return files, path.rstrip("/") or path

    @cached_property
    def _kind(self) -> str | None:
        files, path = self.opened
        try:
            return str(files.info(path)["type"])
        except FileNotFoundError:
            return None
        except Exception as error:  # of whatever library serves the address
            raise OSError(f"{self}: cannot be reached ({_reason(error)})") from error

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self._kind == "directory"

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._kind == "file"

    def exists(self) -> bool:
        """Whether anything is there."""
        return self._kind is not None

    def iterdir(self) -> Iterator[Address]:
        """What is in a folder."""
        files, path = self.opened
        for name, about in self._listed(lambda: {entry["name"]: entry for entry in files.ls(path, detail=True)}):
            if name.strip("/") != path.strip("/"):  # object stores may have a file of the folder's own name
                yield Address(f"{self.text.rstrip('/')}/{name.rstrip('/').rpartition('/')[2]}", about["type"])

    def rglob(self, pattern: str) -> Iterator[Address]:
        """The files in a folder and in the folders in it whose names fit a pattern."""
        files, path = self.opened
        for name, about in self._listed(lambda: files.find(path, detail=True)):
            found = Address(f"{self.text.rstrip('/')}/{name.removeprefix(path).lstrip('/')}", about["type"])
            if fnmatch(found.name, pattern):
                yield found

    def _listed(self, listing: Any) -> list[tuple[str, Any]]:
        files, path = self.opened
        try:
            files.invalidate_cache(path)  # others may have written in the meantime
            return list(listing().items())
        except FileNotFoundError:
            raise FileNotFoundError(f"{self}: there is no such folder") from None
        except Exception as error:  # of whatever library serves the address
            raise OSError(f"{self}: cannot be listed ({_reason(error)})") from error

    # What is in it

    def read_bytes(self) -> bytes:
        """All of a file."""
        file = io.BytesIO()
        self.copy_to(file)
        return file.getvalue()

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of a file of text."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding).read()

    def open(self, newline: str | None = None, encoding: str = "utf-8") -> io.TextIOWrapper:
        """A file of text."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding, newline=newline)

    def copy_to(self, target: BinaryIO) -> None:
        """Copies a file of at most 1 GB into an empty one, in three attempts."""
        files, path = self.opened
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            target.seek(0)
            target.truncate()
            try:
                with files.open(path, "rb") as source:
                    complete = _copied(source, target)
            except FileNotFoundError:
                raise FileNotFoundError(f"{self}: there is no such file") from None
            except Exception as error:  # of whatever library serves the address
                reason = _reason(error)
                continue
            if not complete:
                raise OSError(f"{self}: expected at most 1 GB, found more")
            return
        raise OSError(f"{self}: cannot be fetched ({reason}), in {TRIES} attempts")

    def write_bytes(self, content: bytes) -> None:
        """Writes a file, which appears complete or not at all, and its folder if need be."""
        from .files import atomic_write

        files, path = self.opened
        folder, protocols = path.rpartition("/")[0], files.protocol
        protocols = {protocols} if isinstance(protocols, str) else set(protocols)
        try:
            if protocols & WHOLE:
                files.pipe_file(path, content)
                return
            files.makedirs(folder, exist_ok=True)  # which at an object store could make a bucket
            if "file" in protocols:
                with atomic_write(path) as file:
                    file.write(content)
            else:
                files.pipe_file(beside := f"{folder}/.minibeit-{os.urandom(6).hex()}.tmp", content)
                files.mv(beside, path)
        except Exception as error:  # of whatever library serves the address
            raise OSError(f"{self}: cannot be written ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return one_line(error, 300) or type(error).__name__


def _copied(source: BinaryIO, target: BinaryIO) -> bool:
    """Whether all of a file was copied, and not only the first gigabyte."""
    left = MOST_BYTES
    while left >= 0 and (some := source.read(PIECE)):
        left -= len(some)
        target.write(some)
    return left >= 0
