"""Small coloured pictures of two or three kinds, and lists of them, for the tests of training."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import config
from PIL import Image

from minibeit import BeitForImageClassification, BeitImageProcessor
from minibeit.train.examples import read_examples
from minibeit.train.loop import Trainer, trainer_of
from minibeit.train.objective import Classification
from minibeit.train.recipes import Recipe
from minibeit.train.state import Stopped

COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
QUICK = Recipe(
    epochs=2, batch_size=4, lr=1e-2, floor=0.0, warmup=1, layer_decay=1.0, clip=1.0, rand_augment=None, erasing=0.25
)


def picture(path: Path, color: str, seed: int) -> Path:
    """A noisy picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-40, 41, (18, 20, 3))
    Image.fromarray((np.array(COLORS[color]) + noise).astype(np.uint8)).save(path)
    return path


def class_folders(folder: Path, count: int = 5, colors=("red", "green")) -> Path:
    """`count` pictures in a folder for each colour."""
    for c, color in enumerate(colors):
        for i in range(count):
            picture(folder / color / f"{i}.png", color, 100 * c + i)
    return folder


def trainer(
    data: Path,
    folder: Path,
    recipe: Recipe = QUICK,
    seed: int = 0,
    backend="numpy",
    dtype="float32",
    device=None,
    **options,
) -> Trainer:
    """A trainer of a tiny model on `data`."""
    examples = read_examples(data, 0.2)
    settings = config(
        num_hidden_layers=2,
        use_relative_position_bias=True,
        drop_path_rate=0.2,
        id2label=dict(enumerate(examples.names)),
        problem_type=examples.problem,
    )
    model = BeitForImageClassification(settings, backend=backend, seed=seed, dtype=dtype, device=device)
    folder.mkdir(exist_ok=True)
    objective = Classification(examples, BeitImageProcessor(size=16, resample=2), recipe, model.config.image_shape)
    return trainer_of(model)(model, objective, recipe, folder, **options)


def stopped_and_resumed(make: Callable[..., Trainer], step: int) -> Trainer:
    """A trainer that went on after another was stopped by SIGTERM behind `step`; `make(**options)` makes both."""
    stopped = make(tell=lambda progress: signal.raise_signal(signal.SIGTERM) if progress.step == step else None)
    with pytest.raises(Stopped, match=f"stopped after step {step} of {stopped.steps}"):
        stopped.run()
    again = make()
    again.resume()
    assert again.state.step == step
    again.run()
    return again
