"""Image search: which images of a collection look like this one?

    minibeit features photos/ --recursive --model microsoft/beit-base-patch16-224-pt22k --output photos.npz
    python docs/examples/search.py photos.npz query.jpg

The file remembers its model and layer, so the query is described as the collection was.  A pre-trained encoder serves
well; which layer is best depends on the images: try a few with --layer.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from minibeit.cli import main as minibeit


def described(image: str, like: dict) -> np.ndarray:  # -> (D,)
    """The features of an image, made as those in the file were."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "query.npz"
        model, layer, pool = (str(like[name]) for name in ("model", "layer", "pool"))
        options = ["--model", model, "--layer", layer, "--pool", pool, "--output", str(file), "--quiet"]
        if minibeit(["features", image, *options]):
            raise SystemExit(1)  # the command has said why
        with np.load(file) as made:
            return made["features"][0]


def nearest(query: np.ndarray, features: np.ndarray, count: int) -> list[tuple[int, float]]:
    """(row, cosine) of the `count` rows of `features` (n, D) that are most like `query` (D,), the most like first.

    The collection's mean is subtracted first: what all images have in common tells none of them apart.
    """
    mean = features.mean(axis=0)
    rows, one = features - mean, query - mean
    cosines = rows @ one / (np.linalg.norm(rows, axis=1) * np.linalg.norm(one) + 1e-12)
    return [(int(i), float(cosines[i])) for i in np.argsort(-cosines)[:count]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Finds the images of a collection that look like a given one.")
    parser.add_argument("collection", help="the file that `minibeit features` wrote (.npz, --pool mean or cls)")
    parser.add_argument("image")
    parser.add_argument("--count", type=int, default=5)
    args = parser.parse_args(argv)
    with np.load(args.collection) as file:
        collection = dict(file)
    for row, cosine in nearest(described(args.image, collection), collection["features"], args.count):
        print(f"{cosine:6.3f}  {collection['files'][row]}")


if __name__ == "__main__":
    main()
