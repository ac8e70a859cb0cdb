"""The trace keeps what it was asked for, in order, under full names."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make, tiny_config

from minibeit import BeitForImageClassification, BeitForSemanticSegmentation, Trace
from minibeit.trace import SILENT, Scope

PIXELS = np.random.default_rng(0).standard_normal((1, 3, 12, 8))


def test_globs_choose():
    trace = Trace(["encoder.*.output", "logits"])
    trace.record("encoder.0.output", 1)
    trace.record("encoder.0.norm1", 2)
    trace.record("logits", 3)
    assert dict(trace) == {"encoder.0.output": 1, "logits": 3}
    assert list(trace) == ["encoder.0.output", "logits"]
    assert len(trace) == 2
    assert trace.wants("encoder.11.output")
    assert not trace.wants("encoder.11.norm1")
    with pytest.raises(KeyError):
        trace["encoder.0.norm1"]


def test_scope_adds_the_path_and_feeds_every_sink():
    everything, some = Trace(), Trace("a.1.*")
    scope = Scope((everything, some))
    scope.at("a").at(1).record("x", 5)
    scope.record("y", 6)
    assert dict(everything) == {"a.1.x": 5, "y": 6}
    assert dict(some) == {"a.1.x": 5}
    assert scope.at("a").wants("1.z")
    assert not Scope((some,)).wants("y")


def test_silent_keeps_nothing():
    assert SILENT.silent
    assert SILENT.at("a").silent
    assert not SILENT.wants("a")
    assert SILENT.record("a", 1) == 1


def test_a_trace_may_change_what_the_pass_goes_on_with():
    class Doubling(Trace):
        def record(self, name, array):
            return 2 * super().record(name, array)

    first, last = Doubling("a"), Trace()
    assert Scope((first, last)).record("a", 3) == 6
    assert dict(first) == {"a": 3}
    assert dict(last) == {"a": 6}


def test_a_whole_pass_is_traced_in_reading_order():
    trace = Trace()
    model = make(BeitForImageClassification, tiny_config(use_relative_position_bias=True))
    out = model(PIXELS, output_hidden_states=True, output_attentions=True, trace=trace)
    block = ["norm1", "attention.bias_table", "attention.query", "attention.key", "attention.value"]
    block += ["attention.probs", "attention.context", "attention.residual", "norm2", "mlp.hidden", "output"]
    blocks = [f"encoder.{i}.{name}" for i in range(2) for name in block]
    assert list(trace) == ["embeddings.patches", "embeddings", *blocks, "pooler", "logits"]
    assert np.array_equal(trace["logits"], out.logits)
    assert np.array_equal(trace["encoder.1.output"], out.hidden_states[2])
    assert np.array_equal(trace["encoder.1.attention.probs"], out.attentions[1])


def test_traced_and_untraced_passes_agree():
    config = tiny_config(num_hidden_layers=3, out_indices=[0, 1, 2, 3])
    model = make(BeitForSemanticSegmentation, config)
    trace = Trace("decode_head.*")
    assert np.array_equal(model(PIXELS, trace=trace).logits, model(PIXELS).logits)
    assert {name.split(".")[1] for name in trace} == {
        *("lateral_convs", "psp_pools", "psp_modules", "psp_bottleneck", "laterals", "fpn_convs", "fpn_bottleneck")
    }


def test_recorded_arrays_are_not_written_to_later():
    model = make(BeitForImageClassification, tiny_config())

    class Copying(Trace):
        def record(self, name, array):
            copies[name] = array.copy()
            return super().record(name, array)

    copies: dict[str, np.ndarray] = {}
    trace = Copying()
    model(PIXELS, trace=trace)
    assert copies
    for name, array in trace.items():
        assert np.array_equal(array, copies[name]), name
