"""Labelled images and pairs of images and label maps: what is found, and what is refused in one sentence."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import NAMES, config, save_pictures
from PIL import Image

from minibeit import labels
from minibeit.errors import ImageError
from minibeit.evaluate.labelled import labelled_images
from minibeit.evaluate.maps import check_classes, paired, read_pair
from minibeit.evaluate.masked_modeling import unlabelled_images
from minibeit.evaluate.reading import Reader
from minibeit.evaluate.split import NO_SPLIT
from minibeit.train.examples import find_examples
from minibeit.train.label_maps import MapReader

SYNSETS = labels.synsets()


def of_size(count):
    return config(id2label={i: f"LABEL_{i}" for i in range(count)})


def classes_of(found):
    return {image.path.split("/")[-1]: found.names[image.label] for image in found.images}


# Class folders and lists ----------------------------------------------------------------------------------------------


def test_class_folders_are_matched_by_the_models_names(tmp_path):
    save_pictures(tmp_path / "dog", "d.png")
    save_pictures(tmp_path / "bee", "b.png", "c.jpg")
    found = labelled_images(tmp_path, config())
    assert found.names == NAMES and found.outputs is None and found.notes == (NO_SPLIT,)
    assert classes_of(found) == {"b.png": "bee", "c.jpg": "bee", "d.png": "dog"}


def test_of_a_split_folder_the_held_out_part_is_taken(tmp_path):
    save_pictures(tmp_path / "train/dog", "t.png")
    save_pictures(tmp_path / "val/dog", "v.png")
    found = labelled_images(tmp_path, config())
    assert list(classes_of(found)) == ["v.png"] and not found.notes
    assert not labelled_images(tmp_path / "val", config()).notes
    assert labelled_images(tmp_path / "train", config()).notes == (NO_SPLIT,)


def test_of_several_held_out_folders_every_task_takes_the_same(tmp_path):
    for part in ("Test", "Validation", "train"):
        save_pictures(tmp_path / part / "dog", f"{part}.png")
    assert list(classes_of(labelled_images(tmp_path, config()))) == ["Validation.png"]
    assert [Path(image.path).name for image in unlabelled_images(tmp_path)] == ["Validation.png"]
    assert [Path(e.path).name for e in find_examples(tmp_path)[1] if e.held_out] == ["Validation.png"]
    save_pictures(tmp_path / "classes/test", "t.png")  # a class that is called so
    found = labelled_images(tmp_path / "classes", config(id2label={0: "test", 1: "dog"}))
    assert classes_of(found) == {"t.png": "test"}


def test_a_class_without_held_out_images_is_no_error(tmp_path):
    save_pictures(tmp_path / "val/dog", "v.png")
    (tmp_path / "val/cat").mkdir()
    for place in (tmp_path, tmp_path / "val"):
        assert classes_of(labelled_images(place, config())) == {"v.png": "dog"}
    with pytest.raises(ValueError, match="this class is empty"):
        find_examples(tmp_path / "val")


def test_of_a_split_list_the_held_out_images_are_taken(tmp_path):
    rows = [("a.png", "ant", "train"), ("b.png", "bee", "val"), ("c.png", "cat", "test")]
    text = "".join(json.dumps(dict(zip(("path", "label", "split"), row))) + "\n" for row in rows)
    (tmp_path / "list.jsonl").write_text(text)
    assert classes_of(labelled_images(tmp_path / "list.jsonl", config())) == {"b.png": "bee", "c.png": "cat"}
    (tmp_path / "list.jsonl").write_text(text.partition("\n")[0])
    with pytest.raises(ValueError, match=r"expected held-out images .* found only 1 to learn from"):
        labelled_images(tmp_path / "list.jsonl", config())
    (tmp_path / "list.csv").write_text("path,label\na.png,ant\nb.png,bee\n")
    assert classes_of(labelled_images(tmp_path / "list.csv", config())) == {"a.png": "ant", "b.png": "bee"}


def test_numbers_and_the_order_of_classes_without_names(tmp_path):
    for name in ("0", "3"):
        save_pictures(tmp_path / "numbers" / name, f"{name}.png")
    found = labelled_images(tmp_path / "numbers", config())
    assert classes_of(found) == {"0.png": "ant", "3.png": "dog"}
    assert found.notes == ("classes are matched by number", NO_SPLIT)
    for name in ("rose", "daisy", "tulip"):
        save_pictures(tmp_path / "flowers" / name, f"{name}.png")
    found = labelled_images(tmp_path / "flowers", of_size(3))
    assert classes_of(found) == {"daisy.png": "LABEL_0", "rose.png": "LABEL_1", "tulip.png": "LABEL_2"}
    assert "sorted classes" in found.notes[0]


@pytest.mark.parametrize(
    ("folders", "changes", "words"),
    [
        (["dog", "elk"], {}, "found ['elk'], which is not among its 4"),
        (["dog"], {"id2label": {0: "dog", 1: "dog"}}, "several classes called 'dog'"),
        (["4"], {}, "found ['4']"),
        (["1", "2", "0"], {"id2label": {0: "1", 1: "2", 2: "3"}}, "found ['0'], which is not among its 3"),
    ],
)
def test_classes_that_the_model_does_not_have(tmp_path, folders, changes, words):
    for name in folders:
        save_pictures(tmp_path / name, "a.png")
    with pytest.raises(ValueError) as error:
        labelled_images(tmp_path, config(**changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_problems_are_refused(tmp_path):
    (tmp_path / "list.csv").write_text("path,value\na.png,1.5\n")
    with pytest.raises(ValueError, match="one class for each image, found regression"):
        labelled_images(tmp_path / "list.csv", config())
    with pytest.raises(FileNotFoundError, match="no such folder or list"):
        labelled_images(tmp_path / "nowhere", config())
    save_pictures(tmp_path / "dog", "a.png")
    with pytest.raises(ValueError, match="--labels is for ImageNet"):
        labelled_images(tmp_path, config(), tmp_path / "list.csv")
    with pytest.raises(ValueError, match="one of multi label classification with 4 outputs"):
        labelled_images(tmp_path, config(problem_type="multi_label_classification"))
    with pytest.raises(ValueError, match="one of regression with 1 outputs"):
        labelled_images(tmp_path, config(id2label={0: "size"}))


# Pairs ----------------------------------------------------------------------------------------------------------------


def save_map(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("images", "maps"),
    [("images/validation", "annotations/validation"), ("images", "annotations"), ("images/val", "masks/val")],
)
def test_images_and_maps_are_paired_by_name(tmp_path, images, maps):
    save_pictures(tmp_path / images, "b.jpg", "a.png")
    save_pictures(tmp_path / images / "deep", "a.png")
    for name in ("a", "b", "deep/a", "unused"):
        save_map(tmp_path / maps / f"{name}.png", np.zeros((20, 24)))
    for pairs in (paired(tmp_path), paired(tmp_path / images, tmp_path / maps)):
        assert sorted(Path(pair.path).name for pair in pairs) == ["a.png", "a.png", "b.jpg"]
        assert all(Path(pair.path).stem == Path(pair.map).stem for pair in pairs)


def test_of_split_pairs_those_held_out_are_taken(tmp_path):
    for part in ("training", "validation"):
        save_pictures(tmp_path / "images" / part, f"{part}.png")
        save_map(tmp_path / "annotations" / part / f"{part}.png", np.zeros((20, 24)))
    assert [Path(pair.path).name for pair in paired(tmp_path)] == ["validation.png"]


def test_folders_and_maps_that_are_missing_are_said(tmp_path):
    for arguments in ((tmp_path / "nowhere",), (tmp_path, tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
            paired(*arguments)
    save_pictures(tmp_path / "images", "a.png", "b.png")
    with pytest.raises(ValueError, match=r"expected the folders images and annotations or .* found \['images'\]"):
        paired(tmp_path)
    save_map(tmp_path / "annotations/b.png", np.zeros((20, 24)))
    with pytest.raises(ValueError, match=r"a.png: expected its label map in .* 1 of 2 images have none"):
        paired(tmp_path)


def test_two_maps_of_one_image_are_refused(tmp_path):
    save_pictures(tmp_path / "images", "a.png")
    for name in ("a.png", "a.bmp", "b.png", "b.bmp"):
        save_map(tmp_path / "labels" / name, np.zeros((20, 24)))
    with pytest.raises(ValueError, match=r"images/a.png: expected one label map, found .*a\.bmp and .*a\.png"):
        paired(tmp_path)
    (tmp_path / "labels/a.bmp").unlink()
    assert len(paired(tmp_path)) == 1  # those of no image do no harm


def test_maps_apart_go_with_folders(tmp_path):
    (tmp_path / "list.csv").write_text("path,map\na.png,b.png\n")
    with pytest.raises(ValueError, match=r"list\.csv: expected a folder, .* found a file; a list names the map"):
        paired(tmp_path / "list.csv", tmp_path)


def test_of_a_list_of_pairs_something_is_held_out(tmp_path):
    (tmp_path / "list.csv").write_text("path,map,split\na.png,b.png,train\n")
    with pytest.raises(ValueError, match="expected held-out images"):
        paired(tmp_path / "list.csv")


def test_maps_are_read_with_and_without_reducing(tmp_path):
    save_pictures(tmp_path / "images", "a.png", size=(2, 3))
    save_map(tmp_path / "labels/a.png", [[0, 1, 2], [255, 3, 0]])
    (pair,) = paired(tmp_path)
    image, plain = read_pair(pair, MapReader())
    assert image.size == (3, 2) and plain.tolist() == [[0, 1, 2], [255, 3, 0]]
    reduced = read_pair(pair, MapReader(reduce=True))[1]
    assert reduced.tolist() == [[255, 0, 1], [255, 2, 255]]
    check_classes(pair, plain, 4, MapReader())
    with pytest.raises(ValueError, match=r"0 to 2, or 255, .* found 3; .*--reduce-labels"):
        check_classes(pair, plain, 3, MapReader())
    with pytest.raises(ValueError, match=r"found 2; .*--no-reduce-labels"):
        check_classes(pair, reduced, 2, MapReader(reduce=True))
    save_map(tmp_path / "labels/a.png", [[0, 1, 2]])
    with pytest.raises(ValueError, match=r"a.png: expected the size of its image, 3 x 2 pixels .* found 3 x 1"):
        read_pair(pair, MapReader())


# Reading --------------------------------------------------------------------------------------------------------------


def test_batches_keep_the_order_and_leave_out_what_cannot_be_read():
    def read(item):
        if item == 3:
            raise ImageError("item 3 is broken")
        return np.full((1, 2 if item < 6 else 4), item)

    reader = Reader(range(9), read, workers=3)
    batches = [(items, array.tolist()) for items, array in reader.batches(2)]
    assert [items for items, _ in batches] == [[0, 1], [2, 4], [5], [6, 7], [8]]
    assert all(array == [[[item] * len(array[0][0])] for item in items] for items, array in batches)
    assert reader.left_out == ["item 3 is broken"]


def test_a_file_that_is_not_there_is_said_without_a_number():
    reader = Reader(["nowhere.png"], lambda path: Path(path).read_bytes(), workers=1)
    assert not list(reader.each()) and reader.left_out == ["nowhere.png: No such file or directory"]


def test_a_bug_while_reading_is_no_unreadable_image():
    with pytest.raises(ZeroDivisionError):
        list(Reader([1, 0], lambda item: np.array(1 / item), workers=1).each())


def test_items_are_read_while_the_model_computes():
    first, later = threading.Event(), threading.Event()

    def read(item):
        (first if item == 0 else later).set()
        return np.zeros(1)

    items = Reader(range(4), read, workers=1).each(most=2)
    next(items)
    assert first.is_set() and later.wait(timeout=30)  # nobody has asked for the second one yet
    assert [item for item, _ in items] == [1, 2, 3]
