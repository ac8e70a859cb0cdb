"""`minibeit finetune --task segmentation`: from images and maps to a folder that segments, or to a sentence."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import run, save, start
from PIL import Image
from segmentation_data import COLORS, ade_folder, pair_folder, scene
from training_data import class_folders

from minibeit import BeitConfig, BeitImageProcessor
from minibeit.checkpoint.load import load_checkpoint
from minibeit.cli import _parser
from minibeit.train import start as training_start
from minibeit.train.segmentation_recipes import SEGMENTATION_RECIPES
from minibeit.train.state import STATE_NAME

TASK = ("--task", "segmentation")
QUICK = ("--epochs", 1, "--batch-size", 4, "--backend", "numpy", "--threads", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "classify", num_hidden_layers=5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pair_folder(tmp_path_factory.mktemp("data"))


def words(path, *more):
    path.write_text("\n".join(more))
    return path


# What works -----------------------------------------------------------------------------------------------------------


def test_the_result_segments(capsys, data, model, tmp_path):
    labels = words(tmp_path / "names.txt", "ground", "a red disc", "a green disc")
    output, out = tmp_path / "o", tmp_path / "maps"
    code, text, err = run(capsys, "finetune", data, *TASK, "-m", model, "-o", output, "--labels", labels, *QUICK)
    assert code == 0 and "held_out_mean_iou" in text and "minibeit segment IMAGE" in err, err
    assert "5 images with label maps to learn from, 1 held out, 3 classes: ground, a red disc, a green disc" in err
    config = BeitConfig.from_pretrained(output)
    assert config.id2label == {0: "ground", 1: "a red disc", 2: "a green disc"} and config.out_indices == (2, 3, 4, 5)
    assert {"log.jsonl", "curves.png", "preprocessor_config.json"} <= {path.name for path in output.iterdir()}
    picture = data / "images/0.png"
    code, text, err = run(capsys, "segment", picture, "--model", output, "-o", out, "--json", "--backend", "numpy")
    assert code == 0 and json.loads(text)[0]["classes"][0]["label"] in config.id2label.values(), err
    assert np.asarray(Image.open(out / "0_labels.png")).shape == (36, 48)


def test_ade20k_from_scratch(capsys, tmp_path):
    ade = ade_folder(tmp_path / "ade")
    output = tmp_path / "o"
    start = ("--from-scratch", "tiny", "--recipe", "tiny", "--crop-size", 32)
    code, _, err = run(
        capsys, "finetune", ade, *TASK, *start, "-o", output, "--labels", "ade20k", "--reduce-labels", *QUICK
    )
    assert code == 0 and "warning: 147 of the 150 classes have no pixel" in err, err
    assert BeitConfig.from_pretrained(output).id2label[0] == "wall"
    processor = BeitImageProcessor.from_pretrained(output)
    assert processor.do_reduce_labels and processor.size == {"height": 32, "width": 32}


def test_maps_in_colours(capsys, model, tmp_path):
    for i in range(4):
        image, labels = scene(i)
        for part, array in (("images", image), ("labels", COLORS[labels].astype(np.uint8))):
            (tmp_path / "d" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "d" / part / f"{i}.png")
    table = words(tmp_path / "table.txt", "60 60 60 ignored", "210 60 50 red", "60 190 80 green")
    given = ("finetune", tmp_path / "d", *TASK, "-m", model, *QUICK)
    code, _, err = run(capsys, *given, "-o", tmp_path / "o", "--colours", table)
    assert code == 0 and "2 classes: red, green" in err, err
    code, _, err = run(capsys, *given, "-o", tmp_path / "p")
    assert code == 1 and "found colours (mode RGB); --colours FILE says" in err and not (tmp_path / "p").exists()


def test_kept_classes_keep_the_heads(capsys, data, tmp_path):
    before = save(tmp_path / "m", "segment")
    given = ("finetune", data, *TASK, "-m", before, "--keep-classes", "--freeze", "*", *QUICK)
    code, _, err = run(capsys, *given, "-o", tmp_path / "o")
    assert code == 2 and "--freeze: nothing is left to be learned" in err
    given = ("finetune", data, *TASK, "-m", before, "--keep-classes", "--lr", 1e-12, *QUICK)
    code, _, err = run(capsys, *given, "-o", tmp_path / "o")
    assert code == 0 and "4 classes: ant, bee, cat, dog" in err, err
    (config, old), (after, new) = (load_checkpoint(p, "semantic_segmentation") for p in (before, tmp_path / "o"))
    assert config.id2label == after.id2label and config.out_indices == after.out_indices
    np.testing.assert_allclose(new["decode_head.classifier.weight"], old["decode_head.classifier.weight"], atol=1e-9)
    assert np.any(
        new["decode_head.fpn_bottleneck.bn.running_mean"] != old["decode_head.fpn_bottleneck.bn.running_mean"]
    )


def test_the_crop_is_what_the_model_sees(capsys, data, model, tmp_path):
    code, _, err = run(capsys, "finetune", data, *TASK, "-m", model, "-o", tmp_path / "o", "--crop-size", 24, *QUICK)
    assert code == 0, err
    assert BeitConfig.from_pretrained(tmp_path / "o").image_shape == (24, 24)
    assert BeitImageProcessor.from_pretrained(tmp_path / "o").size == {"height": 24, "width": 24}


def test_a_convention_that_transformers_does_not_know_is_said(capsys, data, model, tmp_path):
    given = ("finetune", data, *TASK, "-m", model, *QUICK)
    code, _, err = run(capsys, *given, "-o", tmp_path / "o", "--feature-convention", "unilm")
    assert code == 0 and "transformers, which does not know it, will read other hidden states" in err
    config = BeitConfig.from_pretrained(tmp_path / "o")
    assert config.feature_convention == "unilm" and config.out_indices == (1, 2, 3, 4)
    code, _, err = run(capsys, *given, "-o", tmp_path / "p")
    assert code == 0 and "hidden states" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_saves_and_resume_goes_on(capsys, data, model, tmp_path):
    given = ("finetune", data, *TASK, "-m", model, "-o", tmp_path / "o", *QUICK, "--epochs", 6)
    process = start(*given[:-1], 100000)
    deadline = time.monotonic() + 60
    while not (tmp_path / "o" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command with --resume goes on" in err, err
    assert (tmp_path / "o" / STATE_NAME).is_file()
    code, _, err = run(capsys, *given, "--resume")
    assert code == 1 and "was saved with other settings" in err


def test_too_little_memory_is_said(capsys, data, model, tmp_path, monkeypatch):
    monkeypatch.setattr(training_start, "available_memory", lambda: 1 << 20)
    code, _, err = run(capsys, "finetune", data, *TASK, "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 1 and "memory: pieces of 4 pictures will take" in err


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--image-size", 32), "--image-size: has no meaning with --task segmentation; --crop-size says"),
        (("--mixup", 0.8), "--mixup: has no meaning with --task segmentation"),
        (("--smoothing", 0.0), "--smoothing: has no meaning with --task segmentation"),
        (("--linear-probe",), "--linear-probe: has no meaning with --task segmentation"),
        (("--recipe", "base-1k"), "--recipe: for --task segmentation expected one of own, ade-base-512"),
        (("--batch-size", 1), "--batch-size: batch norm takes its statistics of at least 2 images at a time, found 1"),
        (("--accumulate", 4), "at least 2 images at a time, found 4 in 4 pieces"),
        (("--labels", "names.txt", "--keep-classes"), "each of them says what the classes are; give one"),
        (("--colours", "none.txt", "--reduce-labels"), "--reduce-labels: is for maps of numbers"),
        (("--labels", "none.txt"), "none.txt"),
        (("--colours", "none.txt"), "none.txt"),
        (("--keep-classes",), "classif"),
        (("--crop-size", 30), "crop_size: expected a multiple of the patch size 4 x 4, at least twice, found 30 x 30"),
        (("--crop-size", 4), "crop_size: expected a multiple of the patch size 4 x 4, at least twice, found 4 x 4"),
        (("--lr", "nan"), "--lr: expected a learning rate above 0"),
    ],
)
def test_words_that_do_not_belong_together(capsys, data, model, tmp_path, more, message):
    given = ("finetune", data, *TASK, "-m", model, "-o", tmp_path / "o", *QUICK)
    code, _, err = run(capsys, *given, *more)
    assert code in (1, 2) and message in err and "Traceback" not in err, err
    assert not (tmp_path / "o").exists()


def test_words_of_segmentation_alone(capsys, model, tmp_path):
    classes = class_folders(tmp_path / "d", 3)
    given = ("finetune", classes, "-m", model, "-o", tmp_path / "o", *QUICK)
    for more, message in (
        (("--colours", "t.txt"), "--colours: has no meaning with --task classification"),
        (("--recipe", "ade-base-512"), "--recipe: for --task classification expected one of own, base-22k"),
        (TASK, "expected the folders images and annotations or labels or masks"),
    ):
        code, _, err = run(capsys, *given, *more)
        assert code in (1, 2) and message in err, err
    pairs = pair_folder(tmp_path / "e", 3, "annotations")
    code, _, err = run(capsys, "finetune", pairs, *given[2:])
    assert code == 1 and "hold data for segmentation (--task segmentation)" in err


@pytest.mark.parametrize("names", [("ground", "disc", "disc"), ("ground", "", "disc")])
def test_every_class_needs_a_name_of_its_own(capsys, data, model, tmp_path, names):
    labels = words(tmp_path / "names.txt", *names)
    code, _, err = run(capsys, "finetune", data, *TASK, "-m", model, "-o", tmp_path / "o", "--labels", labels, *QUICK)
    assert code == 2 and "names.txt: expected a name of its own for class " in err


def test_models_too_shallow_or_labels_too_few(capsys, data, tmp_path):
    shallow = save(tmp_path / "m", "classify", num_hidden_layers=3)
    code, _, err = run(capsys, "finetune", data, *TASK, "-m", shallow, "-o", tmp_path / "o", *QUICK)
    assert code == 1 and "UPerNet reads four hidden states, which 3 blocks do not have" in err
    labels = words(tmp_path / "names.txt", "ground", "disc")
    code, _, err = run(capsys, "finetune", data, *TASK, "-m", shallow, "-o", tmp_path / "o", "--labels", labels, *QUICK)
    assert code == 1 and "masks/0.png: expected the 2 classes that have names" in err and "found 2" in err


# The guide ------------------------------------------------------------------------------------------------------------

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "segmentation.md").read_text(encoding="utf-8")


def test_the_example_of_the_guide_runs(capsys, model, tmp_path, monkeypatch):
    pair_folder(tmp_path / "streets")
    (tmp_path / "checkpoint").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    exec(GUIDE.partition("```python\n")[2].partition("```")[0].replace("epochs=10", "epochs=1"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1 and (tmp_path / "streets-beit" / "model.safetensors").is_file()


def test_the_guide_names_what_exists():
    known = {option for action in _parser("finetune")._subparsers._group_actions[0].choices["finetune"]._actions
             for option in action.option_strings}  # fmt: skip
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE)) <= known | {
        "--overlay",
        "--maps",
    }  # of segment and evaluate
    rows = re.findall(r"^\| (`.*?) \| .* \| (\d+) \| (\d+) \| (\S+) \| (\S+) \| (.*) \|$", GUIDE, re.MULTILINE)
    found = {}
    for names, epochs, batch, rate, decay, crop in rows:
        for name, size in zip(re.findall(r"`([\w-]+)`", names), crop.split(", ") if "model" not in crop else [None]):
            found[name] = (int(epochs), int(batch), float(rate), float(decay), size and int(size))
    for name, recipe in SEGMENTATION_RECIPES.items():
        size = recipe.crop_size if name.startswith("ade-") else None
        assert found.pop(name) == (recipe.epochs, recipe.batch_size, recipe.lr, recipe.layer_decay, size)
    assert not found


def test_advice_on_memory_is_taken(monkeypatch):
    """A piece has two images at least, so that one that fits alone is no advice."""
    from minibeit import BeitConfig
    from minibeit.train import start
    from minibeit.train.segmentation import Segmentation

    config, task = BeitConfig(num_labels=3), "semantic_segmentation"
    need = start.memory_needed(config, False, True, task)
    for images, advice in ((1, "too large for this machine"), (2, "--accumulate 2 fits")):
        monkeypatch.setattr(start, "available_memory", lambda images=images: need.total(images))
        with pytest.raises(ValueError, match=advice):
            start.check_memory(config, 4, 1, False, True, task, Segmentation.smallest_piece)
