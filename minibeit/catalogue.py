"""The catalogue of published checkpoints (weights/manifest.json), and the folder of data that comes with minibeit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


def manifest() -> dict[str, dict[str, Any]]:
    """{id: entry} of every published checkpoint: Hub ids, timm names and the files of microsoft/unilm.

    An entry has `task`, `size`, `config` (fields beside the defaults), `parameters`, `labels`, `preprocessing`,
    `license`, and `expected`: outputs that others have published.
    """
    return dict(_manifest())


def nearest(id: str) -> list[str]:
    """The ids of the three published checkpoints that look most like `id`, the nearest first; fewer if few are near."""
    known = {known.lower(): known for known in _manifest()}
    known |= {key.rpartition("/")[2]: value for key, value in known.items()}
    from difflib import get_close_matches  # rarely needed

    found = [known[key] for key in get_close_matches(id.lower(), known, 6, 0.6)]
    return list(dict.fromkeys(found))[:3]


def weights_folder() -> Path:
    """Where manifest, class names and the shipped model are: minibeit/weights installed, weights/ in the sources.

    Raises FileNotFoundError for an installation without them.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / "manifest.json").is_file():
            return folder
    raise FileNotFoundError(f"{package / 'weights'}: the manifest is not here; install minibeit again")


@functools.lru_cache(maxsize=1)
def _manifest() -> dict[str, dict[str, Any]]:
    return json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))["checkpoints"]
