"""Prepared files: the same bits as a model that packs its weights itself, and a sentence for every misuse."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

pytest.importorskip("numba")

import minibeit
from minibeit import BeitConfig
from minibeit.checkpoint.formats import load_file, write_safetensors
from minibeit.checkpoint.load import open_checkpoint
from minibeit.cli import main
from minibeit.errors import CheckpointError

TINY = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "use_relative_position_bias": True, "vocab_size": 50, "use_mask_token": True, "num_labels": 7,
    "out_indices": [1, 2, 3, 4],
}  # fmt: skip
CLASSES = {
    "BeitForImageClassification": "logits",
    "BeitForMaskedImageModeling": "logits",
    "BeitForSemanticSegmentation": "logits",
    "BeitModel": "last_hidden_state",
}


def made(name="BeitForImageClassification", **changes):
    return getattr(minibeit, name)(BeitConfig.from_dict({**TINY, **changes}), seed=3, backend="numba")


def pixels():
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 60, "use_shared_relative_position_bias": True}])
def test_a_prepared_model_gives_the_same_bits(name, changes, tmp_path):
    model = made(name, **changes)
    model.save_prepared(tmp_path)
    again = getattr(minibeit, name).from_pretrained(tmp_path, backend="numba")
    field = CLASSES[name]
    assert np.array_equal(getattr(again(pixels()), field), getattr(model(pixels()), field))
    assert again.num_parameters() == model.num_parameters()


def test_weights_are_views_of_the_file_on_cache_lines(tmp_path):
    made().save_prepared(tmp_path)
    block = minibeit.BeitForImageClassification.from_pretrained(tmp_path, backend="numba").params.beit.encoder[0]
    for panels in (block.fc1.panels, block.attention.qkv.panels):
        assert not panels.flags.writeable and not panels.flags.owndata and panels.ctypes.data % 64 == 0


def test_another_program_may_have_written_the_file_anew(tmp_path):
    """Then arrays lie anywhere: they are copied to where vectors do not straddle cache lines."""
    model = made()
    model.save_prepared(tmp_path)
    loaded = load_file(tmp_path / "prepared.safetensors")
    arrays = {name: np.array(loaded.tensors[name]) for name in loaded.tensors}
    write_safetensors(tmp_path / "prepared.safetensors", arrays, {**loaded.metadata, "padding": "x"})
    again = minibeit.BeitForImageClassification.from_pretrained(tmp_path, backend="numba")
    assert again.params.beit.encoder[0].fc1.panels.ctypes.data % 64 == 0
    assert np.array_equal(again(pixels()).logits, model(pixels()).logits)


def test_features_come_from_a_prepared_model_of_another_task(tmp_path):
    model = made()
    model.save_prepared(tmp_path)
    options = {"out_indices": (2,), "add_fpn": False, "reshape_hidden_states": False}
    backbone = minibeit.BeitBackbone.from_pretrained(tmp_path, backend="numba", **options)
    expected = model(pixels(), output_hidden_states=True).hidden_states[2]
    assert np.array_equal(backbone(pixels()).feature_maps[0], expected)


def test_convert_prepares_and_classify_reads_it(tmp_path, capsys):
    made().save_pretrained(tmp_path / "plain")
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "fast"), "--prepared"]) == 0
    assert {file.name for file in (tmp_path / "fast").iterdir()} == {"config.json", "prepared.safetensors"}
    plain, fast = (
        minibeit.BeitForImageClassification.from_pretrained(tmp_path / name, backend="numba")(pixels()).logits
        for name in ("plain", "fast")
    )
    assert np.array_equal(plain, fast)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "plain"), "--prepared", "--force"]) == 0
    assert "also holds model.safetensors, which comes first" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "x"), "--prepared", "--dtype", "float16"]) == 2
    assert not (tmp_path / "x").exists()


def refused(tmp_path, match, name="BeitForImageClassification", **options):
    with pytest.raises(CheckpointError, match=match):
        getattr(minibeit, name).from_pretrained(tmp_path, **{"backend": "numba", **options})


def test_misuse_is_told_in_a_sentence(tmp_path):
    model = made()
    model.save_prepared(tmp_path)
    refused(tmp_path, "lacks fpn.deconv1.panels; was it prepared for another task", "BeitForSemanticSegmentation")
    refused(tmp_path, "for image classification.*this backend cannot read", backend="numpy")
    refused(tmp_path, "float32 weights, but dtype float64 was asked for", dtype="float64")
    refused(tmp_path, r"fc1.panels: expected float32 of shape \(\d+, 64, \d+\), found", intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"prepared file .* give the checkpoint that it was made from"):
        open_checkpoint(tmp_path)
    again = minibeit.BeitForImageClassification.from_pretrained(tmp_path, backend="numba")
    with pytest.raises(ValueError, match="load the checkpoint that it was made from"):
        again.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="use the backend 'numba'"):
        minibeit.BeitForImageClassification(model.config, backend="numpy").save_prepared(tmp_path / "numpy")
    with pytest.raises(ValueError, match=r"float32 or low precision \(int8, bfloat16\), this model's are float64"):
        minibeit.BeitForImageClassification(model.config, dtype="float64").save_prepared(tmp_path / "numpy")
    assert not (tmp_path / "numpy").exists() and not (tmp_path / "copy").exists()


def test_a_file_of_another_cpu_or_version_is_refused(tmp_path):
    made().save_prepared(tmp_path)
    file = tmp_path / "prepared.safetensors"
    loaded = load_file(file)
    arrays = {name: np.array(loaded.tensors[name]) for name in loaded.tensors}
    write_safetensors(file, arrays, {**loaded.metadata, "layout": "numba 0, vax, panels of 3 columns"})
    refused(tmp_path, "was prepared as 'numba 0, vax, panels of 3 columns', but this machine .* prepare it again")
    write_safetensors(file, arrays, {"format": "pt"})
    refused(tmp_path, "is not a prepared file of minibeit")
    (tmp_path / "config.json").unlink()
    write_safetensors(file, arrays, loaded.metadata)
    refused(tmp_path, "cannot be used without a config.json next to it")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": "many"}))
    refused(tmp_path, "config.json: ")


def test_a_checkpoint_beside_it_comes_first(tmp_path):
    model = made()
    model.save_prepared(tmp_path)
    made(num_labels=5).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert minibeit.BeitForImageClassification.from_pretrained(tmp_path, backend="numba").config.num_labels == 5
