"""What every kind of training data shares: files in folders, lines of lists, and the split into two parts."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..file_names import IMAGE_SUFFIXES
from ..strict_json import brief, parse_json
from ..text import shown_name

TRAIN, HELD_OUT = ("train", "training"), ("val", "valid", "validation", "test")
Item = TypeVar("Item", bound=Any)  # a dataclass with `path`, `digest` and `held_out`, None where nobody has said

# Folders --------------------------------------------------------------------------------------------------------------


def subfolders(path: Path) -> list[Path]:
    """The folders in a folder, by name; hidden ones are left out."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def held_out_folders(path: Path) -> list[Path]:
    """The folders in a folder whose names, in any case, say that they are held out, in the order of `HELD_OUT`."""
    named = [folder for folder in subfolders(path) if folder.name.lower() in HELD_OUT]
    return sorted(named, key=lambda folder: HELD_OUT.index(folder.name.lower()))


def parts_of(path: Path) -> tuple[Path, Path] | None:
    """The folders of what is learned from and of what is held out, where a folder has both."""
    there = {folder.name.lower(): folder for folder in subfolders(path)}
    train, held_out = next((there[name] for name in TRAIN if name in there), None), held_out_folders(path)
    return None if train is None or not held_out else (train, held_out[0])


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and in the folders in it, by name."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


# Lists ----------------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, what it says) for every line of a list."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: expected a folder, a .csv or a .jsonl file, found {path.suffix or 'no suffix'}")
    try:
        rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"{path}: expected UTF-8 text in lines, found something else ({error})") from None
    if not rows:
        raise ValueError(f"{path}: expected an image and its label in each line, found no line")
    return rows


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        return [(f"{path} line {reader.line_num}", row) for row in reader]


def _json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: expected a JSON object: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number}: expected a JSON object, found {brief(row)}")
            rows.append((f"{path} line {number}", row))
    return rows


def part_of(where: str, word: Any) -> bool | None:
    """Whether a word for a part of the data means what is held out; None for no word.  Raises ValueError for others."""
    if word in (None, ""):
        return None
    if str(word).lower() not in (*TRAIN, *HELD_OUT):
        raise ValueError(f"{where}: expected split {TRAIN[0]} or {HELD_OUT[0]}, found {brief(word)}")
    return str(word).lower() in HELD_OUT


def checked_split(path: Path, found: list[Item]) -> list[Item]:
    """What a list names.  Raises ValueError if some lines say a split and others do not."""
    if len({item.held_out is None for item in found}) > 1:
        raise ValueError(f"{path}: expected a split in every line or in none, found it in some")
    return found


# Two parts ------------------------------------------------------------------------------------------------------------


def check_fraction(fraction: float) -> None:
    """Raises ValueError for a share to hold out that is none."""
    if not 0 <= fraction < 1:
        raise ValueError(f"share held out: expected a number of at least 0 and below 1, found {fraction}")


def split(items: list[Item], fraction: float, seed: int, group: Callable[[Item], str] = lambda item: "") -> list[Item]:
    """The items as the data splits them; where it does not, `fraction` of every group is held out.

    At least one item is of each group that has two, and never all; which ones is drawn by `seed`.
    """
    if not all(item.held_out is None for item in items):
        return items
    rng = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(group(item), []).append(i)
    chosen: set[int] = set()
    for name in sorted(groups):
        count = round(fraction * len(groups[name]))
        count = min(max(count, 1 if fraction else 0), len(groups[name]) - 1)
        chosen.update(rng.permutation(groups[name])[:count].tolist())
    return [replace(item, held_out=i in chosen) for i, item in enumerate(items)]


def parted(path: Path, items: Sequence[Item]) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """(what is learned from, what is held out).

    Raises ValueError if nothing is to be learned from; warns of files that are in both parts.
    """
    train = tuple(item for item in items if not item.held_out)
    held_out = tuple(item for item in items if item.held_out)
    if not train:
        raise ValueError(f"{path}: expected images to learn from, found only {len(held_out)} held-out ones")
    learned = {item.digest: item.path for item in train}
    twice = [(learned[item.digest], item.path) for item in held_out if item.digest in learned]
    if twice:
        first = f"{shown_name(twice[0][0])} and {shown_name(twice[0][1])}"
        warnings.warn(
            f"{len(twice)} held-out images are also in the training part, which makes results look better than they "
            f"are; the first are {first}",
            stacklevel=3,
        )
    return train, held_out
