"""Confusion matrices, the scores made of them, and their intervals."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from minibeit import metrics
from minibeit.train.examples import SINGLE
from minibeit.train.metrics import metrics as training_metrics


def random_maps(seed=0, n=4, shape=(13, 17), classes=7, ignore=255):
    """Maps and predictions with ignored pixels, a class that is nowhere (5) and one that is predicted only (6)."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 3, 4, ignore], (n, *shape), p=[0.3, 0.2, 0.2, 0.15, 0.05, 0.1])
    guess = rng.choice([0, 1, 2, 3, 4, 6], (n, *shape))
    predicted = np.where((rng.random((n, *shape)) < 0.6) & (truth != ignore), truth, guess)
    assert predicted.max() < classes
    return truth, predicted


def by_definition(truth, predicted, classes, ignore):
    """mIoU, mAcc, aAcc as mmseg's evaluation defines them, with sets of pixels."""
    pixels = [(t, p) for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist()) if t != ignore]
    iou, accuracy = [], []
    for k in range(classes):
        both = sum(t == p == k for t, p in pixels)
        true, said = sum(t == k for t, _ in pixels), sum(p == k for _, p in pixels)
        if true + said:
            iou.append(both / (true + said - both))
        if true:
            accuracy.append(both / true)
    right = sum(t == p for t, p in pixels) / len(pixels)
    return {"mean_iou": math.fsum(iou) / len(iou), "mean_accuracy": math.fsum(accuracy) / len(accuracy),
            "pixel_accuracy": right}  # fmt: skip


def counts_of(truth, predicted, classes=7, ignore=255):
    matrices = [metrics.confusion_matrix(t, p, classes, ignore) for t, p in zip(truth, predicted)]
    return np.stack([metrics.areas(matrix) for matrix in matrices])


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_maps_are_those_of_the_definition(seed):
    truth, predicted = random_maps(seed)
    counts = counts_of(truth, predicted)
    found = metrics.segmentation_scores(counts.sum(0))
    expected = by_definition(truth, predicted, 7, 255)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-14)
    iou, accuracy = metrics.class_iou(counts.sum(0)), metrics.class_accuracy(counts.sum(0))
    assert math.isnan(iou[5]) and iou[6] == 0 and math.isnan(accuracy[6])


@pytest.mark.live
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_maps_are_those_of_torchmetrics(seed):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    truth, predicted = random_maps(seed)
    found = metrics.segmentation_scores(counts_of(truth, predicted).sum(0))
    t, p = torch.from_numpy(truth), torch.from_numpy(predicted)
    options = dict(num_classes=7, ignore_index=255)
    jaccard = functional.multiclass_jaccard_index(p, t, **options)
    assert float(found["mean_iou"]) == pytest.approx(float(jaccard), rel=1e-6)  # torchmetrics divides in float32
    micro = functional.multiclass_accuracy(p, t, average="micro", **options)
    assert float(found["pixel_accuracy"]) == pytest.approx(float(micro), rel=1e-6)
    matrix = functional.multiclass_confusion_matrix(p, t, **options).numpy()
    np.testing.assert_array_equal(metrics.confusion_matrix(truth, predicted, 7, 255), matrix)


def test_confusion_counts_pairs():
    matrix = metrics.confusion_matrix(np.array([0, 0, 2, 1]), np.array([0, 2, 2, 0]), 3)
    np.testing.assert_array_equal(matrix, [[1, 0, 1], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(metrics.areas(matrix), [[1, 0, 1], [2, 1, 1], [2, 0, 2]])
    assert metrics.confusion_matrix(np.array([255]), np.array([1]), 3, 255).sum() == 0


@pytest.mark.parametrize(
    ("truth", "predicted", "words"),
    [
        ([0, 3], [0, 0], "every label to be a class from 0 to 2, found 3"),
        ([0, -1], [0, 0], "found -1"),
        ([0, 1], [0, 7], "every prediction to be a class from 0 to 2, found 7"),
        ([0, 1], [0], r"shapes \(1,\) and \(2,\)"),
    ],
)
def test_what_is_no_class_is_refused(truth, predicted, words):
    with pytest.raises(ValueError, match=words):
        metrics.confusion_matrix(np.array(truth), np.array(predicted), 3)


def test_ranks_follow_argmax_on_ties():
    logits = np.array([[1.0, 3, 2], [2, 2, 2], [0, 1, 1], [5, 5, 0]])
    np.testing.assert_array_equal(metrics.ranks(logits, np.array([1, 1, 2, 0])), [0, 1, 1, 0])
    random = np.random.default_rng(0).integers(0, 3, (200, 6)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 6, 200)
    np.testing.assert_array_equal(metrics.ranks(random, labels) == 0, random.argmax(1) == labels)
    order = np.argsort(-random, axis=1, kind="stable")
    np.testing.assert_array_equal(metrics.ranks(random, labels) < 3, (order[:, :3] == labels[:, None]).any(1))


def test_wilson_solves_its_equation():
    """Its ends are the shares p from which what was seen is Z95 standard errors away: (s - p)^2 = z^2 p (1 - p) / n."""
    for right, total in ((1, 7), (30, 40), (999, 1000)):
        for end in metrics.wilson(right, total):
            distance = (right / total - end) ** 2
            assert distance == pytest.approx(metrics.Z95**2 * end * (1 - end) / total, rel=1e-9)
    assert metrics.wilson(0, 10)[0] == 0 and 0 < metrics.wilson(0, 10)[1] < 0.3
    assert metrics.wilson(10, 10)[1] == 1 and 0.7 < metrics.wilson(10, 10)[0] < 1
    assert all(map(math.isnan, metrics.wilson(0, 0)))


def test_intervals_of_means():
    low, high = metrics.mean_interval(np.array([1.0, 2, 3, 4]))
    assert (low + high) / 2 == pytest.approx(2.5)
    assert high - low == pytest.approx(2 * metrics.Z95 * math.sqrt(5 / 3 / 4))
    assert all(map(math.isnan, metrics.mean_interval(np.array([1.0]))))


def test_bootstrap_is_that_of_resampled_images():
    truth, predicted = random_maps(n=12, shape=(5, 4))
    counts = counts_of(truth, predicted)
    found = metrics.segmentation_intervals(counts, resamples=300, seed=3)
    drawn = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=300)
    scores = []
    for times in drawn:
        chosen = np.repeat(np.arange(12), times)
        scores.append(by_definition(truth[chosen], predicted[chosen], 7, 255)["mean_iou"])
    np.testing.assert_allclose(found["mean_iou"], np.quantile(scores, [0.025, 0.975]), rtol=1e-12)
    mean = metrics.segmentation_scores(counts.sum(0))["mean_iou"]
    assert found["mean_iou"][0] < mean < found["mean_iou"][1]
    assert np.isnan(found["class_iou"][:, 5]).all() and found["class_iou"].shape == (2, 7)
    again = metrics.segmentation_intervals(counts, resamples=300, seed=3)
    np.testing.assert_array_equal(again["class_accuracy"], found["class_accuracy"])
    assert np.isnan(metrics.segmentation_intervals(counts[:1])["mean_iou"]).all()


def test_the_interval_of_a_ratio_is_that_of_resampled_images():
    rng = np.random.default_rng(0)
    wholes = rng.integers(1, 9, 15).astype(float)
    parts = rng.integers(0, wholes + 1).astype(float)
    found = metrics.ratio_interval(parts, wholes, resamples=200, seed=4)
    drawn = np.random.default_rng(4).multinomial(15, np.full(15, 1 / 15), size=200)
    scores = [np.repeat(parts, times).sum() / np.repeat(wholes, times).sum() for times in drawn]
    assert found == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])), rel=1e-12)
    assert all(map(math.isnan, metrics.ratio_interval(parts[:1], wholes[:1])))


def test_intervals_of_many_images_are_made_piece_by_piece(monkeypatch):
    rng = np.random.default_rng(0)
    counts, parts, wholes = rng.integers(0, 9, (20, 3, 4)), rng.random(20), 1 + rng.random(20)
    expected = metrics.segmentation_intervals(counts, seed=3), metrics.ratio_interval(parts, wholes, seed=3)
    monkeypatch.setattr(metrics, "MOST_DRAWN", 70)  # three resamples at a time, and one at the end
    found = metrics.segmentation_intervals(counts, seed=3), metrics.ratio_interval(parts, wholes, seed=3)
    for name, ends in expected[0].items():
        np.testing.assert_array_equal(found[0][name], ends)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)
    monkeypatch.setattr(metrics, "MOST_DRAWN", 30_000)
    tracemalloc.start()
    metrics.ratio_interval(np.ones(3_000), np.ones(3_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6  # all at once take 48 MB


def test_scores_in_training_count_equal_logits_as_evaluation_does():
    logits, labels = np.array([[1.0, 1, 0], [1, 1, 0], [0, 2, 2]]), np.array([0, 1, 2])
    found = training_metrics(logits, labels, SINGLE)
    assert found["top1"] == (metrics.ranks(logits, labels) < 1).mean() == 1 / 3
