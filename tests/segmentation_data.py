"""Small images of coloured discs with their label maps, for the tests of segmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from minibeit import BeitConfig, BeitForSemanticSegmentation
from minibeit.train.label_maps import read_pairs
from minibeit.train.loop import Trainer
from minibeit.train.segmentation import Segmentation, processor_for
from minibeit.train.segmentation_recipes import SegmentationRecipe

SHAPE = (36, 48)
COLORS = np.array([(60, 60, 60), (210, 60, 50), (60, 190, 80), (70, 90, 220)])
NAMES = ("ground", "red", "green", "blue")


def scene(seed: int, shape: tuple[int, int] = SHAPE, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(image (H, W, 3), labels (H, W)): noisy discs, one of each class but the ground, on a noisy ground."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for number in range(1, classes):
        center, radius = rng.uniform((0.2 * shape[0], 0.2 * shape[1]), (0.8 * shape[0], 0.8 * shape[1])), 7 + seed % 3
        labels[(y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2] = number
    image = COLORS[labels] + rng.integers(-25, 26, (*shape, 3))
    return image.astype(np.uint8), labels


def save_pair(image_path: Path, map_path: Path, seed: int, labels: np.ndarray | None = None) -> None:
    """Writes a scene; `labels` in place of its own."""
    image, own = scene(seed)
    for path, array in ((image_path, image), (map_path, own if labels is None else labels)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def pair_folder(folder: Path, count: int = 6, maps: str = "masks", first: int = 0) -> Path:
    """`count` scenes in images/ and their maps beside them."""
    for i in range(first, first + count):
        save_pair(folder / "images" / f"{i}.png", folder / maps / f"{i}.png", i)
    return folder


def ade_folder(folder: Path, count: int = 4) -> Path:
    """ADE20K's layout, 0 in the maps being nothing."""
    for part, start, number in (("training", 0, count), ("validation", 50, 2)):
        for i in range(start, start + number):
            _, labels = scene(i)
            files = folder / "images" / part / f"ADE_{i:08}.png", folder / "annotations" / part / f"ADE_{i:08}.png"
            save_pair(*files, i, labels + np.uint8(1))
    return folder


QUICK = SegmentationRecipe(
    epochs=2, batch_size=4, lr=5e-3, warmup=1, layer_decay=1.0, clip=1.0, scale=(128, 32), crop_size=32,
    ratio=(0.75, 1.5), most_of_one_class=0.95,
)  # fmt: skip
MODEL = dict(
    hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8,
    initializer_range=0.2, use_relative_position_bias=True, drop_path_rate=0.2, pool_scales=[1, 2],
    auxiliary_channels=8, out_indices=[2, 3, 4, 5],
)  # fmt: skip


def trainer(
    data: Path, folder: Path, recipe: SegmentationRecipe = QUICK, backend: str = "numpy", changes=None, **options
) -> Trainer:
    """A trainer of a tiny model on `data`."""
    pairs = read_pairs(data, 0.2)
    config = BeitConfig(**{**MODEL, "id2label": dict(enumerate(pairs.names)), **(changes or {})})
    model = BeitForSemanticSegmentation(config, backend=backend, seed=0)
    folder.mkdir(exist_ok=True)
    objective = Segmentation(pairs, processor_for(config, None, recipe, False), recipe, config)
    return Trainer(model, objective, recipe, folder, **options)
