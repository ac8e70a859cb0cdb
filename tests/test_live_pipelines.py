"""Pipelines beside those of transformers, on the same checkpoints and images: the same keys, order and labels."""

from __future__ import annotations

import numpy as np
import pytest
from cli_helpers import save, save_pictures
from tolerances import PIPELINE32, PIPELINE_MASKS

import minibeit

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [str(path) for path in save_pictures(folder, "a.png", "b.png", "c.png", size=(30, 45))]


def both(task, folder, **options):
    transformers = pytest.importorskip("transformers")
    processor = transformers.BeitImageProcessorPil.from_pretrained(folder)
    theirs = transformers.pipeline(task, model=str(folder), image_processor=processor, device="cpu", **options)
    return minibeit.pipeline(task, str(folder), **options), theirs


@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"function_to_apply": "sigmoid"}, {"top_k": 99}])
def test_classification(tmp_path, paths, problem, options):
    ours, theirs = both("image-classification", save(tmp_path, "classify", problem_type=problem))
    for found, expected in zip(ours(paths, **options), theirs(paths, **options)):
        assert [one.keys() for one in found] == [one.keys() for one in expected]
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        np.testing.assert_allclose([o["score"] for o in found], [e["score"] for e in expected], atol=PIPELINE32)


def test_one_output_without_a_problem(tmp_path, paths):
    ours, theirs = both("image-classification", save(tmp_path, "classify", id2label={0: "age"}))
    assert ours(paths[0])[0]["score"] == pytest.approx(theirs(paths[0])[0]["score"], abs=PIPELINE32)


def test_segmentation(tmp_path, paths):
    ours, theirs = both("image-segmentation", save(tmp_path, "segment"))
    for found, expected in zip(ours(paths), theirs(paths)):
        assert [(one["label"], one["score"]) for one in found] == [(one["label"], one["score"]) for one in expected]
        for one, other in zip(found, expected):
            assert (one["mask"].size, one["mask"].mode) == (other["mask"].size, other["mask"].mode)
            differ = np.mean(np.asarray(one["mask"]) != np.asarray(other["mask"]))
            assert differ <= PIPELINE_MASKS


@pytest.mark.parametrize("pool", [False, True])
def test_features(tmp_path, paths, pool):
    ours, theirs = both("image-feature-extraction", save(tmp_path, "bare"))
    for found, expected in zip(ours(paths, pool=pool), theirs(paths, pool=pool)):
        np.testing.assert_allclose(found, expected, atol=PIPELINE32)
    tensors = ours(paths[0], pool=pool, return_tensors=True), theirs(paths[0], pool=pool, return_tensors=True)
    assert tuple(tensors[0].shape) == tuple(tensors[1].shape)


def test_generators_and_batches(tmp_path, paths):
    ours, theirs = both("image-classification", save(tmp_path, "classify"), batch_size=2, top_k=1)
    found, expected = ours(path for path in paths), theirs(path for path in paths)
    assert [one[0]["label"] for one in found] == [one[0]["label"] for one in expected]
