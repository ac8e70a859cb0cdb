"""What a user's images and label maps hold: pairs of files, class names, and a split into two."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import ImageError
from ..images.ahead import read_ahead
from ..images.opening import read_picture
from ..images.transforms import IGNORED_LABEL, reduce_labels
from ..places import place, within
from ..strict_json import brief
from ..text import one_line
from .examples import MAP_FOLDERS, SHOWN
from .ranks import Ranks
from .splits import check_fraction, checked_split, images_in, part_of, parted, parts_of, rows_of, split, subfolders

ENDINGS = ("", "_labels", "_mask")  # what a map's name may have behind that of its image
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF", "PPM")  # formats of Pillow in which a label map keeps its values
NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow with one whole number per pixel
IGNORED_NAME = "ignored"  # in a table of colours, of what is no class


@dataclass(frozen=True)
class Pair:
    """An image and its label map; `held_out` None where nobody has said."""

    path: str
    map: str
    held_out: bool | None = None
    digest: str = ""


@dataclass(frozen=True)
class Colours:
    """A table of colours: `keys` (n,), 65536 R + 256 G + B, rising, stand for `classes` (n,) of these `names`."""

    keys: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class MapReader:
    """How label maps are read: by the numbers of their pixels or by a table of colours."""

    colours: Colours | None = None
    reduce: bool = False  # number 0 is ignored, every other k is class k - 1

    def __call__(self, path: str | Path, upright: bool = True) -> np.ndarray:  # -> (H, W) uint8
        """The class of every pixel of a label map, 255 for those that are ignored.

        Raises ImageError for a file that cannot be read, and ValueError, naming the file, for one that is no label map.
        """
        image = read_picture(path, apply_exif_orientation=False)
        _check_format(image, path)
        if upright:
            image = ImageOps.exif_transpose(image)
        if self.colours is not None:
            return self._looked_up(np.asarray(image.convert("RGB")), path)
        if image.mode not in NUMBERS:
            raise ValueError(
                f"{path}: expected one number per pixel (a gray or palette image), found colours (mode {image.mode}); "
                "--colours FILE says which class each colour is"
            )
        numbers = np.asarray(image).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > IGNORED_LABEL:
            stray = numbers.min() if numbers.min() < 0 else numbers.max()
            raise ValueError(
                f"{path}: expected classes 0 to {IGNORED_LABEL - 1}, or {IGNORED_LABEL} for pixels to ignore, "
                f"found {stray}"
            )
        return (reduce_labels(numbers) if self.reduce else numbers).astype(np.uint8)

    def _looked_up(self, pixels: np.ndarray, path: str | Path) -> np.ndarray:  # (H, W, 3) -> (H, W)
        assert self.colours is not None
        found = pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
        places = np.searchsorted(self.colours.keys, found).clip(max=len(self.colours.keys) - 1)
        strange = self.colours.keys[places] != found
        if strange.any():
            y, x = np.argwhere(strange)[0].tolist()
            raise ValueError(
                f"{path}: expected the colours of the table, found {' '.join(map(str, pixels[y, x]))} at row {y}, "
                f"column {x}, and {int(strange.sum()):,} such pixels in all"
            )
        return self.colours.classes[places]


@dataclass(frozen=True)
class Pairs:
    """Images with label maps to learn from and to be judged by; `read_map` gives the classes of a map."""

    names: tuple[str, ...]
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    read_map: MapReader = MapReader()
    left_out: tuple[str, ...] = field(default=())  # a sentence for each

    @property
    def fingerprint(self) -> str:
        """Equal for equal images, maps, classes and split, wherever they lie."""
        colours = self.read_map.colours
        table = None if colours is None else [colours.keys.tolist(), colours.classes.tolist()]
        parts = [[pair.digest for pair in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps([self.names, self.read_map.reduce, table, *parts]).encode()).hexdigest()


def read_pairs(
    data: str | os.PathLike[str],
    fraction: float = 0.1,
    seed: int = 0,
    names: Sequence[str] | None = None,
    read_map: MapReader | None = None,
    workers: int = 2,
    ranks: Ranks | None = None,
) -> Pairs:
    """The images and label maps of a folder, or of a CSV or JSON-lines file with `path`, `map` and perhaps `split`.

    A folder holds `images` and one of MAP_FOLDERS, in which maps are named as their images are; both may have
    `training` and `validation` in them (ADE20K), or the folder may, each with the two in it.  Where no split is given,
    `fraction` is held out, drawn by `seed`.  Without `names`, or a table of colours that has them, there are as many
    classes as the largest number asks for.  Every file is read once: what cannot be, or has no pixel that counts, is
    left out and named in `left_out`.  Several `ranks` call it together, and each reads a part.

    Raises ValueError, one sentence, for data that nothing can be learned from, and FileNotFoundError.
    """
    check_fraction(fraction)
    path, read_map, ranks = Path(data), read_map or MapReader(), ranks or Ranks()
    found = ranks.from_first(lambda: find_pairs(path))
    if read_map.colours is not None and names is None:
        names = read_map.colours.names
    good, areas, left_out = _looked_at(found, read_map, workers, ranks)
    if not good:
        raise ValueError(
            f"{path}: none of the {len(found)} images and label maps can be learned from; the first: {left_out[0]}"
        )
    classes = _classes(path, good, areas, names, read_map)
    good = split(good, fraction, seed)
    _warn_of_unseen(classes, good, areas)
    return Pairs(classes, *parted(path, good), read_map, tuple(left_out))


def find_pairs(path: Path) -> list[Pair]:
    """The images and label maps that a folder or a list names, as `read_pairs` takes them, none of them read."""
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _listed(path)
    raise FileNotFoundError(f"{path}: there is no such folder or list of images and label maps")


def read_colours(path: str | os.PathLike[str]) -> Colours:
    """The table of a text file with R, G, B and a class name in each line, separated by blanks or commas.

    Classes are numbered in the order of their first lines; several colours may share a name; what is called
    "ignored" is no class.  Raises ValueError, naming file and line.
    """
    colours: dict[int, int] = {}
    names: list[str] = []
    try:
        lines = place(os.fspath(path)).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeError as error:
        raise ValueError(f"{path}: expected lines of UTF-8 text, found something else ({error})") from None
    for number, line in enumerate(lines, 1):
        parts = re.split(r"[\s,;]+", line.strip(), maxsplit=3)
        if parts == [""]:
            continue
        levels = [int(part) for part in parts[:3] if part.isascii() and part.isdigit() and len(part) < 4]
        if len(parts) < 4 or len(levels) < 3 or max(levels) > 255:
            raise ValueError(f"{path} line {number}: expected R G B (0 to 255) and a name, found {brief(line)}")
        key, name = 65536 * levels[0] + 256 * levels[1] + levels[2], parts[3]
        if key in colours:
            raise ValueError(f"{path} line {number}: the colour {' '.join(parts[:3])} stands there twice")
        if name != IGNORED_NAME and name not in names:
            names.append(name)
        colours[key] = IGNORED_LABEL if name == IGNORED_NAME else names.index(name)
    if not 1 < len(names) <= IGNORED_LABEL:
        raise ValueError(f"{path}: expected the colours of 2 to {IGNORED_LABEL} classes, found those of {len(names)}")
    keys = np.array(sorted(colours), np.int32)
    return Colours(keys, np.array([colours[int(key)] for key in keys], np.uint8), tuple(names))


# Files ----------------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> list[Pair]:
    two = _two_folders(path)
    if two is not None:
        images, maps = (parts_of(folder) for folder in two)
        if images is None or maps is None:
            return matched(*two, None)
        return [*matched(images[0], maps[0], False), *matched(images[1], maps[1], True)]
    parts = parts_of(path)
    inner = None if parts is None else [_two_folders(part) for part in parts]
    if inner is None or None in inner:
        raise ValueError(
            f"{path}: expected the folders images and {' or '.join(MAP_FOLDERS)}, or train and val with these two in "
            f"each, found {brief([folder.name for folder in subfolders(path)]) or 'no folder'}"
        )
    return [pair for two, held_out in zip(inner, (False, True)) if two for pair in matched(*two, held_out)]


def _two_folders(path: Path) -> tuple[Path, Path] | None:
    """The folders of images and of label maps in a folder."""
    found = {folder.name.lower(): folder for folder in subfolders(path)}
    maps = next((found[name] for name in MAP_FOLDERS if name in found), None)
    return (found["images"], maps) if "images" in found and maps is not None else None


def matched(images: Path, maps: Path, held_out: bool | None) -> list[Pair]:
    """Every image with the map of its name, folder within folder."""
    by_name: dict[str, list[Path]] = {}
    for file in images_in(maps):
        by_name.setdefault(file.relative_to(maps).with_suffix("").as_posix(), []).append(file)
    pairs, without = [], []
    for file in images_in(images):
        name = file.relative_to(images).with_suffix("").as_posix()
        match = next((by_name[name + ending] for ending in ENDINGS if name + ending in by_name), None)
        if match is None:
            without.append(file)
        elif len(match) > 1:
            raise ValueError(f"{file}: expected one label map, found {match[0]} and {match[1]}; remove one of them")
        else:
            pairs.append(Pair(str(file), str(match[0]), held_out))
    if without:
        raise ValueError(
            f"{without[0]}: expected its label map in {maps}, named {without[0].stem}.png, found none; "
            f"{len(without)} of {len(without) + len(pairs)} images have none"
        )
    if not pairs:
        raise ValueError(f"{images}: expected images (.jpg, .png, ...), found none")
    return pairs


def _listed(path: Path) -> list[Pair]:
    pairs = []
    for where, row in rows_of(path):
        for key in ("path", "map"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise ValueError(
                    f"{where}: expected path and map, an image and its label map, found {brief(row.get(key))} as {key}"
                )
        files = [str(within(path.parent, row[key])) for key in ("path", "map")]
        pairs.append(Pair(files[0], files[1], part_of(where, row.get("split"))))
    return checked_split(path, pairs)


# What is in them ------------------------------------------------------------------------------------------------------


def _check_format(image: Image.Image, path: str | Path) -> None:
    if image.format not in LOSSLESS or image.info.get("compression") == "jpeg":
        raise ValueError(
            f"{path}: expected a label map in a format that keeps every value ({', '.join(LOSSLESS)}), found "
            f"{image.format}, whose compression changes class numbers at every edge; export the map anew as PNG"
        )


def _looked_at(
    found: list[Pair], read_map: MapReader, workers: int, ranks: Ranks
) -> tuple[list[Pair], list[np.ndarray], list[str]]:
    """(pairs that can be learned from, how many pixels each class has in their maps (256,), a sentence for others)."""

    def look(pair: Pair) -> tuple[Pair, np.ndarray] | str:
        try:
            size = read_picture(pair.path).size
            labels = read_map(pair.map)
            content = Path(pair.path).read_bytes() + Path(pair.map).read_bytes()
        except (ImageError, OSError) as error:
            return str(error)
        check_sizes(pair, size, labels)
        counts = np.bincount(labels.ravel(), minlength=256)
        if not counts[:IGNORED_LABEL].any():
            return f"{pair.map}: every pixel is ignored, so there is nothing to learn from it"
        return replace(pair, digest=hashlib.sha256(content).hexdigest()), counts

    looked = ranks.divided(found, lambda part: list(read_ahead(part, look, workers, 2 * workers)))  # to the first error
    good = [item for item in looked if not isinstance(item, str)]
    return (
        [pair for pair, _ in good],
        [counts for _, counts in good],
        [item for item in looked if isinstance(item, str)],
    )


def check_sizes(pair: Pair, size: tuple[int, int], labels: np.ndarray) -> None:  # (width, height), (H, W)
    """Raises ValueError for an image and a map of different sizes."""
    if size != labels.shape[::-1]:
        turned = "; the image is turned upright by its EXIF data, the map is not" if size == labels.shape else ""
        raise ValueError(
            f"{pair.map}: expected the size of its image, {size[0]} x {size[1]} pixels ({pair.path}), found "
            f"{labels.shape[1]} x {labels.shape[0]}{turned}"
        )


def _classes(
    path: Path, pairs: list[Pair], areas: list[np.ndarray], names: Sequence[str] | None, read_map: MapReader
) -> tuple[str, ...]:
    """The names of the classes.  Raises ValueError for a number that is none of them, or fewer than two classes."""
    total = np.sum(areas, axis=0)
    there = np.flatnonzero(total[:IGNORED_LABEL])
    if names is None:
        if len(there) < 2:
            ignored = (
                f"; pixels of {IGNORED_LABEL} are ignored: if they are a class, as in masks of black and white, give a "
                f"table of colours (--colours) with the lines '0 0 0 background' and '255 255 255 NAME'"
            )
            raise ValueError(
                f"{path}: expected at least two classes in the label maps, found {there[0]} alone"
                f"{ignored if total[IGNORED_LABEL] else ''}"
            )
        return tuple(f"class_{i}" for i in range(int(there[-1]) + 1))
    if not 1 < len(names) <= IGNORED_LABEL:
        raise ValueError(f"{path}: expected the names of 2 to {IGNORED_LABEL} classes, found {len(names)}")
    if there[-1] >= len(names):
        stray = int(there[there >= len(names)][0])
        file = next(pair.map for pair, counts in zip(pairs, areas) if counts[stray])
        written, hint = stray + read_map.reduce, ""
        if stray == len(names) and not read_map.reduce and not total[0]:
            hint = "; if 0 stands for nothing there, --reduce-labels ignores it and numbers the others from 0"
        raise ValueError(
            f"{file}: expected the {len(names)} classes that have names, {int(read_map.reduce)} to "
            f"{len(names) - 1 + read_map.reduce}, or {IGNORED_LABEL} for pixels to ignore, found {written}{hint}"
        )
    return tuple(names)


def _warn_of_unseen(names: Sequence[str], pairs: Sequence[Pair], areas: Sequence[np.ndarray]) -> None:
    total = np.sum([counts for pair, counts in zip(pairs, areas) if not pair.held_out], axis=0)
    unseen = [name for i, name in enumerate(names) if not total[i]]
    if unseen:
        warnings.warn(
            f"{len(unseen)} of the {len(names)} classes have no pixel to learn from: "
            f"{one_line(', '.join(unseen[:SHOWN]), 200)}{', ...' if len(unseen) > SHOWN else ''}",
            stacklevel=3,
        )
