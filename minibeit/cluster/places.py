"""The images that words name, by path or at an address, in lists too; and copies of those at addresses."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..file_names import IMAGE_SUFFIXES
from ..images.ahead import read_ahead
from ..places import FETCHERS, Address, is_address, place, within
from ..runs.found import STDIN, Found, find_images, natural
from ..text import one_line

LIST = ".txt"  # an image in each line


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
    listing = place(word if is_address(word) else os.path.abspath(word))
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{word}: expected a list with the path of an image in each line, found no text") from None
    found = [str(within(listing.parent, line.strip())) for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{word}: expected the path of an image in each line, found no line")
    return found


def _at_address(word: str, recursive: bool) -> list[str]:
    """The images at an address: itself, those in that folder, or those that fit a pattern."""
    files, path = Address(word).opened
    try:
        if any(mark in path for mark in ("*[" if word.startswith(("http://", "https://")) else "*?[")):
            return _chosen(files, files.glob(path))
        if not files.isdir(path):
            return [word]
        return _chosen(files, files.find(path) if recursive else files.ls(path, detail=False))
    except Exception as error:  # of whatever library serves the address
        raise ValueError(f"{word}: cannot be listed ({one_line(error, 300) or type(error).__name__})") from error


def _chosen(files: Any, paths: Iterable[str]) -> list[str]:
    images = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
    images = [path for path in images if not path.rpartition("/")[2].startswith(".")]
    if not images:
        raise ValueError("there is no image (.png, .jpg, ...)")
    return [files.unstrip_protocol(path) for path in sorted(images, key=natural)]


# Copies ---------------------------------------------------------------------------------------------------------------


def copies(places: Sequence[str]) -> Iterator[Found]:
    """The files, in their order; those at addresses are fetched ahead of time and deleted once no longer in use.

    One that cannot be fetched is an entry with the reason.
    """
    if not any(map(is_address, places)):
        return map(Found, places)
    return read_ahead(places, _copy, FETCHERS, 2 * FETCHERS)


def _copy(name: str) -> Found:
    if not is_address(name):
        return Found(name)
    descriptor, copy = tempfile.mkstemp(prefix="minibeit-copy-")
    found = Found(name, copy=copy)
    weakref.finalize(found, os.unlink, copy)
    try:
        with os.fdopen(descriptor, "wb") as file:
            Address(name).copy_to(file)
    except (OSError, ValueError) as error:
        return Found(name, str(error))
    return found
