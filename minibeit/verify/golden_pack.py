"""Test vectors for other people's ports: input, outputs and every intermediate in float64 and float32, with hashes.

DIR/README.md             what is here and how to use it
DIR/config.json
DIR/weights.json          SHA-256 and shape of every parameter, by canonical name: which checkpoint this belongs to
DIR/float64.safetensors   a trace of the float64 reference, the truth
DIR/float32.safetensors   a trace of the NumPy reference in float32, the yardstick
DIR/SHA256SUMS            of the files, as sha256sum reads it
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from ..files import atomic_write
from .float64_model import float32_model, truth_model
from .lockstep import Job
from .trace_file import save_trace, weights_hash
from .trace_names import describe

FILES = ("README.md", "config.json", "weights.json", "float64.safetensors", "float32.safetensors")


def export_golden(
    folder: str | os.PathLike[str], job: Job, model_name: str, select: str | tuple[str, ...] = "*"
) -> Path:
    """Writes the pack; `select` are globs of the intermediates to include."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for dtype, make in (("float64", truth_model), ("float32", float32_model)):
        model = make(job.config, job.task, job.arrays)
        save_trace(
            folder / f"{dtype}.safetensors",
            job,
            lambda trace, model=model: model(**job.inputs, trace=trace),  # type: ignore[misc]
            f"minibeit NumPy {dtype}",
            select,
            dtype,
        )
    _write(folder / "config.json", job.config.to_json_string())
    _write(folder / "weights.json", json.dumps(_weights(job, model_name), indent=1) + "\n")
    _write(folder / "README.md", _readme(job, model_name))
    sums = "".join(f"{_hash(folder / name)}  {name}\n" for name in FILES)
    _write(folder / "SHA256SUMS", sums)
    return folder


def _weights(job: Job, model_name: str) -> dict[str, object]:
    tensors = {
        name: {
            "shape": list(array.shape),
            "sha256": hashlib.sha256(np.ascontiguousarray(array, "<f4").data).hexdigest(),
        }
        for name, array in job.arrays.items()
    }
    return {"model": model_name, "task": job.task, "weights_sha256": weights_hash(job.arrays), "tensors": tensors}


def _readme(job: Job, model_name: str) -> str:
    return f"""# Test vectors: {model_name}, {job.task}

`float64.safetensors` is the truth, `float32.safetensors` what the NumPy reference makes of it in float32; both hold
the input (`input.*`) and every intermediate under its canonical name. To check an implementation, write its arrays
under the same names into a safetensors file with the metadata entry `format` = "minibeit-trace", then

    minibeit verify --model {model_name} --against YOUR.safetensors

Names and shapes (`*` is the number of a block):

```
{describe(job.shapes())}
```
"""


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
