"""Small trainings of every kind, for the tests of ranks.

As a program, one rank: `mpiexec -n 2 python tests/rank_trainers.py KIND DATA FOLDER DTYPE RECIPE [stop STEP | resume]`,
RECIPE being JSON, trains and writes what it holds in the end to FOLDER/rank0.npz, rank1.npz, ...
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_data
from cli_helpers import config
from colour_tokenizer import colour_tokenizer
from training_data import QUICK, class_folders

from minibeit import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
)
from minibeit.tokenizer.config import DalleTokenizerConfig
from minibeit.tokenizer.tokenizer import DalleTokenizer
from minibeit.train.discrete_vae import DiscreteVae, ImageReconstruction
from minibeit.train.examples import read_examples, read_images
from minibeit.train.label_maps import read_pairs
from minibeit.train.loop import Trainer, trainer_of
from minibeit.train.objective import Classification
from minibeit.train.pretraining import MaskedModeling, initial_arrays, processor_for
from minibeit.train.ranks import Ranks
from minibeit.train.recipes import PretrainingRecipe, TokenizerRecipe
from minibeit.train.segmentation import Segmentation
from minibeit.train.segmentation import processor_for as processor_for_maps
from minibeit.train.state import Stopped

KINDS = ("classification", "masked modelling", "segmentation", "tokenizer")
RATES = dict(drop_path_rate=0.2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
BUCKET = 1 << 12  # bytes, so that a small model has many buckets


def save_data(kind: str, folder: Path) -> Path:
    """Images for one kind of training, 20 of them to learn from."""
    return segmentation_data.pair_folder(folder, 25) if kind == "segmentation" else class_folders(folder, 13)


def trainer(kind: str, data: Path, folder: Path, dtype: str, changes: dict[str, Any], **options: Any) -> Trainer:
    """A trainer whose noise, augmentation, mixing and clipping are all on."""
    changes = {"batch_size": 8, "epochs": 2, "clip": 1.0, **changes}
    made = _MAKE[kind](data, dtype, changes.pop("backend", "numpy"), changes)
    ranks = options.get("ranks", Ranks())
    if ranks.first:
        folder.mkdir(exist_ok=True)
    result = trainer_of(made[0])(*made, folder, **options)
    if result.sums is not None:
        result.sums = type(result.sums)(result.optimizer.slots, result.optimizer.weights.dtype, ranks, BUCKET)
    return result


def _classifier(data: Path, dtype: str, backend: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    examples = read_examples(data, 0.2)
    settings = config(num_hidden_layers=2, use_relative_position_bias=True, id2label=dict(enumerate(examples.names)),
                      problem_type=examples.problem, **RATES)  # fmt: skip
    recipe = dataclasses.replace(QUICK, **{"mixup": 0.8, "cutmix": 1.0, "average": 0.5, **changes})
    model = BeitForImageClassification(settings, backend=backend, seed=0, dtype=dtype)
    processor = BeitImageProcessor(size=16, resample=2)
    return model, Classification(examples, processor, recipe, settings.image_shape), recipe


def _masked(data: Path, dtype: str, backend: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    tokenizer = colour_tokenizer(2)
    settings = config(num_hidden_layers=2, vocab_size=tokenizer.config.vocab_size, use_mask_token=True,
                      use_shared_relative_position_bias=True, **RATES)  # fmt: skip
    recipe = PretrainingRecipe(**{"lr": 5e-3, "warmup": 1, "masked": 0.4, "color": 0.2, **changes})
    model = BeitForMaskedImageModeling(
        settings, arrays=initial_arrays(settings, 0, dtype), backend=backend, dtype=dtype
    )
    examples = read_images(data, 0.2)
    return model, MaskedModeling(examples, processor_for(settings, recipe), recipe, settings, tokenizer), recipe


def _segmenter(data: Path, dtype: str, backend: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    pairs = read_pairs(data, 0.2)
    settings = BeitConfig(**{**segmentation_data.MODEL, **RATES, "id2label": dict(enumerate(pairs.names))})
    recipe = dataclasses.replace(segmentation_data.QUICK, **changes)
    model = BeitForSemanticSegmentation(settings, backend=backend, seed=0, dtype=dtype)
    return model, Segmentation(pairs, processor_for_maps(settings, None, recipe, False), recipe, settings), recipe


def _tokenizer(data: Path, dtype: str, backend: str, changes: dict[str, Any]) -> tuple[Any, ...]:
    settings = DalleTokenizerConfig(
        num_groups=2, num_blocks_per_group=1, hidden_size=16, vocab_size=12, n_init=8, image_size=16
    )
    recipe = TokenizerRecipe(**{"lr": 3e-3, "warmup": 0.5, **changes})
    model = DiscreteVae(DalleTokenizer(settings, seed=1, dtype=dtype, backend=backend))
    return model, ImageReconstruction(read_images(data, 0.2), recipe, settings, (16, 16)), recipe


_MAKE = dict(zip(KINDS, (_classifier, _masked, _segmenter, _tokenizer)))


def main(kind: str, data: str, folder: str, dtype: str, changes: str, word: str = "", step: str = "0") -> None:
    """One rank of MPI's world."""
    from minibeit.train.mpi import world

    def tell(progress: Any) -> None:
        if word == "stop" and progress.step == int(step):
            signal.raise_signal(signal.SIGTERM)  # reaches the first rank alone

    ranks = world()
    made = trainer(kind, Path(data), Path(folder), dtype, json.loads(changes), ranks=ranks, tell=tell)
    made.objective.held_out = ()  # tested with threads
    if word == "resume":
        made.resume()
    first = made.state.step
    try:
        made.run()
    except Stopped:
        assert word == "stop"
    facts = {"handed over": np.array([ranks.handed_over, made.state.step - first])}
    np.savez(Path(folder) / f"rank{ranks.rank}.npz", **made._vectors(), **facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
