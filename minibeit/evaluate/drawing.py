"""Small images for reports."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from ..drawing import tinted
from ..images.loading import load_image
from ..images.transforms import resize_labels

SIDE = 320  # pixels of the longer side of an image in a report
IGNORED = (255, 255, 255)


def thumbnail(image: Any, side: int = SIDE) -> np.ndarray:  # -> (h, w, 3)
    """An image, anything that `load_image` takes, with a longer side of at most `side` pixels."""
    small = Image.fromarray(load_image(image, channels=3))
    small.thumbnail((side, side))
    return np.asarray(small)


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
