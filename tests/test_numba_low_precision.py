"""int8 and bfloat16 of the backend numba beside their definition in NumPy: the same integers, bit for bit.

Which instructions were run: those of this CPU, and of the CPUs that the slow tests force.  `sdot` is compiled here
unless this is an ARM CPU that has it, and not run.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from conftest import distance, random_weights, tiny_config
from tolerances import (
    BFLOAT16_ATTENTION,
    BFLOAT16_ATTENTION_SAME,
    BFLOAT16_LINEAR,
    BFLOAT16_SAME,
    INT8_LINEAR,
    INT8_SAME,
    SHORT,
    SHORT_SAME,
)  # fmt: skip

import minibeit
from minibeit.ops import PositionBias, get_ops, numba_cpu, reference
from minibeit.ops.low_precision import (
    MAKERS,
    Int8Linear,
    ShortPart,
    integer_products,
    lowered,
    quantise_rows,
)
from minibeit.params import (
    Attention,
    BatchNorm,
    Conv,
    ConvBatchNorm,
    ConvTranspose,
    FeaturePyramid,
    Linear,
    UperHead,
    table_rows,
)  # fmt: skip

if not numba_cpu.COMPILED:
    pytest.skip("NUMBA_DISABLE_JIT is set", allow_module_level=True)

from minibeit.ops.numba_cpu.low_arguments import HEADER_BYTES, bfloat16_route
from minibeit.ops.numba_cpu.low_precision import level_rows, pack_low

OPS = get_ops("numba", dtype="int8")
LOW = ["int8", "bfloat16"]


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def layer_of(dtype, out, steps, bias=True):
    return MAKERS[dtype](Linear(normal(1, out, steps, scale=steps**-0.5), normal(2, out) if bias else None))


def read_levels(x, layer):
    """What the kernel made of the rows: (levels, factors, zero points)."""
    rows, count, row_bytes = level_rows(x, layer)
    memory = np.lib.stride_tricks.as_strided(
        np.frombuffer(rows.array, np.uint8) if rows.array.flags.c_contiguous else rows.array.view(np.uint8),
        (count, row_bytes), (row_bytes, 1),
    )  # fmt: skip
    header = np.ascontiguousarray(memory[:, :8])
    stored = {"vpdpbusd": np.uint8, "sdot": np.int8, "pairs": np.int16}[layer.route.name]
    length = HEADER_BYTES + x.shape[-1] * layer.route.row_bytes
    levels = np.ascontiguousarray(memory[:, HEADER_BYTES:length]).view(stored).astype(np.int64)
    if layer.route.name == "sdot":
        levels += 128
    return levels, header[:, :4].copy().view(np.float32)[:, 0], header[:, 4:].copy().view(np.int32)[:, 0]


# Integers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 63, 64, 100, 768])
@pytest.mark.parametrize("shift", [0, -3, 200])
def test_levels_are_those_of_the_reference(width, shift):
    x = normal(3, 70, width, scale=5) + np.float32(shift)
    x[5] = 0
    x[6] *= np.float32(1e-33)
    x[7, width // 2] = 1e30
    layer = pack_low([layer_of("int8", 4, width)])
    for found, truth in zip(read_levels(x, layer), quantise_rows(x), strict=True):
        assert np.array_equal(found, truth)


@pytest.mark.parametrize("rows", [1, 2, 5, 11, 12, 13, 25, 40, 197])
@pytest.mark.parametrize(("out", "steps"), [(1, 1), (7, 3), (32, 4), (33, 5), (70, 18), (130, 257), (16, 3072)])
def test_sums_are_those_of_the_reference_bit_for_bit(rows, out, steps):
    """Whole numbers whose factors are 1: the float32 result is the integer sum, rounded once."""
    rng = np.random.default_rng(rows)
    levels, weight = rng.integers(0, 256, (rows, steps)), rng.integers(-127, 128, (out, steps)).astype(np.int8)
    levels[:, 0] = 255
    x = (levels - (zero := np.where(steps > 2, 37, 0))).astype(np.float32)
    if steps > 2:
        x[:, 1] = -37
        x[:, 0] = 218
    packed = pack_low([Int8Linear(weight, np.ones(out, np.float32), None)])
    found_levels, factor, found_zero = quantise_rows(x)
    assert (factor == 1).all() and (found_zero == zero).all()
    truth = integer_products(found_levels, found_zero, weight).astype(np.float32)
    assert np.array_equal(OPS.linear(x, packed), truth)


def test_the_largest_sums_neither_saturate_nor_overflow():
    """Pairs of 255 * 127 are beyond 16 bits, where AVX2's bytewise product would saturate."""
    steps = 66_311
    x = np.full((3, steps), 255, np.float32)
    for sign in (1, -1):
        weight = np.full((2, steps), sign * 127, np.int8)
        found = OPS.linear(x, pack_low([Int8Linear(weight, np.ones(2, np.float32), None)]))
        assert (found == np.float32(sign * 255 * 127 * steps)).all()


# Layers -------------------------------------------------------------------------------------------------------------


def same(dtype):
    return INT8_SAME if dtype == "int8" else BFLOAT16_SAME


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("out", [1, 15, 16, 31, 32, 33, 64, 100])
def test_what_follows_the_product(dtype, out):
    layer, x, scale, residual = layer_of(dtype, out, 50), normal(3, 2, 14, 50), normal(4, out), normal(5, 2, 14, out)
    packed = OPS.prepare(layer)
    for name, more in (
        ("linear", ()),
        ("linear_activation", ("gelu",)),
        ("linear_activation", ("relu",)),
        ("linear_activation", ("tanh",)),
        ("linear_residual", (scale, residual)),
        ("linear_residual", (None, residual)),
    ):
        found, truth = getattr(OPS, name)(x, packed, *more), getattr(reference, name)(x, layer, *more)
        assert found.dtype == np.float32 and distance(found, truth) <= same(dtype), name


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("D, H", [(64, 4), (20, 2), (96, 3)])
def test_queries_keys_and_values_are_one_product(dtype, D, H):
    p = Attention(
        layer_of(dtype, D, D), layer_of(dtype, D, D, bias=False), layer_of(dtype, D, D), layer_of(dtype, D, D)
    )
    x = normal(5, 2, 7, D)
    packed = OPS.prepare(p)
    for found, truth in zip(OPS.project_qkv(x, packed, H), reference.project_qkv(x, p, H), strict=True):
        assert distance(found, truth) <= same(dtype)
    wide = x.astype(np.float64)  # which NumPy serves, from the layers unpacked again
    for found, truth in zip(OPS.project_qkv(wide, packed, H), reference.project_qkv(wide, p, H), strict=True):
        assert found.dtype == np.float64 and np.array_equal(found, truth)


@pytest.mark.parametrize("dtype", LOW)
def test_rows_that_are_views(dtype):
    layer, x = layer_of(dtype, 20, 12), normal(3, 4, 9, 30)
    packed = OPS.prepare(layer)
    for view in (x[:, 1:, 5:17], x[:, ::2, 5:17], x[::-1, :, :12], x.transpose(1, 0, 2)[:, :, 3:15], x[0, 0, :12]):
        view.flags.writeable = False
        assert distance(OPS.linear(view, packed), reference.linear(view, layer)) <= same(dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_nan_and_infinity_stay_in_their_rows(dtype):
    x = normal(3, 30, 33)
    x[7, 3], x[9, 32], x[11, 32] = np.nan, np.inf, np.nan
    for y in (OPS.linear(x, OPS.prepare(layer_of(dtype, 40, 33))), reference.linear(x, layer_of(dtype, 40, 33))):
        assert np.isnan(y[[7, 11]]).all() and not np.isfinite(y[9]).any()
        assert np.isfinite(np.delete(y, (7, 9, 11), 0)).all()


@pytest.mark.parametrize("dtype", LOW)
def test_a_packed_layer_can_be_unpacked(dtype):
    layer = layer_of(dtype, 45, 37)
    plain = pack_low([layer]).plain()
    assert type(plain) is type(layer)
    for name in vars(layer):
        assert np.array_equal(getattr(plain, name), getattr(layer, name))


# Attention ----------------------------------------------------------------------------------------------------------


def attention_case(B, H, grid, d, bias=True):
    N = grid[0] * grid[1] + 1
    q, k, v = normal(1, B, N, 3, H, d).transpose(2, 0, 3, 1, 4)
    return q, k, v, PositionBias(normal(9, table_rows(grid), H), grid) if bias else None


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 5), (4, 8), (1, 33), (7, 9), (3, 17)])
@pytest.mark.parametrize(("H", "d"), [(1, 64), (2, 16), (3, 5), (2, 40), (1, 83)])
def test_attention_is_that_of_the_reference(grid, H, d):
    """Where the CPU multiplies bfloat16; elsewhere it is float32, from which that differs by its rounding."""
    case = attention_case(2, H, grid, d)
    found, truth = OPS.attention(*case), reference.attention_of_low_precision(*case)
    if bfloat16_route().name == "vdpbf16ps":
        assert distance(found, truth) <= BFLOAT16_ATTENTION_SAME
    else:
        assert distance(found, reference.attention(*case)) < 1e-6
    assert distance(truth, reference.attention(*case)) < BFLOAT16_ATTENTION


@pytest.mark.parametrize("N", [1, 2, 11, 12, 13, 31, 32, 33, 64, 65, 80, 400])
def test_attention_without_bias(N):
    case = attention_case(1, 2, (N - 1, 1), 24, bias=False)
    assert distance(OPS.attention(*case), reference.attention(*case)) < BFLOAT16_ATTENTION


def test_nan_in_a_query_spoils_its_row_only_and_in_a_key_all_rows():
    q, k, v, _ = (a if a is None else np.array(a) for a in attention_case(1, 2, (13, 1), 16, bias=False))
    q[0, 1, 3, 2] = np.nan
    y = OPS.attention(q, k, v, None).reshape(14, 2, 16)
    assert np.isnan(y[3, 1]).all() and np.isfinite(y[:, 0]).all() and np.isfinite(np.delete(y[:, 1], 3, 0)).all()
    q[0, 1, 3, 2] = 0
    k[0, 0, 13, 0] = np.nan
    y = OPS.attention(q, k, v, None).reshape(14, 2, 16)
    assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1]).all()


def test_probabilities_are_asked_for_in_float32():
    case = attention_case(1, 2, (3, 3), 16)
    context, probs = OPS.attention(*case, return_probs=True)
    truth = reference.attention(*case, return_probs=True)
    assert np.array_equal(context, truth[0]) and np.array_equal(probs, truth[1])


# Maps ---------------------------------------------------------------------------------------------------------------

C = 64


def batch_norm(seed):
    weight = 1 + normal(seed, C, scale=0.3)
    weight[3] *= -1  # a batch norm may turn a channel round
    return BatchNorm(weight, normal(seed + 1, C), normal(seed + 2, C), 0.5 + normal(seed, C) ** 2)


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


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("B", "h", "w"), [(1, 1, 1), (2, 3, 5), (1, 8, 8)])
def test_maps(dtype, B, h, w):
    (pyramid, head), x = lowered((PYRAMID, HEAD), dtype), normal(90, B, C, h, w)
    fast_pyramid, fast_head = OPS.prepare((pyramid, head))
    maps = [normal(91, B, C, 4 * h, 4 * w), normal(92, B, C, 2 * h, 2 * w), x, normal(93, B, C, 1, 1)]
    size = 4 * h, 4 * w
    for name, slow, fast, plain in (
        ("conv_transpose", (x, pyramid.deconv2), (x, fast_pyramid.deconv2), (x, PYRAMID.deconv2)),
        (
            "conv_transpose_bn_gelu",
            (x, pyramid.deconv1, pyramid.bn),
            (x, fast_pyramid.deconv1, fast_pyramid.bn),
            (x, PYRAMID.deconv1, PYRAMID.bn),
        ),
        ("conv_bn_relu", (x, head.lateral_convs[0]), (x, fast_head.lateral_convs[0]), (x, HEAD.lateral_convs[0])),
        ("conv_bn_relu", (x, head.fpn_convs[0]), (x, fast_head.fpn_convs[0]), (x, HEAD.fpn_convs[0])),
        (
            "conv_bn_relu_resized",
            (maps, head.fpn_bottleneck, size),
            (maps, fast_head.fpn_bottleneck, size),
            (maps, HEAD.fpn_bottleneck, size),
        ),
    ):
        found, truth = getattr(OPS, name)(*fast), getattr(reference, name)(*slow)
        loss = distance(truth, getattr(reference, name)(*plain))
        if dtype == "bfloat16":
            assert distance(found, truth) <= 3 * BFLOAT16_SAME and loss < BFLOAT16_LINEAR, name
        elif any(isinstance(part, ShortPart) for part in getattr(slow[1], "parts", ())):
            assert distance(found, truth) <= (SHORT_SAME if bfloat16_route().name == "vdpbf16ps" else SHORT), name
            assert loss < SHORT, name
        else:
            assert distance(found, truth) <= 3 * INT8_SAME and loss < INT8_LINEAR, name


# Models -------------------------------------------------------------------------------------------------------------

CLASSES = {
    "BeitForImageClassification": "logits",
    "BeitForMaskedImageModeling": "logits",
    "BeitForSemanticSegmentation": "logits",
    "BeitModel": "last_hidden_state",
}
SIZES = dict(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
    use_relative_position_bias=True, vocab_size=50, use_mask_token=True, num_labels=7, out_indices=[1, 2, 3, 4],
)  # fmt: skip
PIXELS = normal(9, 2, 3, 32, 32)


def made(name, dtype, backend="numba", **changes):
    model_class = getattr(minibeit, name)
    config = tiny_config(**{**SIZES, **changes})
    arrays = random_weights(config, model_class.task, dtype="float32")
    return model_class(config, arrays=arrays, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_is_as_near_to_float32_as_its_definition(name, dtype):
    """The last bit of a layer norm moves levels by one here and there, so models agree less well than layers."""
    found, truth, plain = (
        getattr(made(name, kind, backend)(PIXELS), CLASSES[name])
        for kind, backend in ((dtype, "numba"), (dtype, "numpy"), ("float32", "numpy"))
    )
    loss = distance(truth, plain)
    assert distance(found, plain) < 1.2 * loss and distance(found, truth) < loss


@pytest.mark.parametrize("dtype", LOW)
def test_results_are_the_same_on_any_number_of_threads(dtype):
    model = made("BeitForImageClassification", dtype)
    assert np.array_equal(model(PIXELS, num_threads=1).logits, model(PIXELS, num_threads=3).logits)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", CLASSES)
def test_a_prepared_model_gives_the_same_bits(name, dtype, tmp_path):
    model = made(name, dtype)
    for folder, portable in ((tmp_path / "packed", False), (tmp_path / "portable", True)):
        model.save_prepared(folder, portable=portable)
        again = getattr(minibeit, name).from_pretrained(folder, backend="numba", dtype="auto")
        assert again.dtype == dtype
        assert np.array_equal(getattr(again(PIXELS), CLASSES[name]), getattr(model(PIXELS), CLASSES[name]))
    with pytest.raises(minibeit.CheckpointError, match=f"holds {dtype} weights, but dtype float32 was asked for"):
        getattr(minibeit, name).from_pretrained(tmp_path / "packed", backend="numba")
    with pytest.raises(minibeit.CheckpointError, match="this backend cannot read"):
        getattr(minibeit, name).from_pretrained(tmp_path / "packed", backend="numpy", dtype=dtype)


def test_packed_weights_are_views_of_the_file(tmp_path):
    made("BeitForImageClassification", "int8", hidden_size=128).save_prepared(tmp_path)
    model = minibeit.BeitForImageClassification.from_pretrained(tmp_path, backend="numba", dtype="int8")
    panels = model.params.beit.encoder[0].fc1.panels
    assert panels.dtype == np.int8 and not panels.flags.owndata and not panels.flags.writeable


@pytest.mark.parametrize("dtype", LOW)
def test_single_fast_ops_beside_numpy(dtype):
    config = tiny_config(**SIZES)
    arrays = random_weights(config, "image_classification", dtype="float32")
    options = dict(arrays=arrays, dtype=dtype, backend="numba")
    truth = made("BeitForImageClassification", dtype, "numpy")(PIXELS).logits
    for only in (["linear_activation"], ["project_qkv"], ["attention"]):
        found = minibeit.BeitForImageClassification(config, only=only, **options)(PIXELS).logits
        assert distance(found, truth) < 5e-3
