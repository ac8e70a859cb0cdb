"""The models, one file per task: the encoder and a head.  `base` holds what they share."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..task_table import CLASSES, checked_task


def task_class(task: str) -> Any:
    """The model class of a task.  Raises ValueError for one that there is none of."""
    return getattr(import_module(f".{checked_task(task)}", __name__), CLASSES[task])
