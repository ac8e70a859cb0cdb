"""Settings that strangers wrote: refused in a sentence, at a cost that the file bounds and not the numbers in it."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import fuzz_settings
import numpy as np
import pytest
from conftest import random_weights, tiny_config
from hostile import assert_cheap, refused

import minibeit
from minibeit import BeitConfig, BeitImageProcessor, CheckpointError
from minibeit.checkpoint.class_names import named
from minibeit.checkpoint.convert import convert
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.load import open_checkpoint
from minibeit.checkpoint.save import save_checkpoint
from minibeit.strict_json import brief, parse_json, read_json
from minibeit.verify.trace_file import FORMAT, TraceFile

DIALECT = Path(__file__).parent / "data" / "dialects" / "hub_classification"
DEEP = "[" * 5000 + "]" * 5000


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DIALECT, tmp_path / "checkpoint"))


def with_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


# JSON ---------------------------------------------------------------------------------------------------------------

BAD_TEXTS = {
    "is not UTF-8": b"\xff\xfe",
    "is not JSON .*Expecting": b"{",
    "nested too deeply": DEEP.encode(),
    "nested too deeply: more than 64": b"[" * 65 + b"]" * 65,
    "more than the 8,388,608 bytes": b" " * (9 << 20),
    "more than the 300,000 values": b"[" + b"[]," * 1_000_000 + b"1]",
    "the key 'a' twice": b'{"a": 1, "a": 2}',
    "integer of 20 digits": b"[" + b"9" * 20 + b"]",
    "integer of 1000000 digits": b"9" * 1_000_000,
    "number of 1000002 characters": b"1." + b"0" * 1_000_000,
    "the number '1e999', beyond": b"1e999",
    "the value NaN": b"NaN",
    "the value -Infinity": b"-Infinity",
    "surrogate": rb'["\ud800"]',
}


@pytest.mark.parametrize("message", BAD_TEXTS)
def test_a_text_is_refused_in_a_sentence_and_cheaply(message, tmp_path):
    (tmp_path / "x.json").write_bytes(BAD_TEXTS[message])

    def read():
        with pytest.raises(ValueError, match=message) as caught:
            read_json(tmp_path / "x.json")
        assert len(str(caught.value)) < 200 and str(caught.value).isprintable()

    assert_cheap(read)


def test_what_programs_write_is_read():
    value = {"a": [1, -2.5e-300, "\u00fc\U0001f600", None, True], "b": {"c": []}, "n": -(1 << 63)}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(b"[" * 64 + b"]" * 64) and parse_json(rb'"\ud83d\ude00"') == "\U0001f600"


def test_a_real_config_with_many_names_fits():
    config = named(BeitConfig(num_labels=21841), "imagenet-22k")
    assert BeitConfig.from_dict(parse_json(config.to_json_string())) == config


LONG = ["\x1b[2J\0" * 1000, list(range(10**6)), {str(i): [i] for i in range(1000)}, 10**4000]


@pytest.mark.parametrize("value", LONG, ids=["text", "list", "dict", "integer"])
def test_values_are_shown_short_and_escaped(value):
    assert len(brief(value)) <= 200 and brief(value).isprintable()
    assert brief([1, 2.5, "a"]) == "[1, 2.5, 'a']"


# config.json --------------------------------------------------------------------------------------------------------

BOMBS = {
    "num_hidden_layers must be an integer from 0 to 1000": {"num_hidden_layers": 1048576},
    "num_hidden_layers must be an integer from 0 to 1000, found 100000": {"num_hidden_layers": 100_000},
    "num_hidden_layers is 1000 in config.json, but the file has only": {"num_hidden_layers": 1000},
    "auxiliary_num_convs must be an integer from 0 to 64": {"auxiliary_num_convs": 1048576},
    "pool_scales must be an integer from 1 to 64, found 65535": {"pool_scales": [65535]},
    "pool_scales must have at most 64 entries, found 100000": {"pool_scales": [1] * 100_000},
    "image_size must be an integer from 1 to 65536": {"image_size": 1 << 20, "patch_size": 4096},
    "patch_size must be an integer from 1 to 4096": {"patch_size": [16, 1 << 16]},
    "vocab_size must be an integer": {"vocab_size": 1 << 40},
    "num_labels must be an integer from 0 to 65536": {"num_labels": 1 << 20, "id2label": None},
    "num_labels must be an integer from 0 to 65536, found 70000": {"id2label": {i: "a" for i in range(70_000)}},
    "id2label must map class numbers to names": {"id2label": {"0": [1]}},
    "id2label must map class": {"id2label": {"0": "a", "00": "b"}},
    "out_indices must be integers from -3 to 2": {"out_indices": list(range(100_000)), "out_features": None},
    "out_features must have at most 1001": {"out_features": ["stem"] * 100_000, "out_indices": None},
    "architectures must be a list of names": {"architectures": [["x"]]},
    "architectures must be a list of names, found": {"architectures": [{"x": DEEP[:20]}]},
    "architectures must be a list of names, found .1": {"architectures": [1, None]},
    "architectures must have at most 64": {"architectures": ["x"] * 1000},
    "extra holds .'num_labels'": {"extra": {"num_labels": 1000}},
    "hidden_size must be an integer .* found '\\\\x1b": {"hidden_size": "\x1b[2J" * 10_000},
}


@pytest.mark.parametrize("message", BOMBS)
def test_a_config_is_refused_in_a_sentence_and_cheaply(message, folder):
    with_config(folder, **BOMBS[message])

    def load():
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(folder)
        assert str(folder) in str(caught.value) and len(str(caught.value)) < 600 and str(caught.value).isprintable()

    assert_cheap(load)


@pytest.mark.filterwarnings("ignore:.*made for another task", "ignore:.*another task's head")
def test_a_head_out_of_proportion_is_not_drawn(folder):
    with_config(
        folder, auxiliary_channels=1000, auxiliary_num_convs=64, out_indices=[0, 1, 2], out_features=None,
        num_hidden_layers=2,
    )  # fmt: skip
    assert open_checkpoint(folder).task == "image_classification"
    with_config(folder, vocab_size=1 << 18, hidden_size=12)

    def load():
        with pytest.raises(CheckpointError, match=r"wants [\d,]+ bytes of new weights in addition to the [\d,]+ of"):
            minibeit.checkpoint.load.load_checkpoint(folder, "semantic_segmentation")

    assert_cheap(load)


def test_more_weights_than_memory_are_refused_before_any_is_made():
    config = BeitConfig(hidden_size=32768, num_attention_heads=256, intermediate_size=131072, num_hidden_layers=1000)

    def make():
        with pytest.raises(ValueError, match=r"^config: random weights .* take [\d,]+ bytes, more than the [\d,]+ of"):
            minibeit.BeitModel(config)

    assert_cheap(make)


def test_a_prepared_folder_is_held_against_its_file_before_panels_are_made(tmp_path):
    pytest.importorskip("numba")
    minibeit.BeitForImageClassification(tiny_config(), backend="numba").save_prepared(tmp_path)
    wide = {"hidden_size": 32768, "num_attention_heads": 256, "intermediate_size": 131072, "num_hidden_layers": 1000}
    with_config(tmp_path, **wide, out_indices=None, out_features=None)

    def load():
        with pytest.raises(CheckpointError, match=r"holds [\d,]+ bytes, but the weights that its config desc"):
            minibeit.BeitForImageClassification.from_pretrained(tmp_path, backend="numba")

    assert_cheap(load)


# preprocessor_config.json -------------------------------------------------------------------------------------------

PROCESSOR_BOMBS = {
    "crop_size: expected at most 65536 pixels, found height 1048576": {"crop_size": [1 << 20, 1]},
    "crop_size: expected at most 67108864 pixels in all": {"crop_size": {"height": 65536, "width": 65536}},
    "size: expected at most 67108864 pixels in all": {"size": 30_000},
    "size: expected at most 67108864 pixels in all, .*shortest": {"size": {"shortest_edge": 50_000}},
    "size: expected the keys .* found a0, a1, a2, a3, a4, a5, ...$": {"size": {f"a{i}": 1 for i in range(1000)}},
    "image_mean: expected at most 4096 numbers, one per channel, found 200000": {"image_mean": [0.5] * 200_000},
    "image_std: expected numbers of at least 1e-06": {"image_std": 1e-300},
    "rescale_factor: expected a number within 1e.06 of 0": {"rescale_factor": 1e300},
    "resample: .* found 9223372036854775807": {"resample": (1 << 63) - 1},
    "do_resize: expected true or false, found .*\\\\x1b": {"do_resize": "\x1b[2J" * 10_000},
}


@pytest.mark.parametrize("message", PROCESSOR_BOMBS)
def test_a_processor_is_refused_in_a_sentence_and_cheaply(message, tmp_path):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(PROCESSOR_BOMBS[message]))

    def load():
        with pytest.raises(CheckpointError, match=message) as caught:
            BeitImageProcessor.from_pretrained(tmp_path)
        assert str(caught.value).startswith(str(file)) and len(str(caught.value)) < 600

    assert_cheap(load)


@pytest.mark.parametrize(
    "text", [f'{{"a": {DEEP}}}', "[" * 100_000, "\xff", '{"a": 1, "a": 2}', '{"size": {"height": "x", "width": 1}}']
)
def test_convert_names_the_processor_that_it_cannot_use(text, folder, tmp_path):
    (folder / "preprocessor_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: "):
        convert(folder, tmp_path / "out", image_size=32)


def test_a_trace_with_nested_metadata_is_named(tmp_path):
    metadata = {"format": FORMAT, "config": DEEP}
    write_safetensors(tmp_path / "t.safetensors", {"logits": np.zeros((1, 2), np.float32)}, metadata)
    with pytest.raises(ValueError, match=r"t\.safetensors: the config in its metadata .* nested too deeply"):
        _ = TraceFile(tmp_path / "t.safetensors").config


# Other readers ------------------------------------------------------------------------------------------------------


def test_msgpack_extensions_within_extensions_count_as_levels():
    inner = b"\xc0"
    for _ in range(2000):
        inner = b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner
    refused(b"\x81\xa1a" + inner, "32 levels")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("task", ["image_classification", "semantic_segmentation"])
def test_weights_with_strides_of_zero_are_weights(backend, task):
    """One number seen many times, as a torch file may hold it, once stood for "no weights yet"."""
    pytest.importorskip(backend)
    config = tiny_config(hidden_size=64, num_attention_heads=4, num_hidden_layers=4, out_indices=[1, 2, 3, 4])
    arrays = random_weights(config, task, dtype="float32")
    seen = {name for name in arrays if "fc1.weight" in name or "conv.weight" in name or name == "classifier.weight"}
    plain = {n: np.full(a.shape, a.flat[0], a.dtype) if n in seen else a for n, a in arrays.items()}
    strided = {n: np.broadcast_to(a.flat[0], a.shape) if n in seen else a for n, a in plain.items()}
    assert seen and all(not any(strided[name].strides) for name in seen)
    cls = {"image_classification": minibeit.BeitForImageClassification}.get(task, minibeit.BeitForSemanticSegmentation)
    x = np.random.default_rng(0).standard_normal((1, 3, *config.image_shape), dtype=np.float32)
    logits = [cls(config, backend=backend, arrays=arrays)(x).logits for arrays in (plain, strided)]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-5 * np.abs(logits[0]).max())


# Fuzz ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["config", "processor"])
def test_mutants_are_taken_or_refused_at_once(kind):
    outcomes, _, _ = fuzz_settings.fuzz(kind, 75)
    assert outcomes["taken"] > 2 and outcomes["refused"] > 25


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["config", "processor"])
def test_many_mutants_in_a_process_that_may_not_ask_for_more(kind):
    command = [sys.executable, "fuzz_settings.py", "4000", "--seed", "2", "--kind", kind]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ran.returncode == 0 and "4000 files" in ran.stdout, ran.stderr[-2000:]


def test_saved_settings_pass_their_own_limits(tmp_path):
    config = tiny_config()
    save_checkpoint(tmp_path, config, "image_classification", random_weights(config, "image_classification"))
    assert open_checkpoint(tmp_path).config == config
