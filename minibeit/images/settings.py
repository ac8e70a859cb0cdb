"""The settings of the image processor, checked on construction."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..strict_json import brief
from .transforms import LARGEST_RESULT

LARGEST_EDGE = 1 << 16  # pixels
MOST_CHANNELS = 1 << 12
DRAFT = 2  # times as many pixels as are asked for, so that the filter of the resizing still has its say
LARGEST_NUMBER = 1e6  # limit for factor, mean and standard deviation; the largest in use are 255

_SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)


@dataclass(frozen=True)
class ImageSettings:
    """The settings of a `BeitImageProcessor`, in the order of its steps; see there.  Checked on construction."""

    do_reduce_labels: bool = False
    apply_exif_orientation: bool = True
    do_convert_rgb: bool = True
    do_resize: bool = True
    size: Any = 224
    resample: int = Image.Resampling.BICUBIC
    do_center_crop: bool = False
    crop_size: Any = 224
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Any = (0.5, 0.5, 0.5)
    image_std: Any = (0.5, 0.5, 0.5)
    compat: str | None = None
    value_range: float | None = None
    draft: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, (bool, np.bool_)):
                raise ValueError(f"{field.name}: expected true or false, found {brief(value)}")
        if self.compat not in (None, "transformers"):
            raise ValueError(f"compat: expected None or 'transformers', found {brief(self.compat)}")
        self._set("size", size_dict(self.size, "size"))
        self._set("crop_size", size_dict(self.crop_size, "crop_size"))
        if set(self.crop_size) != _SIZE_KEYS[0]:
            raise ValueError(f"crop_size: expected the keys height and width, found {_listed(self.crop_size)}")
        self._set("resample", _resample(self.resample))
        self._set("rescale_factor", _number(self.rescale_factor, "rescale_factor"))
        self._set("image_mean", _per_channel(self.image_mean, "image_mean"))
        self._set("image_std", _per_channel(self.image_std, "image_std"))
        if np.any(np.asarray(self.image_std) <= 0):
            raise ValueError(f"image_std: expected numbers above 0, found {self.image_std}")
        if np.any(np.asarray(self.image_std) < 1 / LARGEST_NUMBER):
            raise ValueError(f"image_std: expected numbers of at least {1 / LARGEST_NUMBER:g}, found {self.image_std}")
        lengths = {len(v) for v in (self.image_mean, self.image_std) if isinstance(v, list)}
        if len(lengths) == 2:
            raise ValueError(
                "image_mean and image_std: expected one number per channel in each, "
                f"found {len(self.image_mean)} and {len(self.image_std)} numbers"
            )
        if 0 in lengths:
            raise ValueError("image_mean and image_std: expected at least one number, found none")
        if self.value_range is not None and not _number(self.value_range, "value_range") > 0:
            raise ValueError(f"value_range: expected a number above 0, found {self.value_range}")

    @property
    def channels(self) -> int | None:
        """C of the model, from the lengths of mean and standard deviation; None if both are single numbers."""
        lengths = [len(v) for v in (self.image_mean, self.image_std) if isinstance(v, list)]
        return lengths[0] if lengths else None

    @property
    def needed(self) -> int | None:
        """With `draft` how many pixels height and width of a decoded image need at least; None for all that it has."""
        return DRAFT * max(self.size.values()) if self.draft and self.do_resize else None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen, except for its own checks


SETTINGS = tuple(field.name for field in dataclasses.fields(ImageSettings))


def size_dict(value: Any, name: str) -> dict[str, int]:
    """`size` as a checked dictionary: an int means a square, a pair (height, width)."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif not hasattr(value, "keys"):
        value = {"height": value, "width": value}
    sizes = {str(k): v for k, v in dict(value).items() if v is not None}
    if set(sizes) not in _SIZE_KEYS:
        allowed = "; ".join(" and ".join(sorted(keys)) for keys in _SIZE_KEYS)
        raise ValueError(f"{name}: expected the keys {allowed}; found {_listed(sizes)}")
    for key, number in sizes.items():
        try:
            sizes[key] = operator.index(number)
        except TypeError:
            sizes[key] = 0
        if sizes[key] < 1 or isinstance(number, bool):
            raise ValueError(f"{name}: expected whole numbers of pixels, at least 1, found {key} {brief(number)}")
        if sizes[key] > LARGEST_EDGE:
            raise ValueError(f"{name}: expected at most {LARGEST_EDGE} pixels, found {key} {brief(number)}")
    area = _least_area(sizes)
    if area > LARGEST_RESULT:
        raise ValueError(f"{name}: expected at most {LARGEST_RESULT} pixels in all, found {sizes}, which gives {area}")
    return sizes


def _least_area(sizes: dict[str, int]) -> int:
    """The least area that `sizes` can give; that of an actual image may be more and is checked when it is resized."""
    if "height" in sizes:
        return sizes["height"] * sizes["width"]
    return sizes["shortest_edge"] ** 2 if "shortest_edge" in sizes and "longest_edge" not in sizes else 0


def _listed(keys: Any) -> str:
    """The first few keys of an untrusted dictionary."""
    shown = [key if key.isidentifier() and len(key) < 40 else brief(key) for key in list(keys)[:6]]
    return ", ".join(shown + ["..."] * (len(keys) > 6)) or "none"


def _resample(value: Any) -> int:
    try:
        return int(Image.Resampling(value))
    except ValueError:
        known = ", ".join(f"{filter.value} {filter.name.lower()}" for filter in Image.Resampling)
        raise ValueError(
            f"resample: expected the number of one of Pillow's filters ({known}), found {brief(value)}"
        ) from None


def _number(value: Any, name: str) -> float:
    if isinstance(value, (bool, str)) or not np.isscalar(value) or not np.isreal(value) or not np.isfinite(value):
        raise ValueError(f"{name}: expected a number, found {brief(value)}")
    number = float(value)  # type: ignore[arg-type]
    if not -LARGEST_NUMBER <= number <= LARGEST_NUMBER:
        raise ValueError(f"{name}: expected a number within {LARGEST_NUMBER:g} of 0, found {brief(value)}")
    return number


def _per_channel(value: Any, name: str) -> float | list[float]:
    if isinstance(value, (list, tuple, np.ndarray)):
        if len(value) > MOST_CHANNELS:
            raise ValueError(f"{name}: expected at most {MOST_CHANNELS} numbers, one per channel, found {len(value)}")
        return [_number(v, name) for v in value]
    return _number(value, name)
