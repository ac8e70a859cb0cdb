"""`minibeit tokenize`, and `minibeit mask` with a tokenizer."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import run, save, save_pictures
from colour_tokenizer import colour_tokenizer, colours
from PIL import Image

from minibeit import DalleTokenizer
from minibeit.masking import block_mask
from minibeit.tokenizer.preprocess import unmap_pixels

FOLDER = Path(__file__).parent / "data" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer whose 64 tokens, of 4x4 pixels, are colours; images become 16x16."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = colour_tokenizer()
    DalleTokenizer(made.config.replace(image_size=16), arrays=made.arrays).save_pretrained(folder)
    return folder


def squares(path, ids: np.ndarray) -> np.ndarray:
    """Writes an image whose squares of 4x4 pixels have the tokens' colours; returns it (H, W, 3)."""
    levels = np.rint(255 * unmap_pixels(colours()[ids])).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)
    return levels


IDS = np.random.default_rng(0).integers(0, 64, (4, 4))


def test_tokens_are_those_of_the_squares(capsys, tokenizer, tmp_path):
    squares(tmp_path / "a.png", IDS)
    code, out, err = run(capsys, "tokenize", tmp_path / "a.png", "-t", tokenizer, "--json")
    assert code == 0
    assert not err
    assert json.loads(out) == [{"file": str(tmp_path / "a.png"), "grid": [4, 4], "tokens": IDS.tolist()}]


def test_the_grid_is_printed_for_every_image(capsys, tokenizer, tmp_path):
    for name, ids in (("a.png", IDS), ("b.png", IDS[::-1])):
        squares(tmp_path / name, ids)
    code, out, _ = run(capsys, "tokenize", tmp_path, "-t", tokenizer, "-b", 2)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"{tmp_path / 'a.png'}: 4x4 visual tokens of 4x4 pixels, {len(np.unique(IDS))} different:"
    assert np.array_equal(np.array([line.split() for line in lines[1:5]], int), IDS)
    assert np.array_equal(np.array([line.split() for line in lines[6:]], int), IDS[::-1])


def test_the_picture_shows_each_image_and_its_tokens(capsys, tokenizer, tmp_path):
    images = [squares(tmp_path / "in" / name, ids) for name, ids in (("a.png", IDS), ("b.png", IDS.T))]
    code, out, err = run(capsys, "tokenize", tmp_path / "in", "-t", tokenizer, "-o", tmp_path / "o.png")
    assert code == 0
    assert out.count("visual tokens") == 2
    assert "drawn in" in err
    drawn, zoom, gap = np.asarray(Image.open(tmp_path / "o.png")).astype(int), 448 // 16, 14
    assert drawn.shape == (2 * 448 + gap, 2 * 448 + gap, 3)
    for i, image in enumerate(images):
        row = drawn[i * (448 + gap) :][:448]
        assert np.abs(row[:, :448][::zoom, ::zoom] - image).max() <= 1
        assert np.abs(row[:, -448:][::zoom, ::zoom] - image).max() <= 2  # the token's colour, rounded twice


def test_images_are_read_once_and_let_go(capsys, tokenizer, tmp_path, monkeypatch):
    save_pictures(tmp_path / "in", *(f"{i}.png" for i in range(40)))
    read, alive, preprocess = [], [], DalleTokenizer.preprocess

    def seen(self, source, *sizes):
        read.append(Path(source).name)
        pixels = preprocess(self, source, *sizes)
        arrays.append(weakref.ref(pixels))
        alive.append(sum(array() is not None for array in arrays))
        return pixels

    arrays: list[weakref.ref] = []
    monkeypatch.setattr(DalleTokenizer, "preprocess", seen)
    words = ["tokenize", tmp_path / "in", "-t", tokenizer, "-o", tmp_path / "o.png", "-b", 1, "-q"]
    assert run(capsys, *words)[0] == 0
    assert sorted(read) == sorted(f"{i}.png" for i in range(40))
    assert max(alive) < 20  # what is read ahead, not all of them


@pytest.mark.parametrize("words", [["--size", "8"], ["--size", "24"], ["--size", "8", "--center-crop"]])
def test_sizes(capsys, tokenizer, tmp_path, words):
    (path,) = save_pictures(tmp_path, "a.png", size=(20, 30))
    (row,) = json.loads(run(capsys, "tokenize", path, "-t", tokenizer, "--json", *words)[1])
    size = int(words[1])
    loaded = DalleTokenizer.from_pretrained(tokenizer)
    expected = loaded.encode(loaded.preprocess(str(path), size, "--center-crop" in words))
    assert row["tokens"] == expected[0].tolist()
    assert row["grid"] == [size // 4, size // 4]


def test_images_that_cannot_be_read_are_named_and_the_others_go_on(capsys, tokenizer, tmp_path):
    squares(tmp_path / "a.png", IDS)
    (tmp_path / "b.png").write_bytes(b"no image")
    words = ["tokenize", tmp_path, "-t", tokenizer, "-q", "-o", tmp_path.parent / "drawn.png"]
    code, out, err = run(capsys, *words, "--json")
    good, bad = json.loads(out)
    assert code == 1
    assert good["tokens"] == IDS.tolist()
    assert "b.png" in bad["error"]
    assert err.count("\n") == 1
    assert Image.open(tmp_path.parent / "drawn.png").size == (2 * 448 + 14, 448)


def test_published_files_are_tokenizers(capsys, tmp_path):
    (path,) = save_pictures(tmp_path, "a.png", size=(16, 24))
    for name in ("encoder.pkl", "decoder.pkl"):
        shutil.copy(FOLDER / name, tmp_path / name)
    for place in (tmp_path, FOLDER / "encoder.pkl", FOLDER / "flava.bin"):
        code, out, _ = run(capsys, "tokenize", path, "-t", place, "--size", "16", "--json")
        assert code == 0
        assert json.loads(out)[0]["grid"] == [2, 2]
    code, _, err = run(capsys, "tokenize", path, "-t", FOLDER / "encoder.pkl", "-o", tmp_path / "o.png")
    assert code == 1
    assert "needs a tokenizer with a decoder" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o.png").exists()


def test_wrong_use(capsys, tokenizer, tmp_path):
    squares(tmp_path / "a.png", IDS)
    picture = tmp_path / "a.png"
    before = picture.read_bytes()
    for words, told in (
        ([picture], "--tokenizer"),
        ([picture, "-t", tokenizer, "-o", "x.jpg"], ".png"),
        ([picture, "-t", tokenizer, "-o", picture], "input"),
        ([picture, "-t", tokenizer, "-o", tokenizer / "model.safetensors"], ".png"),
        ([picture, "-t", tokenizer, "--size", "0"], "--size"),
    ):
        code, out, err = run(capsys, "tokenize", *words)
        assert (code, out) == (2, "")
        assert told in err
    assert picture.read_bytes() == before
    code, _, err = run(capsys, "tokenize", picture, "-t", save(tmp_path / "model", "mask"))
    assert code == 1
    assert "no tokenizer" in err
    assert err.count("\n") == 1
    code, _, err = run(capsys, "tokenize", picture, "-t", tokenizer, "--size", "3")
    assert code == 1
    assert "both at least 4" in err
    assert err.count("\n") == 1


# mask with a tokenizer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mask"), "mask", vocab_size=64)


def test_predicted_tokens_stand_beside_the_images_own(capsys, model, tokenizer, tmp_path):
    squares(tmp_path / "a.png", IDS)
    words = ["mask", tmp_path / "a.png", "-m", model, "-t", tokenizer, "--seed", "1"]
    tokens = json.loads(run(capsys, *words, "--json")[1])["tokens"]
    assert tokens
    assert all(token["own"] == IDS[token["row"], token["column"]] for token in tokens)
    right = sum(token["own"] == token["token"] for token in tokens)
    assert f"mean probability of {np.mean([t['score'] for t in tokens]):.2%}, {right} of them" in run(capsys, *words)[1]


def test_the_third_image_is_made_of_predicted_and_own_tokens(capsys, model, tokenizer, tmp_path):
    image = squares(tmp_path / "a.png", IDS)
    words = ["mask", tmp_path / "a.png", "-m", model, "-t", tokenizer, "-o", tmp_path / "o.png", "--json"]
    tokens = json.loads(run(capsys, *words)[1])["tokens"]
    drawn = np.asarray(Image.open(tmp_path / "o.png")).astype(int)
    assert drawn.shape == (448, 3 * 448 + 2 * 14, 3)
    middles = slice(448 // 8, None, 448 // 4)  # of the squares
    left, covered, guessed = (drawn[:, i * 462 :][:, :448][middles, middles] for i in range(3))
    mask = block_mask((4, 4), 6, np.random.default_rng(0))
    ids = IDS.copy()
    for token in tokens:
        ids[token["row"], token["column"]] = token["token"]
    assert np.array_equal(left, image[2::4, 2::4])
    assert (covered[mask] == 128).all()
    assert np.abs(guessed - 255 * unmap_pixels(colours()[ids])).max() <= 3
    assert not np.array_equal(ids, IDS)


def test_a_tokenizer_of_another_vocabulary_or_without_a_decoder(capsys, model, tokenizer, tmp_path):
    squares(tmp_path / "a.png", IDS)
    other = save(tmp_path / "other", "mask")
    code, _, err = run(capsys, "mask", tmp_path / "a.png", "-m", other, "-t", tokenizer)
    assert code == 1
    assert "has 64 visual tokens, but" in err
    assert "predicts 30" in err
    made = colour_tokenizer()
    encoder = {name: array for name, array in made.arrays.items() if name.startswith("encoder")}
    DalleTokenizer(made.config.replace(n_init=None), arrays=encoder).save_pretrained(tmp_path / "encoder")
    words = ["mask", tmp_path / "a.png", "-m", model, "-t", tmp_path / "encoder"]
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words, "-o", tmp_path / "o.png")
    assert code == 1
    assert "needs a tokenizer with a decoder" in err
    assert err.count("\n") == 1
