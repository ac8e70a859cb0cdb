"""Pixels to tokens: the order of patches, the mask token, CLS, absolute positions."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import distance, random_weights, tiny_config
from tolerances import NAIVE_OP

from minibeit.model.embeddings import embed, patchify, position_grid, resize_positions
from minibeit.ops import get_ops
from minibeit.params import shapes, unflatten

OPS = get_ops("numpy")


def embeddings_of(config, arrays):
    return unflatten(shapes(config, "model"), arrays).beit.embeddings


def test_patches_go_row_by_row_and_channel_first():
    pixels = np.arange(2 * 2 * 4 * 6).reshape(2, 2, 4, 6)
    patches = patchify(pixels, (2, 3))
    assert patches.shape == (2, 4, 12)
    assert np.array_equal(patches[1, 1], pixels[1, :, 0:2, 3:6].ravel())
    assert np.array_equal(patches[0, 2], pixels[0, :, 2:4, 0:3].ravel())


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(12, 8), (8, 20)])
@pytest.mark.parametrize("patch", [4, (4, 2)])
def test_embedding_equals_loops(positions, masked, size, patch):
    config = tiny_config(use_mask_token=True, use_absolute_position_embeddings=positions, patch_size=patch)
    arrays = random_weights(config, "model")
    pixels = np.random.default_rng(1).standard_normal((2, 3, *size))
    mask = np.random.default_rng(2).random((2, patchify(pixels, config.patch_shape).shape[1])) < 0.5 if masked else None
    found = embed(OPS, embeddings_of(config, arrays), pixels, config, mask)
    assert distance(found, naive.embed(config, arrays, pixels, mask)) <= NAIVE_OP


def test_masked_patches_do_not_depend_on_pixels():
    config = tiny_config(use_mask_token=True)
    p = embeddings_of(config, random_weights(config, "model"))
    mask = np.ones((1, 6), bool)
    one, other = (embed(OPS, p, np.full((1, 3, 12, 8), value), config, mask) for value in (0.0, 5.0))
    assert np.array_equal(one, other)
    assert np.array_equal(one[0, 1], p.mask_token[0, 0])


def test_mask_token_keeps_its_position():
    config = tiny_config(use_mask_token=True, use_absolute_position_embeddings=True)
    p = embeddings_of(config, random_weights(config, "model"))
    x = embed(OPS, p, np.zeros((1, 3, 12, 8)), config, np.ones((1, 6), bool))
    assert np.allclose(x[0, 3] - p.mask_token[0, 0], p.position_embeddings[0, 3], rtol=1e-12)


def test_positions_of_the_native_grid_are_used_as_they_are():
    values = np.random.default_rng(0).standard_normal((1, 7, 4))
    assert resize_positions(OPS, values, (3, 2), (3, 2)) is values
    resized = resize_positions(OPS, values, (3, 2), (4, 5))
    assert resized.shape == (1, 21, 4)
    assert np.array_equal(resized[:, 0], values[:, 0])


def test_position_grid():
    assert position_grid(tiny_config()) == (3, 2)
    assert position_grid(tiny_config(image_size=(8, 32))) == (2, 8)
    assert position_grid(tiny_config(image_size=(8, 32), compat="transformers")) == (4, 4)
    assert position_grid(tiny_config(compat="transformers")) == (3, 2)  # 6 patches are no square: transformers fails
