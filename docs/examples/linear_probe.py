"""A classifier of your own images in seconds: scikit-learn's logistic regression on BEiT's features.

    minibeit features flowers/train --recursive --model MODEL --layer 8 --output train.npz
    minibeit features flowers/val --recursive --model MODEL --layer 8 --output val.npz
    python docs/examples/linear_probe.py train.npz val.npz

The class of an image is the name of the folder that it lies in.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import classification_report
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def read(file: str) -> tuple[np.ndarray, list[str]]:
    """Features (n, D) and the class of each image."""
    with np.load(file) as made:
        return made["features"], [Path(name).parent.name for name in made["files"]]


def main(argv: list[str] | None = None) -> float:
    """Prints how good the classifier is on the second file, and returns the share it gets right."""
    parser = argparse.ArgumentParser(description="Fits a linear classifier to features, judges it by others.")
    parser.add_argument("train", help="what `minibeit features` wrote for the images to learn from")
    parser.add_argument("held_out", help="the same for the images to judge by")
    args = parser.parse_args(argv)
    features, classes = read(args.train)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, classes)
    features, truth = read(args.held_out)
    print(classification_report(truth, classifier.predict(features), digits=3))
    return float(classifier.score(features, truth))


if __name__ == "__main__":
    main()
