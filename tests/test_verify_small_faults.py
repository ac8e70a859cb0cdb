"""Faults that are small, local or newly known, and the sentences about them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_verify_correct_ports import port_of, trace_of
from verify_plant import Fault, attention_with, f16, job, model_of, op, report_of, weights

from minibeit.ops import reference
from minibeit.params import table_rows
from minibeit.verify.informative import informative_weights
from minibeit.verify.known_mistakes import half
from minibeit.verify.lockstep import Job, check, model_source
from minibeit.verify.low_precision import int8
from minibeit.verify.report_text import as_json, verdict
from minibeit.verify.slices import worst_slice
from minibeit.verify.streams import TraceSource

MLP, CONTEXT, PROBS = "encoder.1.mlp.hidden", "encoder.0.attention.context", "encoder.0.attention.probs"
SQUARE = dict(image_size=32, patch_size=8)


# Slices ---------------------------------------------------------------------------------------------------------------


def wide_job(outlier: float = 1.0) -> Job:
    """A model of 96 features whose weights matter; one feature of its residual stream is `outlier` times as large."""
    made = job("image_classification", batch=2, hidden_size=96, intermediate_size=192, num_hidden_layers=2, **SQUARE)
    arrays = informative_weights(made.config, made.task)
    arrays["beit.encoder.0.fc2.weight"][5] *= outlier
    return Job(made.config, made.task, arrays, made.inputs)


def found_in(made: Job, plant) -> tuple:
    model = model_of(made)
    model.ops = SimpleNamespace(**vars(model.ops))
    report = check(made, model_source(made, plant(model) or model, "theirs"))
    return report, report.guilty


def one_bit(weight: np.ndarray, bit: int = 13) -> np.ndarray:
    bits = weight.reshape(-1).view(np.uint32)
    bits[7] ^= np.uint32(1 << bit)  # of the mantissa's 23, the tenth from above
    return bits.view(np.float32).reshape(weight.shape)


@pytest.mark.parametrize("name", ["fc1", "fc2", "attention__value"])
def test_one_wrong_bit_of_one_weight(name):
    report, guilty = found_in(wide_job(), weights(**{f"beit__encoder__1__{name}__weight": one_bit}))
    places = {"fc1": MLP, "fc2": "encoder.1.output", "attention__value": "encoder.1.attention.value"}
    assert guilty is not None and guilty.name == places[name]
    if guilty.slice is not None:  # else the single elements are far enough off
        assert guilty.slice.index in (0, 7) and "in one slice, the worst" in verdict(report)
        assert guilty.note.startswith("only feature 0 is off") or guilty.note.startswith("only token")


def test_half_precision_beneath_a_feature_a_thousand_times_as_large():
    made = wide_job(3000.0)

    def plant(model):
        def residual(x, layer, scale, rest, keep=None):
            return reference.linear_residual(f16(x), layer, scale, rest)

        op("linear_residual", residual, 1)(model)

    report, guilty = found_in(made, plant)
    assert guilty is not None and guilty.name == "encoder.0.output"
    assert guilty.own.rms_rel <= guilty.own_limit or "float16" in guilty.note
    assert "the input is rounded to float16" in guilty.note
    report, guilty = found_in(made, lambda model: None)
    assert report.ok, verdict(report)


def test_correct_engines_pass_with_a_large_feature():
    made = wide_job(3000.0)
    assert check(made, TraceSource("theirs", trace_of(made, port_of(made)))).ok


def test_the_worst_slice_by_hand():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((2, 40, 50)) * np.where(np.arange(50) == 40, 1000, 1)
    noise = 1e-7 * rng.standard_normal(exact.shape) * np.abs(exact).mean((0, 1))
    single, found = exact + noise, exact + noise[:, ::-1]
    assert worst_slice(found, single, exact).ratio < 3
    found[:, :, 3] += 50 * noise[:, :, 3].std()
    worst = worst_slice(found, single, exact)
    assert (worst.axis, worst.index) == (2, 3) and 40 < worst.ratio < 60
    assert worst_slice(found, single, exact, activated=True).ratio < 2  # beside the mean of all
    alike = np.repeat(exact[:, :1], 40, 1)  # every token: the error of a feature is one draw
    draws = 1e-7 * rng.standard_normal((2, 1, 1, 50))
    assert worst_slice(alike + draws[0], alike + draws[1], alike).ratio < 6
    assert worst_slice(np.ones(9), np.ones(9), np.ones(9)) is None  # each of nine is too few
    assert worst_slice(exact[:, :5, :3], single[:, :5, :3], exact[:, :5, :3]) is None


# Newly known mistakes -------------------------------------------------------------------------------------------------


def scores_of(q, k, bias):
    scores = q @ k.swapaxes(2, 3) * np.float32(q.shape[-1] ** -0.5)
    return scores if bias is None else scores + bias.table.T[:, reference.relative_position_index(bias.grid)]


def attention_by(change_scores=lambda s: s, axis=-1):
    def faulty(q, k, v, bias, return_probs=False, keep=None):
        scores = change_scores(scores_of(q, k, bias))
        e = np.exp(scores - scores.max(axis, keepdims=True))
        probs = (e / e.sum(axis, keepdims=True)).astype(np.float32)
        context = (probs @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)
        return (context, probs) if return_probs else context

    return op("attention", faulty)


def scaled_scores(factor, of_bias):
    def faulty(q, k, v, bias, return_probs=False, keep=None):
        table = bias.table * np.float32(of_bias)
        index = reference.relative_position_index(bias.grid)
        return reference.attend(q * np.float32(factor), k, v, table, index, return_probs)

    return op("attention", faulty)


@pytest.mark.parametrize(
    ("factor", "of_bias", "says"),
    [
        (1.5, 1.0, "the scores are multiplied by 1.5"),
        (1.0, 0.7, "the position bias is multiplied by 0.7"),
        (0.8, 3.0, "the scores are multiplied by 0.8 and the position bias is multiplied by 3"),
        (2.0, 1.0, "the scores are not divided by sqrt(d)"),
    ],
)
def test_fitted_factors_of_scores_and_bias(factor, of_bias, says):
    report = report_of(Fault("scaled", PROBS, scaled_scores(factor, of_bias)))
    assert report.guilty.name == PROBS
    assert report.guilty.note == says


def hiding(allowed):
    return attention_by(lambda s: np.where(allowed(s.shape[-1]), s, -np.inf))


def signs(down: int, right: int):
    def faulty(q, k, v, bias, *args, **kwargs):
        gh, gw = bias.grid
        row, column = np.divmod(np.arange(gh * gw), gw)
        index = reference.relative_position_index(bias.grid)
        rows = down * (row[:, None] - row) + gh - 1
        index[1:, 1:] = rows * (2 * gw - 1) + right * (column[:, None] - column) + gw - 1
        assert index.max() < table_rows(bias.grid)
        return reference.attend(q, k, v, bias.table, index, *args, **kwargs)

    return op("attention", faulty)


def padded(mode: str):
    def faulty(x, layer):
        r = layer.conv.weight.shape[2] // 2
        wide = np.pad(x, ((0, 0), (0, 0), (r, r), (r, r)), mode)
        y = reference.conv_bn_relu(wide, layer)
        return y[:, :, r:-r, r:-r] if r else y

    return op("conv_bn_relu", faulty)


def from_another_block(model):
    arrays = dict(model.arrays)
    for part in ("weight", "bias"):
        arrays[f"beit.encoder.1.fc1.{part}"] = arrays[f"beit.encoder.2.fc1.{part}"]
    return type(model)(model.config, arrays=arrays, backend="numpy")


def dropped(model):
    rng = np.random.default_rng(0)

    def faulty(x, layer, scale, residual, keep=None):
        keep = (rng.random((*x.shape[:2], layer.weight.shape[0])) > 0.1).astype(np.float32) / np.float32(0.9)
        return reference.linear_residual(x, layer, scale, residual, keep)

    op("linear_residual", faulty, 1)(model)


def stale(model):
    """The norm of block 2 reads the output of block 0."""
    kept = []
    good_residual, good_norm = model.ops.linear_residual, model.ops.layer_norm

    def residual(*args, **kwargs):
        kept.append(good_residual(*args, **kwargs))
        return kept[-1]

    def norm(x, p, eps):
        return good_norm(kept[1] if len(kept) == 4 and x is kept[3] else x, p, eps)

    model.ops.linear_residual, model.ops.layer_norm = residual, norm


def eight_bits(x: np.ndarray) -> np.ndarray:
    return int8(x, 0).astype(np.float32)


NEW = [
    Fault("vertical offsets", PROBS, signs(-1, 1), "vertical offsets of the position bias have the wrong sign"),
    Fault("horizontal offsets", PROBS, signs(1, -1), "horizontal offsets of the position bias have the wrong sign"),
    Fault("all offsets", PROBS, signs(-1, -1), "all offsets of the position bias have the wrong sign"),
    Fault("softmax over queries", PROBS, attention_by(axis=-2), "over the queries"),
    Fault("softmax over heads", PROBS, attention_by(axis=1), "over the heads"),
    Fault("causal mask", PROBS, hiding(lambda N: np.tri(N, dtype=bool)), "a causal mask"),
    Fault("CLS masked as a key", PROBS, hiding(lambda N: np.arange(N) > 0), "the CLS token is masked"),
    Fault("last key masked", PROBS, hiding(lambda N: np.arange(N) < N - 1), "the last patch is masked"),
    Fault("another block's weights", MLP, from_another_block, "the parameters are those of block 2"),
    Fault("an earlier state", "encoder.2.norm1", stale, "the norm is that of encoder.0.output, another hidden state"),
    Fault(
        "8-bit weights", MLP, weights(beit__encoder__1__fc1__weight=eight_bits), "rounded to 8 bits, a scale for each"
    ),
    Fault(
        "8-bit input",
        "encoder.0.output",
        op("linear_residual", lambda x, *args: reference.linear_residual(int8(x), *args), 1),
        "the input is rounded to 8 bits, one scale for all",
    ),
    Fault("dropout left on", "encoder.0.output", dropped, "dropout is on"),
    Fault(
        "softmaxed logits",
        "logits",
        op("linear", lambda x, p: reference.softmax(reference.linear(x, p)) if x.ndim == 2 else reference.linear(x, p)),
        "went through a softmax",
    ),
    *(
        Fault(f"{mode} padding", "decode_head.fpn_convs.0", padded(mode), says, "semantic_segmentation")
        for mode, says in (("reflect", "borders are mirrored"), ("edge", "are repeated"), ("wrap", "on the other side"))
    ),
]


@pytest.mark.parametrize("fault", NEW, ids=lambda fault: fault.name)
def test_a_new_mistake_is_named(fault):
    guilty = report_of(fault).guilty
    assert guilty is not None and guilty.name == fault.guilty, guilty
    assert fault.says in guilty.note and "nearest" not in guilty.note


def test_exchanged_samples_and_single_samples_are_named():
    made = job("image_classification")
    model = model_of(made)
    swapped = model(made.inputs["pixel_values"][::-1].copy()).logits
    arrays = trace_of(made)
    arrays["logits"] = swapped
    guilty = check(made, TraceSource("theirs", arrays)).guilty
    assert guilty.name == "logits" and "the samples of the batch are exchanged: 0 is 1, 1 is 0" in guilty.note
    arrays["logits"] = trace_of(made)["logits"] * np.float32([[1], [1.01]])
    guilty = check(made, TraceSource("theirs", arrays)).guilty
    assert "confined to sample 1" in guilty.note


# Sentences ------------------------------------------------------------------------------------------------------------


def test_two_mistakes_at_once_are_the_nearest_one_and_what_it_leaves():
    def plant(model):
        def faulty(x, layer):
            y = reference.linear(x, layer)
            return y - layer.bias + np.float32(0.1) * x[..., : y.shape[-1]].mean() if x.ndim == 3 else y

        op("linear", faulty)(model)

    guilty = report_of(Fault("two", "embeddings.patches", plant)).guilty
    assert guilty.note.startswith("nearest known mistake: the bias is missing, which leaves ")
    assert guilty.note.endswith("% of the error")


def test_nothing_is_guessed_from_the_size_of_an_error():
    rng = np.random.default_rng(0)

    def plant(model):
        op("layer_norm", lambda *args: reference.layer_norm(*args) * (1 + 2e-3 * rng.standard_normal(12)), 2)(model)

    guilty = report_of(Fault("noise", "encoder.1.norm1", plant)).guilty
    assert guilty.name == "encoder.1.norm1"
    assert "float16" not in guilty.note and "TF32" not in guilty.note and "usual causes" in guilty.note


def test_the_context_is_not_guilty_of_what_its_probabilities_are():
    rows = {row.name: row for row in report_of(Fault("axis", PROBS, attention_by(axis=-2))).rows}
    assert rows[PROBS].status == "own" and rows[CONTEXT].status == "total"
    assert rows[CONTEXT].note == "it is what the probabilities before it give"


def test_with_only_some_arrays_judged_the_verdict_says_between_which_the_fault_lies():
    made = job("image_classification")
    model = model_of(made)
    model.ops = SimpleNamespace(**vars(model.ops))
    op("layer_norm", lambda x, norm, eps: reference.layer_norm(x, norm, 1e-3), 2)(model)
    report = check(made, model_source(made, model, "theirs"), only="encoder.*.output")
    assert (
        "the fault lies between encoder.0.output and it, in arrays that --only encoder.*.output leaves out"
        in verdict(report)
    )
    assert not report.ok


def test_one_array_of_each_kind_has_a_note():
    report = report_of(Fault("scale", PROBS, op("attention", attention_with(factor=2.0))))
    notes = [row.note for row in report.rows if row.status == "own"]
    assert len(notes) == 3 and notes[0] and not any(notes[1:])


def test_json_names_the_guilty_arrays_and_their_limits():
    fault = NEW[8]
    values = json.loads(as_json(report_of(fault)))
    assert values["guilty"][0] == fault.guilty and not values["ok"]
    row = next(row for row in values["rows"] if row["name"] == fault.guilty)
    assert row["own"]["rms_rel"] > row["own_limit"] > 0 and row["total_limit"] > 0
    assert half(np.float32([1 + 2**-9]), "bfloat16") == 1  # rounds halves to even
