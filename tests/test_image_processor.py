"""The image processor: equal to transformers in every bit; its steps, settings and files."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import SCALED_FLOATS, picture, plain
from PIL import Image
from safetensors import safe_open

from minibeit.errors import CheckpointError, ImageError
from minibeit.image_processor import BatchFeature, BeitFeatureExtractor, BeitImageProcessor
from minibeit.images.transforms import center_crop, resize_labels, resized_shape

GOLDEN = Path(__file__).parent / "data" / "processor.safetensors"
with safe_open(GOLDEN, "numpy") as file:
    ARRAYS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
    METADATA = file.metadata()
CASES = json.loads(METADATA["cases"])


@pytest.fixture
def rng():
    return np.random.default_rng(3)


# Goldens --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(SCALED_FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_golden_bit_for_bit(case):
    maps = ARRAYS["input." + case["map"]] if "map" in case else None
    image = ARRAYS["input." + case["input"]]
    before = image.copy(), None if maps is None else maps.copy()
    batch = BeitImageProcessor(**case["settings"], compat="transformers")(image, maps)
    assert batch.pixel_values.dtype == np.float32
    golden = ARRAYS[case["name"] + ".pixel_values"].astype(np.float32)  # transformers leaves doubles as they are
    np.testing.assert_array_equal(batch.pixel_values, golden)
    if maps is not None:
        assert batch.labels.dtype == np.int64
        np.testing.assert_array_equal(batch.labels, ARRAYS[case["name"] + ".labels"])
        np.testing.assert_array_equal(maps, before[1])
    np.testing.assert_array_equal(image, before[0])


def test_goldens_cover_every_filter():
    assert {case["settings"].get("resample") for case in CASES} >= set(range(6))
    assert sum("map" in case for case in CASES) >= 3


def test_post_process_equals_golden():
    outputs = SimpleNamespace(logits=ARRAYS["input.logits"])
    sizes = json.loads(METADATA["sizes"])
    processor = BeitImageProcessor()
    items = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    maps = processor.post_process_semantic_segmentation(outputs, np.array(sizes))
    for i, size in enumerate(sizes):
        assert maps[i].shape == tuple(size) and maps[i].dtype == np.int64
        np.testing.assert_array_equal(maps[i], items[i].segmentation)
        np.testing.assert_array_equal(maps[i], ARRAYS[f"post{i}.segmentation"])
        doubles = SimpleNamespace(logits=ARRAYS["input.logits"].astype(np.float64))
        exact = processor.post_process_semantic_segmentation(doubles, sizes, return_segmentation_scores=True)
        truth = exact[i].segmentation_scores
        theirs = np.abs(ARRAYS[f"post{i}.segmentation_scores"] - truth).max()
        ours = np.abs(items[i].segmentation_scores - truth).max()
        assert theirs < 4e-6  # PyTorch's float32 weights: 1.8e-6 measured on logits up to 3
        assert ours <= 2 * theirs + 2**-23


def test_post_process_without_sizes():
    logits = ARRAYS["input.logits"]
    processor = BeitImageProcessor()
    maps = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits))
    np.testing.assert_array_equal(np.stack(maps), logits.argmax(1))
    items = processor.post_process_semantic_segmentation(
        SimpleNamespace(logits=logits), return_segmentation_scores=True
    )
    np.testing.assert_array_equal(items[1].segmentation_scores, logits[1])
    assert set(items[1]) == {"segmentation", "segmentation_scores"}


@pytest.mark.parametrize(
    "sizes",
    [[(4, 4)], [(4, 4)] * 3, [(4, 4, 4)] * 2, [(0, 4)] * 2, [(4.5, 4)] * 2, [(4, 4), (4,)], (4, 4), "ab", [None]],
)
def test_post_process_wrong_sizes(sizes):
    outputs = SimpleNamespace(logits=ARRAYS["input.logits"])
    with pytest.raises(ValueError, match="target_sizes: expected 2 pairs"):
        BeitImageProcessor().post_process_semantic_segmentation(outputs, sizes)


@pytest.mark.parametrize("outputs", [None, SimpleNamespace(logits=np.zeros((2, 3))), SimpleNamespace(logits="x")])
def test_post_process_wrong_logits(outputs):
    with pytest.raises(ValueError, match=r"expected logits of shape \(B, K, h, w\)"):
        BeitImageProcessor().post_process_semantic_segmentation(outputs)


# Steps by definition --------------------------------------------------------------------------------------------------


def test_crop_against_definition(rng):
    for _ in range(200):
        height, width, new_height, new_width = rng.integers(1, 9, 4)
        pixels = rng.integers(1, 256, (height, width, 2), dtype=np.uint8)
        cropped = center_crop(pixels, {"height": int(new_height), "width": int(new_width)}, fill=0)
        top, left = (height - new_height) // 2, (width - new_width) // 2
        for i in range(new_height):
            for j in range(new_width):
                inside = 0 <= i + top < height and 0 <= j + left < width
                np.testing.assert_array_equal(cropped[i, j], pixels[i + top, j + left] if inside else 0)


def test_nearest_labels_equal_pillow_but_for_ties(rng):
    for _ in range(300):
        old, new = (int(n) for n in rng.integers(1, 300, 2))
        ours = resize_labels(np.arange(old)[None], (1, new))[0]
        theirs = np.asarray(Image.fromarray(np.arange(old, dtype=np.int32)[None]).resize((new, 1), 0))[0]
        tie = (2 * np.arange(new) + 1) * old % (2 * new) == 0  # exactly between two: Pillow's rounding errors decide
        np.testing.assert_array_equal(ours[~tie], theirs[~tie])
        assert (ours[tie] - theirs[tie] <= 1).all() and (ours[tie] >= theirs[tie]).all()


def test_resized_shape_by_hand():
    assert resized_shape((100, 71), {"shortest_edge": 50}) == (70, 50)
    assert resized_shape((71, 100), {"shortest_edge": 50}) == (50, 70)
    assert resized_shape((100, 50), {"shortest_edge": 50, "longest_edge": 80}) == (80, 40)
    assert resized_shape((100, 200), {"max_height": 50, "max_width": 50}) == (25, 50)
    assert resized_shape((1, 1000), {"max_height": 5, "max_width": 5}) == (1, 5)


def test_labels_keep_their_ids_by_default():
    labels = ARRAYS["input.map"]
    image = ARRAYS["input.picture"]
    ours = BeitImageProcessor(size=(14, 22))(image, labels).labels
    assert set(np.unique(ours)) <= set(np.unique(labels))
    as_originals = BeitImageProcessor(size=(14, 22), compat="transformers")(image, labels).labels
    assert not set(np.unique(as_originals)) <= set(np.unique(labels))  # the fault that the default avoids


def test_reduced_labels(rng):
    labels = np.array([[0, 1, 2, 150, 255, 254]], np.uint8)
    batch = plain(do_reduce_labels=True)(picture(rng), labels)
    np.testing.assert_array_equal(batch.labels, [[[255, 0, 1, 149, 255, 253]]])
    np.testing.assert_array_equal(labels, [[0, 1, 2, 150, 255, 254]])
    with pytest.raises(ImageError, match=r"segmentation_maps: .*of at least 0, found -1"):
        plain(do_reduce_labels=True)(picture(rng), np.array([[-1, 2]]))


def test_padded_labels_are_ignored(rng):
    settings = {"do_center_crop": True, "crop_size": 4}
    labels = np.ones((2, 2), np.uint8)
    ours = plain(**settings)(picture(rng), labels).labels[0]
    assert ours[0].tolist() == [255] * 4 and ours[1].tolist() == [255, 1, 1, 255]
    assert plain(**settings, compat="transformers")(picture(rng), labels).labels[0, 0].tolist() == [0] * 4


def test_labels_may_exceed_a_byte(rng):
    labels = rng.integers(0, 70_000, (8, 9))
    assert set(np.unique(BeitImageProcessor(size=5)(picture(rng), labels).labels)) <= set(np.unique(labels))


# Settings and files ---------------------------------------------------------------------------------------------------


def test_class_ids_beyond_a_byte_cannot_be_interpolated(rng):
    with pytest.raises(ImageError, match=r"segmentation_maps: expected whole numbers within 0..255"):
        BeitImageProcessor(compat="transformers")(picture(rng), np.full((5, 5), 300))


BAD_SETTINGS = {
    "size": [
        {"height": 5},
        {"a": 1},
        {},
        {"longest_edge": 5},
        0,
        -3,
        2.5,
        "5",
        (1, 2, 3),
        True,
        {"height": 0, "width": 1},
    ],
    "crop_size": [{"shortest_edge": 5}, 0],
    "resample": [99, -1, "bicubic", 2.5],
    "rescale_factor": ["x", float("nan"), True, 1j],
    "image_mean": ["x", [0.5], [0.5, 0.5], [0.5, None, 0.5], {"r": 1}],
    "image_std": [[0.5, 0.5, 0.0], 0.0, [0.5], -1],
    "do_resize": ["yes", 1],
    "compat": ["unilm"],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(rng, name):
    for value in BAD_SETTINGS[name]:
        with pytest.raises(ValueError, match=name):
            BeitImageProcessor(**{name: value})
        with pytest.raises(ValueError, match=name):
            BeitImageProcessor()(picture(rng), **{name: value})


def test_no_means():
    with pytest.raises(ValueError, match="expected at least one number, found none"):
        BeitImageProcessor(image_mean=[], image_std=[])


def test_unknown_setting_and_other_frameworks(rng):
    with pytest.raises(TypeError, match=r"unknown keyword 'do_resise' \(did you mean do_resize\?\)"):
        BeitImageProcessor(do_resise=False)
    with pytest.raises(TypeError, match="unknown keyword 'do_resise'"):
        BeitImageProcessor()(picture(rng), do_resise=False)
    with pytest.raises(ValueError, match=r"expected 'np', 'pt' or None, found 'tf'"):
        BeitImageProcessor()(picture(rng), return_tensors="tf")


def test_overrides_last_one_call(rng):
    processor = BeitImageProcessor(size=6)
    assert processor(picture(rng), size=(4, 5), image_mean=None).pixel_values.shape == (1, 3, 4, 5)
    assert processor(picture(rng)).pixel_values.shape == (1, 3, 6, 6)
    processor.size = 9
    assert processor(picture(rng)).pixel_values.shape == (1, 3, 9, 9)
    labels = processor(picture(rng), np.ones((3, 3), int), reduce_labels=True).labels
    assert (labels == 0).all()


def test_defaults_are_those_of_transformers_5():
    expected = {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_reduce_labels": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "BeitImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }
    assert BeitImageProcessor().to_dict() == expected
    assert json.loads(BeitImageProcessor().to_json_string()) == expected


def test_old_file_is_read_as_at_its_time():
    processor = BeitImageProcessor.from_dict({"feature_extractor_type": "BeitFeatureExtractor", "reduce_labels": True})
    assert processor.size == {"height": 256, "width": 256}
    assert processor.crop_size == {"height": 224, "width": 224}
    assert processor.do_center_crop and processor.do_reduce_labels
    values = {"feature_extractor_type": "x", "size": [30, 20], "do_center_crop": False, "crop_size": 7, "resample": 2}
    processor = BeitImageProcessor.from_dict(values)
    assert processor.size == {"height": 20, "width": 30} and processor.crop_size == {"height": 7, "width": 7}
    assert not processor.do_center_crop and processor.resample == 2
    assert "feature_extractor_type" not in processor.to_dict()


def test_new_pairs_are_height_first():
    assert BeitImageProcessor.from_dict({"size": [30, 20]}).size == {"height": 30, "width": 20}


def test_round_trip_keeps_everything(tmp_path):
    settings = {"size": {"shortest_edge": 9}, "image_mean": [0.1, 0.2, 0.3], "compat": "transformers", "resample": 0}
    processor = BeitImageProcessor(**settings, apply_exif_orientation=False, extra={"new_key": {"deep": [1]}})
    processor.save_pretrained(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["preprocessor_config.json"]
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "preprocessor_config.json"):
        again = BeitImageProcessor.from_pretrained(path)
        assert again.to_dict() == processor.to_dict()
        assert again.extra == {"new_key": {"deep": [1]}} and not again.apply_exif_orientation
        assert again.compat == "transformers"
    assert BeitImageProcessor.from_pretrained(path, size=42).size == {"height": 42, "width": 42}
    assert json.loads(path.read_text())["new_key"] == {"deep": [1]}
    with pytest.raises(TypeError, match=r"unknown keyword 'sise' \(did you mean size\?\)"):
        BeitImageProcessor.from_pretrained(path, sise=42)


def test_null_means_default():
    assert BeitImageProcessor.from_dict({"size": None, "do_convert_rgb": None}).do_convert_rgb


def test_other_processors_file_warns():
    with pytest.warns(UserWarning, match="settings of a MobileViT image processor"):
        BeitImageProcessor.from_dict({"image_processor_type": "MobileViTImageProcessor"})


@pytest.mark.parametrize("text", ["", "{", "[]", '"a"', '{"size": "large"}', '{"resample": 9}', "\xff", "[" * 100_000])
def test_broken_files(tmp_path, text):
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: "):
        BeitImageProcessor.from_pretrained(tmp_path)


def test_missing_and_misplaced_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no preprocessor_config.json here"):
        BeitImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder to save into"):
        BeitImageProcessor().save_pretrained(tmp_path / "file")


def test_old_name(rng, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = BeitFeatureExtractor(size=(30, 20), crop_size=18, reduce_labels=True)
    assert isinstance(extractor, BeitImageProcessor)
    assert extractor.size == {"height": 20, "width": 30} and extractor.reduce_labels and extractor.do_reduce_labels
    batch = extractor([picture(rng)] * 2, [np.ones((6, 5), int)] * 2, return_tensors="np")
    assert batch["pixel_values"].shape == (2, 3, 18, 18) and (batch["labels"] == 0).all()
    assert BeitFeatureExtractor().size == {"height": 256, "width": 256} and BeitFeatureExtractor().do_center_crop
    extractor.save_pretrained(tmp_path)
    for cls in (BeitImageProcessor, BeitFeatureExtractor):
        assert cls.from_pretrained(tmp_path).to_dict() == extractor.to_dict()
    old = {"size": [30, 20], "do_reduce_labels": True}
    assert BeitFeatureExtractor.from_dict(old).size == {"height": 20, "width": 30}
    assert BeitFeatureExtractor.from_dict(old).reduce_labels


def test_batch_feature(rng):
    batch = BeitImageProcessor(size=4)(picture(rng))
    assert batch.pixel_values is batch["pixel_values"] and list(batch) == ["pixel_values"]
    assert dict(**batch).keys() == {"pixel_values"}
    with pytest.raises(AttributeError, match="BatchFeature has pixel_values, but no 'labels'"):
        _ = batch.labels
    assert isinstance(pickle.loads(pickle.dumps(batch)), BatchFeature)
    assert repr(BeitImageProcessor()).startswith("BeitImageProcessor {")
