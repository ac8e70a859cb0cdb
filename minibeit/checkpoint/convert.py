"""Converts any checkpoint to a folder in the Hub's layout, which minibeit and transformers read."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..catalogue import manifest
from ..config import CONFIG_FIELDS, BeitConfig
from ..errors import CheckpointError
from ..file_names import CONFIG_NAME, PREPARED_NAME, PROCESSOR_NAME, WEIGHTS_NAME, beside
from ..files import scratch_folder
from ..loading_options import split_model_keywords
from ..params import BATCH_NORM_EPS, count_parameters, param_shapes, random_arrays
from ..strict_json import read_json
from ..task_table import TASKS, checked_task
from .load import Checkpoint, Match, check_match, listed, match_names, open_checkpoint, read_arrays
from .names import IGNORED
from .resize import resize_arrays, share_to_blocks
from .save import FILE_DTYPES, save_checkpoint


@dataclass(frozen=True)
class Conversion:
    """What was written, and the decisions made."""

    folder: Path
    config: BeitConfig
    task: str
    notes: list[str] = field(default_factory=list)  # one sentence each


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    task: str | None = None,
    dialect: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize_method: str = "unilm",
    dtype: str = "float32",
    force: bool = False,
    seed: int = 0,
    finish: Callable[[Path, str], None] | None = None,
    **config_overrides: Any,
) -> Conversion:
    """Writes the checkpoint `source` (file, folder or Hub id) to the folder `destination`: config, weights, processor.

    `task` defaults to the one the checkpoint was made for, without parts that it lacks.  For another task the missing
    head is drawn from `seed`, and a bias table shared by all blocks is copied to each, as at the start of fine-tuning.
    `image_size` resizes position bias tables and position embeddings (see `resize.resize_arrays`).  `finish` is called
    with the written folder and its task, and may change it, before it is moved into place.  The folder appears only
    when it is complete.
    Raises FileExistsError for a destination that is not empty unless `force`, FileNotFoundError, CheckpointError and
    ValueError.
    """
    destination = Path(destination)
    if dtype not in FILE_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(FILE_DTYPES)}, found {dtype!r}")
    if task is not None:
        checked_task(task)
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination}: is a file; give a folder to write to")
    if destination.exists() and any(destination.iterdir()) and not force:
        raise FileExistsError(f"{destination}: the folder is not empty; give another one, or --force to write into it")
    loading, fields = split_model_keywords({**config_overrides, "dialect": dialect}, CONFIG_FIELDS)
    checkpoint = open_checkpoint(source, fields, loading=loading)
    task = task or checkpoint.task
    if task is None:
        raise CheckpointError(f"{checkpoint.path}: neither config nor tensors show its task; give --task")
    notes = _found(checkpoint)
    match = _match(checkpoint, task, notes)
    config, arrays = checkpoint.config, read_arrays(checkpoint, match.found)
    if match.missing and task != checkpoint.task:
        notes.append(f"{len(match.missing)} tensors start with random values: {listed(match.missing)}")
        shapes = param_shapes(config, task)
        arrays.update(random_arrays(config, {name: shapes[name] for name in match.missing}, seed, "float32"))
    fine_tuned = task in ("image_classification", "semantic_segmentation") and checkpoint.task != task
    if fine_tuned and config.use_shared_relative_position_bias:
        config, arrays = share_to_blocks(arrays, config)
        notes.append(f"the shared position bias table was copied to each of the {config.num_hidden_layers} blocks")
    old = config.image_shape
    if image_size is not None:
        config, arrays = resize_arrays(arrays, config, image_size, resize_method)
        notes.append(f"resized from {_by(old)} to {_by(config.image_shape)} pixels by method {resize_method}")
    config = config.replace(architectures=(TASKS[task].architecture(config.model_type),))
    if config.add_fpn and "batch_norm_eps" not in config.extra:
        # transformers 4 reads it and has no default
        config = config.replace(extra={**config.extra, "batch_norm_eps": BATCH_NORM_EPS})
    if config.feature_convention == "unilm":
        notes.append(
            'config: feature_convention is "unilm", the blocks it was trained with; transformers, which does not know '
            "the setting, takes others and scores lower"
        )
    processor = _processor(checkpoint, str(source), old, config.image_shape, notes)
    arrays = {name: arrays[name] for name in param_shapes(config, task) if name in arrays}
    _write(destination, config, task, arrays, dtype, _counters(checkpoint, match), processor, finish)
    notes.append(f"wrote {count_parameters(config, task):,} parameters as {dtype}")
    return Conversion(destination, config, task, notes)


def _found(checkpoint: Checkpoint) -> list[str]:
    naming, config = checkpoint.naming, checkpoint.config
    wrapper = f", under the key {checkpoint.loaded.wrapper!r}" if checkpoint.loaded.wrapper else ""
    notes = [
        f"found {len(checkpoint.tensors)} tensors ({checkpoint.loaded.format}{wrapper}) named as by "
        f"{naming.dialect.software}",
        f"found {config.num_hidden_layers} blocks of width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{_by(config.image_shape)} pixels, made for {checkpoint.task or 'no task that is known'}",
    ]
    if checkpoint.others:
        notes.append(f"other weights of such a model in it are left: {listed(map(repr, checkpoint.others))}")
    if checkpoint.adapter is not None:
        notes.append(f"the LoRA adapter of {checkpoint.adapter.folder} was merged into the weights")
    if checkpoint.assumed:
        notes.append(f"there is no config; inferred from the tensors, and assumed: {'; '.join(checkpoint.assumed)}")
    return notes


def _match(checkpoint: Checkpoint, task: str, notes: list[str]) -> Match:
    """The checked match with `task`; unused and new tensors become notes instead of warnings."""
    match = match_names(checkpoint.tensors, checkpoint.config, task, checkpoint.naming)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_match(match, checkpoint, task)
    if match.missing and task == checkpoint.task:
        notes.append(f"{len(match.missing)} tensors are missing and were left out: {listed(match.missing)}")
    ignored = sum(IGNORED.match(name) is not None for name in checkpoint.tensors)
    if ignored:
        notes.append(f"{ignored} tensors are index tables or step counters, which carry no learned number")
    if match.unexpected:
        count, names = len(match.unexpected), listed(match.unexpected)
        notes.append(f"{count} tensors of another head, or outside the model, are not used: {names}")
    return match


def _counters(checkpoint: Checkpoint, match: Match) -> dict[str, np.ndarray]:
    """The step counters of PyTorch's batch norms, by the canonical name of the running variance."""
    found = {}
    for name, place in match.found.items():
        counter = place.name.replace("running_var", "num_batches_tracked")
        if name.endswith(".running_var") and counter in checkpoint.tensors:
            found[name] = checkpoint.tensors[counter]
    return found


def _processor(
    checkpoint: Checkpoint, source: str, old: tuple[int, int], new: tuple[int, int], notes: list[str]
) -> dict[str, Any] | None:
    """The image processor's settings for the new image size, from the source's folder or else the manifest."""
    file = beside(checkpoint.path, PROCESSOR_NAME)
    known = manifest()
    entry = known.get(source) or known.get(Path(source).stem) or known.get(f"timm/{Path(source).stem}")
    if file.is_file():
        try:
            settings = read_json(file)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from None
        if not isinstance(settings, dict):
            raise CheckpointError(f"{file}: expected a mapping of settings, found {type(settings).__name__}")
    elif entry is not None:
        settings = {"image_processor_type": "BeitImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255}
        settings.update(entry["preprocessing"])
        notes.append(f"{PROCESSOR_NAME} is that of the manifest")
    else:
        notes.append(f"no {PROCESSOR_NAME} was written: nothing tells how images were prepared")
        return None
    if old != new:
        try:
            scaled = {key: _scaled(settings[key], old, new) for key in ("size", "crop_size") if key in settings}
        except (TypeError, ValueError, OverflowError):
            raise CheckpointError(f"{file}: size and crop_size: expected numbers of pixels") from None
        settings = {**settings, **scaled}
    return settings


def _scaled(size: Any, old: tuple[int, int], new: tuple[int, int]) -> Any:
    """A size of the image processor, scaled like the model's image size."""
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return {"height": round(size["height"] * new[0] / old[0]), "width": round(size["width"] * new[1] / old[1])}
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return {"shortest_edge": round(size["shortest_edge"] * min(new) / min(old))}
    if isinstance(size, int) and new[0] == new[1]:
        return round(size * new[0] / old[0])
    return {"height": new[0], "width": new[1]}


def _write(
    destination: Path,
    config: BeitConfig,
    task: str,
    arrays: Mapping[str, np.ndarray],
    dtype: str,
    counters: Mapping[str, np.ndarray],
    processor: dict[str, Any] | None,
    finish: Callable[[Path, str], None] | None,
) -> None:
    """Fills a folder beside `destination` and moves it into place, or only its files if `destination` exists."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(destination) as temporary:
        made = temporary / "made"
        save_checkpoint(made, config, task, arrays, dtype, counters)
        if processor is not None:
            (made / PROCESSOR_NAME).write_text(json.dumps(processor, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if finish is not None:
            finish(made, task)
        if not destination.exists():
            shutil.move(made, destination)
            return
        for name in (WEIGHTS_NAME, PREPARED_NAME, PROCESSOR_NAME, CONFIG_NAME):
            if (made / name).exists():
                os.replace(made / name, destination / name)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
