"""Pictures in strips: the same bytes as at once, in little memory, and no more pixels than allowed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hostile import memory
from PIL import Image

from minibeit import BeitImageProcessor, ImageError
from minibeit.images import loading
from minibeit.images.loading import load_image, load_label_map
from minibeit.images.opening import most_pixels

STATUS = Path("/proc/self/status")


def noise(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode in ("I", "F"):
        values = rng.integers(0, 60_000, (37, 23))
        return Image.fromarray(values.astype(np.int32) if mode == "I" else (values / 240).astype(np.float32))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 60_000, (37, 23)).astype(np.uint16))
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (37, 23)).astype(bool))
    image = Image.frombytes(mode, (23, 37), rng.integers(0, 256, 37 * 23 * bands).astype(np.uint8).tobytes())
    if mode in ("P", "PA"):
        image.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
    return image


def encoded(image: Image.Image, format: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


PICTURES = {
    **{mode: lambda mode=mode: noise(mode) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK",
                                                        "YCbCr", "HSV", "I", "F", "I;16")},
    "palette with one transparent": lambda: encoded(noise("P"), "PNG", transparency=3),
    "palette with an alpha each": lambda: encoded(noise("P"), "PNG", transparency=bytes(range(256))),
    "gray with one transparent": lambda: encoded(noise("L"), "PNG", transparency=7),
    "colour with one transparent": lambda: encoded(noise("RGB"), "PNG", transparency=(1, 2, 3)),
    "16-bit PNG": lambda: encoded(noise("I;16"), "PNG"),
    "GIF": lambda: encoded(noise("P"), "GIF", transparency=5),
    "WebP": lambda: encoded(noise("RGBA"), "WEBP", lossless=True),
    "JPEG": lambda: encoded(noise("CMYK"), "JPEG"),
    "TIFF of floats": lambda: encoded(noise("F"), "TIFF"),
    "small integers": lambda: Image.fromarray(np.arange(37 * 23, dtype=np.int32).reshape(37, 23) % 200),
}  # fmt: skip


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("picture", PICTURES)
def test_strips_give_the_same_bytes(picture, channels, monkeypatch):
    whole = outcome(PICTURES[picture](), channels)
    for pixels in (1, 23 * 5, 23 * 36):
        monkeypatch.setattr(loading, "STRIP_PIXELS", pixels)
        parts = outcome(PICTURES[picture](), channels)
        assert type(parts) is type(whole)
        if isinstance(whole, str):
            assert parts == whole
        else:
            assert parts.dtype == whole.dtype and np.array_equal(parts, whole)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("picture", PICTURES)
def test_images_are_resized_as_their_pixels_are(picture, channels, monkeypatch):
    """The processor resizes most images without making an array of them first."""
    processor = BeitImageProcessor(size=9, image_mean=[0.5] * channels, image_std=[0.5] * channels)
    pixels = outcome(PICTURES[picture](), channels)
    for strip in (50, loading.STRIP_PIXELS):
        monkeypatch.setattr(loading, "STRIP_PIXELS", strip)
        if isinstance(pixels, str):
            with pytest.raises(ImageError):
                processor(PICTURES[picture]())
        else:
            found = processor(PICTURES[picture]()).pixel_values
            np.testing.assert_array_equal(found, processor(pixels, input_data_format="channels_last").pixel_values)


def outcome(image, channels):
    try:
        return load_image(image, channels=channels)
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I", "I;16"])
def test_strips_give_the_same_labels(mode, monkeypatch):
    whole = load_label_map(noise(mode))
    monkeypatch.setattr(loading, "STRIP_PIXELS", 50)
    assert np.array_equal(load_label_map(noise(mode)), whole)


FORMATS = {
    "RGB": "JPEG",
    "RGBA": "PNG",
    "LA": "PNG",
    "P": "PNG",
    "1": "PNG",
    "I;16": "PNG",
    "F": "TIFF",
    "CMYK": "JPEG",
}


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
@pytest.mark.parametrize("mode", FORMATS)
def test_reading_takes_eight_bytes_per_pixel(mode, tmp_path):
    options = {"transparency": 3} if mode == "P" else {}
    Image.new(mode, (4000, 5000)).save(tmp_path / "large", FORMATS[mode], **options)
    load_image(Image.new(mode, (3, 2)))
    STATUS.with_name("clear_refs").write_text("5")
    before = memory(STATUS, "VmRSS")
    assert load_image(tmp_path / "large").shape == (5000, 4000, 3)
    assert memory(STATUS, "VmHWM") - before < 8 * 20 + 40, mode  # megabytes; strips and decoders take some


def test_the_limit_of_pixels_can_be_moved(tmp_path, monkeypatch):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    assert most_pixels() == 1 << 27 > 100e6
    monkeypatch.setenv("MINIBEIT_MAX_PIXELS", "600")
    assert load_image(tmp_path / "a.png").shape == (20, 30, 3)
    monkeypatch.setenv("MINIBEIT_MAX_PIXELS", "599")
    for read, item in ((load_image, tmp_path / "a.png"), (load_label_map, Image.open(tmp_path / "a.png"))):
        with pytest.raises(ImageError, match=r"at most 599 pixels, found 30 x 20; set MINIBEIT_MAX_PIXELS to a larger"):
            read(item)
    for text in ("many", "0", "-5", "1" * 30, "\u0663"):
        monkeypatch.setenv("MINIBEIT_MAX_PIXELS", text)
        with pytest.raises(ValueError, match="MINIBEIT_MAX_PIXELS: expected a positive whole number, found"):
            most_pixels()


def test_resizing_is_bounded_whatever_the_proportions():
    thin = np.zeros((3_000_000, 1), np.uint8)
    with pytest.raises(ImageError, match="less elongated image, found 3000000 x 1; resizing it to 224 x 224"):
        BeitImageProcessor()(thin)
    for processor in (BeitImageProcessor(size={"shortest_edge": 224}), BeitImageProcessor(size=[8000, 8000])):
        with pytest.raises(ImageError, match=r"gives .* more than 67108864 pixels|less elongated"):
            processor(thin)
    with pytest.raises(ImageError, match=r"segmentation_maps.* gives 672000000 x 224, more than"):
        BeitImageProcessor(size={"shortest_edge": 224}, do_resize=True)(np.zeros((9, 9), np.uint8), thin[..., 0:1])
