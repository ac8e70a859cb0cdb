"""The five tasks: heads beside loops, shapes, options, input that does not fit, arrays of the caller."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import distance, make, random_weights, tiny_config
from tolerances import NAIVE_MODEL

import minibeit
from minibeit import (
    BeitBackbone,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)

RNG = np.random.default_rng(1)
PIXELS = RNG.standard_normal((2, 3, 12, 8))
MASK = np.array([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]], bool)
SEGMENT = dict(num_hidden_layers=3, out_indices=[0, 1, 2, 3], use_relative_position_bias=True)
TASKS = [BeitModel, BeitForImageClassification, BeitForMaskedImageModeling, BeitForSemanticSegmentation, BeitBackbone]


def config_for(model_class, **changes):
    base = SEGMENT if model_class is BeitForSemanticSegmentation else {}
    return tiny_config(**{**base, "use_mask_token": True, **changes})


# Heads beside loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
def test_classification_equals_loops(mean):
    config = tiny_config(use_mean_pooling=mean, use_relative_position_bias=True)
    truth = naive.classify(config, random_weights(config, "image_classification"), PIXELS)
    assert distance(make(BeitForImageClassification, config)(PIXELS).logits, truth) <= NAIVE_MODEL


@pytest.mark.parametrize("mask", [None, MASK])
def test_masked_image_modeling_equals_loops(mask):
    config = tiny_config(use_shared_relative_position_bias=True, use_mask_token=True)
    truth = naive.predict_tokens(config, random_weights(config, "masked_image_modeling"), PIXELS, mask)
    assert truth.shape == (2, 6, 10)
    assert distance(make(BeitForMaskedImageModeling, config)(PIXELS, mask).logits, truth) <= NAIVE_MODEL


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"auxiliary_num_convs": 2, "auxiliary_concat_input": True},
        {"auxiliary_num_convs": 0, "auxiliary_channels": 12},
        {"pool_scales": [6], "num_labels": 1},
    ],
)
def test_segmentation_equals_loops(changes):
    config = tiny_config(**{**SEGMENT, **changes})
    logits, auxiliary = naive.segment(config, random_weights(config, "semantic_segmentation"), PIXELS)
    out = make(BeitForSemanticSegmentation, config)(PIXELS, output_auxiliary_logits=True)
    assert out.logits.shape == (2, config.num_labels, 12, 8)
    assert distance(out.logits, logits) <= NAIVE_MODEL
    assert distance(out.auxiliary_logits, auxiliary) <= NAIVE_MODEL


# Options ------------------------------------------------------------------------------------------------------------


def test_no_classes_gives_the_pooled_vector():
    config = tiny_config(num_labels=0)
    model = make(BeitForImageClassification, config)
    assert model.params.classifier is None
    assert model(PIXELS).logits.shape == (2, 12)


def test_auxiliary_logits_come_when_they_are_asked_for_or_needed():
    model = make(BeitForSemanticSegmentation, tiny_config(**SEGMENT))
    assert model(PIXELS).auxiliary_logits is None
    assert model(PIXELS, output_auxiliary_logits=True).auxiliary_logits.shape == (2, 5, 3, 2)
    assert model(PIXELS, labels=np.zeros((2, 5, 5), int)).auxiliary_logits is not None
    without = make(BeitForSemanticSegmentation, tiny_config(**SEGMENT, use_auxiliary_head=False))
    assert without(PIXELS, output_auxiliary_logits=True).auxiliary_logits is None


def test_backbone_describes_itself():
    config = tiny_config(num_hidden_layers=3, out_features=["stem", "stage2"])
    model = make(BeitBackbone, config)
    assert model.stage_names == ("stem", "stage1", "stage2", "stage3")
    assert (model.out_features, model.out_indices, model.channels) == (("stem", "stage2"), (0, 2), [12, 12])
    maps = model(PIXELS).feature_maps
    assert [m.shape for m in maps] == [(2, 12, 3, 2)] * 2
    sequences = make(BeitBackbone, config.replace(reshape_hidden_states=False))(PIXELS).feature_maps
    assert [s.shape for s in sequences] == [(2, 7, 12)] * 2
    assert np.array_equal(sequences[1][:, 1:].transpose(0, 2, 1).reshape(2, 12, 3, 2), maps[1])


def test_backbone_with_feature_pyramid():
    config = tiny_config(num_hidden_layers=3, out_indices=[0, 1, 2, 3], add_fpn=True)
    maps = make(BeitBackbone, config)(PIXELS).feature_maps
    assert [m.shape[2:] for m in maps] == [(12, 8), (6, 4), (3, 2), (1, 1)]


@pytest.mark.parametrize("model_class", TASKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_of_the_model_is_the_dtype_of_the_result(model_class, dtype):
    model = make(model_class, config_for(model_class), dtype)
    out = model(PIXELS.astype("float16"), output_hidden_states=True, output_attentions=True)
    arrays = [part for value in out.values() for part in (value if isinstance(value, tuple) else [value])]
    assert len(arrays) > 4
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


@pytest.mark.parametrize("model_class", TASKS)
def test_random_models_work_and_describe_themselves(model_class):
    model = model_class(config_for(model_class), seed=3, backend="numpy")
    same = model_class(config_for(model_class), seed=3, backend="numpy")
    first, again = (m(PIXELS).to_tuple()[0] for m in (model, same))
    first, again = (x[0] if isinstance(x, tuple) else x for x in (first, again))
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)
    text = f"{model_class.__name__}({model.config.num_hidden_layers} blocks, width 12, 3 heads, "
    assert repr(model).startswith(text)
    assert f"{model.num_parameters():,} parameters, float32, backend numpy" in repr(model)


@pytest.mark.parametrize("model_class", TASKS)
def test_float32_is_near_float64(model_class):
    config = config_for(model_class)
    single, double = (make(model_class, config, d)(PIXELS).to_tuple()[0] for d in ("float32", "float64"))
    single, double = (x[0] if isinstance(x, tuple) else x for x in (single, double))
    assert 0 < distance(single, double) < 1e-5


# Input that does not fit --------------------------------------------------------------------------------------------

NAN = PIXELS.copy()
NAN[1, 2, 3, 4] = np.nan
BAD_PIXELS = {
    r"expected shape \(B, C, height, width\), found \(3, 12, 8\)": PIXELS[0],
    r"expected shape \(B, C, height, width\), found \(\)": 5,
    r"expected 3 channels as in the config, found shape \(2, 4, 12, 8\)": np.zeros((2, 4, 12, 8)),
    r"expected 3 channels as in the config, found shape \(2, 12, 8, 3\)": np.zeros((2, 12, 8, 3)),
    r"multiples of the patch size 4x4, found shape \(2, 3, 13, 8\)": np.zeros((2, 3, 13, 8)),
    r"multiples of the patch size 4x4, found shape \(2, 3, 3, 3\)": np.zeros((2, 3, 3, 3)),
    r"expected at least one image, .* found shape \(0, 3, 12, 8\)": np.zeros((0, 3, 12, 8)),
    "found NaN or infinite values; check the image": NAN,
    "found NaN or infinite values": np.full((2, 3, 12, 8), 1e300),
    r"expected numbers of shape \(B, C, height, width\): ": "cat.png",
    r"expected numbers of shape": [[1, 2], [3]],
}


@pytest.mark.parametrize("model_class", TASKS)
@pytest.mark.parametrize("message", BAD_PIXELS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_pixels_are_checked(model_class, message):
    model = make(model_class, config_for(model_class), "float32")
    with pytest.raises(ValueError, match=f"^pixel_values: .*{message}") as caught:
        model(BAD_PIXELS[message])
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("model_class", [BeitModel, BeitForMaskedImageModeling])
@pytest.mark.parametrize("mask", [MASK[:1], MASK[:, :5], MASK.reshape(2, 3, 2), True])
def test_masks_of_another_shape_are_refused(model_class, mask):
    with pytest.raises(ValueError, match=r"bool_masked_pos: expected shape \(B, P\) = \(2, 6\), one flag per patch"):
        make(model_class, config_for(model_class))(PIXELS, mask)


@pytest.mark.parametrize("model_class", [BeitModel, BeitForMaskedImageModeling])
def test_a_mask_needs_a_mask_token(model_class):
    with pytest.raises(ValueError, match="bool_masked_pos: this model has no mask token; it needs use_mask_token=True"):
        make(model_class, tiny_config())(PIXELS, MASK)


def test_segmentation_needs_four_indices():
    for changes in ({}, {"out_indices": [1, 2]}):
        with pytest.raises(ValueError, match=r"segmentation needs four out_indices, found .*base-sized models use"):
            make(BeitForSemanticSegmentation, tiny_config(**changes))


def test_segmentation_needs_two_by_two_patches():
    model = make(BeitForSemanticSegmentation, tiny_config(**SEGMENT))
    with pytest.raises(ValueError, match="segmentation needs at least 2x2 patches, found a grid of 1x2"):
        model(np.zeros((1, 3, 4, 8)))


def test_a_feature_pyramid_needs_two_by_two_patches():
    config = tiny_config(num_hidden_layers=3, out_indices=[0, 1, 2, 3], add_fpn=True)
    with pytest.raises(ValueError, match="the feature pyramid needs at least 2x2 patches, found a grid of 1x2"):
        make(BeitBackbone, config)(np.zeros((1, 3, 4, 8)))


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="auxiliary_channels must equal hidden_size 12, found 6"):
        make(BeitForSemanticSegmentation, tiny_config(**SEGMENT, auxiliary_num_convs=0))
    with pytest.raises(ValueError, match="add_fpn needs maps, so reshape_hidden_states must be true"):
        make(
            BeitBackbone,
            tiny_config(num_hidden_layers=3, out_indices=[0, 1, 2, 3], add_fpn=True, reshape_hidden_states=False),
        )


def test_options_are_checked():
    with pytest.raises(TypeError, match=r"config: expected a BeitConfig, found dict; see BeitConfig\.from_dict"):
        BeitModel({})
    with pytest.raises(ValueError, match=r"dtype: expected 'float32' or 'float64' or .*, found 'int4'"):
        BeitModel(tiny_config(), dtype="int4")
    with pytest.raises(
        ValueError, match=r"dtype: float16 is for GPUs .*, backend numpy has float32, float64, int8, bfloat16"
    ):
        BeitModel(tiny_config(), dtype="float16")
    with pytest.raises(ValueError, match="device: backend numpy runs on the CPU and has no devices, found 0"):
        BeitModel(tiny_config(), device=0)
    with pytest.raises(ValueError, match="backend: expected one of"):
        BeitModel(tiny_config(), backend="torch")


# Arrays of the caller -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", TASKS)
def test_nothing_of_the_callers_is_changed(model_class):
    config = config_for(model_class)
    weights = random_weights(config, model_class.task)
    pixels, mask = PIXELS.copy(), MASK.copy()
    for array in (*weights.values(), pixels, mask):
        array.setflags(write=False)
    model = model_class(config, arrays=weights, dtype="float64", backend="numpy")
    options = {"bool_masked_pos": mask} if model_class in (BeitModel, BeitForMaskedImageModeling) else {}
    out = model(pixels, output_hidden_states=True, output_attentions=True, **options)
    assert np.array_equal(pixels, PIXELS)
    assert np.array_equal(mask, MASK)
    fresh = random_weights(config, model_class.task)
    assert all(np.array_equal(weights[name], fresh[name]) for name in fresh)
    assert len(out.hidden_states) == config.num_hidden_layers + 1


@pytest.mark.parametrize("layout", ["strided", "fortran", "integer", "list"])
def test_any_layout_of_pixels(layout):
    model = make(BeitForImageClassification, tiny_config())
    pixels = np.round(PIXELS)
    given = {
        "strided": np.repeat(pixels, 2, axis=3)[..., ::2],
        "fortran": np.asfortranarray(pixels),
        "integer": pixels.astype(int),
        "list": pixels.tolist(),
    }[layout]
    assert np.array_equal(model(given).logits, model(pixels).logits)


def test_images_of_a_batch_do_not_mix():
    for model_class in TASKS:
        model = make(model_class, config_for(model_class))
        both, one = (model(p).to_tuple()[0] for p in (PIXELS, PIXELS[1:]))
        both, one = (x[0] if isinstance(x, tuple) else x for x in (both, one))
        assert distance(one, both[1:]) <= NAIVE_MODEL


def test_results_do_not_share_memory_with_the_next_call():
    model = make(BeitForImageClassification, tiny_config(use_relative_position_bias=True))
    first = model(PIXELS, output_attentions=True)
    kept = first.logits.copy(), first.attentions[0].copy()
    first.logits[:] = 0
    first.attentions[0][:] = 0
    again = model(PIXELS, output_attentions=True)
    assert np.array_equal(again.logits, kept[0])
    assert np.array_equal(again.attentions[0], kept[1])


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", TASKS)
def test_save_and_load(model_class, tmp_path):
    model = make(model_class, config_for(model_class, use_relative_position_bias=True), "float32")
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path, backend="numpy")
    assert again.config == model.config.replace(architectures=(model_class.__name__,))
    one, same = (m(PIXELS).to_tuple()[0] for m in (model, again))
    one, same = (x[0] if isinstance(x, tuple) else x for x in (one, same))
    assert np.array_equal(one, same)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        BeitModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        BeitModel.from_pretrained(tmp_path / "nowhere")


def test_truncated_config_is_named(tmp_path):
    make(BeitModel, tiny_config(), "float32").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 12')
    with pytest.raises(minibeit.CheckpointError, match=r"config\.json"):
        BeitModel.from_pretrained(tmp_path)


def test_truncated_weights_are_named(tmp_path):
    make(BeitModel, tiny_config(), "float32").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(minibeit.CheckpointError, match=r"model\.safetensors: .*truncated"):
        BeitModel.from_pretrained(tmp_path)


# Options of every call ------------------------------------------------------------------------------------------------


def test_threads_of_a_model_and_of_a_call():
    pytest.importorskip("numba")
    config = config_for(BeitForImageClassification)
    arrays = random_weights(config, "image_classification", dtype="float32")
    model = BeitForImageClassification(config, arrays=arrays, backend="numba", num_threads=1)
    expected = model(PIXELS).logits
    np.testing.assert_array_equal(model(PIXELS, num_threads=2).logits, expected)
    with pytest.raises(ValueError, match="num_threads must be a positive whole number, found 0"):
        model(PIXELS, num_threads=0)


def test_interpolate_pos_encoding_is_accepted_and_changes_nothing():
    model = make(BeitModel, config_for(BeitModel, use_absolute_position_embeddings=True))
    larger = RNG.standard_normal((1, 3, 20, 16))
    expected = model(larger).last_hidden_state
    np.testing.assert_array_equal(model(larger, interpolate_pos_encoding=True).last_hidden_state, expected)
