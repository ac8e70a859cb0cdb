"""Images beside label maps: the pairs in a folder, and how their class numbers are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ImageError
from ..file_names import IMAGE_SUFFIXES
from ..images.loading import load_label_map, read_picture
from ..images.transforms import IGNORED_LABEL, reduce_labels
from ..train.examples import HELD_OUT

IMAGES, MAPS = ("images", "imgs", "img"), ("annotations", "labels", "masks", "maps")
MAP_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")


@dataclass(frozen=True)
class Pair:
    """An image and its label map."""

    image: Path
    labels: Path


def paired(data: Path, maps: Path | None = None) -> list[Pair]:
    """The images of a folder with their label maps, which have the same names but for the suffix.

    `data` holds images/ and annotations/ (or labels/, masks/), perhaps with validation/ (or val/, test/) in both, as
    ADE20K does; or it holds the images and `maps` the label maps.  Raises FileNotFoundError or ValueError, one
    sentence, for folders that are not there and images without a map.
    """
    folder, maps = (data, maps) if maps is not None else _layout(data)
    for place in (folder, maps):
        if not place.is_dir():
            raise FileNotFoundError(f"{place}: there is no such folder")
    images, found = _files(folder, IMAGE_SUFFIXES), _files(maps, MAP_SUFFIXES)
    if not images:
        raise ValueError(f"{folder}: expected images (.jpg, .png, ...), found none")
    missing = [image for name, image in images.items() if name not in found]
    if missing:
        raise ValueError(
            f"{maps}: expected a label map for each of the {len(images)} images of {folder}, found none for "
            f"{len(missing)}, the first of which is {missing[0].name}"
        )
    return [Pair(image, found[name]) for name, image in images.items()]


def _layout(data: Path) -> tuple[Path, Path]:
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: there is no such folder")
    inside = {entry.name.lower(): entry for entry in sorted(data.iterdir()) if entry.is_dir()}
    images = next((inside[name] for name in IMAGES if name in inside), None)
    maps = next((inside[name] for name in MAPS if name in inside), None)
    if images is None or maps is None:
        raise ValueError(
            f"{data}: expected the folders images and annotations (or {', '.join(MAPS[1:])}), found "
            f"{', '.join(sorted(inside)[:6]) or 'none'}; label maps elsewhere are given with --maps"
        )
    for name in HELD_OUT:
        if (images / name).is_dir() and (maps / name).is_dir():
            return images / name, maps / name
    return images, maps


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files in a folder and those within, by relative path without the suffix, in order."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files if file.name[0] != "."}


def read_pair(pair: Pair, reduce: bool, upright: bool = True) -> tuple[Image.Image, np.ndarray]:
    """(image, class numbers (H, W)); with `reduce` class 0 becomes the ignored 255 and every other k becomes k - 1.

    Raises ImageError, naming the file, for what cannot be read and for a map of another size than its image.
    """
    image: Any = read_picture(pair.image, upright)
    labels = load_label_map(pair.labels, str(pair.labels), upright)
    if labels.shape != (image.height, image.width):
        raise ImageError(
            f"{pair.labels}: expected the size of its image {pair.image.name}, {image.width} x {image.height}, found "
            f"{labels.shape[1]} x {labels.shape[0]}"
        )
    return image, reduce_labels(labels) if reduce else labels


def check_classes(pair: Pair, labels: np.ndarray, classes: int, ignored: int, reduce: bool) -> None:
    """Raises ValueError, naming the map and what to do, for a number that is neither a class nor the ignored one."""
    strays = np.unique(labels[(labels != ignored) & ((labels < 0) | (labels >= classes))])
    if not len(strays):
        return
    advice = "is --no-reduce-labels meant?" if reduce else f"maps whose 0 means nothing, and {classes} the last class, "
    if not reduce:
        advice += "are read with --reduce-labels"
    found = ", ".join(map(str, strays[:5].tolist()))
    again = f" (after 1 was taken from each and 0 became {IGNORED_LABEL})" if reduce else ""
    raise ValueError(
        f"{pair.labels}: expected the model's classes, 0 to {classes - 1}, or {ignored}, which is ignored, found "
        f"{found}{again}; {advice}"
    )
