"""Writes a model in the Hub's layout: `config.json` and `model.safetensors` with transformers' names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..config import BeitConfig
from ..file_names import WEIGHTS_NAME
from ..task_table import TASKS
from .formats import write_safetensors
from .names import hub_names

FILE_DTYPES = ("float32", "float16", "bfloat16")


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: BeitConfig,
    task: str,
    arrays: Mapping[str, np.ndarray],
    dtype: str = "float32",
    counters: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes `arrays` ({canonical name: array}) and `config` into `folder`; each file appears only when complete.

    `dtype` of the file: "float32", "float16" or "bfloat16".  PyTorch's batch norms have a counter of training steps,
    which BEiT never uses: it is 0 unless given in `counters` ({canonical name of the running variance: counter}).
    """
    if dtype not in FILE_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(FILE_DTYPES)}, found {dtype!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = hub_names(arrays, config.model_type, bare=TASKS[task].bare)
    tensors = {names[name]: array for name, array in arrays.items()}
    for name in arrays:
        if name.endswith(".running_var"):
            counter = np.asarray((counters or {}).get(name, 0), np.int64)
            tensors[names[name].replace("running_var", "num_batches_tracked")] = counter
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"}, dtype=dtype)
    config.save_pretrained(folder)
