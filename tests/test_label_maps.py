"""Pairs of images and label maps: every layout, every kind of map, and a sentence for everything that cannot be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from segmentation_data import COLORS, NAMES, ade_folder, pair_folder, save_pair, scene

from minibeit.train.examples import read_examples
from minibeit.train.label_maps import MapReader, read_colours, read_pairs

TABLE = "60 60 60 ground\n210,60,50, red\n60 190 80 green\n"


def table(folder, text=TABLE):
    (folder / "colours.txt").write_text(text)
    return read_colours(folder / "colours.txt")


def named(pairs):
    return {pair.path.rpartition("/")[2]: pair.map.rpartition("/")[2] for pair in (*pairs.train, *pairs.held_out)}


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", ["annotations", "labels", "masks"])
def test_images_beside_maps(tmp_path, maps):
    pairs = read_pairs(pair_folder(tmp_path, 10, maps), 0.2)
    assert len(pairs.train) == 8 and len(pairs.held_out) == 2 and pairs.names == ("class_0", "class_1", "class_2")
    assert named(pairs) == {f"{i}.png": f"{i}.png" for i in range(10)}
    labels = pairs.read_map(pairs.train[0].map)
    assert labels.dtype == np.uint8 and labels.shape == (36, 48)


def test_the_layout_of_ade20k(tmp_path):
    pairs = read_pairs(ade_folder(tmp_path), names=NAMES[:3], read_map=MapReader(reduce=True))
    assert len(pairs.train) == 4 and len(pairs.held_out) == 2
    np.testing.assert_array_equal(pairs.read_map(pairs.train[0].map), scene(0)[1])


def test_the_split_outside(tmp_path):
    pair_folder(tmp_path / "train", 3), pair_folder(tmp_path / "val", 2, first=10)
    pairs = read_pairs(tmp_path)
    assert len(pairs.train) == 3 and len(pairs.held_out) == 2


def test_a_list_and_maps_with_an_ending(tmp_path):
    for i in range(3):
        save_pair(tmp_path / f"p{i}.jpg", tmp_path / f"m{i}.png", i)
    rows = [{"path": f"p{i}.jpg", "map": f"m{i}.png", "split": ("train", "val")[i > 1]} for i in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "list.csv").write_text("path,map\n" + "".join(f"p{i}.jpg,m{i}.png\n" for i in range(3)))
    assert [len(part) for p in [read_pairs(tmp_path / "list.jsonl")] for part in (p.train, p.held_out)] == [2, 1]
    assert len(read_pairs(tmp_path / "list.csv").train) == 2
    save_pair(tmp_path / "d/images/sub/a.jpg", tmp_path / "d/labels/sub/a_mask.png", 1)
    save_pair(tmp_path / "d/images/b.jpg", tmp_path / "d/labels/b_labels.png", 2)
    assert named(read_pairs(tmp_path / "d")) == {"a.jpg": "a_mask.png", "b.jpg": "b_labels.png"}


def test_the_split_depends_on_the_seed_alone(tmp_path):
    pair_folder(tmp_path, 10)
    first, again, other = (read_pairs(tmp_path, 0.3, seed) for seed in (1, 1, 2))
    assert first.held_out == again.held_out != other.held_out
    assert first.fingerprint == again.fingerprint != other.fingerprint


# Maps -----------------------------------------------------------------------------------------------------------------


def test_every_kind_of_map_says_the_same(tmp_path):
    _, labels = scene(3)
    palette = Image.fromarray(labels)
    palette.putpalette(COLORS.astype(np.uint8).tobytes())
    kinds = {
        "gray.png": Image.fromarray(labels),
        "palette.png": palette,
        "deep.png": Image.fromarray(labels.astype(np.uint16)),
        "gray.tif": Image.fromarray(labels),
        "gray.bmp": Image.fromarray(labels),
        "palette.gif": palette,
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(MapReader()(str(tmp_path / name)), labels, err_msg=name)
    reader = MapReader(table(tmp_path))
    Image.fromarray(COLORS[labels].astype(np.uint8)).save(tmp_path / "colours.png")
    for name in ("colours.png", "palette.png"):
        np.testing.assert_array_equal(reader(str(tmp_path / name)), labels)


def test_labels_are_reduced(tmp_path):
    Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(MapReader(reduce=True)(str(tmp_path / "m.png")), [[255, 0, 1, 255]])


def test_black_and_white_by_a_table(tmp_path):
    for i in range(3):
        save_pair(
            tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", i, 255 * (scene(i)[1] > 0).astype(np.uint8)
        )
    with pytest.raises(ValueError, match=r"found 0 alone; pixels of 255 are ignored: .*--colours"):
        read_pairs(tmp_path)
    colours = table(tmp_path, "0 0 0 background\n255 255 255 a red disc\n")
    pairs = read_pairs(tmp_path, read_map=MapReader(colours))
    assert pairs.names == ("background", "a red disc")
    np.testing.assert_array_equal(pairs.read_map(str(tmp_path / "masks/1.png")), scene(1)[1] > 0)


def test_colours_may_share_a_class_or_be_ignored(tmp_path):
    colours = table(tmp_path, "1 1 1 tree\n\n2 2 2 road\n3 3 3 tree\n0 0 0 ignored\n")
    assert colours.names == ("tree", "road")
    np.testing.assert_array_equal(colours.classes, [255, 0, 1, 0])


# What cannot be -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_left_out(tmp_path):
    pair_folder(tmp_path, 4)
    (tmp_path / "images/1.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.fromarray(np.full((36, 48), 255, np.uint8)).save(tmp_path / "masks/2.png")
    pairs = read_pairs(tmp_path, 0)
    assert [pair.path[-5] for pair in pairs.train] == ["0", "3"]
    assert "1.png" in pairs.left_out[0] and "2.png: every pixel is ignored" in pairs.left_out[1]


def _without_map(folder):
    (folder / "masks/2.png").unlink()


def _other_size(folder):
    Image.new("L", (9, 7)).save(folder / "masks/2.png")


def _turned(folder):
    Image.new("L", (36, 48)).save(folder / "masks/2.png")


def _jpeg(folder):
    (folder / "masks/2.png").unlink()
    Image.new("L", (48, 36)).save(folder / "masks/2.jpg")


def _jpeg_called_png(folder):
    Image.new("L", (48, 36)).save(folder / "masks/2.png", "JPEG")


def _in_colours(folder):
    Image.new("RGB", (48, 36)).save(folder / "masks/2.png")


def _large_number(folder):
    Image.fromarray(np.full((36, 48), 300, np.uint16)).save(folder / "masks/2.png")


def _no_folders(folder):
    (folder / "masks").rename(folder / "things")


def _all_ignored(folder):
    for file in (folder / "masks").iterdir():
        Image.new("L", (48, 36), 255).save(file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_map, r"images/2\.png: expected its label map in .*masks, named 2\.png, found none; 1 of 4 images"),
        (_other_size, r"masks/2\.png: expected the size of its image, 48 x 36 pixels .*, found 9 x 7$"),
        (_turned, r"found 36 x 48; the image is turned upright by its EXIF data"),
        (_jpeg, r"masks/2\.jpg: expected a label map in a format that keeps every value .*found JPEG, whose"),
        (_jpeg_called_png, r"masks/2\.png: expected a label map in a format .* found JPEG"),
        (_in_colours, r"masks/2\.png: expected one number per pixel .* found colours \(mode RGB\); --colours"),
        (_large_number, r"masks/2\.png: expected classes 0 to 254, or 255 for pixels to ignore, found 300"),
        (_no_folders, r"expected the folders images and annotations or labels or masks, .*found .*things"),
        (_all_ignored, r"none of the 4 images and label maps can be learned from; the first: .*every pixel is ignored"),
    ],
)
def test_a_sentence_says_what_is_wrong(tmp_path, spoil, message):
    spoil(pair_folder(tmp_path, 4))
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(tmp_path)
    assert "\n" not in str(error.value)


def test_labels_outside_the_classes_are_named_with_their_file(tmp_path):
    pair_folder(tmp_path, 4)
    with pytest.raises(ValueError, match=r"masks/0\.png: expected the 2 classes that have names, 0 to 1, .*found 2$"):
        read_pairs(tmp_path, names=NAMES[:2])
    ade_folder(tmp_path / "ade")
    with pytest.raises(ValueError, match=r"0 to 2, or 255 .*found 3; if 0 stands for nothing there, --reduce-labels"):
        read_pairs(tmp_path / "ade", names=NAMES[:3])
    with pytest.raises(ValueError, match=r"the 2 classes that have names, 1 to 2, .*found 3$"):
        read_pairs(tmp_path / "ade", names=NAMES[:2], read_map=MapReader(reduce=True))
    with pytest.warns(UserWarning, match="1 of the 4 classes have no pixel to learn from: blue"):
        assert read_pairs(tmp_path, names=NAMES).names == NAMES


def test_colours_outside_the_table(tmp_path):
    Image.fromarray(np.array([[(60, 60, 60), (1, 2, 3)]], np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m\.png: expected the colours of the table, found 1 2 3 at row 0, column 1"):
        MapReader(table(tmp_path))(str(tmp_path / "m.png"))


@pytest.mark.parametrize("count", [0, 1, 256])
def test_too_few_or_too_many_names(tmp_path, count):
    for i in range(2):
        save_pair(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", i, np.zeros((36, 48), np.uint8))
    with pytest.raises(ValueError, match=f"the names of 2 to 255 classes, found {count}$"):
        read_pairs(tmp_path, names=[str(i) for i in range(count)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 tree\n", "line 1: expected R G B"),
        ("1 2 300 tree\n", "line 1: expected R G B"),
        ("1 2 3 tree\n1 2 3 road\n", "line 2: the colour 1 2 3 stands there twice"),
        ("1 2 3 tree\n", "expected the colours of 2 to 255 classes, found those of 1"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, text)


def test_images_in_both_parts_are_warned_of(tmp_path):
    pair_folder(tmp_path / "train", 3), pair_folder(tmp_path / "val", 1)
    with pytest.warns(UserWarning, match="1 held-out images are also in the training part"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("row", [{"path": "p.png"}, {"path": "p.png", "map": 3}, {"map": "m.png"}])
def test_lists_without_maps(tmp_path, row):
    (tmp_path / "l.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"l\.jsonl line 1: expected path and map"):
        read_pairs(tmp_path / "l.jsonl")
    with pytest.raises(FileNotFoundError, match="no such folder or list"):
        read_pairs(tmp_path / "none")


@pytest.mark.parametrize("inside", ["", "train"])
@pytest.mark.parametrize("maps", ["annotations", "labels", "masks"])
def test_label_maps_are_no_class(tmp_path, inside, maps):
    for name in ("images", maps):
        folder = tmp_path / inside / name
        folder.mkdir(parents=True)
        Image.new("L", (4, 4)).save(folder / "a.png")
    if inside:
        (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=f"images and {maps} hold data for segmentation"):
        read_examples(tmp_path)
