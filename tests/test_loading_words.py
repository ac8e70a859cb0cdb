"""The keywords of from_pretrained: every one acts or is refused, and models and processors take the same."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from conftest import distance, random_weights, tiny_config

from minibeit import BeitConfig, BeitForImageClassification, BeitImageProcessor, CheckpointError
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.load import open_checkpoint
from minibeit.checkpoint.names import hub_names
from minibeit.checkpoint.save import save_checkpoint
from minibeit.images.types import DEFAULTS

CONFIG = tiny_config(image_size=8, use_relative_position_bias=True)


def made(folder, seed, config=CONFIG):
    arrays = random_weights(config, "image_classification", dtype="float32", seed=seed)
    save_checkpoint(folder, config, "image_classification", arrays)
    return arrays


def classifier(folder, **keywords):
    return BeitForImageClassification.from_pretrained(folder, **keywords).arrays["classifier.weight"]


@pytest.mark.parametrize(
    "keyword, near",
    [
        ({"bakend": "numpy"}, "backend"),
        ({"num_thread": 1}, "num_threads"),
        ({"dtyp": "float64"}, "dtype"),
        ({"sub_folder": "x"}, "subfolder"),
        ({"num_label": 3}, "num_labels"),
        ({"hidden_sise": 12}, "hidden_size"),
        ({"torch_dtype": "float32"}, "here it is called dtype"),
        ({"output_hidden_states": True}, r"give it to the call: model\(pixel_values, output_hidden_states=True\)"),
        ({"zzz": 1}, "it takes .*backend.*hidden_size.*subfolder"),
    ],
)
def test_unknown_keywords_name_the_nearest(tmp_path, keyword, near):
    made(tmp_path, 0)
    with pytest.raises(TypeError, match=f"unknown keyword '{next(iter(keyword))}'.*{near}"):
        BeitForImageClassification.from_pretrained(tmp_path, **keyword)


def test_what_is_always_so_is_accepted(tmp_path):
    made(tmp_path, 0)
    BeitForImageClassification.from_pretrained(tmp_path, low_cpu_mem_usage=True, trust_remote_code=False)
    with pytest.raises(TypeError, match="unknown keyword 'trust_remote_code'"):
        BeitForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)


def test_what_a_file_holds_beyond_the_fields_is_kept(tmp_path):
    made(tmp_path, 0)
    values = {**CONFIG.to_dict(), "bakend": 1, "transformers_version": "5"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert BeitForImageClassification.from_pretrained(tmp_path).config.extra == {
        "bakend": 1,
        "transformers_version": "5",
    }


def test_subfolder(tmp_path):
    """Once it was ignored, and the model of the folder above came back."""
    outer, inner = made(tmp_path, 0), made(tmp_path / "runs" / "last", 1)
    BeitImageProcessor(size=32).save_pretrained(tmp_path)
    BeitImageProcessor(size=48).save_pretrained(tmp_path / "runs" / "last")
    np.testing.assert_array_equal(classifier(tmp_path), outer["classifier.weight"])
    np.testing.assert_array_equal(classifier(tmp_path, subfolder="runs/last"), inner["classifier.weight"])
    assert BeitImageProcessor.from_pretrained(tmp_path, subfolder="runs/last").size["height"] == 48
    assert BeitConfig.from_pretrained(tmp_path, subfolder="runs/last") == CONFIG
    for load in (BeitForImageClassification, BeitImageProcessor, BeitConfig):
        with pytest.raises(FileNotFoundError, match="has no folder 'gone'"):
            load.from_pretrained(tmp_path, subfolder="gone")
        with pytest.raises(ValueError, match="subfolder: expected a folder within"):
            load.from_pretrained(tmp_path, subfolder="../x")


def test_variant_and_kind(tmp_path):
    plain, half = made(tmp_path, 0), made(tmp_path / "half", 1)
    (tmp_path / "half" / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    np.testing.assert_array_equal(classifier(tmp_path), plain["classifier.weight"])
    np.testing.assert_array_equal(classifier(tmp_path, variant="fp16"), half["classifier.weight"])
    with pytest.raises(FileNotFoundError, match=r"looked for model\.bf16\.safetensors, .*there are model\.fp16"):
        classifier(tmp_path, variant="bf16")
    with pytest.raises(FileNotFoundError, match=r"looked for pytorch_model\.bin, pytorch_model\.bin\.index\.json"):
        classifier(tmp_path, use_safetensors=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"variant= for model\.VARIANT\.safetensors"):
        classifier(tmp_path)
    with pytest.raises(ValueError, match="variant: expected a word"):
        classifier(tmp_path, variant="../x")


def test_variant_of_shards(tmp_path):
    arrays = made(tmp_path, 0)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(hub_names(arrays).values(), "model.fp16-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(classifier(tmp_path, variant="fp16"), arrays["classifier.weight"])


def test_processors_take_the_words_of_models(tmp_path):
    BeitImageProcessor(size=32).save_pretrained(tmp_path)
    words = dict(
        revision="main", token=None, cache_dir="x", local_files_only=True, force_download=False, use_fast=False
    )
    assert BeitImageProcessor.from_pretrained(tmp_path, size=40, **words).size["height"] == 40
    with pytest.raises(TypeError, match=r"'revison' \(did you mean revision\?\)"):
        BeitImageProcessor.from_pretrained(tmp_path, revison="main")


# Several weights in one file ------------------------------------------------------------------------------------------


def prefixed(arrays, prefix=""):
    return {prefix + name: arrays[ours] for ours, name in hub_names(arrays).items()}


def test_weights_and_their_average_under_prefixes(tmp_path):
    """Lightning keeps both in one state dict, the average first or last."""
    one, two = (random_weights(CONFIG, "image_classification", dtype="float32", seed=seed) for seed in (0, 1))
    CONFIG.save_pretrained(tmp_path)
    for tensors in (
        {**prefixed(one, "model."), **prefixed(two, "ema_model.")},
        {**prefixed(two, "ema_model."), **prefixed(one, "model.")},
    ):
        write_safetensors(tmp_path / "model.safetensors", tensors)
        with pytest.warns(
            UserWarning, match=r"under 'model.beit' were loaded, not those under 'ema_model.beit.'.*ema'"
        ):
            np.testing.assert_array_equal(classifier(tmp_path), one["classifier.weight"])
        for word in ("ema", "ema_model.beit"):
            with pytest.warns(UserWarning, match="several sets of weights"):
                np.testing.assert_array_equal(classifier(tmp_path, weights=word), two["classifier.weight"])
    with pytest.raises(CheckpointError, match="has no weights 'teacher'; those there have the prefix"):
        classifier(tmp_path, weights="teacher")
    assert len(open_checkpoint(tmp_path).others) == 1


@pytest.mark.live
@pytest.mark.parametrize("keys", [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net.student", "net.ema")])
def test_weights_and_their_average_under_keys(tmp_path, keys):
    torch = pytest.importorskip("torch")
    one, two = (random_weights(CONFIG, "image_classification", dtype="float32", seed=seed) for seed in (0, 1))
    root = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "best": torch.tensor(0.5)}
    for key, arrays in zip(reversed(keys), (two, one)):
        at = root
        for word in key.split(".")[:-1]:
            at = at.setdefault(word, {})
        at[key.split(".")[-1]] = {name: torch.from_numpy(array.copy()) for name, array in prefixed(arrays).items()}
    torch.save(root, tmp_path / "pytorch_model.bin")
    CONFIG.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"those under '{keys[0]}' were loaded, not those under '{keys[1]}'"):
        np.testing.assert_array_equal(classifier(tmp_path), one["classifier.weight"])
    for word, arrays in (("ema", two), ("model", one), (keys[1], two), (keys[0], one)):
        with pytest.warns(UserWarning, match="several sets of weights"):
            np.testing.assert_array_equal(classifier(tmp_path, weights=word), arrays["classifier.weight"])
    with pytest.raises(CheckpointError, match=f"no weights 'x'; there are those under '{keys[1]}', '{keys[0]}'"):
        classifier(tmp_path, weights="x")


@pytest.mark.live
def test_the_average_of_mmengine_is_the_state_dict(tmp_path):
    """Its hook changes the two places before it saves, so that the average is what everybody loads."""
    torch = pytest.importorskip("torch")
    average, plain = (random_weights(CONFIG, "image_classification", dtype="float32", seed=seed) for seed in (0, 1))
    root = {"message_hub": {}, "state_dict": prefixed(average), "ema_state_dict": prefixed(plain, "module.")}
    for key in ("state_dict", "ema_state_dict"):
        root[key] = {name: torch.from_numpy(array.copy()) for name, array in root[key].items()}
    torch.save(root, tmp_path / "pytorch_model.bin")
    CONFIG.save_pretrained(tmp_path)
    for words, arrays in (({}, average), ({"weights": "ema"}, average), ({"weights": "model"}, plain)):
        with pytest.warns(UserWarning, match="several sets of weights"):
            np.testing.assert_array_equal(classifier(tmp_path, **words), arrays["classifier.weight"])


def test_one_set_of_weights_is_taken_whatever_it_is_called(tmp_path):
    arrays = random_weights(CONFIG, "image_classification", dtype="float32", seed=0)
    CONFIG.save_pretrained(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", prefixed(arrays, "ema_model."))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(classifier(tmp_path), arrays["classifier.weight"])


# Processors of other types --------------------------------------------------------------------------------------------

FILES = [
    {"image_processor_type": "ViTImageProcessor"},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 30, "do_resize": True},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 30, "resample": 2, "image_mean": [0.4] * 3},
    {"feature_extractor_type": "SegformerFeatureExtractor", "size": 40, "reduce_labels": True},
    {"image_processor_type": "SegformerImageProcessor", "size": {"height": 20, "width": 40}},
    {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 40, "crop_pct": 0.9},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 50}},
    {"feature_extractor_type": "DeiTFeatureExtractor", "size": 50, "crop_size": 40},
    {"image_processor_type": "DPTImageProcessor", "size": 30},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 40, "crop_size": 32},
    {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 56},
    {"image_processor_type": "PvtImageProcessor", "size": 30},
    {"image_processor_type": "SiglipImageProcessor", "size": 30},
    {"image_processor_type": "BitImageProcessor", "size": 40, "crop_size": 30},
    {"image_processor_type": "FlavaImageProcessor", "size": 40, "crop_size": 30},
]


@pytest.mark.live
@pytest.mark.parametrize("values", FILES, ids=lambda v: "-".join(map(str, v.values()))[:40])
def test_files_of_other_types(values, rng, tmp_path):
    """The pixels of transformers' own processor of that type, bit for bit but for its order of arithmetic."""
    transformers = pytest.importorskip("transformers")
    values = {"image_mean": [0.3, 0.4, 0.5], **values} if "Segformer" in str(values) else values
    name = next(v for k, v in values.items() if k.endswith("_type")).replace("FeatureExtractor", "ImageProcessor")
    theirs = getattr(transformers, name + "Pil").from_dict(values)
    picture = rng.integers(0, 256, (47, 61, 3), dtype=np.uint8)
    expected = theirs(picture, return_tensors="np")["pixel_values"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = BeitImageProcessor.from_dict(values)
    found = ours(picture)["pixel_values"]
    assert found.shape == expected.shape
    assert distance(found, expected) < 1e-6
    ours.save_pretrained(tmp_path)
    np.testing.assert_array_equal(BeitImageProcessor.from_pretrained(tmp_path)(picture)["pixel_values"], found)


@pytest.mark.live
def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for kind, defaults in DEFAULTS.items():
        theirs = getattr(transformers, f"{kind}ImageProcessorPil")().to_dict()
        for name, value in defaults.items():
            if name in theirs:
                own = theirs[name]
                value = {"height": value, "width": value} if name.endswith("size") and isinstance(value, int) else value
                assert (tuple(own) if isinstance(value, tuple) else own) == value, (kind, name)


def test_steps_that_are_not_here_are_refused(tmp_path):
    with pytest.raises(ValueError, match="DPTImageProcessor with keep_aspect_ratio"):
        BeitImageProcessor.from_dict({"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True})
    with pytest.warns(UserWarning, match="settings of a Detr image processor"):
        BeitImageProcessor.from_dict({"image_processor_type": "DetrImageProcessor"})


# What fine-tuning changes ---------------------------------------------------------------------------------------------


def test_another_number_of_outputs_draws_the_head_anew(tmp_path):
    arrays = made(tmp_path, 0)
    with pytest.warns(UserWarning, match="2 tensors of another shape are not used, their parameters start with random"):
        model = BeitForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert model.arrays["classifier.weight"].shape == (7, 12) and model.config.num_labels == 7
    np.testing.assert_array_equal(model.arrays["beit.pooler.weight"], arrays["beit.pooler.weight"])
    with pytest.raises(CheckpointError, match="expected shape"):  # only a head may change its size
        BeitForImageClassification.from_pretrained(tmp_path, num_labels=7, intermediate_size=28)


def test_another_image_size_resizes_tables(tmp_path):
    config = tiny_config(image_size=16, use_relative_position_bias=True, use_absolute_position_embeddings=True)
    arrays = made(tmp_path, 0, config)
    from minibeit.checkpoint.resize import resize_arrays

    for keywords, method in (({}, "unilm"), ({"resize_method": "timm"}, "timm")):
        with pytest.warns(UserWarning, match=f"3 position tensors were resized to 24x24 by method '{method}'"):
            model = BeitForImageClassification.from_pretrained(tmp_path, image_size=24, **keywords)
        changed, expected = resize_arrays(arrays, config, 24, method)
        assert model.config.image_size == 24 and model.config == changed
        for name, array in expected.items():
            np.testing.assert_array_equal(model.arrays[name], array)
    with pytest.warns(UserWarning, match="resized to 16x24 by method 'timm'"):
        BeitForImageClassification.from_pretrained(tmp_path, image_size=(16, 24))
    with pytest.raises(ValueError, match="resize_method: expected one of unilm, timm, transformers"):
        BeitForImageClassification.from_pretrained(tmp_path, image_size=24, resize_method="x")


def test_another_image_size_of_a_file_without_config(tmp_path):
    config = tiny_config(image_size=16, use_relative_position_bias=True)
    arrays = random_weights(config, "image_classification", dtype="float32", seed=0)
    write_safetensors(tmp_path / "x.safetensors", prefixed(arrays))
    with pytest.warns(UserWarning, match="2 position tensors were resized to 24x24"):
        model = BeitForImageClassification.from_pretrained(tmp_path / "x.safetensors", image_size=24)
    assert model.config.image_size == 24


def test_no_position_is_nothing_to_resize(tmp_path):
    made(tmp_path, 0, tiny_config(image_size=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BeitForImageClassification.from_pretrained(tmp_path, image_size=24).config.image_size == 24


def test_a_shared_table_becomes_that_of_each_block(tmp_path):
    config = tiny_config(image_size=16, use_shared_relative_position_bias=True, use_mask_token=True)
    arrays = random_weights(config, "masked_image_modeling", dtype="float32", seed=0)
    save_checkpoint(tmp_path, config, "masked_image_modeling", arrays)
    keywords = dict(use_relative_position_bias=True, use_shared_relative_position_bias=False)
    with pytest.warns(UserWarning, match="table that all blocks share was copied to each of the 2 blocks"):
        model = BeitForImageClassification.from_pretrained(tmp_path, num_labels=3, **keywords)
    for i in range(2):
        np.testing.assert_array_equal(model.arrays[f"beit.encoder.{i}.bias_table"], arrays["beit.shared_bias_table"])
    with pytest.warns(UserWarning, match="2 position tensors were resized to 24x24"):
        BeitForImageClassification.from_pretrained(tmp_path, image_size=24, **keywords)


def test_no_head_at_all(tmp_path):
    made(tmp_path, 0)
    with pytest.warns(UserWarning, match="2 tensors .*not used: classifier"):
        model = BeitForImageClassification.from_pretrained(tmp_path, num_labels=0)
    assert model.params.classifier is None and model.config.num_labels == 0


@pytest.mark.parametrize("where", ["label_names", "pretrained_cfg"])
def test_what_timms_config_says(tmp_path, where):
    """Heads that no table shows, an image size that nothing in the file shows, names of classes."""
    config = tiny_config(image_size=16, num_labels=3, layer_norm_eps=1e-6)  # three heads, no position at all
    arrays = random_weights(config, "image_classification", dtype="float32", seed=0)
    write_safetensors(tmp_path / "model.safetensors", prefixed(arrays))
    names = ["cat", "dog", "cow"]
    said = {
        "architecture": "beit_base_patch16_224",
        "num_classes": 3,
        "model_args": {"num_heads": 3, "img_size": [16, 16]},
    }
    more = {"label_names": names} if where == "label_names" else {"pretrained_cfg": {"label_names": names}}
    (tmp_path / "config.json").write_text(json.dumps({**said, **more}))
    found = open_checkpoint(tmp_path).config
    assert (found.num_attention_heads, found.image_shape) == (3, (16, 16))
    assert found.id2label == {0: "cat", 1: "dog", 2: "cow"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "beit_tiny"}))
    with pytest.warns(UserWarning, match=r"num_attention_heads 1 \(width / 64\)"):
        BeitForImageClassification.from_pretrained(tmp_path)
