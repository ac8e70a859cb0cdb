"""int8 and bfloat16 as NumPy defines them: rounding, exact sums, migrated scales, portable files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import distance, random_weights, tiny_config
from safetensors import safe_open
from segmentation_data import QUICK, pair_folder, scene, trainer
from tolerances import BFLOAT16_LINEAR, BFLOAT16_MODEL, INT8_LINEAR, INT8_MODEL, SHORT

import minibeit
from minibeit.errors import CheckpointError
from minibeit.ops import get_ops, low_precision, reference, short_winograd
from minibeit.ops.low_precision import (
    LONGEST_SUM,
    MAKERS,
    integer_products,
    make_int8,
    migrated,
    migration_factors,
    quantise_rows,
    quantise_weight,
)
from minibeit.ops.portable import dump_portable, restore_portable
from minibeit.params import Conv, Linear, flatten, shapes, unflatten
from minibeit.tasks.calibration import channel_spans
from minibeit.tokenizer.config import DalleTokenizerConfig

TASKS = {
    "image_classification": minibeit.BeitForImageClassification,
    "masked_image_modeling": minibeit.BeitForMaskedImageModeling,
    "semantic_segmentation": minibeit.BeitForSemanticSegmentation,
    "model": minibeit.BeitModel,
    "backbone": minibeit.BeitBackbone,
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def settings(task):
    if task == "semantic_segmentation":
        return {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]}
    return {"out_indices": [1, 2]} if task == "backbone" else {}


# Rounding -----------------------------------------------------------------------------------------------------------


def test_a_weight_is_rounded_to_the_nearest_level_of_its_channel():
    weight = normal(0, 7, 40)
    weight[3] = 0
    levels, scale = quantise_weight(weight)
    assert levels.dtype == np.int8 and scale.dtype == np.float32 and scale[3] == 0
    assert np.abs(levels).max(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert (np.abs(levels * scale[:, None] - weight) <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("shift", [-30, -1, 0, 2, 50])
def test_a_token_is_rounded_to_256_levels_of_its_own_range(shift):
    x = normal(1, 9, 33) + np.float32(shift)
    levels, factor, zero = quantise_rows(x)
    assert levels.dtype == np.uint8 and factor.dtype == np.float32 and zero.dtype == np.int32
    assert zero.min() >= 0 and zero.max() <= 255
    span = np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)
    assert np.allclose(factor, span / 255)
    back = (levels - zero[:, None]) * factor[:, None]
    assert np.abs(back - x).max() <= 1.001 * factor.max()  # half a level of x, half of the zero point


def test_rows_without_a_range_and_rows_that_are_not_finite():
    x = np.array([[0, 0, 0], [1e-38, 0, -1e-38], [1, np.nan, 2], [np.inf, 1, 2], [3, 3, 3]], np.float32)
    levels, factor, zero = quantise_rows(x)
    assert factor[:2].tolist() == [0, 0] and np.isnan(factor[2:4]).all()
    assert np.allclose((levels[4] - zero[4]) * factor[4], 3, rtol=1e-6)


def test_products_are_sums_of_integers():
    rng = np.random.default_rng(2)
    levels, zero = rng.integers(0, 256, (5, 300)).astype(np.uint8), rng.integers(0, 256, 5).astype(np.int32)
    weight = rng.integers(-127, 128, (4, 300)).astype(np.int8)
    truth = (levels.astype(object) - zero[:, None].astype(object)) @ weight.T.astype(object)
    assert np.array_equal(integer_products(levels, zero, weight), truth.astype(np.int64))


def test_the_longest_sum_fits_and_a_longer_one_is_refused():
    levels, zero = np.full((1, LONGEST_SUM), 255, np.uint8), np.zeros(1, np.int32)
    assert integer_products(levels, zero, np.full((1, LONGEST_SUM), -127, np.int8))[0, 0] == -255 * 127 * LONGEST_SUM
    with pytest.raises(ValueError, match="a sum of 66,313 products may overflow, at most 66,311 fit"):
        make_int8(Linear(np.zeros((1, LONGEST_SUM + 2), np.float32), None))


@pytest.mark.parametrize(("dtype", "limit"), [("int8", INT8_LINEAR), ("bfloat16", BFLOAT16_LINEAR)])
def test_a_layer_is_near_its_float32_self(dtype, limit):
    layer, x = Linear(normal(0, 50, 200), normal(1, 50)), normal(2, 3, 20, 200)
    found = reference.linear(x, MAKERS[dtype](layer))
    assert found.dtype == np.float32
    assert 0.3 * limit < distance(found, reference.linear(x, layer)) < limit


@pytest.mark.parametrize("shape", [(1, 5, 4, 4), (2, 3, 5, 7), (1, 1, 1, 1), (1, 64, 16, 16)])
def test_short_winograd_is_the_convolution_but_for_its_rounding(shape):
    x, conv = normal(0, *shape), Conv(normal(1, 6, shape[1], 3, 3) / np.float32(3 * shape[1] ** 0.5), None)
    truth = reference.conv2d(x, conv)
    assert distance(short_winograd.short_conv(x, conv.weight), truth) < SHORT
    assert distance(short_winograd.short_conv(x, conv.weight, lambda array: array), truth) < 2e-6


# Models -------------------------------------------------------------------------------------------------------------


def low_model(task, dtype, backend="numpy", **changes):
    config = tiny_config(**(settings(task) | changes))
    return made(TASKS[task], config), made(TASKS[task], config, dtype, backend)


def made(model_class, config, dtype="float32", backend="numpy"):
    arrays = random_weights(config, model_class.task, dtype="float32")
    return model_class(config, arrays=arrays, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("task", TASKS)
def test_which_layers_are_of_low_precision(task, dtype):
    _, model = low_model(task, dtype)
    names = {name.rsplit(".", 1)[0] for name, leaf in flatten(model.params).items()
             if leaf.dtype in (np.int8, np.uint16)}  # fmt: skip
    block = ("attention.query", "attention.key", "attention.value", "attention.output", "fc1", "fc2")
    expected = {f"beit.encoder.{i}.{layer}" for i in range(model.config.num_hidden_layers) for layer in block}
    if task == "masked_image_modeling":
        expected.add("lm_head")
    if task == "semantic_segmentation":
        expected |= {f"fpn.deconv{i}.corners.{corner}" for i in (1, 2, 3) for corner in range(4)}
        expected |= {f"decode_head.lateral_convs.{i}" for i in range(3)}
        expected |= {f"decode_head.psp_bottleneck.parts.{i}" for i in range(4)}
        expected |= {f"decode_head.fpn_bottleneck.parts.{i}" for i in (1, 2, 3)}
    assert names == expected


@pytest.mark.parametrize(("dtype", "limit"), [("int8", INT8_MODEL), ("bfloat16", BFLOAT16_MODEL)])
@pytest.mark.parametrize("task", TASKS)
def test_outputs_are_near_those_of_float32(task, dtype, limit):
    plain, low = low_model(task, dtype)
    x = normal(3, 2, 3, 12, 8)
    for found, truth in zip(low(x).to_tuple(), plain(x).to_tuple(), strict=True):
        for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, truth)), strict=True):
            assert a.dtype == np.float32 and 0 < distance(a, b) < limit


def test_the_model_says_what_it_is():
    _, model = low_model("image_classification", "int8")
    assert ", int8, backend numpy" in repr(model) and model.to("int8") is model
    with pytest.raises(ValueError, match=r"dtype: expected .*'int8' or 'bfloat16', found 'int4'"):
        get_ops("numpy", dtype="int4")
    with pytest.raises(ValueError, match="a tokenizer has no layers of low precision"):
        minibeit.DalleTokenizer(DalleTokenizerConfig(), dtype="int8", backend="numpy")


@pytest.mark.slow
def test_pixels_of_a_trained_segmenter_keep_their_class(tmp_path):
    """What is promised is 99.5 %.  Measured: int8 99.94 %, bfloat16 99.98 %."""
    recipe = dataclasses.replace(QUICK, epochs=12)
    trained = trainer(pair_folder(tmp_path / "data", 24), tmp_path / "run", recipe, changes={"drop_path_rate": 0.0})
    trained.run()
    config, arrays = trained.model.config, dict(trained.model.arrays)
    half = [0.5] * 3
    processor = minibeit.BeitImageProcessor(
        size={"height": 32, "width": 32}, resample=2, image_mean=half, image_std=half
    )
    x = processor([scene(100 + i)[0] for i in range(20)]).pixel_values
    classes = {
        dtype: minibeit.BeitForSemanticSegmentation(config, arrays=arrays, dtype=dtype, backend="numpy")(
            x
        ).logits.argmax(1)
        for dtype in ("float32", "int8", "bfloat16")
    }
    assert np.bincount(classes["float32"].ravel()).min() > 100  # the head tells the classes apart
    for dtype in ("int8", "bfloat16"):
        assert np.mean(classes[dtype] == classes["float32"]) >= 0.995


# Outliers -----------------------------------------------------------------------------------------------------------


def with_outliers(model, factor, channels=(1, 7)):
    """The model's arrays with channels after every norm that are `factor` times as large, and are read as before."""
    arrays = {name: array.copy() for name, array in model.arrays.items()}
    for name, array in arrays.items():
        if ".norm1." in name or ".norm2." in name:
            array[list(channels)] *= np.float32(factor)
        elif name.endswith(("query.weight", "key.weight", "value.weight", "fc1.weight")):
            array[:, list(channels)] /= np.float32(factor)
    return arrays


def test_migrating_scales_changes_no_bit_of_float32():
    model = made(minibeit.BeitModel, tiny_config())
    tree = unflatten(shapes(model.config, "model"), with_outliers(model, 64))
    moved = dataclasses.replace(tree.beit, encoder=tuple(migrated(block) for block in tree.beit.encoder))
    assert not np.array_equal(moved.encoder[0].norm1.weight, tree.beit.encoder[0].norm1.weight)
    x = normal(3, 2, 3, 12, 8)
    named = flatten(dataclasses.replace(tree, beit=moved))
    again = minibeit.BeitModel(model.config, arrays=named, backend="numpy")(x).last_hidden_state
    before = minibeit.BeitModel(model.config, arrays=with_outliers(model, 64), backend="numpy")(x).last_hidden_state
    assert np.array_equal(again, before)


def test_outlier_channels_cost_nothing_once_their_scale_has_moved(monkeypatch):
    """Planted channels 64 times as large take the levels of all others, unless they are migrated."""
    config = tiny_config(hidden_size=48, num_hidden_layers=3)
    plain = made(minibeit.BeitModel, config)
    x = normal(3, 2, 3, 12, 8)
    truth = plain(x).last_hidden_state
    arrays = with_outliers(plain, 64)

    def error():
        low = minibeit.BeitModel(config, arrays=arrays, dtype="int8", backend="numpy")
        return distance(low(x).last_hidden_state, truth)

    migrating = error()
    monkeypatch.setattr(low_precision, "migrated", lambda block, spans=None: block)
    without = error()
    assert migrating < INT8_MODEL and without > 4 * migrating, (migrating, without)


def test_factors_are_powers_of_two_that_even_out():
    factors = migration_factors(
        np.array([1, 1, 1, 4096, 0, 1e-3], np.float32), np.array([1, 1, 1, 1, 1, 0], np.float32)
    )
    assert factors.tolist() == [1, 1, 1, 64, 1, 1]
    assert (migration_factors(np.zeros(3), np.ones(3)) == 1).all()


def test_channels_are_measured_on_images():
    model = made(minibeit.BeitModel, tiny_config())
    x = normal(3, 4, 3, 12, 8)
    spans = channel_spans(model, [x[:1], x[1:]])
    trace = minibeit.Trace("encoder.1.norm2")
    model(x, trace=trace)
    assert len(spans) == 2 and np.allclose(spans[1][1], np.abs(trace["encoder.1.norm2"]).max((0, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match="calibration: expected at least one image"):
        channel_spans(model, [])


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("task", TASKS)
def test_a_portable_file_gives_the_same_bits(task, dtype, tmp_path):
    _, model = low_model(task, dtype)
    model.save_prepared(tmp_path, portable=True)
    again = TASKS[task].from_pretrained(tmp_path, dtype=dtype, backend="numpy")
    x = normal(3, 1, 3, 12, 8)
    for a, b in zip(model(x).to_tuple(), again(x).to_tuple(), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(CheckpointError, match=f"holds {dtype} weights, but dtype float32 was asked for"):
        TASKS[task].from_pretrained(tmp_path, backend="numpy")


def test_a_portable_file_can_be_read_by_any_program(tmp_path):
    _, model = low_model("image_classification", "int8")
    model.save_prepared(tmp_path, portable=True)
    with safe_open(tmp_path / "prepared.safetensors", "numpy") as file:
        assert file.metadata()["layout"] == "int8 1, any CPU"
        weight, scale = (file.get_tensor(f"beit.encoder.0.fc2.{name}") for name in ("weight", "scale"))
        assert "beit.encoder.0.norm1.weight" in set(file.keys())
    assert (
        weight.dtype == np.int8
        and np.abs(weight * scale[:, None] - model.arrays["beit.encoder.0.fc2.weight"]).max() < 0.005
    )


def test_a_portable_file_of_something_else_is_refused():
    tree = unflatten(shapes(tiny_config(), "model"), random_weights(tiny_config(), "model", dtype="float32"))
    layout, arrays = dump_portable(tree, "int8")
    wanted = shapes(tiny_config(), "model")
    name = "beit.encoder.1.attention.query.weight"
    with pytest.raises(ValueError, match=f"lacks {name}; was it made for another task"):
        restore_portable(wanted, layout, {key: array for key, array in arrays.items() if key != name})
    for wrong in (arrays[name].astype(np.float32), arrays[name][:, 1:]):
        with pytest.raises(ValueError, match=rf"{name}: expected int8 of shape \(12, 12\), found"):
            restore_portable(wanted, layout, {**arrays, name: wrong})


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    plain, model = low_model("image_classification", "int8")
    with pytest.raises(ValueError, match=r"weights of low precision .int8, bfloat16., this model's are float32"):
        plain.save_prepared(tmp_path, portable=True)
    with pytest.raises(ValueError, match="use the backend 'numba'"):
        model.save_prepared(tmp_path)
    assert not list(tmp_path.iterdir())
