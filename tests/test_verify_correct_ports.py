"""No false alarm: correct implementations that compute in another order, at other sizes, or record other arrays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from verify_plant import attention_with, job, model_of, op

from minibeit import Trace
from minibeit.ops import reference
from minibeit.params import LayerNorm
from minibeit.verify import budget, engine_arithmetic
from minibeit.verify.difference import distance
from minibeit.verify.float64_model import Call
from minibeit.verify.informative import informative_weights
from minibeit.verify.lockstep import Job, check, model_source
from minibeit.verify.report_text import verdict
from minibeit.verify.streams import TraceSource

KINDS = ("use_relative_position_bias", "use_shared_relative_position_bias", "use_absolute_position_embeddings")
SIZES = ((40, 24), (24, 56), (32, 32))


def sized(task: str, kind: str, size: tuple[int, int], seed: int = 0) -> Job:
    """A small model of 4x4 patches, called with an image of another size."""
    settings = {name: name == kind for name in KINDS}
    made = job(task, seed, image_size=32, patch_size=8, hidden_size=48, **settings)
    pixels = np.random.default_rng(seed).standard_normal((1, 3, *size), dtype=np.float32)
    inputs = {"pixel_values": pixels}
    if task == "masked_image_modeling":
        inputs["bool_masked_pos"] = np.random.default_rng(seed).random((1, size[0] * size[1] // 64)) < 0.4
    return Job(made.config, task, informative_weights(made.config, task, seed), inputs)


def in_order(model) -> None:
    """Plants what other engines do: sums one after the other and float32 positions."""
    for name in ("mean_patches", "resize_bilinear", "resize_bicubic"):
        setattr(model.ops, name, getattr(engine_arithmetic, name))

    def layer_norm(x, norm, eps):
        D = np.float32(x.shape[-1])
        centred = x - (np.add.accumulate(x, -1)[..., -1:] / D)
        var = np.add.accumulate(np.square(centred), -1)[..., -1:] / D
        return centred / np.sqrt(var + np.float32(eps)) * norm.weight + norm.bias

    good = model.ops.layer_norm
    model.ops.layer_norm = lambda x, norm, eps: (layer_norm if x.ndim == 2 else good)(x, norm, eps)


def port_of(made: Job):
    model = model_of(made)
    model.ops = SimpleNamespace(**vars(model.ops))
    in_order(model)
    return model


def trace_of(made: Job, model=None) -> dict[str, np.ndarray]:
    trace = Trace()
    (model or model_of(made))(**made.inputs, trace=trace)
    return dict(trace)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["image_classification", "semantic_segmentation"])
def test_engines_that_place_sources_in_float32_are_right(task, kind):
    for size in SIZES if task == "image_classification" else SIZES[:1]:
        made = sized(task, kind, size)
        report = check(made, model_source(made, port_of(made), "a port"))
        assert report.ok, verdict(report)
        assert report.guilty is None


def test_float32_positions_are_far_from_float64_ones_but_no_mistake():
    """Why the yardstick needs them: at some sizes they cost a dozen times as much as all other rounding."""
    maps = np.random.default_rng(0).standard_normal((1, 12, 27, 27))
    for resize in ("resize_bilinear", "resize_bicubic"):
        exact = getattr(reference, resize)(maps, (63, 47))
        plain = getattr(reference, resize)(maps.astype(np.float32), (63, 47))
        placed = getattr(engine_arithmetic, resize)(maps.astype(np.float32), (63, 47))
        assert distance(plain, exact)[0] < 1e-7
        assert 5e-7 < distance(placed, exact)[0] < 1e-5


@pytest.mark.live
def test_our_resizing_loses_what_pytorchs_does():
    torch = pytest.importorskip("torch")
    maps = np.random.default_rng(0).standard_normal((1, 12, 27, 27))
    for mode in ("bilinear", "bicubic"):
        exact = getattr(reference, f"resize_{mode}")(maps, (63, 47))
        single = maps.astype(np.float32)
        theirs = torch.nn.functional.interpolate(torch.from_numpy(single), (63, 47), mode=mode).numpy()
        ours = getattr(engine_arithmetic, f"resize_{mode}")(single, (63, 47))
        assert 0.5 < distance(ours, exact)[0] / distance(theirs, exact)[0] < 2


def pooled(rng):
    """(the results of two correct float32 poolers, the exact one, its calls) for 1025 tokens, two channels large."""
    D, N = 192, 1025
    x = rng.standard_normal((1, N, D), dtype=np.float32) + 3 * rng.standard_normal(D, dtype=np.float32)
    x[..., rng.integers(0, D, 2)] *= 30
    norm = LayerNorm(*(a.astype(np.float32) for a in (1 + 0.2 * rng.standard_normal(D), rng.standard_normal(D))))
    wide = LayerNorm(norm.weight.astype(np.float64), norm.bias.astype(np.float64))
    mean = reference.mean_patches(x.astype(np.float64))
    exact = reference.layer_norm(mean, wide, 1e-12)
    naive, ours = (
        reference.layer_norm(pool(x), norm, 1e-12) for pool in (engine_arithmetic.mean_patches, reference.mean_patches)
    )
    return (
        naive,
        ours,
        exact,
        [
            Call("mean_patches", (x,), {}, mean),
            Call("layer_norm", (mean, norm, 1e-12), {}, exact),
        ],
    )


def test_a_pooler_that_adds_in_float32_is_right():
    rng, alarms_without_draws = np.random.default_rng(0), 0
    for _ in range(6):
        naive, ours, exact, calls = pooled(rng)
        yards = [distance(drawn, exact) for drawn in engine_arithmetic.draws(calls)]
        assert len(yards) == engine_arithmetic.DRAWS
        yard = budget.Yardstick((max(rms for rms, _ in yards), max(peak for _, peak in yards)))
        error = distance(naive, exact)[0]
        assert error <= budget.own_limit(yard, exact.size, "float32")
        alarms_without_draws += error > budget.own_limit(budget.Yardstick(distance(ours, exact)), exact.size, "float32")
    assert alarms_without_draws > 0


def test_draws_are_for_results_of_few_rows_only():
    rng = np.random.default_rng(0)
    norm = LayerNorm(np.ones(8, np.float32), np.zeros(8, np.float32))
    many = rng.standard_normal((20, 8))
    assert list(engine_arithmetic.draws([Call("layer_norm", (many, norm, 1e-6), {}, many)])) == []
    assert list(engine_arithmetic.draws([])) == []


# Other arrays -------------------------------------------------------------------------------------------------------


def test_missing_and_extra_arrays_are_notes():
    made = sized("image_classification", KINDS[0], SIZES[0])
    arrays = {name: a for name, a in trace_of(made, port_of(made)).items() if not name.endswith("bias_table")}
    arrays["my.own.array"] = np.zeros(3, np.float32)
    report = check(made, TraceSource("theirs", arrays))
    assert report.ok, verdict(report)
    assert "Note: 3 arrays are not in it: encoder.*.attention.bias_table." in verdict(report)
    assert "Note: 1 arrays of it are none of this model's: my.own.array." in verdict(report)


def test_without_the_bias_table_its_faults_show_in_the_attention():
    made = sized("image_classification", KINDS[0], SIZES[0])
    model = port_of(made)
    op("attention", attention_with(no_bias=True))(model)
    arrays = {name: a for name, a in trace_of(made, model).items() if not name.endswith("bias_table")}
    report = check(made, TraceSource("theirs", arrays))
    assert report.guilty.name == "encoder.0.attention.probs"
    assert report.guilty.note == "the position bias is missing"


def test_a_trace_of_few_arrays_is_judged_from_one_to_the_next():
    made = job("image_classification")
    arrays = trace_of(made)
    few = {name: arrays[name] for name in ("embeddings", "encoder.1.output")}
    report = check(made, TraceSource("theirs", few))
    assert report.ok
    assert "Nothing after encoder.1.output was looked at." in verdict(report)
    few["encoder.1.output"] = few["encoder.1.output"] * np.float32(1.001)
    report = check(made, TraceSource("theirs", few))
    assert report.guilty.name == "encoder.1.output"
    assert "or one of those between embeddings and it" in verdict(report)


@pytest.mark.live
@pytest.mark.parametrize("task", ["image_classification", "semantic_segmentation", "masked_image_modeling"])
def test_pytorchs_own_trace_is_right_at_every_size(task):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from minibeit.verify.torch_runner import torch_source

    for kind in KINDS:
        for seed, size in enumerate(SIZES):
            made = sized(task, kind, size, seed)
            alone = check(made, torch_source(made))
            assert alone.ok, verdict(alone)
            beside = check(made, model_source(made, model_of(made), "ours"), torch_source(made))
            assert beside.ok, verdict(beside)
