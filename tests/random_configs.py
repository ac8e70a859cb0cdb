"""Seeded random small models over the whole space of configs, for the live comparison with transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minibeit.config import ACTIVATIONS

TASKS = ["model", "image_classification", "masked_image_modeling", "semantic_segmentation", "backbone"]
DATA2VEC_TASKS = ["model", "image_classification", "semantic_segmentation"]

# Layer norm divides by the spread of a token's numbers.  Of two or three numbers it is now and then next to nothing,
# and float32 is off by a hundred times its rounding step on either side; measured ratios were up to 13 at width 2.
LEAST_WIDTH = 8


@dataclass
class Draw:
    """One random model: settings for both sides, changes for ours alone, and the arrays of one call."""

    seed: int
    task: str
    model_type: str
    settings: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.model_type} {self.task} {self.settings} {self.changes}"


def draw(seed: int) -> Draw:
    """The model and the call that `seed` stands for."""
    rng = np.random.default_rng(seed)
    data2vec = rng.random() < 0.15
    task = str(rng.choice(DATA2VEC_TASKS if data2vec else TASKS))
    made = Draw(seed, task, "data2vec-vision" if data2vec else "beit", _encoder(rng, task, data2vec))
    settings = made.settings
    grid, patch = _geometry(rng, made)
    B, C = int(rng.integers(1, 5)), settings["num_channels"]
    pixels = rng.standard_normal((B, C, grid[0] * patch[0], grid[1] * patch[1]), dtype=np.float32)
    made.arrays["pixel_values"] = pixels * np.float32(rng.choice([0.1, 1.0, 3.0]))
    P = grid[0] * grid[1]
    if task in ("model", "masked_image_modeling") and settings["use_mask_token"] and rng.random() < 0.8:
        made.arrays["bool_masked_pos"] = rng.random((B, P)) < rng.choice([0.0, 0.4, 0.9, 1.0])
    if task == "masked_image_modeling" and "bool_masked_pos" in made.arrays:
        count = int(made.arrays["bool_masked_pos"].sum())
        made.arrays["labels"] = rng.integers(0, settings["vocab_size"], count)
    if task == "image_classification":
        _classification(rng, made, B)
    if task == "semantic_segmentation":
        _segmentation(rng, made, B)
    if task == "backbone":
        _backbone(rng, made)
    return made


def _flag(rng: np.random.Generator, chance: float = 0.5) -> bool:
    return bool(rng.random() < chance)


def _encoder(rng: np.random.Generator, task: str, data2vec: bool) -> dict[str, Any]:
    heads, size = int(rng.integers(1, 5)), int(rng.integers(1, 13))
    size = max(size, -(-LEAST_WIDTH // heads))
    least = 4 if task in ("semantic_segmentation", "backbone") else 1
    dit = _flag(rng, 0.2)  # absolute positions and no bias at all
    return dict(
        hidden_size=heads * size,
        num_attention_heads=heads,
        num_hidden_layers=int(rng.integers(least, 6)),
        intermediate_size=int(rng.integers(1, 60)),
        hidden_act=str(rng.choice(ACTIVATIONS)) if _flag(rng) else "gelu",
        layer_norm_eps=float(rng.choice([1e-12, 1e-6, 1e-3])),
        num_channels=int(rng.choice([1, 2, 3, 4])),
        use_mask_token=_flag(rng, 0.7),
        use_absolute_position_embeddings=dit or _flag(rng, 0.25),
        use_relative_position_bias=not dit and _flag(rng),
        use_shared_relative_position_bias=not dit and _flag(rng, 0.4),
        layer_scale_init_value=float(rng.choice([0.0, 0.1, 1e-5])),
        use_mean_pooling=_flag(rng),
        vocab_size=int(rng.integers(2, 100)),
        drop_path_rate=float(rng.choice([0.0, 0.1])),
        hidden_dropout_prob=float(rng.choice([0.0, 0.3])),
        attention_probs_dropout_prob=float(rng.choice([0.0, 0.3])),
    )


def _geometry(rng: np.random.Generator, made: Draw) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sets image and patch size; gives the grid and the patch of the call.

    Not drawn, since transformers fails on them: pairs of patch sizes where it divides by `patch_size`, absolute
    positions whose number is no square where they are resized, a Data2Vec segmentation model of any other than the
    native square grid or with index 0.
    """
    settings = made.settings
    biased = settings["use_relative_position_bias"] or settings["use_shared_relative_position_bias"]
    absolute = settings["use_absolute_position_embeddings"]
    maps = made.task in ("semantic_segmentation", "backbone")
    rigid = made.task == "semantic_segmentation" and made.model_type == "data2vec-vision"
    low = 2 if maps else 1
    patch = int(rng.integers(1, 6))
    if not biased and not absolute and not maps and _flag(rng, 0.3):
        pair = patch, int(rng.integers(1, 6))
        own = tuple(int(n) for n in rng.integers(1, 6, 2))
        settings.update(patch_size=pair, image_size=(own[0] * pair[0], own[1] * pair[1]))
        return tuple(int(n) for n in rng.integers(1, 6, 2)), pair
    if not rigid and _flag(rng, 0.2):
        options = [(2, 8), (8, 2), (4, 9)] if absolute else [(2, 3), (5, 2), (3, 7), (6, 4)]
        own = options[rng.integers(len(options))]
        settings["image_size"] = (own[0] * patch, own[1] * patch)
        made.changes["compat"] = "transformers"
    else:
        side = int(rng.integers(low, 8))
        own = side, side
        settings["image_size"] = side * patch + int(rng.integers(0, patch))
    settings["patch_size"] = patch
    grid = own if rigid or _flag(rng, 0.6) else tuple(int(n) for n in rng.integers(low, 9, 2))
    return grid, (patch, patch)


def _classification(rng: np.random.Generator, made: Draw, B: int) -> None:
    K = int(rng.choice([0, 1, 2, 3, 7, 20]))
    made.settings["num_labels"] = K
    if K == 0 or _flag(rng, 0.2):
        return
    kinds = ["float"] if K == 1 else ["integer", "float", "single", "multi", "regression"]
    kind = str(rng.choice(kinds))
    names = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
    if kind in names:
        made.settings["problem_type"] = names[kind]
    if kind in ("integer", "single"):
        labels = rng.integers(0, K, B)
        labels[rng.random(B) < 0.1] = -100
    elif K == 1:
        labels = rng.standard_normal((B, 1) if _flag(rng) else (B,)).astype(np.float32)
    elif kind == "regression":
        labels = rng.standard_normal((B, K)).astype(np.float32)
    else:
        labels = (rng.random((B, K)) < 0.5).astype(np.float32)
    made.arrays["labels"] = labels


def _segmentation(rng: np.random.Generator, made: Draw, B: int) -> None:
    L, D = made.settings["num_hidden_layers"], made.settings["hidden_size"]
    K = int(rng.choice([1, 2, 3, 11]))
    convs = int(rng.integers(0, 4))
    ignore = int(rng.choice([255, 0, -1]))
    first = 1 if made.model_type == "data2vec-vision" else 0
    made.settings.update(
        num_labels=K,
        out_indices=sorted(int(i) for i in rng.choice(np.arange(first, L + 1), 4, replace=False)),
        pool_scales=[int(n) for n in rng.choice([1, 2, 3, 4, 6, 7], rng.integers(1, 5), replace=False)],
        use_auxiliary_head=_flag(rng, 0.8),
        auxiliary_loss_weight=float(rng.choice([0.4, 1.0, 0.0])),
        auxiliary_channels=D if convs == 0 else int(rng.integers(1, 20)),
        auxiliary_num_convs=convs,
        auxiliary_concat_input=_flag(rng),
        semantic_loss_ignore_index=ignore,
    )
    if K > 1 and _flag(rng, 0.8):
        labels = rng.integers(0, K, (B, *rng.integers(1, 40, 2)))
        labels[rng.random(labels.shape) < 0.2] = ignore
        made.arrays["labels"] = labels


def _backbone(rng: np.random.Generator, made: Draw) -> None:
    settings = made.settings
    L = settings["num_hidden_layers"]
    settings["add_fpn"] = _flag(rng, 0.4)
    settings["reshape_hidden_states"] = settings["add_fpn"] or _flag(rng, 0.7)
    count = 4 if settings["add_fpn"] else int(rng.integers(0, L + 2))
    chosen = sorted(int(i) for i in rng.choice(L + 1, count, replace=False))
    if not chosen:
        return  # the default: the last stage alone
    if _flag(rng) or settings["add_fpn"]:
        settings["out_indices"] = chosen
    else:
        settings["out_features"] = ["stem" if i == 0 else f"stage{i}" for i in chosen]
