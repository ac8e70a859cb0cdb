"""The checkpoints that ship with minibeit; installed as `minibeit.weights`."""

from __future__ import annotations

from pathlib import Path


def path(name: str = "digits") -> Path:
    """The folder of a shipped checkpoint, in the Hub's layout.  Raises FileNotFoundError, naming those that ship."""
    home = Path(__file__).resolve().parent
    shipped = sorted(folder.parent.name for folder in home.glob("*/config.json"))
    if name not in shipped:
        found = ", ".join(shipped) or "none"
        raise FileNotFoundError(
            f"weights: no shipped checkpoint is named {name!r}; found {found}: give one of these names"
        )
    return home / name
