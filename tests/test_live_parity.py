"""minibeit beside transformers on PyTorch, live: random models, the originals' own sizes, full sizes, files.

The yardstick is the distance from a float64 run; ours may be at most twice PyTorch float32's own (see tolerances.py).
MINIBEIT_PARITY_SEED and MINIBEIT_PARITY_COUNT choose other random models.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import parity
import torch
import transformers
from conftest import distance
from random_configs import draw
from tolerances import FACTOR, GOLDEN64, LARGEST_MODEL64

import minibeit

pytestmark = pytest.mark.live
transformers.logging.set_verbosity_error()

FIRST = int(os.environ.get("MINIBEIT_PARITY_SEED", "0"))
COUNT = int(os.environ.get("MINIBEIT_PARITY_COUNT", "300"))
BACKEND = os.environ.get("MINIBEIT_PARITY_BACKEND", "numpy")
TINY = dict(
    image_size=30,
    patch_size=2,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=37,
    vocab_size=100,
    use_mask_token=True,
    use_relative_position_bias=True,
    initializer_range=0.02,
    num_labels=3,
    out_indices=[0, 1, 2, 3],
)  # the sizes of transformers' own tests; their batch is 13
BASE = dict(use_relative_position_bias=True)
LARGE = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    use_relative_position_bias=True,
)


@pytest.fixture(autouse=True, scope="module")
def without_gradients():
    with torch.no_grad():
        yield


def compare(task, settings, arrays, seed=0, model_type="beit", backend=BACKEND, **changes) -> dict[str, float]:
    hf = parity.hf_model(task, settings, seed, model_type)
    return parity.ratios(hf, parity.our_model(task, hf, "float32", backend, **changes), arrays)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# Random models ------------------------------------------------------------------------------------------------------


def test_random_models(capsys):
    found, bad, tasks, ratios = 0, [], Counter(), []
    for seed in range(FIRST, FIRST + COUNT):
        made = draw(seed)
        named = compare(made.task, made.settings, made.arrays, seed, made.model_type, **made.changes)
        assert named, f"compared nothing: {made}"
        found += 1
        tasks[f"{made.model_type} {made.task}"] += 1
        ratios += named.values()
        bad += [
            f"{name}: {value:.2f} times PyTorch's error ({made})" for name, value in named.items() if value > FACTOR
        ]
    middle, high, most = np.quantile(ratios, [0.5, 0.99, 1.0])
    with capsys.disabled():
        print(
            f"\ncompared {found} models, {len(ratios)} tensors; error in units of PyTorch float32's: "
            f"median {middle:.2f}, 99% {high:.2f}, largest {most:.2f}"
        )
        print("  " + ", ".join(f"{count} {task}" for task, count in sorted(tasks.items())))
    assert not bad, f"{len(bad)} of {len(ratios)} tensors:\n" + "\n".join(bad[:20])
    assert found == COUNT
    assert len(tasks) == 8 or COUNT < 100, tasks
    assert len(ratios) > 5 * COUNT


def test_random_models_in_float64():
    worst = 0.0
    for seed in range(FIRST, FIRST + 40):
        made = draw(seed)
        hf = parity.hf_model(made.task, made.settings, seed, made.model_type)
        ours = parity.our_model(made.task, hf, "float64", **made.changes)
        truth, found = parity.hf_outputs(hf, made.arrays), parity.our_outputs(ours, made.arrays)
        assert set(found) == set(truth)
        for name in truth:
            assert found[name].dtype == np.float64
            if truth[name].size and not np.isnan(truth[name]).any():
                worst = max(worst, distance(found[name], truth[name]))
    assert worst <= LARGEST_MODEL64


def test_exact_attention_is_the_attention_of_transformers():
    hf = parity.hf_model("model", TINY, 0)
    exact = parity.hf_outputs(hf, {"pixel_values": pixels(2, 3, 30, 30)})
    hf.set_attn_implementation("sdpa")
    sdpa = parity.hf_outputs(hf, {"pixel_values": pixels(2, 3, 30, 30)}, output_attentions=False)
    for name, array in sdpa.items():
        assert distance(exact[name], array) <= GOLDEN64
    hf.set_attn_implementation("eager")
    eager = parity.hf_outputs(hf, {"pixel_values": pixels(2, 3, 30, 30)})
    for i in range(4):  # float32 softmax: equal to float32's rounding, and visibly no better
        assert 1e-9 < distance(eager[f"attentions.{i}"], exact[f"attentions.{i}"]) < 1e-6


# The sizes of the originals' own tests ------------------------------------------------------------------------------


def check(named: dict[str, float], *names: str) -> None:
    assert set(names) <= set(named)
    assert max(named.values()) <= FACTOR, {name: value for name, value in named.items() if value > FACTOR}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("task", ["model", "image_classification", "masked_image_modeling", "semantic_segmentation"])
def test_original_sizes(task, channels):
    settings = {**TINY, "num_channels": channels}
    arrays = {"pixel_values": pixels(13, channels, 30, 30)}
    rng = np.random.default_rng(1)
    if task == "image_classification":
        arrays["labels"] = rng.integers(0, 3, 13)
    if task == "masked_image_modeling":
        arrays["bool_masked_pos"] = rng.random((13, 225)) < 0.4
        arrays["labels"] = rng.integers(0, 100, int(arrays["bool_masked_pos"].sum()))
    if task == "semantic_segmentation":
        arrays["labels"] = rng.integers(0, 3, (13, 30, 30))
    hf = parity.hf_model(task, settings, 0)
    ours = parity.our_model(task, hf, "float32", BACKEND)
    check(parity.ratios(hf, ours, arrays), "hidden_states.4", "attentions.3")
    found = parity.our_outputs(ours, arrays)
    shapes = {
        "model": {"last_hidden_state": (13, 226, 32), "pooler_output": (13, 32)},
        "image_classification": {"logits": (13, 3), "loss": ()},
        "masked_image_modeling": {"logits": (13, 225, 100), "loss": ()},
        "semantic_segmentation": {"logits": (13, 3, 60, 60), "auxiliary_logits": (13, 3, 15, 15), "loss": ()},
    }
    assert {name: found[name].shape for name in shapes[task]} == shapes[task]


@pytest.mark.parametrize("mode", ["regression", "multi_label_classification", "single_label_classification"])
def test_original_problem_types(mode):
    K = 1 if mode == "regression" else 3
    rng = np.random.default_rng(2)
    labels = {
        "regression": rng.standard_normal((13, 1)).astype(np.float32),
        "multi_label_classification": (rng.random((13, 3)) < 0.5).astype(np.float32),
        "single_label_classification": rng.integers(0, 3, 13),
    }
    settings = {**TINY, "problem_type": mode, "num_labels": K}
    arrays = {"pixel_values": pixels(13, 3, 30, 30), "labels": labels[mode]}
    check(compare("image_classification", settings, arrays), "loss", "logits")


def test_original_backbones():
    arrays = {"pixel_values": pixels(13, 3, 30, 30)}
    plain = {name: value for name, value in TINY.items() if name != "out_indices"}
    hf = parity.hf_model("backbone", plain, 0)
    ours = parity.our_model("backbone", hf, "float32", BACKEND)
    check(parity.ratios(hf, ours, arrays), "feature_maps.0")
    maps = ours(arrays["pixel_values"]).feature_maps
    assert [m.shape for m in maps] == [(13, 32, 15, 15)]
    assert ours.channels == hf.channels == [32]
    assert list(ours.stage_names) == list(hf.stage_names)
    assert list(ours.out_features) == list(hf.out_features) == ["stage4"]
    four = {**plain, "out_features": ["stem", "stage1", "stage3", "stage4"], "add_fpn": True}
    check(compare("backbone", four, arrays), "feature_maps.3")


def test_other_resolution_than_the_configs():
    for size in ((60, 60), (24, 36)):
        arrays = {"pixel_values": pixels(2, 3, *size)}
        for settings in (TINY, {**TINY, "use_absolute_position_embeddings": True, "use_relative_position_bias": False}):
            check(compare("image_classification", settings, arrays), "logits")


# Full sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings", "size"),
    [
        ("image_classification", {**BASE, "num_labels": 1000}, 224),
        (
            "masked_image_modeling",
            {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 8192},
            224,
        ),
        ("semantic_segmentation", {**BASE, "image_size": 640, "num_labels": 150, "out_indices": [3, 5, 7, 11]}, 640),
        ("image_classification", {**LARGE, "num_labels": 1000}, 224),
    ],
    ids=["base classification", "base MIM", "base ADE20K 640", "large classification"],
)
def test_full_size(task, settings, size, capsys):
    arrays = {"pixel_values": pixels(1, 3, size, size)}
    rng = np.random.default_rng(3)
    if task == "masked_image_modeling":
        arrays["bool_masked_pos"] = rng.random((1, 196)) < 0.4
        arrays["labels"] = rng.integers(0, 8192, int(arrays["bool_masked_pos"].sum()))
    if task == "semantic_segmentation":
        arrays["labels"] = rng.integers(0, 150, (1, size, size))
    named = compare(task, settings, arrays)
    with capsys.disabled():
        print(
            f"\n{task} {size}: {len(named)} tensors, logits {named['logits']:.2f}, largest {max(named.values()):.2f} "
            "times PyTorch float32's error"
        )
    check(named, "logits")


@pytest.mark.slow
def test_full_size_on_numba(capsys):
    """The classifier's sums decide: 384 products summed in one go made the logits 1.9 times as wrong as PyTorch's."""
    pytest.importorskip("numba")
    arrays = {"pixel_values": pixels(1, 3, 224, 224)}
    named = compare("image_classification", {**BASE, "num_labels": 1000}, arrays, backend="numba")
    with capsys.disabled():
        print(f"\nnumba, base classification: logits {named['logits']:.2f} times PyTorch float32's error")
    assert named["logits"] <= 1.5


MEASURE = """
import pathlib, resource
import numpy as np
from minibeit import BeitConfig, BeitForSemanticSegmentation
config = BeitConfig.from_dict(dict(image_size=640, use_relative_position_bias=True, num_labels=150,
                                   out_indices=[3, 5, 7, 11]))
model = BeitForSemanticSegmentation(config, backend="numpy")
out = model(np.random.default_rng(0).standard_normal((1, 3, 640, 640), dtype=np.float32))
assert out.logits.shape == (1, 150, 160, 160)
status = pathlib.Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""  # not getrusage: on Linux a process inherits the peak of the one that started it


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_segmenting_640_pixels_in_numpy_takes_less_than_3_gb(capsys):
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    with capsys.disabled():
        print(f"\npeak memory of the NumPy reference at 640x640: {peak / 1e9:.2f} GB")
    assert peak < 3e9


# Files --------------------------------------------------------------------------------------------------------------

FILE_CASES = {
    "model": {},
    "image_classification": {},
    "masked_image_modeling": {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
    "semantic_segmentation": {"auxiliary_concat_input": True, "auxiliary_channels": 8},
    "backbone": {"add_fpn": True, "use_shared_relative_position_bias": True},
}


def file_settings(task):
    return {**TINY, "image_size": 12, "num_hidden_layers": 3, **FILE_CASES[task]}


@pytest.mark.parametrize("task", FILE_CASES)
def test_transformers_loads_what_minibeit_saves(task, tmp_path):
    ours = parity.our_model(task, parity.hf_model(task, file_settings(task), 0), "float32")
    ours.save_pretrained(tmp_path)
    hf, info = getattr(transformers, parity.CLASSES[task]).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    arrays = {"pixel_values": pixels(2, 3, 12, 12)}
    found, theirs = parity.our_outputs(ours, arrays), parity.hf_outputs(hf.eval(), arrays, output_attentions=False)
    assert theirs
    for name, array in theirs.items():
        assert distance(found[name], array) < 2e-6, name
    assert hf.config.architectures == [parity.CLASSES[task]]


@pytest.mark.parametrize("task", FILE_CASES)
def test_minibeit_loads_what_transformers_saves(task, tmp_path, recwarn):
    hf = parity.hf_float32(parity.hf_model(task, file_settings(task), 0))
    hf.save_pretrained(tmp_path)
    ours = getattr(minibeit, parity.CLASSES[task]).from_pretrained(tmp_path, dtype="float64", backend="numpy")
    arrays = {"pixel_values": pixels(2, 3, 12, 12)}
    found, theirs = parity.our_outputs(ours, arrays), parity.hf_outputs(hf, arrays)
    assert set(found) == set(theirs)
    for name, array in theirs.items():
        assert distance(found[name], array) < 2e-6, name
    assert not [str(w.message) for w in recwarn if "minibeit" in str(w.filename)]


@pytest.mark.parametrize("task", ["model", "image_classification"])
def test_data2vec_files(task, tmp_path):
    hf = parity.hf_float32(parity.hf_model(task, {**TINY, "image_size": 12}, 0, "data2vec-vision"))
    hf.save_pretrained(tmp_path / "theirs")
    ours = getattr(minibeit, parity.CLASSES[task]).from_pretrained(tmp_path / "theirs", backend="numpy")
    arrays = {"pixel_values": pixels(2, 3, 12, 12)}
    for name, array in parity.hf_outputs(hf, arrays).items():
        assert distance(parity.our_outputs(ours, arrays)[name], array) < 2e-6, name
    ours.save_pretrained(tmp_path / "ours")
    options = {"add_pooling_layer": True} if task == "model" else {}
    again, info = type(hf).from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert again.config.model_type == "data2vec-vision"
