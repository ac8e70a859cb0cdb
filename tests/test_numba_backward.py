"""Training on the numba backend: its backward beside NumPy's in float64, on any shapes and number of threads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba")

from conftest import distance, make, tiny_config
from tolerances import BACKWARD32, EPS32, REMAINDER

from minibeit import BeitForImageClassification, BeitForMaskedImageModeling, BeitForSemanticSegmentation
from minibeit.noise import Noise
from minibeit.ops import PositionBias, backward, get_ops, reference
from minibeit.ops.numba_cpu import convs, halves, pool
from minibeit.ops.table import fast_backwards
from minibeit.params import Attention, Conv, LayerNorm, Linear, ReluConv, flatten, table_rows
from minibeit.train.gradients import value_and_grad
from minibeit.train.optimizer import AdamW, set_running

# Gradients of small models in float32 beside float64, in EPS32 of a gradient's root mean square, beyond twice NumPy's
# error.  Measured: 5.1 in all where NumPy, whose GELU and sums over rows are made in float64, has 1.7.
MODEL32 = 4.0
OPS = get_ops("numba")
SHAPES = [(1, 5, 4, 3), (2, 99, 65, 70), (1, 33, 2200, 64), (3, 700, 64, 33), (1, 4100, 64, 33), (1, 40, 48, 2050)]
PIXELS = np.random.default_rng(0).standard_normal((4, 3, 12, 8)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1])


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def mapped(x, function):
    """`x` with function(array) in place of every array of floats."""
    if isinstance(x, np.ndarray):
        return function(x) if x.dtype.kind == "f" else x
    if isinstance(x, (list, tuple)):
        return type(x)(mapped(part, function) for part in x)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: mapped(getattr(x, f.name), function) for f in dataclasses.fields(x)})
    return x


def arrays(x):
    found = []
    mapped(x, found.append)
    return found


def check(name, g, saved, *args, tolerance=BACKWARD32, **options):
    """The fast backward is as close to float64 as NumPy's may be, changes nothing and gives the same bits on 1, 2 and 5
    threads."""
    before = mapped((g, saved, args), np.copy)
    fast = getattr(OPS, f"{name}_backward")
    assert fast is getattr(halves, f"{name}_backward")
    wide = mapped((g, saved, args), lambda x: x.astype(np.float64))  # np.float64 makes one element a scalar
    expected = arrays(getattr(backward, f"{name}_backward")(wide[0], wide[1], *wide[2], **options))
    results = []
    for threads in (1, 2, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "usable_cpus", lambda threads=threads: threads)
            with OPS.num_threads(threads):
                results.append(mapped(fast(g, saved, *args, **options), np.copy))
    found = arrays(results[0])
    assert len(found) == len(expected) > 0
    for i, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape and a.dtype == np.float32
        assert distance(a, b) <= tolerance * EPS32, (name, i)
    for other in results[1:]:
        assert all(map(np.array_equal, found, arrays(other)))
    assert all(map(np.array_equal, arrays((g, saved, args)), arrays(before)))


def layer_of(out, into, bias=True):
    return Linear(normal(1, out, into), normal(2, out) if bias else None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    B, N, into, out = shape
    check("linear", normal(3, B, N, out), None, normal(4, B, N, into), layer_of(out, into, bias))


def test_linear_of_a_patch_convolution_and_of_rows_apart():
    x, g = normal(3, 2, 9, 24)[:, :, ::2], normal(4, 2, 9, 14)[:, :, :7]
    check("linear", g, None, x, Conv(normal(5, 7, 3, 2, 2), normal(6, 7)))


# Winograd's convolution, for dx, in EPS32; measured 4.9 at most on these shapes.
WINOGRAD32 = 6.0
MAPS = [(1, 1, 1), (2, 5, 7), (3, 8, 9)]


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize(
    ("kernel", "into", "out"), [(1, 20, 9), (3, 3, 5), (3, 64, 16), (3, 70, 20), (3, 16, 32), (7, 3, 12), (5, 130, 3)]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions(size, kernel, into, out, channels_last):
    """Taps by shifts of one packed map, by windows, and by Winograd."""
    (B, h, w), spread = size, (into * kernel**2) ** -0.5
    x, g = normal(3, B, into, h, w), normal(4, B, out, h, w)
    if channels_last:
        x, g = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (x, g))
    weight, bias = normal(1, out, into, kernel, kernel, scale=spread), normal(2, out)
    tolerance = WINOGRAD32 if kernel == 3 and into % 16 == 0 and out % 16 == 0 else BACKWARD32
    check("conv2d", g, None, x, Conv(weight, bias), tolerance=tolerance)
    check("conv2d", g, None, x, Conv(weight, None), tolerance=tolerance)
    check("relu_conv2d", g, None, x, ReluConv(weight, bias), tolerance=tolerance)
    residual = normal(5, B, out, h, w)
    check("relu_conv2d_residual", g, None, x, ReluConv(weight, bias), 0.125, residual, tolerance=tolerance)


def test_gradients_of_windows_go_some_images_at_a_time(monkeypatch):
    x, g, layer = normal(3, 5, 3, 4, 6), normal(4, 5, 5, 4, 6), ReluConv(normal(1, 5, 3, 3, 3), normal(2, 5))
    monkeypatch.setattr(convs, "_WINDOW_BYTES", 2 * 4 * 4 * 6 * 27)
    assert [images.stop for images in convs.image_slices(5, 4 * 6 * 27)] == [2, 4, 5]
    check("relu_conv2d", g, None, x, layer)


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_linear_activation(shape, activation):
    B, N, into, out = shape
    x, layer = normal(4, B, N, into), layer_of(out, into)
    y, z = OPS.linear_activation_forward(x, layer, activation)
    truth = reference.linear(x.astype(np.float64), mapped(layer, np.float64))
    assert distance(z, truth) <= BACKWARD32 * EPS32
    assert distance(y, reference.linear_activation(z.astype(np.float64), Linear(np.eye(out), None), activation)) < 1e-6
    check("linear_activation", normal(3, B, N, out), np.array(z) / 4, x, layer, activation)


def test_the_derivative_of_gelu_far_from_zero():
    z = np.array([[-60.0, -14, -5.8, -5.6, -1, 0, 1, 5.6, 5.8, 14, 60, np.nan]], np.float32)
    layer = Linear(np.eye(12, dtype=np.float32), None)
    found = OPS.linear_activation_backward(np.ones_like(z), z, np.ones_like(z), layer, "gelu")[1].weight[:, 0]
    expected = backward.activations.derivative("gelu", z.astype(np.float64))[0]
    assert np.abs(found - expected)[:-1].max() < 4e-7 and np.isnan(found[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled, bias, keep", [(1, 1, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1), (0, 1, 1)])
def test_linear_residual(shape, scaled, bias, keep):
    B, N, into, out = shape
    x, g, residual = normal(4, B, N, into), normal(3, B, N, out), normal(7, B, N, out)
    scale = normal(5, out) if scaled else None
    factors = (np.where(np.random.default_rng(6).random((B, N, 1)) < 0.7, 1.25, 0).astype(np.float32),) if keep else ()
    check("linear_residual", g, None, x, layer_of(out, into, bias), scale, residual, *factors)
    if keep:
        wide = mapped((x, layer_of(out, into, bias), scale, residual, *factors), np.float64)
        found = OPS.linear_residual(x, layer_of(out, into, bias), scale, residual, *factors)
        assert distance(found, reference.linear_residual(*wide)) <= BACKWARD32 * EPS32


@pytest.mark.parametrize("B, N, H, d", [(1, 5, 2, 3), (2, 50, 3, 16), (1, 197, 2, 32)])
def test_project_qkv(B, N, H, d):
    D = H * d
    layers = [Linear(normal(i, D, D), normal(i + 3, D) if i != 1 else None) for i in range(3)]
    g = tuple(normal(i + 8, B, N, H, d).transpose(0, 2, 1, 3) for i in range(3))
    check("project_qkv", g, None, normal(7, B, N, D), Attention(*layers, output=layer_of(D, D)), H)


@pytest.mark.parametrize("B, N, D", [(1, 1, 4), (2, 50, 65), (3, 197, 48), (1, 700, 768)])
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_layer_norm(B, N, D, eps):
    x = normal(3, B, N, D, scale=2.0) + 0.3
    check("layer_norm", normal(4, B, N, D), None, x, LayerNorm(normal(1, D), normal(2, D)), eps)


def heads(seed, B, H, N, d):
    """Three arrays that lie alike, as `project_qkv` leaves them."""
    return tuple(normal(seed, B, N, 3, H, d).transpose(2, 0, 3, 1, 4))


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (3, 2), (14, 14), (5, 37), (20, 21)])
@pytest.mark.parametrize("H, d", [(2, 3), (1, 64), (3, 40)])
@pytest.mark.parametrize("biased", [True, False])
def test_attention(grid, H, d, biased):
    B, N = 2, grid[0] * grid[1] + 1
    bias = PositionBias(normal(5, table_rows(grid), H), grid) if biased else None
    cancelling = 2.0 if N == 2 else 1.0  # the two terms of each sum are alike but for their sign
    tolerance = cancelling * BACKWARD32
    check("attention", normal(6, B, N, H * d), None, *heads(7, B, H, N, d), bias, tolerance=tolerance)


def test_attention_whose_results_are_few_and_whose_queue_is_open():
    with OPS.queued():
        q, k, v = OPS.project_qkv(normal(1, 1, 5, 6), Attention(*[layer_of(6, 6)] * 3, output=layer_of(6, 6)), 2)
        found = OPS.attention_backward(normal(2, 1, 5, 6), None, q, k, v, None)
    assert all(map(np.array_equal, found[:3], OPS.attention_backward(normal(2, 1, 5, 6), None, q, k, v, None)[:3]))


@pytest.mark.parametrize("count", [1, 15, 16, 100_001])
def test_steps_of_adamw_are_numpys_to_rounding(count):
    factors = (1e-2, 0.3, (0.8, 0.95), 1e-6)
    start = normal(0, count), np.zeros(count, np.float32), np.zeros(count, np.float32)
    results = []
    for threads in (1, 2, 5):
        fast = mapped(start, np.copy)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "usable_cpus", lambda threads=threads: threads)
            with OPS.num_threads(threads):
                for t in range(1, 8):
                    OPS.adamw(fast[0], normal(t, count, scale=0.1**t), *fast[1:], factors, t)
        results.append(fast)
    wide = mapped(start, lambda array: array.astype(np.float64))
    for t in range(1, 8):
        reference.adamw(wide[0], normal(t, count, scale=0.1**t).astype(np.float64), *wide[1:], factors, t)
    for found, truth, before in zip(results[0], wide, start):
        assert distance(found, truth) < BACKWARD32 * EPS32 and not np.array_equal(found, before)
    assert all(np.array_equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


# Whole models ---------------------------------------------------------------------------------------------------------


def gradients_of(task, config, dtype="float32", backend="numba", **options):
    model = make(task, config, dtype=dtype, backend=backend)
    result = value_and_grad(model, PIXELS, **options)
    return {name: np.array(g) for name, g in flatten(result.grads).items()}


def rms(x):
    return np.sqrt(np.square(x).mean())


CONFIG = dict(use_relative_position_bias=True, use_shared_relative_position_bias=True)
RATES = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, drop_path_rate=0.4)


@pytest.mark.parametrize("changes", [CONFIG, {}, {**CONFIG, **RATES}])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_a_classifier(changes, recompute):
    options = dict(labels=LABELS, recompute=recompute, rng=Noise(1))
    found = gradients_of(BeitForImageClassification, tiny_config(**changes), **options)
    truth = gradients_of(BeitForImageClassification, tiny_config(**changes), "float64", "numpy", **options)
    numpy32 = gradients_of(BeitForImageClassification, tiny_config(**changes), "float32", "numpy", **options)
    assert found.keys() == truth.keys() and len(found) > 20
    largest = max(map(rms, truth.values()))
    for name, g in found.items():  # NumPy sums biases in float64, here a rounding step of their own is allowed
        error, theirs = rms(g - truth[name]), rms(numpy32[name] - truth[name])
        assert error <= 2 * theirs + MODEL32 * EPS32 * max(rms(truth[name]), REMAINDER * largest), name


def test_gradients_in_float64_are_numpys():
    config = tiny_config(**CONFIG)
    found = gradients_of(BeitForImageClassification, config, "float64", labels=LABELS)
    truth = gradients_of(BeitForImageClassification, config, "float64", "numpy", labels=LABELS)
    assert all(np.array_equal(g, truth[name]) for name, g in found.items()) and found


def test_masked_modelling_learns():
    config = tiny_config(use_mask_token=True, vocab_size=11, **CONFIG)
    model = make(BeitForMaskedImageModeling, config, backend="numba")
    optimizer = AdamW(model, weight_decay=0.0)
    patches = (12 // config.patch_size) * (8 // config.patch_size)
    mask = np.arange(4 * patches).reshape(4, patches) % 2 == 0
    labels = np.arange(2 * patches) % 11
    losses = []
    for _ in range(12):
        loss, grads = value_and_grad(model, PIXELS, bool_masked_pos=mask, labels=labels)
        optimizer.step(grads, 1e-2)
        losses.append(loss)
    assert losses[-1] < 0.6 * losses[0]


def test_a_model_in_training_answers_with_the_weights_of_today():
    model = make(BeitForImageClassification, tiny_config(**CONFIG), backend="numba")
    optimizer = AdamW(model)
    before = model(PIXELS).logits.copy()
    for _ in range(2):
        optimizer.step(value_and_grad(model, PIXELS, labels=LABELS).grads, 1e-2)
        now = BeitForImageClassification(model.config, backend="numpy", arrays=model.arrays)(PIXELS).logits
        assert distance(model(PIXELS).logits, now) < 1e-5 < distance(now, before)


def test_every_fast_backward_of_the_table_is_there():
    names = fast_backwards("numba")
    assert "linear" in names
    for name in names:
        assert getattr(OPS, f"{name}_backward") is getattr(halves, f"{name}_backward")
    only = get_ops("numba", only=["linear"])
    assert hasattr(only, "linear_backward") and not hasattr(only, "linear_residual_backward")
    assert not hasattr(get_ops("numpy"), "linear_backward")


def test_new_running_statistics_are_used_at_once():
    config = tiny_config(num_hidden_layers=4, out_indices=(1, 2, 3, 4), image_size=32, patch_size=8)
    model = make(BeitForSemanticSegmentation, config, backend="numba")
    x = normal(1, 1, 3, 32, 32)
    before = model(x).logits.copy()
    running = {name: array + 0.5 for name, array in model.arrays.items() if ".running_" in name}
    set_running(model, running)
    now = BeitForSemanticSegmentation(config, backend="numpy", arrays=model.arrays)(x).logits
    assert running and distance(model(x).logits, now) < 1e-4 < distance(now, before)
