"""`minibeit bench --train`: what a step is, its operations, who takes part, and what is left out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import make, tiny_config
from test_bench import parse

from minibeit.bench import flops, measure, report, training, workloads
from minibeit.bench.measure import Plan
from minibeit.bench.profile import profile_step
from minibeit.cli import bench
from minibeit.cli.terminal import UsageError
from minibeit.train.gradients import value_and_grad

TASKS = ("classification", "mim", "segmentation")


def step_of(task, batch, monkeypatch, recompute=False, backend="numpy"):
    """A step on a tiny model, and its pixels."""
    changes = {"use_mask_token": True} if task == "mim" else {}
    if task == "segmentation":
        changes = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "use_auxiliary_head": True}
    config = tiny_config(image_size=(20, 16), use_relative_position_bias=True, **changes)
    monkeypatch.setattr(workloads.Workload, "config", property(lambda self: config))
    workload = workloads.Workload(task, "tiny", 20, batch, training=True)
    model = make(workloads.model_class(task), config, "float32", backend)
    return training.Step(model, workload, recompute), workloads.pixels(workload)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_learns_and_returns_the_gradient_of_the_patch_embedding(task, batch, monkeypatch):
    step, x = step_of(task, batch, monkeypatch)
    before, start = {name: array.copy() for name, array in step.model.arrays.items()}, step.model
    truth = value_and_grad(start, x, **step.options).grads.beit.embeddings.patch.weight
    assert np.array_equal(step(x), truth) and np.abs(truth).max() > 0
    changed = {name for name, array in step.model.arrays.items() if not np.array_equal(array, before[name])}
    assert len(changed) > 20 and "beit.embeddings.patch.weight" in changed
    assert step.options["batch_statistics"] == (task == "segmentation" and batch > 1)


def test_recomputing_is_the_same_step(monkeypatch):
    results = []
    for recompute in (False, True):
        step, x = step_of("classification", 2, monkeypatch, recompute)
        assert step.options["recompute"] == recompute
        results.append((step(x), step(x), step.model.arrays["classifier.weight"]))
    assert all(np.array_equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("task", TASKS)
def test_the_formula_counts_what_a_step_does(task, monkeypatch):
    step, x = step_of(task, 2, monkeypatch)
    entries, seconds = profile_step(step, x, runs=1)
    counted = sum(entry.operations for entry in entries.values())
    config, name = step.model.config, workloads.TASKS[task][0]
    patches = flops.count(config, name, 2)["patches"]  # the pixels' gradient, which is not needed
    assert counted == flops.training_step(config, name, 2) + patches
    assert 2.5 * flops.total(config, name, 2) < counted
    assert entries["adamw"].calls > 20 and entries["linear_backward"].origin == "numpy"
    assert 0 < sum(entry.seconds for entry in entries.values()) <= seconds


def test_the_command_measures_a_step(tmp_path, capsys):
    words = ("--train", "--size", "digits", "--image-size", 16, "--batch-size", 2, "--threads", 1, "--repeats", 2)
    words += ("--backend", "numpy", "--against", "none", "--profile", "--json", tmp_path / "o.json")
    assert bench.run(parse(*words, "--folder", tmp_path)) == 0
    text = capsys.readouterr().out
    assert "digits 16 classification x 2, a training step:" in text and report.TRAINED in text
    assert "linear_activation_backward" in text and "adamw" in text
    (found,) = json.loads((tmp_path / "o.json").read_text())["workloads"]
    assert found["training"] is True and found["results"][0]["contestant"] == "numpy"
    assert found["gflop"] == flops.training_step(workloads.make("classification", "digits", 16, 2).config,
                                                 "image_classification", 2) / 1e9  # fmt: skip


def test_who_takes_part(monkeypatch):
    monkeypatch.setattr(measure, "missing", lambda name, *_: [])
    ((workload, plan),) = bench._races(parse("--train"))
    assert plan.contestants == ("numba", "numba-recompute", "torch", "inductor")
    assert (workload.batch_size, workload.image_size, workload.training) == (8, 224, True)
    ((workload, plan),) = bench._races(parse("--train", "--task", "segmentation", "--against", "torch"))
    assert (workload.batch_size, workload.image_size) == (1, 512) and plan.contestants[2:] == ("torch",)
    names = [workload.name for workload, _ in bench._suite(parse("--suite", "training"))]
    assert names == [
        "base 224 classification x 8, a training step",
        "base 224 mim x 8, a training step",
        "base 512 segmentation, a training step",
    ]
    assert measure.choose_peers(None, print) == ("torch", "onnxruntime", "openvino")  # unchanged without --train


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UsageError, match="--train measures tasks with a loss"):
        bench.run(parse("--train", "--task", "backbone"))
    with pytest.raises(ValueError, match="expected none or some of torch, inductor in training, found 'openvino'"):
        bench.run(parse("--train", "--against", "openvino"))


def test_a_compiler_that_fails_is_left_out_with_a_sentence(monkeypatch, tmp_path):
    def lines(job, *_):
        if job["job"] == "export":
            return [{"error": "InductorError: no C++ compiler"}]
        return [{"differences": {"numpy": 0.0}}, {"times": {"numpy": [1.0]}, "roofs": []}]

    monkeypatch.setattr(measure, "_lines", lines)
    workload = workloads.make("classification", "digits", 16, 1, training=True)
    found = measure.measure(workload, Plan(("numpy", "inductor"), 1, starts=0), tmp_path, lambda message: None)
    assert found.skipped == ["PyTorch compiled: cannot be compiled (InductorError: no C++ compiler)"]


@pytest.mark.live
@pytest.mark.parametrize("task", TASKS)
def test_pytorch_takes_the_same_step(task, tmp_path):
    pytest.importorskip("transformers")
    workload = workloads.make(task, "digits", 16, 2 if task == "segmentation" else 1, training=True)
    folder = workloads.write_checkpoint(workload, tmp_path)
    x, results = workloads.pixels(workload), []
    for name in ("numpy", "torch"):
        step = training.load(name, workload, folder, 1)
        results.append([step(x).copy() for _ in range(2)])
    for ours, theirs in zip(*results):
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs) and ours.shape == theirs.shape
