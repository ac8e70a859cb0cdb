"""`minibeit mask`, and the block-wise masks it draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_helpers import run, save, save_pictures
from PIL import Image

from minibeit import BeitForMaskedImageModeling, BeitImageProcessor
from minibeit.masking import block_mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mask"), "mask")


def test_tokens_are_those_of_the_model_under_the_mask(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, err = run(
        capsys, "mask", path, "-m", checkpoint, "--ratio", 0.5, "--seed", 3, "--json", "--dtype", "float64"
    )
    facts = json.loads(out)
    assert code == 0 and not err and facts["grid"] == [4, 4] and facts["patches"] == 16 and facts["seed"] == 3
    mask = block_mask((4, 4), 8, np.random.default_rng(3))
    assert [(t["row"], t["column"]) for t in facts["tokens"]] == list(map(tuple, np.argwhere(mask)))
    assert facts["hidden"] == mask.sum() > 0
    pixels = BeitImageProcessor.from_pretrained(checkpoint)(str(path)).pixel_values
    model = BeitForMaskedImageModeling.from_pretrained(checkpoint, dtype="float64")
    logits = model(pixels, bool_masked_pos=mask.reshape(1, -1)).logits[0][mask.reshape(-1)]
    assert [t["token"] for t in facts["tokens"]] == list(logits.argmax(axis=1))
    powers = np.exp(logits)
    np.testing.assert_allclose([t["score"] for t in facts["tokens"]], (powers.T / powers.sum(axis=1)).max(axis=0))


def test_grid_has_a_dot_for_each_visible_patch_and_the_seed_decides(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    code, out, _ = run(capsys, "mask", path, "-m", checkpoint)
    mask = block_mask((4, 4), 6, np.random.default_rng(0))
    cells = [line.split() for line in out.splitlines()[1:]]
    np.testing.assert_array_equal(np.array(cells) != "·", mask)
    assert code == 0 and run(capsys, "mask", path, "-m", checkpoint)[1] == out
    assert len({run(capsys, "mask", path, "-m", checkpoint, "--seed", seed)[1] for seed in range(5)}) > 1


def test_picture_shows_the_pixels_and_the_mask(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png", size=(16, 16))
    output = tmp_path / "mask.png"
    assert run(capsys, "mask", path, "-m", checkpoint, "-o", output)[0] == 0
    drawn, original = np.asarray(Image.open(output)), np.asarray(Image.open(path))
    zoom = 448 // 16
    left, right = drawn[:, : 16 * zoom], drawn[:, -16 * zoom :]
    np.testing.assert_array_equal(left[::zoom, ::zoom], original)
    mask = block_mask((4, 4), 6, np.random.default_rng(0)).repeat(4, axis=0).repeat(4, axis=1)
    middle = right[zoom // 2 :: zoom, zoom // 2 :: zoom]
    assert (middle[mask] == 128).all() and (middle[~mask] == original[~mask]).all()


def test_wrong_use_and_wrong_checkpoints(capsys, checkpoint, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png")
    before = path.read_bytes()
    for words in (
        ["--ratio", "0"],
        ["--ratio", "1.5"],
        ["--ratio", "x"],
        ["--seed", "-1"],
        ["-o", path],
        ["-o", "x.jpg"],
    ):
        assert run(capsys, "mask", path, "-m", checkpoint, *words)[0] == 2
    assert path.read_bytes() == before
    code, _, err = run(capsys, "mask", path)
    assert code == 2 and "--model" in err
    code, _, err = run(capsys, "mask", path, "-m", save(tmp_path / "classify", "classify"))
    assert code == 1 and "made for image classification" in err and err.count("\n") == 1
    code, _, err = run(capsys, "mask", path, "-m", save(tmp_path / "blind", "mask", use_mask_token=False))
    assert code == 1 and "mask token" in err and err.count("\n") == 1
    code, _, err = run(capsys, "mask", tmp_path / "gone.png", "-m", checkpoint)
    assert code == 1 and "gone.png" in err and err.count("\n") == 1


def test_masks_of_the_paper_have_the_published_codes_statistics():
    """Of 3000 masks of the published code (75 of 14x14): mean 74.5, exactly 75 in 68%, at least 66, never more."""
    rng = np.random.default_rng(0)
    counts = np.array([block_mask((14, 14), 75, rng).sum() for _ in range(1500)])
    assert counts.max() == 75 and counts.min() >= 60
    assert abs(counts.mean() - 74.5) < 0.15  # standard error 0.02
    assert abs((counts == 75).mean() - 0.68) < 0.05  # standard error 0.012


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (2, 2), (4, 4), (3, 20), (40, 40)])
def test_any_grid_and_count(grid):
    for count in {0, 1, grid[0] * grid[1] // 2, grid[0] * grid[1]}:
        masks = [block_mask(grid, count, np.random.default_rng(seed)) for seed in range(20)]
        assert all(mask.shape == grid and mask.dtype == bool and mask.sum() <= count for mask in masks)
        if 16 / 196 * grid[0] * grid[1] <= count <= grid[0] * grid[1] // 2:  # a block at least, and room for it
            assert max(mask.sum() for mask in masks) > count / 2
    with pytest.raises(ValueError, match="expected 0 to"):
        block_mask(grid, grid[0] * grid[1] + 1, np.random.default_rng(0))


def test_the_same_seed_gives_the_same_mask_and_blocks_are_no_scatter():
    first, again = (block_mask((14, 14), 75, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    inner = first[:, 1:] & first[:, :-1]
    assert inner.sum() > 50  # 75 scattered patches have about 27 such neighbours
