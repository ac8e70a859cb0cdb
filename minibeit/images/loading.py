"""Reads images (paths, PIL images, arrays) as arrays (H, W, C), and label maps as arrays (H, W)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ImageError
from ..foreign import as_numpy
from .opening import is_picture, opened, reading

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"
STRIP_PIXELS = 1 << 20  # pixels converted at a time
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


def flatten_images(images: Any, argument: str, ndim: int) -> list[tuple[str, Any]]:
    """The images in one image, a batch array (`ndim` + 1 axes) or nested lists, each with a name for error messages.

    Raises ImageError if there are none.
    """
    found: list[tuple[str, Any]] = []

    def visit(item: Any, name: str) -> None:
        if isinstance(item, (list, tuple)):
            for index, inner in enumerate(item):
                visit(inner, f"{name}[{index}]")
        elif is_picture(item):
            found.append((name, item))
        else:
            array = _as_array(item, name)
            if ndim == 2 and array.ndim > 2 and array.shape[-1] == 1:
                array = array[..., 0]  # label maps with a channel axis
            if array.ndim == ndim + 1:
                found.extend((f"{name}[{index}]", inner) for index, inner in enumerate(array))
            else:
                found.append((name, array))

    visit(images, argument)
    if not found:
        raise ImageError(f"{argument}: expected at least one image, found none")
    return found


def load_image(
    item: Any,
    name: str = "image",
    channels: int | None = 3,
    apply_exif_orientation: bool = True,
    input_data_format: str | None = None,
    value_range: float | None = None,
) -> np.ndarray:
    """The pixels (H, W, C) of a path, PIL image or array (H, W), (H, W, C) or (C, H, W), converted to `channels`.

    `channels` is 1, 3 or 4, for arrays any number, or None to keep those of the image.  Image files, PIL images and
    uint8 arrays give uint8; other arrays keep their dtype and range.  Transparent images are composited on white, as
    transformers does when it converts; of an animation the first frame is used.  `value_range` is the value of white in
    images and arrays of more than 8 bits, such as 4095 for 12 bits; without it 16-bit images are divided by 257 and
    rounded.  Raises ImageError, naming file or argument, for what cannot be read or converted to that many channels.
    Source: PilBackend.process_image and image_transforms.convert_to_rgb of transformers 5.
    """
    name, item = decoded(item, name, apply_exif_orientation)
    return pixels_of(item, name, channels, input_data_format, value_range)


def decoded(item: Any, name: str, apply_exif_orientation: bool = True, needed: int | None = None) -> tuple[str, Any]:
    """(name for messages, PIL image with its pixels in memory, upright) of a path or PIL image; arrays as they are."""
    return opened(item, name, apply_exif_orientation, needed) if is_picture(item) else (name, item)


def pixels_of(
    item: Any,
    name: str,
    channels: int | None = 3,
    input_data_format: str | None = None,
    value_range: float | None = None,
) -> np.ndarray:
    """What `load_image` returns, of an array or an image that `decoded` has read."""
    if isinstance(item, Image.Image):
        with reading(name):
            if value_range is not None and _is_deep(item):
                item = Image.fromarray(_within_range(np.asarray(item), value_range, name))
            item = _pixels_of(item, channels, name)
        input_data_format = CHANNELS_LAST
    pixels = _channels_last(_checked_numbers(_as_array(item, name), name), channels, input_data_format, name)
    if value_range is not None and pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 1:
        pixels = _within_range(pixels, value_range, name)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)  # as PIL's mode "1" is converted
    return pixels if channels is None else convert_channels(pixels, channels, name)


def load_label_map(item: Any, name: str = "segmentation map", apply_exif_orientation: bool = True) -> np.ndarray:
    """The class ids (H, W), int64, of a path, PIL image (grayscale, 16-bit or palette: its indices) or array (H, W).

    Raises ImageError for anything that is not one whole number per pixel.
    """
    name, item = decoded(item, name, apply_exif_orientation)
    if isinstance(item, Image.Image):
        if item.mode not in _LABEL_MODES:
            raise ImageError(
                f"{name}: a segmentation map holds one class id per pixel, expected a grayscale or palette image, "
                f"found mode {item.mode}"
            )
        item = _pixels_of(item, None, name)
    labels = _checked_numbers(_as_array(item, name), name)
    if labels.ndim != 2:
        raise ImageError(f"{name}: expected a segmentation map of shape (H, W), found {labels.shape}")
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.trunc(labels)):
        raise ImageError(f"{name}: expected whole class ids, found fractions")
    return labels.astype(np.int64)


def as_bytes(image: Any, channels: int | None, name: str) -> Image.Image | None:
    """A PIL image in `channels` (1 or 3) of bytes, converted in strips if need be, or gray for three equal channels.

    None for arrays, images of more than 8 bits, and other numbers of channels.
    """
    if not isinstance(image, Image.Image) or channels not in (1, 3) or _is_deep(image):
        return None
    if image.mode in ("L", MODES[channels]) and image.info.get("transparency") is None:
        return image
    with reading(name):
        strips = _strips(image)
        _, first = next(strips)
        first = _convert_picture(first, channels, name)
        if first.size == image.size:
            return first
        whole = Image.new(first.mode, image.size)
        whole.paste(first, (0, 0))
        for top, strip in strips:
            whole.paste(_convert_picture(strip, channels, name), (0, top))
        return whole


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _pixels_of(image: Image.Image, channels: int | None, name: str) -> np.ndarray:  # -> (H, W) or (H, W, C)
    """The pixels of an image in that many channels (None: unchanged), converted in strips of rows.

    A conversion needs up to twenty bytes per pixel beside the image and the result; in strips, next to nothing.
    """
    to_bytes = _byte_conversion(image, name) if _is_deep(image) and channels is not None else None
    pixels = np.empty(0)
    for top, strip in _strips(image):
        if to_bytes is not None:
            strip = Image.fromarray(to_bytes(np.asarray(strip)))
        part = np.asarray(strip if channels is None else _convert_picture(strip, channels, name))
        if len(part) == image.height:
            return part
        if top == 0:
            pixels = np.empty((image.height, *part.shape[1:]), part.dtype)
        pixels[top : top + len(part)] = part
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, strip of rows) from the top to the bottom; a small image whole."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _convert_picture(image: Image.Image, channels: int, name: str) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied alpha, for which PIL has no other conversion
        image = image.convert(image.mode.upper())
    transparent = image.getbands()[-1] == "A" or image.info.get("transparency") is not None
    if transparent and channels < 4:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    if channels not in MODES:
        raise ImageError(f"{name}: an image has 1, 3 or 4 channels, expected {channels}; give an array of that many")
    return image.convert(MODES[channels])


def _within_range(values: np.ndarray, white: float, name: str) -> np.ndarray:
    """Values 0 to `white`, scaled to bytes.  Raises ImageError for other values."""
    values = _checked_numbers(values, name)
    if values.min() < 0 or values.max() > white:
        raise ImageError(f"{name}: expected values within 0..{white:g}, found {values.min()}..{values.max()}")
    return np.rint(values * (255 / white)).astype(np.uint8)


def _byte_conversion(image: Image.Image, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The conversion of values of more than 8 bits to bytes, chosen by the extremes of the whole image."""
    low, high = _extremes(image, name)
    if image.mode == "F":
        if low < 0 or high > 255:
            raise ImageError(f"{name}: expected floats within 0..1 or 0..255, found {low:g}..{high:g}")
        return lambda values: np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ImageError(f"{name}: expected 16-bit pixels, found values {low}..{high}")
    # Mode "I" is 32 bits wide and does not say how many are used; older versions of Pillow use it for 16-bit PNGs.
    if image.mode == "I" and image.format != "PNG" and high <= 255:
        return lambda values: values.astype(np.uint8)
    if high <= 4095:
        white = 1023 if high <= 1023 else 4095
        warnings.warn(
            f"{name}: a 16-bit image whose largest value is {high} of 65535 comes out nearly black; if white is "
            f"{white} in it, pass value_range={white}",
            stacklevel=2,
        )
    return lambda values: ((values.astype(np.int64) + 128) // 257).astype(np.uint8)


def _extremes(image: Image.Image, name: str) -> tuple[Any, Any]:
    lows, highs = [], []
    for _, strip in _strips(image):
        values = _checked_numbers(np.asarray(strip), name)
        lows.append(values.min())
        highs.append(values.max())
    return min(lows), max(highs)


def _as_array(item: Any, name: str) -> np.ndarray:
    if not (hasattr(item, "__array__") or hasattr(item, "__dlpack__")):
        kinds = "a path, a file, its bytes, a PIL image or an array"
        raise TypeError(f"{name}: expected {kinds}, found {type(item).__name__}")
    try:
        return as_numpy(item)
    except Exception as error:  # from an array library that is not known here
        raise TypeError(f"{name}: {type(item).__name__} cannot become a NumPy array ({error})") from error


def _checked_numbers(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "buif":
        raise ImageError(f"{name}: expected numbers (integers or floats), found dtype {array.dtype}")
    if array.size == 0:
        raise ImageError(f"{name}: expected at least one pixel, found an array of shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ImageError(f"{name}: expected finite pixels, found NaN or infinity")
    return array


def _channels_last(array: np.ndarray, channels: int | None, data_format: str | None, name: str) -> np.ndarray:
    if data_format not in (None, CHANNELS_FIRST, CHANNELS_LAST):
        raise ValueError(f"input_data_format: expected {CHANNELS_FIRST!r} or {CHANNELS_LAST!r}, found {data_format!r}")
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ImageError(
            f"{name}: expected shape (H, W), (H, W, C) or (C, H, W), or a batch of such images, found {array.shape}"
        )
    if data_format is not None:
        axis = 0 if data_format == CHANNELS_FIRST else 2
    else:
        axis = _channel_axis(array.shape, channels, name)
    return np.moveaxis(array, axis, -1)


def _channel_axis(shape: tuple[int, ...], channels: int | None, name: str) -> int:
    candidates = [axis for axis in (0, 2) if shape[axis] in MODES or shape[axis] == channels]
    if not candidates:
        wanted = "1, 3 or 4" if channels in (None, *MODES) else f"1, 3, 4 or {channels}"
        raise ImageError(f"{name}: expected {wanted} channels as first or last axis, found shape {shape}")
    if len(candidates) == 2:
        candidates = [axis for axis in candidates if shape[axis] == channels] or candidates
    if len(candidates) == 2:
        warnings.warn(
            f"{name}: shape {shape} may have its channels first or last; taken as first, or as input_data_format= says",
            stacklevel=2,
        )
    return candidates[0]


def convert_channels(pixels: np.ndarray, channels: int, name: str) -> np.ndarray:  # (H, W, C) -> (H, W, channels)
    """Gray repeated, RGBA composited on white, colours to gray.  Raises ImageError where that cannot be."""
    found = pixels.shape[-1]
    if found == channels:
        return pixels
    if found not in MODES or channels not in (1, 3):
        wanted = str(channels) if channels not in (1, 3) else "1, 3 or 4"
        raise ImageError(f"{name}: expected {wanted} channels, found {found}")
    if found == 1:
        return np.repeat(pixels, channels, axis=-1)
    rgb = _on_white(pixels, name) if found == 4 else pixels
    return rgb if channels == 3 else _luma(rgb)


def _on_white(pixels: np.ndarray, name: str) -> np.ndarray:
    integers = pixels.dtype.kind in "iu"
    white = 255 if integers else 1.0
    if pixels.min() < 0 or pixels.max() > white:
        raise ImageError(f"{name}: expected RGBA values within 0..{white:g}, found {pixels.min()}..{pixels.max()}")
    alpha = pixels[..., 3:] / white
    mixed = alpha * pixels[..., :3] + (1 - alpha) * white
    return (np.round(mixed) if integers else mixed).astype(pixels.dtype)


def _luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma (H, W, 1); for integers in 16-bit fixed point, bit for bit equal to PIL's conversion to "L"."""
    if rgb.dtype.kind in "iu":
        weighted = rgb.astype(np.int64) @ np.array([19595, 38470, 7471])
        return ((weighted + (1 << 15)) >> 16).astype(rgb.dtype)[..., None]
    return (rgb @ np.array([0.299, 0.587, 0.114], dtype=rgb.dtype))[..., None]
