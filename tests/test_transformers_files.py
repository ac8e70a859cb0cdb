"""Folders that transformers saved, of every class, pooling and kind of position: loaded without a word, as at home."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import distance
from safetensors.numpy import load_file

import minibeit

FOLDER = Path(__file__).parent / "data" / "transformers4"
CLASSES = ("Model", "ForMaskedImageModeling", "ForImageClassification", "ForSemanticSegmentation", "Backbone")
POSITIONS = [
    {},
    {"use_relative_position_bias": True},
    {"use_shared_relative_position_bias": True},
    {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    {"use_absolute_position_embeddings": True, "use_relative_position_bias": True},
]


def outputs(folder, name, pixels):
    """What the folder's model computes; a warning, as of weights drawn at random, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(minibeit, f"Beit{name}").from_pretrained(folder, dtype="float64", backend="numpy")
    output = model(pixels)
    return output.feature_maps if name == "Backbone" else [getattr(output, "logits", None)
            if hasattr(output, "logits") else output.last_hidden_state]  # fmt: skip


@pytest.mark.parametrize("case", sorted(folder.name for folder in FOLDER.iterdir()))
def test_of_transformers_4(case):
    """Largest distance measured: 7e-15, of the segmentation."""
    expected = load_file(FOLDER / case / "expected.safetensors")
    found = outputs(FOLDER / case, case.split("-")[0], expected["pixel_values"])
    assert len(found) == len(expected) - 1
    for i, array in enumerate(found):
        assert distance(array, expected[f"output.{i}"]) < 1e-12


@pytest.mark.live
@pytest.mark.parametrize("family", ["Beit", "Data2VecVision"])
@pytest.mark.parametrize("name", CLASSES)
def test_of_the_installed_transformers(tmp_path, rng, family, name):
    """The model in memory is the truth: transformers 5 does not load every one of its own files right."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = getattr(transformers, f"{family}{name}", None)
    if kind is None:
        pytest.skip(f"{family} has no {name}")
    x = rng.standard_normal((2, 3, 8, 8))
    for i, (pooling, positions) in enumerate(itertools.product((True, False), POSITIONS)):
        more = dict(out_indices=[1, 2, 3, 4]) if name in ("ForSemanticSegmentation", "Backbone") else {}
        more.update(dict(pool_scales=[1, 2], auxiliary_channels=4) if name == "ForSemanticSegmentation" else {})
        more.update(dict(add_fpn=i % 2 == 0) if name == "Backbone" else {})
        config = getattr(transformers, f"{family}Config")(
            hidden_size=4, num_hidden_layers=4, num_attention_heads=2, intermediate_size=4, image_size=8, patch_size=4,
            vocab_size=5, num_labels=3, use_mean_pooling=pooling, use_mask_token=name.startswith("ForMasked"),
            **positions, **more,
        )  # fmt: skip
        torch.manual_seed(i)
        model = kind(config, **({"add_pooling_layer": True} if name == "Model" else {})).eval()
        with torch.no_grad():
            for key, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
                if value.is_floating_point() and "running_var" not in key:
                    value.copy_(torch.randn(value.shape) * 0.5)
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        with torch.no_grad():
            output = model.double()(torch.from_numpy(x))
        expected = output.feature_maps if name == "Backbone" else [output[0]]
        for found, truth in zip(outputs(folder, name, x), expected):
            assert distance(np.asarray(found), truth.numpy()) < 1e-12, (pooling, positions)
