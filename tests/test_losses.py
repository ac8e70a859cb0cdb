"""The losses of the three heads: which one is chosen, what it is, which labels are refused."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import make, tiny_config
from tolerances import NAIVE_MODEL

from minibeit import BeitForImageClassification, BeitForMaskedImageModeling, BeitForSemanticSegmentation

RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((4, 3, 12, 8))
MASK = RNG.random((4, 6)) < 0.5
SEGMENT = dict(num_hidden_layers=3, out_indices=[0, 1, 2, 3])


def classifier(K=5, **changes):
    return make(BeitForImageClassification, tiny_config(num_labels=K, **changes))


def close(found, truth):
    return abs(float(found) - truth) <= NAIVE_MODEL * abs(truth)


def test_no_labels_no_loss():
    assert classifier()(PIXELS).loss is None


@pytest.mark.parametrize("labels", [[0, 4, 2, 2], np.array([0, 4, 2, 2]), np.array([0, 4, 2, 2], np.uint8)])
def test_integer_labels_mean_cross_entropy(labels):
    out = classifier()(PIXELS, labels=labels)
    assert close(out.loss, naive.cross_entropy(out.logits, np.array([0, 4, 2, 2]), -100))
    assert np.shape(out.loss) == ()


def test_ignored_labels_do_not_count():
    out = classifier()(PIXELS, labels=[0, -100, -100, 3])
    assert close(out.loss, naive.cross_entropy(out.logits[[0, 3]], np.array([0, 3]), -100))
    assert np.isnan(classifier()(PIXELS, labels=[-100] * 4).loss)


def test_float_labels_mean_binary_cross_entropy():
    labels = (RNG.random((4, 5)) < 0.5).astype(float)
    out = classifier()(PIXELS, labels=labels)
    assert close(out.loss, naive.bce_with_logits(out.logits, labels))
    assert float(classifier()(PIXELS, labels=labels.tolist()).loss) == float(out.loss)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_output_means_regression(shape):
    labels = RNG.standard_normal(shape)
    out = classifier(1)(PIXELS, labels=labels)
    assert close(out.loss, naive.mse_loss(out.logits.ravel(), labels.ravel()))


def test_the_problem_type_decides():
    labels = RNG.integers(0, 2, (4, 5))
    out = classifier(problem_type="regression")(PIXELS, labels=labels)
    assert close(out.loss, naive.mse_loss(out.logits, labels.astype(float)))
    out = classifier(problem_type="multi_label_classification")(PIXELS, labels=labels)
    assert close(out.loss, naive.bce_with_logits(out.logits, labels.astype(float)))
    out = classifier(problem_type="single_label_classification")(PIXELS, labels=[1, 2, 3, 4])
    assert close(out.loss, naive.cross_entropy(out.logits, np.array([1, 2, 3, 4]), -100))


def test_masked_patches_alone_count():
    model = make(BeitForMaskedImageModeling, tiny_config(use_mask_token=True))
    labels = RNG.integers(0, 10, int(MASK.sum()))
    out = model(PIXELS, MASK, labels=labels)
    assert close(out.loss, naive.cross_entropy(out.logits[MASK], labels, -100))


@pytest.mark.parametrize("options", [{}, {"use_auxiliary_head": False}, {"auxiliary_loss_weight": 2.0}])
def test_segmentation_loss(options):
    config = tiny_config(**SEGMENT, **options)
    model = make(BeitForSemanticSegmentation, config)
    labels = RNG.integers(0, 5, (4, 9, 7))
    labels[:, 2] = 255
    out = model(PIXELS, labels=labels)

    def part(logits):
        rows = naive.resize_bilinear(logits, (9, 7)).transpose(0, 2, 3, 1).reshape(-1, 5)
        return naive.cross_entropy(rows, labels.ravel(), 255)

    truth = part(out.logits)
    if config.use_auxiliary_head:
        truth += config.auxiliary_loss_weight * part(out.auxiliary_logits)
    assert close(out.loss, truth)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 5], r"labels: expected class numbers 0 to 4 \(or -100 to ignore\), found 5"),
        ([0, 1, 2, -1], "labels: expected class numbers 0 to 4 .* found -1"),
        ([0, 1], r"labels: expected shape \(4,\) for this batch, found \(2,\)"),
        (np.zeros((4, 3)), r"labels: expected shape \(4, 5\) for this batch, found \(4, 3\)"),
        (["cat", "dog", "cat", "cat"], "labels: expected an array of numbers"),
        ([[0, 1], [2]], "labels: expected an array of numbers"),
        (np.full((4, 5), np.nan), "labels: found NaN"),
    ],
)
def test_classification_labels_are_checked(labels, message):
    with pytest.raises(ValueError, match=message):
        classifier()(PIXELS, labels=labels)


def test_float_labels_are_no_class_numbers():
    model = classifier(problem_type="single_label_classification")
    with pytest.raises(ValueError, match="labels: expected class numbers, which are integers, found fractions"):
        model(PIXELS, labels=np.array([0.0, 1.5, 2.0, 3.0]))


def test_masked_labels_are_checked():
    model = make(BeitForMaskedImageModeling, tiny_config(use_mask_token=True))
    n = int(MASK.sum())
    with pytest.raises(ValueError, match="labels: a loss needs bool_masked_pos"):
        model(PIXELS, labels=[1])
    with pytest.raises(ValueError, match=rf"labels: expected one visual token per masked patch, shape \({n},\)"):
        model(PIXELS, MASK, labels=np.zeros((4, 6), int))
    with pytest.raises(ValueError, match=r"labels: expected class numbers 0 to 9 .* found 10"):
        model(PIXELS, MASK, labels=[10] * n)


def test_segmentation_labels_are_checked():
    model = make(BeitForSemanticSegmentation, tiny_config(**SEGMENT))
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, height, width\), found \(4, 9\)"):
        model(PIXELS, labels=np.zeros((4, 9), int))
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, height, width\), found \(1, 9, 9\)"):
        model(PIXELS, labels=np.zeros((1, 9, 9), int))
    with pytest.raises(ValueError, match=r"labels: expected class numbers 0 to 4 \(or 255 to ignore\), found 7"):
        model(PIXELS, labels=np.full((4, 9, 9), 7))
    one = make(BeitForSemanticSegmentation, tiny_config(**SEGMENT, num_labels=1))
    with pytest.raises(ValueError, match="labels: a segmentation loss needs more than one class"):
        one(PIXELS, labels=np.zeros((4, 9, 9), int))


def test_labels_are_not_changed():
    labels = RNG.integers(0, 5, (4, 9, 7))
    before = labels.copy()
    labels.setflags(write=False)
    make(BeitForSemanticSegmentation, tiny_config(**SEGMENT))(PIXELS, labels=labels)
    assert np.array_equal(labels, before)
