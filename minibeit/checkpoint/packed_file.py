"""Prepared files: a model's weights as one backend packed them for one kind of CPU, ready to be mapped and used, or
weights of low precision for every CPU.

No other program can read them, so keep the checkpoint that they were made from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import BeitConfig
from ..errors import CheckpointError
from ..file_names import CONFIG_NAME, FOLDER_FILES, PREPARED_NAME
from .formats import Loaded, load_file, write_safetensors
from .travel import Origin, origin

FORMAT = "minibeit-prepared"  # the `format` in the file's metadata
_CACHE_LINE = 64


@dataclass(frozen=True)
class Prepared:
    """The content of a prepared file: `layout` identifies the backend and CPU that can use the arrays."""

    path: Path
    config: BeitConfig
    task: str
    layout: str
    dtype: str  # of the weights of layers
    arrays: dict[str, np.ndarray]  # views of the file
    origin: Origin

    def __reduce__(self) -> tuple[Any, ...]:
        return self.origin.again, ()


def write_prepared(
    folder: str | os.PathLike[str],
    config: BeitConfig,
    task: str,
    layout: str,
    arrays: Mapping[str, np.ndarray],
    dtype: str = "float32",
) -> None:
    """Writes `config.json` and `prepared.safetensors` into `folder`; each appears only when complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "layout": layout, "task": task, "dtype": dtype}
    write_safetensors(folder / PREPARED_NAME, arrays, metadata, alignment=_CACHE_LINE)
    config.save_pretrained(folder)


def prepared_file(path: str | os.PathLike[str]) -> Path | None:
    """The prepared file at `path`, or in the folder `path` if it has no other checkpoint; else None."""
    path = Path(path)
    if path.name == PREPARED_NAME and path.is_file():
        return path
    present = [name for name in FOLDER_FILES if (path / name).is_file()]
    return path / PREPARED_NAME if present == [PREPARED_NAME] else None


def read_prepared(file: Path, overrides: Mapping[str, Any] | None = None) -> Prepared:
    """The content of a prepared file, with the config beside it.  Raises CheckpointError."""
    loaded = load_file(file)
    metadata = loaded.metadata
    if not is_prepared(loaded) or not {"layout", "task"} <= set(metadata):
        raise CheckpointError(f"{file}: is not a prepared file of minibeit; `minibeit convert --prepared` makes one")
    try:
        config = BeitConfig.from_pretrained(file.parent, **(overrides or {}))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: cannot be used without a {CONFIG_NAME} next to it") from None
    arrays = {name: loaded.tensors.read(name, "float32") for name in loaded.tensors}
    source = origin(
        [file, file.parent / CONFIG_NAME], read_prepared, Path(os.path.abspath(file)), dict(overrides or {})
    )
    dtype = metadata.get("dtype", "float32")
    return Prepared(file, config, metadata["task"], metadata["layout"], dtype, arrays, source)


def is_prepared(loaded: Loaded) -> bool:
    """Whether an opened file is a prepared one."""
    return loaded.metadata.get("format") == FORMAT
