"""Tokenizers from the files of DALL-E, Flava and minibeit: what they compute, and files that are refused."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import distance
from hostile import assert_cheap, legacy, text, torch_zip
from safetensors import safe_open
from safetensors.numpy import load_file as load_safetensors
from safetensors.numpy import save_file
from tolerances import FACTOR, GOLDEN64

from minibeit import CheckpointError, DalleTokenizer, hub
from minibeit.tokenizer.files import read_tokenizer
from minibeit.tokenizer.names import DALL_E, FLAVA
from minibeit.tokenizer.params import param_shapes

FOLDER = Path(__file__).parent / "data" / "tokenizer"
EXPECTED = load_safetensors(FOLDER / "expected.safetensors")
with safe_open(FOLDER / "expected.safetensors", "np") as opened:
    TORCH_ERROR = float(opened.metadata()["float32_error"])  # of PyTorch's float32 logits


def load(path, **options):
    return DalleTokenizer.from_pretrained(path, **{"backend": "numpy", "dtype": "float64", **options})


@pytest.fixture
def both(tmp_path):
    """A folder with DALL-E's two files."""
    for name in ("encoder.pkl", "decoder.pkl"):
        shutil.copy(FOLDER / name, tmp_path / name)
    return tmp_path


# What they compute ----------------------------------------------------------------------------------------------------


def test_the_published_modules(both):
    tokenizer = load(both)
    assert tokenizer.config.to_dict() == {
        "model_type": "dalle_tokenizer", "num_groups": 4, "num_blocks_per_group": 2, "hidden_size": 4,
        "vocab_size": 24, "input_channels": 3, "n_init": 8, "image_size": 112,
    }  # fmt: skip
    assert distance(tokenizer.logits(EXPECTED["pixels"]), EXPECTED["logits"]) <= GOLDEN64
    assert np.array_equal(tokenizer.encode(EXPECTED["pixels"]), EXPECTED["tokens"])
    assert distance(tokenizer.decode(EXPECTED["tokens"]), EXPECTED["image"]) <= GOLDEN64
    assert len(np.unique(EXPECTED["tokens"])) > 8


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_float32(both, backend):
    pytest.importorskip("numba")
    tokenizer = load(both, dtype="float32", backend=backend)
    assert distance(tokenizer.logits(EXPECTED["pixels"]), EXPECTED["logits"]) <= FACTOR * TORCH_ERROR
    assert np.array_equal(tokenizer.encode(EXPECTED["pixels"]), EXPECTED["tokens"])
    assert np.abs(tokenizer.decode(EXPECTED["tokens"]) - EXPECTED["image"]).max() <= 1e-6


def test_an_encoder_alone():
    tokenizer = load(FOLDER / "encoder.pkl")
    assert tokenizer.config.n_init is None
    assert np.array_equal(tokenizer.encode(EXPECTED["pixels"]), EXPECTED["tokens"])


def test_state_dicts_hold_the_same(both):
    _, arrays = read_tokenizer(FOLDER / "state_dicts.pt")
    _, published = read_tokenizer(both)
    assert list(arrays) == list(published)
    assert all(np.array_equal(arrays[name], published[name]) for name in arrays)


@pytest.mark.parametrize("name", ["flava.safetensors", "flava.bin"])
def test_flavas_codebook(name):
    """The .bin holds it below `image_codebook.`, beside a text model."""
    tokenizer = load(FOLDER / name)
    assert tokenizer.config.n_init is None
    assert distance(tokenizer.logits(EXPECTED["pixels"]), EXPECTED["flava_logits"]) <= GOLDEN64


def test_flavas_codebook_in_a_folder(tmp_path):
    shutil.copy(FOLDER / "flava.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "flava_image_codebook", "hidden_size": 256}))
    assert load(tmp_path).config.hidden_size == 4  # what another program's config says does not matter


def test_flavas_codebook_by_its_id_on_the_hub(tmp_path, monkeypatch):
    shutil.copy(FOLDER / "flava.safetensors", tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(hub, "download", lambda id, where, **_: asked.append((id, where.revision)) or tmp_path)
    tokenizer = load("facebook/flava-image-codebook", revision="main")
    assert asked == [("facebook/flava-image-codebook", "main")]
    assert tokenizer.config.vocab_size == 24


def test_what_is_saved_has_the_authors_names(both, tmp_path):
    load(both).save_pretrained(tmp_path / "own")
    with safe_open(tmp_path / "own" / "model.safetensors", "np") as file:
        names = set(file.keys())
    assert "encoder.blocks.group_2.block_1.res_path.conv_4.w" in names
    assert "decoder.blocks.group_1.block_1.id_path.b" in names
    again = load(tmp_path / "own")
    assert np.array_equal(again.logits(EXPECTED["pixels"]), load(both).logits(EXPECTED["pixels"]))
    assert np.array_equal(again.decode(EXPECTED["tokens"]), load(both).decode(EXPECTED["tokens"]))


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_halves_in_files_of_their_own(tmp_path, ending):
    """encoder and decoder as state dicts; the first ending of a fixed order is read."""
    _, arrays = read_tokenizer(FOLDER / "state_dicts.pt")
    for half in ("encoder", "decoder"):
        tensors = {DALL_E.translate(n[len(half) + 1 :]): a for n, a in arrays.items() if n.startswith(half)}
        save_file(tensors, tmp_path / f"{half}{ending}")
    assert read_tokenizer(tmp_path)[0].n_init == 8


def test_float16_weights_become_float32(tmp_path):
    tensors = load_safetensors(FOLDER / "flava.safetensors")
    save_file({name: array.astype(np.float16) for name, array in tensors.items()}, tmp_path / "half.safetensors")
    _, arrays = read_tokenizer(tmp_path / "half.safetensors")
    assert {array.dtype.name for array in arrays.values()} == {"float32"}


# What is refused ------------------------------------------------------------------------------------------------------


def flava_file(folder, change):
    tensors = load_safetensors(FOLDER / "flava.safetensors")
    change(tensors)
    save_file(tensors, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 600


CONV = "blocks.group_3.group.block_2.res_path.path.conv_2.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(CONV), rf"lacks the tensor {CONV}, shape \[4, 4, 3, 3\], of its encoder"),
        (lambda t: t.pop("blocks.output.conv.weight"), "lacks the tensor blocks.output.conv.weight, which every"),
        (lambda t: t.update({CONV: t[CONV][:, :, :1]}), r"expected shape \[4, 4, 3, 3\], found \[4, 4, 1, 3\]"),
        (lambda t: t.update({CONV: t[CONV].astype(np.int64)}), "has dtype int64, expected floating-point"),
        (lambda t: t.update({"blocks.extra": np.zeros(3)}), "has 1 tensors that no encoder .* such as blocks.extra"),
        (lambda t: t.update({"blocks.input.weight": np.zeros(3)}), r"expected four axes, found shape \[3\]"),
        (lambda t: t.update({"blocks.input.weight": np.zeros((6, 3, 7, 7))}), "impossible sizes .config: hidden_size"),
        (lambda t: t.update({"blocks.input.weight": np.zeros((0, 3, 7, 7))}), "impossible sizes .config: hidden_size"),
        (lambda t: t.update({f"ema.{n}": a for n, a in t.items()}), "has two encoders, under '' and 'ema.'"),
        (lambda t: t.clear() or t.update({"model.weight": np.zeros(3)}), "no tokenizer: no tensor blocks.input.w"),
    ],
)
def test_wrong_tensors(tmp_path, change, match):
    refused(flava_file(tmp_path, change), match)


def test_a_decoder_alone():
    refused(FOLDER / "decoder.pkl", "has a decoder but no encoder; give a file of DALL-E's or Flava's encoder, or a")


def test_halves_that_do_not_belong_together(both):
    shutil.copy(FOLDER / "flava.safetensors", both / "other.safetensors")
    tensors = {n: a for n, a in load_safetensors(FOLDER / "flava.safetensors").items() if "block_2" not in n}
    (both / "encoder.pkl").unlink()
    save_file(tensors, both / "encoder.safetensors")
    refused(both, "has an encoder with num_blocks_per_group 1 and a decoder with 2")


def test_a_config_that_says_something_else(both, tmp_path):
    load(both).save_pretrained(tmp_path / "own")
    file = tmp_path / "own" / "config.json"
    for change, match in (
        ({"hidden_size": 8}, "config.json says hidden_size 8, but the tensors have 4"),
        ({"n_init": None}, "config.json says n_init None, but the tensors have 8"),
        ({"image_size": -1}, "config.json: config: image_size must be an integer"),
        ({"num_groups": 10**9}, "config.json: config: num_groups must be"),
    ):
        file.write_text(json.dumps({**json.loads(load(both).config.to_json_string()), **change}))
        refused(tmp_path / "own", match)
    file.write_text("{")
    refused(tmp_path / "own", "config.json cannot be read")


def test_missing_files_and_wrong_keywords(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder has no checkpoint"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load(tmp_path / "encoder.pkl")
    with pytest.raises(TypeError, match=r"unknown keyword 'image_sise' \(did you mean image_size"):
        load(FOLDER / "encoder.pkl", image_sise=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder to save into, found a file"):
        load(FOLDER / "encoder.pkl").save_pretrained(tmp_path / "file")


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def module(name: bytes, state: bytes) -> bytes:
    """A pickled object of a class of DALL-E's package with that state."""
    return b"c" + name + b"\n)\x81" + state + b"b"


@pytest.mark.parametrize("container", [torch_zip, legacy])
def test_no_code_of_a_pickled_module_runs(tmp_path, container):
    """Functions within a module's attributes, as its class, and as a way of making it."""
    canary = tmp_path / "canary"
    call = pickle.dumps(Evil(exec, f"open({str(canary)!r}, 'w')"), 2)[2:-1]
    for inner in (
        module(b"dall_e.encoder\nEncoder", b"}" + text("_modules") + b"}" + text("blocks") + call + b"ss"),
        module(b"dall_e.encoder\nEncoder", b"}" + text("device") + call + b"s"),
        call,
        b"cdall_e\nload_model\n" + text(str(canary)) + b"\x85R",
        b"cdall_e.encoder\nEncoder.__init__\n)R",
        module(b"os\nsystem", b"}"),
    ):
        file = tmp_path / "encoder.pkl"
        file.write_bytes(container(b"\x80\x02" + inner + b"."))
        refused(file, "refers to|no named tensors|no tokenizer|whose code is not run")
    assert not canary.exists()


def test_modules_within_modules_end(tmp_path):
    file = tmp_path / "encoder.pkl"
    inner = b"N" + (b"q\x01cdall_e.encoder\nEncoder\n)\x81}" + text("_modules") + b"}" + text("a") + b"h\x01ssb") * 9000
    itself = b"cdall_e.encoder\nEncoder\n)\x81q\x02}" + text("_modules") + b"}" + text("a") + b"h\x02ssb"
    for content in (inner, itself):
        file.write_bytes(torch_zip(b"\x80\x02" + content + b"."))
        assert_cheap(lambda: refused(file, "."))


@pytest.mark.parametrize("name", ["encoder.pkl", "decoder.pkl", "flava.safetensors"])
def test_files_cut_off_anywhere(tmp_path, name):
    content, file = (FOLDER / name).read_bytes(), tmp_path / name
    for part in range(1, 24):
        file.write_bytes(content[: len(content) * part // 24])
        with pytest.raises(CheckpointError):
            load(file)


def test_changed_bytes_are_read_or_refused(tmp_path):
    rng, start = random.Random(0), time.thread_time()
    for name in ("encoder.pkl", "flava.bin"):
        content, file = (FOLDER / name).read_bytes(), tmp_path / name
        for _ in range(60):
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
            try:
                config, arrays = read_tokenizer(file)
            except CheckpointError as error:
                assert str(error).startswith(str(file))
            else:
                assert {n: a.shape for n, a in arrays.items()} == param_shapes(config)
    assert time.thread_time() - start < 20


def test_sizes_are_checked_before_anything_is_made(tmp_path):
    """A header that promises 2^40 elements, and names of a billion groups."""
    tensors = load_safetensors(FOLDER / "flava.safetensors")
    header = {"blocks.input.weight": {"dtype": "F32", "shape": [1 << 30, 3, 7, 7], "data_offsets": [0, 4]}}
    raw = json.dumps(header).encode()
    file = tmp_path / "huge.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    assert_cheap(lambda: refused(file, "blocks.input.weight"))
    far = {FLAVA.translate(f"groups.{10**9}.blocks.{10**9}.path.0.bias"): np.zeros(1, np.float32)}
    save_file({**tensors, **far}, file)
    assert_cheap(lambda: refused(file, "1 tensors that no encoder of these sizes has, such as blocks.group_1000000001"))
