"""A checkpoint becomes a config and named arrays, every one of them accounted for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import BeitConfig
from ..errors import CheckpointError
from ..params import TASKS, param_shapes, random_arrays
from .formats import load_file
from .names import IGNORED, hub_names

SHOWN = 8  # how many names an error or a warning lists

# What a model may lack when the checkpoint was made for another task: its head, and norms that serve a head.
HEADS = ("classifier", "lm_head", "norm", "fpn", "decode_head", "auxiliary_head", "beit.pooler", "beit.norm")


@dataclass(frozen=True)
class Match:
    """What a model needs held against what a file has."""

    found: dict[str, str]  # canonical name -> name in the file
    missing: dict[str, str]  # canonical name -> name it would have in the file
    mismatched: dict[str, str]  # canonical name -> "expected (2, 3), found (3, 2)"
    unexpected: list[str]  # names in the file that this model has no place for

    @property
    def complete(self) -> bool:
        """Every tensor found its place and every place its tensor."""
        return not (self.missing or self.mismatched or self.unexpected)


def match_names(tensors: Any, config: BeitConfig, task: str) -> Match:
    """Finds the tensor of every parameter of `task` by its Hub name, with or without the prefix of the encoder."""
    shapes = param_shapes(config, task)
    prefixed = hub_names(shapes, config.model_type)
    bare = hub_names(shapes, bare=True)
    token = hub_names(["beit.embeddings.cls_token"], config.model_type).popitem()[1]
    names = prefixed if token in tensors else bare
    found, missing, mismatched = {}, {}, {}
    for name, shape in shapes.items():
        # transformers 5 saves a backbone's shared table with the prefix that all its other tensors lack
        file_name = next((n for n in (names[name], prefixed[name]) if n in tensors), None)
        if file_name is None:
            missing[name] = names[name]
        elif tensors.info(file_name).shape != shape:
            mismatched[name] = f"{file_name}: expected shape {shape}, found {tensors.info(file_name).shape}"
        else:
            found[name] = file_name
    used = set(found.values()) | {text.split(":")[0] for text in mismatched.values()}
    unexpected = [name for name in tensors if name not in used and not IGNORED.match(name)]
    return Match(found, missing, mismatched, unexpected)


def load_checkpoint(
    path: str | os.PathLike[str],
    task: str,
    dtype: str = "float32",
    seed: int | None = 0,
    config_overrides: Mapping[str, Any] | None = None,
) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """The config of a checkpoint and {canonical name: array of `dtype`} for `task`.

    `path` is a folder or a file with `config.json` beside it.  A head that the checkpoint does not have is drawn from
    `seed`, one that the model does not have is left out, both with a warning that lists the tensors; anything else that
    is missing, left over or of another shape raises CheckpointError.
    """
    path = Path(path)
    config = BeitConfig.from_pretrained(path if path.is_dir() else path.parent, **(config_overrides or {}))
    loaded = load_file(path)
    match = match_names(loaded.tensors, config, task)
    _check(match, path, config)
    arrays = {name: _array(loaded.tensors, file_name, dtype, path) for name, file_name in match.found.items()}
    shapes = param_shapes(config, task)
    arrays.update(random_arrays(config, {name: shapes[name] for name in match.missing}, seed, dtype))
    return config, arrays


def _check(match: Match, path: Path, config: BeitConfig) -> None:
    """Raises for a checkpoint that is damaged; warns about heads that were made for another task."""
    if match.mismatched:
        raise CheckpointError(f"{path}: {_listed(match.mismatched.values())}; does config.json belong to this file?")
    lost = [name for key, name in match.missing.items() if not key.startswith(HEADS) or _group_found(key, match)]
    if lost or not match.found:
        raise CheckpointError(
            f"{path}: {len(lost or match.missing)} tensors that the config asks for are missing: "
            f"{_listed(lost or match.missing.values())}; `minibeit inspect` shows what is there"
        )
    heads = _names_of_other_heads(config)
    stray = [name for name in match.unexpected if name not in heads]
    if stray:
        raise CheckpointError(
            f"{path}: {len(stray)} tensors have no place in the model that config.json describes: {_listed(stray)}"
        )
    if match.missing:
        warnings.warn(
            f"{path} was made for another task: {len(match.missing)} tensors start with random values and need "
            f"training: {_listed(match.missing.values())}",
            stacklevel=4,
        )
    if match.unexpected:
        warnings.warn(
            f"{path}: {len(match.unexpected)} tensors of another task's head are not used: {_listed(match.unexpected)}",
            stacklevel=4,
        )


def _group_found(name: str, match: Match) -> bool:
    """Whether other tensors of the same head are there, so that this one is lost rather than never made."""
    head = next(head for head in HEADS if name.startswith(head))
    return any(found.startswith(head + ".") for found in match.found)


def _names_of_other_heads(config: BeitConfig) -> set[str]:
    """Hub names of everything any task may have beside the encoder's blocks, under both prefixes."""
    changed = config.replace(use_mean_pooling=not config.use_mean_pooling)
    names = {
        name
        for variant in (config, changed)
        for task in TASKS
        for name in param_shapes(variant, task)
        if name.startswith(HEADS)
    }
    return {*hub_names(names, config.model_type).values(), *hub_names(names, bare=True).values()}


def _array(tensors: Any, name: str, dtype: str, path: Path) -> np.ndarray:
    stored = tensors.info(name).dtype
    if stored not in ("float16", "bfloat16", "float32", "float64"):
        raise CheckpointError(f"{path}: tensor {name} has dtype {stored}, expected floating-point weights")
    return np.asarray(tensors[name], dtype)


def _listed(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
