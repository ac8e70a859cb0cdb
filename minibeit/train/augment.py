"""Random changes of one training image, as timm's `create_transform` makes them for BEiT, on Pillow and NumPy.

Every function draws from the generator it is given, so that a sample is changed in the same way whoever reads it.
Source: timm data/transforms.py, auto_augment.py and random_erasing.py; Cubuk et al. 2020; Zhong et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from .recipes import Recipe

Random = np.random.Generator
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
RATIO = (3 / 4, 4 / 3)  # of width to height of a random crop
TRIES = 10
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


def augmented(picture: Image.Image, shape: tuple[int, int], recipe: Recipe, rng: Random) -> Image.Image:
    """An image (RGB or gray) cropped and resized to `shape` (height, width), then changed as the recipe says."""
    if recipe.crop is None:
        picture = picture.resize(shape[::-1], BICUBIC)
    else:
        picture = picture.resize(shape[::-1], BICUBIC, box=crop_box(picture.size, recipe.crop, rng))
    if rng.random() < recipe.flip:
        picture = ImageOps.mirror(picture)
    if recipe.moves is not None:
        picture = moved(picture, recipe.moves, rng)
    if recipe.rand_augment is not None:
        return rand_augment(picture, recipe.rand_augment, rng)
    return color_jitter(picture, recipe.color, rng) if recipe.color else picture


def random_view(
    image: Image.Image, recipe: Recipe, rng: Random
) -> tuple[Image.Image, tuple[int, int, int, int] | None]:
    """An image with its colours changed and perhaps mirrored, and the box to crop from it (None: all of it): what
    pre-training and tokenizers see, at whatever sizes."""
    if recipe.color:
        image = color_jitter(image, recipe.color, rng)
    if rng.random() < recipe.flip:
        image = ImageOps.mirror(image)
    return image, None if recipe.crop is None else crop_box(image.size, recipe.crop, rng)


def crop_box(
    size: tuple[int, int], area: tuple[float, float], rng: Random
) -> tuple[int, int, int, int]:  # (width, height) -> (left, top, right, bottom)
    """A rectangle with a share of the picture's area in `area` and a ratio of sides in RATIO, drawn evenly in its log.

    After ten that do not fit, the largest one in the centre whose ratio is allowed.
    """
    width, height = size
    for _ in range(TRIES):
        target = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def moved(picture: Image.Image, most: tuple[float, float, float], rng: Random) -> Image.Image:
    """Turned by up to `most[0]` degrees, scaled by up to a part `most[1]`, shifted by up to a part `most[2]`; black
    comes in from outside."""
    width, height = picture.size
    angle, scale = math.radians(rng.uniform(-most[0], most[0])), 1 + rng.uniform(-most[1], most[1])
    dx, dy = rng.uniform(-most[2], most[2]) * width, rng.uniform(-most[2], most[2]) * height
    cos, sin, cx, cy = math.cos(angle) * scale, math.sin(angle) * scale, width / 2, height / 2
    matrix = (cos, -sin, cx - cos * cx + sin * cy + dx, sin, cos, cy - sin * cx - cos * cy + dy)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, BILINEAR)


def color_jitter(picture: Image.Image, strength: float, rng: Random) -> Image.Image:
    """Brightness, contrast and saturation, in random order, times factors of 1 - strength to 1 + strength."""
    enhancers: list[Callable[[Image.Image], ImageEnhance._Enhance]] = [
        ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    ]  # fmt: skip
    for i in rng.permutation(3):
        picture = enhancers[i](picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return picture


# RandAugment: operations on an image with a magnitude from 0 to 10 ---------------------------------------------------


def _signed(value: float, rng: Random) -> float:
    return -value if rng.random() < 0.5 else value


def _affine(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    gray = tuple(128 for _ in picture.getbands())
    fill = gray if len(gray) > 1 else gray[0]
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=fill)


def _rotate(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    gray = tuple(128 for _ in picture.getbands())
    return picture.rotate(_signed(3 * m, rng), BICUBIC, fillcolor=gray if len(gray) > 1 else gray[0])


def _posterize(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    return ImageOps.posterize(picture, max(1, 4 - int(m / 10 * 4)))  # 0 bits, timm's strongest, Pillow refuses


def _solarize(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(m / 10 * 256))


def _solarize_add(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    added = int(m / 10 * 110)
    return picture.point([min(255, i + added) if i < 128 else i for i in range(256)] * len(picture.getbands()))


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
    return lambda picture, m, rng: kind(picture).enhance(max(0.1, 1 + _signed(m / 10 * 0.9, rng)))


def _shear_x(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    return _affine(picture, (1, _signed(0.03 * m, rng), 0, 0, 1, 0))


def _shear_y(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    return _affine(picture, (1, 0, 0, _signed(0.03 * m, rng), 1, 0))


def _translate_x(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    return _affine(picture, (1, 0, _signed(0.045 * m, rng) * picture.width, 0, 1, 0))


def _translate_y(picture: Image.Image, m: float, rng: Random) -> Image.Image:
    return _affine(picture, (1, 0, 0, 0, 1, _signed(0.045 * m, rng) * picture.height))


# timm's "increasing" operations: a larger magnitude changes more.
OPERATIONS: dict[str, Callable[[Image.Image, float, Random], Image.Image]] = {
    "autocontrast": lambda picture, m, rng: ImageOps.autocontrast(picture),
    "equalize": lambda picture, m, rng: ImageOps.equalize(picture),
    "invert": lambda picture, m, rng: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


def rand_augment(picture: Image.Image, settings: tuple[int, float, float], rng: Random) -> Image.Image:
    """Some operations drawn with repetition, each done with probability 1/2 at a magnitude from a normal distribution.

    `settings` (2, 9, 0.5) is timm's "rand-m9-mstd0.5-inc1".
    """
    count, magnitude, deviation = settings
    names = list(OPERATIONS)
    for i in rng.integers(len(names), size=count):
        if rng.random() < 0.5:
            m = min(10.0, max(0.0, rng.normal(magnitude, deviation)))
            picture = OPERATIONS[names[i]](picture, m, rng)
    return picture


# Normalised pixels ----------------------------------------------------------------------------------------------------


def erase(pixels: np.ndarray, probability: float, rng: Random) -> np.ndarray:  # (C, h, w) -> the same, in place
    """With `probability` a rectangle of 2% to a third of the image is filled with normal noise, pixel by pixel."""
    if rng.random() >= probability:
        return pixels
    C, height, width = pixels.shape
    for _ in range(TRIES):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            pixels[:, top : top + h, left : left + w] = rng.standard_normal((C, h, w), dtype=np.float32)
            break
    return pixels


def mixed(
    pixels: np.ndarray, targets: np.ndarray, recipe: Recipe, rng: Random
) -> tuple[np.ndarray, np.ndarray]:  # (B, C, h, w), (B, K) -> the same
    """Mixup or cutmix, each half of the time if the recipe has both: sample i is mixed with sample B - 1 - i.

    Mixup takes lambda of every pixel and 1 - lambda of the other's, lambda ~ Beta(alpha, alpha); cutmix pastes a
    rectangle of 1 - lambda of the area.  Targets are mixed in the same share.  New arrays.
    Source: Zhang et al. 2018, Yun et al. 2019; Mixup in timm data/mixup.py, mode "batch".
    """
    cut = recipe.cutmix > 0 and (recipe.mixup == 0 or rng.random() < 0.5)
    alpha = recipe.cutmix if cut else recipe.mixup
    share = float(rng.beta(alpha, alpha))
    if cut:
        height, width = pixels.shape[2:]
        h, w = (int(side * math.sqrt(1 - share)) for side in (height, width))
        y, x = int(rng.integers(height)), int(rng.integers(width))
        rows = slice(max(y - h // 2, 0), min(y + h // 2, height))
        columns = slice(max(x - w // 2, 0), min(x + w // 2, width))
        made = pixels.copy()
        made[:, :, rows, columns] = pixels[::-1, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        made = pixels * np.float32(share) + pixels[::-1] * np.float32(1 - share)
    return made, targets * np.float32(share) + targets[::-1] * np.float32(1 - share)


def smoothed(labels: np.ndarray, classes: int, smoothing: float) -> np.ndarray:  # (B,) -> (B, K)
    """Targets of 1 - s + s / K for the label and s / K for every other class."""
    targets = np.full((len(labels), classes), smoothing / classes, np.float32)
    targets[np.arange(len(labels)), labels] += np.float32(1 - smoothing)
    return targets
