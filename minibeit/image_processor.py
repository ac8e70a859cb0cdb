"""Converts images to `pixel_values` (B, C, H, W), label maps to `labels`, and segmentation logits to label maps."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .config import BeitConfig
from .errors import CheckpointError, ImageError, unknown_keywords
from .file_names import PROCESSOR_NAME
from .files import atomic_write
from .foreign import as_numpy, as_torch, is_torch
from .hub import resolve_settings
from .images.loading import as_bytes, convert_channels, decoded, flatten_images, load_label_map, pixels_of
from .images.settings import SETTINGS, ImageSettings
from .images.transforms import (
    IGNORED_LABEL,
    center_crop,
    reduce_labels,
    resize,
    resize_image,
    resize_labels,
    resized_shape,
    to_pixel_values,
)
from .images.types import defaults_of_type, width_first
from .outputs import described
from .signatures import show_fields
from .strict_json import brief, read_json

_RENAMED = {"reduce_labels": "do_reduce_labels"}  # old name -> name
_TYPE_KEYS = ("image_processor_type", "feature_extractor_type")


class BatchFeature(dict[str, Any]):
    """A dictionary whose entries are also attributes: `batch["pixel_values"]` is `batch.pixel_values`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has {', '.join(self)}, but no {name!r}") from None

    def to(self, *_: Any, **__: Any) -> BatchFeature:
        """The batch itself: a model takes arrays to the device it is on."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={described(value)}' for name, value in self.items())})"


class SemanticSegmentationPostProcessorOutput(BatchFeature):
    """One image's class ids, `segmentation` (H, W), and resized logits, `segmentation_scores` (K, H, W)."""


class BeitImageProcessor:
    """Converts images to the `pixel_values` of a BEiT, as set in `preprocessor_config.json`.

    Each image is rotated upright (`apply_exif_orientation`) and converted to the channels of `image_mean`
    (`do_convert_rgb`: three by default; transparent images are composited on white), then resized with Pillow to
    `size`, cropped around the centre to `crop_size` (padded with zeros if the image is smaller), multiplied by
    `rescale_factor` and normalised: (x - image_mean) / image_std.  For RGB images every value equals that of
    BeitImageProcessorPil of transformers 5 with the same Pillow (for some shapes the results of Pillow 13 and 12 differ
    by a few levels of 255).

    `size` is an int (square), a (height, width) pair, or a dictionary with height and width, or shortest_edge (and
    longest_edge), or max_height and max_width, which keep the proportions; `crop_size` has height and width.
    `resample` is Pillow's number of a filter (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming).
    `value_range` is the value of white in images and integer arrays of more than 8 bits: 4095 for 12 bits stored in
    16; the default for a 16-bit image is 65535.
    `draft` decodes JPEG files at a half, a quarter or an eighth of their height and width where that still is twice
    `size` or more: a photograph of 12 megapixels takes a third of the time, and pixels differ a little from those of
    transformers.  It is for what is resized; segmentation maps and PIL images are not affected.
    `do_reduce_labels` turns class 0 of label maps into 255, which losses ignore, and every other class k into k - 1.

    Label maps are resized by nearest neighbour and padded with 255.  `compat="transformers"` resizes them with the
    images' filter, which produces wrong class ids at borders, and pads with 0, as transformers does.
    Raises ValueError, naming the argument, for invalid settings.
    Source: BeitImageProcessorPil of transformers 5; Bao et al. 2021, appendix for the 0.5 means.
    """

    do_reduce_labels: bool
    apply_exif_orientation: bool
    do_convert_rgb: bool
    do_resize: bool
    size: dict[str, int]
    resample: int
    do_center_crop: bool
    crop_size: dict[str, int]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | list[float]
    image_std: float | list[float]
    compat: str | None
    value_range: float | None
    draft: bool
    model_input_names = ["pixel_values"]

    def __init__(self, *, extra: dict[str, Any] | None = None, **settings: Any) -> None:
        """`settings` are the fields of `ImageSettings`; `extra` is kept and written back by `save_pretrained`."""
        checked = _settings({}, settings)
        for name in SETTINGS:
            setattr(self, name, getattr(checked, name))
        self.extra: dict[str, Any] = copy.deepcopy(extra or {})

    def __call__(
        self,
        images: Any,
        segmentation_maps: Any = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, segmentation_maps, return_tensors, input_data_format, **overrides)

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """`pixel_values` (B, C, H, W), float32, and if `segmentation_maps` are given, `labels` (B, H, W), int64.

        An image is a path, a file:// URL, the bytes of a file, a file object, a PIL image, or an array (H, W),
        (H, W, C) or (C, H, W), uint8 or floats; `images` is one of them, a list, or an array of one axis more.
        `input_data_format`, "channels_first" or "channels_last", settles arrays that can be read both ways.
        `overrides` replace settings for this call.
        The result is always one array per entry (the originals give lists unless `return_tensors` is set), of PyTorch
        with `return_tensors="pt"`, else of NumPy.
        Raises ImageError, naming file or argument, for images that cannot be read or do not fit together.
        """
        if return_tensors not in (None, "np", "pt"):
            raise ValueError(f"return_tensors: expected 'np', 'pt' or None, found {return_tensors!r}")
        settings = _settings({name: getattr(self, name) for name in SETTINGS}, overrides)
        pictures = flatten_images(images, "images", ndim=3)
        batch = BatchFeature()
        values = [_pixel_values(item, name, settings, input_data_format) for name, item in pictures]
        batch["pixel_values"] = _stacked(values, [name for name, _ in pictures])
        if segmentation_maps is not None:
            maps = flatten_images(segmentation_maps, "segmentation_maps", ndim=2)
            if len(maps) != len(pictures):
                raise ImageError(f"segmentation_maps: expected {len(pictures)}, one per image, found {len(maps)}")
            labels = [_labels(item, name, settings) for name, item in maps]
            batch["labels"] = _stacked(labels, [name for name, _ in maps])
        return BatchFeature({k: as_torch(v) for k, v in batch.items()}) if return_tensors == "pt" else batch

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, return_segmentation_scores: bool = False
    ) -> list[Any]:
        """The class ids (height, width), int64, of each image: the argmax of `outputs.logits` (B, K, h, w).

        They are NumPy arrays, or tensors of PyTorch where the logits are.

        `target_sizes`, B pairs (height, width), first resizes the logits bilinearly (align_corners False, no
        antialiasing).  With `return_segmentation_scores` each item has `segmentation` and `segmentation_scores`, the
        (resized) logits (K, height, width).  Raises ValueError for logits or sizes of another shape.
        Source: BeitImageProcessorPil.post_process_semantic_segmentation of transformers 5.
        """
        logits = as_numpy(getattr(outputs, "logits", None))
        if logits.ndim != 4 or logits.dtype.kind != "f" or 0 in logits.shape:
            raise ValueError(f"outputs: expected logits of shape (B, K, h, w), found {logits.shape} {logits.dtype}")
        scores = list(logits) if target_sizes is None else _resized_logits(logits, target_sizes)
        maps = [score.argmax(axis=0) for score in scores]
        if is_torch(outputs.logits):
            scores, maps = [as_torch(score) for score in scores], [as_torch(labels) for labels in maps]
        if not return_segmentation_scores:
            return maps
        return [
            SemanticSegmentationPostProcessorOutput(segmentation=segmentation, segmentation_scores=score)
            for segmentation, score in zip(maps, scores)
        ]

    @property
    def reduce_labels(self) -> bool:
        """The old name of `do_reduce_labels`."""
        return self.do_reduce_labels

    @reduce_labels.setter
    def reduce_labels(self, value: bool) -> None:
        self.do_reduce_labels = value

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> BeitImageProcessor:
        """The processor of a dictionary read from a `preprocessor_config.json` of any transformers version.

        A dictionary that names its `feature_extractor_type` is read as at its time: of a BeitFeatureExtractor, absent
        keys mean a size of 256 and a centre crop of 224, and pairs are (width, height).  For other types absent keys
        mean the defaults of that type (see `images.types`).  Unknown keys are kept in `extra`.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected a mapping of settings, found {type(values).__name__}")
        values = {k: v for k, v in values.items() if v is not None}
        kind = _text(values.get("image_processor_type") or values.get("feature_extractor_type") or "Beit")
        values = defaults_of_type(kind, values)
        for old, new in _RENAMED.items():
            if old in values:
                values.setdefault(new, values.pop(old))
        known = {k: v for k, v in values.items() if k in SETTINGS}
        extra = {k: v for k, v in values.items() if k not in SETTINGS and k not in _TYPE_KEYS}
        return cls(**{**known, **overrides}, extra=extra)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **keywords: Any) -> BeitImageProcessor:
        """Reads `preprocessor_config.json`, given the file, its folder, or an id on the Hub.

        `keywords` are settings to replace, and the words of `loading_options.Where` that say where files lie, as
        models take them.  Raises TypeError for any other keyword, FileNotFoundError when there is none and
        CheckpointError, naming the file, when it cannot be used.
        """
        file, overrides = resolve_settings(path, keywords, (*SETTINGS, *_RENAMED), PROCESSOR_NAME)
        try:
            values = read_json(file)
            processor = cls.from_dict(values)
        except (ValueError, TypeError) as error:  # json and unicode errors are ValueErrors
            raise CheckpointError(f"{file}: {error}") from error
        return cls.from_dict(values, **overrides) if overrides else processor

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `save_pretrained` writes; transformers reads it too."""
        values = {name: copy.deepcopy(getattr(self, name)) for name in SETTINGS}
        for name, default in (
            ("apply_exif_orientation", True),
            ("compat", None),
            ("value_range", None),
            ("draft", False),
        ):  # keys that only minibeit knows
            if values[name] == default:
                del values[name]
        return {**copy.deepcopy(self.extra), **values, "image_processor_type": "BeitImageProcessor"}

    def to_json_string(self) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json_string()` to a file."""
        with atomic_write(path) as file:
            file.write(self.to_json_string().encode())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `preprocessor_config.json` into `folder`, which is created if necessary."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder to save into, found a file")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / PROCESSOR_NAME)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string().rstrip()}"


show_fields(BeitImageProcessor.__init__, ImageSettings)


def default_processor(config: BeitConfig) -> BeitImageProcessor:
    """The processor of a checkpoint that says nothing of one: resized to the model's size, bilinear, means of 0.5."""
    height, width = config.image_shape
    half = [0.5] * config.num_channels
    return BeitImageProcessor(size={"height": height, "width": width}, resample=2, image_mean=half, image_std=half)


class BeitFeatureExtractor(BeitImageProcessor):
    """The name and calling convention of BeitImageProcessor before transformers 4.26.

    It has the old defaults, a size of 256 and a centre crop of 224; pairs are (width, height); `reduce_labels` is the
    old name of `do_reduce_labels`.  It is saved as a BeitImageProcessor.
    """

    def __init__(
        self,
        do_resize: bool = True,
        size: Any = 256,
        resample: int = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: Any = 224,
        do_normalize: bool = True,
        image_mean: Any = None,
        image_std: Any = None,
        reduce_labels: bool = False,
        **settings: Any,
    ) -> None:
        settings.setdefault("do_reduce_labels", reduce_labels)
        super().__init__(
            do_resize=do_resize,
            size=width_first(size),
            resample=resample,
            do_center_crop=do_center_crop,
            crop_size=width_first(crop_size),
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            **settings,
        )


def _settings(values: dict[str, Any], overrides: dict[str, Any]) -> ImageSettings:
    overrides = {_RENAMED.get(k, k): v for k, v in overrides.items()}
    unknown = [k for k in overrides if k not in SETTINGS]
    if unknown:
        raise unknown_keywords("image processor", unknown, SETTINGS)
    return ImageSettings(**{**values, **{k: v for k, v in overrides.items() if v is not None}})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else brief(value)


def _pixel_values(item: Any, name: str, settings: ImageSettings, input_data_format: str | None) -> np.ndarray:
    channels = (settings.channels or 3) if settings.do_convert_rgb else None
    orient, white = settings.apply_exif_orientation, settings.value_range
    name, item = decoded(item, name, orient, settings.needed)
    image = as_bytes(item, channels, name) if settings.do_resize else None  # resized before it is copied into an array
    if image is not None:
        pixels = resize_image(image, settings.size, settings.resample, name)
        pixels = convert_channels(pixels, channels or 3, name)
    else:
        pixels = pixels_of(item, name, channels, input_data_format, white)
    found = pixels.shape[-1]
    if settings.do_normalize and settings.channels not in (None, found):
        raise ImageError(
            f"{name}: expected {settings.channels} channels, one per number of image_mean, found {found}; "
            "do_convert_rgb=True converts images"
        )
    if settings.do_rescale and pixels.dtype.kind == "f" and 0 < pixels.max() <= 1:
        warnings.warn(
            f"{name}: the floats are within 0..1 and will be rescaled once more; pass do_rescale=False", stacklevel=4
        )
    if settings.do_resize and image is None:
        pixels = resize(pixels, settings.size, settings.resample, name)
    if settings.do_center_crop:
        pixels = center_crop(pixels, settings.crop_size)
    mean, std = (
        ([value] * found if isinstance(value, float) else value) if settings.do_normalize else None
        for value in (settings.image_mean, settings.image_std)
    )
    return to_pixel_values(pixels, settings.rescale_factor if settings.do_rescale else None, mean, std)


def _labels(item: Any, name: str, settings: ImageSettings) -> np.ndarray:
    labels = load_label_map(item, name, settings.apply_exif_orientation)
    if settings.do_reduce_labels and labels.min() < 0:
        raise ImageError(f"{name}: do_reduce_labels expects class ids of at least 0, found {labels.min()}")
    as_originals = settings.compat == "transformers"
    if settings.do_resize and not as_originals:
        labels = resize_labels(labels, resized_shape(labels.shape, settings.size, name))
    if settings.do_reduce_labels:
        labels = reduce_labels(labels)
    if settings.do_resize and as_originals:
        labels = resize(labels[..., None], settings.size, settings.resample, name)[..., 0]
    if settings.do_center_crop:
        labels = center_crop(labels, settings.crop_size, fill=0 if as_originals else IGNORED_LABEL)
    return labels.astype(np.int64)


def _stacked(arrays: list[np.ndarray], names: list[str]) -> np.ndarray:
    for array, name in zip(arrays, names):
        if array.shape != arrays[0].shape:
            raise ImageError(
                f"{name}: expected shape {arrays[0].shape} as of {names[0]}, found {array.shape}; "
                "resize all images to one height and width, or process them one by one"
            )
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][None]


def _resized_logits(logits: np.ndarray, target_sizes: Any) -> list[np.ndarray]:
    from .ops.reference import resize_bilinear

    try:
        sizes = np.asarray(target_sizes)
    except ValueError:  # pairs of unequal length
        sizes = np.empty(0)
    if sizes.shape != (len(logits), 2) or sizes.dtype.kind not in "iu" or sizes.min() < 1:
        raise ValueError(
            f"target_sizes: expected {len(logits)} pairs (height, width) of positive whole numbers, one per image, "
            f"found {target_sizes!r}"
        )
    with np.errstate(under="ignore"):  # means of tiny logits may underflow to zero
        return [resize_bilinear(logit[None], (int(h), int(w)))[0] for logit, (h, w) in zip(logits, sizes)]
