"""`minibeit compare`: figures are those of plain arithmetic on what the two models say of the images."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from cli_helpers import NAMES, run, save, save_pictures
from safetensors.numpy import load_file, save_file
from test_evaluate import Tags

from minibeit import (
    BeitBackbone,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
)
from minibeit.evaluate.compare import masks_of
from minibeit.metrics import kl_divergence, wilson
from minibeit.ops import default_backend
from minibeit.sliding import Inference, segment

SIX = {"id2label": {i: f"name {i}" for i in range(7)}}


def changed(source, target, seed=0, size=0.3):
    """A copy of a checkpoint with noise on every tensor."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    rng = np.random.default_rng(seed)
    tensors = {
        name: np.asarray(x + size * rng.standard_normal(x.shape) * x.std()).astype(x.dtype)
        for name, x in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "photos"
    save_pictures(folder, *(f"{i}.png" for i in range(7)), size=(20, 24))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each kind a checkpoint and a changed copy of it."""
    folder = tmp_path_factory.mktemp("compare")
    made = {}
    for kind, settings in (("classify", SIX), ("segment", {}), ("mask", {}), ("bare", {})):
        first = save(folder / kind, kind, **settings)
        made[kind] = first, changed(first, folder / f"{kind}-changed")
    return made


def compared(capsys, tmp_path, *words, code=0):
    found, out, err = run(capsys, "compare", *words, "-q", "--json", tmp_path / "found.json")
    assert (found, err) == (code, ""), err
    return out, json.loads((tmp_path / "found.json").read_text())


def outputs(model_class, folder, photos, **inputs):
    model, processor = model_class.from_pretrained(folder), BeitImageProcessor.from_pretrained(folder)
    paths = sorted(photos.iterdir())
    return model(np.concatenate([processor(str(path)).pixel_values for path in paths]), **inputs)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def relative_rms(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return math.sqrt(((x - y) ** 2).sum() / (x**2).sum())


def kl(x, y):
    p, q = softmax(x), softmax(y)
    return (p * np.log(p / q)).sum(-1)


def value(found, name):
    return found["figures"][name]["value"]


def test_two_classifiers(capsys, models, photos, tmp_path):
    out, found = compared(capsys, tmp_path, *models["classify"], "-i", photos, "--html", tmp_path / "a.html", "-b", 3)
    x, y = (outputs(BeitForImageClassification, folder, photos).logits for folder in models["classify"])
    same = x.argmax(1) == y.argmax(1)
    assert 0 < same.sum() < 7  # so that the test says something
    assert value(found, "same_top1") == same.mean()
    assert (found["figures"]["same_top1"]["low"], found["figures"]["same_top1"]["high"]) == wilson(int(same.sum()), 7)
    five = [np.argsort(-logits, 1)[:, :5] for logits in (x, y)]
    assert value(found, "shared_top5") == pytest.approx(np.mean([len(set(p) & set(q)) / 5 for p, q in zip(*five)]))
    assert value(found, "kl") == pytest.approx(kl(x, y).mean(), rel=1e-4)
    assert value(found, "relative_rms") == pytest.approx(relative_rms(x, y), rel=1e-5)
    figures = found["figures"].values()
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures)
    order = sorted(range(7), key=lambda i: (same[i], -kl(x, y)[i]))
    assert [one["file"] for one in found["worst"]] == [str(sorted(photos.iterdir())[i]) for i in order]
    assert sum(entry["count"] for entry in found["confusions"]) == 7
    assert {(entry["a"], entry["b"]) for entry in found["confusions"]} == {*zip(x.argmax(1), y.argmax(1))}
    assert "same top-1" in out and "classes that differ" in out and "furthest apart first" in out
    page = (tmp_path / "a.html").read_text()
    assert "Where the two are furthest apart" in page and page.count("data:image/jpeg") == 7 and "predicted" not in page
    assert found["a"] == {"model": str(models["classify"][0]), "backend": default_backend(), "dtype": "float32"}


def test_one_checkpoint_in_two_precisions_and_on_two_backends(capsys, models, photos, tmp_path):
    model = models["classify"][0]
    out, found = compared(
        capsys, tmp_path, model, "-i", photos, "--backend", "numpy", "numba", "--dtype", "float64", "float32"
    )
    assert [found[side]["dtype"] for side in "ab"] == ["float64", "float32"]
    assert [found[side]["backend"] for side in "ab"] == ["numpy", "numba"]
    assert value(found, "same_top1") == 1 and 0 < value(found, "relative_rms") < 1e-5
    assert "classes that differ" not in out and found["settings"]["pixel values"] == "the same for both"
    _, found = compared(capsys, tmp_path, model, model, "-i", photos)
    assert value(found, "relative_rms") == value(found, "kl") == 0 and not found["worst"]


def test_two_segmentation_models(capsys, models, photos, tmp_path):
    out, found = compared(capsys, tmp_path, *models["segment"], "-i", photos, "--html", tmp_path / "a.html")
    x, y = (outputs(BeitForSemanticSegmentation, folder, photos).logits for folder in models["segment"])
    maps = []
    for folder in models["segment"]:
        model, processor = (
            BeitForSemanticSegmentation.from_pretrained(folder),
            BeitImageProcessor.from_pretrained(folder),
        )
        maps.append([
            segment(lambda pixels: model(pixels).logits, processor, str(path), (20, 24), Inference())  # noqa: B023
            for path in sorted(photos.iterdir())
        ])  # fmt: skip
    a, b = map(np.array, maps)
    ious = [((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in np.unique([a, b])]
    assert 0 < value(found, "same_pixels") < 1
    assert value(found, "same_pixels") == (a == b).mean() and value(found, "mean_iou") == pytest.approx(np.mean(ious))
    assert value(found, "relative_rms") == pytest.approx(relative_rms(x, y), rel=1e-5)
    assert value(found, "kl") == pytest.approx(kl(np.moveaxis(x, 1, -1), np.moveaxis(y, 1, -1)).mean(), rel=1e-4)
    differing = (a != b).mean((1, 2))
    assert [one["score"] for one in found["worst"]] == pytest.approx(sorted(differing[differing > 0], reverse=True))
    tags = Tags()
    tags.feed((tmp_path / "a.html").read_text())
    assert not tags.stack and len(tags.sources) == 4 * len(found["worst"]) and "where they differ" in tags.texts
    assert "mean IoU" in out and "not counted" not in tags.texts
    _, slid = compared(capsys, tmp_path, *models["segment"], "-i", photos, "--slide", "--flip")
    assert slid["settings"]["mode"] == "slide" and value(slid, "kl") > 0
    assert value(slid, "relative_rms") != value(found, "relative_rms")


def test_logits_of_images_of_different_sizes_are_not_compared(capsys, models, photos, tmp_path):
    larger = tmp_path / "larger"
    larger.mkdir()
    for path in models["segment"][0].iterdir():
        (larger / path.name).write_bytes(path.read_bytes())
    BeitImageProcessor(size=24, resample=2).save_pretrained(larger)
    _, found = compared(capsys, tmp_path, models["segment"][0], larger, "-i", photos)
    assert value(found, "kl") is None and 0 < value(found, "mean_iou") < 1
    assert "different sizes" in found["notes"][0]
    assert found["settings"]["pixel values"] == "each by its own image processor"


def test_two_models_of_masked_image_modelling(capsys, models, photos, tmp_path):
    out, found = compared(capsys, tmp_path, *models["mask"], "-i", photos)
    masks = masks_of([str(path) for path in sorted(photos.iterdir())], (4, 4))
    assert masks.any(1).all() and 0.2 < masks.mean() < 0.5
    x, y = (
        outputs(BeitForMaskedImageModeling, folder, photos, bool_masked_pos=masks, output_hidden_states=True)
        for folder in models["mask"]
    )
    p, q = x.logits[masks], y.logits[masks]
    assert 0 < value(found, "same_tokens") < 1
    assert value(found, "same_tokens") == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert value(found, "kl") == pytest.approx(kl(p, q).mean(), rel=1e-4)
    assert value(found, "relative_rms") == pytest.approx(relative_rms(p, q), rel=1e-5)
    u, v = (output.hidden_states[-1].astype(np.float64) for output in (x, y))
    cosines = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
    assert value(found, "cosine") == pytest.approx(cosines.mean(), rel=1e-6)
    assert "same tokens" in out


@pytest.mark.filterwarnings("ignore:(?s).*another task's head")
def test_hidden_states_of_bare_encoders_and_of_different_tasks(capsys, models, photos, tmp_path):
    out, found = compared(capsys, tmp_path, *models["bare"], "-i", photos, "--html", tmp_path / "a.html")
    every = dict(out_indices=(0, 1, 2, 3, 4), reshape_hidden_states=False)
    x, y = (
        BeitBackbone.from_pretrained(folder, **every)(
            np.concatenate([
                BeitImageProcessor.from_pretrained(folder)(str(p)).pixel_values for p in sorted(photos.iterdir())
            ])
        ).feature_maps
        for folder in models["bare"]
    )  # fmt: skip
    rows = found["classes"]
    assert [row["name"] for row in rows] == ["embeddings", *(f"after block {i}" for i in range(4))]
    expected = [relative_rms(u, v) for u, v in zip(x, y)]
    assert [row["relative_rms"]["value"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert found["figures"]["cosine"] == rows[-1]["cosine"] and 0 < value(found, "cosine") < 1
    assert out.index("embeddings") < out.index("after block 0") < out.index("after block 3")
    _, found = compared(capsys, tmp_path, models["bare"][0], models["classify"][0], "-i", photos)
    assert found["task"] == "features" and "their hidden states are compared" in found["notes"][0]
    _, found = compared(capsys, tmp_path, *models["classify"], "-i", photos, "--features")
    assert found["task"] == "features" and not found["notes"]


def test_images_that_cannot_be_read_are_left_out(capsys, models, tmp_path):
    save_pictures(tmp_path / "photos", "a.png", "b.png")
    (tmp_path / "photos" / "c.png").write_bytes(b"no image")
    words = ("compare", *models["classify"], "-i", tmp_path / "photos", "-q", "--json", tmp_path / "a.json")
    code, out, err = run(capsys, *words)
    assert code == 1 and "same top-1" in out and "left out:" in err and "c.png" in err and err.count("\n") == 1
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 2


def test_classes_of_other_names_and_numbers(capsys, models, photos, tmp_path):
    other = save(tmp_path / "other", "classify", id2label={i: f"name {i + (i == 3)}" for i in range(7)})
    _, found = compared(capsys, tmp_path, models["classify"][0], other, "-i", photos)
    assert "class 3, 'name 3' and 'name 4'" in found["notes"][0]
    four = save(tmp_path / "four", "classify")
    code, out, err = run(capsys, "compare", models["classify"][0], four, "-i", photos)
    assert code == 2 and not out and f"A has 7 classes, B {len(NAMES)}" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "nothing to compare: name a second checkpoint"),
        (["--dtype", "float32", "float32"], 2, "nothing to compare"),
        (["--dtype", "float32", "float64", "float32"], 2, "--dtype: expected one value for both or two, found 3"),
        (["--dtype", "float32", "float23"], 1, "found 'float23'"),
        (["--backend", "numpy", "nunba"], 1, "found 'nunba'"),
        (["--backend", "numpy", "numba", "--slide"], 2, "--slide: is for two models of semantic segmentation"),
        (["--backend", "numpy", "numba", "--json", "x.png"], 2, "found that of an image"),
    ],
)
def test_usage(capsys, models, photos, words, code, message):
    found, out, err = run(capsys, "compare", models["classify"][0], "-i", photos, *words)
    assert (found, out) == (code, "") and message in err and err.count("\n") == 1


def test_what_cannot_be_compared(capsys, models, photos, tmp_path):
    code, _, err = run(capsys, "compare", *models["classify"], "-i", tmp_path / "nowhere")
    assert code == 1 and "none of the images can be used" in err
    code, _, err = run(capsys, "compare", *models["classify"], "-i", "-")
    assert code == 2 and "standard input" in err
    code, _, err = run(capsys, "compare", *models["classify"], "-i", photos, "--json", models["classify"][1] / "a")
    assert code == 0  # a file beside the weights, none of theirs
    (models["classify"][1] / "a").unlink()
    code, _, err = run(
        capsys, "compare", *models["classify"], "-i", photos, "--json", models["classify"][1] / "config.json"
    )
    assert code == 2 and "this is an input" in err
    wider = save(tmp_path / "wider", "bare", hidden_size=20)
    code, _, err = run(capsys, "compare", models["bare"][0], wider, "-i", photos)
    assert code == 2 and "4 blocks of width 16 in A, 4 of width 20 in B" in err
    words = save(tmp_path / "words", "mask", vocab_size=31)
    code, _, err = run(capsys, "compare", models["mask"][0], words, "-i", photos)
    assert code == 2 and "4x4 patches and 30 visual tokens in A, 4x4 patches and 31" in err
    finer = save(tmp_path / "finer", "bare", patch_size=2)
    code, _, err = run(capsys, "compare", models["bare"][0], finer, "-i", photos)
    assert code == 1 and "expected features of one shape, found" in err


def test_kl_divergence():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4, 5)), 9 * rng.standard_normal((2, 4, 5))
    assert kl_divergence(x, y) == pytest.approx(kl(x, y), rel=1e-12)
    assert kl_divergence(x, y, axis=1) == pytest.approx(kl(x.swapaxes(1, 2), y.swapaxes(1, 2)), rel=1e-12)
    assert (kl_divergence(x, x + 3) < 1e-15).all() and (kl_divergence(x, y) > 0).all()
    assert kl_divergence(np.array([800.0, 0]), np.array([0, 800.0])) == pytest.approx(800)
