"""The verifier's parts: streams in lockstep, the comparison's numbers, the names, own and inherited error."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from conftest import random_weights, tiny_config
from verify_plant import job, model_of

from minibeit import Trace
from minibeit.ops import reference
from minibeit.params import Conv, ConvBatchNorm, ConvTranspose
from minibeit.task_table import CLASSES
from minibeit.tasks import task_class
from minibeit.verify import float64_model
from minibeit.verify.bisect import bisect, fast_ops
from minibeit.verify.difference import ULP_EDGES, difference, distance, heat_map
from minibeit.verify.float64_model import Log, truth_model
from minibeit.verify.lockstep import Job, check, model_source
from minibeit.verify.report_text import as_json, markdown, verdict
from minibeit.verify.streams import RunSource, Stream, TraceSource
from minibeit.verify.trace_names import describe, trace_shapes

EPS32 = np.finfo(np.float32).eps


# Streams ------------------------------------------------------------------------------------------------------------


def counting(trace):
    x = trace.record("a", 1)
    x = trace.record("b", x + 1)
    trace.record("c", x * 10)


def test_a_stream_stops_at_every_record_and_goes_on_with_the_reply():
    stream = Stream(counting)
    assert stream.advance() == ("a", 1)
    assert stream.advance(5) == ("b", 6)
    assert stream.advance() == ("c", 60)
    assert stream.advance() is None
    assert stream.advance() is None


def test_errors_of_a_run_come_out_where_it_is_advanced():
    def failing(trace):
        trace.record("a", 1)
        raise ValueError("broken")

    stream = Stream(failing)
    stream.advance()
    with pytest.raises(ValueError, match="broken"):
        stream.advance()
    assert stream.advance() is None


def test_closing_ends_the_thread():
    before = threading.active_count()
    streams = [Stream(counting) for _ in range(3)]
    for stream in streams:
        stream.advance()
    assert threading.active_count() == before + 3
    for stream in streams:
        stream.close()
    for _ in range(100):
        if threading.active_count() == before:
            break
        threading.Event().wait(0.01)
    assert threading.active_count() == before


def test_a_source_hands_out_by_name_in_any_order():
    source = RunSource("s", ["a", "b", "c"], counting)
    assert source.take("b") == 2
    assert source.take("a") == 1
    assert source.take("nothing") is None
    assert source.take("c") == 20
    source.close()


def test_a_source_stands_one_record_ahead():
    steps = []

    def run(trace):
        for name in "abc":
            steps.append(name)
            trace.record(name, name)

    source = RunSource("s", ["a", "b", "c"], run)
    assert source.take("a") == "a"
    assert steps == ["a", "b"]
    assert source.take("b") == "b"
    assert steps == ["a", "b", "c"]
    source.close()


# Comparison ---------------------------------------------------------------------------------------------------------


def test_difference_counts_by_hand():
    truth = np.array([[1.0, 2.0], [-4.0, 0.0]])
    found = np.array([[1.0, 2.5], [-4.0, 0.0]], np.float32)
    d = difference(found, truth)
    assert (d.size, d.max_abs, d.worst, d.worst_found, d.worst_truth) == (4, 0.5, (0, 1), 2.5, 2.0)
    assert d.max_rel == 0.25
    assert d.rms_rel == pytest.approx(0.5 / np.sqrt(21))
    assert d.rms_truth == pytest.approx(np.sqrt(21 / 4))
    assert d.cosine == pytest.approx((1 + 5 + 16) / np.sqrt(21 * (1 + 6.25 + 16)))
    assert d.ulps[0] == 3
    assert sum(d.ulps) == 4
    assert d.ulps[-1] == 1  # half of 2 is two million steps
    assert d.finite


def test_ulp_histogram_counts_steps_of_float32():
    truth = np.full(6, 1.5)
    found = np.array([1.5 + k * EPS32 for k in (0, 1, 2, 3, 10, 1000)], np.float32)
    d = difference(found, truth)
    bins = dict(zip([*ULP_EDGES, np.inf], d.ulps))
    assert bins == {0.5: 1, 1: 1, 2: 1, 4: 1, 8: 0, 16: 1, 64: 0, 256: 0, 4096: 1, 65536: 0, np.inf: 0}


def test_nan_and_infinity_are_never_equal_to_numbers():
    truth = np.array([1.0, np.nan, np.inf, 2.0])
    d = difference(np.array([1.0, np.nan, np.inf, np.nan], np.float32), truth)
    assert (d.nan_found, d.nan_truth, d.inf_found, d.inf_truth) == (2, 1, 1, 1)
    assert not d.finite
    assert d.rms_rel == np.inf
    assert d.max_abs == np.inf
    assert distance(np.array([np.nan]), np.array([1.0]))[0] == np.inf


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        difference(np.zeros(2), np.zeros(3))


def test_pieces_and_views_are_compared_whole():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((3, 4, 300, 200))
    noise = 1e-3 * rng.standard_normal(truth.shape)
    found = truth + noise
    expected = np.sqrt(np.mean(noise**2) / np.mean(truth**2))
    view = np.ascontiguousarray(found.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    for a in (found, view):
        d = difference(a, truth)
        assert d.rms_rel == pytest.approx(expected, rel=1e-9)
        assert d.worst == np.unravel_index(np.abs(noise).argmax(), noise.shape)
        assert distance(a, truth)[0] == pytest.approx(expected, rel=1e-9)


def test_empty_arrays_have_no_error():
    d = difference(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (d.size, d.rms_rel, d.worst) == (0, 0.0, ())


def test_heat_map_keeps_the_largest():
    truth = np.zeros((2, 3, 200, 130))
    found = truth.copy()
    found[1, 2, 150, 100] = -7
    heat = heat_map(found, truth)
    assert heat.shape == (64, 64)
    assert heat.max() == 7
    assert heat[150 * 64 // 200, 100 * 64 // 130] == 7
    assert (heat > 0).sum() == 1
    assert heat_map(np.zeros(3), np.zeros(3)) is None


# The truth ----------------------------------------------------------------------------------------------------------


def test_lean_convolutions_are_the_reference(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(float64_model, "STRIP_BYTES", 2000)
    x, y = rng.standard_normal((2, 3, 9, 11)), rng.standard_normal((2, 4, 4, 5))
    conv = Conv(rng.standard_normal((5, 3, 3, 3)), rng.standard_normal(5))
    assert np.allclose(float64_model.conv2d(x, conv), reference.conv2d(x, conv), rtol=0, atol=1e-13)
    deconv = ConvTranspose(rng.standard_normal((3, 50, 2, 2)), rng.standard_normal(50))
    assert np.allclose(float64_model.conv_transpose(x, deconv), reference.conv_transpose(x, deconv), rtol=0, atol=1e-13)
    many = rng.standard_normal((2, 40, 5, 4))
    assert np.array_equal(float64_model.resize_bilinear(many, (7, 9)), reference.resize_bilinear(many, (7, 9)))
    wide = ConvBatchNorm(
        Conv(rng.standard_normal((5, 7, 3, 3)), None),
        float64_model.reference.BatchNorm(*rng.standard_normal((3, 5)), 1 + rng.random(5)),
    )
    expected = reference.conv_bn_relu_resized([x, y], wide, (9, 11))
    assert np.allclose(float64_model.conv_bn_relu_resized([x, y], wide, (9, 11)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("task", CLASSES)
def test_truth_is_the_float64_model_and_logs_its_calls(task):
    made = job(task)
    log, trace, expected = Log(), Trace(), Trace()
    truth_model(made.config, task, made.arrays, log)(**made.inputs, trace=trace)
    double = {name: array.astype(np.float64) for name, array in made.arrays.items()}
    task_class(task)(made.config, arrays=double, dtype="float64", backend="numpy")(**made.inputs, trace=expected)
    assert list(trace) == list(expected)
    for name, array in expected.items():
        assert trace[name].dtype == np.float64, name
        assert difference(trace[name], array).rms_rel < 1e-15, name
    assert {"linear", "layer_norm", "attention"} <= {call.op for call in log.take()}
    assert log.take() == []


@pytest.mark.parametrize("task", CLASSES)
def test_names_and_shapes_are_those_of_a_run(task):
    made, trace = job(task), Trace()
    model_of(made)(**made.inputs, trace=trace)
    assert made.shapes() == {name: array.shape for name, array in trace.items()}


def test_names_of_a_real_model_without_computing_it():
    config = tiny_config(hidden_size=768, num_attention_heads=12, num_hidden_layers=12, image_size=640, patch_size=16)
    shapes = trace_shapes(config, "image_classification")
    assert shapes["encoder.11.attention.probs"] == (1, 12, 1601, 1601)
    text = describe(shapes)
    assert text.count("attention.probs") == 1
    assert "encoder.*.attention.probs" in text


# Own and inherited --------------------------------------------------------------------------------------------------


def test_own_error_forgets_what_came_before():
    made = job("image_classification")
    model = model_of(made)
    good = model.ops.linear

    def faulty(x, layer):  # the patch embedding and the classifier
        y = good(x, layer)
        return y + np.linspace(0, 1, y.shape[-1], dtype=np.float32)

    model.ops.linear = faulty
    report = check(made, model_source(made, model, "wrong"))
    rows = {row.name: row for row in report.rows}
    assert rows["embeddings.patches"].status == "own"
    assert rows["encoder.0.attention.query"].status == "total"
    assert rows["encoder.0.attention.query"].own_ratio < 4
    assert rows["encoder.0.attention.query"].total.rms_rel > 1e-2
    assert rows["encoder.0.attention.query"].inherited > 1e-2
    assert rows["logits"].status == "own"
    assert "1 later arrays have errors of their own" in verdict(report)


def test_a_trace_with_few_names_is_judged_by_segments():
    made, trace = job("image_classification"), Trace(("encoder.*.output", "logits"))
    model_of(made)(**made.inputs, trace=trace)
    whole = check(made, TraceSource("theirs", trace), only=["encoder.*.output", "logits"])
    assert whole.ok
    assert [row.name for row in whole.rows] == [*(f"encoder.{i}.output" for i in range(3)), "logits"]
    broken = dict(trace)
    broken["encoder.1.output"] = broken["encoder.1.output"] * np.float32(1.001)
    report = check(made, TraceSource("theirs", broken), only=["encoder.*.output", "logits"])
    assert report.guilty.name == "encoder.1.output"
    # The next segment starts from what the trace says, which is not what its author's block 2 started from.
    assert [row.name for row in report.rows if row.status == "own"] == ["encoder.1.output", "encoder.2.output"]


def test_a_single_wrong_element_of_many_is_seen():
    made, trace = job("image_classification", hidden_size=120), Trace()
    model_of(made)(**made.inputs, trace=trace)
    arrays = {name: array.copy() for name, array in trace.items()}
    arrays["encoder.0.norm2"][0, 3, 7] += np.float32(4e-6)  # 1 of 1680 elements: lost in the rms
    report = check(made, TraceSource("theirs", arrays))
    assert report.guilty.name == "encoder.0.norm2"
    assert report.guilty.own.rms_rel <= report.guilty.own_limit
    assert "single elements are far off" in verdict(report)
    assert "[0, 3, 7]" in verdict(report)


def test_misshapen_arrays_fail_and_others_are_noted():
    made, trace = job("image_classification"), Trace()
    model_of(made)(**made.inputs, trace=trace)
    arrays = dict(trace)
    del arrays["encoder.0.norm2"]
    arrays["encoder.9.norm1"] = arrays["encoder.0.norm1"]
    arrays["pooler"] = arrays["pooler"][:, :-1]
    report = check(made, TraceSource("theirs", arrays))
    status = {row.name: row.status for row in report.rows if row.status != "ok"}
    assert status == {"encoder.0.norm2": "missing", "pooler": "shape", "encoder.9.norm1": "extra"}
    assert not report.ok
    assert report.guilty.name == "pooler"
    assert "expected shape (2, 12), found (2, 11)" in next(row.note for row in report.rows if row.name == "pooler")


def test_comparing_nothing_fails():
    made = job("image_classification")
    report = check(made, model_source(made, model_of(made), "m"), only="encoder.77.*")
    assert not report.ok
    assert report.rows == []
    assert "nothing was compared" in verdict(report)
    empty = check(made, TraceSource("theirs", {}))
    assert not empty.ok
    assert {row.status for row in empty.rows} == {"missing"}


def test_nan_on_both_sides_is_its_own_verdict():
    made = job("image_classification")
    arrays = dict(made.arrays)
    arrays["beit.encoder.1.norm1.weight"] = np.full(12, np.nan, np.float32)
    broken = Job(made.config, made.task, arrays, made.inputs)
    report = check(broken, model_source(broken, model_of(broken), "m"))
    assert report.guilty.name == "encoder.1.norm1"
    assert report.guilty.status == "nan on both sides"
    assert "nothing can be said about the implementation" in verdict(report)


def test_fail_fast_stops_and_ends_all_threads():
    made = job("image_classification")
    model = model_of(made)
    model.ops.layer_norm = lambda x, norm, eps: reference.layer_norm(x, norm, 0.1)
    before = threading.active_count()
    report = check(made, model_source(made, model, "m"), fail_fast=True)
    assert report.rows[-1].name == "encoder.0.norm1"
    assert report.stopped
    assert "Stopped there" in verdict(report)
    for _ in range(100):
        if threading.active_count() == before:
            break
        threading.Event().wait(0.01)
    assert threading.active_count() == before


def test_float64_and_half_precision_traces_are_held_to_their_precision():
    made, trace = job("image_classification"), Trace()
    double = {name: array.astype(np.float64) for name, array in made.arrays.items()}
    task_class(made.task)(made.config, arrays=double, dtype="float64", backend="numpy")(**made.inputs, trace=trace)
    assert check(made, TraceSource("double", trace)).ok
    off = {name: array * (1 + 1e-9) for name, array in trace.items()}  # as good as float32, far off for float64
    assert check(made, TraceSource("double", off)).guilty.name == "embeddings.patches"
    halved = {name: array.astype(np.float16) for name, array in trace.items()}
    assert check(made, TraceSource("half", halved)).ok
    assert not check(made, TraceSource("half", {n: a.astype(np.float32) for n, a in halved.items()})).ok


def test_reports_hold_every_array():
    made = job("semantic_segmentation")
    report = check(made, model_source(made, model_of(made), "m"))
    for text in (as_json(report), markdown(report)):
        for name in made.shapes():
            assert name in text
    assert "NaN" not in as_json(report).replace('"NaN', "")


def test_bisect_finds_the_op(monkeypatch):
    pytest.importorskip("numba")
    from minibeit.ops import numba_cpu

    assert "prepare" not in fast_ops("numba")
    good = numba_cpu.layer_norm
    monkeypatch.setattr(numba_cpu, "layer_norm", lambda x, norm, eps: good(x, norm, 1e-3))
    config = tiny_config(use_relative_position_bias=True)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 12, 8), dtype=np.float32)
    made = Job(config, "model", random_weights(config, "model", 0, "float32"), {"pixel_values": pixels})
    suspects = bisect(made, "numba", "*.probs")
    assert [suspect.op for suspect in suspects if not suspect.report.ok] == ["layer_norm"]
    assert {suspect.op for suspect in suspects} == set(fast_ops("numba"))


def test_a_yardstick_that_departs_from_the_reference_is_reported_and_not_used():
    made = job("image_classification")
    wrong = model_of(made)
    wrong.ops.layer_norm = lambda x, norm, eps: reference.layer_norm(x, norm, 1e-2)
    good = check(made, model_source(made, model_of(made), "ours"), model_source(made, wrong, "theirs"))
    assert not good.ok
    assert good.guilty is None
    rows = {row.name: row for row in good.rows}
    assert rows["encoder.0.norm1"].status == "yardstick"
    assert "theirs itself departs" in verdict(good)
    both = check(made, model_source(made, wrong, "ours"), model_source(made, wrong, "theirs"))
    assert both.guilty.name == "encoder.0.norm1"  # agreeing with a wrong yardstick is no excuse


def test_a_yardstick_without_some_names_is_helped_out_by_numpy():
    made = job("image_classification")
    theirs = model_source(made, model_of(made), "theirs", leave_out="*.attention.*")
    report = check(made, model_source(made, model_of(made), "ours"), theirs)
    assert report.ok
    missing = [row.name for row in report.rows if row.own_yard.torch is None]
    assert missing == [name for name in made.shapes() if ".attention." in name]
