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
from ..strict_json import brief
from .matlab import read_structs

IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
FLAT = (".", "val", "validation", "ILSVRC2012_img_val", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val")
DEVKIT, META, MAP = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "map_clsloc.txt"
TRUTHS = (DEVKIT, "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "val.txt")
PLACES = (".", "data", "devkit/data", "ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "ILSVRC/devkit/data")
CLASSES = 1000
SYNSET = re.compile(r"n\d{8}")


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
    truth = truth or found_truth(data)
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


def found_truth(data: Path) -> Path | None:
    """The file with the true classes in or beside `data`; None if there is none."""
    for base in (data, data.absolute().parent):
        for place in PLACES:
            for name in TRUTHS:
                if (base / place / name).is_file():
                    return base / place / name
    return None


def _classes(truth: Path) -> dict[str, int]:
    """The class of each image, by the stem of its file name."""
    lines = _lines(truth)
    if not lines:
        raise ValueError(f"{truth}: expected the class of an image in each line, found no line")
    if "," in lines[0][1]:  # ImageId,PredictionString
        return dict(_checked(truth, _solution(truth, lines)))
    if len(lines[0][1].split()) == 2:  # name and class, from 0
        return dict(_checked(truth, _named(truth, lines)))
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, len(lines) + 1)]
    words = [line.strip() for _, line in lines]
    if not SYNSET.fullmatch(words[0]):
        order = _devkit_order(truth)
        words = [_synset_of(truth, order, word) for word in words]
    return dict(_checked(truth, zip(names, words)))


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of each line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected lines of UTF-8 text about classes, found something else") from None
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _named(truth: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """(name of an image, class) of lines with both."""
    for number, line in lines:
        words = line.split()
        if len(words) != 2:
            raise ValueError(f"{truth} line {number}: expected the name of an image and its class, found {brief(line)}")
        yield Path(words[0]).stem, words[1]


def _solution(truth: Path, lines: list[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """(name of an image, class) of a table of ImageId and PredictionString, whose first word is the class."""
    rows = csv.DictReader(line for _, line in lines)
    try:
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{truth}: expected the columns ImageId and PredictionString, found {rows.fieldnames}")
        for row in rows:
            name, said = row["ImageId"], row["PredictionString"]
            if not name or not said:
                place = lines[rows.line_num - 1]
                raise ValueError(f"{truth} line {place[0]}: expected ImageId,PredictionString, found {brief(place[1])}")
            yield name, said.partition(" ")[0]
    except csv.Error as error:
        raise ValueError(f"{truth}: expected a table separated by commas, found something else ({error})") from None


def _checked(truth: Path, rows: Iterator[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    numbers = {synset: i for i, synset in enumerate(synsets())}
    for name, word in rows:
        number = numbers.get(word, int(word) if word.isdecimal() and len(word) < 5 else -1)
        if not 0 <= number < CLASSES:
            raise ValueError(
                f"{truth}: expected a class of ImageNet, a WordNet id or 0 to 999, for {brief(name)}, found "
                f"{brief(word)}"
            )
        yield name, number


def _synset_of(truth: Path, order: Sequence[str], word: str) -> str:
    if not word.isdecimal() or len(word) > 4 or not 1 <= int(word) <= len(order):
        raise ValueError(f"{truth}: expected a class number from 1 to {len(order)} in each line, found {brief(word)}")
    return order[int(word) - 1]


def _devkit_order(truth: Path) -> list[str]:
    """The WordNet ids of the devkit's classes 1 to 1000, from meta.mat or map_clsloc.txt beside the ground truth."""
    if (file := truth.parent / MAP).is_file():
        by_number = dict(_mapped(file))
    elif (file := truth.parent / META).is_file():
        by_number = dict(_structured(file))
    else:
        raise FileNotFoundError(
            f"{truth}: expected {META} or {MAP} beside it, since the devkit numbers the classes in an order of its own"
        )
    try:
        return [by_number[i] for i in range(1, CLASSES + 1)]
    except KeyError as error:
        raise ValueError(f"{file}: expected the classes 1 to {CLASSES}, found none with number {error}") from None


def _mapped(file: Path) -> Iterator[tuple[int, str]]:
    """(number, WordNet id) of the lines of map_clsloc.txt."""
    for line_number, line in _lines(file):
        words = line.split()
        if len(words) < 2 or not SYNSET.fullmatch(words[0]) or not re.fullmatch(r"\d{1,9}", words[1]):
            raise ValueError(f"{file} line {line_number}: expected a WordNet id and a number, found {brief(line)}")
        yield int(words[1]), words[0]


def _structured(file: Path) -> Iterator[tuple[int, str]]:
    """(number, WordNet id) of the structures of meta.mat."""
    for place, row in enumerate(read_structs(file, "synsets"), 1):
        number, synset = row.get("ILSVRC2012_ID"), row.get("WNID")
        if (
            not isinstance(number, (int, float))
            or not float(number).is_integer()
            or not isinstance(synset, str)
            or not SYNSET.fullmatch(synset)
        ):
            raise ValueError(
                f"{file}: expected a number ILSVRC2012_ID and a WordNet id WNID in each of the synsets, found "
                f"{brief(number)} and {brief(synset)} in synset {place}"
            )
        yield int(number), synset
