"""The model that a training starts from, and whether this machine has the memory for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.load import load_checkpoint, open_checkpoint
from ..config import BeitConfig
from ..file_names import PROCESSOR_NAME, beside
from ..hub import resolve
from ..image_processor import BeitImageProcessor
from ..loading_options import FETCHED
from ..machine import available_memory
from ..ops import get_ops
from ..params import flatten, param_shapes
from ..tasks.image_classification import BeitForImageClassification
from .examples import Examples
from .recipes import PRESETS

HEAD_SCALE = 0.001  # of a new head's random weights, so that training begins at even odds (unilm's init_scale)
KEPT_WIDE, KEPT_MLP = 8, 3  # arrays of (N, D) and (N, F) that a block keeps for its backward
PASSING_MLP, PASSING_SCORES = 6, 2  # arrays of (N, F) and (H, N, N) that one block needs for a moment
SEGMENTATION, HEAD_MAPS, SCORE_MAPS = "semantic_segmentation", 22, 8  # UPerNet's (D, 4 gh, 4 gw), its loss's (K, h, w)


def from_checkpoint(
    path: str | os.PathLike[str],
    examples: Examples,
    *,
    drop_path: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    image_size: int | None = None,
    keep_classes: bool = False,
    num_threads: int | None = None,
    dtype: str = "float32",
    device: int | None = None,
) -> BeitForImageClassification:
    """A checkpoint as a classifier of the examples' classes.

    The position bias table that a checkpoint of masked modelling shares is copied to every block, its mask token and
    head are left out, and the pooling norm starts anew.  The head is new, near zero, unless `keep_classes`.
    Source: run_class_finetuning.py in microsoft/unilm beit.
    """
    get_ops(backend, None, dtype, device)  # reports a missing backend before gigabytes are read
    fields: dict[str, Any] = {"problem_type": examples.problem}
    if not keep_classes:
        fields.update(labels_of(examples.names))
    config = open_checkpoint(path).config
    config, arrays = adapted(path, config, BeitForImageClassification.task, fields, drop_path, image_size, seed)
    if not keep_classes:
        arrays.update(new_head(arrays["classifier.weight"].shape, config.initializer_range, seed))
    return BeitForImageClassification(
        config, backend=backend, num_threads=num_threads, dtype=dtype, device=device, arrays=arrays
    )


def from_scratch(
    source: str,
    examples: Examples,
    *,
    drop_path: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    image_size: int | None = None,
    num_threads: int | None = None,
    dtype: str = "float32",
    device: int | None = None,
) -> BeitForImageClassification:
    """A model of random weights: a preset's name, or the `config.json` that says what it is made of."""
    fields = {"problem_type": examples.problem, **labels_of(examples.names)}
    config = config_of(source, PRESETS)
    config = config.replace(**fields, **given(drop_path_rate=drop_path, image_size=image_size))
    return BeitForImageClassification(
        config, seed=seed, backend=backend, num_threads=num_threads, dtype=dtype, device=device
    )


def config_of(source: str, presets: Mapping[str, Mapping[str, Any]]) -> BeitConfig:
    """The config of a model to be trained from random weights: a preset's name, or a `config.json`."""
    if source in presets:
        return BeitConfig(**presets[source])
    if not Path(source).exists():
        raise FileNotFoundError(f"{source}: expected a config.json or one of {', '.join(presets)}")
    return BeitConfig.from_pretrained(source)


def given(**fields: Any) -> dict[str, Any]:
    """Those of the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def adapted(
    path: str | os.PathLike[str],
    config: BeitConfig,
    task: str,
    fields: Mapping[str, Any],
    drop_path: float | None,
    image_size: int | None,
    seed: int,
) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """The config and arrays of a checkpoint as fine-tuning for `task` begins, with `fields` of its config replaced.

    A position bias table that the blocks share is copied to each of them, and the mask token is left out.
    """
    if config.use_shared_relative_position_bias:
        fields = {**fields, "use_relative_position_bias": True, "use_shared_relative_position_bias": False}
    size = None if config.image_shape == (image_size, image_size) else image_size
    changes = {**fields, **given(drop_path_rate=drop_path, image_size=size), "local_files_only": True}
    config, loaded = load_checkpoint(path, task, "float32", seed, changes)
    arrays = {name: array for name, array in loaded.items() if name != "beit.embeddings.mask_token"}
    return config.replace(use_mask_token=False), arrays


def new_head(shape: tuple[int, int], spread: float, seed: int) -> dict[str, np.ndarray]:
    """A random classifier near zero, (K, D), whose first answers are even odds."""
    K, D = shape
    weight = HEAD_SCALE * spread * np.random.default_rng([seed, K]).standard_normal((K, D))
    return {"classifier.weight": weight.astype(np.float32), "classifier.bias": np.zeros(K, np.float32)}


def processor_for(config: BeitConfig, checkpoint: str | os.PathLike[str] | None) -> BeitImageProcessor:
    """The image processor of a checkpoint that was loaded, at the size of the config; without one, straight to that
    size by bicubic."""
    height, width = config.image_shape
    size = {"height": height, "width": width}
    file = None if checkpoint is None else beside(resolve(checkpoint, FETCHED), PROCESSOR_NAME)
    if file is None or not file.is_file():
        half = [0.5] * config.num_channels
        return BeitImageProcessor(size=size, image_mean=half, image_std=half)
    processor = BeitImageProcessor.from_pretrained(file)
    made = processor.crop_size if processor.do_center_crop else processor.size
    if made != size:
        crop = {"crop_size": size} if processor.do_center_crop else {}
        processor = BeitImageProcessor.from_dict({**processor.to_dict(), "size": size, **crop})
    return processor


def frozen_patterns(words: Sequence[str], config: BeitConfig) -> tuple[str, ...]:
    """Patterns of parameter names: "encoder" is all but the pooling norm and the head, a number N the embeddings and
    the first N blocks, anything else a pattern itself."""
    found: list[str] = []
    for word in words:
        if word == "encoder":
            found += ["beit.embeddings.*", "beit.encoder.*"]
        elif word.isdecimal():
            if int(word) > config.num_hidden_layers:
                raise ValueError(f"freeze: the model has {config.num_hidden_layers} blocks, found {word}")
            found += ["beit.embeddings.*", *(f"beit.encoder.{i}.*" for i in range(int(word)))]
        else:
            found.append(word)
    return tuple(found)


def labels_of(names: Sequence[str]) -> dict[str, Any]:
    """The fields of a config that name its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


# Memory ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """The bytes that a training takes: what does not depend on the batch, and what each picture of a piece adds."""

    fixed: int
    per_picture: int

    def total(self, pictures: int) -> int:
        """All bytes for pieces of that many pictures."""
        return self.fixed + pictures * self.per_picture


def memory_needed(config: BeitConfig, average: bool, recompute: bool, task: str) -> Need:
    """Weights, gradients, two moments, temporaries of a step, and the arrays that the backward needs, in float32.

    At the most: where nothing needs them all, each gradient is dropped at once (see `EarlyStep`).
    The numbers of arrays that a block keeps and passes were measured on the NumPy backend, rounded up.  With
    `recompute` one block keeps them at a time, and every block its input.
    """
    numbers = sum(int(np.prod(shape)) for shape in param_shapes(config, task).values())
    gh, gw = config.grid
    N, D, F, H = gh * gw + 1, config.hidden_size, config.intermediate_size, config.num_attention_heads
    L = config.num_hidden_layers
    block = 4 * (KEPT_WIDE * N * D + KEPT_MLP * N * F)
    passing = 4 * (PASSING_MLP * N * F + PASSING_SCORES * H * N * N)
    pixels = 3 * 4 * config.num_channels * config.image_shape[0] * config.image_shape[1]
    kept = block + 4 * L * N * D if recompute else L * block
    if task == SEGMENTATION:
        height, width = config.image_shape
        kept += 4 * (HEAD_MAPS * D * 16 * gh * gw + SCORE_MAPS * config.num_labels * height * width)
    return Need(4 * numbers * (6 if average else 5), kept + passing + pixels)


def check_memory(
    config: BeitConfig,
    batch_size: int,
    accumulate: int,
    average: bool,
    recompute: bool,
    task: str,
    smallest_piece: int = 1,
    processes: int = 1,
) -> str:
    """A sentence about the memory that training a model of `task` will take, in pieces of some images at least.

    `processes` are as many as do the same on this machine.

    Raises ValueError, with what would fit, where it is more than there is.
    """
    need, there = memory_needed(config, average, recompute, task), available_memory()
    if there is not None:
        there //= processes
    each = " in each rank" if processes > 1 else ""
    piece = -(-batch_size // accumulate)
    total = need.total(piece)
    if there is None or total <= there:
        return f"the training will take about {total / 1e9:.1f} GB of memory{each}"
    fits = (there - need.fixed) // need.per_picture
    if fits >= smallest_piece:
        advice = f"--accumulate {-(-batch_size // fits)} fits, which computes {fits} pictures at a time"
    elif not recompute:
        advice = "try --recompute, or a smaller model"
    else:
        advice = "the model is too large for this machine"
    raise ValueError(
        f"memory: pieces of {piece} pictures will take about {total / 1e9:.1f} GB, found {there / 1e9:.1f} GB{each}; "
        f"{advice}"
    )


def check_device_memory(
    config: BeitConfig, batch_size: int, accumulate: int, average: bool, recompute: bool, task: str, device: int
) -> str:
    """A sentence about the memory of a GPU that training will take, at the most: in half precision it is less.

    Raises ValueError where it does not even hold the weights, their moments and gradients.
    """
    from ..ops.cupy_gpu.device import memory_limit

    need, there = memory_needed(config, average, recompute, task), memory_limit(device)
    if need.fixed > there:
        raise ValueError(
            f"memory: weights, gradients and moments take {need.fixed / 1e9:.1f} GB, GPU {device} has "
            f"{there / 1e9:.1f} GB; train a smaller model"
        )
    total = need.total(-(-batch_size // accumulate))
    fits = max((there - need.fixed) // need.per_picture, 1)
    advice = f"; if it does not fit, --accumulate {-(-batch_size // fits)} will" if total > there else ""
    return f"the training will take up to {total / 1e9:.1f} GB of the {there / 1e9:.1f} GB of GPU {device}{advice}"


def parameters_learned(model: Any, frozen: Sequence[str]) -> int:
    """How many numbers a training changes."""
    from .gradients import matching

    named = flatten(model.plain_params)
    left_out = matching(named, frozen)
    return sum(array.size for name, array in named.items() if name not in left_out and ".running_" not in name)
