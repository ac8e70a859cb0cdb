"""Any batch gives, bit for bit, what its images give alone, and again: CPU backends, all tasks, real sizes."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import distance

import minibeit

NUMPY_BATCH = 1e-6  # relative RMS of one image; measured 5.4e-7 at most
TASKS = {
    "BeitModel": "last_hidden_state",
    "BeitForMaskedImageModeling": "logits",
    "BeitForImageClassification": "logits",
    "BeitForSemanticSegmentation": "logits",
    "BeitBackbone": "feature_maps",
}
WIDTHS = {"base": (768, 12, 3072), "large": (1024, 16, 4096)}


def model_of(task, backend, size, image_size, layers, patch_size=16):
    width, heads, hidden = size
    maps = task in ("BeitForSemanticSegmentation", "BeitBackbone")
    config = minibeit.BeitConfig.from_dict(
        dict(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=hidden,
            num_hidden_layers=max(layers, 4) if maps else layers,
            image_size=image_size,
            patch_size=patch_size,
            use_relative_position_bias=True,
            use_mask_token=True,
            num_labels=7,
            vocab_size=50,
        )
        | (dict(out_indices=[1, 2, 3, 4]) if maps else {})
    )
    return getattr(minibeit, task)(config, backend=backend)


def arrays_of(model, pixels):
    found = getattr(model(pixels), TASKS[type(model).__name__])
    return [np.array(x) for x in (found if isinstance(found, (tuple, list)) else [found])]


def pixels_for(model, count):
    shape = (count, model.config.num_channels, *model.config.image_shape)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def assert_images_alone_give_the_batch(model, batches, different):
    """Every batch size, twice; `different` images are repeated to fill a batch."""
    pixels = pixels_for(model, different)
    single = [arrays_of(model, pixels[i : i + 1]) for i in range(different)]
    for batch in batches:
        order = np.arange(batch) % different
        for again in range(2):
            found = arrays_of(model, pixels[order])
            for part, whole in enumerate(found):
                assert np.isfinite(whole).all()
                for i in range(batch):
                    same = np.array_equal(whole[i], single[order[i]][part][0])
                    assert same, f"{type(model).__name__}, batch {batch}, image {i}, output {part}, time {again + 1}"


@pytest.mark.parametrize("task", TASKS)
def test_small_models_at_every_batch_size(task):
    pytest.importorskip("numba")
    model = model_of(task, "numba", (48, 3, 100), 64, 2)
    batches = (2, 3, 5, 8) if task == "BeitForSemanticSegmentation" else (*range(2, 20), 33, 64, 65)
    assert_images_alone_give_the_batch(model, batches, different=5)


@pytest.mark.parametrize("task", TASKS)
def test_small_models_of_numpy(task):
    """BLAS sums in an order that depends on the number of rows: the same bits again, and alone nearly the same."""
    model = model_of(task, "numpy", (48, 3, 100), 64, 2)
    pixels = pixels_for(model, 5)
    whole, again = arrays_of(model, pixels), arrays_of(model, pixels)
    assert all(map(np.array_equal, whole, again))
    for i in range(5):
        for part, alone in zip(whole, arrays_of(model, pixels[i : i + 1])):
            assert distance(part[i], alone[0]) < NUMPY_BATCH


@pytest.mark.parametrize("batch, image_size, width", [(14, 224, 32), (5, 384, 32), (2, 640, 64)])
def test_batches_whose_hidden_layer_is_large(batch, image_size, width):
    pytest.importorskip("numba")
    model = model_of("BeitForImageClassification", "numba", (width, 1, 3072), image_size, 2)
    assert_images_alone_give_the_batch(model, (batch,), different=2)


# (size, image size, blocks, batches, how many different images): the blocks are alike, so that few will do.
SIZES = [
    ("base", 224, 2, (2, 13, 16, 32, 64), 2),
    ("base", 384, 1, (2, 5, 16), 2),
    ("base", 512, 1, (2, 3, 4, 8), 2),
    ("base", 640, 1, (2, 3, 4), 2),
    ("large", 224, 1, (2, 11, 32, 64), 2),
    ("large", 384, 1, (2, 4, 8), 2),
    ("large", 512, 1, (2, 4), 2),
    ("large", 640, 1, (2,), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("size, image_size, blocks, batches, different", SIZES)
def test_models_of_published_sizes(size, image_size, blocks, batches, different):
    pytest.importorskip("numba")
    model = model_of("BeitForImageClassification", "numba", WIDTHS[size], image_size, blocks)
    assert_images_alone_give_the_batch(model, batches, different)


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task != "BeitForImageClassification"])
@pytest.mark.parametrize("image_size, batch", [(224, 16), (384, 4)])
def test_all_tasks_at_base_width(task, image_size, batch):
    pytest.importorskip("numba")
    if task in ("BeitForSemanticSegmentation", "BeitBackbone"):
        batch //= 4  # four blocks
    model = model_of(task, "numba", WIDTHS["base"], image_size, 1)
    assert_images_alone_give_the_batch(model, (batch,), different=2)
