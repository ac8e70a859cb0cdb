"""`minibeit classify`: the numbers are the model's, in input order, in every format; bad pictures are named."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from cli_helpers import NAMES, SIZE, run, save, save_pictures
from PIL import Image

from minibeit import BeitForImageClassification, BeitImageProcessor
from minibeit.checkpoint.formats import read_tensors, write_safetensors
from minibeit.cli.loading import shipped_checkpoint
from minibeit.scores import scores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("classify"), "classify")


def expected_logits(checkpoint, paths):
    pixels = BeitImageProcessor.from_pretrained(checkpoint)([str(path) for path in paths]).pixel_values
    return BeitForImageClassification.from_pretrained(checkpoint, dtype="float64")(pixels).logits


def test_json_has_the_models_numbers_in_input_order(capsys, checkpoint, tmp_path):
    paths = save_pictures(tmp_path, "c.png", "a.png", "b.png")
    code, out, err = run(capsys, "classify", *paths, "-m", checkpoint, "--json", "--dtype", "float64", "-b", 2)
    rows = json.loads(out)
    assert code == 0 and not err
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    for row, logits in zip(rows, expected_logits(checkpoint, paths)):
        best = np.argsort(-logits)
        assert [p["index"] for p in row["predictions"]] == list(best)
        assert [p["label"] for p in row["predictions"]] == [NAMES[i] for i in best]
        np.testing.assert_allclose([p["logit"] for p in row["predictions"]], logits[best], rtol=1e-12, atol=1e-14)
        powers = np.exp(logits[best])
        np.testing.assert_allclose([p["score"] for p in row["predictions"]], powers / powers.sum(), rtol=1e-12)


def test_csv_has_the_same_numbers_as_json(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "with, comma.png")
    (row,) = json.loads(run(capsys, "classify", path, "-m", checkpoint, "--json", "-k", 2)[1])
    code, out, _ = run(capsys, "classify", path, "-m", checkpoint, "--csv", "-k", 2)
    lines = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(lines) == 2
    for rank, (line, prediction) in enumerate(zip(lines, row["predictions"]), 1):
        assert line == {"file": str(path), "rank": str(rank), **{k: str(v) for k, v in prediction.items()}}


def test_table_shows_each_picture_once_and_no_more_labels_than_there_are(capsys, checkpoint, tmp_path):
    save_pictures(tmp_path, "a.png", "b.png")
    code, out, _ = run(capsys, "classify", tmp_path, "-m", checkpoint, "-k", 9)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 1 + 2 * len(NAMES)
    assert out.count("a.png") == out.count("b.png") == 1 and lines[0].split() == ["image", "probability", "label"]
    assert {line[lines[0].index("label") :] for line in lines} == {"label", *NAMES}  # aligned


def test_bad_pictures_are_named_and_the_others_go_on(capsys, checkpoint, tmp_path):
    good, other = save_pictures(tmp_path, "good.png", "other.png", size=(60, 60))
    truncated, empty, text = tmp_path / "truncated.png", tmp_path / "empty.png", tmp_path / "text.png"
    truncated.write_bytes(good.read_bytes()[:2000])
    empty.touch()
    text.write_text("hello")
    files = [truncated, good, empty, text, tmp_path / "gone.png", other]
    code, out, err = run(capsys, "classify", *files, "-m", checkpoint, "--json")
    rows = json.loads(out)
    assert code == 1 and [row["file"] for row in rows] == list(map(str, files))
    assert ["error" in row for row in rows] == [True, False, True, True, True, False]
    lines = err.splitlines()
    assert len(lines) == 4 and all(str(file) in line for file, line in zip([truncated, empty, text, files[4]], lines))
    np.testing.assert_allclose(
        [row["predictions"][0]["logit"] for row in (rows[1], rows[5])],
        expected_logits(checkpoint, [good, other]).max(axis=1),
        rtol=1e-4,  # float32
    )


def test_a_picture_the_model_refuses_is_named(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify")
    BeitImageProcessor(size=SIZE + 1).save_pretrained(folder)  # no multiple of the patch size
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, err = run(capsys, "classify", path, "-m", folder)
    assert code == 1 and err.startswith(f"minibeit: {path}: pixel_values: ") and err.count("\n") == 1


def test_pictures_of_different_shapes_share_no_batch(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify")
    BeitImageProcessor(do_resize=False).save_pretrained(folder)
    paths = [*save_pictures(tmp_path, "a.png", size=(16, 16)), *save_pictures(tmp_path, "b.png", size=(8, 20))]
    code, out, _ = run(capsys, "classify", *paths, "-m", folder, "--json")
    assert code == 0 and [row["file"] for row in json.loads(out)] == [str(path) for path in paths]


def test_scores_of_each_problem_type():
    logits = np.array([0.0, np.log(3), -1000.0], np.float32)
    np.testing.assert_allclose(scores(logits, None), [0.25, 0.75, 0], rtol=1e-6)
    np.testing.assert_allclose(scores(logits, "single_label_classification"), [0.25, 0.75, 0], rtol=1e-6)
    np.testing.assert_allclose(scores(logits, "multi_label_classification"), [0.5, 0.75, 0], rtol=1e-6)
    np.testing.assert_array_equal(scores(logits, "regression"), logits)
    np.testing.assert_array_equal(scores(logits[1:2], None), logits[1:2])


def test_regression_prints_the_value(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify", id2label={0: "age"})
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, _ = run(capsys, "classify", path, "-m", folder)
    value = expected_logits(folder, [path])[0, 0]
    assert code == 0 and "%" not in out and "value" in out
    assert float(out.split()[-2]) == pytest.approx(value, rel=1e-4)


def test_without_processor_settings_the_defaults_are_stated(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify", processor=False)
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, err = run(capsys, "classify", path, "-m", folder)
    assert code == 0 and err.count("\n") == 1 and "16x16 (bilinear)" in err and "0.5" in err
    BeitImageProcessor(size=SIZE, resample=2).save_pretrained(folder)
    assert run(capsys, "classify", path, "-m", folder) == (0, out, "")
    file = folder / "model.safetensors"  # a file finds what lies beside it
    assert run(capsys, "classify", path, "-m", file) == (0, out, "")


def test_one_channel(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify", processor=False, num_channels=1)
    (path,) = save_pictures(tmp_path, "a.png")
    assert run(capsys, "classify", path, "-m", folder, "-q")[0] == 0


@pytest.mark.parametrize("kind, name", [("segment", "semantic segmentation"), ("mask", "masked image modeling")])
def test_a_checkpoint_of_another_task_is_refused(capsys, tmp_path, kind, name):
    folder = save(tmp_path / "model", kind)
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, err = run(capsys, "classify", path, "-m", folder)
    assert code == 1 and not out and err.count("\n") == 1 and f"made for {name}" in err


def test_damaged_checkpoints_are_one_line(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify")
    (path,) = save_pictures(tmp_path, "a.png")
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[:100], whole[:-100], b"", b"hello"):
        (folder / "model.safetensors").write_bytes(content)
        code, out, err = run(capsys, "classify", path, "-m", folder)
        assert code == 1 and not out and err.count("\n") == 1 and "model.safetensors" in err
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{")
    code, _, err = run(capsys, "classify", path, "-m", folder)
    assert code == 1 and err.count("\n") == 1 and "config.json" in err


def test_a_checkpoint_that_computes_nan_gives_no_labels(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify")
    tensors = {name: np.array(array) for name, array in read_tensors(folder).items()}
    tensors["classifier.bias"][1] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, err = run(capsys, "classify", path, "-m", folder)
    assert code == 1 and not out and err.count("\n") == 1 and "NaN" in err


def test_shipped_digits_by_default(capsys):
    images = shipped_checkpoint() / "images"
    code, out, err = run(capsys, "classify", images, "--json", "-k", 1)
    rows = json.loads(out)
    assert code == 0 and "only handwritten digits" in err and "--model" in err and err.count("\n") == 1
    assert run(capsys, "classify", images, "--json", "-k", 1, "-q") == (0, out, "")
    assert code == 0
    assert [row["predictions"][0]["label"] for row in rows] == [str(digit) for digit in range(10)]


def test_grayscale_palette_and_transparent_files_are_read(capsys, checkpoint, tmp_path):
    picture = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20).astype(np.uint8))
    for mode, name in (("L", "l.png"), ("P", "p.gif"), ("RGBA", "rgba.png"), ("CMYK", "cmyk.jpg"), ("1", "one.bmp")):
        picture.convert(mode).save(tmp_path / name)
    code, out, err = run(capsys, "classify", tmp_path, "-m", checkpoint, "--json")
    assert code == 0 and not err and len(json.loads(out)) == 5
