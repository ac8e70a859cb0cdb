"""Finds the images that the command line names, and runs a model on them in the same order."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..file_names import IMAGE_SUFFIXES
from ..files import check_writable, identity
from ..text import one_line
from .terminal import UsageError, note, progress

if TYPE_CHECKING:
    import numpy as np

STDIN, STDIN_NAME = "-", "standard input"
MOST_STDIN = 1 << 30  # bytes; a pipe may have no end
SHARD_READERS = 1  # threads that read ahead for a shard on Dask, since each thread of a worker has a shard


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


class Result(NamedTuple):
    """The outcome for one file: a value, or the reason why there is none."""

    file: str
    value: Any = None
    error: str | None = None


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE..., --recursive and --quiet."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|GLOB",
        help="image files; a folder stands for the images in it (by suffix, in natural order); a quoted pattern such "
        "as 'shots/**/*.png' is expanded; - reads an image from standard input",
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="also search the folders within folders")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no notes")


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


def run_batches(
    found: list[Found],
    processor: Any,
    compute: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    quiet: bool = False,
) -> Iterator[Result]:
    """The values of `compute` (from pixel values (B, C, H, W), one per image), for all files in order.

    An image that cannot be read or that the model refuses is reported on stderr, and the rest continue.
    """
    for result in progress(results_of(found, processor, compute, batch_size), len(found), quiet):
        if result.error is not None:
            note(result.error)
        yield result


def results_of(
    found: Iterable[Found],
    processor: Any,
    compute: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    workers: int | None = None,
) -> Iterator[Result]:
    """What `run_batches` yields, reported nowhere.

    `workers` threads read the images of the next batches while it computes.  Images of different shapes do not share a
    batch.
    """
    from ..images.ahead import computed

    def read(entry: Found) -> np.ndarray:
        if entry.error is not None:
            raise ValueError(entry.error)
        try:
            return processor(entry.source).pixel_values[0]
        except ValueError as error:
            raise ValueError(entry.named(str(error))) from None

    for entry, value in computed(found, read, lambda pixels: check_finite(compute(pixels)), batch_size, workers):
        yield unusable(entry.file, value) if isinstance(value, ValueError) else Result(entry.file, value)


def failed(file: str, error: Exception | str) -> Result:
    """Reports a file that could not be used on stderr, and returns its result."""
    result = unusable(file, error)
    note(str(result.error))
    return result


def unusable(file: str, error: Exception | str) -> Result:
    """The result for a file that could not be used: one line, which names it."""
    message = one_line(error)
    if one_line(STDIN_NAME if file == STDIN else file) not in message:
        message = f"{one_line(file)}: {message}"
    return Result(file, error=message)


def check_finite(values: np.ndarray) -> np.ndarray:
    """A model's outputs, unchanged.  Raises CheckpointError for NaNs, since the pixels were checked before."""
    import numpy as np

    from ..errors import CheckpointError

    if not np.isfinite(values).all():
        raise CheckpointError("the model computes NaN or infinite values, so its checkpoint must be damaged")
    return values


def check_outputs(outputs: Sequence[Path], inputs: Sequence[str], model: str | None = None) -> None:
    """Raises UsageError if a file to write is also read, even under another name, or is a folder.

    All files of `model`, a checkpoint or its folder, count as read.
    """
    read = {identity(file) for file in [*inputs, *_files_of(model)]}
    for path in outputs:
        if identity(path) in read:
            raise UsageError(f"{path}: this is an input, which is not overwritten; choose another file")
        if path.is_dir():
            raise UsageError(f"{path}: expected the name of a file to write, found a folder")


def check_output(path: Path, inputs: Sequence[str] = (), model: str | None = None) -> None:
    """Raises UsageError or OSError, before any work is done, for a file that could not be written after it."""
    check_outputs([path], inputs, model)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist; create it first")
    check_writable(path)


def check_distinct(outputs: Sequence[Path]) -> None:
    """Raises UsageError if two files to write are the same one, even under different names."""
    seen: dict[Any, Path] = {}
    for path in outputs:
        other = seen.setdefault(identity(path), path)
        if other is not path:
            raise UsageError(f"{path}: this file is to be written twice, also as {other}; choose another name")


def _files_of(model: str | None) -> list[str]:
    if model is None or not os.path.exists(model):  # or an id on the Hub, whose files nobody names as an output
        return []
    folder = model if os.path.isdir(model) else None
    try:
        return [model] if folder is None else [*(entry.path for entry in os.scandir(folder) if entry.is_file())]
    except OSError:
        return [model]
