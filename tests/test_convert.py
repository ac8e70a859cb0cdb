"""Conversion to the Hub's layout: what is written, what is said, and that transformers reads it back bit by bit."""

from __future__ import annotations

import argparse
import json
import warnings

import numpy as np
import pytest
from conftest import random_weights, tiny_config
from safetensors.numpy import load_file as load_safetensors
from test_load import DIALECTS, golden

import minibeit
from minibeit import CheckpointError
from minibeit.checkpoint import resize
from minibeit.checkpoint.convert import convert
from minibeit.checkpoint.load import load_checkpoint
from minibeit.checkpoint.save import save_checkpoint
from minibeit.cli import convert as convert_command
from minibeit.cli import models as models_command

TASKS = ["model", "masked_image_modeling", "image_classification", "semantic_segmentation", "backbone"]


def read(path, task, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*config was inferred.*")
        return load_checkpoint(path, task, **more)


@pytest.mark.parametrize(
    "file", ["unilm_classification.pth", "timm.safetensors", "flax_classification", "hub_classification"]
)
def test_the_copy_has_the_same_weights(file, tmp_path):
    done = convert(DIALECTS / file, tmp_path / "new")
    assert done.task == "image_classification"
    config, arrays = read(DIALECTS / file, "image_classification")
    again, copied = load_checkpoint(tmp_path / "new", "image_classification")
    assert again == config.replace(architectures=("BeitForImageClassification",))
    for name, array in arrays.items():
        np.testing.assert_array_equal(copied[name], array)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new"]


def test_what_was_found_is_said(tmp_path):
    done = convert(DIALECTS / "unilm_dit.pth", tmp_path / "new", num_attention_heads=3)
    text = "\n".join(done.notes)
    assert "(torch, under the key 'module') named as by microsoft/unilm or timm" in text
    assert "inferred from the tensors, and assumed: layer_norm_eps 1e-06; a square grid of 4x4 patches" in text
    assert "no preprocessor_config.json was written" in text
    text = "\n".join(convert(DIALECTS / "unilm_classification.pth", tmp_path / "other").notes)
    assert "2 tensors are index tables or step counters" in text


def test_fine_tuning_starts_from_a_pretrained_model(tmp_path):
    done = convert(DIALECTS / "unilm_mim.pth", tmp_path / "new", task="image_classification", num_labels=7)
    assert done.config.use_relative_position_bias and not done.config.use_shared_relative_position_bias
    text = "\n".join(done.notes)
    assert "4 tensors start with random values: beit.pooler.weight, beit.pooler.bias, classifier.weight" in text
    assert "4 tensors of another head, or outside the model, are not used" in text
    assert "copied to each of the 2 blocks" in text
    _, mim = read(DIALECTS / "unilm_mim.pth", "masked_image_modeling")
    _, arrays = load_checkpoint(tmp_path / "new", "image_classification")
    for i in range(2):
        np.testing.assert_array_equal(arrays[f"beit.encoder.{i}.bias_table"], mim["beit.shared_bias_table"])
    assert arrays["classifier.weight"].shape == (7, 12)


@pytest.mark.parametrize("method", resize.RESIZE_METHODS)
def test_another_image_size(method, tmp_path):
    done = convert(DIALECTS / "unilm_classification.pth", tmp_path / "new", image_size=24, resize_method=method)
    assert done.config.grid == (6, 6)
    _, old = read(DIALECTS / "unilm_classification.pth", "image_classification")
    _, new = load_checkpoint(tmp_path / "new", "image_classification")
    for name, array in old.items():
        if name.endswith("bias_table"):
            array = resize.resize_stored_table(array, (4, 4), (6, 6), method)
        np.testing.assert_array_equal(new[name], array)


def test_timms_resizing():
    """timm computes in float32: 4.8e-7 was its largest distance from ours."""
    file = golden("timm_resize")
    table = resize.resize_stored_table(file["table"], (4, 4), (8, 6), "timm")
    np.testing.assert_allclose(table, file["timm_table"], atol=1e-6)
    positions = resize.resize_stored_positions(file["positions"], (4, 4), (8, 6), "timm")
    np.testing.assert_allclose(positions, file["timm_positions"], atol=1e-6)
    positions = resize.resize_stored_positions(file["positions"], (4, 4), (3, 2), "timm")
    np.testing.assert_allclose(positions, file["timm_positions_small"], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    convert(DIALECTS / "hub_classification", tmp_path / "new", dtype=dtype)
    _, old = load_checkpoint(DIALECTS / "hub_classification", "image_classification")
    _, new = load_checkpoint(tmp_path / "new", "image_classification")
    bound = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]  # half a step
    for name, array in old.items():
        assert new[name].dtype == np.float32
        np.testing.assert_allclose(new[name], array, rtol=bound, atol=1e-7)
    convert(tmp_path / "new", tmp_path / "again", dtype=dtype)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_nothing_is_overwritten_unless_forced(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    convert(DIALECTS / "hub_classification", folder)  # an empty folder is fine
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="not empty"):
        convert(DIALECTS / "timm.safetensors", folder)
    assert (folder / "model.safetensors").read_bytes() == before
    convert(DIALECTS / "timm.safetensors", folder, force=True)
    assert (folder / "model.safetensors").read_bytes() != before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        convert(DIALECTS / "timm.safetensors", tmp_path / "file", force=True)


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="dtype"):
        convert(DIALECTS / "timm.safetensors", tmp_path / "new", dtype="int8")
    with pytest.raises(ValueError, match="task"):
        convert(DIALECTS / "timm.safetensors", tmp_path / "new", task="detection")
    with pytest.raises(ValueError, match="square grids"):
        convert(DIALECTS / "timm.safetensors", tmp_path / "new", image_size=(16, 24))
    with pytest.raises(CheckpointError):
        convert(DIALECTS / "timm.safetensors", tmp_path / "new", num_labels=7)
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "nothing", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_processor_follows_the_image_size(tmp_path):
    config = tiny_config(image_size=16, use_relative_position_bias=True)
    save_checkpoint(tmp_path / "old", config, "model", random_weights(config, "model", dtype="float32"))
    settings = {"do_resize": True, "size": 16, "crop_size": {"height": 16, "width": 16}, "resample": 2}
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(settings))
    convert(tmp_path / "old", tmp_path / "new", image_size=24)
    written = json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    assert written == {**settings, "size": 24, "crop_size": {"height": 24, "width": 24}}


def test_counters_of_batch_norms_are_kept(tmp_path):
    config = tiny_config(num_hidden_layers=4, image_size=16, out_indices=[1, 2, 3, 4])
    arrays = random_weights(config, "semantic_segmentation", dtype="float32")
    counters = {"fpn.bn.running_var": np.asarray(160_000)}
    save_checkpoint(tmp_path / "old", config, "semantic_segmentation", arrays, counters=counters)
    convert(tmp_path / "old", tmp_path / "new", task="semantic_segmentation")
    tensors = load_safetensors(tmp_path / "new" / "model.safetensors")
    assert tensors["fpn1.1.num_batches_tracked"] == 160_000
    assert tensors["decode_head.bottleneck.bn.num_batches_tracked"] == 0


def run(command, words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_command(tmp_path, capsys):
    words = [DIALECTS / "unilm_classification.pth", tmp_path / "new", "--image-size", 24, "--dtype", "float16"]
    assert run(convert_command, words) == 0
    said = capsys.readouterr().out
    assert "resized from 16x16 to 24x24 pixels by method unilm" in said
    assert said.endswith("BeitForImageClassification\n")
    assert minibeit.BeitForImageClassification.from_pretrained(tmp_path / "new", backend="numpy").config.grid == (6, 6)


def test_models_command(capsys):
    assert run(models_command, []) == 0
    assert "86,530,984" in capsys.readouterr().out
    assert run(models_command, ["--json", "microsoft", "rvlcdip"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [
        "microsoft/dit-base-finetuned-rvlcdip",
        "microsoft/dit-large-finetuned-rvlcdip",
    ]


@pytest.mark.live
@pytest.mark.parametrize("model_type", ["beit", "data2vec-vision"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("safe", [True, False])
def test_transformers_reads_it_back_bit_by_bit(task, model_type, safe, tmp_path):
    """transformers -> minibeit -> transformers: every tensor, counters included."""
    torch = pytest.importorskip("torch")
    import parity
    import transformers

    if model_type != "beit" and task in ("masked_image_modeling", "backbone"):
        pytest.skip("transformers has no such model")
    settings = dict(
        hidden_size=12, num_hidden_layers=4, num_attention_heads=3, intermediate_size=20, image_size=16, patch_size=4,
        use_mask_token=True, out_indices=[1, 2, 3, 4], num_labels=5, vocab_size=9, auxiliary_channels=6,
    )  # fmt: skip
    shared = task in ("model", "masked_image_modeling", "backbone")
    settings["use_shared_relative_position_bias" if shared else "use_relative_position_bias"] = True
    if task == "backbone":
        settings["add_fpn"] = True
    if task == "model" and model_type != "beit":
        settings["use_mean_pooling"] = False  # as published; with a pooler transformers refuses its own file
    home = parity.hf_model(task, settings, 0, model_type).float()
    for name, value in home.named_buffers():
        if name.endswith("num_batches_tracked"):
            value.fill_(len(name))
    if safe:
        home.save_pretrained(tmp_path / "home")
    else:
        home.config.save_pretrained(tmp_path / "home")
        torch.save(home.state_dict(), tmp_path / "home" / "pytorch_model.bin")
    convert(tmp_path / "home", tmp_path / "ours", task=task)
    back, info = type(home).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = back.state_dict()
    assert state.keys() == home.state_dict().keys()
    for name, value in home.state_dict().items():
        assert torch.equal(state[name], value), name
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)  # in float32 the place in memory decides the rounding
    with torch.no_grad():
        first, second = home.double().eval()(x)[0], back.double().eval()(x)[0]
    first, second = (first[0], second[0]) if isinstance(first, tuple) else (first, second)
    assert torch.allclose(first, second, rtol=1e-12, atol=1e-13)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").model_type == model_type
