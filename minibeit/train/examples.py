"""What a user's folder or list of images holds: paths with labels, class names, and a split into two."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ImageError
from ..file_names import IMAGE_SUFFIXES
from ..images.opening import read_picture
from ..places import within
from ..strict_json import brief
from .ranks import Ranks
from .splits import check_fraction, checked_split, images_in, part_of, parted, parts_of, rows_of, split, subfolders

MAP_FOLDERS = ("annotations", "labels", "masks")  # of label maps, beside images
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
UNLABELLED = "unlabelled"  # images for pre-training
KINDS = {"label": SINGLE, "labels": MULTI, "value": REGRESSION, "values": REGRESSION}  # column or key -> problem type
SHOWN = 5


@dataclass(frozen=True)
class Example:
    """An image and what it shows: a class name, class names, or numbers; `held_out` None where nobody has said."""

    path: str
    label: Any
    held_out: bool | None = None
    digest: str = ""


@dataclass(frozen=True)
class Examples:
    """Images to learn from and images to be judged by, with labels as `problem` needs them.

    `targets` gives an array: class numbers (B,), 0 and 1 for each class (B, K), or numbers (B, K).
    """

    problem: str
    names: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    unreadable: tuple[str, ...] = field(default=())

    def targets(self, examples: Sequence[Example]) -> np.ndarray:
        """The labels of some examples as the losses take them."""
        numbers = {name: i for i, name in enumerate(self.names)}
        if self.problem == SINGLE:
            return np.array([numbers[example.label] for example in examples], np.int64)
        if self.problem == REGRESSION:
            return np.array([example.label for example in examples], np.float32)
        targets = np.zeros((len(examples), len(self.names)), np.float32)
        for row, example in zip(targets, examples):
            row[[numbers[name] for name in example.label]] = 1
        return targets

    @property
    def fingerprint(self) -> str:
        """Equal for equal images, labels and split, wherever they lie."""
        rows = [[e.digest, e.label] for e in self.train], [[e.digest, e.label] for e in self.held_out]
        return hashlib.sha256(json.dumps([self.problem, self.names, *rows]).encode()).hexdigest()


def read_examples(
    data: str | os.PathLike[str],
    fraction: float = 0.1,
    seed: int = 0,
    names: Sequence[str] | None = None,
    workers: int = 2,
    ranks: Ranks | None = None,
) -> Examples:
    """The examples of a folder of class folders, or of a CSV or JSON-lines file of paths and labels.

    A folder may hold `train` and `val` with the class folders in them.  A list has `path` and one of `label`,
    `labels` (separated by ; in CSV), `value` or `values`, and perhaps `split`; its paths are relative to it.  Where no
    split is given, `fraction` of each class is held out, drawn by `seed`.  `names` are the classes of a model that is
    to keep them.  Every image is read once: those that cannot be are left out and named in `unreadable`.  Several
    `ranks` call it together, and each reads a part.

    Raises ValueError, one sentence, for data that nothing can be learned from; warns of images that are in both
    parts.
    """
    check_fraction(fraction)
    path, ranks = Path(data), ranks or Ranks()
    problem, found = ranks.from_first(lambda: find_examples(path))
    classes = _classes(path, problem, found, names)
    good, unreadable = _readable(found, workers, ranks)
    _check_classes(path, problem, classes, found, good, fixed=names is not None)
    good = split(good, fraction, seed, lambda example: example.label if problem == SINGLE else "")
    return Examples(problem, classes, *parted(path, good), tuple(unreadable))


def read_images(
    data: str | os.PathLike[str],
    fraction: float = 0.0,
    seed: int = 0,
    workers: int = 2,
    ranks: Ranks | None = None,
) -> Examples:
    """The images of a folder at any depth, or of a list as `read_examples` takes it, whose labels are not looked at.

    Where a folder holds `train` and `val` (or the like), what is in the latter is held out.  Where no split is given,
    `fraction` of the images is held out, drawn by `seed`.  Raises ValueError, one sentence, for data without images;
    warns of images that are in both parts.  Several `ranks` call it together, and each reads a part.
    """
    check_fraction(fraction)
    path, ranks = Path(data), ranks or Ranks()
    found = ranks.from_first(lambda: _unlabelled(path))
    good, unreadable = _readable(found, workers, ranks)
    if not good:
        raise ValueError(f"{path}: expected images to learn from, found {len(found)}, none of which can be read")
    return Examples(UNLABELLED, (), *parted(path, split(good, fraction, seed)), tuple(unreadable))


def _unlabelled(path: Path) -> list[Example]:
    if path.is_file():
        return listed_images(path)
    if not path.is_dir():
        raise _nothing_there(path)
    parts = parts_of(path)
    return [Example(str(file), None, None if parts is None else parts[1] in file.parents) for file in images_in(path)]


def _nothing_there(path: Path) -> FileNotFoundError:
    return FileNotFoundError(f"{path}: there is no such folder or list of images")


def find_examples(path: Path, may_be_empty: bool = False) -> tuple[str, list[Example]]:
    """(problem type, the examples that a folder or a list names), as `read_examples` takes them, no image read.

    With `may_be_empty` a class folder may hold no image.
    """
    if path.is_dir():
        return SINGLE, _folder(path, may_be_empty)
    if path.is_file():
        return _listed(path)
    raise _nothing_there(path)


# Folders --------------------------------------------------------------------------------------------------------------


def _folder(path: Path, may_be_empty: bool) -> list[Example]:
    parts = parts_of(path)
    for folder in (path, *(parts or ())[:1]):
        inside = {entry.name.lower() for entry in subfolders(folder)}
        maps = next((name for name in MAP_FOLDERS if name in inside), None)
        if "images" in inside and maps:
            raise ValueError(
                f"{folder}: its folders images and {maps} hold data for segmentation (--task segmentation); a "
                "classifier learns from one folder per class"
            )
    if parts is None:
        return class_folders(path, None, may_be_empty)
    train, held_out = parts
    found = [*class_folders(train, False), *class_folders(held_out, True, may_be_empty=True)]
    if extra := {e.label for e in found if e.held_out} - {e.label for e in found if not e.held_out}:
        raise ValueError(f"{held_out}: expected the classes of {train}, found also {brief(sorted(extra))}")
    return found


def class_folders(path: Path, held_out: bool | None, may_be_empty: bool = False) -> list[Example]:
    """The images of a folder of class folders.  Raises ValueError if there is none, or one that may not be empty is."""
    found: list[Example] = []
    folders = subfolders(path)
    if not folders:
        raise ValueError(f"{path}: expected a folder for each class with its images in it, found no folder")
    for folder in folders:
        files = images_in(folder)
        if not files and not may_be_empty:
            raise ValueError(f"{folder}: this class is empty; put images (.png, .jpg, ...) into it or remove it")
        found += (Example(str(file), folder.name, held_out) for file in files)
    return found


# Lists ----------------------------------------------------------------------------------------------------------------


def listed_images(path: Path) -> list[Example]:
    """The images that a list names, whose labels are not looked at; none is read."""
    found = [Example(_file(path, where, row), None, part_of(where, row.get("split"))) for where, row in rows_of(path)]
    return checked_split(path, found)


def _listed(path: Path) -> tuple[str, list[Example]]:
    rows = rows_of(path)
    keys = [key for key in KINDS if key in rows[0][1]]
    if "path" not in rows[0][1] or len(keys) != 1:
        raise ValueError(
            f"{path}: expected path and one of {', '.join(KINDS)} in each line, found {brief(sorted(rows[0][1]))}"
        )
    key, found = keys[0], []
    for where, row in rows:
        label = _label(where, key, row.get(key), path.parent)
        found.append(Example(_file(path, where, row), label, part_of(where, row.get("split"))))
    if KINDS[key] == REGRESSION and len(widths := {len(example.label) for example in found}) > 1:
        raise ValueError(f"{path}: expected as many values in each line, found {brief(sorted(widths))}")
    return KINDS[key], checked_split(path, found)


def _file(path: Path, where: str, row: dict[str, Any]) -> str:
    if not isinstance(row.get("path"), str) or not row["path"]:
        raise ValueError(f"{where}: expected the path of an image, found {brief(row.get('path'))}")
    return str(within(path.parent, row["path"]))


def _label(where: str, key: str, value: Any, folder: Path) -> Any:
    if key == "label":
        if isinstance(value, (list, dict)) or _is_picture(value, folder):
            raise ValueError(
                f"{where}: expected the name of one class, found {brief(value)}; label maps are for --task segmentation"
            )
        if value is None or str(value).strip() == "":
            raise ValueError(f"{where}: expected the name of a class, found nothing")
        return str(value)
    several = [part.strip() for part in value.split(";")] if isinstance(value, str) else value
    if key == "labels":
        if not isinstance(several, list) or not all(isinstance(part, (str, int)) for part in several):
            raise ValueError(f"{where}: expected the names of classes, found {brief(value)}")
        return sorted({str(part) for part in several if str(part) != ""})
    several = several if isinstance(several, list) else [several]
    try:
        numbers = [float(part) for part in several]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected {key} to be a number, found {brief(value)}") from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where}: expected {key} to be finite, found {brief(value)}")
    return numbers


def _is_picture(value: Any, folder: Path) -> bool:
    return isinstance(value, str) and Path(value).suffix.lower() in IMAGE_SUFFIXES and (folder / value).is_file()


# Checks ---------------------------------------------------------------------------------------------------------------


def _classes(path: Path, problem: str, found: list[Example], names: Sequence[str] | None) -> tuple[str, ...]:
    if problem == REGRESSION:
        count = len(found[0].label)
        return ("value",) if count == 1 else tuple(f"value_{i}" for i in range(count))
    used = {name for e in found for name in ([e.label] if problem == SINGLE else e.label)}
    if names is None:
        return tuple(sorted(used, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name)))
    if strays := sorted(used - set(names)):
        raise ValueError(
            f"{path}: expected the classes of the model's config, found {brief(strays[:SHOWN])}, which "
            f"{'is' if len(strays) == 1 else 'are'} not among its {len(names)}"
        )
    return tuple(names)


def _check_classes(
    path: Path, problem: str, names: tuple[str, ...], found: list[Example], good: list[Example], fixed: bool
) -> None:
    if not good:
        raise ValueError(f"{path}: none of the {len(found)} images can be read; the first is {found[0].path}")
    if problem == SINGLE and not fixed:
        if len(names) < 2:
            raise ValueError(f"{path}: expected at least two classes, found only {brief(list(names))}")
        left = {e.label for e in good if not e.held_out}
        for name in names:
            if name not in left:
                raise ValueError(
                    f"{path}: no image of the class {brief(name)} to learn from can be read; repair its images or "
                    "remove it"
                )
    if problem == MULTI and not names:
        raise ValueError(f"{path}: expected at least one class, found no label in any line")


def _readable(found: list[Example], workers: int, ranks: Ranks) -> tuple[list[Example], list[str]]:
    """(examples whose images can be read, with the digest of their files; a sentence for each of the others)."""

    def look(example: Example) -> Example | str:
        try:
            read_picture(example.path)
            return replace(example, digest=hashlib.sha256(Path(example.path).read_bytes()).hexdigest())
        except (ImageError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        looked = ranks.divided(found, lambda part: list(pool.map(look, part)))
    return [e for e in looked if isinstance(e, Example)], [text for text in looked if isinstance(text, str)]
