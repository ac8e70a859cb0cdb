"""Matches the tensors that a model needs with those of a file: found, missing, of another shape, unexpected."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import BeitConfig
from ..errors import CheckpointError
from ..file_names import CONFIG_NAME
from ..params import param_shapes
from ..task_table import TASKS
from ..text import shown_name
from .dialects import Place
from .names import IGNORED, Naming

if TYPE_CHECKING:
    from .load import Checkpoint

SHOWN = 8  # how many names an error or a warning lists

# What a model may lack when the checkpoint was made for another task: its head, and norms that serve a head.
HEADS = (
    *(head for task in TASKS.values() for head in task.heads),
    "auxiliary_head",
    "norm",
    "beit.pooler",
    "beit.norm",
    "beit.embeddings.mask_token",
)
QUANTISED = (".absmax", ".quant_map", ".SCB", ".weight_format", ".qweight", ".qzeros")


@dataclass(frozen=True)
class Match:
    """The tensors that a model needs, matched with those of a file."""

    found: dict[str, Place]  # canonical name -> where it is in the file
    missing: dict[str, str]  # canonical name -> name it would have in the file
    mismatched: dict[str, str]  # canonical name -> "name: expected shape (2, 3), found (3, 2)"
    unexpected: list[str]  # names in the file that this model has no place for

    @property
    def complete(self) -> bool:
        """Every tensor found its place and every place its tensor."""
        return not (self.missing or self.mismatched or self.unexpected)


def match_names(tensors: Any, config: BeitConfig, task: str, naming: Naming) -> Match:
    """Finds the tensor of every parameter of `task`."""
    shapes = param_shapes(config, task)
    found, missing, mismatched, used = {}, {}, {}, set()
    for name, place in _with_shared_table(naming.places(shapes, tensors), config, naming, tensors).items():
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


def shares_table(match: Match) -> bool:
    """Whether every block uses a copy of the one bias table that the file's blocks share."""
    tables = [place.name for name, place in match.found.items() if name.endswith(".bias_table")]
    return len(tables) > len(set(tables))


def _with_shared_table(
    places: dict[str, Place | None], config: BeitConfig, naming: Naming, tensors: Collection[str]
) -> dict[str, Place | None]:
    """`places`, with the blocks' tables at the shared table if the file has only that and the model lacks it."""
    own = {name: place for name, place in places.items() if name.endswith(".bias_table") and place}
    present = any(place.name in tensors for place in own.values())
    if not own or present or config.use_shared_relative_position_bias:
        return places
    shared = naming.places(["beit.shared_bias_table"], tensors)["beit.shared_bias_table"]
    if shared is None or shared.name not in tensors:
        return places
    return {**places, **dict.fromkeys(own, shared)}


def check_match(match: Match, checkpoint: Checkpoint, task: str) -> None:
    """Raises CheckpointError for a checkpoint that is damaged or of another architecture.

    Warns about heads of other tasks, and about tensors of a larger model outside encoder and head.
    """
    path = checkpoint.path
    _refuse_what_is_no_plain_weight(match, checkpoint)
    if match.mismatched:
        raise CheckpointError(
            f"{path}: {listed(match.mismatched.values())}; does {CONFIG_NAME} belong to this file? "
            "(`ignore_mismatched_sizes=True` makes such tensors random, `image_size=` resizes position tensors)"
        )
    lost = [name for key, name in match.missing.items() if not key.startswith(HEADS) or _group_found(key, match)]
    if lost or not match.found:
        raise CheckpointError(
            f"{path}: {len(lost or match.missing)} tensors that the config asks for are missing: "
            f"{listed(lost or match.missing.values())}; `minibeit inspect` shows what is there"
        )
    heads, beside = _unused(match, checkpoint, task)
    # A backbone returns states from before the final norm, and transformers 4 saves none for its backbones.
    new = [place for name, place in match.missing.items() if not (task == "backbone" and name.startswith("beit.norm."))]
    if new:
        warnings.warn(
            f"{path} was made for another task: {len(new)} tensors start with random values and need "
            f"training: {listed(new)}",
            stacklevel=4,
        )
    if heads:
        warnings.warn(
            f"{path}: {len(heads)} tensors of another task's head are not used: {listed(heads)}", stacklevel=4
        )
    if beside:
        warnings.warn(
            f"{path}: {len(beside)} tensors do not belong to the model and are not used: {listed(beside)}", stacklevel=4
        )


def _unused(match: Match, checkpoint: Checkpoint, task: str) -> tuple[list[str], list[str]]:
    """Unexpected names that belong to other tasks' heads, and those outside the model.

    Raises CheckpointError for names within the encoder or the task's head: they mean another architecture.
    """
    naming = checkpoint.naming
    known = _names_of_other_heads(checkpoint.config, naming, checkpoint.tensors) if match.unexpected else set()
    rest = [name for name in match.unexpected if name not in known]
    has = {name.split(".")[0] for name in (*match.found, *match.missing)}  # no classifier where num_labels is 0
    # parts of such a head that the model lacks would mean another head of the same name
    stray = naming.within(rest, [head for head in TASKS[task].heads if head in has])
    if stray:
        raise CheckpointError(
            f"{checkpoint.path}: {len(stray)} tensors have no place in the model that the config describes: "
            f"{listed(stray)}"
        )
    return [name for name in match.unexpected if name in known], rest


def _refuse_what_is_no_plain_weight(match: Match, checkpoint: Checkpoint) -> None:
    lora = [name for name in match.unexpected if ".lora_" in name]
    if lora:
        raise CheckpointError(
            f"{checkpoint.path}: holds a LoRA adapter's layers in addition to the weights ({listed(lora[:2])}); call "
            "merge_and_unload() where it was trained and save the model, or give a folder with adapter_config.json"
        )
    quantised = [name for name in match.unexpected if name.endswith(QUANTISED) or ".quant_state." in name]
    settings = checkpoint.config.extra.get("quantization_config")
    if quantised or (settings is not None and match.mismatched):
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise CheckpointError(
            f"{checkpoint.path}: the weights are quantised ({method or listed(quantised[:2])}; quantization_config in "
            f"{CONFIG_NAME}), which is not read; load them with transformers, dequantize() the model and save it"
        )


def _group_found(name: str, match: Match) -> bool:
    """Whether other tensors of the same head exist, so that this one was lost rather than never saved."""
    head = next(head for head in HEADS if name.startswith(head))
    return any(found.startswith(head + ".") for found in match.found)


def _names_of_other_heads(config: BeitConfig, naming: Naming, present: Any) -> set[str]:
    """Names in the file of everything that any task may have outside the encoder's blocks."""
    names: set[str] = set()
    for shapes in every_variant(config):
        heads = [name for name in shapes if name.startswith(HEADS)]
        names.update(place.name for place in naming.places(heads, present).values() if place)
    return names


def every_variant(config: BeitConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """The parameters' shapes by canonical name, for every task and both places of the final norm, in a fixed order."""
    for variant in (config, config.replace(use_mean_pooling=not config.use_mean_pooling)):
        for task in TASKS:
            yield param_shapes(variant, task)


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more there are."""
    names = [shown_name(name) for name in names]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
