"""Addresses that fsspec opens, used as paths are: found, read, and written complete or not at all."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minibeit.places
from minibeit import BeitImageProcessor, ImageError
from minibeit.checkpoint.formats.npz_file import write_npz
from minibeit.drawing import save_png
from minibeit.files import atomic_write, identity
from minibeit.images.opening import read_picture
from minibeit.places import Address, place, within
from minibeit.train.splits import images_in, subfolders

pytest.importorskip("fsspec", reason="addresses need it")
import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class Renaming(MemoryFileSystem):
    """A file system whose files are there while they are written, as those of sftp:// are."""

    protocol = "renaming"
    store: dict = {}
    pseudo_dirs = [""]
    breaks = False

    def pipe_file(self, path, value, **options):
        super().pipe_file(path, value[: len(value) // 2] if self.breaks else value, **options)
        if self.breaks:
            raise ConnectionError("the line is down")


class Unwilling(MemoryFileSystem):
    """One that fails whatever is asked, as with wrong keys."""

    protocol = "unwilling"
    tried = 0

    def _refuse(self, *_, **__):
        type(self).tried += 1
        raise RuntimeError("the keys\nare wrong")

    info = ls = find = open = pipe_file = _refuse


@pytest.fixture(autouse=True)
def systems(monkeypatch):
    fsspec.register_implementation("renaming", Renaming, clobber=True)
    fsspec.register_implementation("unwilling", Unwilling, clobber=True)
    monkeypatch.setattr(Renaming, "breaks", False)
    monkeypatch.setattr(minibeit.places, "PAUSE", 0.0)
    yield
    for system in (MemoryFileSystem, Renaming):
        system.store.clear()
        system.pseudo_dirs[:] = [""]


def test_a_text_names_a_path_or_an_address():
    assert isinstance(place("photos/a.png"), Path) and isinstance(place("C://a.png"), Path)
    there = place("s3://bucket/photos/a.b.png")
    assert isinstance(there, Address) and str(there) == "s3://bucket/photos/a.b.png"
    assert (there.name, there.stem, there.suffix) == ("a.b.png", "a.b", ".png")
    assert str(there.parent) == "s3://bucket/photos" and str(there.parent.parent.parent) == "s3://bucket"
    assert str(Address("s3://bucket") / "." / "x/./y.csv") == "s3://bucket/x/y.csv"
    assert there / "../b.png" == Address("s3://bucket/photos/b.png") and len({there, place(str(there))}) == 1
    assert there.relative_to(Address("s3://bucket")).as_posix() == "photos/a.b.png"
    assert pickle.loads(pickle.dumps(there)) == there


@pytest.mark.parametrize("root", [Path("/data"), Address("s3://bucket")])
def test_addresses_are_sorted_as_paths_are(root):
    names = ["b/a.png", "b a.png", "b", "a.png", "b-1/a.png"]
    found = sorted(root / name for name in names)
    assert [str(one)[len(str(root)) + 1 :] for one in found] == ["a.png", "b", "b/a.png", "b a.png", "b-1/a.png"]


def test_lines_of_lists_begin_at_the_list_if_at_nothing_else(tmp_path):
    there = Address("s3://bucket/lists")
    assert str(within(there, "../a.png")) == "s3://bucket/a.png"
    assert within(there, str(tmp_path)) == tmp_path and within(tmp_path, "a.png") == tmp_path / "a.png"
    assert within(tmp_path, "gs://other/a.png") == within(there, "gs://other/a.png") == Address("gs://other/a.png")


@pytest.mark.parametrize("form", ["memory://data", "memory:///data/", "file://{0}", "file://{0}/"])
def test_what_is_there_is_what_a_path_shows(form, tmp_path):
    for name in ("ant/2.png", "ant/deep/1.PNG", "bee/3.jpg", "ant/.hidden.png", "ant/notes.txt", ".git/4.png"):
        for root in (tmp_path, "memory://data"):
            with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
                file.write(b"x")
    there = place(form.format(tmp_path))
    assert there.is_dir() and there.exists() and not there.is_file() and not (there / "gone").exists()
    assert (there / "ant/2.png").is_file() and not (there / "ant/2.png").is_dir()
    for folder in ("", "ant"):
        here = tmp_path / folder
        assert [one.name for one in subfolders(there / folder)] == [one.name for one in subfolders(here)]
        found = [image.relative_to(there).as_posix() for image in images_in(there / folder)]
        assert found == [image.relative_to(tmp_path).as_posix() for image in images_in(here)] and found
        assert all(place(str(image)).is_file() for image in images_in(there / folder))
    with pytest.raises(FileNotFoundError, match=r"gone: there is no such folder$"):
        list((there / "gone").iterdir())
    assert identity(str(there / "ant/2.png")) == identity(there / "ant" / "2.png") != identity(there / "ant")


def test_entries_of_a_listing_are_not_asked_for_again(monkeypatch):
    files = fsspec.filesystem("memory")
    files.pipe_file("/data/ant/1.png", b"x")
    asked = []
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path, **_: asked.append(path))
    assert len(subfolders(place("memory://data"))) == len(images_in(place("memory://data"))) == 1
    assert not asked


def test_an_image_at_an_address_is_read_as_a_file_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    for root in (tmp_path, place("memory://photos")):
        save_png(Image.fromarray(pixels), root / "a.png")
    there, processor = place("memory://photos/a.png"), BeitImageProcessor(size=16)
    assert np.array_equal(np.asarray(read_picture(there)), pixels)
    expected = processor(tmp_path / "a.png").pixel_values
    assert np.array_equal(processor(there).pixel_values, expected)
    assert np.array_equal(processor([there, there]).pixel_values[1], expected[0])
    (place("memory://photos/none.png")).write_bytes(b"")
    place("memory://photos/text.png").write_bytes(b"not an image")
    for name, said in (("none", "found an empty file"), ("text", "in a format"), ("gone", "there is no such file$")):
        with pytest.raises(ImageError, match=rf"^memory://photos/{name}.png: .*{said}"):
            processor(place(f"memory://photos/{name}.png"))
    with pytest.raises(
        ImageError, match=r"^memory://photos/a.png: expected an image on this machine, found an address"
    ):
        processor("memory://photos/a.png")  # only who asks for it has it fetched


def test_a_file_is_tried_three_times_and_of_a_limited_size(monkeypatch):
    with pytest.raises(OSError, match=r"^unwilling://a: cannot be fetched \(the keys are wrong\), in 3 attempts$"):
        place("unwilling://a").read_bytes()
    assert Unwilling.tried == 3
    place("memory://large").write_bytes(bytes(100))
    monkeypatch.setattr(minibeit.places, "PIECE", 7)
    assert place("memory://large").read_bytes() == bytes(100)
    monkeypatch.setattr(minibeit.places, "MOST_BYTES", 99)
    with pytest.raises(OSError, match=r"^memory://large: expected at most 1 GB, found more$"):
        place("memory://large").read_bytes()


@pytest.mark.parametrize(
    ("action", "error", "said"),
    [
        (lambda: place("unwilling://a").is_dir(), OSError, r"unwilling://a: cannot be reached \(the keys are wrong\)"),
        (lambda: list(place("unwilling://a").iterdir()), OSError, r"unwilling://a: cannot be listed \(the keys"),
        (lambda: images_in(place("unwilling://a")), OSError, r"unwilling://a: cannot be listed \(the keys"),
        (lambda: place("unwilling://a").write_bytes(b"x"), OSError, r"unwilling://a: cannot be written \(the keys"),
        (lambda: place("oddly://a").read_bytes(), ValueError, r"oddly://a: cannot be opened \(Protocol not known"),
        (lambda: place("oddly://a").is_dir(), ValueError, r"oddly://a: cannot be opened \(Protocol not known"),
        (lambda: place("zip://a::memory://b").is_dir(), ValueError, r"cannot be opened \(addresses within others"),
    ],
)
def test_what_goes_wrong_is_one_sentence(action, error, said):
    with pytest.raises(error, match=f"^.*{said}") as caught:
        action()
    assert "\n" not in str(caught.value)


def test_without_fsspec_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImportError, match=r"^s3://a: addresses need fsspec, which is missing: pip install fsspec$"):
        place("s3://a").exists()


@pytest.mark.parametrize("form", ["memory://out/deep", "renaming://out/deep", "file://{}/deep"])
def test_files_are_written_with_their_folders_and_replaced(form, tmp_path):
    folder = place(form.format(tmp_path))
    for content in (b"first", b"second"):
        with atomic_write(folder / "a.txt") as file:
            file.write(content)
        assert (folder / "a.txt").read_text() == content.decode()
    write_npz(folder / "b.npz", {"x": np.arange(3)})
    assert len((folder / "b.npz").read_bytes()) > 100
    assert sorted(entry.name for entry in folder.iterdir()) == ["a.txt", "b.npz"]


def test_no_folder_is_made_at_an_object_store(monkeypatch):
    """For s3:// that would be a bucket, of whatever name was mistyped."""
    made = []
    monkeypatch.setattr(MemoryFileSystem, "makedirs", lambda self, path, exist_ok=False: made.append(path))
    place("memory://mistyped/deep/a.txt").write_bytes(b"x")
    assert not made
    place("renaming://out/a.txt").write_bytes(b"x")
    assert len(made) == 1


def test_nothing_is_seen_half_written(monkeypatch, tmp_path):
    there = place("renaming://out/a.txt")
    there.write_bytes(b"the first text")
    monkeypatch.setattr(Renaming, "breaks", True)
    with pytest.raises(OSError, match=r"^renaming://out/a.txt: cannot be written \(the line is down\)"):
        there.write_bytes(b"the second text")
    assert there.read_bytes() == b"the first text"
    with pytest.raises(KeyError), atomic_write(there) as file:
        file.write(b"never")
        raise KeyError
    assert there.read_bytes() == b"the first text"

    def full(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a.txt: cannot be written \(no space\)$"):
        place(f"file://{tmp_path}/a.txt").write_bytes(b"text")
    assert not list(tmp_path.iterdir()) and isinstance(place("file:///x").opened[0], LocalFileSystem)
