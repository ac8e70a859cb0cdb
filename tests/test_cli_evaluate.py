"""`minibeit evaluate`: what it prints, what it writes, and what it says of data that does not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from cli_helpers import NAMES, run, save, save_pictures
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_cli_pretrain import TOKENS

from minibeit import BeitForImageClassification, BeitForSemanticSegmentation, BeitImageProcessor
from minibeit.sliding import Inference, segment
from minibeit.tokenizer.tokenizer import DalleTokenizer


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save(tmp_path_factory.mktemp("evaluate") / "classifier", "classify")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return save(tmp_path_factory.mktemp("evaluate") / "segmenter", "segment")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three images in each of four class folders."""
    data = tmp_path_factory.mktemp("evaluate") / "data"
    for name in NAMES:
        save_pictures(data / name, *(f"{name}{i}.png" for i in range(3)))
    return data


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, segmenter):
    """Images whose label maps are what the model says, numbered from 1, but for two rows that mean nothing."""
    data = tmp_path_factory.mktemp("evaluate") / "scenes"
    model, processor = (
        BeitForSemanticSegmentation.from_pretrained(segmenter),
        BeitImageProcessor.from_pretrained(segmenter),
    )
    (data / "annotations").mkdir(parents=True)
    for path in save_pictures(data / "images", "a.png", "b.png", "c.png", size=(20, 33)):
        with Image.open(path) as image:
            labels = segment(lambda x: model(x).logits, processor, image, (20, 33), Inference()) + 1
        labels[:2] = 0
        Image.fromarray(labels.astype(np.uint8)).save(data / "annotations" / path.name)
    return data


def right(classifier, folders):
    model, processor = (
        BeitForImageClassification.from_pretrained(classifier),
        BeitImageProcessor.from_pretrained(classifier),
    )
    return {
        name: sum(
            int(model(processor(str(path)).pixel_values).logits.argmax()) == i for path in (folders / name).iterdir()
        )
        for i, name in enumerate(NAMES)
    }


def test_a_classifier_on_class_folders(capsys, classifier, folders, tmp_path):
    files = tmp_path / "out.json", tmp_path / "out.html"
    code, out, err = run(
        capsys, "evaluate", folders, "-m", classifier, "--json", files[0], "--html", files[1], "-b", "5"
    )
    expected = right(classifier, folders)
    assert code == 0 and "12 images in" in err and "images/s" in err
    values = json.loads(files[0].read_text())
    assert values["images"] == 12 and values["figures"]["top1"]["value"] == sum(expected.values()) / 12
    assert {row["name"]: round(row["top1"]["value"] * 3) for row in values["classes"]} == expected
    assert f"{100 * sum(expected.values()) / 12:.2f}%" in out and "95% interval" in out
    assert all(name in out for name in NAMES) and "<html" in files[1].read_text()
    assert len(values["worst"]) == 12 - sum(expected.values())
    code, again, err = run(capsys, "evaluate", folders, "-m", classifier, "-q", "--workers", "1")
    assert (code, again, err) == (0, out, "")


def test_images_that_cannot_be_read_are_named_and_left_out(capsys, classifier, folders, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folders, data)
    (data / "ant" / "ant1.png").write_bytes(b"no image")
    code, out, err = run(capsys, "evaluate", data, "-m", classifier, "-q", "--json", tmp_path / "a.json")
    assert code == 1 and "top-1" in out and err.count("\n") == 1 and "left out:" in err and "ant1.png" in err
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["images"] == 11 and "ant1.png" in values["left_out"][0]
    for path in data.rglob("*.png"):
        path.write_bytes(b"no image")
    code, out, err = run(capsys, "evaluate", data, "-m", classifier, "-q")
    assert code == 1 and not out and "none of the images can be used" in err


def test_the_crop_fraction_changes_what_is_seen(capsys, classifier, folders, tmp_path):
    losses = []
    for i, words in enumerate(([], ["--crop-fraction", "0.875"], ["--crop-fraction", "1"])):
        code, _, _ = run(capsys, "evaluate", folders, "-m", classifier, "-q", "--json", tmp_path / f"{i}.json", *words)
        values = json.loads((tmp_path / f"{i}.json").read_text())
        losses.append(values["figures"]["loss"]["value"])
        assert code == 0 and values["settings"].get("crop_fraction") == (float(words[1]) if words else None)
    assert len(set(losses)) == 3


def test_segmentation_with_maps_from_the_model_itself(capsys, segmenter, scenes, tmp_path):
    words = ("evaluate", scenes, "-m", segmenter, "--reduce-labels", "--json", tmp_path / "a.json")
    code, out, _ = run(capsys, *words, "--html", tmp_path / "a.html")
    values = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and "100.00%" in out and "mean IoU" in out
    assert {name: figure["value"] for name, figure in values["figures"].items()} == {
        "mean_iou": 1, "mean_accuracy": 1, "pixel_accuracy": 1,
    }  # fmt: skip
    assert sum(row["pixels"] for row in values["classes"]) == 3 * 18 * 33
    assert (tmp_path / "a.html").read_text().count("data:image/jpeg") == 9
    code, _, _ = run(capsys, *words, "--slide", "--flip", "-q")
    slid = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and slid["figures"]["pixel_accuracy"]["value"] < 1
    assert slid["settings"]["mode"] == "slide" and slid["settings"]["flip"] and slid["settings"]["stride"] == 10


def test_label_maps_elsewhere_and_the_processors_own_setting(capsys, segmenter, scenes, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(segmenter, model)
    BeitImageProcessor(size=16, resample=2, do_reduce_labels=True).save_pretrained(model)
    words = ("evaluate", scenes / "images", "--maps", scenes / "annotations", "-m", model, "-q")
    code, out, err = run(capsys, *words)
    assert code == 0 and "100.00%" in out and not err
    code, out, err = run(capsys, *words, "--no-reduce-labels")
    assert code == 1 and not out and "found 4" in err and "--reduce-labels" in err and err.count("\n") == 1


def test_label_maps_of_colours(capsys, segmenter, scenes, tmp_path):
    table = {"ignored": (0, 0, 0), "dog": (9, 9, 9), "ant": (250, 0, 0), "cat": (0, 250, 0), "bee": (0, 0, 250)}
    colours = np.array([table["ignored"], *(table[name] for name in NAMES)], np.uint8)
    shutil.copytree(scenes, tmp_path / "scenes")
    for path in (tmp_path / "scenes/annotations").iterdir():
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)
    file = tmp_path / "colours.txt"
    file.write_text("".join(f"{r} {g} {b} {name}\n" for name, (r, g, b) in table.items()))
    words = ("evaluate", tmp_path / "scenes", "-m", segmenter, "-q", "--colours", file)
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "") and "pixel accuracy  100.00%" in out
    code, _, err = run(capsys, *words, "--reduce-labels")
    assert code == 2 and "--reduce-labels is for maps of numbers" in err
    file.write_text(file.read_text().replace("dog", "elk"))
    code, _, err = run(capsys, *words)
    assert code == 2 and "expected the model's classes, found 'elk'" in err


def test_masked_image_modelling(capsys, folders, tmp_path):
    tokens, model = tmp_path / "tokens", save(tmp_path / "model", "mask", vocab_size=10)
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(tokens)
    words = ("evaluate", folders, "-m", model, "--tokenizer", tokens, "-q", "--json", tmp_path / "a.json")
    code, out, err = run(capsys, *words, "--html", tmp_path / "a.html")
    values = json.loads((tmp_path / "a.json").read_text())
    assert (code, err) == (0, "") and "token accuracy" in out and "classes" not in out
    figures = values["figures"]
    assert values["images"] == 12 and figures["loss"]["low"] < figures["loss"]["value"] < figures["loss"]["high"]
    assert 0 <= figures["token_accuracy"]["value"] <= 1
    assert (tmp_path / "a.html").read_text().count("data:image/jpeg") == 24
    assert run(capsys, *words, "-b", "5", "--workers", "1")[1] == out  # the same masks
    run(capsys, *words, "--imagenet-mean")
    assert json.loads((tmp_path / "a.json").read_text())["figures"]["loss"] != figures["loss"]
    assert "no split" in values["notes"][0] and values["settings"]["filter"] == "bicubic"
    assert values["settings"]["size"] == {"height": 16, "width": 16} and "crop_size" not in values["settings"]
    save(model, "mask", vocab_size=11)
    code, _, err = run(capsys, *words)
    assert code == 1 and "tokenizer: expected 11 visual tokens" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "words", "code", "message"),
    [
        ("classify", ["--no-reduce-labels"], 2, "--no-reduce-labels: the checkpoint was made for image classification"),
        ("mask", [], 2, "predicts visual tokens; say with --tokenizer what makes them"),
        ("mask", ["--tokenizer", "x", "--slide"], 2, "--slide: the checkpoint was made for masked image modeling"),
        ("bare", [], 1, "image classification, semantic segmentation, masked image modeling, but this checkpoint"),
        ("classify", ["--tokenizer", "x"], 2, "--tokenizer: the checkpoint was made for image classification"),
        ("classify", ["--slide"], 2, "--slide: the checkpoint was made for image classification"),
        ("classify", ["--maps", "x"], 2, "--maps: the checkpoint was made for image classification"),
        ("segment", ["--crop-fraction", "1"], 2, "--crop-fraction: the checkpoint was made for semantic segmentation"),
        ("segment", ["--maps", "nowhere"], 1, "nowhere: there is no such folder"),
        ("segment", [], 1, "expected the folders images and annotations"),
    ],
)
def test_models_and_options_that_do_not_fit(capsys, folders, tmp_path, kind, words, code, message):
    model = save(tmp_path / "model", kind)
    found, out, err = run(capsys, "evaluate", folders, "-m", model, "-q", *words)
    assert found == code and not out and message in err and err.count("\n") == 1


def test_usage(capsys, classifier, folders, tmp_path):
    assert run(capsys, "evaluate", folders)[0] == 2
    code, _, err = run(capsys, "evaluate", folders, "-m", classifier, "--json", tmp_path / "no" / "a.json")
    assert code == 2 and "its folder does not exist" in err
    code, _, err = run(capsys, "evaluate", folders, "-m", classifier, "--html", classifier / "config.json")
    assert code == 2 and "this is an input" in err
    assert run(capsys, "evaluate", folders, "-m", classifier, "--crop-fraction", "3")[0] == 2
    code, _, err = run(capsys, "evaluate", tmp_path / "nowhere", "-m", classifier)
    assert code == 1 and "no such folder or list" in err


# Files ----------------------------------------------------------------------------------------------------------------


def untouched(capsys, victim, words, message, code=2):
    """Runs a command that is to be refused for the sake of a file, which it leaves as it is."""
    before = victim.read_bytes()
    found, out, err = run(capsys, "evaluate", *words)
    assert (found, out) == (code, "") and message in err and err.count("\n") == 1
    assert victim.read_bytes() == before


def test_images_and_the_true_classes_are_not_overwritten(capsys, classifier, folders, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folders, data)
    image, link = data / "cat" / "cat0.png", tmp_path / "report.html"
    words = (data, "-m", classifier, "-q")
    untouched(capsys, image, [*words, "--html", image], "expected the name of a report")
    link.hardlink_to(image)
    untouched(capsys, image, [*words, "--html", link], "this is an input")
    save_pictures(tmp_path / "flat", "ILSVRC2012_val_00000001.JPEG")
    truth = tmp_path / "truth.txt"
    truth.write_text("n01440764\n")
    untouched(capsys, truth, [tmp_path / "flat", *words[1:], "--labels", truth, "--json", truth], "this is an input")


def test_maps_and_the_table_of_colours_are_not_overwritten(capsys, segmenter, scenes, tmp_path):
    data, link, table = tmp_path / "scenes", tmp_path / "report.json", tmp_path / "colours.txt"
    shutil.copytree(scenes, data)
    label_map = data / "annotations/a.png"
    link.hardlink_to(label_map)
    words = (data, "-m", segmenter, "-q", "--reduce-labels")
    untouched(capsys, label_map, [*words, "--json", link], "this is an input")
    table.write_text("0 0 0 ant\n1 1 1 bee\n")
    untouched(capsys, table, [*words, "--colours", table, "--json", table], "this is an input")


def test_the_weights_of_the_tokenizer_are_not_overwritten(capsys, folders, tmp_path):
    tokens, model = tmp_path / "tokens", save(tmp_path / "model", "mask", vocab_size=10)
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(tokens)
    weights, link = tokens / "model.safetensors", tmp_path / "report.html"
    words = (folders, "-m", model, "--tokenizer", tokens, "-q")
    untouched(capsys, weights, [*words, "--json", weights], "this is an input")
    link.hardlink_to(folders / "cat" / "cat0.png")
    untouched(capsys, link, [*words, "--html", link], "this is an input")


def test_two_reports_are_two_files(capsys, classifier, folders, tmp_path):
    words = ("evaluate", folders, "-m", classifier, "-q", "--json", tmp_path / "x")
    (tmp_path / "here").symlink_to(tmp_path)
    for other in (tmp_path / "x", tmp_path / "here" / "x"):
        code, out, err = run(capsys, *words, "--html", other)
        assert (code, out) == (2, "") and "is to be written twice" in err and not (tmp_path / "x").exists()


def test_a_run_without_usable_images_leaves_an_earlier_report(capsys, classifier, tmp_path):
    (tmp_path / "data" / "ant").mkdir(parents=True)
    (tmp_path / "data" / "ant" / "a.png").write_bytes(b"no image")
    report = tmp_path / "a.json"
    report.write_text("earlier")
    code, _, err = run(capsys, "evaluate", tmp_path / "data", "-m", classifier, "--json", report)
    assert code == 1 and "none of the images can be used" in err and "a.png" in err
    assert report.read_text() == "earlier"


# Numbers --------------------------------------------------------------------------------------------------------------


def test_a_damaged_model_of_masked_image_modelling_is_no_result(capsys, folders, tmp_path):
    tokens, model = tmp_path / "tokens", save(tmp_path / "model", "mask", vocab_size=10)
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(tokens)
    arrays = load_file(model / "model.safetensors")
    save_file({name: np.full_like(array, np.nan) for name, array in arrays.items()}, model / "model.safetensors")
    code, out, err = run(capsys, "evaluate", folders, "-m", model, "--tokenizer", tokens, "-q")
    assert (code, out) == (1, "") and "NaN" in err and err.count("\n") == 1


def test_the_crop_fraction_is_for_square_models(capsys, folders, tmp_path):
    model = save(tmp_path / "model", "classify", image_size=(16, 24))
    code, out, err = run(capsys, "evaluate", folders, "-m", model, "-q", "--crop-fraction", "0.875")
    assert (code, out) == (2, "") and "takes squares, but the model's images are 16 x 24" in err


@pytest.mark.parametrize("words", [("--seed", "-1"), ("--worst", "-3")])
def test_negative_counts_are_refused_first(capsys, classifier, words):
    code, out, err = run(capsys, "evaluate", "nowhere", "-m", classifier, *words)
    assert (code, out) == (2, "") and f"expected an integer of at least 0, found '{words[1]}'" in err


def test_what_is_held_out_is_said(capsys, classifier, folders, tmp_path):
    code, _, err = run(capsys, "evaluate", folders, "-m", classifier)
    assert code == 0 and "the data has no split, so all of its images are measured" in err
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(folders)
    code, _, err = run(capsys, "evaluate", tmp_path / "data", "-m", classifier)
    assert code == 0 and "split" not in err
