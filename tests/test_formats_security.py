"""Hostile and damaged checkpoint files: one sentence that names the file, soon, without much memory."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import fuzz_formats
import numpy as np
import pytest
from hostile import FOLDER, assert_cheap, refused, torch_zip

from minibeit.checkpoint.formats import file_bytes, load_file
from minibeit.errors import CheckpointError


def safetensors_file(header: object, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


# --- zip archives --------------------------------------------------------------------------------------------------


def changed_zip(change) -> bytes:
    """A valid torch archive after `change(bytearray, offset of the first directory entry)`."""
    content = bytearray((FOLDER / "mmseg.pth").read_bytes())
    change(content, content.index(b"PK\1\2"))
    return bytes(content)


def put(layout: str, at: int, value: int):
    return lambda content, entry: struct.pack_into(layout, content, entry + at, value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("<H", 8, 1), "encrypted"),
        (put("<H", 10, 12), "packed in another way"),
        (put("<L", 24, 1 << 30), "two different sizes"),
        (put("<L", 42, 1 << 30), "truncated"),
        (put("<L", 42, 10), "not what the zip directory says"),
        (put("<H", 28, 60000), "directory is damaged"),
        (put("<H", 28, 0), "leads out of its folder"),
        (put("<L", 20, 0xFFFFFFFF), "zip64 field"),
    ],
)
def test_zip_directory_lies(change, match):
    refused(changed_zip(change), match)


def zip_of(names: list[str], contents: list[bytes], method: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in zip(names, contents):
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../../etc/x.npy", "/etc/x.npy", "C:/x.npy", "a/../x.npy", "a\\x.npy"])
def test_zip_names_that_lead_out(name):
    refused(zip_of([name], [b""]), "leads out of its folder")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_twice_the_same_entry():
    refused(zip_of(["a/data.pkl", "a/data.pkl"], [b"}.", b"}."]), "twice")


def test_zip_overlapping_entries():
    """Two directory entries of one content, as in David Fifield's zip bomb."""
    content = bytearray(zip_of(["a.npy", "b.npy"], [bytes(100), bytes(100)]))
    second = content.rindex(b"PK\1\2")
    content[second + 46 : second + 51] = b"a.npy"
    struct.pack_into("<L", content, second + 42, 0)
    refused(bytes(content), "twice|overlaps")
    content[0:] = content.replace(b"b.npy", b"a.npx")
    refused(bytes(content), "twice|overlaps|not what")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_zip_bombs():
    zeros = npy(np.zeros(50_000_000, np.float32))
    bomb = zip_of(["a.npy", "b.npy"], [zeros, zeros], zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1_000_000
    assert_cheap(lambda: refused(bomb, "unpacks to 400,000,"))
    # a directory that declares little for a content that unpacks to much
    content = bytearray(zip_of(["a.npy"], [zeros], zipfile.ZIP_DEFLATED))
    struct.pack_into("<L", content, content.rindex(b"PK\1\2") + 24, 128 + 4_000)
    assert_cheap(lambda: refused(bytes(content), "takes|unpack"))
    refused(torch_zip(b"\x80\x02" + b"}0" * 10_000_000 + b"}.", zipfile.ZIP_DEFLATED), "steps")


def test_zip_of_something_else():
    refused(zip_of(["word/document.xml"], [b"<x/>"]), "neither torch.save")
    refused(zip_of(["a/data.pkl", "a/constants.pkl"], [b"", b""]), "TorchScript")
    refused(zip_of(["a/data.pkl", "a/byteorder"], [b"", b"big"]), "big-endian")
    refused(zip_of(["a.npy", "b.exe"], [npy(np.ones(2)), b""]), "not a .npy array")


def test_npz_without_pickle():
    for array, match in [
        (np.array([{}], dtype=object), "'|O'"),
        (np.array(["text"]), "<U4"),
        (np.zeros(2, [("a", "f4")]), "not that of a plain array"),
        (np.zeros(2, ">f4"), ">f4"),
        (np.zeros(2, np.complex64), "<c8"),
    ]:
        refused(zip_of(["a.npy"], [npy(array)]), match)
    good = npy(np.zeros((2, 3), np.float32))
    for old, new in [(b"(2, 3)", b"(2, 4)"), (b"(2, 3)", b"(-2,3)"), (b"'<f4'", b"'<f8'"), (b"fortran", b"fartran")]:
        refused(zip_of(["a.npy"], [good.replace(old, new)]), "a.npy")
    refused(zip_of(["a.npy"], [good.replace(b"(2, 3), }     ", b"(2, 9999999),}")]), "a.npy")


# --- safetensors ---------------------------------------------------------------------------------------------------


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x05" + bytes(7) + b"{", "truncated"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "truncated"),
        (struct.pack("<Q", 1 << 40) + b"{}", "truncated"),
        (safetensors_file(b"{"), "not JSON"),
        (safetensors_file(b'{"a": 1}'), "entry of tensor 'a'"),
        (safetensors_file(b'{"\xff": 1}'), "not UTF-8"),
        (safetensors_file(b'{"a":' * 100_000), "nested too deeply"),
        (safetensors_file(b'{"a":' + b"[" * 1_000_000), "nested too deeply"),
        (safetensors_file(b'{"a":' + b"9" * 1_000_000 + b"}"), "integer of 1000000 digits"),
        (safetensors_file(b'{"a":NaN}'), "NaN"),
        (safetensors_file(b'{"a":{},"a":{}}'), "key 'a' twice"),
        (safetensors_file(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "twice"),
        (safetensors_file({"a": entry("F99")}, bytes(4)), "dtype 'F99'"),
        (safetensors_file({"a": entry(None)}, bytes(4)), "dtype 'NoneType'"),
        (safetensors_file({"a": entry(["F32"])}, bytes(4)), "dtype 'list'"),
        (safetensors_file({"a": entry(shape=[-1])}, bytes(4)), "shape"),
        (safetensors_file({"a": entry(shape=[True])}, bytes(4)), "shape"),
        (safetensors_file({"a": entry(shape=[1.0])}, bytes(4)), "shape"),
        (safetensors_file({"a": entry(shape="1")}, bytes(4)), "shape"),
        (safetensors_file({"a": entry(shape=[1] * 1000)}, bytes(4)), "shape"),
        (safetensors_file({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(4)), "shape"),
        (safetensors_file({"a": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])}), "shape"),
        (safetensors_file({"a": entry(shape=[2])}, bytes(4)), "takes 8 bytes"),
        (safetensors_file({"a": entry(offsets=[0])}, bytes(4)), "two integers"),
        (safetensors_file({"a": entry(offsets=[False, 4])}, bytes(4)), "two integers"),
        (safetensors_file({"a": entry(offsets=[0.0, 4])}, bytes(4)), "two integers"),
        (safetensors_file({"a": entry(offsets=[-4, 0])}, bytes(4)), "data_offsets"),
        (safetensors_file({"a": entry(offsets=[4, 0])}, bytes(4)), "data_offsets"),
        (safetensors_file({"a": entry(offsets=[4, 8])}, bytes(4)), "truncated"),
        (safetensors_file({"a": entry(offsets=[4, 8])}, bytes(8)), "leaves a hole"),
        (safetensors_file({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
        (safetensors_file({"a": entry(), "b": entry(offsets=[3, 7])}, bytes(8)), "overlaps"),
        (safetensors_file({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "hole"),
        (safetensors_file({"a": entry()}, bytes(5)), "1 bytes follow"),
        (safetensors_file({"a": {**entry(), "more": 1}}, bytes(4)), "entry of tensor 'a'"),
        (safetensors_file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "entry of tensor 'a'"),
        (safetensors_file({"__metadata__": {"a": 1}}), "__metadata__"),
        (safetensors_file({"__metadata__": []}), "__metadata__"),
        (safetensors_file({"\ud800": entry()}, bytes(4)), "not valid text"),
        (safetensors_file({"\x1b[2J" * 100: entry("no")}, bytes(4)), r"\\x1b"),
    ],
)
def test_safetensors_headers_that_lie(content, match):
    refused(content, match)


@pytest.mark.parametrize("unit", [b"{},", b"[],", b'"",', b"1,", b"1.5,", b'{"a":0},', b'"\xf0\x9f\x98\x80",'])
def test_safetensors_largest_header(unit):
    header = b'{"a":[' + unit * ((file_bytes.MAX_JSON - 30) // len(unit)) + b"0]}"
    content = safetensors_file(header)
    assert_cheap(lambda: refused(content, "entry of tensor 'a'"))
    refused(safetensors_file(header + b" " * 1000), "more than the")


# --- msgpack -------------------------------------------------------------------------------------------------------


def packed_array(shape: bytes, dtype: bytes, data: bytes, kind: int = 1) -> bytes:
    inner = b"\x93" + shape + bytes([0xA0 + len(dtype)]) + dtype + b"\xc6" + struct.pack(">I", len(data)) + data
    return b"\xc9" + struct.pack(">Ib", len(inner), kind) + inner


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x81\xa1a" + packed_array(b"\x91\x02", b"float32", bytes(4)), "takes 8 bytes, not 4"),
        (b"\x81\xa1a" + packed_array(b"\x91\xff", b"float32", b""), "shape"),
        (b"\x81\xa1a" + packed_array(b"\x91\xc3", b"float32", bytes(4)), "shape"),
        (b"\x81\xa1a" + packed_array(b"\x92" + b"\xcf" + b"\x3f" * 8 + b"\x00", b"float32", b""), "shape"),
        (b"\x81\xa1a" + packed_array(b"\x91\x01", b"object", bytes(4)), "dtype 'object'"),
        (b"\x81\xa1a" + packed_array(b"\x91\x01", b"float32", bytes(4), 2), "extension of type 2"),
        (b"\x81\xa1a" + packed_array(b"\x91\x01", b"float32", bytes(4)) + b"x", "1 bytes follow"),
        (b"\x82\xa1a\x01\xa1a\x01", "key 'a' twice"),
        (b"\x81\x01\x01", "key of type int"),
        (b"\x81\x90\x01", "key of type list"),
        (b"\x81\xa1\xff\x01", "not UTF-8"),
        (b"\x81\xa1a\xc1", "0xc1"),
        (b"\xdf\xff\xff\xff\xff", "claims 8,589,934,590 values"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "claims 4,294,967,295 values"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "cut off"),
        (b"\x81\xa1a\xdb\xff\xff\xff\xff", "cut off"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "cut off"),
        (b"\x81\xa1a" * 1000, "levels"),
        (b"\x81\xa1a" + b"\x91" * 100_000, "levels"),
        (b"\x81\xa1a\x01", "no named tensors"),
        (b"\x81\xa1a\x81\xb9__msgpack_chunked_array__\xc3", "chunk"),
        (b"\x81\xa1a\x83\xb9__msgpack_chunked_array__\xc3\xa5shape\x91\x01\xa6chunks\x91\x01", "chunk"),
        (
            b"\x81\xa1a\x83\xb9__msgpack_chunked_array__\xc3\xa5shape\x91\x02\xa6chunks\x91"
            + packed_array(b"\x91\x01", b"float32", bytes(4)),
            "do not make up its shape",
        ),
    ],
)
def test_msgpack_that_lies(content, match):
    refused(content, match)


def test_msgpack_bombs():
    lists = b"\x81\xa1a\xdd" + struct.pack(">I", 20_000_000) + b"\x90" * 20_000_000
    arrays = (
        b"\x81\xa1a\xdd"
        + struct.pack(">I", 2000)
        + packed_array(b"\xdd" + struct.pack(">I", 10_000) + b"\x01" * 10_000, b"float32", bytes(4)) * 2000
    )
    for content in (lists, arrays):
        assert_cheap(lambda: refused(content, "."))  # noqa: B023


# --- index files, links, other files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "C:x", "a\\b", "a\0b", "no.safetensors"],
)
def test_index_points_outside(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes((FOLDER / "tensors.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="names the file") as error:
        load_file(folder)
    assert str(index) in str(error.value)


def test_links_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((FOLDER / "tensors.safetensors").read_bytes())
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .* outside its folder"):
        load_file(folder)
    assert load_file(folder / "model.safetensors").format == "safetensors"  # the user named this very file
    (folder / "model.safetensors").unlink()
    (folder / "part.safetensors").symlink_to(Path("..") / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"is a link to .* outside its folder"):
        load_file(folder)
    (folder / "part.safetensors").unlink()
    (folder / "part.safetensors").symlink_to("part.safetensors")
    with pytest.raises(CheckpointError, match="cannot be found"):
        load_file(folder)


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"{" * 100_000]
)
def test_index_is_no_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json: "):
        load_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (npy(np.ones(3)), "savez"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"hello", "is not a safetensors, torch, Flax or npz file"),
        (b"\0", "is not a"),
        (b"", "is not a"),
    ],
)
def test_other_files(content, match):
    refused(content, match)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_file(tmp_path / "none.bin")
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "empty" / "x", tmp_path / ("x" * 5000), "a\0b", "/dev/zero"):
        with pytest.raises(CheckpointError, match=r"empty|cannot be opened|not a regular file"):
            load_file(path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_file(tmp_path / "fifo")


@pytest.mark.parametrize("file", [name for names in fuzz_formats.CORPUS.values() for name in names])
def test_truncated(file):
    """At every byte of the first and last 500 and at every fifth between."""
    content = (FOLDER / file).read_bytes()
    size = len(content)
    for length in sorted({*range(min(500, size)), *range(max(0, size - 500), size), *range(0, size, 5)}):
        assert fuzz_formats.check(content[:length]) == "refused", length


@pytest.mark.parametrize("format", fuzz_formats.CORPUS)
def test_fuzz(format):
    outcomes, _ = fuzz_formats.fuzz(format, 400, seed=1)
    assert outcomes["loaded"] > 10 and outcomes["refused"] > 200


@pytest.mark.slow
@pytest.mark.parametrize("format", fuzz_formats.CORPUS)
def test_fuzz_long(format):
    outcomes, _ = fuzz_formats.fuzz(format, 20_000)
    assert outcomes["loaded"] > 500 and outcomes["refused"] > 10_000
