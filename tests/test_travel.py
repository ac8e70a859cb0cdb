"""Models, ops, outputs, configs and processors in other processes and copies: the same bits, and no address."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import available_backends, random_weights, tiny_config

from minibeit import BeitForImageClassification, BeitForSemanticSegmentation, BeitImageProcessor, CheckpointError
from minibeit.checkpoint import travel
from minibeit.checkpoint.save import save_checkpoint
from minibeit.ops import get_ops

CONFIG = tiny_config(image_size=32, use_relative_position_bias=True, hidden_size=48, intermediate_size=64)
CPU = [name for name in available_backends() if name in ("numpy", "numba")]


def model_of(kind, folder, backend, **more):
    """A model that was made, loaded from a mapped file, or loaded from a prepared one."""
    if kind == "made":
        return BeitForImageClassification(CONFIG, backend=backend, **more)
    arrays = random_weights(CONFIG, "image_classification", dtype="float32")
    save_checkpoint(folder, CONFIG, "image_classification", arrays)
    model = BeitForImageClassification.from_pretrained(folder, backend=backend, **more)
    if kind == "prepared":
        model.save_prepared(folder / "prepared")
        model = BeitForImageClassification.from_pretrained(folder / "prepared", backend=backend, **more)
    return model


KINDS = [(kind, backend) for kind in ("made", "mapped", "prepared") for backend in CPU
         if (kind, backend) != ("prepared", "numpy")]  # fmt: skip


@pytest.fixture(params=KINDS, ids="-".join)
def model(request, tmp_path, monkeypatch):
    monkeypatch.setattr(travel, "LEAST", 0)  # by reference however small
    return model_of(request.param[0], tmp_path, request.param[1], num_threads=1)


def test_pickle_and_deepcopy(model, rng):
    x = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = model(x).logits
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        np.testing.assert_array_equal(again(x).logits, expected)
        assert (again.config, again.dtype, again.num_threads) == (model.config, model.dtype, 1)
        assert again.ops.backend == model.ops.backend and again.params is not model.params


def test_a_copy_has_arrays_of_its_own(rng):
    model = BeitForImageClassification(CONFIG, backend="numpy")
    again = copy.deepcopy(model)
    model.arrays["classifier.weight"][:] = 0
    assert again.arrays["classifier.weight"].any() and again.params.classifier.weight.any()


@pytest.mark.parametrize("backend", CPU)
def test_ops_packed_weights_and_outputs(backend, rng):
    ops = get_ops(backend, None, "float32")
    again = pickle.loads(pickle.dumps(ops))
    assert again.origin == ops.origin and set(vars(again)) == set(vars(ops))
    assert copy.deepcopy(ops).backend == backend
    x = rng.standard_normal((1, 3, 64, 64)).astype(np.float32)
    config = CONFIG.replace(num_hidden_layers=4, out_indices=[1, 2, 3, 4], image_size=64)
    model = BeitForSemanticSegmentation(config, backend=backend)
    expected = model(x, output_hidden_states=True)
    model.params = pickle.loads(pickle.dumps(model.params))  # packed leaves by themselves
    found = pickle.loads(pickle.dumps(model(x, output_hidden_states=True)))
    np.testing.assert_array_equal(found.logits, expected.logits)
    for one, two in zip(copy.deepcopy(found).hidden_states, expected.hidden_states):
        np.testing.assert_array_equal(one, two)


def test_part_of_a_backend(rng):
    model = BeitForImageClassification(CONFIG, backend=CPU[-1], only=["linear"] if CPU[-1] == "numba" else None)
    again = pickle.loads(pickle.dumps(model))
    assert again.ops.origin == model.ops.origin


def test_configs_and_processors(rng):
    processor = BeitImageProcessor(size=32, extra={"a": 1})
    picture = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    batch = processor(picture)
    for turned in (lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy, copy.copy):
        assert turned(CONFIG) == CONFIG
        np.testing.assert_array_equal(turned(processor)(picture).pixel_values, batch.pixel_values)
        np.testing.assert_array_equal(turned(batch).pixel_values, batch["pixel_values"])


def test_a_mapped_model_is_small_to_send_and_its_file_must_stay(tmp_path, monkeypatch, rng):
    model = model_of("mapped", tmp_path, "numpy")
    assert len(pickle.dumps(model)) > 50_000  # a small model goes with its arrays
    monkeypatch.setattr(travel, "LEAST", 0)
    sent = pickle.dumps(model)
    assert len(sent) < 10_000
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a model .* the file is not here or has changed"):
        pickle.loads(sent)


def test_changed_arrays_travel_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(travel, "LEAST", 0)
    model = model_of("mapped", tmp_path, "numpy", dtype="float64")  # copies, which may be written to
    model.arrays["classifier.bias"][:] = 7
    assert (pickle.loads(pickle.dumps(model)).arrays["classifier.bias"] == 7).all()


def predict(model, x):
    return model(x).logits


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes(model, rng, method):
    x = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = model(x).logits
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(predict, (model, x)), expected)


@pytest.mark.slow
def test_loky_and_cloudpickle(model, rng):
    joblib, cloudpickle = pytest.importorskip("joblib"), pytest.importorskip("cloudpickle")
    x = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = model(x).logits
    for found in joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(lambda y: model(y).logits)(x) for _ in "ab"):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(lambda: model(x).logits))(), expected)


@pytest.mark.slow
def test_cross_validation(tmp_path):
    """In a process of its own, since a fault in a child would be one of memory."""
    pytest.importorskip("sklearn")
    script = """
import numpy as np, minibeit
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
model = minibeit.BeitModel(minibeit.BeitConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=24, image_size=16, patch_size=8), backend="numba")
x = np.random.default_rng(0).standard_normal((24, 3, 16, 16)).astype(np.float32)
y = np.arange(24) % 2
x[y == 1] += 1
steps = make_pipeline(FunctionTransformer(lambda x: model(x).pooler_output), RidgeClassifier())
one, two = (cross_val_score(steps, x, y, cv=3, n_jobs=n, error_score="raise") for n in (1, 2))
assert (one == two).all() and one.mean() > 0.8, (one, two)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
