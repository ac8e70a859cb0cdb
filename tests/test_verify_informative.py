"""False comfort: what weights hide is measured and said, and test weights hide nothing."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from conftest import random_weights
from verify_faults import FAULTS
from verify_plant import job, model_of

from minibeit.checkpoint.load import load_checkpoint
from minibeit.checkpoint.save import save_checkpoint
from minibeit.cli import verify as command
from minibeit.cli.terminal import UsageError
from minibeit.task_table import CLASSES
from minibeit.verify.informative import blind_spots, informative_weights, sentence
from minibeit.verify.lockstep import Job, check, model_source
from minibeit.verify.report_text import as_json, markdown, verdict


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def plain_weights(made: Job) -> dict[str, np.ndarray]:
    """As transformers initialises them: matrices of 0.02, everything else neutral."""
    arrays = {}
    for name, array in made.arrays.items():
        last = name.rpartition(".")[2]
        if last.startswith("lambda"):
            arrays[name] = np.full_like(array, 0.1)
        elif (last == "weight" and array.ndim == 1) or last == "running_var":
            arrays[name] = np.ones_like(array)
        elif last == "weight":
            arrays[name] = np.float32(0.02) * np.random.default_rng(len(arrays)).standard_normal(
                array.shape, np.float32
            )
        else:
            arrays[name] = np.zeros_like(array)
    return arrays


def states(arrays) -> dict[str, str]:
    return {name: spot.state for spot in blind_spots(arrays) for name in spot.names}


def test_a_fresh_model_hides_all_but_its_matrices():
    made = job("semantic_segmentation")
    arrays = plain_weights(made)
    found = states(arrays)
    assert set(found) == {name for name, array in arrays.items() if array.ndim == 1 or not name.endswith("weight")}
    assert found["beit.encoder.1.norm2.weight"] == "1"
    assert found["beit.encoder.1.norm2.bias"] == found["beit.encoder.0.bias_table"] == "0"
    assert found["beit.encoder.2.lambda_1"] == "one number each"
    assert found["decode_head.psp_bottleneck.bn.running_var"] == "1"


@pytest.mark.parametrize("task", CLASSES)
def test_test_weights_hide_nothing_and_are_within_budget(task):
    settings = dict(use_absolute_position_embeddings=True, use_shared_relative_position_bias=True)
    made = job(task, **settings)
    arrays = informative_weights(made.config, task, seed=3)
    assert blind_spots(arrays) == []
    assert {name: a.shape for name, a in arrays.items()} == {name: a.shape for name, a in made.arrays.items()}
    assert {a.dtype.name for a in arrays.values()} == {"float32"}
    assert not np.array_equal(
        arrays["beit.encoder.0.fc1.weight"], informative_weights(made.config, task)["beit.encoder.0.fc1.weight"]
    )
    whole = Job(made.config, task, arrays, made.inputs)
    report = check(whole, model_source(whole, model_of(whole), "m"))
    assert report.ok
    assert report.blind == ""
    assert verdict(report).startswith("OK: ")


def test_trained_like_weights_are_not_suspected():
    made = job("image_classification")
    arrays = random_weights(made.config, made.task, 0, "float32")
    assert blind_spots(arrays) == []
    assert sentence([], 10) == ""
    arrays["classifier.bias"] = np.zeros_like(arrays["classifier.bias"])
    arrays["beit.encoder.2.fc1.weight"] = arrays["beit.encoder.0.fc1.weight"].copy()
    assert states(arrays) == {"classifier.bias": "0", "beit.encoder.2.fc1.weight": "the same in every block"}
    text = sentence(blind_spots(arrays), len(arrays))
    assert text.startswith(f"2 of the {len(arrays)} parameters")
    assert "classifier.bias: 0" in text


def caught(arrays, made: Job) -> list[str]:
    """The planted faults of classification that the verifier sees on these weights."""
    from types import SimpleNamespace

    seen = []
    base = Job(made.config, made.task, arrays, made.inputs)
    for fault in FAULTS:
        if fault.task != made.task or fault.settings:
            continue
        model = model_of(base)
        model.ops = SimpleNamespace(**vars(model.ops))
        model = fault.plant(model) or model
        if not check(base, model_source(base, model, fault.name)).ok:
            seen.append(fault.name)
    return seen


@pytest.mark.slow
def test_faults_that_plain_weights_hide_are_seen_on_test_weights():
    made = job("image_classification")
    mine = [fault.name for fault in FAULTS if fault.task == made.task and not fault.settings]
    plain, telling = (
        caught(arrays, made) for arrays in (plain_weights(made), informative_weights(made.config, made.task))
    )
    assert set(telling) == set(mine)
    hidden = set(mine) - set(plain)
    assert {"norm bias missing", "query bias missing", "position bias missing"} <= hidden


def test_the_verdict_says_what_plain_weights_cannot_show():
    made = job("image_classification")
    plain = Job(made.config, made.task, plain_weights(made), made.inputs)
    report = check(plain, model_source(plain, model_of(plain), "m"))
    assert report.ok
    said = verdict(report)
    assert said.startswith("OK, as far as these weights can show: ")
    assert "biases" in said
    assert "--test-weights" in said
    assert json.loads(as_json(report))["hidden_by_weights"] == report.blind
    assert "parameters of this checkpoint hide" in markdown(report)


def test_the_command_writes_them_for_both_sides(tmp_path, capsys):
    made = job("image_classification")
    plain = made.config.replace(architectures=[CLASSES[made.task]])
    save_checkpoint(tmp_path / "plain", plain, made.task, plain_weights(made))
    (tmp_path / "plain" / "preprocessor_config.json").write_text('{"size": {"height": 12, "width": 8}}')
    assert run("--model", tmp_path / "plain", "--backend", "numpy", "-q") == 0
    assert "OK, as far as these weights can show" in capsys.readouterr().out
    assert run("--model", tmp_path / "plain", "--test-weights", tmp_path / "new") == 0
    assert "give both sides this checkpoint" in capsys.readouterr().out
    config, arrays = load_checkpoint(tmp_path / "new", made.task)
    assert config.to_dict() == plain.to_dict()
    assert blind_spots(arrays) == []
    assert (tmp_path / "new" / "preprocessor_config.json").is_file()
    assert run("--model", tmp_path / "new", "--backend", "numpy", "-q") == 0
    assert capsys.readouterr().out.startswith("OK: ")
    with pytest.raises(UsageError, match="empty or not there yet"):
        run("--model", tmp_path / "plain", "--test-weights", tmp_path / "new")
