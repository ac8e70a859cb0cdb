"""What is drawn with the colours of classes: label maps, overlays, legends."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .colours import Colour
from .files import atomic_write

PAPER, INK, EDGE = (255, 255, 255), (24, 24, 24), (150, 150, 150)
ROW, SWATCH, MARGIN, TEXT = 26, 34, 14, 15  # of the legend, in pixels
MOST_ROWS = 20  # of the legend beside a map
OVERLAY = 0.55  # share of the class colour over the image


def indexed(labels: np.ndarray, colours: list[Colour]) -> Image.Image:
    """Class ids (H, W) as a palette image whose pixel values are the ids; above 256 classes as 16-bit gray."""
    if len(colours) > 256:
        return Image.fromarray(labels.astype(np.uint16))
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette([level for colour in colours for level in colour])
    return picture


def overlay(photo: np.ndarray, labels: np.ndarray, colours: list[Colour]) -> Image.Image:
    """The photo (H, W, 3) under the colours of its classes (H, W)."""
    tint = np.array(colours, np.float32)[labels]
    return Image.fromarray(tinted(photo, tint))


def legend(rows: list[tuple[Colour, str, str]]) -> Image.Image:
    """A swatch, a name and a number per row."""
    font = ImageFont.load_default(size=TEXT)
    names = max(font.getlength(name) for _, name, _ in rows)
    numbers = max(font.getlength(number) for _, _, number in rows)
    width = int(3 * MARGIN + SWATCH + names + 2 * MARGIN + numbers)
    picture = Image.new("RGB", (width, 2 * MARGIN + ROW * len(rows)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (colour, name, number) in enumerate(rows):
        top, middle = MARGIN + ROW * i, MARGIN + ROW * i + ROW // 2
        draw.rectangle((MARGIN, top + 3, MARGIN + SWATCH, top + ROW - 4), fill=colour, outline=EDGE)
        draw.text((2 * MARGIN + SWATCH, middle), name, fill=INK, font=font, anchor="lm")
        draw.text((width - MARGIN, middle), number, fill=INK, font=font, anchor="rm")
    return picture


def with_legend(picture: Image.Image, rows: list[tuple[Colour, str, str]]) -> Image.Image:
    """An image and, to its right, the legend."""
    key = legend(rows)
    both = Image.new("RGB", (picture.width + key.width, max(picture.height, key.height)), PAPER)
    both.paste(picture, (0, 0))
    both.paste(key, (picture.width, 0))
    return both


def share_text(share: float) -> str:
    """A share of the area as a legend has it."""
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def class_map(
    labels: np.ndarray, names: Mapping[int, str], colours: list[Colour], photo: np.ndarray | None = None
) -> Image.Image:
    """The classes (h, w) of an image in their colours, over the photo (h, w, 3) if there is one, and their legend."""
    picture = Image.fromarray(np.array(colours, np.uint8)[labels]) if photo is None else overlay(photo, labels, colours)
    counts = np.bincount(labels.ravel(), minlength=len(colours))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]][:MOST_ROWS]
    return with_legend(picture, [(colours[i], names[i], share_text(counts[i] / labels.size)) for i in order])


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file, as Jupyter shows them."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def tinted(photo: np.ndarray, tint: np.ndarray) -> np.ndarray:  # two of (h, w, 3) -> (h, w, 3)
    """A photo under colours."""
    return np.rint((1 - OVERLAY) * photo + OVERLAY * tint).astype(np.uint8)


def save_png(picture: Image.Image, path: Path, **options: Any) -> None:
    """Writes a PNG file that appears complete or not at all."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG", **options)
