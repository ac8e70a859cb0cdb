"""Images beside label maps to measure a segmentation model by, found and read as training finds and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..images.opening import read_picture
from ..images.transforms import IGNORED_LABEL
from ..places import place
from ..train.label_maps import MapReader, Pair, check_sizes, find_pairs, matched
from .split import held_out


def paired(data: Path, maps: Path | None = None) -> list[Pair]:
    """The images of a folder or list with their label maps, of data with a split those held out; none is read.

    `data` is as `train.label_maps.read_pairs` takes it; or it holds the images, and `maps` the label maps of the same
    names.  Raises FileNotFoundError or ValueError, one sentence, for what is not there and images without a map.
    """
    if maps is None:
        return held_out(data, find_pairs(data))
    for folder in (data, maps):
        if folder.is_file():
            raise ValueError(
                f"{folder}: expected a folder, of images or of the label maps of --maps, found a file; a list names "
                "the map of each image itself, without --maps"
            )
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder")
    return matched(data, maps, None)


def read_pair(pair: Pair, read_map: MapReader, upright: bool = True) -> tuple[Any, np.ndarray]:
    """(PIL image, class numbers (H, W), 255 for pixels that do not count).

    Raises ImageError for a file that cannot be read, and ValueError for a map of another size or that is none.
    """
    image = read_picture(place(pair.path), upright)
    labels = read_map(place(pair.map), upright)
    check_sizes(pair, image.size, labels)
    return image, labels


def check_classes(pair: Pair, labels: np.ndarray, classes: int, read_map: MapReader) -> None:
    """Raises ValueError, naming the map and what to do, for a number that is neither a class nor the ignored 255."""
    strays = np.unique(labels[(labels != IGNORED_LABEL) & (labels >= classes)])
    if not len(strays):
        return
    advice = f"maps whose 0 means nothing, and {classes} the last class, are read with --reduce-labels"
    if read_map.reduce:
        advice = "1 was taken from each number; is --no-reduce-labels meant?"
    raise ValueError(
        f"{pair.map}: expected the model's classes, 0 to {classes - 1}, or {IGNORED_LABEL}, which is ignored, found "
        f"{', '.join(map(str, strays[:5].tolist()))}; {advice}"
    )
