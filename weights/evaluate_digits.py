"""Prints how many of the held-out digits the shipped checkpoint names right.

Run: python -m minibeit.weights.evaluate_digits [--backend numpy]
"""

from __future__ import annotations

import argparse

import numpy as np

from minibeit import BeitForImageClassification, BeitImageProcessor
from minibeit.weights import path


def evaluate(backend: str | None = None) -> tuple[int, int]:
    """(right, all) over the 20% of scikit-learn's digits that training never saw."""
    folder = path("digits")
    with np.load(folder / "held_out.npz", allow_pickle=False) as held_out:
        images, labels = held_out["images"], held_out["labels"]
    pixel_values = BeitImageProcessor.from_pretrained(folder)(list(images)).pixel_values
    logits = BeitForImageClassification.from_pretrained(folder, backend=backend)(pixel_values).logits
    return int((logits.argmax(1) == labels).sum()), len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", help="numba or numpy")
    right, total = evaluate(parser.parse_args().backend)
    print(f"held-out digits: {right} of {total} right ({right / total:.2%})")


if __name__ == "__main__":
    main()
