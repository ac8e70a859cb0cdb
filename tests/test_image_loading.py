"""Every kind of picture, in every form, and every kind of bad input."""

from __future__ import annotations

import io
import struct
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import picture, plain
from PIL import Image

from minibeit.errors import ImageError
from minibeit.image_processor import BeitImageProcessor
from minibeit.images.loading import load_image
from minibeit.images.opening import read_picture


@pytest.fixture
def rng():
    return np.random.default_rng(3)


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_the_same_picture_in_every_form(rng, tmp_path):
    image = picture(rng, 12, 9)
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    processor = BeitImageProcessor(size=7)
    expected = processor(image).pixel_values
    assert expected.shape == (1, 3, 7, 7) and expected.dtype == np.float32
    forms = [
        pixels,
        pixels.transpose(2, 0, 1),
        pixels[None],
        pixels.astype(np.int64),
        pixels.astype(np.float32),
        pixels.astype(">f8"),
        np.asfortranarray(pixels),
        [image],
        [[image]],
        (pixels,),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        (tmp_path / "a.png").as_uri(),
        (tmp_path / "a.png").read_bytes(),
        bytearray((tmp_path / "a.png").read_bytes()),
        io.BytesIO((tmp_path / "a.png").read_bytes()),
        SimpleNamespace(__array__=lambda: pixels),
        np.pad(pixels, ((0, 0), (0, 0), (0, 1)), constant_values=255),  # RGBA, opaque
        image.convert("RGBA"),
    ]
    for form in forms:
        if isinstance(form, SimpleNamespace):  # an array of another library
            form = type("Tensor", (), {"__array__": lambda self, *_, **__: pixels})()
        np.testing.assert_array_equal(processor(form).pixel_values, expected)


def test_batches_equal_single_pictures(rng):
    images = [picture(rng, *shape) for shape in ((5, 9), (8, 8), (12, 3))]
    processor = BeitImageProcessor(size=6)
    together = processor(images, return_tensors="np").pixel_values
    assert together.shape == (3, 3, 6, 6)
    np.testing.assert_array_equal(together, np.concatenate([processor(i).pixel_values for i in images]))
    batch = rng.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(processor(batch).pixel_values, processor(list(batch)).pixel_values)
    np.testing.assert_array_equal(
        processor(batch.transpose(0, 3, 1, 2)).pixel_values, processor([batch[:2], batch[2:]]).pixel_values
    )


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_modes_become_rgb_as_pillow_does(rng, mode):
    image = picture(rng).convert(mode)
    values = plain()(image).pixel_values[0]
    np.testing.assert_array_equal(values, np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def on_white(image):
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "La", "RGBa"])
def test_transparency_is_laid_on_white(rng, mode):
    image = picture(rng, mode="LA" if mode[0] in "LP" else "RGBA")
    if mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode in ("La", "RGBa"):
        image = image.convert(mode)
    visible = image.convert(mode.upper()) if mode in ("La", "RGBa") else image
    np.testing.assert_array_equal(plain()(image).pixel_values[0], on_white(visible))


def test_transparent_palette_and_colour_key(rng, tmp_path):
    image = Image.new("P", (4, 3), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "palette.png", transparency=1)
    values = plain()(tmp_path / "palette.png").pixel_values[0]
    assert values[:, 0, 0].tolist() == [255, 0, 0] and values[:, 1, 1].tolist() == [255, 255, 255]
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert (plain()(tmp_path / "key.png").pixel_values == 255).all()


def test_rgba_arrays_are_laid_on_white(rng):
    pixels = rng.integers(0, 256, (9, 8, 4), dtype=np.uint8)
    alpha = pixels[..., 3:] / 255
    expected = np.round(alpha * pixels[..., :3] + (1 - alpha) * 255).transpose(2, 0, 1)
    np.testing.assert_array_equal(plain()(pixels).pixel_values[0], expected)
    floats = (pixels / 255).astype(np.float32)
    np.testing.assert_allclose(plain()(floats).pixel_values[0], expected / 255, atol=0.51 / 255)  # unrounded
    with pytest.raises(ImageError, match=r"RGBA values within 0..1, found"):
        plain()(floats * 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 128, 129, 257, 1000, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    expected = np.rint(levels / 257)
    for form in (tmp_path / f"deep.{suffix}", Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))):
        values = plain()(form).pixel_values
        np.testing.assert_array_equal(values[0, 2], expected)


def test_float_and_32_bit_pictures():
    unit = np.array([[0, 0.5, 1]], np.float32)
    np.testing.assert_array_equal(plain()(Image.fromarray(unit)).pixel_values[0, 0], [[0, 128, 255]])
    np.testing.assert_array_equal(plain()(Image.fromarray(unit * 200)).pixel_values[0, 0], [[0, 100, 200]])
    byte = Image.fromarray(np.array([[0, 7, 255]], np.int32))
    np.testing.assert_array_equal(plain()(byte).pixel_values[0, 0], [[0, 7, 255]])
    for bad in (unit * 300, -unit, unit * np.nan):
        with pytest.raises(ImageError, match=r"^images: expected"):
            plain()(Image.fromarray(bad))
    with pytest.raises(ImageError, match=r"expected 16-bit pixels, found values 0..70000"):
        plain()(Image.fromarray(np.array([[0, 70_000]], np.int32)))


def test_grayscale_model(rng):
    image = picture(rng, 8, 8)
    processor = BeitImageProcessor(image_mean=[0.5], image_std=[0.5], size=4)
    gray = image.convert("L")
    expected = processor(gray).pixel_values
    assert expected.shape == (1, 1, 4, 4)
    for form in (image, np.asarray(image), np.asarray(gray), np.asarray(gray)[None], gray.convert("LA")):
        np.testing.assert_array_equal(processor(form).pixel_values, expected)
    floats = np.asarray(image) / 255
    one = plain(image_mean=[0.5], image_std=[0.5])
    np.testing.assert_allclose(one(floats).pixel_values * 255, one(image).pixel_values, atol=0.51)


def test_four_channel_model(rng):
    processor = BeitImageProcessor(image_mean=[0.5] * 4, image_std=[0.5] * 4, size=4)
    assert processor(picture(rng, mode="RGBA")).pixel_values.shape == (1, 4, 4, 4)
    assert (processor(picture(rng)).pixel_values[:, 3] == 1).all()
    with pytest.raises(ImageError, match="images: expected 4 channels, found 3"):
        processor(np.zeros((5, 6, 3), np.uint8))


def test_conversion_can_be_turned_off(rng):
    gray = picture(rng, mode="L")
    with pytest.raises(ImageError, match="expected 3 channels, one per number of image_mean, found 1"):
        BeitImageProcessor(do_convert_rgb=False)(gray)
    batch = BeitImageProcessor(do_convert_rgb=False, image_mean=0.5, image_std=0.5, size=4)
    assert batch(gray).pixel_values.shape == (1, 1, 4, 4)
    assert batch(picture(rng, mode="RGBA")).pixel_values.shape == (1, 4, 4, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(rng, tmp_path, orientation):
    upright = picture(rng, 6, 4)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the Transpose that stores it
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        np.testing.assert_array_equal(plain()(form).pixel_values, plain()(upright).pixel_values)
        ignored = plain(apply_exif_orientation=False)(form).pixel_values
        np.testing.assert_array_equal(ignored, plain()(stored).pixel_values)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_obstacle(rng, tmp_path):
    picture(rng).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert load_image(tmp_path / "a.jpg").shape == (6, 5, 3)


def test_animation_gives_its_first_frame(rng, tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (3, 1, 1), (1, 1, 1), (1, 7, 3), (7, 1, 3)])
def test_tiny_pictures(rng, shape):
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    with warnings.catch_warnings():
        if shape != (1, 1, 1):
            warnings.simplefilter("error")
        else:
            warnings.simplefilter("ignore")
        assert BeitImageProcessor(size=8)(pixels).pixel_values.shape == (1, 3, 8, 8)
    if shape[-1] == 3:
        expected = BeitImageProcessor(size=8)(Image.fromarray(pixels)).pixel_values
        np.testing.assert_array_equal(BeitImageProcessor(size=8)(pixels).pixel_values, expected)


def test_ambiguous_channels(rng):
    pixels = rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match="channels first or last"):
        first = plain()(pixels).pixel_values
    np.testing.assert_array_equal(first[0], pixels)
    last = plain()(pixels, input_data_format="channels_last").pixel_values
    np.testing.assert_array_equal(last[0], pixels.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="input_data_format: expected 'channels_first'"):
        plain()(pixels, input_data_format="sideways")


def test_floats_rescaled_twice_warn(rng):
    with pytest.warns(UserWarning, match="images: the floats are within 0..1"):
        BeitImageProcessor(size=4)(rng.random((5, 5, 3)))


def test_bool_arrays_are_black_and_white():
    mask = np.array([[True, False]])
    np.testing.assert_array_equal(plain()(mask).pixel_values[0, 0], [[255, 0]])


def test_callers_pictures_stay_as_they_are(rng):
    arrays = [rng.random((5, 6, 3)), rng.integers(0, 256, (5, 6, 4), dtype=np.uint8), rng.random((5, 6)) > 0.5]
    for array in arrays:
        array.flags.writeable = False  # an attempt to write raises
        BeitImageProcessor(size=4, do_rescale=False)(array)
    labels = rng.integers(0, 3, (5, 6), dtype=np.uint8)
    labels.flags.writeable = False
    BeitImageProcessor(size=4, do_reduce_labels=True, compat="transformers")(arrays[1], labels)
    image = picture(rng)
    before = image.tobytes()
    BeitImageProcessor(size=4)(image)
    assert image.tobytes() == before and image.size == (5, 6)


def test_label_maps_in_every_form(rng, tmp_path):
    labels = rng.integers(0, 2, (6, 5), dtype=np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(labels.reshape(-1).tolist())
    palette.save(tmp_path / "map.png")
    forms = [
        labels,
        labels[None],
        [labels],
        labels.astype(bool),
        labels.astype(np.float64),
        labels.astype(np.int32),
        Image.fromarray(labels),
        Image.fromarray(labels.astype(np.uint16)),
        Image.fromarray(labels.astype(bool)),
        palette,
        tmp_path / "map.png",
    ]
    for form in forms:
        batch = plain()(picture(rng), form)
        np.testing.assert_array_equal(batch.labels, labels[None])
        assert batch.labels.dtype == np.int64


# Bad input ------------------------------------------------------------------------------------------------------------


def file_with(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def test_bad_files(rng, tmp_path):
    stream = io.BytesIO()
    picture(rng, 40, 40).save(stream, "PNG")
    png = stream.getvalue()
    stream = io.BytesIO()
    picture(rng, 40, 40).save(stream, "JPEG")
    jpeg = stream.getvalue()
    flipped = png[:100] + bytes([png[100] ^ 255]) + png[101:]
    bad = {
        file_with(tmp_path, "empty.png", b""): "found an empty file",
        file_with(tmp_path, "short.png", png[: len(png) // 2]): "cannot be read",
        file_with(tmp_path, "short.jpg", jpeg[: len(jpeg) // 2]): "cannot be read",
        file_with(tmp_path, "flipped.png", flipped): "cannot be read",
        file_with(tmp_path, "text.png", b"not a picture"): "found something else",
        file_with(tmp_path, "head.png", png[:8]): "cannot be read|found something else",
        tmp_path / "missing.png": "there is no such file",
        tmp_path: "found a folder",
    }
    for path, reason in bad.items():
        with pytest.raises(ImageError, match=reason) as caught:
            BeitImageProcessor()([picture(rng), path])
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"the file cannot be read \(File name too long\)"):
        load_image("x" * 5000)
    with pytest.raises(ImageError, match=r"https://a.b/c.png: .*download it first"):
        read_picture("https://a.b/c.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_every_truncation_is_a_sentence(rng, tmp_path):
    for name in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        stream = io.BytesIO()
        try:
            picture(rng, 9, 9).save(stream, name)
        except (KeyError, OSError):
            continue  # a Pillow without that format
        content = stream.getvalue()
        for end in range(0, len(content), max(1, len(content) // 40)):
            try:  # some formats still show the picture without their last bytes
                assert load_image(file_with(tmp_path, "cut", content[:end])).shape == (9, 9, 3)
            except ImageError as error:
                assert "cut" in str(error)


def test_damaged_picture_object(rng, tmp_path):
    picture(rng, 40, 40).save(tmp_path / "a.png")
    with (
        Image.open(file_with(tmp_path, "cut.png", (tmp_path / "a.png").read_bytes()[:300])) as image,
        pytest.raises(ImageError, match=r"images\[1\] \(.*cut.png\): the image cannot be read"),
    ):
        BeitImageProcessor()([picture(rng), image])


def test_decompression_bomb(tmp_path, monkeypatch):
    def chunk(kind, data):
        import zlib

        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=r"bomb.png: expected at most 178956970 pixels, .*bomb"):
        load_image(file_with(tmp_path, "bomb.png", bomb))
    Image.new("RGB", (15, 10)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns from half of the limit on
        assert load_image(tmp_path / "large.png").shape == (10, 15, 3)
    with pytest.raises(ImageError, match="gives 15 x 15, more than 200 pixels"):
        BeitImageProcessor(size=15)(np.zeros((2, 2, 3), np.uint8))


BAD_ARRAYS = {
    "zero size": (np.zeros((0, 5, 3), np.uint8), "at least one pixel, found an array of shape"),
    "object": (np.array([[None]]), "expected numbers .*object"),
    "complex": (np.zeros((5, 5), complex), "expected numbers .*complex128"),
    "strings": (np.array([["a.png"]]), "expected numbers .*<U5"),
    "nan": (np.full((5, 5, 3), np.nan), "expected finite pixels"),
    "inf": (np.full((5, 5, 3), np.inf), "expected finite pixels"),
    "two channels": (np.zeros((5, 5, 2), np.uint8), "expected 1, 3 or 4 channels"),
    "five channels": (np.zeros((5, 5, 5), np.uint8), "expected 1, 3 or 4 channels"),
    "one axis": (np.zeros(5, np.uint8), r"expected shape \(H, W\)"),
    "five axes": (np.zeros((1, 1, 3, 5, 5), np.uint8), r"expected shape \(H, W\)"),
    "no axis": (np.uint8(3), r"expected shape \(H, W\)"),
    "floats above": (np.full((5, 5, 3), 1.5), r"floats within 0..1 .*found 1.5..1.5"),
    "floats below": (np.full((5, 5, 3), -0.5), "floats within 0..1"),
    "integers above": (np.full((5, 5, 3), 256), r"whole numbers within 0..255 \(int64\), found 256..256"),
    "integers below": (np.full((5, 5, 3), -1), "whole numbers within 0..255"),
    "16 bits": (np.full((5, 5), 40_000, np.uint16), "whole numbers within 0..255"),
    "empty picture": (Image.new("RGB", (0, 5)), "expected at least one pixel"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(rng, name):
    array, message = BAD_ARRAYS[name]
    with pytest.raises(ImageError, match=r"^images\[1\].*" + message) as caught:
        BeitImageProcessor()([picture(rng), array])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", [3, 1.5, None, {"a": 1}, [[1, 2], [3, 4]]])
def test_wrong_types(item):
    with pytest.raises(TypeError, match=r"images.*: expected a path, a file, its bytes, .* or an array, found"):
        BeitImageProcessor()(item)


def test_bytes_and_file_objects_that_are_no_image(rng, tmp_path):
    processor, path = BeitImageProcessor(), tmp_path / "a b.png"
    picture(rng).save(path)
    for item, message in [
        (b"text", r"^images: expected an image in a format that Pillow reads"),
        (b"", r"^images: expected an image, found no bytes"),
        (io.BytesIO(b"text"), r"^images: expected an image in a format"),
        (io.StringIO("text"), r"^images: expected a file opened in binary mode"),
        ((tmp_path / "gone.png").as_uri(), r"^file:.*gone.png: there is no such file"),
        ("file://elsewhere/a.png", r"^file://elsewhere/a.png: expected an image on this machine"),
    ]:
        with pytest.raises(ImageError, match=message):
            processor(item)
    with open(path, "rb") as file:
        file.read(7)
        first = processor(file).pixel_values
        np.testing.assert_array_equal(processor(file).pixel_values, first)
        np.testing.assert_array_equal(processor(path.as_uri()).pixel_values, first)
    with pytest.raises(ImageError, match=r"^images \(.*a b.png\): the image cannot be read.*closed file"):
        processor(file)


@pytest.mark.parametrize("images", [[], [[]], np.zeros((0, 5, 5, 3), np.uint8)])
def test_no_pictures(images):
    with pytest.raises(ImageError, match="images: expected at least one image"):
        BeitImageProcessor()(images)


def test_stubborn_tensor():
    class Tensor:
        def __array__(self, *_, **__):
            raise RuntimeError("on another device")

    with pytest.raises(TypeError, match=r"images\[0\]: Tensor cannot become a NumPy array \(on another device\)"):
        BeitImageProcessor()([Tensor()])


def test_mixed_sizes(rng):
    images = [picture(rng, 5, 5), picture(rng, 5, 9)]
    for settings in ({"do_resize": False}, {"size": {"shortest_edge": 4}}):
        with pytest.raises(ImageError, match=r"images\[1\]: expected shape \(3, .*as of images\[0\]"):
            BeitImageProcessor(**settings)(images)


BAD_MAPS = {
    "rgb": (Image.new("RGB", (5, 5)), "one class id per pixel.*RGB"),
    "fractions": (np.full((5, 5), 0.5), "whole class ids"),
    "nan": (np.full((5, 5), np.nan), "finite"),
    "one axis": (np.zeros(5, int), r"shape \(H, W\)"),
    "count": (np.zeros((2, 5, 5), int), "expected 1, one per image, found 2"),
    "none": ([], "at least one image"),
    "missing": ("nowhere.png", "no such file"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_maps(rng, name):
    maps, message = BAD_MAPS[name]
    with pytest.raises(ImageError, match=message):
        BeitImageProcessor()(picture(rng), maps)
