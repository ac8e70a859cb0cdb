"""Tokenizers from files and back: DALL-E's pickled modules, state dicts, Flava's codebook, minibeit's own folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.formats import Loaded, Tensors, load_file, write_safetensors
from ..checkpoint.formats.lazy_tensors import FLOATS
from ..errors import CheckpointError
from ..file_names import CONFIG_NAME, WEIGHTS_NAME, beside
from ..files import atomic_write
from ..hub import resolve
from ..loading_options import Loading
from ..strict_json import read_json
from .config import MODEL_TYPE, DalleTokenizerConfig
from .names import DALL_E, Half, check_half, find_halves, joined_config
from .params import param_shapes

MODEL_TYPES = (MODEL_TYPE, "flava_image_codebook")
ENDINGS = (".pkl", ".safetensors", ".pt", ".pth", ".bin")  # of the encoder's and the decoder's own files


def read_tokenizer(
    path: str | os.PathLike[str], dtype: str = "float32", loading: Loading | None = None
) -> tuple[DalleTokenizerConfig, dict[str, np.ndarray]]:
    """The config of a tokenizer and {canonical name: array of `dtype`}.

    `path` is a file, a folder or an id on the Hub.  A file holds an encoder and perhaps a decoder, under any prefix
    and beside any other tensors: the whole modules that DALL-E's authors published (read as data, nothing in them is
    run), their state dicts, Flava's codebook, or what `write_tokenizer` writes.  A folder holds `encoder.pkl` and, for
    images from tokens, `decoder.pkl` (or .pt, .pth, .bin, .safetensors), or one file as on the Hub.  The sizes are
    those of the tensors.  float32 tensors of mapped files are views of the file.
    Raises FileNotFoundError or CheckpointError: one sentence that names the file and what was expected and found.
    """
    place = resolve(path, loading)
    opened = [_open(file, loading) for file in _files(place)]
    try:
        found = [(loaded.tensors, half) for loaded in opened for half in find_halves(loaded.tensors)]
        config = _checked(joined_config(half for _, half in found), place)
        arrays: dict[str, np.ndarray] = {}
        names = [(tensors, check_half(tensors, half, config)) for tensors, half in found]  # all before any is read
        for tensors, of_half in names:
            arrays.update({canonical: _array(tensors, name, dtype) for canonical, name in of_half.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from None
    return config, {name: arrays[name] for name in param_shapes(config)}


def holds_tokenizer(path: str | os.PathLike[str], loading: Loading | None = None) -> bool:
    """Whether the file or folder, or the id on the Hub, is a tokenizer's, as far as its `config.json` or names say.

    Raises FileNotFoundError for a path that does not exist.
    """
    place = resolve(path, loading)
    if _files(place) != [place]:
        return True
    settings = beside(place, CONFIG_NAME)
    try:
        if settings.is_file():
            return _settings(settings).get("model_type") in MODEL_TYPES
        return place.is_file() and bool(find_halves(_open(place, loading).tensors))
    except CheckpointError:
        return False  # whoever reads it says what is wrong


def write_tokenizer(
    folder: str | os.PathLike[str], config: DalleTokenizerConfig, arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes `config.json` and `model.safetensors`: DALL-E's names below `encoder.` and `decoder.`, float32."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to save into, found a file")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for kind in ("encoder", "decoder"):
        places = Half(kind, f"{kind}.", DALL_E, {}).places(config)
        tensors.update({name: arrays[canonical] for canonical, (name, _) in places.items()})
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"}, dtype="float32")
    with atomic_write(folder / CONFIG_NAME) as file:
        file.write(config.to_json_string().encode())


def _files(place: Path) -> list[Path]:
    """The files of a tokenizer: those of its two halves where the folder has them, else the place itself."""
    if not place.is_dir():
        return [place]
    halves = [
        next((place / f"{kind}{ending}" for ending in ENDINGS if (place / f"{kind}{ending}").is_file()), None)
        for kind in ("encoder", "decoder")
    ]
    return [file for file in halves if file is not None] or [place]


def _open(file: Path, loading: Loading | None) -> Loaded:
    loading = loading or Loading()
    return load_file(file, variant=loading.variant, use_safetensors=loading.use_safetensors, weights=loading.weights)


def _checked(config: DalleTokenizerConfig, place: Path) -> DalleTokenizerConfig:
    """`config`, as the tensors have it, with the image size of a tokenizer's `config.json` beside them.

    Raises CheckpointError for a `config.json` that says something else than the tensors.
    """
    values = _settings(beside(place, CONFIG_NAME))
    if values.get("model_type") != MODEL_TYPE:
        return config
    try:
        stated = DalleTokenizerConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG_NAME}: {error}") from None
    for name, value in stated.to_dict().items():
        if name not in ("model_type", "image_size") and value != getattr(config, name):
            raise CheckpointError(f"{CONFIG_NAME} says {name} {value}, but the tensors have {getattr(config, name)}")
    return stated


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}


def _array(tensors: Tensors, name: str, dtype: str) -> np.ndarray:
    stored = tensors.info(name).dtype
    if stored not in FLOATS:
        raise CheckpointError(f"tensor {name} has dtype {stored}, expected floating-point weights")
    return tensors.read(name, dtype)
