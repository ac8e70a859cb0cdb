"""Low precision through the command line, and on the shipped checkpoint: files, sizes, and what it costs on digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import distance
from tolerances import BFLOAT16_DIGITS, INT8_DIGITS

pytest.importorskip("numba")

import minibeit
from minibeit.checkpoint.formats import load_file
from minibeit.cli import main
from minibeit.ops.low_precision import migration_factors

DIGITS = Path(__file__).resolve().parent.parent / "weights" / "digits"
IMAGES = DIGITS / "images"
CHANGED = 0.003  # the share of images whose class may change


def digits(dtype, backend="numba", folder=DIGITS):
    return minibeit.BeitForImageClassification.from_pretrained(folder, dtype=dtype, backend=backend)


@pytest.fixture(scope="module")
def pixels():
    with np.load(DIGITS / "held_out.npz", allow_pickle=False) as file:
        return minibeit.BeitImageProcessor.from_pretrained(DIGITS)(list(file["images"])).pixel_values


@pytest.fixture(scope="module")
def logits(pixels):
    return digits("float32")(pixels).logits


@pytest.mark.parametrize(("dtype", "limit"), [("int8", INT8_DIGITS), ("bfloat16", BFLOAT16_DIGITS)])
def test_no_held_out_digit_changes_its_class(dtype, limit, pixels, logits):
    found = digits(dtype)(pixels).logits
    assert distance(found, logits) < limit
    assert np.mean(found.argmax(1) != logits.argmax(1)) <= CHANGED


def convert(*words):
    return main(["convert", str(DIGITS), *map(str, words)])


def test_convert_writes_a_portable_file_of_a_quarter(tmp_path, capsys):
    assert convert(tmp_path / "low", "--dtype", "int8") == 0
    assert "load them with --dtype int8" in capsys.readouterr().out
    written = {file.name for file in (tmp_path / "low").iterdir()}
    assert written == {"config.json", "prepared.safetensors", "preprocessor_config.json"}
    size, plain = (
        file.stat().st_size for file in (tmp_path / "low" / "prepared.safetensors", DIGITS / "model.safetensors")
    )
    assert size < 0.4 * plain  # the tiny model's embeddings, norms and tables weigh more than those of base: 0.265
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    for backend in ("numba", "numpy"):
        again, direct = digits("int8", backend, tmp_path / "low"), digits("int8", backend)
        assert np.array_equal(again(x).logits, direct(x).logits)
    assert main(["classify", "-m", str(tmp_path / "low"), "--dtype", "int8", "--json", str(IMAGES)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["predictions"][0]["label"] for row in found] == [Path(row["file"]).stem.split("_")[1] for row in found]
    assert main(["classify", "-m", str(tmp_path / "low"), str(IMAGES)]) == 1
    assert "holds int8 weights, but dtype float32 was asked for" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_convert_writes_packed_weights(dtype, tmp_path):
    assert convert(tmp_path / "low", "--dtype", dtype, "--prepared") == 0
    layout = load_file(tmp_path / "low" / "prepared.safetensors").metadata["layout"]
    assert f", {dtype} for " in layout
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    assert np.array_equal(digits(dtype, folder=tmp_path / "low")(x).logits, digits(dtype)(x).logits)


def planted(folder, channel=5, factor=64):
    """The digits' checkpoint with a channel after a layer norm 64 times as large, read by weights 1/64 as large."""
    model = digits("float32")
    arrays = {name: array.copy() for name, array in model.arrays.items()}
    for name in ("norm1.weight", "norm1.bias"):
        arrays[f"beit.encoder.2.{name}"][channel] *= factor
    for name in ("query", "key", "value"):
        arrays[f"beit.encoder.2.attention.{name}.weight"][:, channel] /= factor
    minibeit.BeitForImageClassification(model.config, arrays=arrays, backend="numpy").save_pretrained(folder)
    shutil.copy(DIGITS / "preprocessor_config.json", folder)
    return arrays


def test_calibration_moves_scales_by_what_images_show(tmp_path, pixels, logits):
    arrays = planted(tmp_path / "planted")
    words = [tmp_path / "planted", tmp_path / "low", "--dtype", "int8", "--calibrate", IMAGES]
    assert main(["convert", *map(str, words)]) == 0
    plain, trace = digits("float32", folder=tmp_path / "planted"), minibeit.Trace("encoder.2.norm1")
    batch = minibeit.BeitImageProcessor.from_pretrained(DIGITS)([str(file) for file in sorted(IMAGES.glob("*.png"))])
    plain(batch.pixel_values, trace=trace)
    attention = [arrays[f"beit.encoder.2.attention.{name}.weight"] for name in ("query", "key", "value")]
    factors = migration_factors(np.abs(trace["encoder.2.norm1"]).max((0, 1)), np.abs(np.concatenate(attention)).max(0))
    assert factors[5] == 64
    stored = load_file(tmp_path / "low" / "prepared.safetensors").tensors
    assert np.array_equal(stored["beit.encoder.2.norm1.weight"], arrays["beit.encoder.2.norm1.weight"] / factors)
    found = digits("int8", folder=tmp_path / "low")(pixels).logits
    assert distance(found, logits) < INT8_DIGITS and np.mean(found.argmax(1) != logits.argmax(1)) <= CHANGED


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--dtype", "bfloat16", "--calibrate", IMAGES], 2, "--calibrate is for --dtype int8, found bfloat16"),
        (["--dtype", "float16", "--prepared"], 2, "packed weights are float32, bfloat16 or int8"),
        (["--dtype", "int8", "--calibrate", "EMPTY"], 1, "expected a folder of images, found none in it"),
    ],
)
def test_what_convert_refuses(words, code, said, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [tmp_path / "empty" if word == "EMPTY" else word for word in words]
    assert convert(tmp_path / "low", *words) == code
    assert said in capsys.readouterr().err and not (tmp_path / "low").exists()
