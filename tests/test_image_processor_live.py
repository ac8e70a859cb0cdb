"""The image processor beside that of the installed transformers: random settings, photographs, files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import SCALED_FLOATS, picture
from PIL import Image

from minibeit.image_processor import BeitImageProcessor


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(scope="module")
def original():
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

    return BeitImageProcessorPil


def random_size(rng, keys=None):
    numbers = [int(n) for n in rng.integers(1, 90, 2)]
    kind = keys or rng.choice(["both", "both", "shortest", "longest", "max"])
    if kind == "both":
        return {"height": numbers[0], "width": numbers[1]}
    if kind == "shortest":
        return {"shortest_edge": numbers[0]}
    if kind == "longest":
        return {"shortest_edge": min(numbers), "longest_edge": max(numbers) + 1}
    return {"max_height": numbers[0], "max_width": numbers[1]}


def random_settings(rng):
    mean, std = rng.random(3), 0.1 + rng.random(3)
    numbers = rng.random() < 0.2
    return {
        "do_resize": bool(rng.random() < 0.8),
        "size": random_size(rng),
        "resample": int(rng.integers(0, 6)),
        "do_center_crop": bool(rng.random() < 0.4),
        "crop_size": random_size(rng, "both"),
        "do_rescale": bool(rng.random() < 0.8),
        "rescale_factor": float(rng.choice([1 / 255, 1 / 127.5, 0.01])),
        "do_normalize": bool(rng.random() < 0.8),
        "image_mean": float(mean[0]) if numbers else mean.tolist(),
        "image_std": float(std[0]) if numbers else std.tolist(),
    }


def random_image(rng):
    height, width = (int(n) for n in rng.integers(5, 120, 2))
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    kind = rng.integers(0, 7)
    if kind == 0:
        return pixels
    if kind == 1:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if kind == 2:
        return Image.fromarray(pixels)
    if kind == 3:
        return pixels.astype(rng.choice([np.int64, np.float32, np.float64, np.int16]))
    return rng.random((height, width, 3)).astype([np.float32, np.float64, np.float16][kind - 4])


@pytest.mark.live
@pytest.mark.filterwarnings(SCALED_FLOATS)
def test_live_random_pictures(original, rng):
    for index in range(600):
        settings, image = random_settings(rng), random_image(rng)
        try:
            theirs = original(**settings)(image, return_tensors="np").pixel_values
        except ValueError as error:  # proportions so extreme that their width is 0
            assert "must be > 0" in str(error)
            continue
        ours = BeitImageProcessor(**settings)(image).pixel_values
        np.testing.assert_array_equal(ours, theirs.astype(np.float32), err_msg=f"case {index}: {settings}")


@pytest.mark.live
def test_live_random_label_maps(original, rng):
    for index in range(200):
        settings = {**random_settings(rng), "size": random_size(rng, "both"), "do_reduce_labels": bool(index % 2)}
        image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        labels = rng.integers(0, 256, (12, 16), dtype=np.uint8).repeat(3, 0).repeat(2, 1)
        if index % 3 == 0:
            labels = Image.fromarray(labels)
        given = labels.copy()  # the original changes it
        theirs = original(**settings)(image, given, return_tensors="np")
        ours = BeitImageProcessor(**settings, compat="transformers")(image, labels)
        np.testing.assert_array_equal(ours.labels, theirs.labels, err_msg=f"case {index}: {settings}")
        np.testing.assert_array_equal(ours.pixel_values, theirs.pixel_values)


@pytest.mark.live
def test_live_conversion_to_rgb(original, rng):
    for mode in ("L", "LA", "RGBA", "CMYK"):
        image = picture(rng, 31, 23, mode)
        forms = [image, image.convert("P")] if mode != "CMYK" else [image]
        forms += [np.asarray(image)] if mode == "RGBA" else []
        for form in forms:
            theirs = original(do_convert_rgb=True, size=20)(form, return_tensors="np").pixel_values
            np.testing.assert_array_equal(BeitImageProcessor(size=20)(form).pixel_values, theirs)


@pytest.mark.live
@pytest.mark.parametrize("resample", range(6))
def test_live_photographs(original, resample):
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    photos = [data.astronaut(), data.coffee(), data.chelsea(), *datasets.load_sample_images().images]
    assert len(photos) == 5
    for size in (224, (640, 640), (97, 1031)):
        for photo in photos:
            theirs = original(size=size, resample=resample)(photo, return_tensors="np").pixel_values
            np.testing.assert_array_equal(BeitImageProcessor(size=size, resample=resample)(photo).pixel_values, theirs)


@pytest.mark.live
def test_live_post_process(original, rng):
    import torch

    compared = 0
    for _ in range(40):
        batch, classes, height, width = (int(n) for n in rng.integers(1, 12, 4))
        logits = rng.normal(0, 3, (batch, classes, height, width)).astype(np.float32)
        sizes = [tuple(int(n) for n in rng.integers(1, 40, 2)) for _ in range(batch)]
        arguments = (sizes if rng.random() < 0.8 else None, True)
        theirs = original().post_process_semantic_segmentation(
            SimpleNamespace(logits=torch.from_numpy(logits)), *arguments
        )
        ours = BeitImageProcessor().post_process_semantic_segmentation(SimpleNamespace(logits=logits), *arguments)
        for our, their in zip(ours, theirs, strict=True):
            scores = np.asarray(their.segmentation_scores)
            # PyTorch's float32 positions: up to 40 eps times the differences of neighbours (about 20)
            np.testing.assert_allclose(our.segmentation_scores, scores, rtol=0, atol=1e-4)
            top = np.sort(scores, axis=0)[-2:]
            clear = (top[-1] - top[0] > 2e-4) | (classes == 1)
            np.testing.assert_array_equal(our.segmentation[clear], np.asarray(their.segmentation)[clear])
            compared += int(clear.sum())
    assert compared > 10_000


@pytest.mark.live
def test_live_files_go_both_ways(original, rng, tmp_path):
    for index in range(20):
        settings = random_settings(rng)
        ours = BeitImageProcessor(**settings, extra={"kept": 1})
        ours.save_pretrained(tmp_path / f"ours{index}")
        read = original.from_pretrained(tmp_path / f"ours{index}")
        assert json.loads(read.to_json_string()) == ours.to_dict()
        theirs = original(**settings, kept=1)
        theirs.save_pretrained(tmp_path / f"theirs{index}")
        read = BeitImageProcessor.from_pretrained(tmp_path / f"theirs{index}")
        assert read.to_dict() == {**json.loads(theirs.to_json_string()), "do_convert_rgb": True}
    old = {
        "feature_extractor_type": "BeitFeatureExtractor",
        "size": 384,
        "crop_size": 384,
        "do_center_crop": False,
        "resample": 2,
    }
    assert BeitImageProcessor.from_dict(old).to_dict() == {
        **json.loads(original.from_dict(old).to_json_string()),
        "do_convert_rgb": True,
    }
