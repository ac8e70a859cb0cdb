"""Loads a checkpoint as a config and named arrays; every tensor must be accounted for."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import CONFIG_FIELDS, BeitConfig
from ..errors import CheckpointError
from ..file_names import ADAPTER_CONFIG, ADAPTER_FILES, CONFIG_NAME, PREPARED_NAME, beside, folder_files
from ..hub import resolve
from ..loading_options import Loading, split_model_keywords
from ..params import param_shapes, random_arrays
from ..strict_json import read_json
from ..task_table import BY_HEAD, OF_ARCHITECTURE
from .class_names import name_classes, with_names
from .dialects import Place
from .formats import Loaded, Tensors, load_file
from .formats.lazy_tensors import FLOATS
from .match import HEADS, Match, check_match, listed, match_names, shares_table
from .names import Naming, namings, recognise, unwrapped_names
from .packed_file import is_prepared
from .travel import LoadedArrays, origin

if TYPE_CHECKING:
    from .adapter import Adapter

# Adapters, inference of configs and resizing are imported where they are needed, as most checkpoints need none of them.
__all__ = ["Checkpoint", "Match", "check_match", "listed", "load_checkpoint", "match_names", "open_checkpoint"]

GRID_TENSORS = ("bias_table", "position_embeddings")  # last parts of names whose shapes depend on the image size
OUTPUTS = ("classifier.", "lm_head.", "decode_head.classifier.", "auxiliary_head.classifier.")
OUTPUT_WORDS = {"num_labels", "id2label", "vocab_size"}  # fields that set the number of outputs


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its tensors, their naming, its config, and which settings were assumed."""

    path: Path
    loaded: Loaded
    naming: Naming
    config: BeitConfig
    task: str | None  # what it was made for, if config or tensors show it
    assumed: list[str] = field(default_factory=list)  # one entry per setting that neither config nor shapes determine
    others: tuple[str, ...] = ()  # keys or prefixes of other weights of such a model in the file
    adapter: Adapter | None = None  # merged into the tensors

    @property
    def tensors(self) -> Any:
        return self.loaded.tensors


def open_checkpoint(
    path: str | os.PathLike[str],
    config_overrides: Mapping[str, Any] | None = None,
    loading: Loading | None = None,
) -> Checkpoint:
    """Opens a folder, a file of any format, or an id on the Hub; reads no tensor yet.

    The config is the `config.json` of the folder.  Where there is none (unilm, timm, plain state dicts) it is inferred
    from the shapes.  A LoRA adapter in the folder is merged, with the weights beside it or, where there are none, with
    those of its base model.  Raises FileNotFoundError or CheckpointError.
    """
    loading = loading or Loading()
    return _interpreted(_read(path, loading), loading, config_overrides or {})


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint, opened; what they mean depends on the config's overrides."""

    asked: str  # the path or id that was given
    source: Path
    loaded: Loaded
    adapter: Adapter | None


def _read(path: str | os.PathLike[str], loading: Loading) -> _Files:
    source = resolve(path, loading)
    adapter = _adapter_in(source)
    if adapter is not None and not _is_whole(source, loading):
        from .adapter import base_of

        where = {name: getattr(loading, name) for name in ("token", "cache_dir", "local_files_only")}
        source = resolve(base_of(adapter), Loading(revision=adapter.settings.get("revision"), **where))
    loaded = _load_file(source, loading)
    if is_prepared(loaded):
        raise CheckpointError(
            f"{source}: is a prepared file ({loaded.metadata.get('layout')}), which can only be loaded as a model, on "
            f"that kind of CPU and under the name {PREPARED_NAME}; give the checkpoint that it was made from"
        )
    return _Files(str(path), source, loaded, adapter)


def _adapter_in(source: Path) -> Adapter | None:
    if not any((source / name).is_file() for name in (ADAPTER_CONFIG, *ADAPTER_FILES)):
        return None
    from .adapter import read_adapter

    return read_adapter(source)


def _interpreted(files: _Files, loading: Loading, overrides: Mapping[str, Any]) -> Checkpoint:
    source = files.source
    try:
        naming = recognise(files.loaded.tensors, loading.dialect, None if files.loaded.chosen else loading.weights)
        return _opened(files, naming, overrides)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(error).startswith(str(source)) else f"{source}: {error}") from None


def load_checkpoint(
    path: str | os.PathLike[str],
    task: str,
    dtype: str = "float32",
    seed: int | None = 0,
    config_overrides: Mapping[str, Any] | None = None,
) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """The config of a checkpoint and {canonical name: array of `dtype`} for `task`.

    `path` is a folder, a file (with or without a `config.json` beside it) or an id on the Hub such as
    "microsoft/beit-base-patch16-224".  `config_overrides` takes fields of the config and of `loading_options.Loading`.

    Three overrides change tensors, each with a warning: another `image_size` resizes position bias tables and position
    embeddings; another number of outputs (`num_labels`, `vocab_size`) draws the last layer at random;
    `use_relative_position_bias=True` with `use_shared_relative_position_bias=False` copies a shared table to every
    block.  A head that the checkpoint lacks is drawn from `seed`; tensors outside the encoder and the task's head are
    not used; both with a warning that lists the tensors.  Any other tensor that is missing, unexpected or of another
    shape raises CheckpointError.  float32 tensors of mapped files are views of the file, not copies.
    """
    loading, overrides = split_model_keywords(config_overrides or {}, CONFIG_FIELDS)
    opened = _read(path, loading)
    checkpoint = _interpreted(opened, loading, overrides)
    match = match_names(checkpoint.tensors, checkpoint.config, task, checkpoint.naming)
    size = overrides.pop("image_size", None)
    if size is not None and any(name.endswith(GRID_TENSORS) for name in match.mismatched):
        native = _interpreted(opened, loading, overrides)  # with the image size of its tensors
        native_match = match_names(native.tensors, native.config, task, native.naming)
        if not any(name.endswith(GRID_TENSORS) for name in native_match.mismatched):
            checkpoint, match = native, native_match
    _say_what_was_assumed(checkpoint)
    redrawn = dict(match.missing)
    if match.mismatched and (loading.ignore_mismatched_sizes or _outputs_alone(match, overrides)):
        match, redrawn = _give_up_mismatched(match, checkpoint.path)
    check_match(match, checkpoint, task)
    if shares_table(match):
        warnings.warn(
            f"{checkpoint.path}: the position bias table that all blocks share was copied to each of the "
            f"{checkpoint.config.num_hidden_layers} blocks, as fine-tuning starts",
            stacklevel=3,
        )
    shapes = param_shapes(checkpoint.config, task)
    _check_new({name: shapes[name] for name in redrawn}, checkpoint)
    arrays = read_arrays(checkpoint, match.found, dtype)
    arrays.update(random_arrays(checkpoint.config, {name: shapes[name] for name in redrawn}, seed, dtype))
    config = checkpoint.config
    if size is not None:
        config, arrays = _resized(config, arrays, size, loading.resize_method, checkpoint.path)
    files = [*checkpoint.loaded.files, *([checkpoint.path / CONFIG_NAME] if checkpoint.path.is_dir() else [])]
    source = origin(files, _arrays_again, os.path.abspath(path) if Path(path).exists() else path, task, dtype, seed,
                    dict(config_overrides or {}))  # fmt: skip
    return config, LoadedArrays({name: arrays[name] for name in shapes}, source)


def _arrays_again(*arguments: Any) -> dict[str, np.ndarray]:
    return load_checkpoint(*arguments)[1]


def _load_file(source: Path, loading: Loading) -> Loaded:
    """The opened file, with wrappers' prefixes removed from the tensors' names."""
    loaded = load_file(
        source, variant=loading.variant, use_safetensors=loading.use_safetensors, weights=loading.weights
    )
    plain = unwrapped_names(loaded.tensors)
    if not plain:
        return loaded
    return replace(loaded, tensors=Tensors({plain[name]: stored for name, stored in loaded.tensors.stored().items()}))


def _is_whole(folder: Path, loading: Loading) -> bool:
    """Whether a folder with an adapter also contains its base model."""
    weights = folder_files(loading.variant, loading.use_safetensors)
    return (folder / CONFIG_NAME).is_file() and any((folder / name).is_file() for name in weights)


def _opened(files: _Files, naming: Naming, overrides: Mapping[str, Any]) -> Checkpoint:
    source, loaded, adapter = files.source, files.loaded, files.adapter
    file = beside(source, CONFIG_NAME)
    values = _config_values(file) if file.is_file() else None
    task, assumed = None, []
    if values is None or _is_timm(values):
        from .infer import infer_config, timm_settings

        said = timm_settings(values) if values else {}
        inferred = infer_config(loaded.tensors, naming, said, **overrides)
        config, named = name_classes(inferred.config, inferred.task, loaded.extra, said.get("label_names"))
        task, assumed = inferred.task, [*inferred.assumed, *named]
    else:
        config = with_names(_config(file, values, overrides), files.asked)
        if config.num_hidden_layers > len(loaded.tensors):  # before lists of that length are made
            raise CheckpointError(
                f"num_hidden_layers is {config.num_hidden_layers} in {CONFIG_NAME}, but the file has only "
                f"{len(loaded.tensors)} tensors"
            )
    if adapter is not None:
        loaded = replace(loaded, tensors=adapter.merged(loaded.tensors, naming, config))
        from .adapter import saved_classes

        classes = saved_classes(adapter)
        if classes is not None:
            config = config.replace(architectures=None)  # those of the base model, which may have had another head
            if classes != config.num_labels and not OUTPUT_WORDS & set(overrides):
                config = config.replace(num_labels=classes)
            task = None
    prefixes = [each.outer + each.encoder for each in namings(loaded.tensors, naming.dialect.name)]
    others = (*loaded.others, *(prefix for prefix in prefixes if prefix != naming.outer + naming.encoder))
    task = task or task_of(config, loaded.tensors, naming)
    return Checkpoint(source, loaded, naming, config, task, assumed, others, adapter)


def _say_what_was_assumed(checkpoint: Checkpoint) -> None:
    if checkpoint.assumed:
        warnings.warn(
            f"{checkpoint.path} has no {CONFIG_NAME} of a BEiT: the config was inferred from the tensors, and assumed "
            f"were {'; '.join(checkpoint.assumed)}",
            stacklevel=4,
        )
    if checkpoint.others:
        key = checkpoint.loaded.wrapper or (checkpoint.naming.outer + checkpoint.naming.encoder).rstrip("./")
        warnings.warn(
            f"{checkpoint.path} holds several sets of weights: those under {key!r} were loaded, not those under "
            f"{listed(map(repr, checkpoint.others))}; weights='ema' or weights=KEY chooses others",
            stacklevel=4,
        )


def _outputs_alone(match: Match, overrides: Mapping[str, Any]) -> bool:
    """Whether only the last layer differs in shape, and another number of outputs was asked for."""
    return bool(OUTPUT_WORDS & set(overrides)) and all(name.startswith(OUTPUTS) for name in match.mismatched)


def _resized(
    config: BeitConfig, arrays: dict[str, np.ndarray], size: Any, method: str | None, path: Path
) -> tuple[BeitConfig, dict[str, np.ndarray]]:
    """Config and arrays for another image size, with a warning that says how; unchanged if the size is the same."""
    from .resize import resize_arrays, usual_method

    try:
        new = config.replace(image_size=size)
        if new.grid == config.grid:
            return new, arrays
        method = method or usual_method(config.grid, new.grid)
        changed, resized = resize_arrays(arrays, config, size, method)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    names = [name for name in arrays if name.endswith(GRID_TENSORS)]
    if names:
        warnings.warn(
            f"{path} is made for {config.image_shape[0]}x{config.image_shape[1]} pixels: {len(names)} position tensors "
            f"were resized to {new.image_shape[0]}x{new.image_shape[1]} by method {method!r} (resize_method= chooses)",
            stacklevel=4,
        )
    return changed, resized


def read_arrays(checkpoint: Checkpoint, places: Mapping[str, Place], dtype: str = "float32") -> dict[str, np.ndarray]:
    """{canonical name: array of `dtype`}; slices and transposes of a tensor are views of it."""
    arrays = {}
    last, array = "", np.zeros(0)
    for name, place in places.items():
        if place.name != last:  # query, key and value of unilm are one tensor, which is read once
            last, array = place.name, _array(checkpoint, place.name, dtype)
        arrays[name] = _laid_out(array, place.how)
    return arrays


def task_of(config: BeitConfig, tensors: Any, naming: Naming) -> str | None:
    """The task a checkpoint was made for, according to the config's `architectures` or else to its head."""
    for architecture in config.architectures or ():
        if architecture in OF_ARCHITECTURE:
            return OF_ARCHITECTURE[architecture]
    for task in (task for task in BY_HEAD if task != "backbone"):  # which may have an encoder's parameters alone
        match = match_names(tensors, config, task, naming)
        heads_alone = task == "model" and all(name.startswith(HEADS) for name in match.missing)
        if (heads_alone or not match.missing) and not match.mismatched:
            return task
    return None


def _config_values(file: Path) -> Any:
    """The content of a config.json."""
    try:
        return read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from None


def _is_timm(values: Any) -> bool:
    """Whether a config.json is timm's, which says little about the model, rather than transformers'."""
    return isinstance(values, dict) and "architecture" in values and "hidden_size" not in values


def _config(file: Path, values: dict[str, Any], overrides: Mapping[str, Any]) -> BeitConfig:
    try:
        return BeitConfig.from_dict(values, **overrides)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def _give_up_mismatched(match: Match, path: Path) -> tuple[Match, dict[str, str]]:
    """The match without its mismatched tensors, and all parameters to draw at random."""
    if match.mismatched:
        warnings.warn(
            f"{path}: {len(match.mismatched)} tensors of another shape are not used, their parameters start with "
            f"random values: {listed(match.mismatched.values())}",
            stacklevel=4,
        )
    return Match(match.found, match.missing, {}, match.unexpected), {**match.missing, **match.mismatched}


def _array(checkpoint: Checkpoint, name: str, dtype: str) -> np.ndarray:
    stored = checkpoint.tensors.info(name).dtype
    if stored not in FLOATS:
        raise CheckpointError(f"{checkpoint.path}: tensor {name} has dtype {stored}, expected floating-point weights")
    try:
        return checkpoint.tensors.read(name, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


def _laid_out(array: np.ndarray, how: str) -> np.ndarray:
    """The parameter in our layout, as a view."""
    if how == "same":
        return array
    if how == "transpose":
        return array.T
    if how == "hwio":
        return array.transpose(3, 2, 0, 1)
    third, rows = int(how[0]), array.shape[0] // 3
    return array[third * rows : (third + 1) * rows]


def _check_new(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a config asks for far more random weights than the file has weights."""
    needed, found = 4 * sum(map(math.prod, shapes.values())), checkpoint.tensors.nbytes
    if needed > 16 * found + (64 << 20):  # a segmentation head on a single block has eleven times its weights
        raise CheckpointError(
            f"{checkpoint.path}: {CONFIG_NAME} wants {needed:,} bytes of new weights in addition to the {found:,} of "
            "the file; does it belong to this file?"
        )
