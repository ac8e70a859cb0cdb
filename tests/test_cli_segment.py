"""`minibeit segment`: label maps, overlays, legends and their numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_helpers import NAMES, run, save, save_pictures
from PIL import Image

from minibeit import BeitForSemanticSegmentation, BeitImageProcessor
from minibeit.cli import segment
from minibeit.colours import distinct_colours
from minibeit.drawing import OVERLAY, indexed
from minibeit.sliding import Inference, largest_logit
from minibeit.sliding import segment as segment_image


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


def test_overlay_and_legend_in_one_image(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    words = ("segment", path, "-m", checkpoint, "-o", tmp_path / "out", "--figure", "--json")
    (row,) = json.loads(run(capsys, *words, "--overlay")[1])
    figure, overlay, legend = (np.asarray(Image.open(row[kind])) for kind in ("figure", "overlay", "legend"))
    np.testing.assert_array_equal(figure[: len(overlay), : overlay.shape[1]], overlay)
    np.testing.assert_array_equal(figure[: len(legend), overlay.shape[1] :], legend)
    (alone,) = json.loads(run(capsys, *words)[1])
    assert "overlay" not in alone
    np.testing.assert_array_equal(np.asarray(Image.open(alone["figure"])), figure)


def test_table_names_files_and_classes(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, _ = run(capsys, "segment", path, "-m", checkpoint, "-o", tmp_path / "out")
    assert code == 0 and "a_labels.png" in out and "a_overlay.png" not in out and "%" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_labels.png", "a_legend.png"]
    assert run(capsys, "segment", path, "-m", checkpoint, "-o", tmp_path / "out")[:2] == (0, out)  # once more


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


def labels_in(row):
    with Image.open(row["labels"]) as picture:
        return np.asarray(picture)


def test_sliding_windows_scales_and_mirror_images(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png", size=(33, 57))
    model = BeitForSemanticSegmentation.from_pretrained(checkpoint)
    processor = BeitImageProcessor.from_pretrained(checkpoint)
    seen = {}
    for words, how in {
        ("--slide",): Inference("slide", 16, 10, 16, patch=4),
        ("--slide", "--window", "12", "--stride", "5", "--short-side", "20"): Inference("slide", 12, 5, 20, patch=4),
        ("--slide", "--scales", "1", "1.5", "--flip", "-b", "3"): Inference("slide", 16, 10, 16, (1, 1.5), True, 3, 4),
        ("--whole",): Inference("whole", short_side=16, patch=4),
        ("--flip",): Inference(flip=True),
    }.items():
        code, out, err = run(capsys, "segment", path, "-m", checkpoint, "-o", tmp_path / "out", "--json", *words)
        assert code == 0 and not err
        with Image.open(path) as picture:
            expected = segment_image(lambda x: model(x).logits, processor, picture, (33, 57), how)
        np.testing.assert_array_equal(labels_in(json.loads(out)[0]), expected)
        seen[expected.tobytes()] = words
    assert len(seen) == 5  # each of them changes the map


def test_means_and_hidden_states_of_the_published_weights(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png", size=(33, 57))
    words = ("segment", path, "-m", checkpoint, "-o", tmp_path / "out", "--json")
    plain = labels_in(json.loads(run(capsys, *words)[1])[0])
    code, out, _ = run(capsys, *words, "--imagenet-mean")
    processor = BeitImageProcessor(
        size=16, resample=2, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    with Image.open(path) as picture:
        logits = BeitForSemanticSegmentation.from_pretrained(checkpoint)(processor(picture).pixel_values).logits[0]
    np.testing.assert_array_equal(labels_in(json.loads(out)[0]), largest_logit(logits, (33, 57)))
    assert code == 0 and not np.array_equal(plain, largest_logit(logits, (33, 57)))
    four = save(tmp_path / "four", "segment", out_indices=[0, 1, 2, 3])
    words = ("segment", path, "-m", four, "-o", tmp_path / "four-out", "--json", "--feature-convention")
    maps = [labels_in(json.loads(run(capsys, *words, name)[1])[0]) for name in ("transformers", "unilm")]
    assert not np.array_equal(*maps)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stride", "4"], "--stride goes with --slide"),
        (["--scales", "1", "2"], "--scales goes with --slide or --whole"),
        (["--whole", "--window", "16"], "--window goes with --slide"),
        (["--slide", "--stride", "17"], "--stride: expected 1 to the window's 16 pixels, found 17"),
        (["--slide", "--window", "18"], "--window: expected a multiple of the patch size 4, found 18"),
        (["--slide", "--scales", "0"], "--scales: expected numbers above 0"),
        (["--flip", "--scores"], "--scores are the logits of one view"),
    ],
)
def test_options_that_do_not_go_together(capsys, checkpoint, tmp_path, words, message):
    (path,) = save_pictures(tmp_path, "a.png")
    code, _, err = run(capsys, "segment", path, "-m", checkpoint, "-o", tmp_path / "out", *words)
    assert code == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


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


def test_a_command_that_is_refused_removes_nothing(capsys, tmp_path):
    save_pictures(tmp_path, "a.png")
    many = save(tmp_path / "many", "segment", id2label={i: f"class {i}" for i in range(151)})
    words = ["segment", tmp_path / "a.png", "-o", tmp_path / "out", "-q", "-m"]
    assert run(capsys, *words, save(tmp_path / "few", "segment"))[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, _, err = run(capsys, *words, many, "--overwrite", "--palette", "ade20k")
    assert code == 2 and "--palette ade20k has 150 colours, the model has 151 classes" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before != {}
