"""Random changes of an image and its label map together, as mmseg makes them for BEiT, on Pillow and NumPy.

Every function draws from the generator it is given, so that a sample is changed in the same way whoever reads it.
Source: mmseg 0.11 datasets/pipelines/transforms.py, Resize, RandomCrop, RandomFlip and PhotoMetricDistortion.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from ..images.transforms import IGNORED_LABEL, resize_labels
from .segmentation_recipes import SegmentationRecipe

Random = np.random.Generator
TRIES = 10
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 36  # levels of 255, factors, factors, degrees


def augmented(
    image: Image.Image, labels: np.ndarray, shape: tuple[int, int], recipe: SegmentationRecipe, rng: Random
) -> tuple[np.ndarray, np.ndarray]:  # (H, W) -> (h, w) or (h, w, C), (h, w)
    """An image (RGB or gray) and its labels resized, cropped to at most `shape`, flipped and distorted."""
    size = scaled_size(image.size, recipe, rng)
    labels = resize_labels(labels, size[::-1])
    top, left, bottom, right = crop_of(labels, shape, recipe.most_of_one_class, rng)
    labels = labels[top:bottom, left:right]
    image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, right, bottom))
    if rng.random() < recipe.flip:
        image, labels = ImageOps.mirror(image), labels[:, ::-1]
    pixels = np.asarray(image)
    return distorted(pixels, rng) if recipe.distortion else pixels, np.ascontiguousarray(labels)


def scaled_size(
    size: tuple[int, int], recipe: SegmentationRecipe, rng: Random
) -> tuple[int, int]:  # (width, height) -> (width, height)
    """A size with the same proportions: the largest whose longer and shorter side are at most those of
    `recipe.scale`, times a factor drawn from `recipe.ratio`."""
    factor = rng.uniform(*recipe.ratio)
    scale = min(int(max(recipe.scale) * factor) / max(size), int(min(recipe.scale) * factor) / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def crop_of(
    labels: np.ndarray, shape: tuple[int, int], most: float, rng: Random
) -> tuple[int, int, int, int]:  # (H, W) -> (top, left, bottom, right)
    """A rectangle of `shape`, or less where the map is smaller.

    Ten are tried for one with two classes of which none has a share of `most` or more, ignored pixels not counted.
    """
    heights, widths = (max(have - want, 0) for have, want in zip(labels.shape, shape))
    box = (0, 0, 0, 0)
    for _ in range(TRIES + 1):
        top, left = int(rng.integers(heights + 1)), int(rng.integers(widths + 1))
        box = (top, left, min(top + shape[0], labels.shape[0]), min(left + shape[1], labels.shape[1]))
        counts = np.bincount(labels[top : box[2], left : box[3]].ravel(), minlength=256)[:IGNORED_LABEL]
        if most >= 1 or ((counts > 0).sum() > 1 and counts.max() < most * counts.sum()):
            break
    return box


def padded(array: np.ndarray, shape: tuple[int, int], value: float) -> np.ndarray:  # (..., h, w) -> (..., *shape)
    """The array with rows below and columns on the right of `value`."""
    rows, columns = (want - have for want, have in zip(shape, array.shape[-2:]))
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, rows), (0, columns)], constant_values=value)


# Colours --------------------------------------------------------------------------------------------------------------


def distorted(pixels: np.ndarray, rng: Random) -> np.ndarray:  # (h, w, 3) or (h, w) uint8 -> the same
    """Brightness, contrast, saturation and hue changed, each half of the time; contrast before or after the colours.

    Gray images have neither saturation nor hue.
    """
    if rng.random() < 0.5:
        pixels = _changed(pixels, 1.0, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    early = rng.random() < 0.5
    if early and rng.random() < 0.5:
        pixels = _changed(pixels, rng.uniform(*CONTRAST), 0.0)
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        pixels = _recoloured(pixels, rng)
    if not early and rng.random() < 0.5:
        pixels = _changed(pixels, rng.uniform(*CONTRAST), 0.0)
    return pixels


def _recoloured(pixels: np.ndarray, rng: Random) -> np.ndarray:
    saturation = rng.uniform(*SATURATION) if rng.random() < 0.5 else 1.0
    turn = rng.uniform(-HUE, HUE) if rng.random() < 0.5 else 0.0
    if saturation == 1.0 and turn == 0.0:
        return pixels
    hue, strength, value = map(np.asarray, Image.fromarray(pixels).convert("HSV").split())
    hue = hue + np.uint8(round(turn * 256 / 360) % 256)  # a circle of 256 steps, as the type
    bands = hue, _changed(strength, saturation, 0.0), value
    return np.asarray(Image.merge("HSV", [Image.fromarray(band) for band in bands]).convert("RGB"))


def _changed(levels: np.ndarray, factor: float, added: float) -> np.ndarray:
    """levels * factor + added, within 0 to 255, rounded down as mmseg does."""
    return np.clip(levels.astype(np.float32) * np.float32(factor) + np.float32(added), 0, 255).astype(np.uint8)
