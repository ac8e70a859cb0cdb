"""The images that commands draw beside those of `drawing`: masks, and images in rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..drawing import MARGIN, PAPER

LEAST = 448  # pixels of the longer side that small photos are enlarged towards


def covered(photo: np.ndarray, mask: np.ndarray, zoom: int) -> Image.Image:
    """A photo (H, W, 3), enlarged by an integer factor, with the patches of `mask` (gh, gw) covered."""
    picture = _enlarged(Image.fromarray(photo), zoom)
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
    return _in_rows([[_enlarged(Image.fromarray(photo), zoom), covered(photo, mask, zoom), *others]])


def beside(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Images (H, W, 3) beside each other in rows below each other, all enlarged by one integer factor."""
    return _in_rows([[Image.fromarray(image) for image in row] for row in rows], zoom_of(rows[0][0]))


def zoom_of(photo: np.ndarray) -> int:
    """The integer factor that brings small photos to nearly LEAST pixels."""
    return max(1, LEAST // max(photo.shape[:2]))


def _enlarged(image: Image.Image, zoom: int) -> Image.Image:
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def _in_rows(rows: Sequence[Sequence[Image.Image]], zoom: int = 1) -> Image.Image:
    """The images, each enlarged only when it is drawn."""
    width = max(sum(image.width * zoom + MARGIN for image in row) for row in rows) - MARGIN
    height = sum(max(image.height for image in row) * zoom + MARGIN for row in rows) - MARGIN
    picture, top = Image.new("RGB", (width, height), PAPER), 0
    for row in rows:
        left = 0
        for image in row:
            picture.paste(_enlarged(image, zoom), (left, top))
            left += image.width * zoom + MARGIN
        top += max(image.height for image in row) * zoom + MARGIN
    return picture
