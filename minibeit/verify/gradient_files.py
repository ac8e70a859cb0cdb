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
from .networks import TOKENIZER
from .trace_file import INPUT, TraceFile, provenance

INPUTS = {"pixel_values", "labels"}, {"bool_masked_pos"}  # of a model's call: needed, possible
TOKENIZER_INPUTS = {"pixel_values", "noise", "temperature", "divergence_weight"}, set[str]()


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


def call_of(trace: TraceFile, task: str) -> dict[str, np.ndarray]:
    """The arrays of the call that a trace holds, labels or noise among them.  Raises ValueError if it lacks some."""
    needed, possible = TOKENIZER_INPUTS if task == TOKENIZER else INPUTS
    if not needed <= trace.inputs.keys() <= needed | possible:
        found = ", ".join(INPUT + name for name in trace.inputs) or "none"
        expected = " and ".join(INPUT + name for name in sorted(needed, reverse=True))
        more = "".join(f" (and {INPUT}{name})" for name in possible)
        raise ValueError(f"{trace.path}: gradients belong to a call, so expected {expected}{more}, found {found}")
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
