"""LoRA adapters: the numbers of the adapted model, or one sentence; never those of the model without the adapter."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
from conftest import distance, random_weights, tiny_config

from minibeit import BeitForImageClassification, BeitForMaskedImageModeling, CheckpointError
from minibeit.checkpoint.convert import convert
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.load import load_checkpoint
from minibeit.checkpoint.save import save_checkpoint

QUERY = "beit.encoder.layer.0.attention.attention.query"  # as transformers 4 names modules, 5 calls them otherwise
QUERY5 = "beit.layers.0.attention.q_proj"
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "init_lora_weights": True}


def base(folder, task="image_classification", **changes):
    config = tiny_config(use_relative_position_bias=True, **changes)
    arrays = random_weights(config, task, dtype="float32")
    save_checkpoint(folder, config, task, arrays)
    return config, arrays


def adapter(folder, rng, module=QUERY, out=12, drop=(), more=None, **settings):
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 12), (out, 2)))
    tensors = {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
    tensors = {name: array for name, array in tensors.items() if not name.endswith(drop)}
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", {**tensors, **(more or {})})
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return A.astype(np.float64), B.astype(np.float64)


@pytest.mark.parametrize("module", [QUERY, QUERY5])
@pytest.mark.parametrize("settings, scale", [({}, 3), ({"use_rslora": True}, 6 / 2**0.5), ({"lora_alpha": 2}, 1)])
def test_merged_with_the_weights_beside_it(tmp_path, rng, module, settings, scale):
    _, arrays = base(tmp_path)
    A, B = adapter(tmp_path, rng, module, **settings)
    _, loaded = load_checkpoint(tmp_path, "image_classification", dtype="float64")
    for name, array in loaded.items():
        changed = scale * B @ A if name == "beit.encoder.0.attention.query.weight" else 0
        np.testing.assert_allclose(array, arrays[name] + changed, rtol=1e-13)


def test_an_alpha_of_its_own(tmp_path, rng):
    _, arrays = base(tmp_path)
    A, B = adapter(tmp_path, rng, alpha_pattern={"attention.query": 8, "key": 1})
    name = "beit.encoder.0.attention.query.weight"
    _, loaded = load_checkpoint(tmp_path, "image_classification", dtype="float64")
    np.testing.assert_allclose(loaded[name], arrays[name] + 4 * B @ A, rtol=1e-15)
    adapter(tmp_path, rng, alpha_pattern={"(a|aa)+query": 8})
    with pytest.raises(CheckpointError, match=r"alpha_pattern has '\(a\|aa\)\+query'; only plain module names"):
        load_checkpoint(tmp_path, "image_classification")


def test_dora_scales_each_row(tmp_path, rng):
    _, arrays = base(tmp_path)
    length = rng.uniform(1, 2, 12).astype(np.float32)
    more = {f"base_model.model.{QUERY}.lora_magnitude_vector": length}
    A, B = adapter(tmp_path, rng, more=more, use_dora=True)
    name = "beit.encoder.0.attention.query.weight"
    _, loaded = load_checkpoint(tmp_path, "image_classification", dtype="float64")
    np.testing.assert_allclose(np.linalg.norm(loaded[name], axis=1), length, rtol=1e-12)
    direction = arrays[name] + 3 * B @ A
    expected = length[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded[name], expected, rtol=1e-12)


def test_an_adapter_alone_finds_its_base(tmp_path, rng, monkeypatch):
    _, arrays = base(tmp_path / "base")
    A, B = adapter(tmp_path / "adapter", rng, base_model_name_or_path=str(tmp_path / "base"))
    name = "beit.encoder.0.attention.query.weight"
    expected = (arrays[name] + 3 * B @ A).astype(np.float32)
    _, loaded = load_checkpoint(tmp_path / "adapter", "image_classification")
    np.testing.assert_array_equal(loaded[name], expected)
    adapter(tmp_path / "adapter", np.random.default_rng(1), base_model_name_or_path="../base")  # from its own folder
    load_checkpoint(tmp_path / "adapter", "image_classification")
    adapter(tmp_path / "adapter", rng, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base model"):
        load_checkpoint(tmp_path / "adapter", "image_classification")
    adapter(tmp_path / "adapter", rng, base_model_name_or_path="./gone")
    with pytest.raises(FileNotFoundError, match="gone: there is no such file or folder"):
        load_checkpoint(tmp_path / "adapter", "image_classification")


def test_a_head_trained_with_the_adapter(tmp_path, rng):
    """modules_to_save: the adapter's head stands for the base model's, here of a model that had none."""
    base(tmp_path / "base", "masked_image_modeling", use_mask_token=True)
    head = {f"base_model.model.classifier.{leaf}": rng.standard_normal(shape).astype(np.float32)
            for leaf, shape in (("weight", (7, 12)), ("bias", (7,)))}  # fmt: skip
    adapter(tmp_path / "adapter", rng, more=head, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.warns(UserWarning) as caught:
        model = BeitForImageClassification.from_pretrained(tmp_path / "adapter")
    assert not any("classifier" in str(w.message) for w in caught)  # nothing of it is random
    assert model.config.num_labels == 7
    np.testing.assert_array_equal(model.arrays["classifier.bias"], head["base_model.model.classifier.bias"])


def test_a_name_of_two_parameters_means_the_one_that_the_base_has(tmp_path, rng):
    """Of an encoder alone `layernorm` is the final norm; with a head in front of it that of masked image modeling."""
    _, arrays = base(tmp_path, use_mean_pooling=False)
    bias = rng.standard_normal(12).astype(np.float32)
    adapter(tmp_path, rng, QUERY.removeprefix("beit."), more={"base_model.model.layernorm.bias": bias})
    _, loaded = load_checkpoint(tmp_path, "image_classification")
    np.testing.assert_array_equal(loaded["beit.norm.bias"], bias)
    np.testing.assert_array_equal(loaded["beit.norm.weight"], arrays["beit.norm.weight"])


def test_every_tool_sees_the_merged_weights(tmp_path, rng):
    base(tmp_path / "both")
    adapter(tmp_path / "both", rng)
    notes = convert(tmp_path / "both", tmp_path / "merged").notes
    assert any("LoRA adapter" in note and "merged" in note for note in notes)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    x = rng.standard_normal((1, 3, 8, 12))
    outputs = [BeitForImageClassification.from_pretrained(tmp_path / f)(x).logits for f in ("both", "merged")]
    np.testing.assert_array_equal(*outputs)


REFUSED = [
    (dict(peft_type="LOHA"), (), "of type 'LOHA', of PEFT's only LORA is read"),
    (dict(init_lora_weights="pissa_niter_4"), (), "changes the base model's weights too"),
    (dict(lora_alpha="x"), (), "give no scale"),
    (dict(), "lora_B.weight", "holds A for .*query, of which LoRA's A and B"),
]


@pytest.mark.parametrize("settings, drop, match", REFUSED)
def test_what_cannot_be_merged_is_refused(tmp_path, rng, settings, drop, match):
    base(tmp_path)
    adapter(tmp_path, rng, drop=drop or "none", **settings)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tmp_path, "image_classification")


def test_what_has_no_place_is_refused(tmp_path, rng):
    base(tmp_path)
    adapter(tmp_path, rng, module="beit.encoder.layer.0.attention.attention.gate")
    with pytest.raises(CheckpointError, match=r"1 tensors with no place in its base model: .*gate\.weight"):
        load_checkpoint(tmp_path, "image_classification")
    adapter(tmp_path, rng, out=5)
    with pytest.raises(CheckpointError, match="the adapter's update does not fit"):
        load_checkpoint(tmp_path, "image_classification")


def test_halves_of_an_adapter(tmp_path, rng):
    base(tmp_path)
    adapter(tmp_path, rng)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds the adapter adapter_model.safetensors, but no adapter_config"):
        load_checkpoint(tmp_path, "image_classification")
    with pytest.raises(CheckpointError, match="is a LoRA adapter, not a model; give its folder"):
        load_checkpoint(tmp_path / "adapter_model.safetensors", "image_classification")
    adapter(tmp_path, rng)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but none of adapter_model\.safetensors, adapter_model\.bin"):
        load_checkpoint(tmp_path, "image_classification")


LIVE = [
    dict(target_modules=["q_proj", "v_proj"]),
    dict(target_modules=["q_proj", "fc1", "o_proj"], use_rslora=True, modules_to_save=["classifier"]),
    dict(target_modules=["k_proj", "fc2"], use_dora=True, modules_to_save=["classifier"]),
    dict(target_modules=["projection", "v_proj"], bias="all", alpha_pattern={"v_proj": 5}, rank_pattern={"v_proj": 3}),
]


@pytest.mark.live
@pytest.mark.parametrize("settings", LIVE, ids=lambda s: "-".join(s["target_modules"]))
def test_peft(tmp_path, rng, settings):
    """Largest relative difference from PEFT's own model in float64; measured 6e-16."""
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    config = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
                  patch_size=8, use_relative_position_bias=True, num_labels=4)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BeitForImageClassification(transformers.BeitConfig(**config))
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        transformers.BeitForImageClassification.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=4, lora_alpha=12, **settings),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "both")
    for file in (tmp_path / "adapter").glob("adapter*"):
        shutil.copy(file, tmp_path / "both")
    x = rng.standard_normal((2, 3, 16, 16))
    with torch.no_grad():
        expected = adapted.double().eval()(torch.from_numpy(x)).logits.numpy()
        plain = model.double().eval()(torch.from_numpy(x)).logits.numpy()
    assert distance(plain, expected) > 1e-3  # the adapter changes something
    for folder in ("adapter", "both"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = BeitForImageClassification.from_pretrained(tmp_path / folder, dtype="float64", backend="numpy")
        assert distance(found(x).logits, expected) < 1e-13


def test_masked_image_modeling_with_an_adapter(tmp_path, rng):
    config, arrays = base(tmp_path, "masked_image_modeling", use_mask_token=True)
    adapter(tmp_path, rng)
    model = BeitForMaskedImageModeling.from_pretrained(tmp_path)
    name = "beit.encoder.0.attention.query.weight"
    assert np.abs(model.arrays[name] - arrays[name]).max() > 0.1
