"""The libraries of the extra `cluster`, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(name: str) -> Any:
    """The module `name`.  Raises ImportError, one sentence that names the extra, where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f'work on Dask needs the extra "cluster", of which {name} is missing: pip install "minibeit[cluster]" '
            f"({error})"
        ) from None
