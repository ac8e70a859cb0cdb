"""Checkpoints made by other software give here what they gave at home; what does not fit is named, never guessed."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import distance, random_weights, tiny_config
from safetensors.numpy import load_file as load_safetensors

import minibeit
from minibeit import CheckpointError
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.infer import infer_config
from minibeit.checkpoint.load import load_checkpoint, match_names, open_checkpoint
from minibeit.checkpoint.names import hub_names, recognise
from minibeit.checkpoint.save import save_checkpoint
from minibeit.loading_options import Loading
from minibeit.params import param_shapes

DIALECTS = Path(__file__).parent / "data" / "dialects"
CLASSES = {
    "model": minibeit.BeitModel,
    "masked_image_modeling": minibeit.BeitForMaskedImageModeling,
    "image_classification": minibeit.BeitForImageClassification,
    "semantic_segmentation": minibeit.BeitForSemanticSegmentation,
    "backbone": minibeit.BeitBackbone,
}

# file, task, naming found, config that the file cannot tell, largest relative distance from home
# (float64 on both sides but for Flax, which computes in float32: 3.3e-7 was measured there, 8e-16 elsewhere)
GOLDEN = [
    ("hub_classification", "image_classification", "hub", {}, 1e-13),
    ("hub_mim", "masked_image_modeling", "hub", {}, 1e-13),
    ("data2vec_classification", "image_classification", "hub", {}, 1e-13),
    ("data2vec_model", "model", "hub", {}, 1e-13),
    ("flax_classification", "image_classification", "flax", {}, 2e-6),
    ("flax_mim", "masked_image_modeling", "flax", {}, 2e-6),
    ("unilm_classification.pth", "image_classification", "unilm", {}, 1e-13),
    ("unilm_cls_token.pth", "image_classification", "unilm", {}, 1e-13),
    ("unilm_dit.pth", "image_classification", "unilm", {"num_attention_heads": 3}, 1e-13),
    ("unilm_plain.pth", "image_classification", "unilm", {"num_attention_heads": 3}, 1e-13),
    ("unilm_mim.pth", "masked_image_modeling", "unilm", {}, 1e-13),
    ("timm.safetensors", "image_classification", "unilm", {}, 1e-13),
]


def golden(file):
    return load_safetensors(DIALECTS / f"{file.split('.')[0]}.expected.safetensors")


def load(task, path, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*config was inferred.*")
        return CLASSES[task].from_pretrained(path, dtype="float64", backend="numpy", **more)


def computed(model, expected):
    mask = expected.get("bool_masked_pos")
    output = model(expected["pixel_values"], **({} if mask is None else {"bool_masked_pos": mask}))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("file, task, dialect, overrides, tolerance", GOLDEN)
def test_same_output_as_at_home(file, task, dialect, overrides, tolerance):
    expected = golden(file)
    checkpoint = open_checkpoint(DIALECTS / file, overrides)
    assert checkpoint.naming.dialect.name == dialect
    assert checkpoint.task == task
    assert match_names(checkpoint.tensors, checkpoint.config, task, checkpoint.naming).complete
    truth = expected.get("logits", expected.get("output"))
    assert distance(computed(load(task, DIALECTS / file, **overrides), expected), truth) < tolerance


def test_ade20k_encoder_and_pyramid_of_unilm():
    """Indices of unilm count block outputs: index i is stage i + 1 here."""
    expected = golden("unilm_backbone.pth")
    model = load("backbone", DIALECTS / "unilm_backbone.pth", out_indices=[1, 2, 3, 4])
    maps = model(expected["pixel_values"]).feature_maps
    for i, found in enumerate(maps):
        assert distance(found, expected[f"feature_maps.{i}"]) < 1e-13


def test_inferred_configs_are_stated():
    with pytest.warns(UserWarning, match=r"no config\.json .* layer_norm_eps 1e-06; a square grid of 4x4 patches"):
        config, _ = load_checkpoint(DIALECTS / "unilm_classification.pth", "image_classification")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (12, 2, 3)
    assert (config.image_size, config.patch_size, config.intermediate_size, config.num_labels) == (16, 4, 24, 5)
    assert config.layer_norm_eps == 1e-6 and config.use_mean_pooling and config.use_relative_position_bias
    plain = open_checkpoint(DIALECTS / "unilm_plain.pth")
    assert plain.config.use_absolute_position_embeddings and plain.config.layer_scale_init_value == 0
    assert any("num_attention_heads 1 (width / 64)" in note for note in plain.assumed)
    mim = open_checkpoint(DIALECTS / "unilm_mim.pth").config
    assert mim.use_shared_relative_position_bias and mim.use_mask_token and mim.vocab_size == 20
    assert not open_checkpoint(DIALECTS / "unilm_cls_token.pth").config.use_mean_pooling


def test_timm_repository(tmp_path):
    """timm's folders on the Hub have a config.json of another kind."""
    shutil.copy(DIALECTS / "timm.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "beit_base_patch16_224", "num_classes": 5}))
    expected = golden("timm.safetensors")
    assert distance(computed(load("image_classification", tmp_path), expected), expected["logits"]) < 1e-13


@pytest.mark.parametrize("count, task, name", [(1000, "image_classification", "tench, Tinca tinca"), (150, "x", None)])
def test_class_names_by_number_of_outputs(tmp_path, count, task, name):
    config = tiny_config(image_size=16, use_relative_position_bias=True, num_labels=count)
    arrays = random_weights(config, "image_classification", dtype="float32")
    names = hub_names(arrays)
    write_safetensors(tmp_path / "x.safetensors", {names[key]: value for key, value in arrays.items()})
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.config.id2label[0] == (name or "LABEL_0")
    assert ("class names of imagenet-1k" in checkpoint.assumed) == (name is not None)


# Names of mmseg by those of the Hub, written from the published file's description and not from the package's tables.
UNILM_WORDS = [
    (r"^beit\.encoder\.layer\.(\d+)\.", r"backbone.blocks.\1."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"output\.dense", "mlp.fc2"),
    (r"attention\.attention\.relative_position_bias\.", "attn."),
    (r"lambda_", "gamma_"),
    (r"^beit\.embeddings\.cls_token", "backbone.cls_token"),
    (r"^beit\.embeddings\.patch_embeddings\.projection", "backbone.patch_embed.proj"),
    (r"^fpn", "backbone.fpn"),
    (r"head\.classifier", "head.conv_seg"),
]


def as_mmseg(named):
    """The state dict of a Hub file as mmseg writes it: fused query, key and value, index buffers, counters."""
    state = {}
    for name, array in named.items():
        if ".attention.attention.key" in name:
            parts = [named[name.replace("key", part)] for part in ("query", "key", "value")]
            block = f"backbone.blocks.{name.split('.')[3]}.attn."
            state[block + "qkv.weight"] = np.concatenate(parts)
            for part in ("query", "value"):
                state[f"{block}{part[0]}_bias"] = named[name.replace("key.weight", f"{part}.bias")]
            state[block + "relative_position_index"] = np.zeros((5, 5), np.int64)
        elif ".attention.attention.query" not in name and ".attention.attention.value" not in name:
            for pattern, word in UNILM_WORDS:
                name = re.sub(pattern, word, name)
            state[name] = array
    return state


def segmentation(tmp_path):
    config = tiny_config(
        image_size=32, use_relative_position_bias=True, num_hidden_layers=6, out_indices=[1, 2, 3, 5],
        pool_scales=[1, 2, 3, 6], feature_convention="unilm", layer_norm_eps=1e-6, num_labels=2,
    )  # fmt: skip
    arrays = random_weights(config, "semantic_segmentation", dtype="float32")
    save_checkpoint(tmp_path / "hub", config, "semantic_segmentation", arrays)
    return config, arrays, as_mmseg(load_safetensors(tmp_path / "hub" / "model.safetensors"))


def test_ade20k_of_unilm(tmp_path):
    config, arrays, state = segmentation(tmp_path)
    write_safetensors(tmp_path / "ade.safetensors", state)
    with pytest.warns(UserWarning, match="feature_convention unilm"):
        found, loaded = load_checkpoint(tmp_path / "ade.safetensors", "semantic_segmentation")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert found.out_indices == (1, 2, 3, 5) and found.feature_convention == "unilm"
    assert found.replace(id2label=None, label2id=None).to_dict() == {
        **config.replace(id2label=None, label2id=None).to_dict(),
        "vocab_size": 8192,
    }


@pytest.mark.live
def test_ade20k_of_mmseg_file(tmp_path):
    torch = pytest.importorskip("torch")
    _, arrays, state = segmentation(tmp_path)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    torch.save({"state_dict": tensors, "meta": {"CLASSES": ("wall", "sky ")}, "optimizer": {}}, tmp_path / "ade.pth")
    checkpoint = open_checkpoint(tmp_path / "ade.pth")
    assert checkpoint.config.id2label == {0: "wall", 1: "sky"}
    assert match_names(checkpoint.tensors, checkpoint.config, "semantic_segmentation", checkpoint.naming).complete


def test_views_not_copies(tmp_path):
    config = tiny_config()
    arrays = random_weights(config, "model", dtype="float32")
    save_checkpoint(tmp_path, config, "model", arrays)
    _, loaded = load_checkpoint(tmp_path, "model")
    assert all(array.base is not None and not array.flags.writeable for array in loaded.values())
    with pytest.warns(UserWarning, match="inferred"):
        _, third = load_checkpoint(DIALECTS / "timm.safetensors", "image_classification")
    parts = [third[f"beit.encoder.0.attention.{part}.weight"] for part in ("query", "key", "value")]
    address = [part.__array_interface__["data"][0] for part in parts]
    assert address[1] - address[0] == address[2] - address[1] == parts[0].nbytes


def saved(tmp_path, task="image_classification", drop=(), add=(), **changes):
    config = tiny_config(**changes)
    arrays = random_weights(config, task, dtype="float32")
    names = hub_names(arrays, bare=task == "model")
    tensors = {names[key]: value for key, value in arrays.items() if key not in drop}
    tensors.update(add)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    config.save_pretrained(tmp_path)
    return config, arrays


def test_missing_unexpected_and_mismatched_are_errors(tmp_path):
    saved(tmp_path, drop=["beit.encoder.1.fc1.bias"])
    with pytest.raises(
        CheckpointError, match=r"1 tensors .* missing: beit\.encoder\.layer\.1\.intermediate\.dense\.bias"
    ):
        load_checkpoint(tmp_path, "image_classification")
    saved(tmp_path, add={"beit.encoder.layer.2.lambda_1": np.ones(12, np.float32)})
    with pytest.raises(CheckpointError, match=r"no place in the model .*: beit\.encoder\.layer\.2\.lambda_1"):
        load_checkpoint(tmp_path, "image_classification")
    saved(tmp_path, drop=["classifier.bias"])
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias"):
        load_checkpoint(tmp_path, "image_classification")
    saved(tmp_path, add={"beit.embeddings.cls_token": np.zeros((1, 1, 12), np.int32)})
    with pytest.raises(CheckpointError, match="dtype int32"):
        load_checkpoint(tmp_path, "image_classification")


def test_other_sizes_only_when_asked(tmp_path):
    _, arrays = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 7}))
    with pytest.raises(CheckpointError, match=r"classifier\.weight: expected shape \(7, 12\), found \(5, 12\)"):
        load_checkpoint(tmp_path, "image_classification")
    with pytest.warns(UserWarning, match="2 tensors of another shape are not used"):
        model = minibeit.BeitForImageClassification.from_pretrained(
            tmp_path, num_labels=7, ignore_mismatched_sizes=True, backend="numpy"
        )
    assert model.arrays["classifier.weight"].shape == (7, 12)
    np.testing.assert_array_equal(model.arrays["beit.pooler.weight"], arrays["beit.pooler.weight"])


def test_other_heads_are_left_out_with_a_warning(tmp_path):
    saved(tmp_path, "masked_image_modeling", use_mask_token=True)
    with pytest.warns(UserWarning) as caught:
        load_checkpoint(tmp_path, "model")
    text = " ".join(str(warning.message) for warning in caught)
    assert "beit.pooler.layernorm.weight" in text and "lm_head.weight" in text and "layernorm.bias" in text


def test_norms_of_the_same_name(tmp_path):
    """Top-level `layernorm` is that of masked image modelling, unless the file has the encoder alone."""
    _, arrays = saved(tmp_path, "masked_image_modeling", use_mean_pooling=False)
    _, loaded = load_checkpoint(tmp_path, "masked_image_modeling")
    for name in ("norm.weight", "beit.norm.weight"):
        np.testing.assert_array_equal(loaded[name], arrays[name])

    _, arrays = saved(tmp_path, "model", use_mean_pooling=False)
    with pytest.warns(UserWarning, match="norm.weight"):
        _, loaded = load_checkpoint(tmp_path, "masked_image_modeling")
    np.testing.assert_array_equal(loaded["beit.norm.weight"], arrays["beit.norm.weight"])
    np.testing.assert_array_equal(loaded["norm.weight"], 1)


def test_what_is_no_beit(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"bert.encoder.weight": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"no patch embedding .* \(bert\.encoder\.weight"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="dialect: expected one of"):
        open_checkpoint(DIALECTS / "timm.safetensors", loading=Loading(dialect="keras"))
    with pytest.raises(CheckpointError, match="of dialect 'flax'"):
        open_checkpoint(DIALECTS / "timm.safetensors", loading=Loading(dialect="flax"))


def test_wrapped_names(tmp_path):
    """DataParallel and Lightning put a word before every name."""
    config = tiny_config()
    arrays = random_weights(config, "image_classification", dtype="float32")
    names = hub_names(arrays)
    write_safetensors(tmp_path / "model.safetensors", {f"module.{names[key]}": value for key, value in arrays.items()})
    config.save_pretrained(tmp_path)
    _, loaded = load_checkpoint(tmp_path, "image_classification")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_imagenet_22k_config_with_gaps(tmp_path):
    """The published configs number 21,841 names 0 ... 21,842 with two gaps."""
    names = {str(i): f"n{i}" for i in range(21843) if i not in (9205, 15027)}
    config = tiny_config(num_labels=21841)
    values = {**config.to_dict(), "id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    arrays = random_weights(config, "image_classification", dtype="float32")
    save_checkpoint(tmp_path, config, "image_classification", arrays)
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = open_checkpoint(tmp_path).config
    assert found.num_labels == 21841
    assert [found.id2label[i] for i in (0, 9204, 9205, 15025, 15026, 21840)] == [
        "n0", "n9204", "n9206", "n15026", "n15028", "n21842"
    ]  # fmt: skip
    assert found.label2id["n21842"] == 21840


def test_grids_that_cannot_be_square():
    class Shapes(dict):
        def info(self, name):
            return type("Info", (), {"shape": self[name], "dtype": "float32"})

    config = tiny_config(use_relative_position_bias=True)
    names = hub_names(param_shapes(config, "model"), bare=True)
    shapes = Shapes({names[name]: shape for name, shape in param_shapes(config, "model").items()})
    naming = recognise(shapes)
    with pytest.raises(CheckpointError, match="a position bias table of 18 rows fit no square grid"):
        infer_config(shapes, naming)
    assert infer_config(shapes, naming, image_size=(12, 8)).config.grid == (3, 2)


def test_random_shapes_give_one_sentence(rng):
    """A stranger's file may claim any shape for any name: a config or a CheckpointError, nothing else."""

    class Shapes(dict):
        def info(self, name):
            return type("Info", (), {"shape": self[name], "dtype": "float32"})

    outcomes = set()
    sources = [
        open_checkpoint(DIALECTS / file).tensors for file in ("timm.safetensors", "unilm_mim.pth", "unilm_dit.pth")
    ]
    for round in range(600):
        source = sources[round % 3]
        shapes = Shapes({name: source.info(name).shape for name in source})
        for name in rng.choice(sorted(shapes), 3):
            shapes[name] = tuple(int(n) for n in rng.choice([0, 1, 2, 3, 5, 12, 36, 732, 1 << 40], rng.integers(0, 5)))
        for name in rng.choice(sorted(shapes), rng.integers(0, 2)):
            del shapes[name]
        try:
            naming = recognise(shapes)
            inferred = infer_config(shapes, naming)
            match_names(shapes, inferred.config, inferred.task, naming)
            outcomes.add("config")
        except CheckpointError as error:
            outcomes.add("error")
            assert "\n" not in str(error)
    assert outcomes == {"config", "error"}
