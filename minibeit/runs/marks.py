"""Records which model made the results in a folder, as text in each label map."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..text import shown_name

KEY = "minibeit model"
LABELS = "_labels.png"
SIBLINGS = (LABELS, "_legend.png", "_overlay.png", "_figure.png", "_scores.npz")
BLOCKS, BLOCK = 64, 4096  # of each file: enough to distinguish two trainings of one architecture, at almost no cost


def mark_of(model: str) -> str:
    """A name for people and a digest of a checkpoint's settings and of samples of its weights."""
    import hashlib

    from ..hub import resolve

    place = resolve(model)
    files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr((file.name, file.stat().st_size)).encode())
        _sample(file, digest)
    return f"{shown_name(Path(model).name)} {digest.hexdigest()[:16]}"


def as_text(mark: str) -> Any:
    """The mark as PNG text, for `Image.save(pnginfo=...)`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, mark)
    return info


def of_others(folder: Path, mark: str) -> list[Path]:
    """The label maps in `folder` with the mark of another model; files without a mark do not count."""
    if not folder.is_dir():
        return []
    found = [(path, _mark_in(path)) for path in sorted(folder.glob(f"*{LABELS}"))]
    return [path for path, other in found if other and other.rpartition(" ")[2] != mark.rpartition(" ")[2]]


def model_in(labels: Path) -> str:
    """The name of the model that made a label map."""
    return shown_name(_mark_in(labels).rpartition(" ")[0])


def remove(labels: Path) -> None:
    """Removes a label map and what was drawn with it."""
    stem = labels.name.removesuffix(LABELS)
    for suffix in SIBLINGS:
        with suppress(FileNotFoundError):
            os.unlink(labels.with_name(stem + suffix))


def _mark_in(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:  # reads what stands before the pixels
            return str(picture.info.get(KEY, ""))
    except Exception:  # whatever else lies there under such a name
        return ""


def _sample(file: Path, digest: Any) -> None:
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        for i in range(BLOCKS):
            stream.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
