"""The settings of training segmentation, and those that were published, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .recipes import IMAGENET, Recipe


@dataclass(frozen=True)
class SegmentationRecipe(Recipe):
    """How UPerNet is trained.  Raises ValueError, one sentence, for a number that makes no training.

    An image is resized within `scale` (longer side, shorter side) times a factor from `ratio`, and a square of
    `crop_size` pixels is cut out, of which no class should have a share of `most_of_one_class` or more.
    `normalisation` is the mean and the standard deviation of pixels, None for the checkpoint's.  With `mean_of_all` the
    loss is divided by the number of all pixels, ignored ones too, as mmseg does; `head_dropout` is the rate of channels
    dropped before the last layer of each head.
    """

    floor: float = 0.0
    power: float = 1.0
    scale: tuple[int, int] = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    crop_size: int = 512
    most_of_one_class: float = 0.75
    distortion: bool = True
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    mean_of_all: bool = False
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_size < 1 or min(self.scale) < 1:
            raise ValueError(f"crop_size: expected a number of pixels, found {self.crop_size} of {self.scale}")

    def cropped(self, size: int | None) -> SegmentationRecipe:
        """The recipe for squares of another size, images being scaled by the same factor."""
        if size is None or size == self.crop_size:
            return self
        longer, shorter = (max(1, round(side * size / self.crop_size)) for side in self.scale)
        changed: Any = self.changed(crop_size=size, scale=(longer, shorter))
        return changed


_UNILM = "microsoft/unilm beit/semantic_segmentation/configs"
_ADE: dict[str, Any] = dict(
    epochs=127, batch_size=16, warmup_steps=1500, weight_decay=0.05, normalisation=IMAGENET, mean_of_all=True,
    decay_tokens=True, head_dropout=0.1, source=_UNILM,
)  # fmt: skip # 160,000 steps of ADE20K; tokens are decayed since unilm looks for their names without `backbone.`
_AFTER_22K: dict[str, Any] = dict(lr=3e-5, layer_decay=0.9, drop_path=0.1)
_LARGE: dict[str, Any] = dict(lr=2e-5, layer_decay=0.95, drop_path=0.2)
_640: dict[str, Any] = dict(scale=(2560, 640), crop_size=640)

SEGMENTATION_RECIPES: dict[str, SegmentationRecipe] = {
    "own": SegmentationRecipe(
        epochs=40, batch_size=4, lr=1e-4, warmup=2, layer_decay=0.75, drop_path=0.1, clip=1.0,
        source="this program's own, for some tens to some thousands of images",
    ),
    "ade-base-512": SegmentationRecipe(**_ADE, **_AFTER_22K),
    "ade-base-640": SegmentationRecipe(**_ADE, **_AFTER_22K, **_640),
    "ade-base-512-pretrained": SegmentationRecipe(**_ADE, lr=7e-4, layer_decay=0.65, drop_path=0.1),
    "ade-large-512": SegmentationRecipe(**_ADE, **_LARGE),
    "ade-large-640": SegmentationRecipe(**_ADE, **_LARGE, **_640),
    "tiny": SegmentationRecipe(
        epochs=30, batch_size=4, lr=2e-3, warmup=2, layer_decay=1.0, decay_tables=False, table_rate=10.0, drop_path=0.0,
        clip=1.0, scale=(256, 64), ratio=(0.75, 1.5), crop_size=64, most_of_one_class=0.95,
        source="this program's own, for a small model from random weights",
    ),
}  # fmt: skip

# Configs of models to train from random weights, by name.  As transformers reads `out_indices`, none of them can mean
# the last block's output, so that tiny has one block more than it uses.
SEGMENTATION_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        image_size=64, patch_size=8, hidden_size=48, num_hidden_layers=5, num_attention_heads=4, intermediate_size=96,
        use_relative_position_bias=True, layer_scale_init_value=1.0, initializer_range=0.1, layer_norm_eps=1e-6,
        pool_scales=(1, 2, 4), auxiliary_channels=32,
    ),
    "base": dict(image_size=512, use_relative_position_bias=True, layer_norm_eps=1e-6),
}  # fmt: skip
