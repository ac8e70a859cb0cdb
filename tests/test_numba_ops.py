"""The numba backend beside the NumPy definition in float64, on shapes and numbers where kernels go wrong.

Errors are root mean squares relative to the truth's root mean square.  A kernel may be FACTOR times as far from float64
as NumPy in float32 is (both add the same numbers in another order), and need not be closer than FLOOR.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("numba")

from minibeit.ops import PositionBias, get_ops, reference
from minibeit.ops.numba_cpu import convs
from minibeit.ops.numba_cpu.target import TILE
from minibeit.params import (
    Attention,
    BatchNorm,
    Conv,
    ConvBatchNorm,
    ConvTranspose,
    FeaturePyramid,
    LayerNorm,
    Linear,
    ReluConv,
    UperHead,
    table_rows,
)

OPS = get_ops("numba")
FACTOR = 2.0  # largest measured: 1.4 (layer norm, whose NumPy form rounds the quotient apart)
FLOOR = 4e-7  # a sum of 384 products in one go (target.STEPS) is 3.7e-7 off at worst
WINOGRAD = 8e-7  # F(4x4, 3x3) in float32; measured 4.3e-7 on these shapes, NumPy 0.9e-7, with points 1 and 2 1.0e-6


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def wide(tree):
    """The same tree in float64."""
    if isinstance(tree, np.ndarray):
        return tree.astype(np.float64) if tree.dtype == np.float32 else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(wide(child) for child in tree)
    if dataclasses.is_dataclass(tree):
        return type(tree)(**{f.name: wide(getattr(tree, f.name)) for f in dataclasses.fields(tree)})
    return tree


def error(result, truth):
    assert result.shape == truth.shape and result.dtype == np.float32
    return np.sqrt(np.mean(np.square(result - truth)) / np.mean(np.square(truth)))


def check(name, arguments, fast_arguments=None, limit=None):
    """The fast op beside NumPy in float32, both measured against float64."""
    fast = getattr(OPS, name)(*(arguments if fast_arguments is None else fast_arguments))
    slow, truth = getattr(reference, name)(*arguments), getattr(reference, name)(*wide(arguments))
    if not isinstance(fast, tuple):
        fast, slow, truth = (fast,), (slow,), (truth,)
    for a, b, c in zip(fast, slow, truth, strict=True):
        assert error(a, c) <= (limit or max(FACTOR * error(b, c), FLOOR))


def linear_layer(out, steps, bias=True):
    return Linear(normal(1, out, steps, scale=steps**-0.5), normal(2, out) if bias else None)


# Matrix products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [*range(1, 14), 23, 24, 25, 197])
def test_row_tails(rows):
    layer, x = linear_layer(40, 24), normal(3, rows, 24)
    check("linear", (x, layer), (x, OPS.prepare(layer)))


@pytest.mark.parametrize("out", [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70, 130])
def test_column_tails(out):
    layer, x, scale, residual = linear_layer(out, 10), normal(3, 14, 10), normal(4, out), normal(5, 14, out)
    packed = OPS.prepare(layer)
    check("linear", (x, layer), (x, packed))
    check("linear_activation", (x, layer, "gelu"), (x, packed, "gelu"))
    check("linear_activation", (x, layer, "relu"), (x, packed, "relu"))
    check("linear_activation", (x, layer, "tanh"), (x, packed, "tanh"))
    check("linear_residual", (x, layer, scale, residual), (x, packed, scale, residual))
    check("linear_residual", (x, layer, None, residual), (x, packed, None, residual))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 15, 16, 17, 385, 1024, 3072])
def test_sum_lengths(steps):
    layer, x = linear_layer(33, steps, bias=False), normal(3, 13, steps)
    check("linear", (x, layer), (x, OPS.prepare(layer)))


@pytest.mark.parametrize("steps", [768, 1024, 3072])
def test_the_last_layer_adds_no_error_that_shows(steps):
    """The logits' error is that of the classifier's sums: 384 products in one go doubled it (3.4e-7)."""
    layer, x = linear_layer(1000, steps, bias=False), normal(3, 1, steps)
    truth = reference.linear(x.astype(np.float64), wide(layer))
    assert error(OPS.linear(x, OPS.prepare(layer)), truth) <= 2.5e-7  # measured: 1.8e-7 to 2.1e-7


@pytest.mark.parametrize("steps", [2001, 3072, 4096])
def test_long_sums_in_two_halves(steps):
    """`out` fills whole panels of every target: only then is a long sum parted."""
    layer, x, scale, residual = linear_layer(128, steps), normal(3, 13, steps), normal(4, 128), normal(5, 13, 128)
    packed = OPS.prepare(layer)
    check("linear", (x, layer), (x, packed))
    check("linear_activation", (x, layer, "gelu"), (x, packed, "gelu"))
    check("linear_activation", (x, layer, "relu"), (x, packed, "relu"))
    check("linear_residual", (x, layer, scale, residual), (x, packed, scale, residual))


def test_a_patch_convolution_is_a_linear_layer():
    from minibeit.params import Embeddings

    conv = Conv(normal(1, 20, 3, 4, 4), normal(2, 20))
    packed = OPS.prepare(Embeddings(normal(3, 1, 1, 20), None, None, conv)).patch
    x = normal(4, 2, 6, 48)
    check("linear", (x, conv), (x, packed))


def test_rows_that_are_views():
    layer = linear_layer(20, 12)
    packed, x = OPS.prepare(layer), normal(3, 4, 9, 30)
    for view in (x[:, 1:, 5:17], x[:, ::2, 5:17], x[::-1, :, :12], x.transpose(1, 0, 2)[:, :, 3:15], x[0, 0, :12]):
        view.flags.writeable = False
        check("linear", (view, layer), (view, packed))
    broadcast = np.broadcast_to(normal(4, 12), (3, 5, 12))
    check("linear", (broadcast, layer), (broadcast, packed))


def test_gelu_everywhere():
    """Identity weights: GELU of 200,001 numbers, beside float64. x Phi(x) computed as x/2 (1 + erf) loses the relative
    accuracy of the far negative tail, as PyTorch does, but never more than a rounding step of x."""
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)[:, None]
    y = OPS.linear_activation(x, OPS.prepare(Linear(np.ones((1, 1), np.float32), None)), "gelu")
    truth = reference.linear_activation(x.astype(np.float64), Linear(np.ones((1, 1)), None), "gelu")
    limit = 1.8e-7 if TILE.name == "portable" else 1.2e-7  # measured 1.4e-7 where a * b + c is rounded twice, 0.8e-7
    assert np.max(np.abs(y - truth) / np.maximum(np.abs(x), 1)) < limit
    with np.errstate(invalid="ignore"):
        ends = OPS.linear_activation(
            np.array([[np.nan], [np.inf], [-1e30], [1e30], [1e-42], [0]], np.float32),
            OPS.prepare(Linear(np.ones((1, 1), np.float32), None)),
            "gelu",
        )
    assert np.isnan(ends[0, 0]) and ends[1, 0] == np.inf and ends[2, 0] == 0 and ends[3, 0] == np.float32(1e30)
    assert abs(ends[4, 0]) < 1e-41 and ends[5, 0] == 0


def test_nan_stays_in_its_row():
    x = normal(3, 30, 16)
    x[7, 3] = np.nan
    layer = OPS.prepare(linear_layer(40, 16))
    for activation in ("gelu", "relu"):
        y = OPS.linear_activation(x, layer, activation)
        assert np.isnan(y[7]).all() and np.isfinite(np.delete(y, 7, 0)).all()


# Layer norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 48, 100, 768])
@pytest.mark.parametrize("rows", [1, 31, 33, 70])
def test_layer_norm(width, rows):
    norm, x = LayerNorm(normal(1, width), normal(2, width)), normal(3, rows, width)
    check("layer_norm", (x, norm, 1e-6), (x, OPS.prepare(norm), 1e-6))


def test_layer_norm_of_awkward_rows():
    norm = OPS.prepare(LayerNorm(np.ones(50, np.float32), np.zeros(50, np.float32)))
    x = normal(3, 4, 50)
    x[0] = 7.25  # no deviation at all
    x[1] *= np.float32(1e-30)  # the variance underflows
    x[2, 5] = np.nan
    y = OPS.layer_norm(x, norm, 1e-12)
    assert (y[0] == 0).all() and np.abs(y[1]).max() < 1e-20 and np.isnan(y[2]).all() and np.isfinite(y[3]).all()
    shifted = normal(4, 5, 50) + np.float32(300)
    check("layer_norm", (shifted, LayerNorm(norm.weight, norm.bias), 1e-12), (shifted, norm, 1e-12))


# Attention ----------------------------------------------------------------------------------------------------------


def heads(seed, B, H, N, d, scale=1.0):
    """q, k and v as `project_qkv` leaves them: views of one (B, N, 3 H d) array."""
    return tuple(normal(seed, B, N, 3, H, d, scale=scale).transpose(2, 0, 3, 1, 4))


def position_bias(grid, H, scale=1.0):
    return PositionBias(normal(9, table_rows(grid), H, scale=scale), grid)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 5), (5, 3), (4, 8), (1, 33), (31, 1), (7, 9), (3, 17)])
@pytest.mark.parametrize("H, d", [(1, 64), (2, 16), (3, 5), (2, 40), (1, 83)])
def test_attention_with_bias(grid, H, d):
    q, k, v = heads(1, 2, H, grid[0] * grid[1] + 1, d)
    check("attention", (q, k, v, position_bias(grid, H)))


@pytest.mark.parametrize("N", [1, 2, 11, 12, 13, 31, 32, 33, 63, 64, 65, 80, 81, 400])
def test_attention_without_bias(N):
    check("attention", (*heads(2, 1, 2, N, 24), None))


def test_attention_of_extreme_scores():
    q, k, v = heads(3, 1, 2, 10, 16)
    check("attention", (q, k, v, position_bias((3, 3), 2, scale=1e4)))
    check("attention", (q * np.float32(1e3), k * np.float32(1e3), v, None))
    check("attention", (q * np.float32(1e-30), k * np.float32(1e-30), v, None))
    equal = np.ones_like(np.ascontiguousarray(q))
    result = OPS.attention(equal, equal, np.ascontiguousarray(v), None)
    mean = v.astype(np.float64).mean(2, keepdims=True)
    assert np.abs(result.reshape(1, 10, 2, 16) - mean.transpose(0, 2, 1, 3)).max() < 3e-7
    denormal = np.full_like(equal, 1e-40)
    check("attention", (denormal, denormal, np.ascontiguousarray(v), None))


def test_nan_in_a_query_spoils_its_row_only_and_in_a_key_all_rows():
    q, k, v = (np.array(a) for a in heads(4, 1, 2, 14, 16))
    q[0, 1, 3, 2] = np.nan
    y = OPS.attention(q, k, v, None).reshape(14, 2, 16)
    assert np.isnan(y[3, 1]).all() and np.isfinite(y[:, 0]).all() and np.isfinite(np.delete(y[:, 1], 3, 0)).all()
    q[0, 1, 3, 2] = 0
    k[0, 0, 13, 0] = np.nan
    y = OPS.attention(q, k, v, None).reshape(14, 2, 16)
    assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1]).all()


@pytest.mark.parametrize("D, H", [(64, 4), (20, 2), (96, 3)])
def test_project_qkv(D, H):
    p = Attention(linear_layer(D, D), linear_layer(D, D, bias=False), linear_layer(D, D), linear_layer(D, D))
    x = normal(5, 2, 7, D)
    check("project_qkv", (x, p, H), (x, OPS.prepare(p), H))


def test_what_kernels_lack_is_served_by_numpy():
    q, k, v = heads(6, 1, 2, 10, 16)
    bias, keep = position_bias((3, 3), 2), (normal(7, 1, 2, 10, 10) > 0).astype(np.float32)
    context, probs = OPS.attention(q, k, v, bias, return_probs=True)
    assert error(OPS.attention(q, k, v, bias), context) < 3e-7 and np.allclose(probs.sum(-1), 1)
    assert np.array_equal(OPS.attention(q, k, v, bias, keep=keep), reference.attention(q, k, v, bias, keep=keep))
    layer, x = linear_layer(20, 12), normal(8, 5, 12).astype(np.float64)
    truth = reference.linear(x, wide(layer))
    assert OPS.linear(x, OPS.prepare(layer)).dtype == np.float64
    assert np.array_equal(OPS.linear(x, OPS.prepare(wide(layer))), truth)


# Maps ---------------------------------------------------------------------------------------------------------------

C = 64


def batch_norm(seed):
    return BatchNorm(
        1 + normal(seed, C, scale=0.1), normal(seed + 1, C), normal(seed + 2, C), 0.5 + normal(seed, C) ** 2
    )


def conv_bn(seed, channels, kernel):
    weight = normal(seed, C, channels, kernel, kernel, scale=(channels * kernel * kernel) ** -0.5)
    return ConvBatchNorm(Conv(weight, None), batch_norm(seed))


def deconv(seed):
    return ConvTranspose(normal(seed, C, C, 2, 2, scale=C**-0.5), normal(seed + 1, C))


PYRAMID = FeaturePyramid(deconv(20), batch_norm(21), deconv(22), deconv(23))
HEAD = UperHead(
    psp_modules=tuple(conv_bn(30 + i, C, 1) for i in range(4)),
    psp_bottleneck=conv_bn(40, 5 * C, 3),
    lateral_convs=tuple(conv_bn(50 + i, C, 1) for i in range(3)),
    fpn_convs=tuple(conv_bn(60 + i, C, 3) for i in range(3)),
    fpn_bottleneck=conv_bn(70, 4 * C, 3),
    classifier=Conv(normal(80, 150, C, 1, 1, scale=C**-0.5), normal(81, 150)),
)


@pytest.fixture(scope="module")
def packed():
    return OPS.prepare(PYRAMID), OPS.prepare(HEAD)


SHAPES = [(1, 1, 1), (2, 1, 2), (1, 5, 7), (2, 8, 8), (1, 13, 3), (1, 4, 17)]


@pytest.mark.parametrize("B, h, w", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps(packed, B, h, w, channels_last):
    pyramid, head = packed
    x = normal(90, B, C, h, w)
    if channels_last:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    check("conv_transpose", (x, PYRAMID.deconv2), (x, pyramid.deconv2))
    check("conv_transpose_bn_gelu", (x, PYRAMID.deconv1, PYRAMID.bn), (x, pyramid.deconv1, pyramid.bn))
    check("conv_bn_relu", (x, HEAD.lateral_convs[0]), (x, head.lateral_convs[0]))
    check("conv_bn_relu", (x, HEAD.fpn_convs[0]), (x, head.fpn_convs[0]), limit=WINOGRAD)
    check("conv2d", (x, HEAD.classifier), (x, head.classifier))
    for size in ((2 * h, 2 * w), (3 * h, w), (h + 1, 2 * w + 3), (max(1, h // 2), max(1, w // 2))):
        check("resize_bilinear", (x, size))
    for size in (1, 2, 3, 6):
        check("adaptive_avg_pool", (x, size))
    if min(h, w) > 1:
        assert np.array_equal(OPS.max_pool2x2(x), reference.max_pool2x2(x))


@pytest.mark.parametrize("B, h, w", SHAPES)
@pytest.mark.parametrize(("kernel", "into", "out"), [(1, 24, 40), (3, 64, 96), (3, 24, 20), (7, 3, 40), (5, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_after_relu(B, h, w, kernel, into, out, channels_last):
    weight = normal(1, out, into, kernel, kernel, scale=(into * kernel**2) ** -0.5)
    layer, x, residual = ReluConv(weight, normal(2, out)), normal(3, B, into, h, w), normal(4, B, out, h, w)
    if channels_last:
        x, residual = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (x, residual))
    packed = OPS.prepare(layer)
    limit = WINOGRAD if isinstance(packed, convs.PackedTiles) else None
    for layer_given in (packed, layer):  # in training it is packed at every call
        check("relu_conv2d", (x, layer), (x, layer_given), limit=limit)
        fast = (x, layer_given, 0.125, residual)
        check("relu_conv2d_residual", (x, layer, 0.125, residual), fast, limit=limit)
    plain = Conv(weight, layer.bias)
    check("conv2d", (x, plain), (x, OPS.prepare(plain)))


def test_windows_go_some_images_at_a_time(monkeypatch):
    layer, x, residual = ReluConv(normal(1, 5, 3, 3, 3), normal(2, 5)), normal(3, 5, 3, 4, 6), normal(4, 5, 5, 4, 6)
    packed = OPS.prepare(layer)
    whole = OPS.relu_conv2d_residual(x, packed, 0.5, residual)
    monkeypatch.setattr(convs, "_WINDOW_BYTES", 2 * 4 * 4 * 6 * 27)
    assert np.array_equal(OPS.relu_conv2d_residual(x, packed, 0.5, residual), whole)


def test_float64_convolutions_are_left_to_numpy():
    layer, x = wide(ReluConv(normal(1, 16, 16, 3, 3), normal(2, 16))), wide(normal(3, 1, 16, 5, 4))
    assert np.array_equal(OPS.relu_conv2d(x, OPS.prepare(layer)), reference.relu_conv2d(x, layer))


def test_winograd_has_no_far_outliers():
    """After ReLU single numbers are 8 times as far off as NumPy's; with the usual points 1 and 2 they were 35 times."""
    weight = normal(95, 192, 192, 3, 3, scale=(192 * 9) ** -0.5)
    bn = BatchNorm(*(np.full(192, value, np.float32) for value in (1, 0, 0, 1)))
    layer = ConvBatchNorm(Conv(weight, None), bn)
    head = OPS.prepare(dataclasses.replace(HEAD, fpn_convs=(layer,)))
    x = np.maximum(normal(96, 1, 192, 40, 40), 0)
    truth = reference.conv_bn_relu(x.astype(np.float64), wide(layer))
    fast, slow = OPS.conv_bn_relu(x, head.fpn_convs[0]), reference.conv_bn_relu(x, layer)
    assert np.max(np.abs(fast - truth)) < 14 * np.max(np.abs(slow - truth))


@pytest.mark.parametrize("B, h, w", SHAPES)
def test_convolution_of_enlarged_maps(packed, B, h, w):
    """The commuted form: also where the border's zeros are shifted in."""
    _, head = packed
    sizes = [(h, w), (-(-h // 2), -(-w // 2)), (-(-h // 4), -(-w // 4)), (1, 1)]
    maps = [normal(91 + i, B, C, *size) for i, size in enumerate(sizes)]
    check(
        "conv_bn_relu_resized", (maps, HEAD.fpn_bottleneck, (h, w)), (maps, head.fpn_bottleneck, (h, w)), limit=WINOGRAD
    )
    maps = [normal(91, B, C, h, w), *(normal(92 + s, B, C, s, s) for s in (1, 2, 3, 6))]
    check("conv_bn_relu_resized", (maps, HEAD.psp_bottleneck, (h, w)), (maps, head.psp_bottleneck, (h, w)))


def test_maps_of_other_channels_are_refused(packed):
    with pytest.raises(ValueError, match="expected maps of"):
        OPS.conv_bn_relu_resized([normal(1, 1, C, 4, 4)], packed[1].fpn_bottleneck, (4, 4))


def test_odd_channels_are_left_to_numpy():
    layer = ConvBatchNorm(Conv(normal(1, 5, 5, 3, 3), None), BatchNorm(*(normal(i, 5) ** 2 + 1 for i in range(4))))
    head = UperHead((), layer, (), (layer,), layer, Conv(normal(2, 3, 5, 1, 1), None))
    x = normal(3, 1, 5, 6, 6)
    assert np.array_equal(OPS.conv_bn_relu(x, OPS.prepare(head).fpn_convs[0]), reference.conv_bn_relu(x, layer))


# Whole models -------------------------------------------------------------------------------------------------------


def test_one_fast_op_at_a_time():
    """`only` mixes fast ops with NumPy ones, which get the weights as they were before packing."""
    from minibeit import BeitConfig
    from minibeit.tasks.semantic_segmentation import BeitForSemanticSegmentation

    config = BeitConfig.from_dict(
        dict(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=96,
            image_size=32, patch_size=8,
            use_relative_position_bias=True, out_indices=[1, 2, 3, 4], id2label={str(i): str(i) for i in range(5)},
            initializer_range=0.2,
        )
    )  # fmt: skip
    plain = BeitForSemanticSegmentation(config, backend="numpy")
    x = normal(1, 2, 3, 32, 32)
    expected = plain(x, output_auxiliary_logits=True)
    names = [name for name, origin in OPS.origin.items() if origin == "numba" and name != "prepare"]
    for only in (None, *({name} for name in names)):
        model = BeitForSemanticSegmentation(config, backend="numba", only=only, arrays=plain.arrays)
        result = model(x, output_auxiliary_logits=True)
        assert error(result.logits, expected.logits) < 1e-5, only
        assert error(result.auxiliary_logits, expected.auxiliary_logits) < 1e-5, only
