"""A checkpoint becomes a config and named arrays, every one of them accounted for."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import labels
from ..config import CONFIG_NAME, BeitConfig
from ..errors import CheckpointError
from ..params import TASKS, param_shapes, random_arrays
from ..strict_json import read_json
from .formats import PREPARED_NAME, Loaded, load_file
from .hub import resolve
from .infer import infer_config
from .names import IGNORED, Naming, Place, recognise
from .prepared import is_prepared
from .tensors import FLOATS

SHOWN = 8  # how many names an error or a warning lists

# What a model may lack when the checkpoint was made for another task: its head, and norms that serve a head.
HEADS = (
    "classifier",
    "lm_head",
    "norm",
    "fpn",
    "decode_head",
    "auxiliary_head",
    "beit.pooler",
    "beit.norm",
    "beit.embeddings.mask_token",
)

# Keywords of from_pretrained that say how to load rather than what to change in the config.
OPTIONS = ("dialect", "ignore_mismatched_sizes", "revision", "token")


@dataclass(frozen=True)
class Match:
    """What a model needs held against what a file has."""

    found: dict[str, Place]  # canonical name -> where it lies in the file
    missing: dict[str, str]  # canonical name -> name it would have in the file
    mismatched: dict[str, str]  # canonical name -> "name: expected shape (2, 3), found (3, 2)"
    unexpected: list[str]  # names in the file that this model has no place for

    @property
    def complete(self) -> bool:
        """Every tensor found its place and every place its tensor."""
        return not (self.missing or self.mismatched or self.unexpected)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its tensors, how they are named, its config, and what of that was assumed."""

    path: Path
    loaded: Loaded
    naming: Naming
    config: BeitConfig
    task: str | None  # what it was made for, as far as config and tensors tell
    assumed: list[str] = field(default_factory=list)  # one entry per setting that neither config nor shapes say

    @property
    def tensors(self) -> Any:
        return self.loaded.tensors


def open_checkpoint(
    path: str | os.PathLike[str],
    config_overrides: Mapping[str, Any] | None = None,
    dialect: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Checkpoint:
    """Opens a folder, a file of any format, or an id on the Hub; reads no tensor yet.

    The config is the `config.json` of the folder.  Where there is none (unilm, timm, plain state dicts) it is inferred
    from the shapes.  Raises FileNotFoundError or CheckpointError.
    """
    source = resolve(path, revision, token)
    loaded = load_file(source)
    if is_prepared(loaded):
        raise CheckpointError(
            f"{source}: is a prepared file ({loaded.metadata.get('layout')}), which only models load, on such a CPU "
            f"and by the name {PREPARED_NAME}; give the checkpoint that it was made from"
        )
    try:
        naming = recognise(loaded.tensors, dialect)
        file = (source if source.is_dir() else source.parent) / CONFIG_NAME
        values = _config_values(file) if file.is_file() else None
        if values is None:
            inferred = infer_config(loaded.tensors, naming, **(config_overrides or {}))
            config, named = _name_classes(inferred.config, inferred.task, loaded.extra)
            return Checkpoint(source, loaded, naming, config, inferred.task, [*inferred.assumed, *named])
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    config = labels.with_names(_config(file, values, config_overrides or {}), str(path))
    if config.num_hidden_layers > len(loaded.tensors):  # before lists are made as long as a stranger says
        raise CheckpointError(
            f"{source}: num_hidden_layers is {config.num_hidden_layers} in {CONFIG_NAME}, but the file has only "
            f"{len(loaded.tensors)} tensors"
        )
    return Checkpoint(source, loaded, naming, config, task_of(config, loaded.tensors, naming))


def load_checkpoint(
    path: str | os.PathLike[str],
    task: str,
    dtype: str = "float32",
    seed: int | None = 0,
    config_overrides: Mapping[str, Any] | None = None,
) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """The config of a checkpoint and {canonical name: array of `dtype`} for `task`.

    `path` is a folder, a file (with `config.json` beside it or none) or an id on the Hub such as
    "microsoft/beit-base-patch16-224".  Beside fields of the config, `config_overrides` takes `dialect` (overrides how
    the names are understood), `ignore_mismatched_sizes` (a tensor of another shape is drawn anew instead of refused),
    `revision` and `token` (for the Hub).
    A head that the checkpoint does not have is drawn from `seed`, one that the model does not have is left out, both
    with a warning that lists the tensors; anything else that is missing, left over or of another shape raises
    CheckpointError.  float32 tensors of mapped files are views of the file, not copies.
    """
    options = dict(config_overrides or {})
    chosen = {name: options.pop(name, None) for name in OPTIONS}
    checkpoint = open_checkpoint(path, options, chosen["dialect"], chosen["revision"], chosen["token"])
    if checkpoint.assumed:
        warnings.warn(
            f"{checkpoint.path} has no {CONFIG_NAME} of a BEiT: the config was inferred from the tensors, and assumed "
            f"were {'; '.join(checkpoint.assumed)}",
            stacklevel=3,
        )
    match = match_names(checkpoint.tensors, checkpoint.config, task, checkpoint.naming)
    redrawn = dict(match.missing)
    if chosen["ignore_mismatched_sizes"]:
        match, redrawn = _give_up_mismatched(match, checkpoint.path)
    check_match(match, checkpoint)
    shapes = param_shapes(checkpoint.config, task)
    _check_new({name: shapes[name] for name in redrawn}, checkpoint)
    arrays = read_arrays(checkpoint, match.found, dtype)
    arrays.update(random_arrays(checkpoint.config, {name: shapes[name] for name in redrawn}, seed, dtype))
    return checkpoint.config, {name: arrays[name] for name in shapes}


def match_names(tensors: Any, config: BeitConfig, task: str, naming: Naming | None = None) -> Match:
    """Finds the tensor of every parameter of `task`; `naming` defaults to what the tensors' names show."""
    naming = naming or recognise(tensors)
    shapes = param_shapes(config, task)
    found, missing, mismatched, used = {}, {}, {}, set()
    for name, place in naming.places(shapes, tensors).items():
        if place is None or place.name not in tensors:
            missing[name] = place.name if place else name
            continue
        used.add(place.name)
        expected, shape = place.stored_shape(shapes[name]), tensors.info(place.name).shape
        if shape == expected:
            found[name] = place
        else:
            mismatched[name] = f"{place.name}: expected shape {expected}, found {shape}"
    unexpected = [name for name in tensors if name not in used and not IGNORED.match(name)]
    return Match(found, missing, mismatched, unexpected)


def read_arrays(checkpoint: Checkpoint, places: Mapping[str, Place], dtype: str = "float32") -> dict[str, np.ndarray]:
    """{canonical name: array of `dtype`}; parts and transposes of a tensor are views of it."""
    arrays = {}
    last, array = "", np.zeros(0)
    for name, place in places.items():
        if place.name != last:  # query, key and value of unilm lie in one tensor, which is read once
            last, array = place.name, _array(checkpoint, place.name, dtype)
        arrays[name] = _laid_out(array, place.how)
    return arrays


def task_of(config: BeitConfig, tensors: Any, naming: Naming) -> str | None:
    """The task a checkpoint was made for: that of its architecture if the config names one, else that of its head."""
    names = {"BeitModel": "model", "Data2VecVisionModel": "model", "BeitBackbone": "backbone"}
    for ending, task in (
        ("ForMaskedImageModeling", "masked_image_modeling"),
        ("ForImageClassification", "image_classification"),
        ("ForSemanticSegmentation", "semantic_segmentation"),
    ):
        names.update({prefix + ending: task for prefix in ("Beit", "Data2VecVision", "FlaxBeit")})
    for architecture in config.architectures or ():
        if architecture in names:
            return names[architecture]
    for task in ("masked_image_modeling", "semantic_segmentation", "image_classification", "model"):
        match = match_names(tensors, config, task, naming)
        heads_alone = task == "model" and all(name.startswith(HEADS) for name in match.missing)
        if (heads_alone or not match.missing) and not match.mismatched:
            return task
    return None


def _config_values(file: Path) -> dict[str, Any] | None:
    """The content of a config.json; None when it is not a transformers one (timm's repositories have their own)."""
    try:
        values = read_json(file)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from None
    if isinstance(values, dict) and "architecture" in values and "hidden_size" not in values:
        return None
    return values


def _config(file: Path, values: dict[str, Any], overrides: Mapping[str, Any]) -> BeitConfig:
    try:
        return BeitConfig.from_dict(values, **overrides)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def _name_classes(config: BeitConfig, task: str, extra: Mapping[Any, Any]) -> tuple[BeitConfig, list[str]]:
    """Names for the classes of an inferred config: those the file carries (mmseg), else those of its data set."""
    if task not in ("image_classification", "semantic_segmentation"):
        return config, []
    meta = extra.get("meta")
    own = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if isinstance(own, (list, tuple)) and len(own) == config.num_labels and all(isinstance(n, str) for n in own):
        return config.replace(id2label={i: name.strip() for i, name in enumerate(own)}, label2id=None), []
    source = labels.source_of(task, config.num_labels)
    if source is None or not labels.unnamed(config):
        return config, []
    return labels.named(config, source), [f"class names of {source}"]


def _give_up_mismatched(match: Match, path: Path) -> tuple[Match, dict[str, str]]:
    """The match without its mismatched tensors, and all parameters that start anew."""
    if match.mismatched:
        warnings.warn(
            f"{path}: {len(match.mismatched)} tensors of another shape are not used, their parameters start with "
            f"random values: {listed(match.mismatched.values())}",
            stacklevel=4,
        )
    return Match(match.found, match.missing, {}, match.unexpected), {**match.missing, **match.mismatched}


def check_match(match: Match, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a checkpoint that is damaged; warns about heads that were made for another task."""
    path, naming, config = checkpoint.path, checkpoint.naming, checkpoint.config
    if match.mismatched:
        raise CheckpointError(
            f"{path}: {listed(match.mismatched.values())}; does {CONFIG_NAME} belong to this file? "
            "(`ignore_mismatched_sizes=True` draws such tensors anew, `minibeit convert` changes the image size)"
        )
    lost = [name for key, name in match.missing.items() if not key.startswith(HEADS) or _group_found(key, match)]
    if lost or not match.found:
        raise CheckpointError(
            f"{path}: {len(lost or match.missing)} tensors that the config asks for are missing: "
            f"{listed(lost or match.missing.values())}; `minibeit inspect` shows what is there"
        )
    if match.unexpected:
        heads = _names_of_other_heads(config, naming, checkpoint.tensors)
        stray = [name for name in match.unexpected if name not in heads]
        if stray:
            raise CheckpointError(
                f"{path}: {len(stray)} tensors have no place in the model that the config describes: {listed(stray)}"
            )
    if match.missing:
        warnings.warn(
            f"{path} was made for another task: {len(match.missing)} tensors start with random values and need "
            f"training: {listed(match.missing.values())}",
            stacklevel=4,
        )
    if match.unexpected:
        warnings.warn(
            f"{path}: {len(match.unexpected)} tensors of another task's head are not used: {listed(match.unexpected)}",
            stacklevel=4,
        )


def _check_new(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where a config asks for random weights out of all proportion to those of the file."""
    needed, found = 4 * sum(map(math.prod, shapes.values())), checkpoint.tensors.nbytes
    if needed > 16 * found + (64 << 20):  # a segmentation head on a single block has eleven times its weights
        raise CheckpointError(
            f"{checkpoint.path}: {CONFIG_NAME} asks for {needed:,} bytes of new weights beside the {found:,} of the "
            "file; does it belong to this file?"
        )


def _group_found(name: str, match: Match) -> bool:
    """Whether other tensors of the same head are there, so that this one is lost rather than never made."""
    head = next(head for head in HEADS if name.startswith(head))
    return any(found.startswith(head + ".") for found in match.found)


def _names_of_other_heads(config: BeitConfig, naming: Naming, present: Any) -> set[str]:
    """Names in the file of everything any task may have beside the encoder's blocks."""
    changed = config.replace(use_mean_pooling=not config.use_mean_pooling)
    names: set[str] = set()
    for variant in (config, changed):
        for task in TASKS:
            heads = [name for name in param_shapes(variant, task) if name.startswith(HEADS)]
            names.update(place.name for place in naming.places(heads, present).values() if place)
    return names


def _array(checkpoint: Checkpoint, name: str, dtype: str) -> np.ndarray:
    stored = checkpoint.tensors.info(name).dtype
    if stored not in FLOATS:
        raise CheckpointError(f"{checkpoint.path}: tensor {name} has dtype {stored}, expected floating-point weights")
    try:
        return checkpoint.tensors.read(name, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


def _laid_out(array: np.ndarray, how: str) -> np.ndarray:
    """The parameter in our layout: a view."""
    if how == "same":
        return array
    if how == "transpose":
        return array.T
    if how == "hwio":
        return array.transpose(3, 2, 0, 1)
    third, rows = int(how[0]), array.shape[0] // 3
    return array[third * rows : (third + 1) * rows]


def listed(names: Iterable[str]) -> str:
    """The first few of `names` and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
