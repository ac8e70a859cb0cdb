"""BeitConfig: fields and defaults of the Hub's config.json, old spellings, refusals in one sentence."""

from __future__ import annotations

import dataclasses
import json

import pytest

from minibeit import BeitConfig, CheckpointError

BAD = {
    "hidden_size 10 is not divisible": dict(hidden_size=10),
    "hidden_size must be an integer from 1": dict(hidden_size=None),
    "hidden_size must be an integer": dict(hidden_size=768.0),
    "vocab_size must be an integer from 1": dict(vocab_size=0),
    "num_attention_heads must be an integer": dict(num_attention_heads=True),
    "num_hidden_layers must be an integer from 0": dict(num_hidden_layers=-1),
    "intermediate_size must be an integer from 1 to 131072, found 1099511627776": dict(intermediate_size=1 << 40),
    "hidden_act must be one of gelu, .* found 'softmax'": dict(hidden_act="softmax"),
    r"hidden_act must be one of .* found \['gelu'\]": dict(hidden_act=["gelu"]),
    "layer_norm_eps must be a number from 0 to 1e.06, found nan": dict(layer_norm_eps=float("nan")),
    "layer_norm_eps must be a number": dict(layer_norm_eps="1e-12"),
    "layer_scale_init_value must be a number": dict(layer_scale_init_value=None),
    "drop_path_rate must be a number from 0 to 1, found 1.5": dict(drop_path_rate=1.5),
    "hidden_dropout_prob must be a number from 0 to 1": dict(hidden_dropout_prob=-0.1),
    "image_size must be an integer from 1": dict(image_size=True),
    "image_size must be an integer or a .height, width. pair": dict(image_size=[1, 2, 3]),
    "image_size must be an integer from 1 to .*, found -1": dict(image_size=[16, -1]),
    "patch_size 16 is larger than image_size 8": dict(image_size=8),
    "gives 4096x4096 patches, more than 65536": dict(image_size=1 << 16),
    "use_mean_pooling must be true or false, found 1": dict(use_mean_pooling=1),
    "use_mask_token must be true or false, found None": dict(use_mask_token=None),
    "pool_scales must be a list of integers": dict(pool_scales=5),
    "pool_scales must be an integer from 1": dict(pool_scales=[0]),
    "out_indices must be integers from -13 to 12": dict(out_indices=[3, 5, 7, 99]),
    r"out_indices must be integers .* found \[True\]": dict(out_indices=[True]),
    "out_indices must be a list, found 5": dict(out_indices=5),
    "out_indices must rise and not repeat": dict(out_indices=[3, 3, 5, 7]),
    "out_features must be a list, found 'stem'": dict(out_features="stem"),
    "out_features names .*'stage99'.* but the stages are stem, stage1 to stage12": dict(out_features=["stage99"]),
    "out_features .* and out_indices .* name different stages": dict(out_indices=[1], out_features=["stem"]),
    "add_fpn needs exactly 4 out_indices, found .12.": dict(add_fpn=True),
    "semantic_loss_ignore_index must be an integer": dict(semantic_loss_ignore_index=1.5),
    "problem_type must be one of None, regression": dict(problem_type="ranking"),
    "model_type must be one of beit, data2vec-vision, found 'vit'": dict(model_type="vit"),
    "compat must be one of None, transformers": dict(compat="timm"),
    "feature_convention must be one of transformers, unilm": dict(feature_convention="hf"),
    "id2label must map class numbers to names": dict(id2label=["a"]),
    "id2label must map class numbers": dict(id2label={"x": "a"}),
    "label2id must be a mapping": dict(label2id=[1]),
    "num_labels must be an integer from 0": dict(num_labels=-1),
    "extra must be a mapping": dict(extra=5),
    "architectures must be a list": dict(architectures=5),
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_values_are_refused_in_a_sentence(message):
    with pytest.raises(ValueError, match=f"^config: .*{message}") as caught:
        BeitConfig.from_dict(BAD[message])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("more", [{}, {"num_labels": 3}])
def test_names_with_gaps_are_numbered(more):
    """As many outputs as names, which is how transformers counts them too."""
    with pytest.warns(UserWarning, match=r"255 'UNK' name no output, the outputs 0 are called LABEL_i"):
        c = BeitConfig.from_dict({"id2label": {"1": "BG", "2": "CA", "255": "UNK"}, "label2id": {"BG": 1}, **more})
    assert c.id2label == {0: "LABEL_0", 1: "BG", 2: "CA"} and c.label2id == {"LABEL_0": 0, "BG": 1, "CA": 2}
    assert c.num_labels == 3


def test_misspelt_keywords(tmp_path):
    """A field that is not there is refused; what a file holds beyond the fields is kept."""
    with pytest.raises(TypeError, match=r"'hiden_size' \(did you mean hidden_size\?\)"):
        BeitConfig(hiden_size=12)
    BeitConfig.from_dict({"hiden_size": 12, "made_by": 1}).save_pretrained(tmp_path)
    assert BeitConfig.from_pretrained(tmp_path).extra == {"hiden_size": 12, "made_by": 1}
    with pytest.raises(TypeError, match=r"'image_sise' \(did you mean image_size\?\)"):
        BeitConfig.from_pretrained(tmp_path, image_sise=64)
    with pytest.raises(TypeError, match="unknown keyword 'made_by'"):
        BeitConfig().replace(made_by=2)
    assert BeitConfig.from_pretrained(tmp_path, revision="main", token=None, image_size=64).image_size == 64


def test_not_a_mapping():
    with pytest.raises(ValueError, match="config: expected a mapping of settings, found list"):
        BeitConfig.from_dict([])


def test_defaults_are_the_originals():
    c = BeitConfig()
    assert (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads) == (8192, 768, 12, 12)
    assert (c.intermediate_size, c.hidden_act, c.layer_norm_eps) == (3072, "gelu", 1e-12)
    assert (c.image_size, c.patch_size, c.num_channels) == (224, 16, 3)
    assert not c.use_mask_token
    assert not c.use_relative_position_bias
    assert c.use_mean_pooling
    assert (c.layer_scale_init_value, c.drop_path_rate) == (0.1, 0.1)
    assert (c.pool_scales, c.auxiliary_channels, c.semantic_loss_ignore_index) == ((1, 2, 3, 6), 256, 255)
    assert (c.out_features, c.out_indices) == (("stage12",), (12,))
    assert (c.num_labels, c.id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
    assert (c.grid, c.head_size) == ((14, 14), 64)


def test_sizes_may_be_pairs():
    c = BeitConfig.from_dict({"image_size": [32, 48], "patch_size": [8, 16]})
    assert (c.image_shape, c.patch_shape, c.grid) == ((32, 48), (8, 16), (4, 3))
    assert BeitConfig(image_size=(32, 48)).image_size == (32, 48)


def test_old_spellings():
    c = BeitConfig.from_dict({"segmentation_indices": [3, 5, 7, 11]})
    assert c.out_indices == (3, 5, 7, 11)
    assert c.out_features == ("stage3", "stage5", "stage7", "stage11")
    newer = BeitConfig.from_dict({"segmentation_indices": [3, 5, 7, 11], "out_indices": [1]})
    assert newer.out_indices == (1,)


def test_filler_indices_of_old_configs_are_no_obstacle():
    c = BeitConfig.from_dict({"num_hidden_layers": 3, "out_indices": [3, 5, 7, 11]})
    assert (c.out_indices, c.out_features) == ((3,), ("stage3",))
    assert BeitConfig.from_dict({"out_indices": [3, 5, 7, 11]}).out_indices == (3, 5, 7, 11)


def test_negative_indices_count_from_the_end():
    c = BeitConfig(out_indices=(-3, -1))
    assert c.out_features == ("stage10", "stage12")
    assert c.out_indices == (-3, -1)


def test_labels():
    assert BeitConfig.from_dict({"num_labels": 3}).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    c = BeitConfig.from_dict({"id2label": {"1": "dog", "0": "cat"}})
    assert c.id2label == {0: "cat", 1: "dog"}
    assert c.label2id == {"cat": 0, "dog": 1}
    assert c.replace(num_labels=2).id2label == c.id2label
    assert c.replace(num_labels=3).num_labels == 3
    assert BeitConfig.from_dict({"num_labels": 0}).num_labels == 0


def test_unknown_keys_are_kept():
    c = BeitConfig.from_dict({"torch_dtype": "float32", "hidden_size": 24})
    assert c.extra == {"torch_dtype": "float32"}
    assert c.to_dict()["torch_dtype"] == "float32"
    assert BeitConfig.from_dict(c.to_dict()) == c


def test_own_fields_are_written_only_when_used():
    assert not {"compat", "feature_convention", "extra"} & set(BeitConfig().to_dict())
    c = BeitConfig(compat="transformers", feature_convention="unilm")
    assert BeitConfig.from_dict(c.to_dict()) == c


def test_save_and_load(tmp_path):
    c = BeitConfig.from_dict(
        dict(image_size=[32, 48], num_labels=3, out_indices=[0, 2], pool_scales=[1, 2], problem_type="regression", x=1)
    )
    c.save_pretrained(tmp_path / "new")
    assert BeitConfig.from_pretrained(tmp_path / "new") == c
    assert BeitConfig.from_pretrained(tmp_path / "new" / "config.json") == c
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["model_type"] == "beit"
    assert written["out_indices"] == [0, 2]


def test_loading_with_changes(tmp_path):
    BeitConfig(out_indices=(1, 2)).save_pretrained(tmp_path)
    c = BeitConfig.from_pretrained(tmp_path, num_labels=5, out_features=["stem"], layer_norm_eps=1e-6)
    assert (c.num_labels, c.out_indices, c.layer_norm_eps) == (5, (0,), 1e-6)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: there is no config\.json here; give the folder"):
        BeitConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": 768', "Expecting"),
        ("", "Expecting value"),
        ("[]", "expected a mapping of settings, found list"),
        ('{"hidden_size": 7}', "hidden_size 7 is not divisible"),
        ('{"out_indices": 5}', "out_indices must be a list"),
        ("\0\0\0", "Expecting value"),
        ("[" * 100000, "nested too deeply: more than 64 levels"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        BeitConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        BeitConfig.from_pretrained(tmp_path)


def test_frozen_and_caller_not_touched():
    given = {"pool_scales": [1, 2], "id2label": {"0": "a"}, "segmentation_indices": [1], "num_hidden_layers": 2}
    before = json.dumps(given)
    c = BeitConfig.from_dict(given)
    assert json.dumps(given) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.hidden_size = 3


def test_the_constructor_takes_what_transformers_takes():
    config = BeitConfig(num_labels=3, segmentation_indices=[1, 2, 3, 4], image_size=[32, 48], made_by="someone")
    assert config.num_labels == 3 and config.id2label[2] == "LABEL_2"
    assert config.out_indices == (1, 2, 3, 4) and config.image_shape == (32, 48)
    assert config.extra == {"made_by": "someone"} and config.to_dict()["made_by"] == "someone"
    assert BeitConfig.from_dict(config.to_dict()) == config
