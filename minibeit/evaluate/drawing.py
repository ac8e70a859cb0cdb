"""Small images for reports."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from ..drawing import tinted
from ..errors import ImageError
from ..images.loading import load_image
from ..images.transforms import resize_labels
from ..places import place

SIDE = 320  # pixels of the longer side of an image in a report
IGNORED = (255, 255, 255)


def thumbnail(image: Any, side: int = SIDE) -> np.ndarray:  # -> (h, w, 3)
    """An image, anything that `load_image` takes, with a longer side of at most `side` pixels."""
    small = Image.fromarray(load_image(image, channels=3))
    small.thumbnail((side, side))
    return np.asarray(small)


def thumbnail_of(path: str) -> np.ndarray | None:  # -> (h, w, 3)
    """The thumbnail of an image by its path or address; None for one that cannot be read any more."""
    try:
        return thumbnail(place(path))
    except ImageError:
        return None


def overlay(photo: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:  # -> (h, w, 3)
    """A thumbnail (h, w, 3) under the colours (K, 3) of its classes (H, W); numbers that are no class are white."""
    small = resize_labels(labels, (photo.shape[0], photo.shape[1]))
    known = (small >= 0) & (small < len(colours))
    tint = np.where(known[..., None], colours[np.where(known, small, 0)], IGNORED)
    return tinted(photo, tint)


def as_data(pixels: np.ndarray) -> str:
    """A JPEG as the address of an image within a page."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def as_png(pixels: np.ndarray) -> str:
    """A PNG, which keeps every pixel, as the address of an image within a page."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_seen(pixels: np.ndarray, processor: Any) -> np.ndarray:  # (C, H, W) -> (H, W, 3) uint8
    """A model's pixel values converted back to an image, as `processor` made them."""
    x = pixels.transpose(1, 2, 0).astype(np.float64)
    if processor.do_normalize:
        x = x * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    if not processor.do_rescale:
        x = x / 255
    x = np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)
    return np.repeat(x[..., :1], 3, axis=2) if x.shape[2] < 3 else x[..., :3]


def levels(image: np.ndarray) -> np.ndarray:  # (C, H, W) in 0..1 -> (H, W, 3) uint8
    """An image as bytes, one channel as gray; of more than three channels the first three."""
    x = np.clip(np.rint(image.transpose(1, 2, 0) * 255), 0, 255).astype(np.uint8)
    return np.repeat(x[..., :1], 3, axis=2) if x.shape[2] < 3 else x[..., :3]
