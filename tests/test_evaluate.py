"""Models measured: the figures are those of plain arithmetic on the model's own answers."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import NAMES, save, save_pictures
from PIL import Image
from test_metrics import by_definition
from test_pretraining import CONFIG, Brightness

from minibeit import BeitForMaskedImageModeling, BeitImageProcessor
from minibeit.cli import _parser
from minibeit.evaluate import segmentation
from minibeit.evaluate.classification import Judged, classification_of, evaluate_classification, pixels_of
from minibeit.evaluate.evaluation import Figure
from minibeit.evaluate.labelled import Labelled, LabelledImages
from minibeit.evaluate.maps import paired
from minibeit.evaluate.masked_modeling import (
    RECIPE,
    Predicted,
    evaluate_masked_modeling,
    masked_modeling_of,
    unlabelled_images,
)
from minibeit.evaluate.page import page
from minibeit.evaluate.reading import Measured
from minibeit.evaluate.segmentation import evaluate_segmentation
from minibeit.evaluate.split import without_split
from minibeit.metrics import wilson
from minibeit.train.examples import Example, Examples
from minibeit.train.label_maps import MapReader
from minibeit.train.pretraining import MaskedModeling

REDUCED = MapReader(reduce=True)
FACTS = dict(model="a <model>", data="some data")
COLOURS = np.array([(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)])


def reading(logits):
    """A reader and a model: the name of an image is the number of the row of logits that the model gives for it."""

    def read(path):
        return np.full((3, 2, 2), float(Path(path).stem), np.float32)

    return read, lambda pixels: logits[pixels[:, 0, 0, 0].astype(int)]


def test_figures_of_a_classifier(tmp_path):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((53, 9)).astype(np.float32), rng.integers(0, 8, 53)
    read, compute = reading(logits)
    images = tuple(Labelled(f"{i}.png", int(label)) for i, label in enumerate(labels))
    names = tuple(f"class {i}" for i in range(9))
    done = []
    found = evaluate_classification(
        compute, LabelledImages(images, names), read, batch_size=7, worst=5, draw=False, tell=done.append, **FACTS
    )
    order = np.argsort(-logits, axis=1)
    top1, top5 = (int((order[:, :k] == labels[:, None]).any(1).sum()) for k in (1, 5))
    exact = logits.astype(np.float64)
    losses = np.log(np.exp(exact).sum(1)) - exact[np.arange(53), labels]
    values = {figure.name: figure for figure in found.figures}
    assert values["top1"].value == top1 / 53 and (values["top1"].low, values["top1"].high) == wilson(top1, 53)
    assert values["top5"].value == top5 / 53 and values["loss"].value == pytest.approx(losses.mean(), rel=1e-12)
    half = 1.959963984540054 * losses.std(ddof=1) / 53**0.5
    assert values["loss"].high - values["loss"].value == pytest.approx(half, rel=1e-12)
    assert found.images == 53 and done == [7, 14, 21, 28, 35, 42, 49, 53]

    assert [row.index for row in found.classes] == sorted(set(labels.tolist()))
    for row in found.classes:
        mine = labels == row.index
        assert row.count == mine.sum() and row.figures[0].value == (order[mine, 0] == row.index).mean()
    matrix = np.zeros((9, 9), int)
    np.add.at(matrix, (labels, order[:, 0]), 1)
    assert {(t, p): n for t, p, n in found.confusions} == {(t, p): matrix[t, p] for t, p in np.argwhere(matrix)}
    wrong = np.flatnonzero(order[:, 0] != labels)
    worst = wrong[np.argsort(-losses[wrong])][:5]
    assert [one.path for one in found.worst] == [f"{i}.png" for i in worst]
    assert f"{names[labels[worst[0]]]}, taken for {names[order[worst[0], 0]]}" in found.worst[0].text


def test_only_some_outputs_compete():
    logits = np.array([[9.0, 1, 0, 2], [9, 0, 3, 2], [0, 5, 1, 0]], np.float32)
    read, compute = reading(logits)
    images = tuple(Labelled(f"{i}.png", label) for i, label in enumerate((1, 0, 1)))
    found = evaluate_classification(
        compute, LabelledImages(images, ("b", "d"), (1, 3)), read, batch_size=2, draw=False, **FACTS
    )
    assert [figure.name for figure in found.figures] == ["top1", "loss"] and found.figures[0].value == 1 / 3
    assert found.confusions == ((0, 1, 1), (1, 0, 1), (1, 1, 1))


def test_the_crop_fraction_is_that_of_the_published_evaluation(tmp_path):
    """Shorter side to int(S / F), then the central square, with offsets rounded as torchvision's CenterCrop does."""
    processor = BeitImageProcessor(size=24, resample=2)
    for size in ((60, 41), (41, 60), (24, 24)):
        (path,) = save_pictures(tmp_path / str(size), "a.png", size=size)
        with Image.open(path) as image:
            short = int(24 / 0.875)
            h, w = (short * size[0] // min(size), short * size[1] // min(size))
            resized = image.resize((w, h), Image.Resampling.BICUBIC)
        top, left = round((h - 24) / 2.0), round((w - 24) / 2.0)
        expected = np.asarray(resized.crop((left, top, left + 24, top + 24)), np.float64) / 127.5 - 1
        found = pixels_of(processor, 0.875, 24)(path)
        np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(pixels_of(processor, None, 24)(path), processor(path).pixel_values[0])


def test_the_example_of_the_guide_runs(capsys, tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    program = text.partition("```python\n")[2].partition("```")[0]
    save(tmp_path / "checkpoint", "classify")
    save_pictures(tmp_path / "flowers" / NAMES[0], "a.png", "b.png")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert "% " in capsys.readouterr().out and "</html>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("command", ["evaluate", "segment"])
def test_the_options_that_the_guide_names_exist(command):
    text = (Path(__file__).resolve().parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    options = {
        name: {option for action in _parser(name)._subparsers._group_actions[0].choices[name]._actions
               for option in action.option_strings}
        for name in ("evaluate", "segment")
    }  # fmt: skip
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= options["evaluate"] and len(named) > 15
    assert {"--slide", "--whole", "--scales", "--flip", "--window", "--stride"} <= options[command]


# Segmentation ---------------------------------------------------------------------------------------------------------


def maps(tmp_path, count=6, sizes=((9, 13), (13, 9), (8, 8))):
    """Images with label maps of classes 1 to 4, as ADE20K numbers them, and what a model says of them."""
    rng, predictions = np.random.default_rng(0), {}
    for i in range(count):
        size = sizes[i % len(sizes)]
        (path,) = save_pictures(tmp_path / "images/validation", f"{i}.png", size=size)
        labels = rng.integers(0, 5, size)
        target = tmp_path / "annotations/validation" / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(target)
        guess = np.where(rng.random(size) < 0.5, labels - 1, rng.integers(0, 4, size)) % 4
        predictions[path.name] = labels, guess
    return predictions


def segment_of(predictions):
    return lambda image, shape: predictions[Path(image.filename).name][1].reshape(shape)


def test_figures_of_a_segmentation_model(tmp_path):
    predictions = maps(tmp_path)
    found = evaluate_segmentation(
        segment_of(predictions), paired(tmp_path), NAMES, COLOURS, read_map=REDUCED, worst=2, **FACTS
    )
    truth = np.concatenate([np.where(labels == 0, 255, labels - 1).ravel() for labels, _ in predictions.values()])
    guess = np.concatenate([guess.ravel() for _, guess in predictions.values()])
    expected = by_definition(truth, guess, 4, 255)
    assert {figure.name: figure.value for figure in found.figures} == pytest.approx(expected, rel=1e-14)
    assert all(figure.low < figure.value < figure.high for figure in found.figures)
    assert [row.count for row in found.classes] == [(truth == k).sum() for k in range(4)]
    assert sum(count for *_, count in found.confusions) == (truth != 255).sum()
    each = {
        name: by_definition(np.where(labels == 0, 255, labels - 1), said, 4, 255)["mean_iou"]
        for name, (labels, said) in predictions.items()
    }
    assert [Path(one.path).name for one in found.worst] == sorted(each, key=lambda name: each[name])[:2]
    assert found.worst[0].score == pytest.approx(min(each.values()), rel=1e-14)


def test_drawings_of_the_worst_images_show_truth_and_prediction(tmp_path):
    predictions = maps(tmp_path, count=1, sizes=((10, 16),))
    found = evaluate_segmentation(segment_of(predictions), paired(tmp_path), NAMES, COLOURS, read_map=REDUCED, **FACTS)
    (image, photo), (title, truth), (_, said) = found.worst[0].drawings
    labels, guess = predictions["0.png"]
    assert (image, title) == ("image", "truth") and photo.shape == truth.shape == (10, 16, 3)
    colours = np.vstack([COLOURS, [255, 255, 255]])
    np.testing.assert_allclose(truth, 0.45 * photo + 0.55 * colours[labels - 1], atol=0.51)  # -1: white, not counted
    np.testing.assert_allclose(said, 0.45 * photo + 0.55 * colours[guess], atol=0.51)


def test_maps_that_do_not_fit_stop_or_are_left_out(tmp_path):
    predictions = maps(tmp_path, count=3)
    with pytest.raises(ValueError, match=r"annotations/validation/\d.png: expected the model's classes"):
        evaluate_segmentation(segment_of(predictions), paired(tmp_path), NAMES, COLOURS, **FACTS)
    (tmp_path / "images/validation/2.png").write_bytes(b"no image")
    (tmp_path / "annotations/validation/1.png").write_bytes(b"no image")
    found = evaluate_segmentation(segment_of(predictions), paired(tmp_path), NAMES, COLOURS, read_map=REDUCED, **FACTS)
    assert found.images == 1 and len(found.left_out) == 2
    assert "annotations/validation/1.png" in found.left_out[0] and "images/validation/2.png" in found.left_out[1]
    assert all(np.isnan(figure.low) for figure in found.figures)  # one image has no interval
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "annotations/validation/0.png")
    with pytest.raises(ValueError, match=r"0\.png: expected the size of its image"):
        evaluate_segmentation(segment_of(predictions), paired(tmp_path), NAMES, COLOURS, read_map=REDUCED, **FACTS)


# Masked image modelling -----------------------------------------------------------------------------------------------


def test_figures_of_masked_image_modelling(tmp_path):
    """Those of pre-training's own score, image by image and all together."""
    paths = [str(path) for path in save_pictures(tmp_path, *(f"{i}.png" for i in range(7)))]
    model = BeitForMaskedImageModeling(CONFIG, backend="numpy")
    processor = BeitImageProcessor(size=16)
    arguments = model, CONFIG, processor, Brightness(), paths
    found = evaluate_masked_modeling(*arguments, batch_size=3, worst=2, **FACTS)
    objective = MaskedModeling(Examples("unlabelled", (), (), ()), processor, RECIPE, CONFIG, Brightness())
    total, each = objective.score(), {}
    for path in paths:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        batch = objective.batch([objective.read_judged(Example(path, None, True, digest))])
        output, own = model(batch.pixels, **batch.inputs), objective.score()
        for score in (total, own):
            score.add(output, batch)
        each[path] = own.metrics()["loss"]
    values, expected = {figure.name: figure.value for figure in found.figures}, total.metrics()
    assert values["loss"] == pytest.approx(expected["loss"], rel=1e-6)  # float32 logits of another batch
    assert values["token_accuracy"] == expected["accuracy"] and found.images == 7
    assert all(figure.low <= figure.value <= figure.high for figure in found.figures)
    assert [one.path for one in found.worst] == sorted(each, key=lambda path: -each[path])[:2]
    photo, seen = (drawing for _, drawing in found.worst[0].drawings)
    hidden = (photo != seen).any(-1).mean()
    assert hidden == pytest.approx(75 / 196, abs=0.1)


def test_images_without_labels_are_found(tmp_path):
    save_pictures(tmp_path / "a/deep", "x.png")
    save_pictures(tmp_path / "a/val", "y.png")
    (held_out,), (other,) = unlabelled_images(tmp_path / "a"), unlabelled_images(tmp_path / "a/deep")
    assert (Path(held_out.path).name, held_out.held_out) == ("y.png", True)
    assert (Path(other.path).name, other.held_out) == ("x.png", None)
    assert without_split(tmp_path / "a", [held_out]) == () and without_split(tmp_path / "a/val", [other]) == ()
    assert "no split" in without_split(tmp_path / "a/deep", [other])[0]
    (tmp_path / "list.csv").write_text("path\na/deep/x.png\n")
    assert [image.path for image in unlabelled_images(tmp_path / "list.csv")] == [str(tmp_path / "a/deep/x.png")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected images, found none"):
        unlabelled_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder or list"):
        unlabelled_images(tmp_path / "nowhere")


def test_of_a_split_list_of_images_the_held_out_ones_are_measured(tmp_path):
    file = tmp_path / "list.jsonl"

    def found(*rows):
        file.write_text("".join(json.dumps({"path": path} | more) + "\n" for path, more in rows))
        return [Path(image.path).name for image in unlabelled_images(file)]

    assert found(("a.png", {"split": "train"}), ("b.png", {"split": "val"})) == ["b.png"]
    for rows, words in (
        ([("a.png", {"split": "train"})], "expected held-out images"),
        ([("a.png", {"split": "val"}), ("b.png", {})], "a split in every line or in none"),
        ([("a.png", {"split": "evening"})], "line 1: expected split train or val, found 'evening'"),
        ([(3, {})], "line 1: expected the path of an image, found 3"),
    ):
        with pytest.raises(ValueError, match=words):
            found(*rows)


# Reports --------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Checks that tags are closed, as far as HTML asks for it, and collects texts and addresses."""

    OPEN = {"li", "td", "th", "tr", "dt", "dd", "meta", "img", "br", "p"}

    def __init__(self):
        super().__init__()
        self.stack, self.texts, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.OPEN:
            self.stack.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in self.OPEN:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def checked_page(found):
    tags = Tags()
    text = page(found)
    tags.feed(text)
    assert not tags.stack and all(source.startswith("data:image/jpeg;base64,") for source in tags.sources)
    return tags, text


def test_the_page_of_a_classifier(tmp_path):
    paths = save_pictures(tmp_path, *(f"{i}.png" for i in range(4)))
    logits = np.array([[5.0, 0, 0, 0], [0, 5, 0, 0], [9, 0, 0, 0], [0, 0, 7, 1]], np.float32)
    read, compute = reading(logits)
    images = tuple(Labelled(str(path), i) for i, path in enumerate(paths))
    names = ("<script>", "bee", "cat", "dog")
    found = evaluate_classification(compute, LabelledImages(images, names), read, **FACTS)
    tags, text = checked_page(found)
    assert "a <model> on some data" in tags.texts and "<script>, taken" not in text
    assert len(tags.sources) == 2 and "50.00%" in tags.texts and "Confusion matrix" in tags.texts
    assert f"{100 * wilson(2, 4)[0]:.2f} to {100 * wilson(2, 4)[1]:.2f}" in tags.texts
    values = json.loads(json.dumps(found.to_dict()))
    assert values["figures"]["top1"]["value"] == 0.5 and values["classes"][1]["name"] == "bee"
    assert [one["file"] for one in values["worst"]] == [str(paths[2]), str(paths[3])]


def test_the_page_of_many_classes_lists_the_largest_confusions():
    logits = np.eye(50, dtype=np.float32)[np.array([7, 7, 7, 3, 4])] * 9
    read, compute = reading(logits)
    images = tuple(Labelled(f"{i}.png", label) for i, label in enumerate((1, 1, 7, 3, 9)))
    names = tuple(f"name {i}" for i in range(50))
    tags, _ = checked_page(evaluate_classification(compute, LabelledImages(images, names), read, draw=False, **FACTS))
    assert "Confusion matrix" in tags.texts  # only the classes that occur are in it
    images = tuple(Labelled(f"{i % 5}.png", i) for i in range(50))
    found = evaluate_classification(compute, LabelledImages(images, names), read, draw=False, **FACTS)
    tags, _ = checked_page(found)
    assert "What is taken for what" in tags.texts and "Confusion matrix" not in tags.texts


def test_the_page_of_a_segmentation_model(tmp_path):
    predictions = maps(tmp_path)
    found = evaluate_segmentation(
        segment_of(predictions), paired(tmp_path), NAMES, COLOURS, read_map=REDUCED, worst=2, **FACTS
    )
    tags, _ = checked_page(found)
    assert len(tags.sources) == 6 and {"mean IoU", "not counted", *NAMES} <= set(tags.texts)


def test_classes_that_are_predicted_but_never_true_have_their_names_on_the_page():
    read, compute = reading(np.array([[0.0, 0, 9], [0, 9, 0]], np.float32))
    images = (Labelled("0.png", 0), Labelled("1.png", 1))
    found = evaluate_classification(compute, LabelledImages(images, ("ant", "bee", "cat")), read, draw=False, **FACTS)
    tags, _ = checked_page(found)
    assert tags.texts.count("cat") == 2 and [row.name for row in found.classes] == ["ant", "bee"]  # a row and a column


def test_it_is_said_where_not_all_confusions_are_kept(tmp_path, monkeypatch):
    arguments = segment_of(maps(tmp_path)), paired(tmp_path), NAMES, COLOURS
    whole = evaluate_segmentation(*arguments, read_map=REDUCED, notes=("a note",), **FACTS)
    assert len(whole.confusions) == 16 and whole.notes == ("a note",)
    monkeypatch.setattr(segmentation, "MOST_CONFUSIONS", 5)
    cut = evaluate_segmentation(*arguments, read_map=REDUCED, **FACTS)
    assert cut.confusions == whole.confusions[:5] and cut.notes[0].startswith("of 16 pairs of a true")


def test_figures_as_people_read_them():
    assert Figure("top1", 0.5, 0.25, 0.755).shown() == "50.00%"
    assert Figure("top1", 0.5, 0.25, 0.755).interval() == "25.00 to 75.50"
    assert Figure("loss", 1.5, kind="number").shown() == "1.5000" and Figure("loss", 1.5).interval() == ""
    assert Figure("iou", float("nan")).shown() == "–"


def test_an_image_that_has_gone_since_it_was_measured_is_named_and_not_drawn(tmp_path):
    (path,) = save_pictures(tmp_path, "0.png")
    images = tuple(Labelled(str(tmp_path / name), 0) for name in ("gone.png", "0.png"))
    judged = [Judged(image, 1, 2.0, 1, 0.5) for image in images]
    found = classification_of(Measured(judged, [], []), LabelledImages(images, ("ant", "bee")), **FACTS)
    assert [len(one.drawings) for one in found.worst] == [0, 1] and "gone.png" in page(found)
    predicted = [Predicted(image.path, 2.0, 1, 4, np.arange(16) < 4) for image in images]
    found = masked_modeling_of(Measured(predicted, [], []), CONFIG, **FACTS)
    assert [len(one.drawings) for one in found.worst] == [0, 2] and "gone.png" in page(found)
