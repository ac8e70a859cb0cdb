"""Decoding large JPEGs at a fraction of their size: where it happens, how close it is, and what it leaves alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from cli_helpers import run, save
from PIL import Image

from minibeit import BeitImageProcessor
from minibeit.images import opening

WIDE, HIGH, SIZE = 640, 480, 40


@pytest.fixture
def photo():
    """Hills of colour without fine noise, as most of a photograph is."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDE, HIGH), Image.Resampling.BICUBIC)


def stored(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def both(image, **settings):
    """Pixel values in levels of 255, decoded whole and in draft."""
    whole, draft = (
        BeitImageProcessor(do_normalize=False, do_rescale=False, draft=d, **settings) for d in (False, True)
    )
    return whole(image).pixel_values, draft(image).pixel_values


@pytest.mark.parametrize("size", [SIZE, {"shortest_edge": SIZE}, {"height": 20, "width": SIZE}])
@pytest.mark.parametrize("orientation", [1, 6])  # 6: the camera was held upright
def test_a_draft_is_close_to_the_whole(photo, tmp_path, size, orientation, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(photo, quality=90, exif=exif)
    (tmp_path / "photo.jpg").write_bytes(data)
    sizes, upright = [], opening._upright
    monkeypatch.setattr(opening, "_upright", lambda image: (sizes.append(image.size), upright(image))[1])
    found = [both(item, size=size) for item in (data, io.BytesIO(data), tmp_path / "photo.jpg")]
    for whole, draft in found:
        assert whole.shape == draft.shape and 0 < np.abs(whole - draft).max() <= 4
        assert np.abs(whole - draft).mean() < 0.5
        assert np.array_equal(draft, found[0][1])
    assert sizes[:2] == [(WIDE, HIGH), (WIDE // 4, HIGH // 4)]  # 120 >= 2 * 40, and an eighth would not be


def test_what_is_no_large_jpeg_stays_as_it_is(photo):
    small = photo.resize((2 * SIZE + 3, 2 * SIZE))
    for item in (stored(photo, "PNG"), stored(small), photo, np.asarray(photo)):
        whole, draft = both(item, size=SIZE)
        assert np.array_equal(whole, draft)
    data = stored(photo)
    whole, draft = both(data, do_resize=False)
    assert whole.shape == (1, 3, HIGH, WIDE) and np.array_equal(whole, draft)
    with Image.open(io.BytesIO(data)) as opened:  # the caller's own, whose size must not change
        both(opened, size=SIZE)
        assert opened.size == (WIDE, HIGH)


def test_it_is_off_saved_and_a_setting_of_each_call(photo, tmp_path):
    assert not BeitImageProcessor().draft and "draft" not in BeitImageProcessor().to_dict()
    BeitImageProcessor(size=SIZE, draft=True).save_pretrained(tmp_path)
    loaded, data = BeitImageProcessor.from_pretrained(tmp_path), stored(photo)
    assert loaded.draft
    assert np.array_equal(loaded(data, draft=False).pixel_values, BeitImageProcessor(size=SIZE)(data).pixel_values)
    with pytest.raises(ValueError, match="draft: expected true or false, found 'yes'"):
        BeitImageProcessor(draft="yes")


def test_the_commands_take_it(photo, capsys, tmp_path):
    folder = save(tmp_path / "model", "classify")
    (tmp_path / "photo.jpg").write_bytes(stored(photo))
    words = ["classify", tmp_path / "photo.jpg", "-m", folder, "--json", "-q"]
    (code, whole, _), (again, draft, _) = run(capsys, *words), run(capsys, *words, "--draft")
    assert code == again == 0 and whole != draft
    out = tmp_path / "features.npz"
    assert run(capsys, "features", tmp_path / "photo.jpg", "-m", folder, "-o", out, "--draft", "-q")[0] == 0
    with np.load(out) as file:
        assert np.isfinite(file["features"]).all() and len(file["features"]) == 1
