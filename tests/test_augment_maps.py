"""Random changes of images with their label maps: sizes, shares, seeds, colours; and the published recipes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from segmentation_data import scene

from minibeit.train import augment_maps
from minibeit.train.recipes import IMAGENET
from minibeit.train.segmentation_recipes import SEGMENTATION_RECIPES, SegmentationRecipe

RNG = np.random.default_rng
PLAIN = SegmentationRecipe(scale=(256, 64), ratio=(1, 1), crop_size=64, distortion=False, flip=0.0)


def sample(shape=(60, 90)):
    image, labels = scene(1, shape)
    return Image.fromarray(image), labels


def test_images_keep_their_proportions_and_are_scaled_within_the_range():
    recipe = SegmentationRecipe()
    sizes = [augment_maps.scaled_size((1000, 500), recipe, RNG(i)) for i in range(200)]
    shorter = [min(size) for size in sizes]
    assert 255 <= min(shorter) < 290 and 980 < max(shorter) <= 1024
    assert all(abs(width - 2 * height) <= 1 for width, height in sizes)
    wide = augment_maps.scaled_size((4000, 500), SegmentationRecipe(ratio=(1, 1)), RNG(0))
    assert wide == (2048, 256)  # the longer side decides where an image is very wide


def test_the_map_follows_the_image():
    """The discs are still where their colours are, however the two are resized, cropped and flipped."""
    image, labels = sample()
    recipe = SegmentationRecipe(scale=(256, 64), crop_size=64, distortion=False)
    for seed in range(20):
        pixels, changed = augment_maps.augmented(image, labels, (64, 64), recipe, RNG(seed))
        assert pixels.shape[:2] == changed.shape and max(changed.shape) <= 64
        red = (pixels[..., 0].astype(int) - pixels[..., 2]) > 70
        assert (red == (changed == 1)).mean() > 0.95
        assert set(np.unique(changed)) <= set(np.unique(labels))


def test_crops_avoid_a_class_that_fills_them():
    labels = np.zeros((100, 100), np.uint8)
    labels[:, 60:] = 1
    labels[:5] = 255
    for seed in range(30):
        top, left, bottom, right = augment_maps.crop_of(labels, (40, 40), 0.75, RNG(seed))
        assert (bottom - top, right - left) == (40, 40)
        part = labels[top:bottom, left:right]
        share = np.bincount(part[part < 255], minlength=2).max() / (part < 255).sum()
        assert share < 0.75, seed  # of these 30 seeds none failed ten times
    boxes = {augment_maps.crop_of(labels, (40, 40), 1.0, RNG(seed))[1] for seed in range(200)}
    assert min(boxes) == 0 and max(boxes) == 60


def test_small_images_are_not_cropped_but_padded():
    image, labels = sample((30, 90))
    pixels, changed = augment_maps.augmented(image, labels, (64, 64), PLAIN, RNG(0))
    assert pixels.shape == (64, 64, 3)  # 30 is scaled to 64
    narrow = SegmentationRecipe(scale=(64, 32), ratio=(1, 1), crop_size=64, distortion=False)
    _, changed = augment_maps.augmented(image, labels, (64, 64), narrow, RNG(0))
    assert changed.shape == (21, 64)
    full = augment_maps.padded(changed, (64, 64), 255)
    assert full.shape == (64, 64) and (full[21:] == 255).all() and full.dtype == np.uint8
    np.testing.assert_array_equal(full[:21], changed)


def test_the_same_key_makes_the_same_sample():
    image, labels = sample()
    first, again, other = (
        augment_maps.augmented(image, labels, (64, 64), SegmentationRecipe(), RNG(k)) for k in (1, 1, 2)
    )
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert any(a.shape != b.shape or np.any(a != b) for a, b in zip(first, other))


def test_colours_are_distorted_as_far_as_the_original_does():
    gray, colour = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), (200, 100, 100), np.uint8)
    levels, strengths, hues = [], [], []
    for seed in range(400):
        levels.append(augment_maps.distorted(gray, RNG(seed)).mean())
        hsv = np.asarray(Image.fromarray(augment_maps.distorted(colour, RNG(seed))).convert("HSV"))[0, 0]
        hues.append((int(hsv[0]) + 128) % 256 - 128)
        strengths.append(int(hsv[1]))
    assert 34 <= min(levels) < 50 and 165 < max(levels) <= 198  # (100 +- 32) times 0.5 to 1.5
    assert np.mean(np.array(levels) == 100) > 0.2
    # 36 of 360 degrees are 25.6 of 256 steps; of dark and pale colours, in bytes, the hue is known to a few steps
    assert 20 <= max(hues) <= 32 and -32 <= min(hues) <= -20
    assert min(strengths) < 75 and max(strengths) > 180
    plane = np.full((4, 4), 100, np.uint8)
    assert {augment_maps.distorted(plane, RNG(seed)).shape for seed in range(20)} == {(4, 4)}
    assert (gray == 100).all() and (colour[0, 0] == (200, 100, 100)).all()


def test_published_recipes_are_those_of_the_original():
    rows = {
        "ade-base-512": (3e-5, 0.9, 0.1, 512, (2048, 512)),
        "ade-base-640": (3e-5, 0.9, 0.1, 640, (2560, 640)),
        "ade-base-512-pretrained": (7e-4, 0.65, 0.1, 512, (2048, 512)),
        "ade-large-512": (2e-5, 0.95, 0.2, 512, (2048, 512)),
        "ade-large-640": (2e-5, 0.95, 0.2, 640, (2560, 640)),
    }
    for name, row in rows.items():
        r = SEGMENTATION_RECIPES[name]
        assert (r.lr, r.layer_decay, r.drop_path, r.crop_size, r.scale) == row
        assert (r.batch_size, r.weight_decay, r.power, r.floor, r.clip) == (16, 0.05, 1.0, 0.0, 0)
        assert r.decay_tables and r.decay_tokens and r.mean_of_all and r.head_dropout == 0.1
        assert (r.ratio, r.most_of_one_class, r.flip, r.distortion, r.normalisation) == (
            (0.5, 2),
            0.75,
            0.5,
            True,
            IMAGENET,
        )
        steps = 20210 // r.batch_size
        schedule = r.schedule(r.epochs * steps, steps)
        assert abs(schedule.steps - 160_000) < steps and schedule.warmup == 1500 and schedule.ratio == 1e-6
        np.testing.assert_allclose(schedule(0), 1e-6 * r.lr)
    np.testing.assert_allclose(np.multiply(IMAGENET, 255), [[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])


def test_another_crop_scales_the_images_with_it():
    small = SEGMENTATION_RECIPES["own"].cropped(128)
    assert (small.crop_size, small.scale, small.lr) == (128, (512, 128), SEGMENTATION_RECIPES["own"].lr)
    assert small.cropped(None) is small
    with pytest.raises(ValueError, match="crop_size: expected a number of pixels, found 0"):
        SegmentationRecipe(crop_size=0)
