"""The arguments that name images, a model that runs on them in the same order, and what must not be overwritten."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, identity
from ..places import Address
from ..runs.results import Result, results_of, unusable
from .terminal import UsageError, note, progress

if TYPE_CHECKING:
    import numpy as np

    from ..runs.found import Found


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


def failed(file: str, error: Exception | str) -> Result:
    """Reports a file that could not be used on stderr, and returns its result."""
    result = unusable(file, error)
    note(str(result.error))
    return result


def check_outputs(outputs: Sequence[Path], inputs: Sequence[str], model: str | None = None) -> None:
    """Raises UsageError if a file to write is also read, even under another name, or is a folder.

    All files of `model`, a checkpoint or its folder, count as read.
    """
    read = {identity(file) for file in [*inputs, *_files_of(model)]} if outputs else set()  # a million take minutes
    for path in outputs:
        if identity(path) in read:
            raise UsageError(f"{path}: this is an input, which is not overwritten; choose another file")
        if not isinstance(path, Address) and path.is_dir():  # at an address one request for each
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
