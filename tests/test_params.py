"""The parameter trees: the only list of names and shapes, counts of the published models, random weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import tiny_config

from minibeit import BeitConfig
from minibeit.params import (
    Linear,
    count_parameters,
    flatten,
    param_shapes,
    random_arrays,
    shapes,
    table_rows,
    unflatten,
)
from minibeit.task_table import TASKS

LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
BLOCK = dict(use_relative_position_bias=True)
SHARED = dict(use_shared_relative_position_bias=True, use_mask_token=True)
DIT = dict(use_absolute_position_embeddings=True)
ADE = dict(**BLOCK, image_size=640, num_labels=150)
PUBLISHED = [  # parameter counts of the checkpoints on the Hub
    ("masked_image_modeling", {**SHARED}, 91_965_776),
    ("masked_image_modeling", {**SHARED, **LARGE}, 311_534_016),
    ("image_classification", {**BLOCK, "num_labels": 21841}, 102_557_713),
    ("image_classification", {**BLOCK, **LARGE, "num_labels": 21841}, 325_792_593),
    ("image_classification", {**BLOCK, "num_labels": 1000}, 86_530_984),
    ("image_classification", {**BLOCK, "num_labels": 1000, "image_size": 384}, 86_744_104),
    ("image_classification", {**BLOCK, **LARGE, "num_labels": 1000}, 304_430_568),
    ("image_classification", {**BLOCK, **LARGE, "num_labels": 1000, "image_size": 384}, 304_998_888),
    ("image_classification", {**BLOCK, **LARGE, "num_labels": 1000, "image_size": 512}, 305_674_728),
    ("semantic_segmentation", {**ADE, "out_indices": [3, 5, 7, 11]}, 163_407_980),
    ("semantic_segmentation", {**ADE, **LARGE, "out_indices": [7, 11, 15, 23]}, 441_271_084),
    ("masked_image_modeling", {**DIT, "use_mask_token": True}, 92_108_288),
    ("image_classification", {**DIT, "num_labels": 16}, 85_820_176),
]


@pytest.mark.parametrize(("task", "settings", "count"), PUBLISHED)
def test_counts_of_published_checkpoints(task, settings, count):
    assert count_parameters(BeitConfig.from_dict(settings), task) == count


@pytest.mark.parametrize(("grid", "rows"), [((14, 14), 732), ((24, 24), 2212), ((40, 40), 6244), ((1, 1), 4)])
def test_rows_of_the_bias_table(grid, rows):
    assert table_rows(grid) == rows


def test_flags_add_and_remove_parameters():
    plain = set(param_shapes(tiny_config(), "model"))
    for flag, names in {
        "use_mask_token": {"beit.embeddings.mask_token"},
        "use_absolute_position_embeddings": {"beit.embeddings.position_embeddings"},
        "use_shared_relative_position_bias": {"beit.shared_bias_table"},
        "use_relative_position_bias": {"beit.encoder.0.bias_table", "beit.encoder.1.bias_table"},
    }.items():
        assert set(param_shapes(tiny_config(**{flag: True}), "model")) - plain == names
    cls = set(param_shapes(tiny_config(use_mean_pooling=False), "model"))
    assert {name.rsplit(".", 1)[0] for name in cls ^ plain} == {"beit.norm", "beit.pooler"}
    bare = set(param_shapes(tiny_config(layer_scale_init_value=0.0), "model"))
    assert {name.rsplit(".", 1)[1] for name in plain - bare} == {"lambda_1", "lambda_2"}


def test_keys_have_no_bias():
    names = param_shapes(tiny_config(), "model")
    assert "beit.encoder.0.attention.query.bias" in names
    assert "beit.encoder.0.attention.key.bias" not in names


@pytest.mark.parametrize("task", TASKS)
def test_flatten_and_unflatten_are_reverses(task):
    tree = shapes(tiny_config(num_hidden_layers=4, out_indices=[0, 1, 2, 3], add_fpn=True), task)
    named = flatten(tree)
    assert named == param_shapes(tiny_config(num_hidden_layers=4, out_indices=[0, 1, 2, 3], add_fpn=True), task)
    assert flatten(unflatten(tree, {name: name for name in named})) == {name: name for name in named}
    with pytest.raises(KeyError, match=r"beit\.embeddings\.cls_token"):
        unflatten(tree, {})


def test_trees_without_children():
    tree = shapes(tiny_config(num_hidden_layers=0, num_labels=0), "image_classification")
    assert tree.beit.encoder == ()
    assert tree.classifier is None
    assert unflatten(tree, flatten(tree)) == tree


def test_names_are_attribute_paths():
    tree = shapes(tiny_config(), "image_classification")
    for name, shape in flatten(tree).items():
        node = tree
        for word in name.split("."):
            node = node[int(word)] if word.isdigit() else getattr(node, word)
        assert node == shape
    assert isinstance(tree.classifier, Linear)


def test_random_weights():
    config = tiny_config(layer_scale_init_value=0.25, use_relative_position_bias=True, hidden_size=48)
    named = param_shapes(config, "semantic_segmentation")
    arrays = random_arrays(config, named, 0, "float32")
    assert {name: array.shape for name, array in arrays.items()} == named
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    for name, array in arrays.items():
        last = name.rsplit(".", 1)[1]
        if last.startswith("lambda"):
            assert (array == 0.25).all()
        elif last == "weight" and array.ndim > 1:
            assert abs(array.std() / 0.02 - 1) < 6 / math.sqrt(2 * array.size), name
            assert abs(array.mean()) < 6 * 0.02 / math.sqrt(array.size), name
        else:
            assert (array == (1 if last in ("weight", "running_var") else 0)).all(), name


def test_random_weights_depend_on_the_seed_alone():
    config = tiny_config()
    one, same, other = (random_arrays(config, param_shapes(config, "model"), seed, "float64") for seed in (1, 1, 2))
    name = "beit.encoder.0.fc1.weight"
    assert np.array_equal(one[name], same[name])
    assert not np.array_equal(one[name], other[name])
