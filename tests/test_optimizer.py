"""AdamW, its groups, clipping, averaging and schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import distance, make, tiny_config

from minibeit import BeitForImageClassification, BeitForMaskedImageModeling, BeitForSemanticSegmentation
from minibeit.noise import Noise
from minibeit.params import flatten
from minibeit.train.gradients import value_and_grad
from minibeit.train.optimizer import (
    AdamW,
    AverageOfWeights,
    EarlyStep,
    clipped,
    decayed,
    global_norm,
    layer_number,
    set_running,
)
from minibeit.train.schedule import Cosine, Polynomial

PIXELS = np.random.default_rng(0).standard_normal((4, 3, 12, 8))
LABELS = np.array([0, 2, 1, 1])


def classifier(dtype="float64", **changes):
    return make(BeitForImageClassification, tiny_config(use_relative_position_bias=True, **changes), dtype=dtype)


def test_one_step_by_hand():
    """The first step of Adam moves every weight by rate times the sign of its gradient, after the decay."""
    model = classifier()
    before = {name: array.copy() for name, array in flatten(model.params).items()}
    _, grads = value_and_grad(model, PIXELS, labels=LABELS)
    optimizer = AdamW(model, weight_decay=0.1, eps=1e-300)
    optimizer.step(grads, 1e-2)
    decays = 0
    for name, gradient in flatten(grads).items():
        decay = 0.1 if decayed(name, gradient.shape) else 0.0
        decays += decay > 0
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * np.sign(gradient)
        assert distance(flatten(model.params)[name], expected) < 1e-12, name
    assert 0 < decays < len(before)


def test_ten_steps_of_one_weight():
    """Beside the formula on Python's floats, with gradients of changing size and sign."""
    model, (b1, b2), eps, decay = classifier(), (0.8, 0.95), 1e-3, 0.3
    optimizer = AdamW(model, betas=(b1, b2), eps=eps, weight_decay=decay)
    _, grads = value_and_grad(model, PIXELS, labels=LABELS)
    name, rng = "classifier.weight", np.random.default_rng(0)
    w, m, v = float(flatten(model.params)[name][1, 2]), 0.0, 0.0
    for t in range(1, 11):
        g, rate = rng.standard_normal() * 0.1**t, 0.1 / t
        grads.classifier.weight[1, 2] = g
        optimizer.step(grads, rate)
        w *= 1 - rate * decay
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        w -= rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    assert flatten(model.params)[name][1, 2] == pytest.approx(w, rel=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_are_one_vector(dtype):
    model = classifier(dtype)
    before = {name: array.copy() for name, array in flatten(model.params).items()}
    optimizer = AdamW(model)
    assert optimizer.weights.dtype == dtype
    named = flatten(model.params)
    assert all(np.array_equal(named[name], array) for name, array in before.items())
    assert all(np.shares_memory(array, optimizer.weights) for array in named.values())
    assert optimizer.weights.size == model.num_parameters()
    assert all(np.shares_memory(array, named[name]) for name, array in model.arrays.items())


def test_the_callers_arrays_are_not_changed():
    arrays = {name: array.copy() for name, array in classifier().arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False  # as those of a mapped file
    model = BeitForImageClassification(classifier().config, arrays=arrays, dtype="float64")
    optimizer = AdamW(model)
    optimizer.step(value_and_grad(model, PIXELS, labels=LABELS).grads, 1e-2)
    assert not np.array_equal(model.arrays["classifier.weight"], arrays["classifier.weight"])


def test_what_is_learned_is_what_is_saved(tmp_path):
    model = classifier("float32")
    AdamW(model).step(value_and_grad(model, PIXELS, labels=LABELS).grads, 1e-2)
    model.save_pretrained(tmp_path)
    again = BeitForImageClassification.from_pretrained(tmp_path)
    assert np.array_equal(again(PIXELS).logits, model(PIXELS).logits)


def test_training_fits_a_batch():
    model = classifier(hidden_dropout_prob=0.1, drop_path_rate=0.1)
    optimizer, schedule = AdamW(model), Cosine(1e-2, 60, warmup=5)
    first = value_and_grad(model, PIXELS, labels=LABELS).loss
    for step in range(60):
        result = value_and_grad(model, PIXELS, labels=LABELS, rng=Noise(0, step))
        optimizer.step(clipped(result.grads, 1.0)[0], schedule(step))
    assert value_and_grad(model, PIXELS, labels=LABELS).loss < 0.1 * first
    assert model(PIXELS).logits.argmax(1).tolist() == LABELS.tolist()


def test_without_a_gradient_nothing_moves():
    """Neither by decay nor by momentum, and the parameter's own count of steps stays: as PyTorch does."""
    model = make(BeitForMaskedImageModeling, tiny_config(use_mask_token=True), dtype="float64")
    optimizer, token = AdamW(model), model.params.beit.embeddings.mask_token.copy()
    target = np.zeros((4, 6, model.config.vocab_size))
    _, grads = value_and_grad(model, PIXELS, loss=lambda ops, out: ops.mse_loss(out.logits, target))
    optimizer.step(grads, 1.0)
    assert np.array_equal(model.params.beit.embeddings.mask_token, token)
    assert dict(zip((slot.name for slot in optimizer.slots), optimizer.steps))["beit.embeddings.mask_token"] == 0


def test_frozen_parameters_stay():
    model = classifier()
    before = flatten(model.params)["beit.encoder.0.fc1.weight"].copy()
    optimizer = AdamW(model, frozen="beit.encoder.0.*")
    optimizer.step(value_and_grad(model, PIXELS, labels=LABELS).grads, 1e-1)
    assert np.array_equal(model.params.beit.encoder[0].fc1.weight, before)
    assert not any(slot.name.startswith("beit.encoder.0.") for slot in optimizer.slots)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_an_early_step_is_the_same_step_and_keeps_no_gradient(backend, recompute):
    """Bit for bit, with a table that all blocks share and matrices that the backward still multiplies by."""
    config = tiny_config(use_mask_token=True, use_shared_relative_position_bias=True)
    mask = np.random.default_rng(1).random((4, 6)) < 0.5
    inputs = dict(bool_masked_pos=mask, labels=np.arange(mask.sum()) % config.vocab_size, recompute=recompute)
    early, late = (make(BeitForMaskedImageModeling, config, backend=backend) for _ in range(2))
    optimizers = [AdamW(model, layer_decay=0.7) for model in (early, late)]
    for _ in range(3):
        step = EarlyStep(optimizers[0], 1e-2)
        kept = value_and_grad(early, PIXELS, ready=step, **inputs).grads
        grads = value_and_grad(late, PIXELS, **inputs).grads
        optimizers[1].step(grads, 1e-2)
        assert flatten(kept) == {} and step.norm == pytest.approx(global_norm(grads), rel=1e-12)
        assert np.array_equal(optimizers[0].weights, optimizers[1].weights)
    assert np.array_equal(optimizers[0].steps, optimizers[1].steps) and optimizers[0].steps.min() == 3


def test_an_early_step_ends_at_a_gradient_that_is_not_finite():
    model = classifier()
    optimizer = AdamW(model)
    step, before = EarlyStep(optimizer, 1e-2), optimizer.weights.copy()
    first, second, third = (slot.name for slot in optimizer.slots[:3])
    params = flatten(model.params)
    good, bad = np.ones_like(params[first]), np.full_like(params[second], np.inf)
    assert step(first, good) is None and step(second, bad) is bad
    rest = np.ones_like(params[third])
    assert step(third, rest) is rest and not math.isfinite(step.norm)
    changed = optimizer.weights != before
    stop = optimizer.slots[0].stop
    assert changed[:stop].all() and not changed[stop:].any() and optimizer.steps[:3].tolist() == [1, 0, 0]


def test_groups_are_those_of_the_original():
    L = 12
    numbers = {
        "beit.embeddings.cls_token": 0,
        "beit.embeddings.patch.weight": 0,
        "beit.encoder.0.norm1.weight": 1,
        "beit.encoder.11.fc2.bias": 12,
        "beit.shared_bias_table": 13,
        "beit.pooler.weight": 13,
        "classifier.weight": 13,
        "decode_head.classifier.weight": 13,
    }
    assert {name: layer_number(name, L) for name in numbers} == numbers
    yes = {"beit.embeddings.mask_token": (1, 1, 8), "beit.shared_bias_table": (9, 2), "classifier.weight": (3, 8)}
    no = {
        "beit.embeddings.cls_token": (1, 1, 8),
        "beit.embeddings.position_embeddings": (1, 5, 8),
        "beit.encoder.0.lambda_1": (8,),
        "beit.encoder.0.norm1.weight": (8,),
        "classifier.bias": (3,),
    }
    assert all(decayed(name, shape) for name, shape in yes.items())
    assert not any(decayed(name, shape) for name, shape in no.items())
    assert not decayed("beit.encoder.3.bias_table", (9, 2), tables=False)
    assert decayed("beit.embeddings.cls_token", (1, 1, 8), tokens=True)
    rates = {slot.name: slot.rate for slot in AdamW(classifier(), layer_decay=0.5).slots}
    assert rates["beit.embeddings.cls_token"] == 0.125
    assert rates["beit.encoder.1.fc1.weight"] == 0.5
    assert rates["classifier.weight"] == 1


def test_clipping():
    _, grads = value_and_grad(classifier(), PIXELS, labels=LABELS)
    norm = global_norm(grads)
    assert abs(norm - np.linalg.norm(np.concatenate([g.ravel() for g in flatten(grads).values()]))) < 1e-12 * norm
    small, found = clipped(grads, norm / 10)
    assert found == norm
    assert abs(global_norm(small) - norm / 10) < 1e-5 * norm
    same, _ = clipped(grads, 2 * norm)
    assert same is grads


def test_average_of_weights():
    model = classifier()
    optimizer = AdamW(model)
    average = AverageOfWeights(optimizer, 0.75)
    start = optimizer.weights.copy()
    optimizer.weights += 1
    average.update()
    with average.in_use():
        assert distance(optimizer.weights, start + 0.25) < 1e-14
        inside = model(PIXELS).logits
    assert np.array_equal(optimizer.weights, start + 1)
    assert not np.array_equal(inside, model(PIXELS).logits)


def test_running_statistics_are_taken_over():
    config = tiny_config(num_hidden_layers=4, out_indices=[0, 1, 2, 3])
    arrays = make(BeitForSemanticSegmentation, config, dtype="float64").arrays
    for array in arrays.values():
        array.flags.writeable = False
    model = BeitForSemanticSegmentation(config, arrays=arrays, dtype="float64")
    optimizer = AdamW(model)
    labels = np.random.default_rng(1).integers(0, 3, (4, 9, 7))
    result = value_and_grad(model, PIXELS, labels=labels, batch_statistics=True)
    set_running(model, result.running)
    optimizer.step(result.grads, 1e-3)
    assert result.running
    assert all(np.array_equal(model.arrays[name], array) for name, array in result.running.items())


# Schedules ------------------------------------------------------------------------------------------------------------


def test_cosine_is_the_original_schedule():
    base, floor, total, warmup = 1.5e-3, 1e-5, 50, 7
    ramp = np.linspace(0, base, warmup)
    rest = [
        floor + 0.5 * (base - floor) * (1 + math.cos(math.pi * i / (total - warmup))) for i in range(total - warmup)
    ]
    schedule = Cosine(base, total, warmup, floor)
    assert np.allclose([schedule(i) for i in range(total)], [*ramp, *rest], rtol=1e-14, atol=0)
    assert Cosine(1.0, 10)(0) == 1
    assert Cosine(1.0, 10, floor=0.1)(10) == pytest.approx(0.1)


def test_polynomial():
    schedule = Polynomial(3e-5, 1000, warmup=100, ratio=1e-6)
    assert schedule(0) == pytest.approx(3e-11)
    assert schedule(50) == pytest.approx(3e-5 * 0.95 * (1 - 0.5 * (1 - 1e-6)))
    assert schedule(500) == pytest.approx(1.5e-5)
    assert schedule(1000) == 0
    assert Polynomial(1.0, 10, power=2, floor=0.5)(5) == 0.625


def test_bad_numbers_are_named():
    for peak in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="learning rate: expected a number above 0, found"):
            Cosine(peak, 10)
    with pytest.raises(ValueError, match="warmup: expected 0 to 10 steps, the whole run, found 11"):
        Polynomial(1.0, 10, warmup=11)
    with pytest.raises(ValueError, match="steps: expected at least one, found 0"):
        Polynomial(1.0, 0)
    for name, value in {"weight_decay": math.nan, "layer_decay": 0, "betas": (0.9, 1.0), "eps": 0}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            AdamW(classifier(), **{name: value})
    optimizer = AdamW(classifier())
    with pytest.raises(ValueError, match="learning rate: expected a number of at least 0, found nan"):
        optimizer.step(None, math.nan)
    with pytest.raises(ValueError, match="decay: expected"):
        AverageOfWeights(optimizer, 1.0)
