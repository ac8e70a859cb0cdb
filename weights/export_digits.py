"""Writes scikit-learn's handwritten digits as a folder of class folders, to train on.

    python -m minibeit.weights.export_digits FOLDER      FOLDER/train/0/0007.png ... and FOLDER/val/...

1,437 pictures to learn from and the 360 that the shipped checkpoint never saw (weights/digits/split.json).  Needs
scikit-learn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent


def export(folder: Path) -> int:
    """Writes the pictures and returns how many there are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * 255 / 16).astype(np.uint8)
    split = json.loads((HERE / "digits" / "split.json").read_text(encoding="utf-8"))
    for part, indices in (("train", split["train"]), ("val", split["held_out"])):
        for i in indices:
            place = folder / part / str(data.target[i])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(place / f"{i:04d}.png")
    return len(images)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m minibeit.weights.export_digits FOLDER")
    print(f"{export(Path(sys.argv[1]))} pictures in {sys.argv[1]}")
