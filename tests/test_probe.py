"""Linear probes: the right features, layers that do not see each other, and what they can tell apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cli_helpers import config
from training_data import class_folders

from minibeit import BeitImageProcessor, BeitModel
from minibeit.train import probe
from minibeit.train.examples import REGRESSION, read_examples


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return read_examples(class_folders(tmp_path_factory.mktemp("data"), 4), 0.25)


def test_features_are_cls_and_the_mean_of_the_patches_after_each_block(examples):
    model, processor = BeitModel(config(), backend="numpy"), BeitImageProcessor(size=16)
    found = probe.features(model, examples.train, processor, 4, 2)
    pixels = np.concatenate([processor(e.path).pixel_values for e in examples.train])
    states = model(pixels, output_hidden_states=True).hidden_states[1:]
    assert found.shape == (4, 6, 32)
    for block, x in zip(found, states):
        np.testing.assert_allclose(block, np.concatenate([x[:, 0], x[:, 1:].mean(1)], 1), atol=1e-6)


def test_each_layer_learns_as_if_it_were_alone():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, 20, 8)).astype(np.float32), np.arange(20) % 4
    together = probe.fit(x, y, 4, 0, 8, 5, 0.01)
    changed = x.copy()
    changed[1] += 1
    again = probe.fit(changed, y, 4, 0, 8, 5, 0.01)
    for a, b in zip(together, again):
        np.testing.assert_array_equal(a[[0, 2]], b[[0, 2]])
        assert np.any(a[1] != b[1])


def test_the_error_is_the_gradient_of_the_cross_entropy():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((1, 5, 3)), np.array([0, 1, 2, 3, 1])
    weight, bias = rng.standard_normal((1, 4, 3)), rng.standard_normal((1, 4))

    def loss(b):
        logits = (x @ weight.transpose(0, 2, 1) + b[:, None])[0]
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(5), y]).mean()

    gradient = probe._error(x, y, weight, bias).sum(1)
    step = 1e-6 * np.eye(4)[:, None]
    numeric = [(loss(bias + h) - loss(bias - h)) / 2e-6 for h in step]
    np.testing.assert_allclose(gradient[0], numeric, atol=1e-7)  # float32's share of 1 / 5


def test_a_block_whose_features_tell_classes_apart_is_the_best(examples):
    rng = np.random.default_rng(2)
    y = np.arange(40) % 2
    x = rng.standard_normal((3, 40, 6)).astype(np.float32)
    x[1, :, 0] += 6 * y
    weight, bias = probe.fit(x, y, 2, 0, 10, 60, 0.05)
    right = [(x[i] @ weight[i].T + bias[i]).argmax(1) == y for i in range(3)]
    assert right[1].mean() == 1.0 and right[0].mean() < 1.0


def test_numbers_have_no_probe(examples):
    model = BeitModel(config(), backend="numpy")
    with pytest.raises(ValueError, match="expected one label per image, found regression"):
        probe.probe(model, dataclasses.replace(examples, problem=REGRESSION), BeitImageProcessor(size=16))
