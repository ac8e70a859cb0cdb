"""The steps of the image processor on plain arrays: images (H, W, C) and label maps (H, W)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import ImageError
from .opening import most_pixels

IGNORED_LABEL = 255  # of label maps: a class that losses leave out, as configs of the Hub have it
LARGEST_RESULT = 1 << 26  # pixels of a resized or cropped image: 8192 x 8192, 800 MB as float32 with three channels


def resize(pixels: np.ndarray, size: dict[str, int], resample: int, name: str = "image") -> np.ndarray:
    """Pixels (H, W, C) resized by Pillow, with antialiasing when shrinking; `size` as in `BeitImageProcessor`.

    Pillow works on bytes: whole numbers 0..255 are returned as uint8; other floats must lie in 0..1, are quantised to
    256 levels and returned as float32 in 0..1.  Raises ImageError for other values.
    Source: image_transforms.resize of transformers 5, bit for bit equal.
    """
    height, width = _checked_shape(pixels.shape[:2], size, name)
    levels, in_unit_range = _to_bytes(pixels, name)
    parts = [levels] if levels.shape[-1] in (3, 4) else np.split(levels, levels.shape[-1], axis=-1)
    pictures = [Image.fromarray(part[..., 0] if part.shape[-1] == 1 else part) for part in parts]
    arrays = [np.asarray(picture.resize((width, height), Image.Resampling(resample))) for picture in pictures]
    resized = arrays[0] if arrays[0].ndim == 3 else np.stack(arrays, axis=-1)
    return _multiplied(resized, 1 / 255) if in_unit_range else resized


def resize_image(image: Image.Image, size: dict[str, int], resample: int, name: str = "image") -> np.ndarray:
    """`resize` of the pixels of a PIL image of bytes, without a copy of them: (height, width, C)."""
    height, width = _checked_shape((image.height, image.width), size, name)
    resized = np.asarray(image.resize((width, height), Image.Resampling(resample)))
    return resized if resized.ndim == 3 else resized[..., None]


def _checked_shape(shape: tuple[int, ...], size: dict[str, int], name: str) -> tuple[int, int]:
    """`resized_shape`.  Raises ImageError if the resizing itself would take too many pixels."""
    height, width = resized_shape(shape, size, name)
    if shape[0] * width > most_pixels():  # Pillow resizes the width first: this is its intermediate result
        raise ImageError(
            f"{name}: expected a less elongated image, found {shape[0]} x {shape[1]}; "
            f"resizing it to {height} x {width} takes more than {most_pixels()} pixels on the way"
        )
    return height, width


def resized_shape(shape: tuple[int, ...], size: dict[str, int], name: str = "image") -> tuple[int, int]:
    """The (height, width) that `size` asks for, given the (H, W) of an image; fractions are rounded down.

    shortest_edge s: the shorter edge becomes s.  With longest_edge l, s is reduced until the longer edge fits l.
    max_height, max_width: the largest image that fits (small ones are enlarged).
    Raises ImageError for more than LARGEST_RESULT pixels, or more than Pillow opens.
    """
    height, width = _proportional_shape(shape, size)
    limit = min(LARGEST_RESULT, 2 * (Image.MAX_IMAGE_PIXELS or LARGEST_RESULT))
    if height * width > limit:
        raise ImageError(f"{name}: resizing by {size} gives {height} x {width}, more than {limit} pixels")
    return height, width


def _proportional_shape(shape: tuple[int, ...], size: dict[str, int]) -> tuple[int, int]:
    height, width = shape
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    short, long = min(height, width), max(height, width)
    new_short = size["shortest_edge"]
    exact: float = new_short  # transformers computes the longer edge from the unrounded shorter one
    if "longest_edge" in size and long / short * new_short > size["longest_edge"]:
        exact = size["longest_edge"] * short / long
        new_short = max(1, round(exact))
    if short == new_short and "longest_edge" in size:
        return height, width
    new_long = max(1, int(exact * long / short))
    return (new_long, new_short) if width <= height else (new_short, new_long)


def center_crop(array: np.ndarray, size: dict[str, int], fill: int = 0) -> np.ndarray:
    """The central `size` of an array (H, W, ...), padded with `fill` if that is smaller.

    Offsets are (H - height) // 2, rounded towards the upper left even if negative, as in transformers.
    """
    shape = (size["height"], size["width"])
    offsets = [(have - want) // 2 for have, want in zip(array.shape, shape)]
    source = tuple(slice(max(o, 0), max(o, 0) + want) for o, want in zip(offsets, shape))
    inner = array[source]
    if inner.shape[:2] == shape:
        return inner
    cropped = np.full_like(array, fill, shape=shape + array.shape[2:])
    cropped[tuple(slice(max(-o, 0), max(-o, 0) + have) for o, have in zip(offsets, inner.shape))] = inner
    return cropped


def to_pixel_values(
    pixels: np.ndarray, factor: float | None, mean: list[float] | None, std: list[float] | None
) -> np.ndarray:
    """(x * factor - mean) / std of pixels (H, W, C) as float32 (C, H, W); None skips a step.

    The product is computed in float64 and rounded to float32, the rest in float32: bit for bit equal to transformers.
    """
    if pixels.dtype != np.uint8:
        return np.ascontiguousarray(np.moveaxis(_scaled(pixels, factor, mean, std), -1, 0), dtype=np.float32)
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], pixels.shape[-1], axis=1)
    table = _scaled(levels, factor, mean, std).astype(np.float32)  # bytes have 256 values: use a look-up table
    values = np.empty((pixels.shape[-1], *pixels.shape[:-1]), np.float32)
    for channel, plane in enumerate(values):
        np.take(table[:, channel], pixels[..., channel], out=plane, mode="clip")  # "raise" would buffer the output
    return values


def reduce_labels(labels: np.ndarray) -> np.ndarray:
    """Class 0 (background) becomes 255, every other class k becomes k - 1, and 255 stays; a new array."""
    return np.where((labels == 0) | (labels == IGNORED_LABEL), IGNORED_LABEL, labels - 1)


def resize_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) resized to `shape` by nearest neighbour: row i reads row floor((i + 1/2) H / height)."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(labels.shape, shape))
    return labels[rows[:, None], columns]


def _to_bytes(pixels: np.ndarray, name: str) -> tuple[np.ndarray, bool]:
    if pixels.dtype == np.uint8:
        return pixels, False
    low, high = pixels.min(), pixels.max()
    whole = pixels.dtype.kind in "iu" or np.allclose(pixels, np.trunc(pixels))
    if low < 0 or high > (255 if whole else 1):
        raise ImageError(
            f"{name}: expected {'whole numbers within 0..255' if whole else 'floats within 0..1'} ({pixels.dtype}), "
            f"found {low:g}..{high:g}; rescale the array first"
        )
    if whole:
        return pixels.astype(np.uint8), False
    return _multiplied(pixels, 255).astype(np.uint8), True


def _multiplied(pixels: np.ndarray, factor: float) -> np.ndarray:
    return (pixels.astype(np.float64) * factor).astype(np.float32)


def _scaled(pixels: np.ndarray, factor: float | None, mean: list[float] | None, std: list[float] | None) -> np.ndarray:
    if factor is not None:
        pixels = _multiplied(pixels, factor)
    if mean is None or std is None:
        return pixels
    if pixels.dtype.kind != "f":
        pixels = pixels.astype(np.float32)
    return (pixels - np.array(mean, pixels.dtype)) / np.array(std, pixels.dtype)
