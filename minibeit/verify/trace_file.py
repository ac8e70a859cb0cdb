"""Traces on disk: a safetensors file with one tensor per canonical name, and where they come from in its metadata.

Any program can write one.  Only the metadata entry `format` = "minibeit-trace" is required; the others, if given, are
checked against the model:

    config             the model's config.json as text
    task               "image_classification", ... (a key of minibeit.task_table.TASKS)
    made_by            who computed it, for the report
    weights_sha256     of all weights, see `weights_hash`
    precision          "bfloat16", "float16" or "int8", of an engine that computes so and writes float32
    origins, versions  JSON, for the record

Tensors `input.pixel_values` and `input.bool_masked_pos` are the arrays of the call; with them a trace needs no separate
image.  `minibeit verify --list-names` prints the names and shapes of all others.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import minibeit

from ..checkpoint.formats import load_file
from ..files import atomic_write
from ..strict_json import parse_json
from ..task_table import TASKS
from ..trace import Trace
from .budget import pixel_limit
from .lockstep import Job
from .low_precision import HALVES, PRECISIONS
from .networks import TOKENIZER, config_of
from .streams import TraceSource, host
from .trace_names import TOKENS

FORMAT = "minibeit-trace"
INPUT = "input."
MOST = 0.9  # of the arrays of a trace are stored in the precision that it was computed in
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bool": "BOOL", "int32": "I32", "int64": "I64"}
IGNORED_SETTINGS = (  # fields of a config that change no number of an inference
    "architectures",
    "id2label",
    "label2id",
    "drop_path_rate",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "problem_type",
    "auxiliary_loss_weight",
    "semantic_loss_ignore_index",
    "extra",
)


class TraceFile(Mapping[str, np.ndarray]):
    """An opened trace: arrays by canonical name, each read when asked for, without the inputs of the call."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        loaded = load_file(self.path)
        self._tensors = loaded.tensors
        self.metadata = dict(loaded.metadata)
        if self.metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path}: its metadata has no entry format = {FORMAT}, so it is not a trace; write one with "
                "`minibeit verify --save-trace`"
            )
        self.inputs = {n.removeprefix(INPUT): np.array(self._tensors[n]) for n in self._tensors if n.startswith(INPUT)}
        self._names = [name for name in self._tensors if not name.startswith(INPUT)]
        self.dtypes = {name: self._tensors.info(name).dtype for name in self._names}

    @property
    def made_by(self) -> str:
        return self.metadata.get("made_by", str(self.path))

    @property
    def task(self) -> str | None:
        return self.metadata.get("task")

    @property
    def config(self) -> Any:
        """The config of the model or tokenizer it was made with, None if it does not say."""
        text = self.metadata.get("config")
        try:
            return None if text is None else config_of(parse_json(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}: the config in its metadata cannot be used: {error}") from error

    @property
    def precision(self) -> str | None:
        """The low precision that it says it was computed in, or that nearly all of its arrays are stored in."""
        said = self.metadata.get("precision")
        if said not in (None, "float32", *PRECISIONS):
            raise ValueError(
                f"{self.path}: expected a precision of float32, {', '.join(PRECISIONS)} in its metadata, found {said!r}"
            )
        if said is not None:
            return None if said == "float32" else said
        stored = Counter(self.dtypes.values())
        return next((dtype for dtype in HALVES if stored[dtype] >= MOST * len(self.dtypes) > 0), None)

    def inputs_for(self, task: str) -> dict[str, np.ndarray]:
        """The arrays of the call, none if the trace does not have them.  Raises ValueError for any other input."""
        taken = ("pixel_values", "bool_masked_pos") if task in TASKS and TASKS[task].masked else ("pixel_values",)
        strange = [name for name in self.inputs if name not in taken]
        if strange or (self.inputs and "pixel_values" not in self.inputs):
            found = ", ".join(INPUT + name for name in self.inputs)
            raise ValueError(f"{self.path}: a model of {task} takes {', '.join(taken)}, the trace has {found}")
        return self.inputs

    def source(self) -> TraceSource:
        """This trace as one side of a comparison."""
        return TraceSource(self.made_by, self, self.dtypes)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self.dtypes


def save_trace(
    path: str | os.PathLike[str],
    job: Job,
    run: Callable[[Trace], Any],
    made_by: str,
    select: str | tuple[str, ...] = "*",
    dtype: str = "float32",
    origins: Mapping[str, str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Runs `run(trace)` and writes every array that `select` names as it comes: none is kept in memory.

    The file appears when it is complete.  Raises ValueError if the run records other names or shapes than the model of
    this config does.
    """
    selected = Trace(select)
    shapes = {name: shape for name, shape in job.shapes().items() if selected.wants(name)}
    entries = {INPUT + name: (array.dtype.name, array.shape) for name, array in job.inputs.items()}
    entries |= {name: ("int64" if name == TOKENS else dtype, shape) for name, shape in shapes.items()}
    with atomic_write(path) as file:
        start = file.write(_header(entries, provenance(job, made_by, origins) | dict(facts or {})))
        offsets = _offsets(entries)
        for array in job.inputs.values():
            file.write(np.ascontiguousarray(array).data)
        writer = _Writer(file, start, {name: entries[name] for name in shapes}, offsets)
        run(writer)
        left = [name for name in shapes if name not in writer.written]
        if left:
            raise ValueError(f"{made_by} made no array called {', '.join(left[:4])}")
        file.seek(0, os.SEEK_END)


class _Writer(Trace):
    """A trace that goes straight to its place in a file."""

    def __init__(
        self, file: Any, start: int, entries: Mapping[str, tuple[str, Any]], offsets: Mapping[str, int]
    ) -> None:
        super().__init__(tuple(entries))
        self._file, self._start, self._entries, self._offsets = file, start, entries, offsets
        self.written: set[str] = set()

    def record(self, name: str, array: Any) -> Any:
        if name in self._entries:
            dtype, shape = self._entries[name]
            plain = np.ascontiguousarray(host(array), dtype)
            if plain.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, found {plain.shape}")
            self._file.seek(self._start + self._offsets[name])
            self._file.write(plain.data)
            self.written.add(name)
        return array


def provenance(job: Job, made_by: str, origins: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata of a trace of this job."""
    versions = {"minibeit": minibeit.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {
        "format": FORMAT,
        "made_by": made_by,
        "task": job.task,
        "config": json.dumps(job.config.to_dict()),
        "weights_sha256": weights_hash(job.arrays),
        "origins": json.dumps(dict(origins or {})),
        "versions": json.dumps(versions),
    }


def weights_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over canonical names, in alphabetical order, each followed by its float32 values, little-endian."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name], "<f4").data)
    return digest.hexdigest()


def misfits(trace: TraceFile, job: Job) -> list[str]:
    """What speaks against comparing this trace with this job, a sentence each; nothing if they belong together."""
    where = str(trace.path)
    if trace.task is not None and trace.task != job.task:
        known = "" if trace.task in (*TASKS, TOKENIZER) else ", which is none that minibeit knows"
        return [f"{where}: is the trace of another model: its task is {trace.task}{known}, here it is {job.task}"]
    theirs = trace.config
    if theirs is not None:
        changed = _changed(theirs, job.config)
        if changed:
            return [f"{where}: was made with another config: {'; '.join(changed)}"]
    found = []
    for name, array in job.inputs.items():
        stored = trace.inputs.get(name)
        if stored is None:
            continue
        if stored.shape != array.shape:
            return [f"{where}: was made at another resolution or batch: {name} {stored.shape}, here {array.shape}"]
        if not _same(stored, array):
            found.append(
                f"{where}: was made from another image: {name} differs by up to "
                f"{np.abs(stored.astype(np.float64) - array).max():.3g}; check image, resizing and normalisation"
            )
    weights = trace.metadata.get("weights_sha256")
    if weights is not None and weights != weights_hash(job.arrays):
        found.append(f"{where}: was made with other weights (another checkpoint of the same architecture)")
    if not set(trace) & set(job.shapes()):
        found.append(
            f"{where}: none of its {len(trace)} tensors has a name that this model records; "
            "`minibeit verify --list-names` prints them"
        )
    return found


def _same(stored: np.ndarray, array: np.ndarray) -> bool:
    """Whether pixels are the same but for rounding, a mask exactly."""
    if array.dtype.kind != "f":
        return np.array_equal(stored, array)
    return bool(np.abs(stored.astype(np.float64) - array).max(initial=0) <= pixel_limit(array))


def _changed(theirs: Any, ours: Any) -> list[str]:
    a, b = theirs.to_dict(), ours.to_dict()
    if a.get("model_type") != b.get("model_type"):
        return [f"model_type is {a.get('model_type')}, here {b.get('model_type')}"]
    of_tokenizer = () if hasattr(ours, "extra") else ("image_size", "n_init")  # the default size, and what is left out
    skip = {*IGNORED_SETTINGS, *of_tokenizer, *getattr(theirs, "extra", ()), *getattr(ours, "extra", ())}
    keys = [key for key in {**b, **a} if key not in skip and a.get(key) != b.get(key)]
    if hasattr(ours, "num_labels") and theirs.num_labels != ours.num_labels:
        keys.append("num_labels")
        a["num_labels"], b["num_labels"] = theirs.num_labels, ours.num_labels
    return [f"{key} is {a.get(key)}, here {b.get(key)}" for key in keys[:4]]


def _offsets(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    offsets, position = {}, 0
    for name, (dtype, shape) in entries.items():
        offsets[name] = position
        position += int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return offsets


def _header(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, start in _offsets(entries).items():
        dtype, shape = entries[name]
        end = start + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
