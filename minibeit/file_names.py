"""The names of the files of a checkpoint's folder, as the Hub, PEFT and minibeit have them; endings of images."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
PREPARED_NAME = "prepared.safetensors"  # see checkpoint/packed_file.py
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# In a folder, the first of these that is there is read.
FOLDER_FILES = (
    WEIGHTS_NAME,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
    PREPARED_NAME,
)
# Endings, in lower case, of the files in a folder that are taken for images.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".pgm", ".ppm"),
    *(".pbm", ".pnm", ".tga", ".jp2", ".avif", ".ico"),
)
VARIANT = re.compile(r"[\w-]+")


def variant_name(name: str, variant: str | None) -> str:
    """A file's name with the variant before its ending, as transformers writes it: model.fp16.safetensors.

    Raises ValueError for a variant that cannot be part of a name.
    """
    if not variant:
        return name
    if not isinstance(variant, str) or not VARIANT.fullmatch(variant):
        raise ValueError(f"variant: expected a word such as 'fp16', found {variant!r}")
    stem, dot, ending = name.rpartition(".")
    return f"{stem}.{variant}{dot}{ending}"


def beside(checkpoint: Path, name: str) -> Path:
    """The path of the file `name` in a checkpoint's folder, or in the folder that holds a checkpoint's one file."""
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / name


def folder_files(variant: str | None = None, use_safetensors: bool | None = None) -> tuple[str, ...]:
    """The names under which weights are looked for in a folder, the first that is there is read."""
    kinds = [
        name for name in FOLDER_FILES if use_safetensors is None or (".safetensors" in name) == bool(use_safetensors)
    ]
    return tuple(variant_name(name, variant) for name in kinds)
