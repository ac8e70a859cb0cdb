"""The settings of a training run, and those that were published, as data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..images.types import IMAGENET_MEAN, IMAGENET_STD
from .schedule import Cosine, Polynomial


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.  Raises ValueError, one sentence, for a number that makes no training.

    `lr` is that of `batch_size`, and falls to `floor` by half a cosine, or as a polynomial of degree `power` if that is
    not 0; `warmup` counts epochs, unless `warmup_steps` counts steps; `mixup` and `cutmix` are the alphas of their beta
    distributions, 0 for off; `clip` bounds the norm of the gradients and `average` is the decay of an average of the
    weights, 0 for none.  `table_rate` multiplies the rate of position bias tables.
    """

    epochs: int = 20
    batch_size: int = 32
    lr: float = 2e-4
    floor: float = 1e-6
    power: float = 0.0
    warmup: float = 2
    warmup_steps: int = 0
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    decay_tables: bool = True
    decay_tokens: bool = False
    table_rate: float = 1.0
    drop_path: float = 0.1
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    clip: float = 0.0
    average: float = 0.0
    # Augmentation, in the order in which it acts.
    crop: tuple[float, float] | None = (0.08, 1.0)  # share of the area that a random crop has; None: the whole picture
    flip: float = 0.5
    moves: tuple[float, float, float] | None = None  # degrees, part of the scale, part of the width
    color: float = 0.0  # strength of colour jitter, which `rand_augment` replaces
    rand_augment: tuple[int, float, float] | None = (2, 9.0, 0.5)  # operations, magnitude and its deviation
    erasing: float = 0.25
    source: str = "this program's own, for some hundreds to some ten thousands of pictures"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, found {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: expected a learning rate above 0, found {self.lr}; 2e-4 is usual for fine-tuning")
        for name in ("warmup", "weight_decay", "mixup", "cutmix", "clip", "floor", "power"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a number of at least 0, found {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected a number above 0 and up to 1, found {self.layer_decay}")
        for name in ("smoothing", "average", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number from 0 up to but not 1, found {getattr(self, name)}")

    def schedule(self, steps: int, steps_per_epoch: int) -> Cosine | Polynomial:
        """The rate of each of so many steps."""
        warmup = min(self.warmup_steps or round(self.warmup * steps_per_epoch), steps - 1)
        if self.power:
            return Polynomial(self.lr, steps, warmup, self.power, min(self.floor, self.lr))
        return Cosine(self.lr, steps, warmup, min(self.floor, self.lr))

    def changed(self, **values: Any) -> Recipe:
        """The recipe with those fields that are not None replaced.

        With another batch size and no rate given, the rate changes by the same factor.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if "batch_size" in given and "lr" not in given:
            given["lr"] = self.lr * given["batch_size"] / self.batch_size
        if given.get("lr", self.lr) < self.floor:
            given["floor"] = 0.0
        if "warmup" in given:
            given["warmup_steps"] = 0
        return dataclasses.replace(self, **given)


_UNILM = "microsoft/unilm beit/get_started_for_image_classification.md"
_INTERMEDIATE: dict[str, Any] = dict(epochs=90, warmup=5, drop_path=0.2, source=_UNILM)
_AFTER_22K: dict[str, Any] = dict(epochs=30, batch_size=512, lr=2e-5, warmup=5, weight_decay=1e-8, source=_UNILM)
_DIRECT: dict[str, Any] = dict(mixup=0.8, cutmix=1.0, source=_UNILM)

RECIPES: dict[str, Recipe] = {
    "own": Recipe(),
    "base-22k": Recipe(batch_size=4096, lr=3e-3, layer_decay=0.65, clip=3.0, **_INTERMEDIATE),
    "large-22k": Recipe(batch_size=2048, lr=2e-3, layer_decay=0.75, clip=1.0, **_INTERMEDIATE),
    "base-22k-to-1k": Recipe(layer_decay=0.85, drop_path=0.1, **_AFTER_22K),
    "large-22k-to-1k": Recipe(layer_decay=0.9, drop_path=0.4, **_AFTER_22K),
    "base-1k": Recipe(epochs=100, batch_size=1024, lr=4e-3, warmup=20, layer_decay=0.65, **_DIRECT),
    "large-1k": Recipe(
        epochs=50, batch_size=1024, lr=1e-3, warmup=5, layer_decay=0.75, drop_path=0.2, **_DIRECT
    ),
    "tiny": Recipe(
        epochs=20, batch_size=32, lr=2e-3, floor=0.0, warmup=3, layer_decay=1.0, decay_tables=False, table_rate=10.0,
        clip=1.0, crop=None, flip=0.0, moves=(12.0, 0.1, 0.11), rand_augment=None, erasing=0.0,
        source="weights/train_digits.py: a small model from random weights, on signs that no mirror keeps",
    ),
}  # fmt: skip

# Configs of models to train from random weights, by name.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        image_size=16, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        use_relative_position_bias=True, layer_scale_init_value=1.0, initializer_range=0.1, layer_norm_eps=1e-6,
    ),
    "base": dict(use_relative_position_bias=True, layer_norm_eps=1e-6),
}  # fmt: skip


# Pre-training ---------------------------------------------------------------------------------------------------------

HALF, IMAGENET = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), (IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class PretrainingRecipe(Recipe):
    """How a model is pre-trained; `smoothing`, `mixup`, `cutmix`, `erasing` and `rand_augment` play no part.

    `masked` is the share of the patches to mask, 75 of 196 in the paper; `normalisation` the mean and the standard
    deviation of the pixels by channel.
    """

    masked: float = 75 / 196
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = HALF
    layer_decay: float = 1.0
    color: float = 0.4
    rand_augment: tuple[int, float, float] | None = None
    floor: float = 1e-5
    clip: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.masked <= 1:
            raise ValueError(f"masked: expected a share above 0 and up to 1, found {self.masked}")


_UNILM_PRE = "microsoft/unilm beit/README.md"
_PRE_22K: dict[str, Any] = dict(epochs=150, batch_size=2048, lr=1.5e-3, warmup_steps=10000)
_PRE_1K: dict[str, Any] = dict(epochs=800, batch_size=2048, lr=1.5e-3, warmup=10, normalisation=IMAGENET)
_LARGE: dict[str, Any] = dict(clip=1.0, source="Bao et al. 2021, appendix; layer scale 1e-5 (--config large)")

PRETRAINING: dict[str, PretrainingRecipe] = {
    "own": PretrainingRecipe(epochs=100, batch_size=64, lr=5e-4, warmup=5),
    "base-22k": PretrainingRecipe(**_PRE_22K, source=_UNILM_PRE),
    "base-1k": PretrainingRecipe(**_PRE_1K, source=_UNILM_PRE),
    "large-22k": PretrainingRecipe(**_PRE_22K, **_LARGE),
    "large-1k": PretrainingRecipe(**_PRE_1K, **_LARGE),
    "tiny": PretrainingRecipe(
        epochs=20, batch_size=64, lr=2e-3, floor=1e-5, warmup=2, drop_path=0.0, crop=None, flip=0.0, color=0.0,
        source="this program's own, for small images of signs and things, which no mirror keeps",
    ),
}  # fmt: skip

_PRE: dict[str, Any] = dict(
    use_shared_relative_position_bias=True, use_mask_token=True, layer_norm_eps=1e-6, drop_path_rate=0.1
)
PRETRAINING_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        image_size=28, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        layer_scale_init_value=1.0, initializer_range=0.1, **_PRE,
    ),
    "base": _PRE,
    "large": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        layer_scale_init_value=1e-5, **_PRE,
    ),
}  # fmt: skip


# A tokenizer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerRecipe(Recipe):
    """How a tokenizer is trained; `layer_decay`, `drop_path`, `smoothing`, mixing and erasing play no part.

    `divergence` is the weight of the divergence from uniform tokens (beta, for a sum over the pixels of an image).  It
    rises from 0 in the first part `divergence_rise` of the training; the temperature falls from 1 to `coldest` by half
    a cosine in the first part `cooling`.
    """

    divergence: float = 1.0
    divergence_rise: float = 0.1
    coldest: float = 1 / 16
    cooling: float = 0.5
    lr: float = 1e-3
    floor: float = 1e-5
    layer_decay: float = 1.0
    weight_decay: float = 1e-4
    rand_augment: tuple[int, float, float] | None = None
    average: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.divergence) and self.divergence >= 0):
            raise ValueError(f"divergence: expected a number of at least 0, found {self.divergence}")
        if not 0 < self.coldest <= 1:
            raise ValueError(f"coldest: expected a temperature above 0 and up to 1, found {self.coldest}")

    def temperature_at(self, done: float) -> float:
        """The temperature of the relaxation when the share `done` of the training lies behind."""
        progress = min(1.0, done / self.cooling) if self.cooling else 1.0
        return self.coldest + 0.5 * (1 - self.coldest) * (1 + math.cos(math.pi * progress))

    def divergence_at(self, done: float) -> float:
        """The weight of the divergence at that time."""
        progress = min(1.0, done / self.divergence_rise) if self.divergence_rise else 1.0
        return self.divergence * 0.5 * (1 - math.cos(math.pi * progress))


TOKENIZERS: dict[str, TokenizerRecipe] = {
    "own": TokenizerRecipe(epochs=20, batch_size=32, warmup=0.5),
    "dall-e": TokenizerRecipe(  # 3,000,000 steps there; the shares are those of its schedules
        batch_size=512, lr=1e-4, floor=1.25e-6, warmup=0.0, divergence=6.6, divergence_rise=5e3 / 3e6,
        cooling=1.5e5 / 3e6, average=0.999, source="Ramesh et al. 2021, appendix A.2",
    ),
    "tiny": TokenizerRecipe(
        epochs=6, batch_size=16, lr=5e-3, floor=1e-4, warmup=0.2, coldest=0.5, crop=None, flip=0.0,
        source="this program's own, for small images of signs and things, in many warm steps, so that tokens are used",
    ),
}  # fmt: skip
