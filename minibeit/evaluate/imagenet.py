"""ImageNet's validation images as they are published: one flat folder, and a file with the true classes.

Classes are numbered in the order of their sorted WordNet ids, as models number them.  The devkit numbers them
differently, in an order that stands in its meta.mat or map_clsloc.txt.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..labels import synsets
from .matlab import read_structs

IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
FLAT = (".", "val", "validation", "ILSVRC2012_img_val", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val")
DEVKIT, META, MAP = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "map_clsloc.txt"
TRUTHS = (DEVKIT, "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "val.txt")
PLACES = (".", "data", "devkit/data", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "ILSVRC/devkit/data")
CLASSES = 1000


def flat_folder(data: Path) -> Path | None:
    """The folder within `data` that holds the validation images themselves, not in class folders; None if none does."""
    for place in FLAT:
        folder = data / place
        if folder.is_dir() and any(IMAGE.fullmatch(entry.name) for entry in folder.iterdir()):
            return folder
    return None


def read_flat(folder: Path, data: Path, truth: Path | None = None) -> list[tuple[str, int]]:
    """(path, class) of each validation image in `folder`.

    `truth` is one of the files that `TRUTHS` names, in any of these formats; without it they are looked for in `data`
    and beside it.  Raises FileNotFoundError or ValueError, one sentence.
    """
    images = sorted(entry for entry in folder.iterdir() if IMAGE.fullmatch(entry.name))
    truth = truth or _found(data)
    if truth is None:
        raise FileNotFoundError(
            f"{data}: found {len(images)} validation images of ImageNet in one folder, but not their true classes; "
            f"give the devkit's {DEVKIT} (its {META} beside it), or one of {', '.join(TRUTHS[1:])}, with --labels"
        )
    by_name = _classes(truth)
    found = []
    for image in images:
        if image.stem not in by_name:
            raise ValueError(f"{truth}: there is no class for {image.name}; {len(by_name)} images have one")
        found.append((str(image), by_name[image.stem]))
    return found


def _found(data: Path) -> Path | None:
    for base in (data, data.parent):
        for place in PLACES:
            for name in TRUTHS:
                if (base / place / name).is_file():
                    return base / place / name
    return None


def _classes(truth: Path) -> dict[str, int]:
    """The class of each image, by the stem of its file name."""
    try:
        lines = [line for line in truth.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{truth}: expected lines of text with the classes of images, found something else") from None
    if not lines:
        raise ValueError(f"{truth}: expected the class of an image in each line, found no line")
    if "," in lines[0]:  # ImageId,PredictionString
        rows = csv.DictReader(lines)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{truth}: expected the columns ImageId and PredictionString, found {rows.fieldnames}")
        return dict(_checked(truth, ((row["ImageId"], row["PredictionString"].partition(" ")[0]) for row in rows)))
    if len(lines[0].split()) == 2:  # name and class, from 0
        return dict(_checked(truth, ((Path(name).stem, word) for name, word in map(str.split, lines))))
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, len(lines) + 1)]
    if re.fullmatch(r"n\d{8}", lines[0].strip()):
        return dict(_checked(truth, zip(names, map(str.strip, lines))))
    order = _devkit_order(truth)
    words = (_synset_of(truth, order, line.strip()) for line in lines)
    return dict(_checked(truth, zip(names, words)))


def _checked(truth: Path, rows: Iterator[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    numbers = {synset: i for i, synset in enumerate(synsets())}
    for name, word in rows:
        number = numbers.get(word, int(word) if word.isdecimal() else -1)
        if not 0 <= number < CLASSES:
            raise ValueError(
                f"{truth}: expected a class of ImageNet, a WordNet id or 0 to 999, for {name}, found {word}"
            )
        yield name, number


def _synset_of(truth: Path, order: Sequence[str], word: str) -> str:
    if not word.isdecimal() or not 1 <= int(word) <= len(order):
        raise ValueError(f"{truth}: expected a class number from 1 to {len(order)} in each line, found {word}")
    return order[int(word) - 1]


def _devkit_order(truth: Path) -> list[str]:
    """The WordNet ids of the devkit's classes 1 to 1000, from meta.mat or map_clsloc.txt beside the ground truth."""
    if (text := truth.parent / MAP).is_file():
        rows = [line.split() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        by_number = {int(row[1]): row[0] for row in rows}
    elif (meta := truth.parent / META).is_file():
        rows_of_meta = read_structs(meta, "synsets")
        by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows_of_meta}
    else:
        raise FileNotFoundError(
            f"{truth}: expected {META} or {MAP} beside it, since the devkit numbers the classes in an order of its own"
        )
    try:
        return [by_number[i] for i in range(1, CLASSES + 1)]
    except KeyError as error:
        raise ValueError(
            f"{truth.parent}: expected the classes 1 to {CLASSES}, found none with number {error}"
        ) from None
