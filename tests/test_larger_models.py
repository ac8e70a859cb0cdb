"""Encoders in files of other projects, beside other parts and under other names: found, and the rest is listed."""

from __future__ import annotations

import datetime
import pathlib
import random
import re
import warnings

import numpy as np
import pytest
from conftest import distance, random_weights, tiny_config
from test_load import DIALECTS, computed, golden, segmentation

from minibeit import (
    BeitBackbone,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
    CheckpointError,
)
from minibeit.checkpoint.formats import load_file, write_safetensors
from minibeit.checkpoint.load import load_checkpoint, open_checkpoint
from minibeit.checkpoint.names import hub_names

# OpenMMLab's names by unilm's, from reading mmpretrain's and mmsegmentation's modules and not from the package's table.
OPENMMLAB_WORDS = [
    (r"^(backbone\.)?", ""),
    (r"^(cls_token|mask_token|pos_embed|patch_embed|rel_pos_bias|blocks|norm|fc_norm)\b", r"backbone.\1"),
    (r"backbone\.blocks\.(\d+)\.norm(\d)", r"backbone.blocks.\1.ln\2"),
    (r"^backbone\.blocks", "backbone.layers"),
    (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"),
    (r"patch_embed\.proj\b", "patch_embed.projection"),
    (r"^backbone\.norm", "backbone.ln1"),
    (r"^backbone\.fc_norm", "backbone.ln2"),
    (r"^head\.", "head.fc."),
    (r"^lm_head", "head.cls_head"),
    (r"^fpn1", "neck.upsample_4x"),
    (r"^fpn2", "neck.upsample_2x"),
]


def as_openmmlab(state):
    renamed = {}
    for name, array in state.items():
        for pattern, word in OPENMMLAB_WORDS:
            name = re.sub(pattern, word, name)
        renamed[name] = array
    return renamed


def unilm(file):
    tensors = load_file(DIALECTS / file).tensors
    return {name: np.array(tensors[name]) for name in tensors}


def load(model, path, expect="config was inferred", **more):
    """The model, and all warnings but that of an inferred config."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = model.from_pretrained(path, dtype="float64", backend="numpy", **more)
    return made, " ".join(str(w.message) for w in caught if expect not in str(w.message))


@pytest.mark.parametrize(
    "file, model",
    [
        ("unilm_classification.pth", BeitForImageClassification),
        ("unilm_cls_token.pth", BeitForImageClassification),
        ("unilm_mim.pth", BeitForMaskedImageModeling),
    ],
)
def test_mmpretrain(tmp_path, file, model):
    expected = golden(file)
    write_safetensors(tmp_path / "x.safetensors", as_openmmlab(unilm(file)))
    assert open_checkpoint(tmp_path / "x.safetensors").naming.dialect.name == "openmmlab"
    made, said = load(model, tmp_path / "x.safetensors")
    assert not said
    assert distance(computed(made, expected), expected.get("logits", expected.get("output"))) < 1e-13


def test_mmsegmentation(tmp_path):
    _, arrays, state = segmentation(tmp_path)
    renamed = as_openmmlab(state)
    assert {"neck.upsample_4x.3.weight", "neck.upsample_2x.0.bias", "backbone.layers.0.ffn.layers.0.0.weight"} < set(
        renamed
    )
    assert not any("blocks" in name or name.startswith("fpn") for name in renamed)
    write_safetensors(tmp_path / "x.safetensors", renamed)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.task == "semantic_segmentation" and checkpoint.config.feature_convention == "unilm"
    made, said = load(BeitForSemanticSegmentation, tmp_path / "x.safetensors")
    assert not said
    for name, array in arrays.items():
        np.testing.assert_array_equal(made.arrays[name], array)


def test_pre_training_file_of_beit_v2(tmp_path):
    """Its layers between the last block and the second head have no part in the model that is used afterwards."""
    expected, state = golden("unilm_mim.pth"), unilm("unilm_mim.pth")
    extra = {name.replace("blocks.0", f"cls_pt_layers.{i}"): array
             for name, array in state.items() if name.startswith("blocks.0") for i in range(2)}  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", {**state, **extra})
    made, said = load(BeitForMaskedImageModeling, tmp_path / "x.safetensors")
    assert re.search(r"\d+ tensors do not belong to the model and are not used: cls_pt_layers\.0\.", said)
    assert distance(computed(made, expected), expected.get("logits", expected.get("output"))) < 1e-13


LARGER = [
    ("backbone.", ["backbone.interactions.0.injector.gamma", "backbone.spm.stem.0.weight", "backbone.level_embed",
                   "backbone.norm1.weight", "decode_head.query_embed.weight"]),
    ("pretrained.model.", ["pretrained.act_postprocess1.0.project.0.weight", "scratch.refinenet1.out_conv.weight",
                           "scratch.output_conv.0.bias"]),
    ("model.", ["criterion.weight", "total_ops", "n_averaged", "second_head.weight"]),
    ("", ["criterion.weight", "decoder.norm.weight"]),
]  # fmt: skip


@pytest.mark.parametrize("prefix, beside", LARGER)
def test_encoder_inside_a_larger_model(tmp_path, prefix, beside):
    """ViT-Adapter, MiDaS and DPT, Lightning with a loss of its own, a bare state dict."""
    state = {prefix + name: array for name, array in unilm("unilm_classification.pth").items()}
    write_safetensors(tmp_path / "x.safetensors", {**state, **{name: np.ones(2, np.float32) for name in beside}})
    expected = golden("unilm_classification.pth")
    made, said = load(BeitModel, tmp_path / "x.safetensors")
    for name in beside:
        assert name in said
    found, alone = made(expected["pixel_values"]), load(BeitModel, DIALECTS / "unilm_classification.pth")[0]
    np.testing.assert_array_equal(found.pooler_output, alone(expected["pixel_values"]).pooler_output)


@pytest.mark.parametrize(
    "name",
    ["blocks.0.attn.q_norm.weight", "blocks.2.norm1.weight", "patch_embed.norm.weight", "pos_embed", "head.2.weight"],
)
def test_extras_within_the_encoder_or_its_head_are_errors(tmp_path, name):
    state = {**unilm("unilm_classification.pth"), name: np.ones(2, np.float32)}
    write_safetensors(tmp_path / "x.safetensors", state)
    config = open_checkpoint(DIALECTS / "unilm_classification.pth").config
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"1 tensors have no place in the model .*{name}"):
        load_checkpoint(tmp_path / "x.safetensors", "image_classification")


CONFIG = tiny_config(image_size=8, use_relative_position_bias=True)


def hub_state(seed=0):
    arrays = random_weights(CONFIG, "image_classification", dtype="float32", seed=seed)
    return arrays, {theirs: arrays[ours] for ours, theirs in hub_names(arrays).items()}


@pytest.mark.parametrize("words", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("place", ["beit.", "beit.encoder.layer.0.", "beit.encoder.layer.1.attention.", ""])
def test_words_of_wrappers_anywhere(tmp_path, words, place):
    arrays, state = hub_state()
    state = {place + words + name[len(place) :] if name.startswith(place) else name: a for name, a in state.items()}
    write_safetensors(tmp_path / "model.safetensors", state)
    CONFIG.save_pretrained(tmp_path)
    _, loaded = load_checkpoint(tmp_path, "image_classification")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


class HistoryBuffer:
    """Stands for a class that minibeit does not know, with arrays inside, as mmengine's training log has."""

    def __init__(self):
        self._log, self._n = np.arange(5.0), np.array([1, 2], ">i4")
        self.fields = {("loss", 3): pathlib.PurePosixPath("/x")}


class Words(dict):
    pass


BESIDE = {
    "loss": [random.Random(0).random() for _ in range(160_000)],
    "rng": (np.random.RandomState(0).get_state(), random.Random(0).getstate()),
    "path": pathlib.Path("/tmp/x"),
    "when": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
    "kinds": {("a", 1): np.float32(2), 3: np.str_("x"), np.dtype("O").name: np.datetime64("2024-01-01")},
    "history": HistoryBuffer(),
    "words": Words(a=Words(b=1)),
    "set": {frozenset([1]), (1, 2)},
    "array": np.array(["a", None], object),
    "complex": 1j,
    "range": range(3),
    "best": None,
}  # fmt: skip


@pytest.mark.live
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_leaves_beside_the_weights(tmp_path, protocol, legacy):
    torch = pytest.importorskip("torch")
    arrays, state = hub_state()
    root = {
        "epoch": 5,
        "best_acc1": torch.tensor(0.9),
        **BESIDE,
        "state_dict": {k: torch.tensor(v) for k, v in state.items()},
    }
    torch.save(
        root, tmp_path / "pytorch_model.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
    )
    CONFIG.save_pretrained(tmp_path)
    _, loaded = load_checkpoint(tmp_path, "image_classification")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.live
@pytest.mark.parametrize("key", ["net", "generator_weights", "state.model", "student"])
def test_the_wrapper_may_have_any_name(tmp_path, key):
    torch = pytest.importorskip("torch")
    arrays, state = hub_state()
    inner = {name: torch.tensor(array) for name, array in state.items()}
    for word in reversed(key.split(".")):
        inner = {word: inner, "scale": torch.ones(1)}
    torch.save(inner, tmp_path / "pytorch_model.bin")
    CONFIG.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).loaded.wrapper == key
    _, loaded = load_checkpoint(tmp_path, "image_classification")
    np.testing.assert_array_equal(loaded["classifier.weight"], arrays["classifier.weight"])


@pytest.mark.live
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_weights_as_arrays_of_numpy(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    arrays, state = hub_state()
    state = {name: np.asfortranarray(array) if array.ndim == 2 else array for name, array in state.items()}
    torch.save({"model": state}, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    CONFIG.save_pretrained(tmp_path)
    _, loaded = load_checkpoint(tmp_path, "image_classification")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.live
def test_a_weight_that_needs_code_is_missed(tmp_path):
    """A stand-in where a weight should be is no weight."""
    torch = pytest.importorskip("torch")
    _, state = hub_state()
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    torch.save({**tensors, "classifier.weight": HistoryBuffer()}, tmp_path / "pytorch_model.bin")
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 tensors that the config asks for are missing: classifier\.weight"):
        load_checkpoint(tmp_path, "image_classification")


@pytest.mark.parametrize(
    "more, match",
    [
        (
            {"beit.encoder.layer.0.output.dense.weight.absmax": np.ones(3, np.float32)},
            "quantised .*quantization_config",
        ),
        ({"beit.encoder.layer.0.output.dense.SCB": np.ones(3, np.float32)}, "weights are quantised"),
        ({"beit.encoder.layer.0.output.dense.lora_A.default.weight": np.ones(3, np.float32)}, "LoRA adapter"),
    ],
)
def test_what_is_no_plain_weight_is_said(tmp_path, more, match):
    _, state = hub_state()
    write_safetensors(tmp_path / "model.safetensors", {**state, **more})
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tmp_path, "image_classification")


def test_backbone_of_a_segmentation_file_needs_no_head(tmp_path):
    _, arrays, state = segmentation(tmp_path)
    write_safetensors(tmp_path / "x.safetensors", as_openmmlab(state))
    made, said = load(BeitBackbone, tmp_path / "x.safetensors")
    assert "tensors of another task's head are not used: " in said and "decode_head" in said
    np.testing.assert_array_equal(made.arrays["beit.embeddings.cls_token"], arrays["beit.embeddings.cls_token"])
