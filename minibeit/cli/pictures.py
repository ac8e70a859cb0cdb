"""The images that commands draw: overlays, legends, masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..evaluate.colours import Colour
from ..evaluate.drawing import tinted
from ..files import atomic_write

PAPER, INK, EDGE = (255, 255, 255), (24, 24, 24), (150, 150, 150)
ROW, SWATCH, MARGIN, TEXT = 26, 34, 14, 15  # of the legend, in pixels
LEAST = 448  # pixels of the longer side that small photos are enlarged towards


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


def covered(photo: np.ndarray, mask: np.ndarray, zoom: int) -> Image.Image:
    """A photo (H, W, 3), enlarged by an integer factor, with the patches of `mask` (gh, gw) covered."""
    picture = _enlarged(photo, zoom)
    draw = ImageDraw.Draw(picture)
    height, width = picture.height / mask.shape[0], picture.width / mask.shape[1]
    for row, column in np.argwhere(mask):
        box = (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        draw.rectangle(box, fill=(128, 128, 128), outline=(96, 96, 96))
    return picture


def masked(photo: np.ndarray, mask: np.ndarray, *further: np.ndarray) -> Image.Image:
    """A photo (H, W, 3), beside it a copy with the patches of `mask` (gh, gw) covered, and further images."""
    zoom = zoom_of(photo)
    size = (photo.shape[1] * zoom, photo.shape[0] * zoom)
    others = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in further]
    return _in_rows([[_enlarged(photo, zoom), covered(photo, mask, zoom), *others]])


def beside(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Images (H, W, 3) beside each other in rows below each other, all enlarged by one integer factor."""
    zoom = zoom_of(rows[0][0])
    return _in_rows([[_enlarged(image, zoom) for image in row] for row in rows])


def zoom_of(photo: np.ndarray) -> int:
    """The integer factor that brings small photos to nearly LEAST pixels."""
    return max(1, LEAST // max(photo.shape[:2]))


def _enlarged(image: np.ndarray, zoom: int) -> Image.Image:
    size = (image.shape[1] * zoom, image.shape[0] * zoom)
    return Image.fromarray(image).resize(size, Image.Resampling.NEAREST)


def _in_rows(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    width = max(sum(image.width + MARGIN for image in row) for row in rows) - MARGIN
    height = sum(max(image.height for image in row) + MARGIN for row in rows) - MARGIN
    picture, top = Image.new("RGB", (width, height), PAPER), 0
    for row in rows:
        left = 0
        for image in row:
            picture.paste(image, (left, top))
            left += image.width + MARGIN
        top += max(image.height for image in row) + MARGIN
    return picture


def save_png(picture: Image.Image, path: Path, **options: Any) -> None:
    """Writes a PNG file that appears complete or not at all."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG", **options)
