"""Traces of gradients: `cotangent.NAME`, `gradient.NAME`, and the call: `input.pixel_values`, `input.labels`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ..checkpoint.formats import write_safetensors
from ..files import atomic_write
from .gradients import model_gradients, model_of
from .lockstep import Job
from .trace_file import INPUT, TraceFile, provenance

INPUTS = ("pixel_values", "bool_masked_pos", "labels")


def save_gradients(
    path: str | os.PathLike[str],
    job: Job,
    made_by: str,
    arrays: Mapping[str, np.ndarray],
    only: tuple[str, ...] = ("*",),
) -> None:
    """Writes the gradients and cotangents that match one of the globs `only`, with the call they belong to.

    Raises ValueError if none does.
    """
    chosen = {name: array for name, array in arrays.items() if any(fnmatchcase(name, glob) for glob in only)}
    if not chosen:
        raise ValueError(f"{path}: no gradient of this model matches {' '.join(only)}, so nothing was written")
    inputs = {INPUT + name: np.asarray(array) for name, array in job.inputs.items()}
    plain = {name: np.ascontiguousarray(array) for name, array in (inputs | chosen).items()}
    write_safetensors(path, plain, provenance(job, made_by))


def call_of(trace: TraceFile) -> dict[str, np.ndarray]:
    """The arrays of the call that a trace holds, labels among them.  Raises ValueError if it lacks pixels or labels."""
    strange = [name for name in trace.inputs if name not in INPUTS]
    if strange or not {"pixel_values", "labels"} <= trace.inputs.keys():
        found = ", ".join(INPUT + name for name in trace.inputs) or "none"
        raise ValueError(
            f"{trace.path}: gradients belong to a call, so expected {INPUT}pixel_values and {INPUT}labels "
            f"(and {INPUT}bool_masked_pos), found {found}"
        )
    return trace.inputs


def add_gradients(folder: str | os.PathLike[str], job: Job, only: tuple[str, ...] = ("*",)) -> None:
    """Puts the gradients in float64 and float32 into a golden pack that has been written, and into its SHA256SUMS."""
    folder, sums = Path(folder), ""
    for dtype in ("float64", "float32"):
        path = folder / f"gradients.{dtype}.safetensors"
        save_gradients(path, job, f"minibeit NumPy {dtype}", model_gradients(job, model_of(job, dtype)).arrays, only)
        sums += f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    listing = folder / "SHA256SUMS"
    kept = [line for line in listing.read_text().splitlines() if "  gradients." not in line]
    with atomic_write(listing) as file:
        file.write(("\n".join(kept) + "\n" + sums).encode())
