"""Where images are: on this machine's file systems, or at an address that fsspec opens; and lists of them."""

from __future__ import annotations

import os
import re
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..file_names import IMAGE_SUFFIXES
from ..images.ahead import read_ahead
from ..runs.found import MOST_STDIN, STDIN, Found, find_images, natural
from ..text import one_line
from .extra import needed

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # at least two letters, so that C:// is a path
LIST = ".txt"  # an image in each line
FETCHERS = 16  # files that are fetched at once, for a shard
TRIES, PAUSE = 3, 0.5  # of a file that cannot be fetched; seconds before the second one, doubled before each further


def is_address(place: str) -> bool:
    """Whether a place is an address (s3://, gs://, hf://, https://, ...) and not a path."""
    return ADDRESS.match(place) is not None


def find(words: Sequence[str], recursive: bool = False) -> list[str]:
    """The images that words name, in their order: paths and addresses of images, folders, patterns and .txt lists.

    A folder stands for the images in it, by suffix and in natural order, with `recursive` at any depth.  Paths in a
    list that are not absolute begin at the list's folder.  No image is opened.
    Raises ValueError or OSError, one sentence, for a word that names nothing.
    """
    found: list[str] = []
    for word in words:
        if word == STDIN:
            raise ValueError("-: workers cannot read standard input; name files, folders or addresses")
        if word.lower().endswith(LIST):
            found += _listed(word)
        elif is_address(word):
            found += _at_address(word, recursive)
        else:
            entries = find_images([word], recursive)
            found += [_named(entry) for entry in entries]
    if not found:
        raise ValueError("expected at least one image, found none")
    return found


def _named(entry: Found) -> str:
    """The absolute path, which means the same to workers in another working directory."""
    if entry.error is not None:
        raise ValueError(entry.error)
    return os.path.abspath(entry.file)


def _listed(word: str) -> list[str]:
    """The images that the lines of a list name."""
    try:
        text = _read(word).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{word}: expected a list with the path of an image in each line, found no text") from None
    lines = [line.strip() for line in text.splitlines()]
    folder = word.rpartition("/")[0] if is_address(word) else os.path.dirname(os.path.abspath(word))
    found = [line if is_address(line) else _joined(folder, line) for line in lines if line]
    if not found:
        raise ValueError(f"{word}: expected the path of an image in each line, found no line")
    return found


def _joined(folder: str, line: str) -> str:
    return f"{folder}/{line}" if is_address(folder) else os.path.join(folder, line)


def _read(word: str) -> bytes:
    if not is_address(word):
        return Path(word).read_bytes()
    with opened(word) as file:
        return bytes(file.read())


def _at_address(word: str, recursive: bool) -> list[str]:
    """The images at an address: itself, those in that folder, or those that fit a pattern."""
    files, path = _file_system(word)
    try:
        if any(mark in path for mark in "*?["):
            return _chosen(word, files, files.glob(path))
        if not files.isdir(path):
            return [word]
        return _chosen(word, files, files.find(path) if recursive else files.ls(path, detail=False))
    except Exception as error:  # of whatever library serves the address
        raise ValueError(f"{word}: cannot be listed ({_reason(error)})") from error


def _chosen(word: str, files: Any, paths: Iterable[str]) -> list[str]:
    images = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
    images = [path for path in images if not path.rpartition("/")[2].startswith(".")]
    if not images:
        raise ValueError("there is no image (.png, .jpg, ...)")
    return [files.unstrip_protocol(path) for path in sorted(images, key=natural)]


def _file_system(address: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of an address."""
    fsspec = needed("fsspec")
    try:
        files, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # no library for it, or no such protocol
        raise ValueError(f"{address}: cannot be opened ({_reason(error)})") from error
    return files, path


def opened(address: str) -> Any:
    """A file at an address, open for reading in binary."""
    files, path = _file_system(address)
    return files.open(path, "rb")


def _reason(error: BaseException) -> str:
    return one_line(error, 300) or type(error).__name__


# Copies ---------------------------------------------------------------------------------------------------------------


def copies(places: Sequence[str]) -> Iterator[Found]:
    """The files, in their order; those at addresses are fetched ahead of time and deleted once no longer in use.

    One that cannot be fetched is an entry with the reason.
    """
    if not any(map(is_address, places)):
        return map(Found, places)
    return read_ahead(places, _copy, FETCHERS, 2 * FETCHERS)


def _copy(place: str) -> Found:
    if not is_address(place):
        return Found(place)
    descriptor, copy = tempfile.mkstemp(prefix="minibeit-copy-")
    os.close(descriptor)
    found = Found(place, copy=copy)
    weakref.finalize(found, os.unlink, copy)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            _fetch(place, copy)
            return found
        except FileNotFoundError:
            return Found(place, f"{place}: there is no such file")
        except Exception as error:  # of whatever library serves the address
            reason = _reason(error)
    return Found(place, f"{place}: cannot be fetched ({reason}), in {TRIES} attempts")


def _fetch(address: str, path: str) -> None:
    left = MOST_STDIN
    with opened(address) as source, open(path, "wb") as target:
        while some := source.read(1 << 20):
            left -= len(some)
            if left < 0:
                raise ValueError("expected an image, found more than 1 GB")
            target.write(some)
