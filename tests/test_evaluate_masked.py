"""`minibeit evaluate` of a model of masked modelling: its figures, its page, and what it needs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_helpers import run
from test_cli_pretrain import CONFIG, TOKENS
from training_data import class_folders

from minibeit import BeitConfig, BeitForMaskedImageModeling, BeitImageProcessor
from minibeit.tokenizer.tokenizer import DalleTokenizer
from minibeit.train.examples import read_images
from minibeit.train.pretraining import MaskedModeling
from minibeit.train.recipes import PretrainingRecipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(data, tokenizer, model): folders."""
    folder = tmp_path_factory.mktemp("made")
    class_folders(folder / "data", 3)
    (folder / "data" / "red" / "broken.png").write_bytes(b"no image")
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(folder / "tokens")
    BeitForMaskedImageModeling(BeitConfig(**CONFIG), backend="numpy", seed=3).save_pretrained(folder / "model")
    BeitImageProcessor(size=16).save_pretrained(folder / "model")
    return folder / "data", folder / "tokens", folder / "model"


def test_figures_are_those_of_each_image_alone(capsys, made, tmp_path):
    data, tokens, folder = made
    words = ("--tokenizer", tokens, "--model", folder, "--masked", 0.5, "--backend", "numpy", "-b", 4)
    code, out, err = run(
        capsys, "evaluate", data, *words, "--json", tmp_path / "e.json", "--html", tmp_path / "e.html", "-q"
    )
    assert code == 1 and "broken.png" in err and "accuracy" in out and "classes" not in out
    found = json.loads((tmp_path / "e.json").read_text())
    model, tokenizer = (
        BeitForMaskedImageModeling.from_pretrained(folder, backend="numpy"),
        DalleTokenizer.from_pretrained(tokens, backend="numpy"),
    )
    images, recipe = read_images(data), PretrainingRecipe(masked=0.5)
    objective = MaskedModeling(images, BeitImageProcessor.from_pretrained(folder), recipe, model.config, tokenizer)
    losses, shares, seen = [], [], []
    for example in images.train:
        batch = objective.batch([objective.read_judged(example)])
        labels = batch.targets[batch.mask]
        output = model(batch.pixels, bool_masked_pos=batch.mask, labels=labels)
        losses.append(float(output.loss))
        shares.append(float((output.logits[batch.mask].argmax(1) == labels).mean()))
        seen.append(batch.targets)
    assert found["images"] == 6 and found["task"] == "masked_image_modeling"
    assert found["figures"]["loss"]["value"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["figures"]["accuracy"]["value"] == pytest.approx(np.mean(shares), rel=1e-12)
    assert found["figures"]["loss"]["low"] < np.mean(losses) < found["figures"]["loss"]["high"]
    assert 1 <= found["figures"]["token_perplexity"]["value"] <= len(np.unique(seen))
    assert "token_perplexity" in (tmp_path / "e.html").read_text() and len(found["worst"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--tokenizer: a model of masked modelling is measured by the tokens of one"),
        (("--tokenizer", "TOKENS", "--masked", "0"), "--masked: expected a share above 0"),
        (("--tokenizer", "TOKENS", "--crop-fraction", "0.9"), "--crop-fraction: the checkpoint was made for"),
        (("--tokenizer", "TOKENS", "--slide"), "--slide: the checkpoint was made for"),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, made, options, message):
    data, tokens, folder = made
    words = [tokens if word == "TOKENS" else word for word in options]
    code, out, err = run(capsys, "evaluate", data, "--model", folder, *words, "-q")
    assert code == 2 and message in err and not out
