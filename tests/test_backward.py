"""The backward of every op beside differences of its forward in float64, and in float32 beside float64."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import naive_gradients
import numpy as np
import pytest
from conftest import distance
from tolerances import BACKWARD32, DIFFERENCES, EPS32, NAIVE_OP

from minibeit.config import ACTIVATIONS
from minibeit.ops import PositionBias, backward, get_ops, reference
from minibeit.ops.backward import losses, maps
from minibeit.ops.backward.activations import DERIVATIVES, derivative
from minibeit.ops.table import ARITHMETIC, names_of
from minibeit.params import (
    Attention,
    BatchNorm,
    Conv,
    ConvBatchNorm,
    ConvTranspose,
    LayerNorm,
    Linear,
    ReluConv,
    table_rows,
)

OPS = get_ops("numpy")
METHODS = {
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, axes: x.transpose(axes),
    "part": lambda x, index: x[index],
    "batch_norm": lambda x, bn: reference.batch_norm(x, bn),
}


def drawn(*shape, seed=0, scale=1.0):
    return np.float32(scale * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float64)


def linear_layer(out, into, bias=True):
    return Linear(drawn(out, into, seed=1), drawn(out, seed=2) if bias else None)


def batch_norm(C):
    return BatchNorm(drawn(C, seed=3), drawn(C, seed=4), drawn(C, seed=5), np.abs(drawn(C, seed=6)) + 0.5)


def conv_bn(out, into, kernel=3):
    return ConvBatchNorm(Conv(drawn(out, into, kernel, kernel, seed=7, scale=0.5), None), batch_norm(out))


def relu_conv(out, into, kernel):
    return ReluConv(drawn(out, into, kernel, kernel, seed=7, scale=0.5), drawn(out, seed=2))


def bias(grid, H):
    return PositionBias(drawn(table_rows(grid), H, seed=8), grid)


def keep(*shape):
    return np.where(np.random.default_rng(1).random(shape) < 0.7, 1.25, 0.0)


def attention(grid, H=2, d=3, B=2):
    N = grid[0] * grid[1] + 1
    return [drawn(B, H, N, d, seed=s) for s in (10, 11, 12)]


X = drawn(2, 5, 4)
MAP = drawn(2, 3, 5, 4)
MASK = np.random.default_rng(2).random((2, 4)) < 0.5
P = Attention(linear_layer(4, 4), linear_layer(4, 4, bias=False), linear_layer(4, 4), linear_layer(4, 4))
DECONV = ConvTranspose(drawn(3, 2, 2, 2, seed=39), drawn(2, seed=2))
IDS = np.random.default_rng(4).integers(0, 3, (2, 3, 4))
LABELS = np.array([0, 2, -100, 1, 2])
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "add": ("add", [X, drawn(2, 5, 4, seed=1)], {}),
    "add broadcast": ("add", [X, drawn(1, 5, 4, seed=1)], {}),
    "add first broadcast": ("add", [drawn(4), X], {}),
    "dropout": ("dropout", [X, keep(2, 5, 4)], {}),
    "dropout of samples": ("dropout", [X, keep(2, 1, 1)], {}),
    "mask_tokens": ("mask_tokens", [drawn(2, 4, 3), MASK, drawn(1, 1, 3)], {}),
    "mean_patches": ("mean_patches", [X], {}),
    "tokens_to_map": ("tokens_to_map", [drawn(2, 7, 4), (3, 2)], {}),
    "masked_patches": ("masked_patches", [drawn(2, 4, 3), MASK], {}),
    "weighted_sum": ("weighted_sum", [[np.asarray(drawn()), np.asarray(drawn(seed=1))], (1.0, 0.4)], {}),
    "concatenate": ("concatenate", [[X, drawn(2, 3, 4, seed=1)], 1], {}),
    "concatenate broadcast": ("concatenate", [[drawn(1, 1, 4), X], 1], {}),
    "concatenate rows": ("concatenate", [[X, drawn(1, 5, 4, seed=1)], 0], {}),
    "part of slices": ("part", [X, (slice(None), slice(1, None))], {}),
    "part of an integer": ("part", [X, (slice(None), 2)], {}),
    "part of a mask": ("part", [drawn(2, 4, 3), MASK], {}),
    "reshape": ("reshape", [X, (5, 8)], {}),
    "transpose": ("transpose", [MAP, (0, 2, 3, 1)], {}),
    "layer_norm": ("layer_norm", [X, LayerNorm(drawn(4, seed=1), drawn(4, seed=2)), 1e-6], {}),
    "layer_norm large eps": ("layer_norm", [X, LayerNorm(drawn(4, seed=1), drawn(4, seed=2)), 0.5], {}),
    "linear": ("linear", [X, linear_layer(3, 4)], {}),
    "linear no bias": ("linear", [X, linear_layer(3, 4, bias=False)], {}),
    "linear of a patch convolution": ("linear", [drawn(2, 3, 12), Conv(drawn(4, 3, 2, 2), drawn(4, seed=2))], {}),
    "linear_residual": ("linear_residual", [X, linear_layer(3, 4), drawn(3, seed=5), drawn(2, 5, 3)], {}),
    "linear_residual no scale": ("linear_residual", [X, linear_layer(3, 4), None, drawn(2, 5, 3)], {}),
    "linear_residual no bias": (
        "linear_residual",
        [X, linear_layer(3, 4, False), drawn(3, seed=5), drawn(2, 5, 3)],
        {},
    ),
    "linear_residual keep": (
        "linear_residual",
        [X, linear_layer(3, 4), drawn(3, seed=5), drawn(2, 5, 3), keep(2, 5, 3)],
        {},
    ),
    "linear_residual samples": ("linear_residual", [X, linear_layer(3, 4), None, drawn(2, 5, 3), keep(2, 1, 1)], {}),
    "project_qkv": ("project_qkv", [X, P, 2], {}),
    "attention": ("attention", [*attention((2, 2)), None], {}),
    "attention bias": ("attention", [*attention((3, 2)), bias((3, 2), 2)], {}),
    "attention one patch": ("attention", [*attention((1, 1)), bias((1, 1), 2)], {}),
    "attention keep": ("attention", [*attention((2, 2)), bias((2, 2), 2)], {"keep": keep(2, 2, 5, 5)}),
    "attention probs": ("attention", [*attention((2, 2)), bias((2, 2), 2)], {"return_probs": True}),
    "attention probs keep": (
        "attention",
        [*attention((2, 2)), bias((2, 2), 2)],
        {"return_probs": True, "keep": keep(2, 2, 5, 5)},
    ),
    "conv2d 1x1": ("conv2d", [MAP, Conv(drawn(2, 3, 1, 1), drawn(2, seed=2))], {}),
    "conv2d 3x3": ("conv2d", [MAP, Conv(drawn(2, 3, 3, 3), None)], {}),
    "conv2d 3x3 of a pixel": ("conv2d", [drawn(2, 3, 1, 1), Conv(drawn(2, 3, 3, 3), drawn(2, seed=2))], {}),
    "relu_conv2d 1x1": ("relu_conv2d", [MAP, relu_conv(2, 3, 1)], {}),
    "relu_conv2d 3x3": ("relu_conv2d", [MAP, relu_conv(2, 3, 3)], {}),
    "relu_conv2d_residual": (
        "relu_conv2d_residual",
        [MAP, relu_conv(2, 3, 3), 0.25, drawn(2, 2, 5, 4, seed=5)],
        {},
    ),
    "conv2d_one_hot": ("conv2d_one_hot", [IDS, Conv(drawn(2, 3, 1, 1), drawn(2, seed=2))], {}),
    "conv2d_one_hot no bias": ("conv2d_one_hot", [IDS, Conv(drawn(2, 3, 1, 1), None)], {}),
    "upsample2x2": ("upsample2x2", [MAP], {}),
    "batch_norm": ("batch_norm", [MAP, batch_norm(3)], {}),
    "conv_bn_relu": ("conv_bn_relu", [MAP, conv_bn(2, 3)], {}),
    "conv_bn_relu_resized": (
        "conv_bn_relu_resized",
        [[MAP, drawn(2, 1, 2, 3), drawn(2, 2, 1, 1)], conv_bn(2, 6), (5, 4)],
        {},
    ),
    "conv_transpose": ("conv_transpose", [MAP, DECONV], {}),
    "conv_transpose_bn_gelu": ("conv_transpose_bn_gelu", [MAP, DECONV, batch_norm(2)], {}),
    "max_pool2x2": ("max_pool2x2", [MAP], {}),
    "adaptive_avg_pool": ("adaptive_avg_pool", [MAP, 3], {}),
    "adaptive_avg_pool of more cells than pixels": ("adaptive_avg_pool", [MAP, 6], {}),
    "resize_bilinear up": ("resize_bilinear", [MAP, (9, 7)], {}),
    "resize_bilinear down": ("resize_bilinear", [MAP, (2, 3)], {}),
    "resize_bilinear one axis": ("resize_bilinear", [MAP, (5, 7)], {}),
    "resize_bicubic up": ("resize_bicubic", [MAP, (9, 7)], {}),
    "resize_bicubic down": ("resize_bicubic", [MAP, (2, 3)], {}),
    "cross_entropy": ("cross_entropy", [drawn(5, 3), LABELS, -100], {}),
    "cross_entropy smoothing": ("cross_entropy", [drawn(5, 3), LABELS, -100], {"smoothing": 0.1}),
    "cross_entropy ignored class": ("cross_entropy", [drawn(5, 3), np.array([0, 2, 1, 1, 2]), 2], {}),
    "soft_cross_entropy": ("soft_cross_entropy", [drawn(5, 3), np.abs(drawn(5, 3, seed=1))], {}),
    "gumbel_softmax": ("gumbel_softmax", [drawn(2, 5, 3, 2), drawn(2, 5, 3, 2, seed=1), 0.7], {}),
    "divergence_from_uniform": ("divergence_from_uniform", [drawn(2, 5, 3, 2)], {}),
    "logit_laplace_loss": (
        "logit_laplace_loss",
        [drawn(2, 4, 3, 2), np.random.default_rng(0).uniform(0.1, 0.9, (2, 2, 3, 2))],
        {},
    ),
    "mse_loss": ("mse_loss", [X, drawn(2, 5, 4, seed=1)], {}),
    "bce_with_logits": ("bce_with_logits", [drawn(5, 3, scale=3), np.random.default_rng(0).random((5, 3))], {}),
    **{f"linear_activation {name}": ("linear_activation", [X, linear_layer(3, 4), name], {}) for name in ACTIVATIONS},
}
CONSTANTS = {
    ("mask_tokens", 1),
    ("dropout", 1),
    ("linear_residual", 4),
    ("cross_entropy", 1),
    ("soft_cross_entropy", 1),
}
CONSTANTS |= {("mse_loss", 1), ("bce_with_logits", 1), ("gumbel_softmax", 1), ("logit_laplace_loss", 1)}


def forward(name, args, options):
    made = getattr(backward, f"{name}_forward", None)
    if made is not None:
        return made(*args, **options)
    return (METHODS.get(name) or getattr(reference, name))(*args, **options), None


def cotangents(made):
    if isinstance(made, tuple):
        return tuple(drawn(*part.shape, seed=40 + i) for i, part in enumerate(made))
    return drawn(*np.shape(made), seed=40)


def weighed(made, g):
    return sum((a * b).sum() for a, b in zip(made, g)) if isinstance(made, tuple) else float((made * g).sum())


def arrays_of(x, prefix=""):
    """{path: floating array} in an argument of any structure."""
    if isinstance(x, np.ndarray):
        return {prefix: x} if x.dtype.kind == "f" else {}
    if isinstance(x, (list, tuple)):
        return {k: v for i, part in enumerate(x) for k, v in arrays_of(part, f"{prefix}.{i}").items()}
    if dataclasses.is_dataclass(x):
        names = [f.name for f in dataclasses.fields(x)]
        return {k: v for n in names for k, v in arrays_of(getattr(x, n), f"{prefix}.{n}").items()}
    return {}


def in_dtype(x, dtype):
    x = copy.deepcopy(x)
    if isinstance(x, np.ndarray):
        return x.astype(dtype) if x.dtype.kind == "f" else x
    if isinstance(x, (list, tuple)):
        return type(x)(in_dtype(part, dtype) for part in x)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: in_dtype(getattr(x, f.name), dtype) for f in dataclasses.fields(x)})
    return x


def analytic(name, args, options, dtype="float64"):
    """{path: gradient} of the op's result weighed by fixed cotangents."""
    args, options = in_dtype(args, dtype), {k: in_dtype(v, dtype) for k, v in options.items()}
    before = copy.deepcopy((args, options))
    made, saved = forward(name, args, options)
    g = in_dtype(cotangents(made), dtype)
    given = copy.deepcopy(g)
    found = getattr(backward, f"{name}_backward")(g, saved, *args, **options)
    assert same((args, options, g), (*before, given)), "an argument was changed"
    assert isinstance(found, tuple)
    assert len(found) <= len(args)
    return {k: v for i, ct in enumerate(found) for k, v in arrays_of(ct, f"{i}").items()}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    a, b = arrays_of(a, "x"), arrays_of(b, "x")
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_backward_is_the_derivative(case):
    name, args, options = copy.deepcopy(CASES[case])
    found = analytic(name, args, options)
    g = cotangents(forward(name, args, options)[0])
    expected = {
        path: array
        for i, arg in enumerate(args)
        if (name, i) not in CONSTANTS
        for path, array in arrays_of(arg, str(i)).items()
        if "running" not in path and not (name == "project_qkv" and ".output" in path)
    }
    assert found.keys() == expected.keys()
    assert found
    for path, array in expected.items():
        step = 1e-5 if "relu" in case else 1e-3  # short of the next kink
        truth = naive_gradients.differences(lambda: weighed(forward(name, args, options)[0], g), array, step)
        assert found[path].shape == array.shape, path
        assert np.abs(found[path] - truth).max() <= DIFFERENCES * max(1, np.abs(truth).max()), path


@pytest.mark.parametrize("case", CASES)
def test_backward_in_float32(case):
    name, args, options = CASES[case]
    truth, found = analytic(name, args, options), analytic(name, args, options, "float32")
    for path in truth:
        assert found[path].dtype == np.float32, path
        spread = np.sqrt(np.square(truth[path]).mean())
        error = np.sqrt(np.square(found[path] - truth[path]).mean())
        assert error <= BACKWARD32 * EPS32 * max(spread, 1e-3), path


def test_every_op_has_a_backward():
    """All ops but those that only make or move arrays, and there is a case for each."""
    ops = names_of(ARITHMETIC) | {"concatenate", "tokens_to_map", "masked_patches"}
    having = {name.removesuffix("_backward") for name in vars(backward) if name.endswith("_backward")}
    assert ops <= having
    assert having == {name for name, _, _ in CASES.values()}
    for name in having:
        text = inspect.getdoc(getattr(backward, f"{name}_backward"))
        assert text, name
    assert set(DERIVATIVES) == set(ACTIVATIONS)


def test_linear_is_the_chain_rule_element_by_element():
    x, g, layer = drawn(6, 4), drawn(6, 3, seed=1), linear_layer(3, 4)
    dx, d = backward.linear_backward(g, None, x, layer)
    for found, truth in zip((dx, d.weight, d.bias), naive_gradients.linear(g, x, layer.weight)):
        assert distance(found, truth) <= NAIVE_OP


def test_convolution_is_the_chain_rule_pixel_by_pixel():
    conv, g = Conv(drawn(2, 3, 3, 3), None), drawn(2, 2, 5, 4, seed=1)
    dx, d = backward.conv2d_backward(g, None, MAP, conv)
    for found, truth in zip((dx, d.weight), naive_gradients.conv2d(g, MAP, conv.weight)):
        assert distance(found, truth) <= NAIVE_OP


def test_relu_convolution_is_the_chain_rule_pixel_by_pixel():
    conv, g = relu_conv(2, 3, 3), drawn(2, 2, 5, 4, seed=1)
    dx, d = backward.relu_conv2d_backward(g, None, MAP, conv)
    inner, weight = naive_gradients.conv2d(g, np.where(MAP > 0, MAP, 0), conv.weight)
    for found, truth in ((dx, np.where(MAP > 0, inner, 0)), (d.weight, weight), (d.bias, g.sum((0, 2, 3)))):
        assert distance(found, truth) <= NAIVE_OP


def test_columns_add_up_over_the_pixels_of_an_id():
    g = drawn(2, 2, 3, 4, seed=1)
    nothing, d = backward.conv2d_one_hot_backward(g, None, IDS, Conv(drawn(2, 3, 1, 1), drawn(2)))
    assert nothing is None
    truth = np.zeros((2, 3, 1, 1))
    for b, i, j in np.ndindex(IDS.shape):
        truth[:, IDS[b, i, j], 0, 0] += g[b, :, i, j]
    assert distance(d.weight, truth) <= NAIVE_OP


def test_an_enlarged_pixel_gets_the_sum_of_its_square():
    g = drawn(1, 1, 4, 6)
    (dx,) = backward.upsample2x2_backward(g, None, np.zeros((1, 1, 2, 3)))
    truth = [[g[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].sum() for j in range(3)] for i in range(2)]
    assert distance(dx[0, 0], np.array(truth)) <= NAIVE_OP


@pytest.mark.parametrize("grid", [(1, 1), (3, 2), (2, 5)])
def test_the_table_adds_up_repeated_rows(grid):
    """With equal keys and one-dimensional values the scores' gradient is known; its sum over rows of the table too."""
    index = OPS.relative_position_index(grid)
    H, N, R = 2, len(index), table_rows(grid)
    q, k, v = np.zeros((2, H, N, 1)), np.zeros((2, H, N, 1)), drawn(2, H, N, 1)
    g = drawn(2, N, H, seed=1)
    *_, d = backward.attention_backward(g, None, q, k, v, PositionBias(np.zeros((R, H)), grid))
    p = 1 / N  # every probability
    dp = np.einsum("bah,bhk->bhak", g, v[..., 0])
    ds = p * (dp - p * dp.sum(-1, keepdims=True))
    assert distance(d.table, naive_gradients.bias_table(ds.sum(0), index, R)) <= 4 * NAIVE_OP


def test_max_pool_gives_to_the_first_of_equals():
    x = np.zeros((1, 1, 3, 2))
    (dx,) = backward.max_pool2x2_backward(np.ones((1, 1, 1, 1)), None, x)
    assert dx[0, 0].tolist() == [[1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_far_out(name):
    """No derivative overflows, and none is NaN where the activation is smooth."""
    x = np.array([-80.0, -30.0, -9.5, -1e-3, 1e-3, 5.5, 30.0, 80.0])
    for dtype in ("float32", "float64"):
        found = derivative(name, x.astype(dtype))
        assert found.dtype == dtype
        assert np.isfinite(found).all()
        assert np.abs(found).max() < 200


# Losses ---------------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_inference():
    logits = drawn(5, 3)
    assert (
        distance(losses.cross_entropy_forward(logits, LABELS, -100)[0], OPS.cross_entropy(logits, LABELS, -100))
        <= 1e-15
    )


def test_soft_targets_include_labels_and_smoothing():
    logits, labels, s = drawn(5, 3), np.array([0, 2, 1, 1, 2]), 0.1
    soft = np.eye(3)[labels] * (1 - s) + s / 3
    hard, saved = losses.cross_entropy_forward(logits, labels, -100, smoothing=s)
    mixed, _ = losses.soft_cross_entropy_forward(logits, soft)
    assert abs(hard - mixed) <= 1e-15
    one = losses.cross_entropy_backward(1.0, saved, logits, labels, -100, smoothing=s)[0]
    other = losses.soft_cross_entropy_backward(1.0, saved, logits, soft)[0]
    assert np.abs(one - other).max() <= 1e-16


def test_no_label_at_all():
    logits, labels = drawn(2, 3), np.array([-100, -100])
    loss, saved = losses.cross_entropy_forward(logits, labels, -100)
    assert np.isnan(loss)
    assert not losses.cross_entropy_backward(1.0, saved, logits, labels, -100)[0].any()


def test_a_label_outside_is_named():
    with pytest.raises(ValueError, match=r"labels: expected class numbers 0 to 2 \(or -100 to ignore\), found 3"):
        losses.cross_entropy_forward(drawn(2, 3), np.array([-100, 3]), -100)


# Batch norm in training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["conv_bn_relu", "conv_bn_relu_resized", "conv_transpose_bn_gelu", "batch_norm"])
def test_batch_statistics_are_the_derivative(case):
    name, args, _ = copy.deepcopy(CASES[case])

    def run():
        return getattr(backward, f"{name}_forward")(*args, statistics=maps.BatchStatistics())

    made, saved = run()
    g = cotangents(made)
    found = getattr(backward, f"{name}_backward")(g, saved, *args)
    named = {k: v for i, ct in enumerate(found) for k, v in arrays_of(ct, f"{i}").items()}
    compared = 0
    for path, array in arrays_of(args, "").items():
        if "running" not in path:
            truth = naive_gradients.differences(lambda: weighed(run()[0], g), array, 1e-5)
            assert np.abs(named[path[1:]] - truth).max() <= DIFFERENCES * max(1, np.abs(truth).max()), path
            compared += 1
    assert compared == len(named)


def test_running_statistics():
    """(1 - momentum) old + momentum new, with the unbiased variance."""
    bn, statistics = batch_norm(3), maps.BatchStatistics(momentum=0.25)
    backward.batch_norm_forward(MAP, bn, statistics)
    new = statistics.running({"a.running_mean": bn.running_mean, "a.running_var": bn.running_var})
    assert distance(new["a.running_mean"], 0.75 * bn.running_mean + 0.25 * MAP.mean((0, 2, 3))) <= NAIVE_OP
    assert distance(new["a.running_var"], 0.75 * bn.running_var + 0.25 * MAP.var((0, 2, 3), ddof=1)) <= NAIVE_OP


def test_statistics_over_workers_are_those_of_the_whole_batch():
    """Two workers, one image each, that add their sums up, beside one with both images."""
    import threading

    bn, g = batch_norm(3), drawn(*MAP.shape, seed=9)
    whole, saved = backward.batch_norm_forward(MAP, bn, maps.BatchStatistics())
    dx, d = backward.batch_norm_backward(g, saved, MAP, bn)
    barrier, parts, results = threading.Barrier(2), [None, None], [None, None]

    def worker(i):
        def reduce(x):
            parts[i] = x
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        statistics = maps.BatchStatistics(reduce)
        y, kept = backward.batch_norm_forward(MAP[i : i + 1], bn, statistics)
        dx, d = backward.batch_norm_backward(g[i : i + 1], kept, MAP[i : i + 1], bn)
        results[i] = y, dx, d, statistics.running({"mean": bn.running_mean, "var": bn.running_var})

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert distance(np.concatenate([r[0] for r in results]), whole) <= NAIVE_OP
    assert distance(np.concatenate([r[1] for r in results]), dx) <= NAIVE_OP
    assert distance(results[0][2].weight + results[1][2].weight, d.weight) <= NAIVE_OP
    assert np.array_equal(results[0][3]["var"], results[1][3]["var"])


def test_one_value_per_channel_has_no_statistics():
    with pytest.raises(ValueError, match="more than one value per channel"):
        backward.batch_norm_forward(drawn(1, 3, 1, 1), batch_norm(3), maps.BatchStatistics())
