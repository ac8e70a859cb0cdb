"""Labelled images for a classifier: paths and class numbers, whatever the data calls the classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import BeitConfig
from ..labels import names as names_of
from ..labels import outputs_of_22k, source_of, synsets
from ..strict_json import brief
from ..train.examples import SINGLE, Example, class_folders, find_examples
from ..train.splits import held_out_folders, subfolders
from .imagenet import SYNSET, flat_folder, read_flat
from .split import held_out, without_split

UNNAMED = re.compile(r"LABEL_\d+")
IMAGENET = "imagenet-1k"


@dataclass(frozen=True)
class Labelled:
    """An image and the number of its class."""

    path: str
    label: int


@dataclass(frozen=True)
class LabelledImages:
    """The images to judge a classifier by.

    `names` are the classes K that a label is a number of; `outputs` are the model's outputs for them, None for all in
    their own order.  `notes` say what a reader of the result should know.
    """

    images: tuple[Labelled, ...]
    names: tuple[str, ...]
    outputs: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()


def labelled_images(data: Path, config: BeitConfig, truth: Path | None = None) -> LabelledImages:
    """The images of a folder or list, with their classes as the model numbers them; none is read.

    A folder has a folder for each class, perhaps within val/ or test/ (train/ is not looked at), or is ImageNet's flat
    folder of validation images, whose true classes are in `truth` or lie beside it.  A list is a CSV or JSON-lines file
    as fine-tuning reads it; of one with a split, the held-out images are taken.  Classes are found by the names of the
    model's config, by their numbers, or by WordNet ids.  A note says so where nothing is held out.
    Raises FileNotFoundError or ValueError, one sentence, for data that cannot be used.
    """
    if config.problem_type not in (None, SINGLE) or config.num_labels < 2:
        raise ValueError(
            f"evaluate measures models that name one of several classes, found one of "
            f"{(config.problem_type or 'regression').replace('_', ' ')} with {config.num_labels} outputs"
        )
    flat = flat_folder(data) if data.is_dir() else None
    if flat is not None:
        return _of_imagenet(read_flat(flat, data, truth), config, data)
    if truth is not None:
        raise ValueError(f"{data}: --labels is for ImageNet's flat folder of validation images, found none in it")
    problem, found = _found(data)
    if problem != SINGLE:
        raise ValueError(f"{data}: expected one class for each image, found {problem.replace('_', ' ')}")
    found = held_out(data, found)
    if not found:
        raise ValueError(f"{data}: expected images, found none")
    known = _numbered(data, found, config)
    return replace(known, notes=(*known.notes, *without_split(data, found)))


def _numbered(data: Path, found: Sequence[Example], config: BeitConfig) -> LabelledImages:
    words = {example.label for example in found}
    if all(SYNSET.fullmatch(word) for word in words) and words <= set(synsets()) and not words & _own(config):
        numbers = {synset: i for i, synset in enumerate(synsets())}
        return _of_imagenet([(example.path, numbers[example.label]) for example in found], config, data)
    numbers, notes = _numbers(data, words, config)
    images = tuple(Labelled(example.path, numbers[example.label]) for example in found)
    return LabelledImages(images, _own_names(config), notes=notes)


def _found(data: Path) -> tuple[str, list[Example]]:
    """(problem type, examples) of the folder of held-out images within `data`, or of `data` itself."""
    for folder in held_out_folders(data) if data.is_dir() else ():
        if subfolders(folder):  # else it is a class that happens to be called so
            return SINGLE, class_folders(folder, True, may_be_empty=True)
    return find_examples(data, may_be_empty=True)


def _own_names(config: BeitConfig) -> tuple[str, ...]:
    return tuple(config.id2label[i] for i in range(config.num_labels))


def _own(config: BeitConfig) -> set[str]:
    return set(_own_names(config))


def _of_imagenet(found: Sequence[tuple[str, int]], config: BeitConfig, data: Path) -> LabelledImages:
    """Images with classes of ImageNet-1k, for a head of 1,000 outputs or of ImageNet-22k's 21,841."""
    names, source = tuple(names_of(IMAGENET)), source_of("image_classification", config.num_labels)
    if source == IMAGENET:
        return LabelledImages(tuple(Labelled(path, label) for path, label in found), names)
    if source != "imagenet-22k":
        raise ValueError(
            f"{data}: these are classes of ImageNet-1k, which takes a model of 1,000 or 21,841 outputs, found "
            f"{config.num_labels}"
        )
    outputs = outputs_of_22k()
    known = [i for i, output in enumerate(outputs) if output is not None]
    place = {label: i for i, label in enumerate(known)}
    images = tuple(Labelled(path, place[label]) for path, label in found if label in place)
    notes = [f"of the model's {config.num_labels} outputs, the {len(known)} of ImageNet-1k's classes compete"]
    if len(images) < len(found):
        notes.append(f"{len(found) - len(images)} images are left out, whose class {synsets_without(outputs)} has none")
    if not images:
        raise ValueError(f"{data}: the model has no output for the classes of any image")
    picked = tuple(output for output in outputs if output is not None)
    return LabelledImages(images, tuple(names[i] for i in known), picked, tuple(notes))


def synsets_without(outputs: Sequence[int | None]) -> str:
    """The WordNet ids of the classes without an output, as text."""
    return ", ".join(synset for synset, output in zip(synsets(), outputs) if output is None)


def _numbers(data: Path, words: set[str], config: BeitConfig) -> tuple[dict[str, int], tuple[str, ...]]:
    """(the number of each class, notes), by name, by number if no name fits, or where there are no names, by order."""
    names = _own_names(config)
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    if words <= set(places):
        if several := sorted(word for word in words if len(places[word]) > 1):
            raise ValueError(f"{data}: the model has several classes called {brief(several[0])}; use their numbers")
        return {word: places[word][0] for word in words}, ()
    by_number = not words & set(places)  # a name such as "3" need not be that of output 3
    if by_number and all(word.isdecimal() and int(word) < len(names) for word in words):
        return {word: int(word) for word in words}, ("classes are matched by number",)
    if len(words) == len(names) and all(UNNAMED.fullmatch(name) for name in names):
        order = {word: i for i, word in enumerate(sorted(words))}
        return order, ("the model's classes have no names; its outputs are taken to be the sorted classes of the data",)
    strays = sorted(words - set(places))
    raise ValueError(
        f"{data}: expected classes of the model, such as {brief(list(names[:3]))}, found {brief(strays[:5])}, which "
        f"{'is' if len(strays) == 1 else 'are'} not among its {len(names)}"
    )
