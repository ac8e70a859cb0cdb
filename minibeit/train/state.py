"""The saved state of a training, from which it continues as if it had not been stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ..checkpoint.formats import load_file
from ..checkpoint.formats.safetensors_file import write_safetensors
from ..errors import CheckpointError

STATE_NAME = "training_state.safetensors"


@dataclass
class State:
    """Where a training stands: steps done, a row for each epoch done, and sums over the epoch at hand."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    right: float = 0.0
    answers: int = 0  # that are right or wrong
    seen: int = 0
    loss_scale: float = 0.0  # of a training in float16 on a GPU; 0: as it begins
    good_steps: int = 0  # since the scale changed


def digest(value: Any) -> str:
    """A short hash of a JSON value or of named arrays."""
    made = hashlib.sha256()
    if isinstance(value, Mapping) and all(isinstance(array, np.ndarray) for array in value.values()):
        for name in sorted(value):
            made.update(name.encode())
            made.update(np.ascontiguousarray(value[name]).reshape(-1).view(np.uint8).data)
    else:
        made.update(json.dumps(value, sort_keys=True, default=str).encode())
    return made.hexdigest()[:16]


def save_state(
    folder: str | os.PathLike[str], state: State, vectors: Mapping[str, np.ndarray], identity: Mapping[str, str]
) -> None:
    """Writes the state into `folder`, whole or not at all.  `identity` has hashes of what must be the same later."""
    metadata = {"state": json.dumps(vars(state)), "identity": json.dumps(dict(identity)), "format": "minibeit training"}
    write_safetensors(Path(folder) / STATE_NAME, vectors, metadata)


def load_state(folder: str | os.PathLike[str], identity: Mapping[str, str]) -> tuple[State, dict[str, np.ndarray]]:
    """The state in `folder` and its vectors, as views of the file.

    Raises FileNotFoundError where there is none, and ValueError that says what is not the same as then.
    """
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no stopped training here to resume; start without --resume")
    loaded = load_file(path)
    try:
        saved = json.loads(loaded.metadata["identity"])
        state = State(**json.loads(loaded.metadata["state"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not the state of a training ({error})") from None
    for what, value in identity.items():
        if saved.get(what) != value:
            raise ValueError(
                f"{path}: was saved with other {what}; resume with the same, or start again in another --output"
            )
    return state, dict(loaded.tensors)


class Stopped(Exception):
    """The user has stopped a training, which is saved."""


class StopSign:
    """Whether somebody has asked to stop."""

    asked = False


@contextmanager
def stop_signals() -> Iterator[StopSign]:
    """Ctrl-C and SIGTERM set the sign, so that the step at hand is finished; a second one ends the program at once."""
    sign = StopSign()
    if threading.current_thread() is not threading.main_thread():
        yield sign
        return

    def ask(number: int, frame: FrameType | None) -> None:
        sign.asked = True
        for which, handler in before.items():
            signal.signal(which, handler)

    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    for which in before:
        signal.signal(which, ask)
    try:
        yield sign
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
