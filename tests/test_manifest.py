"""The manifest of published checkpoints and the class names that go with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from minibeit import BeitConfig, BeitImageProcessor, catalogue, labels
from minibeit.checkpoint import class_names
from minibeit.params import count_parameters
from minibeit.task_table import TASKS

HOME = Path(__file__).resolve().parent.parent
MANIFEST = catalogue.manifest()


def test_everything_published_is_there():
    ids = set(MANIFEST)
    assert len([id for id in ids if id.startswith("microsoft/beit-")]) == 11
    assert len([id for id in ids if id.startswith("microsoft/dit-")]) == 4
    assert len([id for id in ids if id.startswith("facebook/data2vec-vision-")]) == 4
    assert len([id for id in ids if id.startswith("timm/")]) == 7
    assert sum(entry["origin"] == "unilm" for entry in MANIFEST.values()) == 18
    assert sum(entry["parameters_published"] for entry in MANIFEST.values()) == 13


@pytest.mark.parametrize("id", MANIFEST)
def test_config_and_parameter_count(id):
    """Counts are those others have published (13 of them) or what follows from the config; nothing is allocated."""
    entry = MANIFEST[id]
    config = BeitConfig.from_dict(entry["config"])
    assert entry["task"] in TASKS
    assert count_parameters(config, entry["task"]) == entry["parameters"]
    assert config.image_size == entry["image_size"]
    assert entry["license"]
    if entry["labels"]:
        assert len(labels.names(entry["labels"])) == config.num_labels
        assert labels.source_of(entry["task"], config.num_labels) == entry["labels"]
    processor = BeitImageProcessor.from_dict(entry["preprocessing"])
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]


def test_expected_outputs_name_their_source():
    expected = [item for entry in MANIFEST.values() for item in entry["expected"]]
    assert len(expected) == 20
    assert all(item["source"] and item["image"] and item["values"] for item in expected)
    names = labels.names("imagenet-1k")
    tabby = MANIFEST["microsoft/beit-base-patch16-224"]["expected"][0]
    assert names[tabby["argmax"]] == "tabby, tabby cat"
    names = labels.names("imagenet-22k")
    assert names[MANIFEST["microsoft/beit-base-patch16-224-pt22k-ft22k"]["expected"][0]["argmax"]] == "tabby, tabby cat"


def test_the_file_is_what_the_script_makes():
    spec = importlib.util.spec_from_file_location("make_manifest", HOME / "weights" / "make_manifest.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (HOME / "weights" / "manifest.json").read_text() == script.text()


@pytest.mark.parametrize(
    "source, count", [("imagenet-1k", 1000), ("imagenet-22k", 21841), ("ade20k", 150), ("rvl-cdip", 16)]
)
def test_names(source, count):
    names = labels.names(source)
    assert len(names) == count
    assert all(isinstance(name, str) and name == name.strip() and name for name in names)
    names.clear()
    assert len(labels.names(source)) == count  # the caller's list is the caller's


def test_palette():
    colours = labels.palette("ade20k")
    assert len(colours) == 150 and colours[0] == (120, 120, 120)
    assert all(0 <= value <= 255 for colour in colours for value in colour)
    with pytest.raises(ValueError, match="no palette"):
        labels.palette("imagenet-1k")
    with pytest.raises(ValueError, match="expected one of imagenet-1k"):
        labels.names("coco")


def test_names_for_published_checkpoints_only():
    config = BeitConfig.from_dict({"num_labels": 1000})
    assert class_names.with_names(config, "someone/else") is config
    assert class_names.with_names(config, "microsoft/beit-base-patch16-224").id2label[281] == "tabby, tabby cat"
    named = BeitConfig.from_dict({"id2label": {0: "a", 1: "b"}})
    assert class_names.with_names(named, "microsoft/beit-base-patch16-224") is named
    with pytest.raises(ValueError, match="150 names, the model has 1000"):
        class_names.named(config, "ade20k")


def test_other_configs_are_not_renumbered():
    for values in ({}, {"id2label": None}, {"id2label": {"0": "a", "2": "b"}}, "no config"):
        assert labels.renumbered(values) is values
