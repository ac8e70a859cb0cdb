"""Sliding windows, scales and mirror images beside plain copies of the published algorithm."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from cli_helpers import config
from PIL import Image
from tolerances import MODEL_IN_BATCHES

from minibeit import BeitForSemanticSegmentation, BeitImageProcessor, sliding
from minibeit.ops.reference import resize_bilinear
from minibeit.sliding import Inference, View

WINDOW, STRIDE = 16, 10


@pytest.fixture(scope="module")
def model():
    return BeitForSemanticSegmentation(config(out_indices=[1, 2, 3, 4]), dtype="float64", backend="numpy")


@pytest.fixture(scope="module")
def processor():
    return BeitImageProcessor(size=WINDOW, resample=3)


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain_slide(model, pixels, window, stride):
    """The published loop: (1, C, h, w) -> (1, K, h, w)."""
    _, _, h, w = pixels.shape
    rows = max(h - window + stride - 1, 0) // stride + 1
    columns = max(w - window + stride - 1, 0) // stride + 1
    predictions = np.zeros((1, model.config.num_labels, h, w))
    counts = np.zeros((1, 1, h, w))
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + window, h), min(column * stride + window, w)
            top, left = max(bottom - window, 0), max(right - window, 0)
            crop = pixels[:, :, top:bottom, left:right]
            logits = resize_bilinear(model(crop).logits, (bottom - top, right - left))
            predictions += np.pad(logits, ((0, 0), (0, 0), (top, h - bottom), (left, w - right)))
            counts[:, :, top:bottom, left:right] += 1
    assert counts.min() > 0
    return predictions / counts


def plain_probabilities(logits, size):
    x = resize_bilinear(logits, size)
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def plain_size(image, short):
    factor = short / min(image.size)
    return tuple(math.floor(length * factor + 0.5) for length in (image.height, image.width))


def plain_map(model, processor, image, scales, flip):
    """The published test, one view after the other: (H, W)."""
    size, total = (image.height, image.width), 0
    for scale in scales:
        h, w = plain_size(image, max(int(WINDOW * scale), WINDOW))
        pixels = processor(image, size={"height": h, "width": w}, resample=2).pixel_values.astype(np.float64)
        total = total + plain_probabilities(plain_slide(model, pixels, WINDOW, STRIDE), size)
        if flip:
            mirrored = plain_slide(model, pixels[..., ::-1], WINDOW, STRIDE)
            total = total + plain_probabilities(mirrored, size)[..., ::-1]
    return (total / (len(scales) * (1 + flip))).argmax(1)[0]


def compute_of(model):
    """The logits of a batch, each image by itself: in a batch, BLAS may add up in another order."""
    return lambda pixels: np.concatenate([model(one[None]).logits for one in pixels])


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (640, 640, 426, [0]),
        (853, 640, 426, [0, 213]),
        (1493, 640, 426, [0, 426, 852, 853]),
        (1492, 640, 426, [0, 426, 852]),
        (683, 512, 341, [0, 171]),
        (7, 16, 10, [0]),
    ],
)
def test_windows_end_inside(length, window, stride, starts):
    assert sliding.window_starts(length, window, stride) == starts


@pytest.mark.parametrize("size", [(16, 16), (16, 27), (40, 16), (37, 61)])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_sliding_windows_are_those_of_the_plain_loop_bit_for_bit(model, size, batch_size):
    pixels = np.random.default_rng(1).standard_normal((3, *size))
    found = sliding.slide(compute_of(model), pixels, (WINDOW, WINDOW), (STRIDE, STRIDE), batch_size)
    np.testing.assert_array_equal(found, plain_slide(model, pixels[None], WINDOW, STRIDE)[0])


def test_windows_in_one_batch_differ_by_rounding_at_most(model):
    pixels = np.random.default_rng(1).standard_normal((3, 37, 61))
    found = sliding.slide(lambda crops: model(crops).logits, pixels, (WINDOW, WINDOW), (STRIDE, STRIDE), 100)
    expected = plain_slide(model, pixels[None], WINDOW, STRIDE)[0]
    assert np.abs(found - expected).max() <= MODEL_IN_BATCHES * np.abs(expected).max()


def test_windows_need_not_be_square(model):
    pixels = np.random.default_rng(1).standard_normal((3, 30, 50))
    seen = []

    def compute(crops):
        seen.append(crops.shape)
        return model(crops).logits

    logits = sliding.slide(compute, pixels, (16, 24), (8, 20), 4)
    assert logits.shape == (4, 30, 50) and np.isfinite(logits).all()
    assert {shape[2:] for shape in seen} == {(16, 24)} and sum(shape[0] for shape in seen) == 3 * 3


@pytest.mark.parametrize(
    ("scales", "flip"),
    [((1.0,), False), ((2.0,), False), ((1.0,), True), ((0.5, 1.0, 1.25), False), ((0.5, 0.75, 1.0, 1.5), True)],
)
@pytest.mark.parametrize("room", [1, 64 << 20])
def test_maps_are_those_of_the_plain_loop(model, processor, image, scales, flip, room, monkeypatch):
    monkeypatch.setattr(sliding, "ROOM", room)
    how = Inference("slide", WINDOW, STRIDE, WINDOW, scales, flip, batch_size=2, patch=4)
    size = (image.height, image.width)
    expected = plain_map(model, processor, image, scales, flip)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(sliding.segment(compute_of(model), processor, image, size, how), expected)
    monkeypatch.setattr(sliding, "ROOM_FOR_SUMS", 0)  # keeps the views instead of sums
    np.testing.assert_array_equal(sliding.segment(compute_of(model), processor, image, size, how), expected)


def test_views_of_one_size_are_computed_once(model, processor, image):
    calls = []

    def compute(pixels):
        calls.append(pixels.shape)
        return model(pixels).logits

    how = Inference("slide", WINDOW, STRIDE, WINDOW, (0.5, 0.75, 1.0), patch=4)
    views = list(sliding.views_of(compute, processor, image, (37, 61), how))
    assert how.views == 1 and [view.times for view in views] == [3]
    assert len(calls) == len(sliding.window_starts(26, WINDOW, STRIDE))


def test_a_whole_image_keeps_its_proportions(model, processor, image):
    shapes = []

    def compute(pixels):
        shapes.append(pixels.shape[2:])
        return model(pixels).logits

    how = Inference("whole", short_side=20, scales=(1.0, 1.5), flip=True, patch=4)
    labels = sliding.segment(compute, processor, image, (37, 61), how)
    assert shapes == [(20, 32), (20, 32), (32, 48), (32, 48)]  # 30 x 49 rounded to patches
    assert labels.shape == (37, 61) and how.views == 4


def test_the_mirror_image_of_a_symmetric_one_changes_nothing(model, processor, image):
    half = np.asarray(image)
    both = np.concatenate([half, half[:, ::-1]], axis=1)
    labels = sliding.segment(compute_of(model), processor, both, both.shape[:2], Inference(flip=True))
    np.testing.assert_array_equal(labels, labels[:, ::-1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(mode="tiles"), "squash, whole or slide, found 'tiles'"),
        (dict(scales=(0.5,)), "choose slide or whole"),
        (dict(mode="whole", scales=()), r"above 0 and below 100, found \[\]"),
        (dict(mode="slide", scales=(-1.0,)), "above 0"),
        (dict(mode="slide", window=30), "multiple of the patch size 16, found 30"),
        (dict(mode="slide", stride=641), "1 to the window's 640 pixels, found 641"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Inference(**settings)


def test_a_single_view_is_the_argmax_of_resized_logits(monkeypatch):
    logits = np.random.default_rng(0).integers(0, 3, (11, 5, 4)).astype(np.float32)  # many ties
    np.testing.assert_array_equal(sliding.largest_logit(logits, (5, 4)), logits.argmax(axis=0))
    for size in ((23, 17), (3, 4), (61, 50)):
        whole = resize_bilinear(logits[None], size)[0].argmax(axis=0)
        for room in (1, 23 * 17 * 4 * 3, 64 << 20):
            monkeypatch.setattr(sliding, "ROOM", room)
            np.testing.assert_array_equal(sliding.largest_logit(logits, size), whole)


@pytest.mark.parametrize("room", [1, 64 << 20])
def test_classes_that_cannot_win_are_left_out_and_no_others(monkeypatch, room):
    monkeypatch.setattr(sliding, "ROOM", room)
    logits = np.random.default_rng(0).standard_normal((40, 6, 7)).astype(np.float32)
    logits[10:] -= np.linspace(0, 8, 30, dtype=np.float32)[:, None, None]
    kept = sliding.contenders(logits)
    assert 10 <= len(kept) < 40
    for size in ((3, 4), (6, 7), (61, 50)):
        whole = resize_bilinear(logits[None], size)[0].argmax(axis=0)
        assert set(np.unique(whole)) <= set(kept)
        np.testing.assert_array_equal(sliding.largest_logit(logits, size), whole)


def test_probabilities_are_averaged_not_logits():
    sure, unsure = np.array([[[9.0]], [[0.0]]]), np.array([[[0.0]], [[4.0]]])
    strong = np.array([[[0.0]], [[9.0]]])
    assert sliding.largest_mean_probability([View(sure), View(unsure)], (1, 1)) == 0
    assert sliding.largest_mean_probability([View(sure), View(unsure, times=2)], (1, 1)) == 1
    assert (sure + unsure + unsure).argmax(0) == 0  # what averaged logits would say
    assert sliding.largest_mean_probability(iter([View(sure, True), View(strong, True, 2)]), (1, 1)) == 1


@pytest.mark.parametrize("views", [1, 3])
def test_memory_does_not_grow_with_the_image(monkeypatch, views):
    """Scores of every class at the image's size would take 30 times what the label map's 32 bits do."""
    monkeypatch.setattr(sliding, "ROOM", 1 << 20)
    monkeypatch.setattr(sliding, "ROOM_FOR_SUMS", 1 << 20)
    logits = np.random.default_rng(0).standard_normal((30, 12, 16)).astype(np.float32)
    size = (600, 800)
    tracemalloc.start()
    try:
        if views == 1:
            sliding.largest_logit(logits, size)
        else:
            sliding.largest_mean_probability([View(logits, i == 2) for i in range(views)], size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    labels = 8 * size[0] * size[1]
    assert peak < labels + 8 * (1 << 20) < 30 * 4 * size[0] * size[1] / 3
