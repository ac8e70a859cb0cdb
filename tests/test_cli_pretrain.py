"""The way of the paper by commands: a tokenizer, pre-training, fine-tuning, classifying; and what cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import run
from training_data import class_folders

from minibeit import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling, BeitImageProcessor
from minibeit.cli import _parser
from minibeit.tokenizer.config import DalleTokenizerConfig
from minibeit.tokenizer.tokenizer import DalleTokenizer

TOKENS = DalleTokenizerConfig(
    num_groups=3, num_blocks_per_group=1, hidden_size=8, vocab_size=10, n_init=4, image_size=16
)
SIZES = ("--groups", 3, "--blocks", 1, "--width", 8, "--codes", 10, "--image-size", 16)
QUICK = ("--epochs", 1, "--batch-size", 4, "--backend", "numpy", "-q")
CONFIG = dict(
    image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    vocab_size=10, use_mask_token=True, use_shared_relative_position_bias=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"), 6)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "t"
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    BeitConfig(**CONFIG).save_pretrained(folder)
    return folder


def test_from_images_to_a_classifier(capsys, data, config, tmp_path):
    tokens, pretrained, tuned = (tmp_path / name for name in ("tokens", "pretrained", "tuned"))
    code, out, err = run(capsys, "dvae", data, "-o", tokens, *SIZES, *QUICK)
    assert (code, err) == (0, "") and "held_out_tokens_used" in out
    code, out, err = run(capsys, "pretrain", data, "--tokenizer", tokens, "--config", config, "-o", pretrained, *QUICK)
    assert (code, err) == (0, "") and "held_out_accuracy" in out and "held_out_token_perplexity" in out
    rows = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and np.isfinite(rows[0]["held_out_loss"])
    made = BeitForMaskedImageModeling.from_pretrained(pretrained, backend="numpy")
    assert made.config.vocab_size == 10 and made.config.use_shared_relative_position_bias
    code, out, err = run(capsys, "finetune", data, "--model", pretrained, "-o", tuned, *QUICK)
    assert code == 0, err
    model = BeitForImageClassification.from_pretrained(tuned, backend="numpy")
    assert model.config.id2label == {0: "green", 1: "red"} and model.config.use_relative_position_bias
    code, out, _ = run(capsys, "classify", data / "red" / "0.png", "--model", tuned, "--backend", "numpy", "-q")
    assert code == 0 and "red" in out


def test_a_checkpoint_is_trained_on_at_another_size(capsys, data, tokens, tmp_path):
    BeitForMaskedImageModeling(BeitConfig(**CONFIG), backend="numpy").save_pretrained(tmp_path / "m")
    options = ("--model", tmp_path / "m", "--image-size", 24, *QUICK)
    code, _, err = run(capsys, "pretrain", data, "--tokenizer", tokens, "-o", tmp_path / "o", *options)
    assert code == 0, err
    assert BeitConfig.from_pretrained(tmp_path / "o").image_shape == (24, 24)


def test_a_tokenizer_is_trained_on(capsys, data, tokens, tmp_path):
    code, _, err = run(capsys, "dvae", data, "--model", tokens, "-o", tmp_path / "o", *QUICK)
    assert (code, err) == (0, "")
    assert DalleTokenizer.from_pretrained(tmp_path / "o", backend="numpy").config == TOKENS
    code, _, err = run(capsys, "dvae", data, "--model", tokens, "--codes", 5, "-o", tmp_path / "p", *QUICK)
    assert code == 2 and "--codes: expected to be left out with --model" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "huge"), "expected a config.json or one of tiny, base, large"),
        (("--config", "tiny", "--lr", "0"), "expected a learning rate above 0"),
        (("--config", "tiny", "--masked", "1.5"), "--masked: expected a share above 0"),
        ((), "one of the arguments --config -m/--model is required"),
    ],
)
def test_what_cannot_be_pre_trained_is_one_sentence(capsys, data, tokens, tmp_path, options, message):
    code, out, err = run(capsys, "pretrain", data, "--tokenizer", tokens, "-o", tmp_path / "o", *options, *QUICK)
    assert code in (1, 2) and message in err and "Traceback" not in err and not out
    assert not (tmp_path / "o").exists()


def test_models_that_predict_other_tokens_are_refused(capsys, data, tokens, tmp_path):
    BeitForMaskedImageModeling(BeitConfig(**{**CONFIG, "vocab_size": 11}), backend="numpy").save_pretrained(
        tmp_path / "m"
    )
    options = ("--tokenizer", tokens, "--model", tmp_path / "m", "-o", tmp_path / "o", *QUICK)
    code, _, err = run(capsys, "pretrain", data, *options)
    assert code == 1 and "expected 11 visual tokens, which the model predicts, found 10" in err
    BeitForImageClassification(BeitConfig(**CONFIG), backend="numpy").save_pretrained(tmp_path / "c")
    options = ("--tokenizer", tokens, "--model", tmp_path / "c", "-o", tmp_path / "o", *QUICK)
    code, _, err = run(capsys, "pretrain", data, *options)
    assert code == 1 and "needs a checkpoint of masked image modeling" in err and not (tmp_path / "o").exists()


def test_a_tokenizer_s_size_must_fit_its_tokens(capsys, data, tmp_path):
    options = ("--groups", 3, "--width", 8, "--codes", 10, "--image-size", 18)
    code, _, err = run(capsys, "dvae", data, "-o", tmp_path / "o", *options, *QUICK)
    assert code == 1 and "expected multiples of 4" in err and not (tmp_path / "o").exists()


def test_outputs_never_replace_what_is_read(capsys, data, tokens, config, tmp_path):
    before = (tokens / "model.safetensors").read_bytes()
    words = ("--tokenizer", tokens, "--config", config, *QUICK)
    code, _, err = run(capsys, "pretrain", data, *words, "-o", tokens, "--overwrite")
    assert code == 2 and "holds what --tokenizer names" in err
    code, _, err = run(capsys, "pretrain", data, *words, "-o", config, "--overwrite")
    assert code == 2 and "holds what --config names" in err
    code, _, err = run(capsys, "pretrain", data, *words, "-o", data / "red" / "out")
    assert code == 2 and "within the images to learn from" in err
    assert (tokens / "model.safetensors").read_bytes() == before and not (data / "red" / "out").exists()


def test_overwriting_leaves_nothing_of_the_model_before(capsys, data, tokens, config, tmp_path, monkeypatch):
    output = tmp_path / "o"
    BeitForImageClassification(BeitConfig(**CONFIG), backend="numpy").save_pretrained(output)
    (output / "notes.txt").write_text("mine")
    monkeypatch.setattr("minibeit.train.loop.Trainer.run", lambda self: 1 / 0)
    words = ("--tokenizer", tokens, "--config", config, "-o", output, "--overwrite", *QUICK)
    code, _, err = run(capsys, "pretrain", data, *words)
    assert code == 1 and "ZeroDivisionError" in err
    assert [file.name for file in output.iterdir()] == ["notes.txt"]


def test_a_checkpoint_keeps_its_mean_and_deviation(capsys, data, tokens, tmp_path):
    BeitForMaskedImageModeling(BeitConfig(**CONFIG), backend="numpy").save_pretrained(tmp_path / "m")
    BeitImageProcessor(size=16, image_mean=[0.4, 0.4, 0.4]).save_pretrained(tmp_path / "m")
    words = ("--tokenizer", tokens, "--model", tmp_path / "m", "-o", tmp_path / "o", *QUICK)
    code, _, err = run(capsys, "pretrain", data, *words)
    assert code == 0, err
    assert BeitImageProcessor.from_pretrained(tmp_path / "o").image_mean == [0.4, 0.4, 0.4]


@pytest.mark.parametrize("command", ["pretrain", "dvae", "finetune"])
def test_a_seed_below_0_is_refused_at_once(capsys, data, tmp_path, command):
    code, _, err = run(capsys, command, data, "-o", tmp_path / "o", "--seed", "-1")
    assert code == 2 and "--seed" in err


# The guide ------------------------------------------------------------------------------------------------------------

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "pretraining.md").read_text(encoding="utf-8")


def test_the_example_of_the_guide_runs(capsys, tokens, config, tmp_path, monkeypatch):
    program = GUIDE.partition("```python\n")[2].partition("```")[0]
    class_folders(tmp_path / "photos", 5)
    (tmp_path / "tokens").symlink_to(tokens)
    (tmp_path / "config").symlink_to(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")
    exec(program, {})
    assert 0 <= float(capsys.readouterr().out) <= 1 and (tmp_path / "photos-beit" / "model.safetensors").is_file()


def test_the_options_that_the_guide_names_exist():
    known = set()
    for command in ("dvae", "pretrain", "finetune"):
        for action in _parser(command)._subparsers._group_actions[0].choices[command]._actions:
            known |= set(action.option_strings)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE))
    assert len(named) > 12 and named <= known
