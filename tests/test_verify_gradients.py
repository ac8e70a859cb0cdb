"""Gradients verified: right ones pass, each planted fault of a backward is found where it is and named."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import actual_sums, listed_sums
from verify_plant import job, model_of

from minibeit.checkpoint.save import save_checkpoint
from minibeit.cli import verify as command
from minibeit.ops import backward, reference
from minibeit.ops.backward.activations import gelu_tanh_derivative
from minibeit.params import LayerNorm, Linear
from minibeit.task_table import CLASSES
from minibeit.verify import gradients
from minibeit.verify.gradients import LOSSES, check_gradients, model_gradients, with_labels
from minibeit.verify.report_text import verdict

MODELS = [task for task in LOSSES if task != "tokenizer"]


def made(task="image_classification", **settings):
    return with_labels(job(task, **{"image_size": (16, 16), **settings}))


def found(wanted, **faulty):
    """The gradients of the model under test, with these backwards in place of its own."""
    model = model_of(wanted)
    for name, function in faulty.items():
        setattr(model.ops, f"{name}_backward", function)
    return model_gradients(wanted, model).arrays


def report_of(task="image_classification", **faulty):
    wanted = made(task)
    return check_gradients(wanted, found(wanted, **faulty), "faulty")


# What is right --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", MODELS)
def test_right_gradients_are_within_budget(task):
    wanted = made(task)
    arrays = found(wanted)
    report = check_gradients(wanted, arrays, "NumPy")
    assert report.ok, verdict(report)
    assert len(report.rows) == len(arrays) > 90
    shapes = wanted.shapes()
    assert {name: shapes[name] for name in arrays} == {name: array.shape for name, array in arrays.items()}
    unread = "encoder.3." if task == "semantic_segmentation" else "none"  # its heads read no further than block 2
    assert not [name for name in shapes if name not in arrays and name.startswith("gradient.") and unread not in name]


@pytest.mark.parametrize("task", MODELS)
def test_float64_is_held_to_float64(task):
    wanted = made(task)
    model = type(model_of(wanted))
    arrays = {name: array.astype(np.float64) for name, array in wanted.arrays.items()}
    double = model_gradients(wanted, model(wanted.config, arrays=arrays, dtype="float64", backend="numpy")).arrays
    assert check_gradients(wanted, double, "float64").ok
    name = "gradient.beit.encoder.1.fc1.weight"
    double[name] = double[name] * (1 + 1e-9)
    report = check_gradients(wanted, double, "float64")
    assert report.guilty is not None
    assert report.guilty.name == name


def test_several_models_raise_no_false_alarm():
    for seed in range(8):
        wanted = with_labels(job("image_classification", seed, use_shared_relative_position_bias=seed % 2 == 0), seed)
        report = check_gradients(wanted, found(wanted), "NumPy")
        assert report.ok, verdict(report)


def summed_plainly(g, saved, x, layer):
    """The backward of a linear layer whose bias is added up in float32, row after row."""
    dx, d_layer = backward.linear_backward(g, saved, x, layer)
    rows = np.float32(g.reshape(-1, g.shape[-1]))
    return dx, replace(d_layer, bias=np.add.accumulate(rows, 0)[-1])


def test_sums_over_many_rows_may_be_plain_ones(monkeypatch):
    wanted = with_labels(job("masked_image_modeling", 3, image_size=(64, 64), patch_size=(2, 2)), 3)
    arrays = found(wanted, linear=summed_plainly)
    report = check_gradients(wanted, arrays, "plain sums")
    assert report.ok, verdict(report)
    monkeypatch.setattr(gradients, "losses", lambda op, given: ())
    assert not check_gradients(wanted, arrays, "plain sums").ok


def closed_in_channel_0(wanted, module):
    """A backward that takes the ReLU of this convolution's first channel as closed."""
    shape, first = wanted.arrays[f"{module}.conv.weight"].shape, wanted.arrays[f"{module}.bn.bias"]

    def faulty(g, saved, x, layer):
        y, moments, positive = saved
        if layer.conv.weight.shape == shape and np.array_equal(layer.bn.bias, first):
            positive = positive & (np.arange(y.shape[1]) > 0)[:, None, None]
        return backward.conv_bn_relu_backward(g, (y, moments, positive), x, layer)

    return faulty


def test_a_relu_within_a_convolution_may_be_taken_on_either_side():
    wanted, module = made("semantic_segmentation"), "decode_head.fpn_convs.0"
    wanted.arrays[f"{module}.bn.weight"][0] = 0
    wanted.arrays[f"{module}.bn.bias"][0] = 1e-9  # what that ReLU gets in channel 0, everywhere
    report = check_gradients(wanted, found(wanted), "open")
    assert report.ok, verdict(report)
    report = check_gradients(wanted, found(wanted, conv_bn_relu=closed_in_channel_0(wanted, module)), "closed")
    assert report.ok, verdict(report)
    assert "places a ReLU" in verdict(report)
    wanted.arrays[f"{module}.bn.bias"][0] = 0.01
    faulty = found(wanted, conv_bn_relu=closed_in_channel_0(wanted, module))
    report = check_gradients(wanted, faulty, "far from undecided")
    assert report.guilty is not None
    assert module in report.guilty.name


# What is wrong --------------------------------------------------------------------------------------------------------


def without_scale(g, saved, x, layer, scale, residual, keep=None):
    dx, d_layer, d_scale, d_residual = backward.linear_residual_backward(g, saved, x, layer, scale, residual, keep)
    return (g @ layer.weight).reshape(x.shape), d_layer, d_scale, d_residual


def weight_without_scale(g, saved, x, layer, scale, *rest):
    dx, d_layer, d_scale, d_residual = backward.linear_residual_backward(g, saved, x, layer, scale, *rest)
    return dx, replace(d_layer, weight=d_layer.weight / scale[:, None]), d_scale, d_residual


def forgotten_bias(g, saved, x, layer, scale, *rest):
    dx, d_layer, d_scale, d_residual = backward.linear_residual_backward(g, saved, x, layer, scale, *rest)
    return dx, Linear(d_layer.weight, np.zeros_like(layer.bias)), d_scale, d_residual


def scale_without_bias(g, saved, x, layer, scale, *rest):
    dx, d_layer, _, d_residual = backward.linear_residual_backward(g, saved, x, layer, scale, *rest)
    rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return dx, d_layer, ((rows.T @ inputs) * layer.weight).sum(1), d_residual


def dropped_residual(g, *rest):
    dx, d_layer, d_scale, d_residual = backward.linear_residual_backward(g, *rest)
    return dx, d_layer, d_scale, np.zeros_like(d_residual)


def transposed_weight(g, saved, x, p, num_heads):
    dx, d_p, none = backward.project_qkv_backward(g, saved, x, p, num_heads)
    return dx, replace(d_p, query=replace(d_p.query, weight=np.ascontiguousarray(d_p.query.weight.T))), none


def forgotten_value(g, saved, x, p, num_heads):
    dx, d_p, none = backward.project_qkv_backward((g[0], g[1], np.zeros_like(g[2])), saved, x, p, num_heads)
    return dx, backward.project_qkv_backward(g, saved, x, p, num_heads)[1], none


def attention(rowsum=True, scale=True, lost=False):
    def faulty(g, saved, q, k, v, bias, return_probs=False, keep=None):
        dq, dk, dv, d_bias = backward.attention_backward(g, saved, q, k, v, bias, return_probs, keep)
        root = np.float32(q.shape[-1] ** 0.5)
        index = reference.relative_position_index(bias.grid)
        if scale is False:
            return dq * root, dk, dv, d_bias
        if rowsum and not lost:
            return dq, dk, dv, d_bias
        B, H, N, d = q.shape
        heads = g.reshape(B, N, H, d).transpose(0, 2, 1, 3)
        scores = q @ k.swapaxes(2, 3) / root + bias.table[index].transpose(2, 0, 1)
        probs = reference.softmax(scores)
        d_probs = heads @ v.swapaxes(2, 3)
        d_scores = probs * (d_probs - ((probs * d_probs).sum(-1, keepdims=True) if rowsum else 0))
        table = np.zeros_like(bias.table)
        if lost:
            table[index] = d_scores.sum(0).transpose(1, 2, 0)  # the last of the repeated indices wins
            return dq, dk, dv, replace(d_bias, table=table)
        return d_scores @ k / root, d_scores.swapaxes(2, 3) @ q / root, dv, d_bias

    return faulty


def tanh_gelu(g, saved, x, layer, activation):
    return (*backward.linear_backward(g * gelu_tanh_derivative(saved).astype(g.dtype), None, x, layer), None)


def without_derivative(g, saved, x, layer, activation):
    return (*backward.linear_backward(g, None, x, layer), None)


def norm_without_means(g, saved, x, norm, eps):
    _, d_norm, none = backward.layer_norm_backward(g, saved, x, norm, eps)
    return g * norm.weight / np.sqrt(x.var(-1, keepdims=True) + eps), d_norm, none


def norm_of_raw_input(g, saved, x, norm, eps):
    dx, d_norm, none = backward.layer_norm_backward(g, saved, x, norm, eps)
    return dx, LayerNorm((g * x).reshape(-1, x.shape[-1]).sum(0), d_norm.bias), none


def summed_loss(g, saved, logits, labels, *rest, **options):
    first, *others = backward.cross_entropy_backward(g, saved, logits, labels, *rest, **options)
    return (first * len(labels), *others)


def cls_in_the_mean(g, saved, x):
    return (np.broadcast_to(g[:, None] / x.shape[1], x.shape).copy(),)


def unit_statistics(g, saved, x, layer):
    y, moments, positive = saved
    return backward.conv_bn_relu_backward(g, (y, replace(moments, var=np.ones_like(moments.var)), positive), x, layer)


def without_mask(g, saved, x, layer):
    y, moments, positive = saved
    return backward.conv_bn_relu_backward(g, (y, moments, np.ones_like(positive)), x, layer)


BLOCK = "encoder.2."
FAULTS = {
    "missing scale in dx": (dict(linear_residual=without_scale), f"cotangent.{BLOCK}mlp.hidden", ""),
    "missing scale in dW": (
        dict(linear_residual=weight_without_scale),
        f"gradient.beit.{BLOCK}fc2.weight",
        "slice along axis 0",
    ),
    "forgotten bias gradient": (dict(linear_residual=forgotten_bias), f"gradient.beit.{BLOCK}fc2.bias", "zero"),
    "layer scale without bias": (dict(linear_residual=scale_without_bias), f"gradient.beit.{BLOCK}lambda_2", ""),
    "dropped residual": (
        dict(linear_residual=dropped_residual),
        f"cotangent.{BLOCK}attention.residual",
        f"cotangent.{BLOCK}output is missing",
    ),
    "transposed dW": (
        dict(project_qkv=transposed_weight),
        f"gradient.beit.{BLOCK}attention.query.weight",
        "transposed",
    ),
    "value left out of dx": (dict(project_qkv=forgotten_value), f"cotangent.{BLOCK}norm1", ""),
    "softmax without rowsum": (dict(attention=attention(rowsum=False)), f"cotangent.{BLOCK}attention.key", ""),
    "query without 1/sqrt(d)": (
        dict(attention=attention(scale=False)),
        f"cotangent.{BLOCK}attention.query",
        "times the right gradient",
    ),
    "lost repeats of the table": (
        dict(attention=attention(lost=True)),
        f"cotangent.{BLOCK}attention.bias_table",
        "",
    ),
    "derivative of the tanh GELU": (dict(linear_activation=tanh_gelu), f"gradient.beit.{BLOCK}fc1.weight", ""),
    "no derivative of GELU": (dict(linear_activation=without_derivative), f"gradient.beit.{BLOCK}fc1.weight", ""),
    "layer norm without its means": (dict(layer_norm=norm_without_means), f"cotangent.{BLOCK}output", ""),
    "layer norm weight of raw input": (dict(layer_norm=norm_of_raw_input), "gradient.beit.pooler.weight", ""),
    "loss summed, not averaged": (dict(cross_entropy=summed_loss), "cotangent.logits", "it is 2 times"),
    "CLS counted in the mean": (dict(mean_patches=cls_in_the_mean), f"cotangent.{BLOCK}output", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name):
    faulty, where, says = FAULTS[name]
    report = report_of(**faulty)
    assert report.guilty is not None
    assert report.guilty.name == where, verdict(report)
    assert set(faulty) & set(report.guilty.ops)
    assert says in report.guilty.note
    assert where in verdict(report)


@pytest.mark.parametrize("faulty", [unit_statistics, without_mask], ids=["statistics of batch norm", "relu"])
def test_a_fault_of_a_convolution_is_found(faulty):
    report = report_of("semantic_segmentation", conv_bn_relu=faulty)
    assert report.guilty is not None
    assert "conv_bn_relu" in report.guilty.ops
    assert (
        report.guilty.name.startswith("gradient.auxiliary_head.")
        or ".psp" in report.guilty.name
        or "fpn_convs" in (report.guilty.name)
    )


def test_what_is_missing_misshapen_or_unknown():
    wanted = made()
    arrays = found(wanted)
    del arrays["gradient.classifier.bias"]
    arrays["gradient.classifier.weight"] = arrays["gradient.classifier.weight"].T
    arrays["gradient.nobody"] = np.zeros(3)
    status = {row.name: row.status for row in check_gradients(wanted, arrays, "x").rows if row.status != "ok"}
    assert status["gradient.classifier.bias"] == "missing"
    assert status["gradient.classifier.weight"] == "shape"
    assert status["gradient.nobody"] == "extra"
    assert not check_gradients(wanted, found(wanted), "x", only="nothing").ok


# The command ----------------------------------------------------------------------------------------------------------


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def folder(tmp_path):
    wanted = job("image_classification", image_size=(16, 16))
    config = wanted.config.replace(architectures=[CLASSES[wanted.task]])
    save_checkpoint(tmp_path / "model", config, wanted.task, wanted.arrays)
    return tmp_path / "model"


def test_the_command_its_report_and_a_trace(folder, tmp_path, capsys):
    report, trace = tmp_path / "r.json", tmp_path / "t.safetensors"
    assert run("--gradients", "--model", folder, "--report", report, "--report", tmp_path / "r.html") == 0
    assert json.loads(report.read_text())
    assert "gradient.beit.encoder.0.fc1.weight" in (tmp_path / "r.html").read_text()
    assert run("--gradients", "--model", folder, "--save-trace", trace, "--only", "gradient.*") == 0
    assert run("--gradients", "--model", folder, "--against", trace) == 0
    assert "OK: " in capsys.readouterr().out.splitlines()[-1]
    assert run("--gradients", "--model", folder, "--list-names") == 0
    assert "gradient.classifier.weight" in capsys.readouterr().out


def test_a_golden_pack_with_gradients(folder, tmp_path):
    assert run("--gradients", "--model", folder, "--export-golden", tmp_path / "pack") == 0
    assert listed_sums(tmp_path / "pack") == actual_sums(tmp_path / "pack")
    names = (tmp_path / "pack" / "SHA256SUMS").read_text()
    assert "gradients.float64.safetensors" in names
    for dtype in ("float64", "float32"):
        path = tmp_path / "pack" / f"gradients.{dtype}.safetensors"
        assert run("--gradients", "--model", folder, "--against", path, "-q") == 0


def test_a_sentence_for_what_cannot_be_done(folder, tmp_path):
    with pytest.raises(ValueError, match="expected a task with a loss"):
        run("--gradients", "--model", folder, "--task", "backbone")
    forward = tmp_path / "forward.safetensors"
    run("--model", folder, "--backend", "numpy", "--save-trace", forward)
    with pytest.raises(ValueError, match=r"input\.labels"):
        run("--gradients", "--model", folder, "--against", forward)
    with pytest.raises(ValueError, match="nothing was written"):
        run("--gradients", "--model", folder, "--save-trace", tmp_path / "x.safetensors", "--only", "y")


@pytest.mark.live
def test_what_transformers_cannot_run_is_said_in_a_sentence():
    pytest.importorskip("transformers")
    from minibeit.verify.torch_gradients import torch_gradients

    wanted = made(image_size=(8, 12), use_absolute_position_embeddings=True)
    wanted.inputs["pixel_values"] = np.zeros((2, 3, 16, 12), np.float32)  # another grid, which is not square either
    with pytest.raises(ValueError, match="transformers cannot run this model on this input"):
        torch_gradients(wanted)


@pytest.mark.live
@pytest.mark.parametrize("task", MODELS)
def test_autograd_is_within_budget_and_serves_as_yardstick(task):
    pytest.importorskip("transformers")
    from minibeit.verify.torch_gradients import torch_gradients

    wanted = made(task)
    label, theirs = torch_gradients(wanted)
    report = check_gradients(wanted, theirs, label, partial=True)
    assert report.ok, verdict(report)
    missing = [name for name in found(wanted) if name not in theirs]
    assert all(name.endswith(("bias_table", "fpn.2")) for name in missing)
    assert check_gradients(wanted, found(wanted), "NumPy", (label, theirs)).ok
