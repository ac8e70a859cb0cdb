"""`minibeit segment`: label maps, overlays, legends and their numbers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import NAMES, run, save, save_pictures
from PIL import Image

from minibeit import BeitForSemanticSegmentation, BeitImageProcessor
from minibeit.cli import segment
from minibeit.cli.pictures import OVERLAY, distinct_colours, indexed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("segment"), "segment")


def expected_map(checkpoint, path, size):
    processor = BeitImageProcessor.from_pretrained(checkpoint)
    outputs = BeitForSemanticSegmentation.from_pretrained(checkpoint)(processor(str(path)).pixel_values)
    return processor.post_process_semantic_segmentation(outputs, [size])[0], outputs.logits


def test_files_and_numbers_are_those_of_the_model(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png", size=(33, 47))
    output = tmp_path / "deep" / "out"
    code, out, err = run(capsys, "segment", path, "-m", checkpoint, "-o", output, "--overlay", "--scores", "--json")
    (row,) = json.loads(out)
    assert code == 0 and not err and (row["file"], row["height"], row["width"]) == (str(path), 33, 47)
    labels, logits = expected_map(checkpoint, path, (33, 47))
    assert len(np.unique(labels)) > 1

    with Image.open(row["labels"]) as picture:
        assert picture.mode == "P" and picture.size == (47, 33)
        np.testing.assert_array_equal(np.asarray(picture), labels)
        rgb = np.asarray(picture.convert("RGB"))
    areas = np.bincount(labels.ravel())
    assert [c["index"] for c in row["classes"]] == [i for i in np.argsort(-areas, kind="stable") if areas[i]]
    for c in row["classes"]:
        assert c["label"] == NAMES[c["index"]] and c["pixels"] == (labels == c["index"]).sum()
        assert c["share"] == c["pixels"] / labels.size
        assert (rgb[labels == c["index"]] == c["color"]).all()
    blend = (1 - OVERLAY) * np.asarray(Image.open(path), np.float32) + OVERLAY * rgb
    np.testing.assert_allclose(np.asarray(Image.open(row["overlay"])), blend, atol=0.51)  # rounded to bytes
    with np.load(row["scores"]) as scores:
        np.testing.assert_array_equal(scores["logits"], logits[0])
    legend = np.asarray(Image.open(row["legend"])).reshape(-1, 3)
    assert {tuple(c["color"]) for c in row["classes"]} <= set(map(tuple, legend.tolist()))
    assert sorted(p.name for p in output.iterdir()) == ["a_labels.png", "a_legend.png", "a_overlay.png", "a_scores.npz"]


def test_table_names_files_and_classes(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, _ = run(capsys, "segment", path, "-m", checkpoint, "-o", tmp_path / "out")
    assert code == 0 and "a_labels.png" in out and "a_overlay.png" not in out and "%" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_labels.png", "a_legend.png"]
    assert run(capsys, "segment", path, "-m", checkpoint, "-o", tmp_path / "out")[:2] == (0, out)  # once more


def test_a_few_classes_at_a_time_give_the_same_map(checkpoint, monkeypatch):
    processor = BeitImageProcessor.from_pretrained(checkpoint)
    logits = np.random.default_rng(0).integers(0, 3, (1, 11, 5, 4)).astype(np.float32)  # many ties
    whole = segment.label_map(processor, logits, (5, 4))
    np.testing.assert_array_equal(whole, logits[0].argmax(axis=0))
    larger = segment.label_map(processor, logits, (23, 17))
    for room in (1, 23 * 17 * 4 * 3):
        monkeypatch.setattr(segment, "ROOM", room)
        np.testing.assert_array_equal(segment.label_map(processor, logits, (5, 4)), whole)
        np.testing.assert_array_equal(segment.label_map(processor, logits, (23, 17)), larger)


def test_classes_that_cannot_win_are_left_out_and_no_others(checkpoint):
    processor = BeitImageProcessor.from_pretrained(checkpoint)
    logits = np.random.default_rng(0).standard_normal((1, 40, 6, 7)).astype(np.float32)
    logits[0, 10:] -= np.linspace(0, 8, 30, dtype=np.float32)[:, None, None]
    kept = segment.contenders(logits[0])
    assert 10 <= len(kept) < 40
    for size in ((3, 4), (6, 7), (61, 50)):
        (whole,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [size])
        assert set(np.unique(whole)) <= set(kept)
        np.testing.assert_array_equal(segment.label_map(processor, logits, size), whole)


def test_exif_orientation_turns_picture_and_map(capsys, checkpoint, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    code, out, _ = run(
        capsys, "segment", tmp_path / "turned.png", "-m", checkpoint, "-o", tmp_path, "--overlay", "--json"
    )
    (row,) = json.loads(out)
    assert code == 0 and (row["height"], row["width"]) == (30, 20)
    assert Image.open(row["labels"]).size == Image.open(row["overlay"]).size == (20, 30)


def test_bad_pictures_are_named_and_pictures_of_one_name_do_not_collide(capsys, checkpoint, tmp_path):
    (first,), (second,) = save_pictures(tmp_path / "1", "a.png"), save_pictures(tmp_path / "2", "A.jpg")
    bad = tmp_path / "bad.png"
    bad.write_bytes(first.read_bytes()[:200])
    code, out, err = run(capsys, "segment", first, bad, second, "-m", checkpoint, "-o", tmp_path / "out", "--json")
    rows = json.loads(out)
    assert code == 1 and [row["file"] for row in rows] == [str(first), str(bad), str(second)]
    assert err.count("\n") == 1 and str(bad) in err and "error" in rows[1]
    assert rows[0]["labels"].endswith("a_labels.png") and rows[2]["labels"].endswith("A-2_labels.png")


def test_an_input_is_never_overwritten(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a_labels.png")
    before = path.read_bytes()
    (other,) = save_pictures(tmp_path, "a.png")
    code, _, err = run(capsys, "segment", path, other, "-m", checkpoint, "-o", tmp_path)
    assert code == 2 and "a_labels.png" in err and err.count("\n") == 1 and path.read_bytes() == before
    code, _, err = run(capsys, "segment", other, "-m", checkpoint, "-o", path)
    assert code == 2 and "is a file" in err and path.read_bytes() == before


def test_needs_a_segmentation_checkpoint(capsys, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    code, _, err = run(capsys, "segment", path, "-o", tmp_path / "out")
    assert code == 2 and "--model" in err and err.count("\n") == 1
    folder = save(tmp_path / "model", "classify")
    code, _, err = run(capsys, "segment", path, "-o", tmp_path / "out", "-m", folder)
    assert code == 1 and "made for image classification" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_palettes():
    colours = distinct_colours(256)
    assert colours[:7] == distinct_colours(7) and len(set(colours)) == 256
    assert segment.palette("auto", 5) == colours[:5]
    ade = segment.palette("auto", 150)
    assert ade[:3] == [(120, 120, 120), (180, 120, 120), (6, 230, 230)]  # wall, building, sky
    assert segment.palette("ade20k", 5) == ade[:5]
    with pytest.raises(ValueError, match="150 colours"):
        segment.palette("ade20k", 151)


def test_more_classes_than_a_palette_holds_are_16_bit_gray():
    labels = np.array([[0, 299]])
    picture = indexed(labels, distinct_colours(300))
    assert picture.mode.startswith("I;16")
    np.testing.assert_array_equal(np.asarray(picture), labels)
