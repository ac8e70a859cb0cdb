"""ImageNet's validation images as they are published: where they lie, and the files with their true classes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import config, save_pictures
from test_evaluate_data import of_size

from minibeit import labels
from minibeit.evaluate import imagenet
from minibeit.evaluate.labelled import labelled_images
from minibeit.evaluate.matlab import read_structs

SYNSETS = labels.synsets()

# ImageNet -------------------------------------------------------------------------------------------------------------

TEDDY = SYNSETS.index("n04399382")  # the class that ImageNet-22k lacks
TRUE = [65, 970, TEDDY]  # classes of the first three validation images here


def flat(folder):
    save_pictures(folder, *(f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)), size=(8, 8))
    return folder


def devkit_order():
    """An order of classes that is not the sorted one."""
    return [SYNSETS[i] for i in np.random.default_rng(0).permutation(1000)]


def written_truth(kind, folder):
    """One of the usual files with the classes of three images."""
    folder.mkdir(parents=True, exist_ok=True)
    order = devkit_order()
    if kind == "devkit":
        (folder / "map_clsloc.txt").write_text("".join(f"{s} {i} name\n" for i, s in enumerate(order, 1)))
        file = folder / imagenet.DEVKIT
        file.write_text("".join(f"{order.index(SYNSETS[i]) + 1}\n" for i in TRUE))
    elif kind == "synsets":
        file = folder / "imagenet_2012_validation_synset_labels.txt"
        file.write_text("".join(f"{SYNSETS[i]}\n" for i in TRUE))
    elif kind == "numbers":
        file = folder / "val.txt"
        file.write_text("".join(f"ILSVRC2012_val_{n:08d}.JPEG {i}\n" for n, i in enumerate(TRUE, 1)))
    else:
        file = folder / "LOC_val_solution.csv"
        rows = (f"ILSVRC2012_val_{n:08d},{SYNSETS[i]} 1 2 3 4\n" for n, i in enumerate(TRUE, 1))
        file.write_text("ImageId,PredictionString\n" + "".join(rows))
    return file


@pytest.mark.parametrize("kind", ["devkit", "synsets", "numbers", "kaggle"])
@pytest.mark.parametrize("place", [".", "val", "ILSVRC/Data/CLS-LOC/val"])
def test_flat_validation_images(tmp_path, kind, place):
    flat(tmp_path / place)
    file = written_truth(kind, tmp_path / "elsewhere")
    found = labelled_images(tmp_path, of_size(1000), file)
    assert [image.label for image in found.images] == TRUE and found.names[65] == labels.names("imagenet-1k")[65]


@pytest.mark.parametrize("place", [".", "ILSVRC2012_devkit_t12/data"])
def test_the_truth_is_found_beside_the_images(tmp_path, place):
    flat(tmp_path / "data/val")
    written_truth("devkit", tmp_path / "data" / place)
    assert [image.label for image in labelled_images(tmp_path / "data", of_size(1000)).images] == TRUE


def test_the_truth_is_found_beside_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(flat(tmp_path / "val"))
    written_truth("numbers", tmp_path)
    assert [image.label for image in labelled_images(Path("."), of_size(1000)).images] == TRUE


def test_synset_folders_are_classes_in_sorted_order(tmp_path):
    for number in (999, 7):
        save_pictures(tmp_path / "val" / SYNSETS[number], f"{number}.png")
    found = labelled_images(tmp_path, of_size(1000))
    assert {image.path.split("/")[-1]: image.label for image in found.images} == {"7.png": 7, "999.png": 999}


def test_of_a_head_of_22k_the_outputs_of_1k_compete(tmp_path):
    names = labels.names("imagenet-22k")
    found = labelled_images(flat(tmp_path), of_size(21841), written_truth("synsets", tmp_path))
    assert len(found.names) == len(found.outputs) == 999 and len(found.images) == 2  # one image shows a teddy
    assert all(names[output] == name for output, name in zip(found.outputs, found.names))
    assert found.names[found.images[0].label] == labels.names("imagenet-1k")[65]
    assert "1 images are left out, whose class n04399382" in found.notes[1]


def test_what_imagenet_lacks_is_said(tmp_path):
    flat(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found 3 validation images .* with --labels"):
        labelled_images(tmp_path, of_size(1000))
    file = written_truth("devkit", tmp_path)
    with pytest.raises(ValueError, match="a model of 1,000 or 21,841 outputs, found 4"):
        labelled_images(tmp_path, config())
    (tmp_path / "map_clsloc.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected meta\.mat or map_clsloc\.txt beside it"):
        labelled_images(tmp_path, of_size(1000))
    for text, words in (
        ("", "found no line"),
        (f"{SYNSETS[0]}\n", "no class for ILSVRC2012_val_00000002.JPEG; 1 images have one"),
        (f"{SYNSETS[0]}\nn99999999\n", "for 'ILSVRC2012_val_00000002', found 'n99999999'"),
        ("a,b\n1,2\n", "the columns ImageId and PredictionString"),
        ("ImageId,PredictionString\n\nILSVRC2012_val_00000001\n", "line 3: expected ImageId,PredictionString, found"),
        ("ILSVRC2012_val_00000001 3\nILSVRC2012_val_00000002\n", "line 2: expected the name of an image and its class"),
        ("ImageId,PredictionString\n" + "x" * 200_000, "separated by commas"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            labelled_images(tmp_path, of_size(1000), file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"n00000001 1 a\nn00000002\n", "map_clsloc.txt line 2: expected a WordNet id and a number"),
        (b"n00000001 one a\n", "map_clsloc.txt line 1: expected a WordNet id and a number"),
        (b"1 n00000001 a\n", "map_clsloc.txt line 1: expected a WordNet id and a number"),
        (b"\xff\xfe\n", "map_clsloc.txt: expected lines of UTF-8 text"),
        (b"n00000001 1 a\n", "map_clsloc.txt: expected the classes 1 to 1000, found none with number 2"),
    ],
)
def test_a_damaged_order_of_classes_is_refused_in_one_sentence(tmp_path, content, words):
    file = written_truth("devkit", tmp_path)
    (tmp_path / "map_clsloc.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        labelled_images(flat(tmp_path), of_size(1000), file)


# MATLAB ---------------------------------------------------------------------------------------------------------------


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(kind, shape, name, *rest):
    flags = element(6, struct.pack("<II", kind, 0))
    return element(14, flags + element(5, struct.pack(f"<{len(shape)}i", *shape)) + element(1, name) + b"".join(rest))


def meta(rows, compressed):
    """A meta.mat of the fields that matter."""
    cells = b""
    for number, synset in rows:
        cells += matrix(6, (1, 1), b"", element(9, struct.pack("<d", number)))
        cells += matrix(4, (1, len(synset)), b"", element(4, synset.encode("utf-16-le")))
    small = struct.pack("<HHi", 5, 4, 16)  # type, size and content in eight bytes
    array = matrix(2, (len(rows), 1), b"synsets", small, element(1, b"ILSVRC2012_ID\0\0\0WNID".ljust(32, b"\0")), cells)
    if compressed:
        packed = zlib.compress(array)
        array = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + array


@pytest.mark.parametrize("compressed", [False, True])
def test_the_devkits_order_is_read_from_its_meta_file(tmp_path, compressed):
    order = devkit_order()
    (tmp_path / "meta.mat").write_bytes(meta(list(enumerate(order, 1)), compressed))
    file = written_truth("devkit", tmp_path)
    (tmp_path / "map_clsloc.txt").unlink()
    assert [image.label for image in labelled_images(flat(tmp_path), of_size(1000), file).images] == TRUE


@pytest.mark.parametrize(
    ("rows", "name", "words"),
    [
        ([(1.5, "n00000001")], b"WNID", "found 1.5 and 'n00000001' in synset 1"),
        ([(1, "n00000001"), (float("nan"), "n00000002")], b"WNID", "found nan and 'n00000002' in synset 2"),
        ([(1, "teddy")], b"WNID", "found 1.0 and 'teddy' in synset 1"),
        ([(1, "n00000001")], b"WORD", "found 1.0 and None in synset 1"),
    ],
)
def test_a_meta_file_of_other_structures_is_refused_in_one_sentence(tmp_path, rows, name, words):
    file = written_truth("devkit", tmp_path)
    (tmp_path / "map_clsloc.txt").unlink()
    (tmp_path / "meta.mat").write_bytes(meta(rows, False).replace(b"WNID", name))
    with pytest.raises(ValueError, match=words) as error:
        labelled_images(flat(tmp_path), of_size(1000), file)
    assert "meta.mat" in str(error.value)


def test_text_made_of_fractions_is_refused_in_one_sentence(tmp_path):
    array = matrix(2, (1, 1), b"synsets", struct.pack("<HHi", 5, 4, 16), element(1, b"WNID".ljust(16, b"\0")),
                   matrix(4, (1, 1), b"", element(9, struct.pack("<d", 1.0))))  # fmt: skip
    (tmp_path / "meta.mat").write_bytes(meta([], False)[:128] + array)
    with pytest.raises(ValueError, match=r"meta\.mat: the MATLAB file is damaged"):
        read_structs(tmp_path / "meta.mat", "synsets")


def test_structures_that_scipy_writes(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    rows = np.zeros((3, 1), [("ILSVRC2012_ID", object), ("WNID", object), ("children", object)])
    for i in range(3):
        rows[i, 0] = (float(i + 1), f"n0000000{i}", np.arange(i, dtype=float))
    for compressed in (False, True):
        scipy_io.savemat(tmp_path / "m.mat", {"x": np.eye(2), "synsets": rows}, do_compression=compressed)
        found = read_structs(tmp_path / "m.mat", "synsets")
        assert [row["ILSVRC2012_ID"] for row in found] == [1, 2, 3] and found[2]["WNID"] == "n00000002"
        assert found[2]["children"] == [0, 1]


def test_damaged_matlab_files_are_refused_in_one_sentence(tmp_path):
    whole, path = meta([(1, "n00000001"), (2, "n00000002")], False), tmp_path / "meta.mat"
    path.write_bytes(whole)
    assert len(read_structs(path, "synsets")) == 2
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            read_structs(path, "synsets")
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 30
