"""The files of the shipped checkpoint fit together: split, held-out pictures, PNGs, config, golden logits, size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

HOME = Path(__file__).resolve().parent.parent
FOLDER = HOME / "weights" / "digits"
GOLDEN = HOME / "tests" / "data" / "digits_logits.safetensors"


@pytest.fixture(scope="module")
def held_out():
    with np.load(FOLDER / "held_out.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights():
    spec = importlib.util.spec_from_file_location("shipped_weights", HOME / "weights" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_split_is_a_partition_and_every_class_is_held_out_in_its_share(held_out):
    split = json.loads((FOLDER / "split.json").read_text())
    assert sorted(split["train"] + split["held_out"]) == list(range(1797))
    assert len(split["held_out"]) == 360
    np.testing.assert_array_equal(held_out["indices"], split["held_out"])
    assert held_out["images"].shape == (360, 8, 8) and held_out["images"].dtype == np.uint8
    assert np.bincount(held_out["labels"]).min() >= 34
    levels = np.rint(np.arange(17) * 255 / 16)
    assert set(np.unique(held_out["images"])) <= set(levels)


def test_pngs_are_held_out_pictures_one_of_each_class(held_out):
    paths = sorted((FOLDER / "images").glob("*.png"))
    assert len(paths) == 10
    for digit, path in enumerate(paths):
        _, label, index = path.stem.split("_")
        place = list(held_out["indices"]).index(int(index))
        assert int(label) == digit == held_out["labels"][place]
        np.testing.assert_array_equal(np.asarray(Image.open(path)), held_out["images"][place])


def test_config_names_the_digits_and_the_whole_is_small():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert config["label2id"] == {str(digit): digit for digit in range(10)}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 3_000_000


def test_golden_logits_are_right_on_98_percent(held_out):
    with safe_open(GOLDEN, "numpy") as file:
        assert {"seed", "torch", "transformers"} <= set(file.metadata())
        float32, float64 = file.get_tensor("logits_float32"), file.get_tensor("logits_float64")
        np.testing.assert_array_equal(file.get_tensor("indices"), held_out["indices"])
        np.testing.assert_array_equal(file.get_tensor("labels"), held_out["labels"])
    assert float32.dtype == np.float32 and float64.dtype == np.float64
    assert np.abs(float32 - float64).max() < 2e-5
    assert (float32.argmax(1) == held_out["labels"]).mean() >= 0.98


def test_path_gives_the_folder_and_names_what_ships(weights):
    assert weights.path() == FOLDER
    with pytest.raises(FileNotFoundError, match="'letters'; found digits"):
        weights.path("letters")
