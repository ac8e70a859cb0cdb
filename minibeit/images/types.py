"""Defaults of other models' image processors and feature extractors for keys that their files leave out."""

from __future__ import annotations

import warnings
from typing import Any

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BILINEAR, _BICUBIC = 2, 3
_OLD_BEIT = {"size": 256, "crop_size": 224, "do_center_crop": True}  # of BeitFeatureExtractor, transformers 4
_NOT_READ = ("crop_pct", "keep_aspect_ratio", "ensure_multiple_of", "do_pad", "size_divisor")


def _plain(size: Any, resample: int, mean: Any = HALF, std: Any = HALF, **more: Any) -> dict[str, Any]:
    return {"size": size, "resample": resample, "image_mean": mean, "image_std": std, "do_center_crop": False, **more}


# Defaults of transformers 5 by the name before ImageProcessor or FeatureExtractor, for types with the same steps as
# BEiT's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": _plain(224, _BILINEAR),
    "DeiT": _plain(256, _BICUBIC, do_center_crop=True, crop_size=224),
    "Segformer": _plain(512, _BILINEAR, IMAGENET_MEAN, IMAGENET_STD),
    "Pvt": _plain(224, _BICUBIC, IMAGENET_MEAN, IMAGENET_STD),
    "Siglip": _plain({"height": 224, "width": 224}, _BICUBIC),
    "DPT": _plain(384, _BICUBIC),
    "ConvNext": _plain({"shortest_edge": 384}, _BICUBIC),
    "CLIP": _plain({"shortest_edge": 224}, _BICUBIC, CLIP_MEAN, CLIP_STD, do_center_crop=True, crop_size=224),
    "Bit": _plain({"shortest_edge": 224}, _BICUBIC, CLIP_MEAN, CLIP_STD, do_center_crop=True, crop_size=224),
    "Levit": _plain({"shortest_edge": 224}, _BICUBIC, IMAGENET_MEAN, IMAGENET_STD, do_center_crop=True, crop_size=224),
    "Flava": _plain(224, _BICUBIC, CLIP_MEAN, CLIP_STD, do_center_crop=True, crop_size=224),
}
_SHORTEST_EDGE = ("ConvNext", "CLIP", "Bit", "Levit", "Siglip")  # an integer size means the shorter side
_SAME = {"Convnext": "ConvNext", "Deit": "DeiT", "Vit": "ViT", "Data2VecVision": "Beit"}


def defaults_of_type(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a file of type `kind`, completed with that type's defaults, as settings of our processor.

    An unknown type is read as BEiT's, with a warning.  Raises ValueError for settings that need unsupported steps.
    """
    old = kind.endswith("FeatureExtractor")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    kind = _SAME.get(kind, kind)
    if kind in ("Beit", "x", ""):
        return _old_beit(values) if old or "feature_extractor_type" in values else values
    if kind not in DEFAULTS:
        warnings.warn(
            f"settings of a {kind} image processor are read as those of a BeitImageProcessor; give those that it "
            "leaves out, or takes other steps for, as keywords",
            stacklevel=4,
        )
        return values
    values = {**DEFAULTS[kind], **values}
    if kind in _SHORTEST_EDGE and isinstance(values["size"], int):
        values["size"] = {"shortest_edge": values["size"]}
    if kind == "ConvNext":
        values = _convnext(values)
    if kind == "Levit" and "shortest_edge" in values["size"]:
        values["size"] = {"shortest_edge": int(256 / 224 * values["size"]["shortest_edge"])}
    if kind == "DPT" and (values.get("keep_aspect_ratio") or values.get("ensure_multiple_of", 1) != 1):
        raise ValueError("a DPTImageProcessor with keep_aspect_ratio or ensure_multiple_of is not supported")
    return {key: value for key, value in values.items() if key not in _NOT_READ}


def width_first(size: Any) -> Any:
    """A (width, height) pair, as old extractors wrote it, as a dictionary; anything else unchanged."""
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return {"height": size[1], "width": size[0]}
    return size


def _old_beit(values: dict[str, Any]) -> dict[str, Any]:
    values = {**_OLD_BEIT, **values}
    return {**values, "size": width_first(values["size"]), "crop_size": width_first(values["crop_size"])}


def _convnext(values: dict[str, Any]) -> dict[str, Any]:
    """Below 384 pixels: resizes the shorter side to size / crop_pct and crops the centre; else resizes to a square."""
    if not isinstance(values["size"], dict) or "shortest_edge" not in values["size"]:
        raise ValueError("a ConvNextImageProcessor needs shortest_edge in size")
    edge = values["size"]["shortest_edge"]
    if edge >= 384:
        return {**values, "size": edge}
    return {**values, "size": {"shortest_edge": int(edge / values.get("crop_pct", 224 / 256))}, "crop_size": edge,
            "do_center_crop": True}  # fmt: skip
