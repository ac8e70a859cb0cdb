"""The keywords that say where a checkpoint is and how to read it, shared by models, configs and processors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import unknown_keywords
from .file_names import variant_name

RESIZE_METHODS = ("unilm", "timm", "transformers")  # see checkpoint/resize.py

# Keywords of from_pretrained that are neither here nor fields of a config; named where one of them is misspelt.
MODEL_WORDS = ("dtype", "backend", "only", "num_threads", "device", "seed")
# Words of transformers that ask for what is always so here: no code of a checkpoint is run, weights are mapped.
ALWAYS_SO = {
    "trust_remote_code": (False, None),
    "low_cpu_mem_usage": (True, False, None),
    "weights_only": (True, None),
    "attn_implementation": ("eager", "sdpa", None),  # two ways to the same numbers
    "device_map": ("auto", "cpu", None),  # there is no second device to share a model with
}
HINTS = {
    "output_hidden_states": "give it to the call: model(pixel_values, output_hidden_states=True)",
    "output_attentions": "give it to the call: model(pixel_values, output_attentions=True)",
    "torch_dtype": "here it is called dtype",
    "attn_implementation": "there is one way of computing attention here",
    "device_map": "backend and device say where a model computes",
    "quantization_config": "quantised weights are not read; save the model dequantised",
    "load_in_8bit": "here it is dtype='int8'",
    "load_in_4bit": "quantised weights are not computed with",
    "use_auth_token": "here it is called token",
    "state_dict": "save the tensors to a file and give its path",
    "from_tf": "TensorFlow's files are not read; convert them to safetensors",
    "from_flax": "Flax's files are recognised automatically",
}


@dataclass(frozen=True)
class Where:
    """Which files to read.

    `revision` (branch, tag or commit), `token`, `cache_dir`, `local_files_only` and `force_download` are for the Hub.
    `subfolder` is the folder, within the given folder or repository, that holds all the files.
    """

    revision: str | None = None
    token: str | None = None
    subfolder: str = ""
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        parts = Path(self.subfolder or "").parts
        if ".." in parts or Path(self.subfolder or "").is_absolute():
            raise ValueError(f"subfolder: expected a folder within the checkpoint's, found {self.subfolder!r}")


FETCHED = Where(local_files_only=True)  # for what is asked of the Hub again by a program that has just asked


@dataclass(frozen=True)
class Loading(Where):
    """How a checkpoint is read.

    `variant` stands in the names of the weights, as in model.fp16.safetensors; `use_safetensors` True or False asks for
    such files or for others alone.  `weights` says which of several state dicts is meant: "model", "ema", or the key or
    prefix that it has in the file.  `dialect` overrides how names are understood.  `ignore_mismatched_sizes` draws
    tensors of another shape anew.  `resize_method` is for another image size (one of RESIZE_METHODS).
    """

    variant: str | None = None
    use_safetensors: bool | None = None
    weights: str | None = None
    dialect: str | None = None
    ignore_mismatched_sizes: bool = False
    resize_method: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant is not None:
            variant_name("", self.variant)
        if self.resize_method is not None and self.resize_method not in RESIZE_METHODS:
            raise ValueError(
                f"resize_method: expected one of {', '.join(RESIZE_METHODS)}, found {self.resize_method!r}"
            )


WHERE = tuple(field.name for field in dataclasses.fields(Where))
LOADING = tuple(field.name for field in dataclasses.fields(Loading))


def split_model_keywords(keywords: Mapping[str, Any], config_fields: Iterable[str]) -> tuple[Loading, dict[str, Any]]:
    """How to load, and the fields of the config (of those named) to replace.

    Raises TypeError, suggesting the nearest keyword, for one that is neither, and ValueError for an invalid value.
    """
    config_fields = tuple(config_fields)
    loading = {name: value for name, value in keywords.items() if name in LOADING}
    fields = {name: value for name, value in keywords.items() if name in config_fields}
    _refuse(keywords, (*LOADING, *config_fields), (*LOADING, *config_fields, *MODEL_WORDS))
    return Loading(**{name: value for name, value in loading.items() if value is not None}), fields


def split_keywords(keywords: Mapping[str, Any], known: Iterable[str]) -> tuple[Where, dict[str, Any]]:
    """Which files to read, and the settings among `known` to replace; `variant` is accepted but has no effect."""
    known = tuple(known)
    where = {name: value for name, value in keywords.items() if name in WHERE and value is not None}
    _refuse(keywords, (*WHERE, *known, "variant", "use_fast"), (*WHERE, *known))
    return Where(**where), {name: value for name, value in keywords.items() if name in known}


def _refuse(keywords: Mapping[str, Any], accepted: Iterable[str], known: Iterable[str]) -> None:
    unknown = [
        name for name, value in keywords.items()
        if name not in accepted and not (name in ALWAYS_SO and value in ALWAYS_SO[name])
    ]  # fmt: skip
    if unknown:
        raise unknown_keywords("from_pretrained", unknown, known, HINTS)
