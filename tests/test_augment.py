"""Random changes of pictures: sizes, ranges, shares, seeds; and the published recipes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from training_data import picture

from minibeit import BeitImageProcessor
from minibeit.train import augment
from minibeit.train.batches import judged_pixels, training_pixels
from minibeit.train.recipes import RECIPES, Recipe

RNG = np.random.default_rng


def sample(width=24, height=18, gray=False):
    shape = (height, width) if gray else (height, width, 3)
    return Image.fromarray(RNG(0).integers(0, 256, shape, dtype=np.uint8))


def test_crops_lie_within_and_have_the_drawn_area_and_ratio():
    rng, areas, ratios = RNG(0), [], []
    for _ in range(400):
        left, top, right, bottom = augment.crop_box((640, 480), (0.08, 1.0), rng)
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480
        areas.append((right - left) * (bottom - top) / (640 * 480))
        ratios.append((right - left) / (bottom - top))
    assert 0.079 < min(areas) < 0.12 and max(areas) > 0.85
    assert min(ratios) > 0.74 and max(ratios) < 1.35
    assert augment.crop_box((1000, 10), (0.9, 1.0), rng) == (493, 0, 506, 10)  # none fits: the centre, 4 to 3


@pytest.mark.parametrize("name", list(augment.OPERATIONS))
@pytest.mark.parametrize("gray", [False, True])
def test_every_operation_keeps_size_and_mode(name, gray):
    before = sample(gray=gray)
    for magnitude in (0.0, 9.0, 10.0):
        after = augment.OPERATIONS[name](before, magnitude, RNG(1))
        assert (after.size, after.mode) == (before.size, before.mode)


@pytest.mark.parametrize("name", sorted(set(augment.OPERATIONS) - {"autocontrast"}))
def test_every_operation_changes_a_picture(name):
    assert np.any(np.asarray(augment.OPERATIONS[name](sample(), 9.0, RNG(1))) != np.asarray(sample()))


def test_operations_that_have_a_formula():
    x = np.asarray(sample())
    np.testing.assert_array_equal(augment.OPERATIONS["solarize"](sample(), 9.0, RNG(0)), np.where(x < 26, x, 255 - x))
    np.testing.assert_array_equal(augment.OPERATIONS["posterize"](sample(), 5.0, RNG(0)), x & 0b11000000)
    added = np.where(x < 128, np.minimum(255, x.astype(int) + 99), x)
    np.testing.assert_array_equal(augment.OPERATIONS["solarize_add"](sample(), 9.0, RNG(0)), added)


def test_erasing_touches_one_rectangle_of_allowed_size():
    for seed in range(20):
        erased = augment.erase(np.full((3, 40, 30), 5.0, np.float32), 1.0, RNG(seed)) != 5.0
        rows, columns = np.flatnonzero(erased.any((0, 2))), np.flatnonzero(erased.any((0, 1)))
        area = len(rows) * len(columns)
        assert 0.01 < area / 1200 < 0.36 and rows[-1] - rows[0] + 1 == len(rows)
        assert erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and erased.sum() == 3 * area
    assert not (augment.erase(np.zeros((3, 8, 8), np.float32), 0.0, RNG(0)) != 0).any()


@pytest.mark.parametrize("settings", [dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)])
def test_mixed_targets_have_the_share_of_the_pixels(settings):
    pixels = np.stack([np.full((1, 16, 16), float(i), np.float32) for i in (0, 1)])
    targets = np.eye(2, dtype=np.float32)
    before = pixels.copy()
    for seed in range(10):
        made, mixed = augment.mixed(pixels, targets, Recipe(**settings), RNG(seed))
        np.testing.assert_allclose(made[0].mean(), mixed[0, 1], atol=1e-6)
        np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(pixels, before)


def test_smoothed_targets():
    np.testing.assert_allclose(augment.smoothed(np.array([1]), 4, 0.2), [[0.05, 0.85, 0.05, 0.05]], atol=1e-7)


def test_a_sample_is_changed_by_its_generator_alone(tmp_path):
    path, processor = str(picture(tmp_path / "a.png", "red", 1)), BeitImageProcessor(size=16)
    make = [training_pixels(path, Recipe(), processor, (16, 16), RNG(seed)) for seed in (1, 1, 2)]
    assert make[0].shape == (3, 16, 16) and make[0].dtype == np.float32
    np.testing.assert_array_equal(make[0], make[1])
    assert np.any(make[0] != make[2])


@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("white", [None, 4095])
def test_without_changes_training_sees_what_classify_sees(tmp_path, exif, white):
    plain = Recipe(crop=None, flip=0.0, rand_augment=None, erasing=0.0)
    path = picture(tmp_path / "a.png", "blue", 1)
    turned = Image.open(path)
    turned.getexif()[0x0112] = 6  # a quarter turn
    turned.save(path, exif=turned.getexif())
    if white is not None:
        Image.fromarray(np.random.default_rng(0).integers(0, 4096, (18, 20)).astype(np.uint16)).save(path)
    settings = dict(image_mean=[0.4, 0.5, 0.6], apply_exif_orientation=exif, value_range=white)
    processor = BeitImageProcessor(size={"height": 16, "width": 12}, **settings)
    np.testing.assert_array_equal(
        training_pixels(str(path), plain, processor, (16, 12), RNG(0)), judged_pixels(str(path), processor)
    )


def test_published_recipes_are_those_of_the_original():
    rows = {
        "base-22k": (90, 4096, 3e-3, 5, 0.65, 0.05, 0.2, 0.0, 0.0, 3.0),
        "large-22k": (90, 2048, 2e-3, 5, 0.75, 0.05, 0.2, 0.0, 0.0, 1.0),
        "base-22k-to-1k": (30, 512, 2e-5, 5, 0.85, 1e-8, 0.1, 0.0, 0.0, 0.0),
        "large-22k-to-1k": (30, 512, 2e-5, 5, 0.9, 1e-8, 0.4, 0.0, 0.0, 0.0),
        "base-1k": (100, 1024, 4e-3, 20, 0.65, 0.05, 0.1, 0.8, 1.0, 0.0),
        "large-1k": (50, 1024, 1e-3, 5, 0.75, 0.05, 0.2, 0.8, 1.0, 0.0),
    }
    for name, row in rows.items():
        r = RECIPES[name]
        found = (r.epochs, r.batch_size, r.lr, r.warmup, r.layer_decay, r.weight_decay, r.drop_path, r.mixup, r.cutmix)
        assert (*found, r.clip) == row
        assert (r.smoothing, r.erasing, r.rand_augment, r.floor) == (0.1, 0.25, (2, 9.0, 0.5), 1e-6)


def test_the_rate_follows_the_batch_unless_it_is_given():
    assert RECIPES["base-1k"].changed(batch_size=32).lr == pytest.approx(4e-3 / 32)
    assert RECIPES["base-1k"].changed(batch_size=32, lr=1e-3).lr == 1e-3
    assert dataclasses.asdict(Recipe().changed(lr=None)) == dataclasses.asdict(Recipe())
