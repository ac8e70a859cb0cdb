"""Writes a model as the Hub has it: `config.json` and `model.safetensors` under transformers' names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..config import BeitConfig
from .formats import write_safetensors
from .names import hub_names

WEIGHTS_NAME = "model.safetensors"
BARE_TASKS = ("model", "backbone")  # their files have no `beit.` in front of the names


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: BeitConfig,
    task: str,
    arrays: Mapping[str, np.ndarray],
    dtype: str = "float32",
) -> None:
    """Writes `arrays` ({canonical name: array}) and `config` into `folder`; each file appears only when complete.

    `dtype` of the file: "float32", "float16" or "bfloat16".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = hub_names(arrays, config.model_type, bare=task in BARE_TASKS)
    tensors = {names[name]: array for name, array in arrays.items()}
    for name in list(tensors):  # PyTorch's batch norms count the steps they were trained for
        if name.endswith(".running_var"):
            tensors[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"}, dtype=dtype)
    config.save_pretrained(folder)
