"""No fault, no alarm: random models of every task, and how near to the budget they come."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_weights
from random_configs import draw
from verify_plant import job, model_of

from minibeit import BeitConfig
from minibeit.tasks import task_class
from minibeit.verify import budget, lockstep
from minibeit.verify.lockstep import Job, check, model_source

# The largest ratios to the yardstick that 300 random models showed: own 2.5 (numba beside NumPy, patch embedding),
# total 3.2, peak 4.3; of Winograd convolutions 5.5, 3.0 and 10.1.  Factors: 4, 6 and 8, with 3 times more for those.
SEEDS_QUICK, SEEDS_ALL = range(20), range(100)


def drawn_job(seed: int) -> Job:
    """The random model and call of a seed."""
    d = draw(seed)
    config = BeitConfig.from_dict(dict(d.settings), model_type=d.model_type, **d.changes)
    inputs = {name: array for name, array in d.arrays.items() if name != "labels"}
    return Job(config, d.task, random_weights(config, d.task, seed, "float32"), inputs)


def report_of(seed: int, backend: str, torch: bool = False):
    job = drawn_job(seed)
    model = task_class(job.task)(job.config, arrays=job.arrays, backend=backend)
    yardstick = None
    if torch:
        from minibeit.verify.torch_runner import torch_source

        yardstick = torch_source(job)
    return check(job, model_source(job, model, backend), yardstick)


def complaints(report) -> list[str]:
    return [
        f"{row.name}: {row.status} {row.own_ratio:.1f} {row.total_ratio:.1f} {row.note}"
        for row in report.rows
        if not row.ok
    ]


@pytest.mark.parametrize("seed", SEEDS_QUICK)
def test_no_alarm(seed):
    report = report_of(seed, "numpy")
    assert report.ok, complaints(report)
    assert report.guilty is None


def test_no_alarm_where_one_number_cancels():
    """The logit of a single class is a small sum of large terms, which NumPy happens to meet."""
    logits = report_of(10951, "numpy").rows[-1]
    assert logits.shape == (1, 1)
    assert logits.total_yard.rms >= logits.own_yard.rms  # which is the largest of several orders


def test_no_alarm_where_one_number_enlarges_what_it_inherits(monkeypatch):
    """Not even where NumPy's error happens to cancel as well, and no other order of its sums says so."""
    monkeypatch.setattr(lockstep, "ORDERS", 0)
    report = report_of(12509, "numba")
    assert report.rows[-1].total.rms_rel > report.rows[-1].total_limit
    assert report.ok, complaints(report)
    arrays = dict(drawn_job(12509).arrays)
    arrays["classifier.bias"] = arrays["classifier.bias"] + np.float32(1e-5)
    job = drawn_job(12509)
    model = task_class(job.task)(job.config, arrays=arrays, backend="numba")
    assert check(job, model_source(job, model, "another bias")).guilty.name == "logits"


def test_no_alarm_where_one_order_of_all_sums_is_a_lucky_one(monkeypatch):
    from study_verify import correct_run

    assert correct_run("small", 35801).ok
    monkeypatch.setattr(lockstep, "ORDERS", 0)
    assert complaints(correct_run("small", 35801))[0].startswith("encoder.4.attention.probs")


def test_no_alarm_where_all_patches_are_masked():
    """Then the rows of a norm are two: CLS and the mask token."""
    from study_verify import correct_run

    report = correct_run("small", 37634)
    row = next(row for row in report.rows if row.name == "encoder.0.norm1")
    assert row.own.rms_rel > 4 * budget.FLOOR * budget.EPS32
    assert report.ok, complaints(report)


def test_no_alarm_where_a_few_large_probabilities_are_one_draw():
    from study_verify import correct_run

    report = correct_run("small", 12772)  # scores scaled after the product, softmax in float32
    row = next(row for row in report.rows if row.name == "encoder.1.attention.probs")
    assert row.own.rms_rel > 4 * budget.FLOOR * budget.EPS32
    assert report.ok, complaints(report)


def test_no_alarm_where_a_map_of_one_pixel_is_enlarged():
    """72 elements, but eight different ones: NumPy's error there is one draw, and a lucky one."""
    report = report_of(10559, "numba")
    row = next(row for row in report.rows if row.name == "decode_head.psp_modules.0")
    assert row.shape == (1, 8, 3, 3)
    assert report.ok, complaints(report)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_no_alarm_on_a_hundred_models(backend):
    tasks = set()
    for seed in SEEDS_ALL:
        report = report_of(seed, backend)
        tasks.add(report.task)
        assert report.ok, (seed, complaints(report))
    assert len(tasks) == 5


@pytest.mark.live
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_no_alarm_beside_pytorch(backend):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for seed in SEEDS_ALL:
        report = report_of(seed, backend, torch=True)
        assert report.ok, (seed, complaints(report))
        compared = [row for row in report.rows if row.own is not None]
        assert all(row.own_yard.torch is not None for row in compared), "PyTorch did not give every array"


def test_every_array_of_a_quick_seed_was_compared():
    report = report_of(0, "numpy")
    job = drawn_job(0)
    assert [row.name for row in report.rows] == list(job.shapes())
    assert all(row.own is not None and np.isfinite(row.own.rms_rel) for row in report.rows)


def test_limits_follow_the_yardstick_and_the_precision():
    good, bad = budget.Yardstick((1e-7, 1e-6)), budget.Yardstick((1e-7, 1e-6), torch=(3e-7, 2e-6))
    assert budget.own_limit(good, 1000, "float32") == pytest.approx(4e-7)
    assert budget.own_limit(bad, 1000, "float32") == pytest.approx(12e-7)
    assert budget.own_limit(good, 1000, "float16") == pytest.approx(4e-7 * 2**13)
    assert budget.own_limit(budget.Yardstick((0.0, 0.0)), 1000, "float32") == pytest.approx(2 * budget.EPS32)
    assert budget.own_limit(budget.Yardstick((0.0, 0.0)), 3, "float32") == pytest.approx(4 * budget.EPS32)
    assert budget.own_limit(good, 1000, "float32", leeway=3.0) == pytest.approx(12e-7)


def test_a_yardstick_that_computes_something_else_is_not_believed():
    wrong = budget.Yardstick((1e-7, 1e-6), torch=(1e-3, 1e-2))
    assert wrong.suspicious
    assert budget.own_limit(wrong, 1000, "float32") == pytest.approx(4e-7)
    nan = budget.Yardstick((1e-7, 1e-6), torch=(float("nan"), float("nan")))
    assert nan.suspicious


@pytest.mark.live
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_no_alarm_beside_timm(mean_pooling):
    pytest.importorskip("torch")
    pytest.importorskip("timm")
    from minibeit.verify.timm_runner import timm_source

    settings = dict(use_relative_position_bias=True, use_mean_pooling=mean_pooling, intermediate_size=24)
    for more in ({}, {"use_absolute_position_embeddings": True}, {"use_shared_relative_position_bias": True}):
        made = job("image_classification", **settings, **more)
        report = check(made, model_source(made, model_of(made), "numpy"), timm_source(made))
        assert report.ok, complaints(report)
        assert all(row.own_yard.torch is not None for row in report.rows)
    with pytest.raises(ValueError, match="own size"):
        timm_source(Job(made.config, made.task, made.arrays, {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}))
