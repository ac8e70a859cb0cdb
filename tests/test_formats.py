"""Checkpoints of every format, made by their home software, give the values that it had, without copies."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from minibeit.checkpoint.formats import TensorInfo, Tensors, load_file, read_tensors, write_safetensors
from minibeit.checkpoint.formats.lazy_tensors import bfloat16_to_float32, float32_to_bfloat16
from minibeit.errors import CheckpointError
from minibeit.file_names import FOLDER_FILES

FOLDER = Path(__file__).parent / "data" / "formats"
EXPECTED = safetensors.numpy.load_file(FOLDER / "expected.safetensors")
EXPECTED_FLAX = safetensors.numpy.load_file(FOLDER / "expected_flax.safetensors")


def assert_same(tensors, expected):
    """Same names, shapes, dtypes and bits."""
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        array = tensors[name]
        assert (array.shape, array.dtype) == (value.shape, value.dtype), name
        assert array.tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    ("file", "format", "wrapper"),
    [
        ("tensors.safetensors", "safetensors", None),
        ("unilm.pth", "torch", "model"),
        ("mmseg.pth", "torch", "state_dict"),
        ("legacy.pth", "torch-legacy", "model"),
    ],
)
def test_torch_state_in_every_container(file, format, wrapper):
    loaded = load_file(FOLDER / file)
    assert (loaded.format, loaded.wrapper, loaded.files) == (format, wrapper, (FOLDER / file,))
    assert_same(loaded.tensors, EXPECTED)
    assert_same(read_tensors((FOLDER / file).read_bytes()), EXPECTED)


@pytest.mark.parametrize("file", ["arrays.npz", "compressed.npz"])
def test_npz(file):
    expected = {name: value for name, value in EXPECTED.items() if name != "brain"}
    assert_same(load_file(FOLDER / file).tensors, expected | {"fortran": EXPECTED["double"]})


def test_flax_file_of_transformers():
    loaded = load_file(FOLDER / "flax_model.msgpack")
    assert (loaded.format, loaded.wrapper) == ("flax", None)
    assert "beit/encoder/layer/1/attention/attention/query/kernel" in loaded.tensors
    assert_same(loaded.tensors, EXPECTED_FLAX)


def test_flax_chunks_bfloat16_and_wrapper():
    loaded = load_file(FOLDER / "flax_chunked.msgpack")
    wide = np.arange(30, dtype=np.float32).reshape(5, 6) / 7
    assert (loaded.wrapper, loaded.extra) == ("params", {"step": 7})
    np.testing.assert_array_equal(loaded.tensors["a/chunked"], wide)
    np.testing.assert_array_equal(loaded.tensors["a/brain"], bfloat16_to_float32(float32_to_bfloat16(wide)))
    assert loaded.tensors.info("a/brain").dtype == "bfloat16"
    assert loaded.tensors["s"] == np.float32(2.5)


def test_what_stands_beside_the_state_dict():
    for file in ("unilm.pth", "legacy.pth"):
        extra = load_file(FOLDER / file).extra
        assert extra["epoch"] == 29 and extra["scaler"] == {"scale": 65536.0}
        assert extra["args"] == {
            "model": "beit_base", "lr": 5e-4, "betas": [0.9, 0.98], "device": "cpu", "none": None,
        }  # fmt: skip
        assert extra["optimizer"]["state"][0]["exp_avg"] == TensorInfo("float32", (3,))
        assert (extra["max_accuracy"], extra["best"], extra["seen"], extra["size"]) == (85.2, 3, [1, 2], [2, 3])
        assert "model" not in extra
    meta = load_file(FOLDER / "mmseg.pth").extra["meta"]
    assert meta == {"CLASSES": ["wall", "sky"], "PALETTE": [[1, 2, 3], [4, 5, 6]]}


def test_pickled_module_of_a_known_class_is_read_inert():
    loaded = load_file(FOLDER / "encoder.pkl")
    assert {name: array.shape for name, array in loaded.tensors.items()} == {
        "blocks.block_1.res_path.conv_1.w": (4, 3, 1, 1),
        "blocks.block_1.res_path.conv_1.b": (4,),
    }


def test_tensors_are_views_of_the_mapped_file():
    for file in ("tensors.safetensors", "unilm.pth", "arrays.npz"):
        tensors = read_tensors(FOLDER / file)
        name = "encoder.weight"
        assert np.shares_memory(tensors[name], tensors[name])
        assert not tensors[name].flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            tensors[name][0, 0] = 0
    shared = read_tensors(FOLDER / "unilm.pth")
    assert np.shares_memory(shared["shared.a"], shared["shared.b"])


def test_floats_on_request():
    tensors = read_tensors(FOLDER / "tensors.safetensors")
    assert tensors.info("brain") == TensorInfo("bfloat16", (5, 6))
    assert tensors["half"].dtype == np.float16 and tensors.read("half").dtype == np.float32
    assert tensors.read("index").dtype == np.int64 and tensors.read("mask").dtype == bool
    assert tensors.read("half", np.float64).dtype == np.float64
    assert tensors.nbytes == sum(tensors.info(name).nbytes for name in tensors)


def test_bfloat16_rounds_to_nearest_even_like_torch():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    bits[:8] = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x00000001]
    values = bits.view(np.float32)
    ours = float32_to_bfloat16(values)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(ours[numbers], theirs[numbers])
    assert np.isnan(bfloat16_to_float32(ours[~numbers])).all()
    assert np.signbit(bfloat16_to_float32(ours[~numbers])).tolist() == np.signbit(values[~numbers]).tolist()
    every = np.arange(1 << 16, dtype=np.uint16)
    back = float32_to_bfloat16(bfloat16_to_float32(every))
    signalling = np.isnan(bfloat16_to_float32(every)) & (every & 0x40 == 0)
    np.testing.assert_array_equal(back[~signalling], every[~signalling])


def test_written_files_load_in_the_safetensors_package_bit_identically(tmp_path):
    write_safetensors(tmp_path / "ours.safetensors", EXPECTED)
    assert_same(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), EXPECTED)
    assert_same(read_tensors(tmp_path / "ours.safetensors"), EXPECTED)
    with safetensors.safe_open(tmp_path / "ours.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    safetensors.numpy.save_file(EXPECTED, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_file_written_from_tensors_keeps_their_dtypes(tmp_path):
    source = FOLDER / "tensors.safetensors"
    write_safetensors(tmp_path / "copy.safetensors", read_tensors(source))
    assert (tmp_path / "copy.safetensors").read_bytes() == source.read_bytes()
    write_safetensors(tmp_path / "legacy.safetensors", read_tensors(FOLDER / "legacy.pth"))
    assert (tmp_path / "legacy.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_writing_another_dtype(tmp_path, dtype):
    values = {
        "w": np.linspace(-3, 3, 1001),
        "i": np.arange(5),
        "big endian": np.arange(3, dtype=">f4"),
        "0": np.ones(()),
    }
    write_safetensors(tmp_path / "out", values, {"format": "pt", "note": "é"}, dtype)
    loaded = load_file(tmp_path / "out")
    assert loaded.metadata == {"format": "pt", "note": "é"}
    assert {name: loaded.tensors.info(name).dtype for name in values} == {
        "w": dtype, "i": "int64", "big endian": dtype, "0": dtype,
    }  # fmt: skip
    unit = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(loaded.tensors.read("w"), values["w"], rtol=unit, atol=1e-7)
    np.testing.assert_array_equal(loaded.tensors["i"], np.arange(5))


def test_written_file_loads_in_torch(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    write_safetensors(tmp_path / "out", {"w": EXPECTED["encoder.weight"]}, dtype="bfloat16")
    tensor = load_torch(tmp_path / "out")["w"]
    want = torch.from_numpy(EXPECTED["encoder.weight"]).bfloat16()
    assert tensor.dtype == torch.bfloat16 and torch.equal(tensor.nan_to_num(7), want.nan_to_num(7))


def test_refusals_of_the_writer_leave_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="'w' has values beyond the range of float16"):
        write_safetensors(tmp_path / "out", {"w": np.array([1.0, 7e4])}, dtype="float16")
    with pytest.raises(CheckpointError, match="'w' has values beyond the range of bfloat16"):
        write_safetensors(tmp_path / "out", {"w": np.array([3.4e38], np.float32)}, dtype="bfloat16")
    with pytest.raises(CheckpointError, match="'w' has dtype complex64"):
        write_safetensors(tmp_path / "out", {"w": np.zeros(2, np.complex64)})
    with pytest.raises(CheckpointError, match="'__metadata__'"):
        write_safetensors(tmp_path / "out", {"__metadata__": np.zeros(2)})
    with pytest.raises(ValueError, match="float8"):
        write_safetensors(tmp_path / "out", {}, dtype="float8")
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        write_safetensors(tmp_path / "no" / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_writer_streams_one_tensor_at_a_time(tmp_path):
    class Lazy(dict):
        def __getitem__(self, name):
            return np.full(3, super().__getitem__(name), np.float32)

    write_safetensors(tmp_path / "out", Lazy(a=1, b=2))
    np.testing.assert_array_equal(read_tensors(tmp_path / "out")["b"], [2, 2, 2])


def shards(folder: Path, suffix: str = "safetensors") -> dict[str, str]:
    """A checkpoint in two files and its index; returns the weight map."""
    names = sorted(EXPECTED)
    parts = {f"model-0000{part + 1}-of-00002.{suffix}": names[part::2] for part in range(2)}
    for file, members in parts.items():
        write_safetensors(folder / file, {name: EXPECTED[name] for name in members})
    places = {name: file for file, members in parts.items() for name in members}
    write_index(folder, places)
    return places


def write_index(folder: Path, places: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def test_sharded(tmp_path):
    shards(tmp_path)
    loaded = load_file(tmp_path)
    assert loaded.format == "safetensors" and loaded.metadata == {"total_size": 1} and len(loaded.files) == 3
    assert_same(loaded.tensors, EXPECTED)
    assert_same(read_tensors(tmp_path / "model.safetensors.index.json"), EXPECTED)


def test_sharded_torch_files(tmp_path):
    shutil.copy(FOLDER / "mmseg.pth", tmp_path / "pytorch_model-00001-of-00001.bin")
    places = dict.fromkeys(EXPECTED, "pytorch_model-00001-of-00001.bin")
    write_index(tmp_path, places, "pytorch_model.bin.index.json")
    assert_same(read_tensors(tmp_path), EXPECTED)


def test_index_and_shards_must_agree(tmp_path):
    places = shards(tmp_path)
    write_index(tmp_path, places | {"more": next(iter(places.values()))})
    with pytest.raises(CheckpointError, match="lists tensor 'more'"):
        load_file(tmp_path)
    places.pop("half")
    write_index(tmp_path, places)
    with pytest.raises(CheckpointError, match="says that tensor 'half'"):
        load_file(tmp_path)


def test_hub_cache_of_links(tmp_path):
    blobs = tmp_path / "models--microsoft--beit" / "blobs"
    snapshot = tmp_path / "models--microsoft--beit" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shards(blobs)
    for file in list(blobs.iterdir()):
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    assert_same(read_tensors(snapshot), EXPECTED)
    local = tmp_path / "local"  # where older huggingface_hub put links for local_dir=
    local.mkdir()
    for file in list(blobs.iterdir()):
        (local / file.name).symlink_to(file)
    assert_same(read_tensors(local), EXPECTED)


def test_folder_prefers_safetensors_and_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_file(tmp_path)
    assert all(name in str(error.value) for name in FOLDER_FILES) and str(tmp_path) in str(error.value)
    for file, format in [
        ("flax_model.msgpack", "flax"), ("legacy.pth", "torch-legacy"), ("tensors.safetensors", "safetensors"),
    ]:  # fmt: skip
        name = {"legacy.pth": "pytorch_model.bin", "tensors.safetensors": "model.safetensors"}.get(file, file)
        shutil.copy(FOLDER / file, tmp_path / name)
        assert load_file(tmp_path).format == format


def test_the_suffix_does_not_matter(tmp_path):
    for file in ("tensors.safetensors", "unilm.pth", "legacy.pth", "flax_model.msgpack", "arrays.npz"):
        shutil.copy(FOLDER / file, tmp_path / "weights.safetensors")
        assert load_file(tmp_path / "weights.safetensors").format == load_file(FOLDER / file).format


def test_repacked_torch_archive(tmp_path):
    """Unpacked and zipped again by a user: deflated, without torch's alignment."""
    with zipfile.ZipFile(FOLDER / "unilm.pth") as old, zipfile.ZipFile(tmp_path / "new.pth", "w", 8) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert_same(read_tensors(tmp_path / "new.pth"), EXPECTED)


def test_other_torch_objects(tmp_path):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "attributes of tensors are dropped"
    objects = {
        "flat": {"w": torch.ones(2), "note": "text", "count": 3},
        "deepspeed": {"module": {"w": torch.ones(2)}, "optimizer": None},
        "twice": {"state_dict": {"model": {"w": torch.ones(2)}}},
        "attributes": {"w": parameter},
        "v3": {"w": torch.arange(4).to(torch.uint16)},
        "strided": {"w": torch.arange(20).as_strided((3, 4), (4, 1), 2)},
        "negative": {"w": -torch.arange(4, dtype=torch.int16)},
    }
    for name, value in objects.items():
        for legacy in (False, True):
            for protocol in (2, 3, 4):
                options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
                torch.save(value, tmp_path / name, **options)
                loaded = load_file(tmp_path / name)
                inner = value
                for key in (loaded.wrapper or "").split("."):
                    inner = inner[key] if key else inner
                assert loaded.wrapper == {"deepspeed": "module", "twice": "state_dict.model"}.get(name)
                np.testing.assert_array_equal(loaded.tensors["w"], inner["w"].detach().numpy())
    assert load_file(tmp_path / "flat").extra == {"note": "text", "count": 3}


def test_mapping_protocol():
    tensors = read_tensors(FOLDER / "tensors.safetensors")
    assert isinstance(tensors, Tensors) and len(tensors) == len(EXPECTED) and "half" in tensors and "x" not in tensors
    with pytest.raises(KeyError):
        tensors["x"]
