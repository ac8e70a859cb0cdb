"""Infers the config of a checkpoint without one (unilm, timm, a plain state dict) from the shapes of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..config import BeitConfig
from ..errors import CheckpointError
from ..task_table import BY_HEAD, TASKS
from .names import Naming

HEAD_SIZE = 64  # of every published BEiT; used only where no bias table shows the number of heads
HEADS_OF = {"base": 12, "large": 16}  # of timm's architectures
POOL_SCALES = (1, 2, 3, 6)


@dataclass(frozen=True)
class Inferred:
    """An inferred config and task, with one sentence for every setting that the shapes do not determine."""

    config: BeitConfig
    task: str
    assumed: list[str] = field(default_factory=list)


def infer_config(tensors: Any, naming: Naming, said: dict[str, Any] | None = None, **overrides: Any) -> Inferred:
    """The config that matches the shapes in `tensors`; `overrides` are fields that the caller sets.

    `said` holds settings from timm's config.json (see `timm_settings`), used where the shapes do not determine them.
    Raises CheckpointError if the shapes are not a BEiT's, or the grid is undetermined (give `image_size`).
    """
    return _Reader(tensors, naming, said or {}).read(overrides)


def timm_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings in timm's config.json, if present: `num_attention_heads`, `image_size`, `label_names`."""
    more = values.get("model_args")
    more = more if isinstance(more, dict) else {}
    pretrained = values.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    said: dict[str, Any] = {}
    size = HEADS_OF.get(next((word for word in str(values["architecture"]).split("_") if word in HEADS_OF), ""))
    heads = more.get("num_heads", size)
    if isinstance(heads, int):
        said["num_attention_heads"] = heads
    shape = pretrained.get("input_size")
    pixels = more.get("img_size", shape[1:] if isinstance(shape, list) and len(shape) == 3 else None)
    if isinstance(pixels, (int, list)):
        said["image_size"] = pixels
    names = values.get("label_names", pretrained.get("label_names"))
    descriptions = values.get("label_descriptions", pretrained.get("label_descriptions"))
    if isinstance(names, list) and isinstance(descriptions, dict):
        names = [descriptions.get(name, name) if isinstance(name, str) else name for name in names]
    if isinstance(names, list):
        said["label_names"] = names
    return said


class _Reader:
    def __init__(self, tensors: Any, naming: Naming, said: dict[str, Any]) -> None:
        self.tensors, self.naming, self.said = tensors, naming, said
        self.assumed: list[str] = []

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape in the file of the parameter with a canonical name; None if it is absent."""
        place = self.naming.places([name], self.tensors)[name]
        return self.tensors.info(place.name).shape if place and place.name in self.tensors else None

    def need(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.shape(name)
        if shape is None or len(shape) != rank or not all(shape):
            raise CheckpointError(
                f"tensor {self.naming.place(name).name}: expected {rank} dimensions, found {shape or 'no such tensor'}"
                "; without it no config can be inferred: put a config.json next to the file"
            )
        return shape

    def count(self, template: str) -> int:
        """How many tensors the file has for the template's number 0, 1, ... without a gap."""
        i = 0
        while self.shape(template.format(i)) is not None:
            i += 1
        return i

    def read(self, overrides: dict[str, Any]) -> Inferred:
        patch = self.need("beit.embeddings.patch.weight", 4)
        if self.naming.place("beit.embeddings.patch.weight").how == "hwio":
            patch = patch[3], patch[2], patch[0], patch[1]
        width, channels, patch_height, patch_width = patch
        fc1 = self.need("beit.encoder.0.fc1.bias", 1)
        settings: dict[str, Any] = dict(
            hidden_size=width,
            num_hidden_layers=self.count("beit.encoder.{}.norm1.weight"),
            intermediate_size=fc1[0],
            num_channels=channels,
            patch_size=patch_height if patch_height == patch_width else (patch_height, patch_width),
            use_mask_token=self.shape("beit.embeddings.mask_token") is not None,
            use_absolute_position_embeddings=self.shape("beit.embeddings.position_embeddings") is not None,
            use_relative_position_bias=self.shape("beit.encoder.0.bias_table") is not None,
            use_shared_relative_position_bias=self.shape("beit.shared_bias_table") is not None,
            layer_norm_eps=self.naming.dialect.layer_norm_eps,
        )
        self.assumed.append(f"layer_norm_eps {self.naming.dialect.layer_norm_eps:g}")
        if self.shape("beit.encoder.0.lambda_1") is None:
            settings["layer_scale_init_value"] = 0.0
        settings["num_attention_heads"] = self.heads(width, overrides)
        if "image_size" not in overrides:
            settings["image_size"] = self.image_size(patch_height, patch_width)
        task = self.task()
        settings.update(self.head(task, settings["num_hidden_layers"], overrides))
        try:
            return Inferred(BeitConfig.from_dict(settings, **overrides), task, self.assumed)
        except ValueError as error:
            raise CheckpointError(f"no config fits the shapes of the tensors: {error}") from None

    def table(self) -> tuple[int, ...] | None:
        return self.shape("beit.encoder.0.bias_table") or self.shape("beit.shared_bias_table")

    def heads(self, width: int, overrides: dict[str, Any]) -> int:
        table = self.table()
        if table is not None and len(table) == 2:
            return table[1]
        said = self.said.get("num_attention_heads")
        if isinstance(said, int) and said > 0 and width % said == 0:
            return said
        if "num_attention_heads" not in overrides:
            self.assumed.append(f"num_attention_heads {max(1, width // HEAD_SIZE)} (width / {HEAD_SIZE})")
        return max(1, width // HEAD_SIZE)

    def image_size(self, patch_height: int, patch_width: int) -> int | tuple[int, int]:
        """The image size in pixels that fits the bias table or the position embeddings, assuming a square grid."""
        table, positions = self.table(), self.shape("beit.embeddings.position_embeddings")
        if table is None and positions is None and "image_size" in self.said:
            return self.said["image_size"]
        if table is None and positions is None:
            self.assumed.append("image_size 224 (nothing in the file depends on it)")
            return 224
        if positions is not None and len(positions) == 3:
            grid = math.isqrt(max(positions[1] - 1, 0))
            square, what = grid * grid == positions[1] - 1, f"{positions[1]} position embeddings"
        else:
            rows = table[0] if table else 0
            grid = (math.isqrt(max(rows - 3, 0)) + 1) // 2
            square, what = (2 * grid - 1) ** 2 == rows - 3, f"a position bias table of {rows} rows"
        if (not square or grid < 1) and "image_size" in self.said:
            return self.said["image_size"]
        if not square or grid < 1:
            raise CheckpointError(f"{what} fit no square grid of patches; give image_size as (height, width)")
        self.assumed.append(f"a square grid of {grid}x{grid} patches")
        height, width = grid * patch_height, grid * patch_width
        return height if height == width else (height, width)

    def task(self) -> str:
        shown = (task for task in BY_HEAD if TASKS[task].shown_by and self.shape(TASKS[task].shown_by) is not None)
        return next(shown, "model")

    def head(self, task: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
        """The settings that follow from the head's shapes."""
        has_norm = self.shape("beit.norm.weight") is not None
        settings: dict[str, Any] = {"use_mean_pooling": task == "masked_image_modeling" or not has_norm}
        if task == "masked_image_modeling":
            settings["vocab_size"] = self.need("lm_head.bias", 1)[0]
        elif task == "image_classification":
            settings["num_labels"] = self.need("classifier.bias", 1)[0]
        elif task == "semantic_segmentation":
            settings.update(self.segmentation(layers))
        elif task == "backbone":
            settings.update(add_fpn=True, out_indices=_stages(layers, 1))
            self.assumed.append(f"out_indices {settings['out_indices']}")
        if "num_labels" in overrides or "id2label" in overrides:
            settings.pop("num_labels", None)
        return settings

    def segmentation(self, layers: int) -> dict[str, Any]:
        scales = self.count("decode_head.psp_modules.{}.conv.weight")
        if scales > len(POOL_SCALES):
            raise CheckpointError(f"the head pools at {scales} scales, which the shapes leave open; give pool_scales")
        original = self.naming.dialect.name in ("unilm", "openmmlab")
        settings: dict[str, Any] = dict(
            num_labels=self.need("decode_head.classifier.bias", 1)[0],
            pool_scales=POOL_SCALES[:scales],
            out_indices=_stages(layers, 0),
            feature_convention="unilm" if original else "transformers",
            use_auxiliary_head=self.shape("auxiliary_head.classifier.weight") is not None,
        )
        if settings["use_auxiliary_head"]:
            settings["auxiliary_channels"] = self.need("auxiliary_head.classifier.weight", 4)[1]
            settings["auxiliary_num_convs"] = self.count("auxiliary_head.convs.{}.conv.weight")
            settings["auxiliary_concat_input"] = self.shape("auxiliary_head.conv_cat.conv.weight") is not None
        for name in ("pool_scales", "out_indices", "feature_convention"):
            self.assumed.append(f"{name} {settings[name]}")
        return settings


def _stages(layers: int, first: int) -> tuple[int, ...]:
    """The four blocks that feed a pyramid, at 1/3, 1/2, 2/3 and the end of the depth, counted from `first`."""
    return tuple(max(layers * part // 6, i + 1) - 1 + first for i, part in enumerate((2, 3, 4, 6)))
