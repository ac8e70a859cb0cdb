"""The images that a user names: files, folders, patterns and standard input."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..file_names import IMAGE_SUFFIXES

STDIN, STDIN_NAME = "-", "standard input"
MOST_STDIN = 1 << 30  # bytes; a pipe may have no end


class Found:
    """A file to read, or an argument that matches none and why.

    `copy` is the path of what came from elsewhere: standard input, or an address.
    """

    def __init__(self, file: str, error: str | None = None, copy: str | None = None) -> None:
        self.file, self.error, self.copy = file, error, copy

    @property
    def source(self) -> str:
        """The path to read."""
        return self.copy or self.file

    def named(self, message: str) -> str:
        """A message about `source`, reworded with the name that the user gave."""
        return message.replace(self.copy, STDIN_NAME if self.file == STDIN else self.file) if self.copy else message


def find_images(words: Sequence[str], recursive: bool = False) -> list[Found]:
    """The files that the arguments name, in order; an argument that names none is an entry with the reason."""
    import glob

    found: list[Found] = []
    for word in words:
        if word == STDIN:
            found.append(from_stdin())
        elif os.path.lexists(word) or not glob.has_magic(word):
            found += _expand(word, recursive)
        else:
            matches = sorted(glob.glob(word, recursive=True), key=natural)
            found += [entry for match in matches for entry in _expand(match, recursive)]
            if not matches:
                found.append(Found(word, f"{word}: no file matches this pattern"))
    return found


def from_stdin() -> Found:
    """The image from standard input, kept in a temporary file as long as the result is in use."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.isatty():
        return Found(STDIN, f"{STDIN_NAME}: expected an image from a pipe or a file, found a terminal")
    import tempfile
    import weakref

    descriptor, copy = tempfile.mkstemp(prefix="minibeit-stdin-")
    found = Found(STDIN, copy=copy)
    weakref.finalize(found, os.unlink, copy)
    with os.fdopen(descriptor, "wb") as file:
        _copy_at_most(stream, file, MOST_STDIN)
        size = file.tell()
    return found if size < MOST_STDIN else Found(STDIN, f"{STDIN_NAME}: expected an image, found more than 1 GB")


def _copy_at_most(source: Any, target: Any, most: int) -> None:
    left = most
    while left and (some := source.read(min(left, 1 << 20))):
        target.write(some)
        left -= len(some)


def _expand(word: str, recursive: bool) -> list[Found]:
    folder = Path(word)
    if not word:
        return [Found(word, "an empty argument, expected the name of an image")]
    try:
        if not folder.is_dir():
            return [Found(word)]
        entries = folder.rglob("*") if recursive else folder.iterdir()
        files = [
            str(path) for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        ]
        files = [file for file in files if os.path.isfile(file)]
    except OSError as error:
        return [Found(word, f"{word}: the folder cannot be read ({error.strerror})")]
    except ValueError as error:  # a NUL character, before Python 3.12
        return [Found(word, f"{word}: {error}")]
    if not files:
        hint = "" if recursive else "; --recursive also searches the folders within"
        return [Found(word, f"{word}: there is no image (.png, .jpg, ...) in this folder{hint}")]
    return [Found(file) for file in sorted(files, key=natural)]


def natural(name: str) -> list[tuple[int, Any]]:
    """A key that sorts page2 before page10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]
