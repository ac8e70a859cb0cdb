"""Tokenizers verified: right ones pass on every backend, faults are found where they are; the command takes them."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import save_pictures
from tokenizer_faults import FAULTS, SMALL, E, report_of, tokenizer_job, tokenizer_of
from verify_plant import op

from minibeit import DalleTokenizer, DalleTokenizerConfig, Trace
from minibeit.checkpoint.formats import write_safetensors
from minibeit.cli import verify as command
from minibeit.cli.loading import shipped_checkpoint
from minibeit.cli.terminal import UsageError
from minibeit.ops import backward
from minibeit.params import ReluConv
from minibeit.tokenizer.files import holds_tokenizer
from minibeit.verify.gradients import check_gradients, model_gradients, model_of, with_labels
from minibeit.verify.informative import blind_spots
from minibeit.verify.lockstep import check, model_source
from minibeit.verify.report_html import html
from minibeit.verify.report_text import verdict
from minibeit.verify.streams import TraceSource
from minibeit.verify.trace_file import TraceFile

DATA = Path(__file__).parent / "data" / "tokenizer"
CONFIGS = (
    SMALL,
    DalleTokenizerConfig(num_groups=1, num_blocks_per_group=2, hidden_size=8, vocab_size=9, n_init=4, image_size=7),
    DalleTokenizerConfig(num_groups=2, hidden_size=20, vocab_size=33, input_channels=1, n_init=None, image_size=19),
)


def trace_of(made, tokenizer=None) -> dict[str, np.ndarray]:
    trace = Trace()
    (tokenizer or tokenizer_of(made))(**made.inputs, trace=trace)
    return dict(trace)


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def folder(tmp_path):
    """A small tokenizer, saved."""
    DalleTokenizer(SMALL, arrays=tokenizer_job().arrays, backend="numpy").save_pretrained(tmp_path / "dvae")
    return tmp_path / "dvae"


# What is right --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.num_groups} groups")
def test_no_alarm(config, backend):
    made = tokenizer_job(config)
    report = check(made, model_source(made, tokenizer_of(made, backend), backend))
    assert report.ok, verdict(report)
    assert [row.name for row in report.rows] == list(made.shapes())
    assert all(row.own is not None for row in report.rows)


def test_float64_is_held_to_float64():
    made = tokenizer_job()
    model = DalleTokenizer(SMALL, arrays={n: a.astype(np.float64) for n, a in made.arrays.items()}, dtype="float64")
    arrays = trace_of(made, model)
    assert check(made, TraceSource("float64", arrays)).ok
    arrays["encoder.groups.1.blocks.0.path.1"] = arrays["encoder.groups.1.blocks.0.path.1"] * (1 + 1e-12)
    assert check(made, TraceSource("float64", arrays)).guilty.name == "encoder.groups.1.blocks.0.path.1"


def test_a_port_that_has_an_encoder_alone_or_few_arrays_is_judged_on_those():
    made = tokenizer_job()
    arrays = {name: array for name, array in trace_of(made).items() if name.startswith(E)}
    report = check(made, TraceSource("encoder", arrays))
    assert report.ok
    assert "Nothing after encoder.logits was looked at." in verdict(report)
    few = {name: array for name, array in trace_of(made).items() if name in ("tokens", "decoder.statistics")}
    report = check(made, TraceSource("few", {**few, "tokens": few["tokens"].astype(np.float32)}))
    assert report.ok, verdict(report)
    few["decoder.statistics"] = few["decoder.statistics"] + np.float32(0.1)
    assert check(made, TraceSource("few", few)).guilty.name == "decoder.statistics"


def test_tokens_whose_logits_are_as_good_as_equal_may_be_exchanged():
    made = tokenizer_job()
    for name in ("encoder.output.weight", "encoder.output.bias"):
        made.arrays[name][7] = made.arrays[name][3]  # tokens 3 and 7 are equally likely everywhere
    made.arrays["encoder.output.bias"][[3, 7]] += 3  # and the likeliest ones somewhere
    tokenizer = tokenizer_of(made)
    op("argmax_channels", lambda x: x.shape[1] - 1 - x[:, ::-1].argmax(1))(tokenizer)  # the last of equal ones
    arrays = trace_of(made, tokenizer)
    assert (arrays["tokens"] == 7).any()
    report = check(made, TraceSource("the last", arrays))
    assert report.ok, verdict(report)
    row = next(row for row in report.rows if row.name == "tokens")
    assert "tokens are not those of the float64 run" in row.note
    next_best = np.sort(arrays["encoder.logits"], 1)[0, -3, 0, 0]
    arrays["tokens"][0, 0, 0] = np.flatnonzero(arrays["encoder.logits"][0, :, 0, 0] == next_best)[0]
    assert "1 of 72 tokens are not those of the largest logit" in check(made, TraceSource("no", arrays)).guilty.note


def test_winograds_convolutions_of_tiny_maps_are_right():
    """Fourteen times as far off as NumPy's, which no fixed factor allowed; the yardstick computes as they do."""
    config = DalleTokenizerConfig(num_groups=4, num_blocks_per_group=2, hidden_size=32, vocab_size=9, n_init=None)
    made = tokenizer_job(config, 1, size=(8, 16))
    report = check(made, model_source(made, tokenizer_of(made, "numba"), "numba"))
    assert report.ok, verdict(report)
    row = next(row for row in report.rows if row.name == "encoder.groups.3.blocks.1.path.0")
    assert row.own_limit == pytest.approx(4 * row.own_yard.rms)  # no more leeway than that
    made.arrays["encoder.groups.3.blocks.1.path.0.weight"][3, 5, 1, 1] *= np.float32(1.01)
    model = tokenizer_of(made, "numba")
    made.arrays["encoder.groups.3.blocks.1.path.0.weight"][3, 5, 1, 1] /= np.float32(1.01)
    assert check(made, model_source(made, model, "one weight")).guilty.name == row.name


@pytest.mark.parametrize("tokens", [np.full((2, 6, 6), 20), np.full((2, 6, 6), -1), np.zeros((2, 5, 6), int)])
def test_what_are_no_tokens_is_said(tokens):
    made = tokenizer_job()
    guilty = check(made, TraceSource("no", {**trace_of(made), "tokens": tokens})).guilty
    assert guilty.status == "shape"
    assert "expected integers from 0 to 19 of shape (2, 6, 6)" in guilty.note
    assert check(made, TraceSource("no", {**trace_of(made), "tokens": tokens}), only="decoder.*").guilty is None


def test_an_array_of_another_shape_that_is_not_judged_is_not_gone_on_with():
    made = tokenizer_job()
    arrays = {**trace_of(made), "encoder.groups.0.pooled": np.zeros((2, 12, 5, 5), np.float32)}
    assert check(made, TraceSource("theirs", arrays), only="encoder.logits").ok
    assert check(made, TraceSource("theirs", arrays)).guilty.name == "encoder.groups.0.pooled"


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8"])
def test_low_precision_is_measured_by_its_imitation(precision):
    from minibeit.verify.low_precision import imitations

    made = tokenizer_job(seed=3)
    arrays = trace_of(made, imitations(made.config, made.task, made.arrays, precision)[0])
    assert not check(made, TraceSource("low", arrays)).ok
    report = check(made, TraceSource("low", arrays), precision=precision)
    assert report.ok, verdict(report)


def test_fresh_weights_hide_their_biases():
    made = tokenizer_job()
    assert blind_spots(made.arrays) == []
    fresh = DalleTokenizer(SMALL, backend="numpy").arrays
    assert {spot.hides for spot in blind_spots(fresh)} == {"biases"}


# What is wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught_named_and_explained(fault):
    report = report_of(fault)
    assert report.guilty is not None
    assert report.guilty.name == fault.guilty
    assert fault.says in report.guilty.note
    assert all(row.ok for row in report.rows[: report.rows.index(report.guilty)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_faults_are_caught_on_other_weights(seed):
    for fault in FAULTS:
        guilty = report_of(fault, seed).guilty
        assert guilty is not None, (seed, fault.name)
        assert guilty.name == fault.guilty, (seed, fault.name, guilty.name, guilty.note)


def test_the_report_draws_groups():
    page = html(report_of(FAULTS[0]))
    assert "enc 2" in page
    assert "dec 0" in page
    assert "3 groups of 1 blocks, width 12, 20 tokens" in page


# Gradients ------------------------------------------------------------------------------------------------------------


def gradients_of(wanted, **faulty):
    model = model_of(wanted, "float32")
    model.ops = tokenizer_of(wanted).ops
    for name, function in faulty.items():
        setattr(model.ops, f"{name}_backward", function)
    return model_gradients(wanted, model).arrays


def no_gain(g, saved, x, conv, gain, residual):
    dx, d_conv, none, d_residual = backward.relu_conv2d_residual_backward(g, saved, x, conv, 1.0, residual)
    return dx, d_conv, none, d_residual


def no_relu(g, saved, x, conv):
    return backward.conv2d_backward(g, None, np.maximum(x, 0), conv)


def bias_forgotten(g, saved, x, conv):
    dx, d = backward.relu_conv2d_backward(g, saved, x, conv)
    return dx, ReluConv(d.weight, np.zeros_like(d.bias))


def residual_dropped(g, *rest):
    dx, d_conv, none, d_residual = backward.relu_conv2d_residual_backward(g, *rest)
    return dx, d_conv, none, np.zeros_like(d_residual)


def every_maximum(g, saved, x):
    wide = g.repeat(2, 2).repeat(2, 3)
    return (wide / np.float32(4),)


def one_pixel(g, saved, x):
    return (np.ascontiguousarray(g[:, :, ::2, ::2]),)


def no_temperature(g, saved, logits, noise, temperature):
    dx, *rest = backward.gumbel_softmax_backward(g, saved, logits, noise, temperature)
    return (dx * np.float32(temperature), *rest)


def test_right_gradients_are_within_budget():
    wanted = with_labels(tokenizer_job(), 1)
    arrays = gradients_of(wanted)
    report = check_gradients(wanted, arrays, "NumPy")
    assert report.ok, verdict(report)
    shapes = wanted.shapes()
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert {"cotangent.relaxed", "cotangent.encoder.groups.0.pooled"} <= shapes.keys()
    with pytest.raises(ValueError, match="encoder alone"):
        with_labels(tokenizer_job(CONFIGS[2]))


@pytest.mark.parametrize(
    ("faulty", "guilty", "says"),
    [
        ({"relu_conv2d_residual": no_gain}, "gradient.decoder.groups.2.blocks.0.path.3.weight", "times the right"),
        ({"relu_conv2d": no_relu}, "cotangent.decoder.groups.2.blocks.0.output", ""),
        ({"relu_conv2d": bias_forgotten}, "gradient.decoder.output.bias", "zero throughout"),
        ({"relu_conv2d_residual": residual_dropped}, "cotangent.decoder.groups.2.blocks.0.identity", "zero through"),
        ({"max_pool2x2": every_maximum}, "cotangent.encoder.groups.1.blocks.0.output", ""),
        ({"upsample2x2": one_pixel}, "cotangent.decoder.groups.1.blocks.0.output", ""),
        ({"gumbel_softmax": no_temperature}, "cotangent.encoder.logits", ""),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fault_of_a_backward_is_found(faulty, guilty, says):
    wanted = with_labels(tokenizer_job(), 1)
    report = check_gradients(wanted, gradients_of(wanted, **faulty), "faulty")
    assert report.guilty is not None
    assert report.guilty.name == guilty
    assert says in report.guilty.note


def closed(weight, threshold):
    """The backward of relu_conv2d whose ReLU opens only at a threshold, in the layer of that weight."""

    def faulty(g, saved, x, conv):
        dx, d = backward.relu_conv2d_backward(g, saved, x, conv)
        return (dx * (x > threshold) if conv.weight is weight else dx), d

    return faulty


def test_a_relu_that_is_undecided_may_be_taken_on_either_side():
    wanted = with_labels(tokenizer_job(), 1)
    before = "encoder.groups.2.blocks.0.path.0."
    wanted.arrays[before + "weight"][0] = 0
    wanted.arrays[before + "bias"][0] = 1e-9  # what the next ReLU gets in channel 0, everywhere
    weight = wanted.arrays["encoder.groups.2.blocks.0.path.1.weight"]
    report = check_gradients(wanted, gradients_of(wanted), "open")
    assert report.ok, verdict(report)
    arrays = gradients_of(wanted, relu_conv2d=closed(weight, 1e-8))
    report = check_gradients(wanted, arrays, "closed")
    assert report.ok, verdict(report)
    assert "at 72 places a ReLU" in verdict(report)
    wanted.arrays[before + "bias"][0] = 0.01
    report = check_gradients(wanted, gradients_of(wanted, relu_conv2d=closed(weight, 0.02)), "far from undecided")
    assert report.guilty.name == "cotangent.encoder.groups.2.blocks.0.path.0"


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_takes_tokenizers(folder, tmp_path, capsys):
    reports = [tmp_path / f"r.{ending}" for ending in ("json", "html", "md")]
    words = [word for path in reports for word in ("--report", path)]
    assert run("--tokenizer", folder, "--backend", "numpy", *words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK: 38 arrays of minibeit numpy float32")
    values = json.loads(reports[0].read_text())
    assert values["task"] == "tokenizer"
    assert values["config"]["vocab_size"] == 20
    assert values["rows"][-1]["name"] == "decoder.statistics"
    assert run("--model", folder, "--backend", "numpy", "-q", "--size", "16x32", "--dtype", "float64") == 0
    assert run("--tokenizer", folder, "--list-names") == 0
    assert "decoder.groups.1.enlarged" in capsys.readouterr().out
    assert run("--tokenizer", folder, "--only", "nothing", "-q", "--backend", "numpy") == 2
    with pytest.raises(UsageError, match="--tokenizer: cannot be combined"):
        run("--tokenizer", folder, "--model", folder)
    with pytest.raises(UsageError, match="timm has no tokenizer"):
        run("--tokenizer", folder, "--against", "timm")
    with pytest.raises(ValueError, match="no layers of low precision"):
        run("--tokenizer", folder, "--dtype", "int8")


@pytest.mark.parametrize("files", [("encoder.pkl", "decoder.pkl"), ("flava.safetensors",), ("state_dicts.pt",)])
def test_all_files_of_tokenizers_are_taken_and_recognised(files, tmp_path, capsys):
    for name in files:
        shutil.copy(DATA / name, tmp_path)
    place = tmp_path / files[0] if len(files) == 1 else tmp_path
    for option in ("--tokenizer", "--model"):
        assert run(option, place, "--backend", "numpy", "--size", "16x24", "-q") == 0
        assert "OK: 82 arrays" in capsys.readouterr().out or files == ("flava.safetensors",)
    assert not holds_tokenizer(shipped_checkpoint())


def test_traces_of_tokenizers(folder, tmp_path, capsys):
    trace = tmp_path / "t.safetensors"
    assert run("--tokenizer", folder, "--save-trace", trace, "--backend", "numpy", "--random-seed", 3) == 0
    assert run("--tokenizer", folder, "--against", trace, "-q") == 0
    stored = TraceFile(trace)
    assert stored.dtypes["tokens"] == "int64"
    assert stored.config == SMALL
    arrays = {name: np.array(array) for name, array in stored.items()}
    inputs = {f"input.{name}": array for name, array in stored.inputs.items()}
    arrays["decoder.groups.1.enlarged"] *= np.float32(1.01)
    write_safetensors(trace, {**arrays, **inputs}, stored.metadata)
    capsys.readouterr()
    assert run("--tokenizer", folder, "--against", trace, "-q") == 1
    assert "the first array with an error of its own is decoder.groups.1.enlarged (upsample2x2)" in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="its task is tokenizer, here it is image_classification"):
        run("--against", trace, "--random-seed", 0)
    other = tmp_path / "other"
    DalleTokenizer(SMALL.replace(vocab_size=21), backend="numpy").save_pretrained(other)
    with pytest.raises(ValueError, match="another config: vocab_size is 20, here 21"):
        run("--tokenizer", other, "--against", trace)
    DalleTokenizer(SMALL, seed=1, backend="numpy").save_pretrained(other)
    with pytest.raises(ValueError, match="other weights"):
        run("--tokenizer", other, "--against", trace)


def test_a_tokenizers_pixels_are_judged_first(folder, tmp_path, capsys):
    picture = save_pictures(tmp_path, "a.png")[0]
    tokenizer = DalleTokenizer.from_pretrained(folder, backend="numpy")
    for change, says in (
        (lambda x: x, ""),
        (lambda x: (x - np.float32(0.1)) / np.float32(0.8), "they lie between 0 and 1"),
        (lambda x: x[:, ::-1], "BGR"),
    ):
        x, trace = np.ascontiguousarray(change(tokenizer.preprocess(str(picture)))), Trace()
        tokenizer(x, trace=trace)
        write_safetensors(tmp_path / "t.safetensors", {**trace, "input.pixel_values": x}, {"format": "minibeit-trace"})
        code = run("--tokenizer", folder, "--against", tmp_path / "t.safetensors", "-q", "--image", picture)
        assert code == int(says != "")
        assert says in capsys.readouterr().out


def test_test_weights_goldens_bisection_and_two_tokenizers(folder, tmp_path, capsys):
    fresh, made = tmp_path / "fresh", tmp_path / "made"
    DalleTokenizer(SMALL, backend="numpy").save_pretrained(fresh)
    assert run("--tokenizer", fresh, "-q", "--backend", "numpy") == 0
    assert "OK, as far as these weights can show" in capsys.readouterr().out
    assert run("--tokenizer", fresh, "--test-weights", made) == 0
    assert run("--weights", made, folder) == 0  # the same seed
    assert "all 66 tensors of tokenizer are equal" in capsys.readouterr().out
    assert run("--weights", made, fresh) == 1
    assert run("--tokenizer", folder, "--export-golden", tmp_path / "pack") == 0
    assert run("--tokenizer", folder, "--against", tmp_path / "pack" / "float64.safetensors", "-q") == 0
    assert run("--tokenizer", folder, "--bisect", "--backend", "numba") == 0


def test_gradients_by_the_command(folder, tmp_path, capsys):
    trace = tmp_path / "g.safetensors"
    assert run("--tokenizer", folder, "--gradients", "-q", "--backend", "numpy") == 0
    assert run("--tokenizer", folder, "--gradients", "--save-trace", trace, "--random-seed", 2) == 0
    assert run("--tokenizer", folder, "--gradients", "--against", trace, "-q") == 0
    stored = TraceFile(trace)
    arrays = {name: np.array(array) for name, array in stored.items()}
    arrays["gradient.encoder.input.weight"] *= np.float32(2)
    inputs = {f"input.{name}": array for name, array in stored.inputs.items()}
    write_safetensors(trace, {**arrays, **inputs}, stored.metadata)
    capsys.readouterr()
    assert run("--tokenizer", folder, "--gradients", "--against", trace, "-q") == 1
    assert "gradient.encoder.input.weight" in capsys.readouterr().out
    del inputs["input.noise"]
    write_safetensors(trace, {**arrays, **inputs}, stored.metadata)
    with pytest.raises(ValueError, match=r"expected input\.temperature and input\.pixel_values and input\.noise"):
        run("--tokenizer", folder, "--gradients", "--against", trace)
    assert run("--tokenizer", folder, "--gradients", "--list-names") == 0
    assert "cotangent.relaxed" in capsys.readouterr().out
    assert run("--tokenizer", folder, "--gradients", "--export-golden", tmp_path / "pack") == 0


# Beside PyTorch -------------------------------------------------------------------------------------------------------

CLASSES = DalleTokenizerConfig(hidden_size=64, vocab_size=512, n_init=8, num_blocks_per_group=1, image_size=16)


@pytest.mark.live
@pytest.mark.parametrize("config", [*CONFIGS, CLASSES], ids=["three", "one", "encoder", "classes"])
def test_pytorch_is_right_and_a_yardstick(config):
    pytest.importorskip("torch")
    from minibeit.verify.torch_tokenizer import tokenizer_source

    for seed in range(5):
        made = tokenizer_job(config, seed)
        alone = check(made, tokenizer_source(made))
        assert alone.ok, verdict(alone)
        for backend in ("numpy", "numba"):
            report = check(made, model_source(made, tokenizer_of(made, backend), backend), tokenizer_source(made))
            assert report.ok, verdict(report)
            assert all(row.is_choice or row.own_yard.torch is not None for row in report.rows)


@pytest.mark.live
@pytest.mark.parametrize("config", [SMALL, CLASSES], ids=["functions", "classes"])
def test_pytorchs_gradients(config):
    pytest.importorskip("torch")
    from minibeit.verify.torch_tokenizer import tokenizer_gradients

    for seed in range(3):
        wanted = with_labels(tokenizer_job(config, seed), seed)
        label, theirs = tokenizer_gradients(wanted)
        assert theirs.keys() == wanted.shapes().keys()
        assert check_gradients(wanted, theirs, label).ok
        report = check_gradients(wanted, gradients_of(wanted), "NumPy", (label, theirs))
        assert report.ok, verdict(report)


@pytest.mark.live
def test_the_real_classes_are_hooked():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("dall_e")
    from minibeit.verify.torch_tokenizer import tokenizer_source

    made = tokenizer_job(CLASSES)
    assert tokenizer_source(made).label.endswith("(transformers, dall_e)")
    small = replace(CLASSES, num_groups=3)
    assert tokenizer_source(tokenizer_job(small)).label.endswith("float32")


@pytest.mark.live
def test_faults_are_caught_beside_pytorch():
    pytest.importorskip("torch")
    from minibeit.verify.torch_tokenizer import tokenizer_source

    for fault in FAULTS:
        guilty = report_of(fault, yardstick=tokenizer_source).guilty
        assert guilty is not None, fault.name
        assert guilty.name == fault.guilty, (fault.name, guilty.name)
