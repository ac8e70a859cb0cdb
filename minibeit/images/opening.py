"""Opens paths, bytes, file objects and Pillow images: as Pillow images, upright, with their pixels in memory."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ImageError
from ..places import Address, is_address
from ..strict_json import brief

MOST_PIXELS = 1 << 27
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
LOCKS = 61


class _Locks:
    """`of(item)`: two threads must not decode one image object, or read one file object, at the same time.

    `opening`: `warnings.catch_warnings` puts back what another thread may have changed in the meantime.
    """

    def __init__(self) -> None:
        self.opening = threading.Lock()
        self._of_items = tuple(threading.Lock() for _ in range(LOCKS))

    def of(self, item: Any) -> threading.Lock:
        return self._of_items[id(item) // 16 % LOCKS]


_locks = _Locks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.__init__)  # type: ignore[misc]  # their holders are not in the child


def is_picture(item: Any) -> bool:
    """Whether `item` is something that `opened` opens: a path, an `Address`, bytes, a file object or a PIL image."""
    return isinstance(item, (str, os.PathLike, Address, bytes, bytearray, memoryview, Image.Image)) or _is_file(item)


def opened(
    item: Any, name: str, apply_exif_orientation: bool = True, needed: int | None = None
) -> tuple[str, Image.Image]:
    """(name for messages, PIL image with its pixels in memory) of anything that `is_picture`.

    Of the JPEGs among files and bytes with `needed` a half, a quarter or an eighth of the height and width is decoded,
    if at least `needed` pixels are left of either.  Raises ImageError, naming file or argument, as `read_picture` does.
    """
    if isinstance(item, (str, os.PathLike, Address)):
        return str(item), read_picture(item, apply_exif_orientation, needed)
    with _locks.of(item):
        if isinstance(item, Image.Image):
            return _loaded(item, name, apply_exif_orientation)
        if _is_file(item):
            name = f"{name} ({item.name})" if isinstance(getattr(item, "name", None), str) else name
            item = _content(item, name)
        if len(item) == 0:
            raise ImageError(f"{name}: expected an image, found no bytes")
        with reading(name), _open(io.BytesIO(item)) as image:
            return name, _decoded(image, name, apply_exif_orientation, needed)


def read_picture(
    path: str | os.PathLike[str] | Address, apply_exif_orientation: bool = True, needed: int | None = None
) -> Image.Image:
    """The decoded image of a file (of an animation the first frame), rotated upright according to its EXIF data.

    `path` may be a file:// URL, or an `Address`, which is fetched.  Raises ImageError, naming the file, if it is
    missing, empty, truncated, no image, or a decompression bomb: more pixels than `most_pixels()`, or than Pillow
    allows, which is twice `PIL.Image.MAX_IMAGE_PIXELS`.  Reading, rotating and converting take at most 8 bytes per
    pixel, for WebP 16 (its decoder keeps two frames).
    """
    name, file = str(path), _fetched(path) if isinstance(path, Address) else _local(path)
    with reading(name):
        if isinstance(file, io.BytesIO):
            with _open(file) as image:
                return _decoded(image, name, apply_exif_orientation, needed)
        try:
            file.stat()  # from Python 3.14 on `exists` is silent about names that are too long
        except (FileNotFoundError, NotADirectoryError):
            raise ImageError(f"{name}: there is no such file") from None
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "something that is not a regular file"
            raise ImageError(f"{name}: expected an image, found {kind}")
        if file.stat().st_size == 0:
            raise ImageError(f"{name}: expected an image, found an empty file")
        with _open(file) as image:
            return _decoded(image, name, apply_exif_orientation, needed)


def most_pixels() -> int:
    """How many pixels an image may have: MINIBEIT_MAX_PIXELS if set, else 2^27, a third more than 100 megapixels.

    Raises ValueError if the variable is not a positive integer.
    """
    text = os.environ.get("MINIBEIT_MAX_PIXELS")
    if not text:
        return MOST_PIXELS
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) == 0:
        raise ValueError(f"MINIBEIT_MAX_PIXELS: expected a positive whole number, found {brief(text)}")
    return int(text)


def _is_file(item: Any) -> bool:
    return callable(getattr(item, "read", None)) and not hasattr(item, "__array__")


def _content(file: Any, name: str) -> bytes:
    """All bytes of a file object, from its beginning where that can be found."""
    with reading(name):
        with suppress(AttributeError, io.UnsupportedOperation):
            file.seek(0)
        data = file.read()
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: expected a file opened in binary mode ('rb'), found one that gives text")
    return data


def _local(path: str | os.PathLike[str]) -> Path:
    """The file that a path or a file:// URL names."""
    name = os.fspath(path)
    if not isinstance(name, str) or not is_address(name):
        return Path(path)
    from urllib.parse import urlsplit
    from urllib.request import url2pathname  # with it come HTTP, TLS and mail

    url = urlsplit(name)
    if url.scheme != "file" or url.netloc not in ("", "localhost"):
        raise ImageError(f"{name}: expected an image on this machine, found an address; download it first")
    return Path(url2pathname(url.path))


def _fetched(address: Address) -> io.BytesIO:
    try:
        content = address.read_bytes()
    except OSError as error:
        raise ImageError(str(error)) from error
    if not content:
        raise ImageError(f"{address}: expected an image, found an empty file")
    return io.BytesIO(content)


def _open(source: Any) -> Image.Image:
    with _locks.opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is raised at half the limit
        return Image.open(source)


def _decoded(image: Image.Image, name: str, apply_exif_orientation: bool, needed: int | None) -> Image.Image:
    _check_pixels(image, name)
    if needed is not None:
        image.draft(None, (needed, needed))
    image.load()
    vars(image).pop("_decoder", None)  # a WebP decoder holds two more frames
    return _upright(image) if apply_exif_orientation else image


def _check_pixels(image: Image.Image, name: str) -> None:
    limit = most_pixels()
    if image.width * image.height > limit:
        raise ImageError(
            f"{name}: expected at most {limit} pixels, found {image.width} x {image.height}; "
            "set MINIBEIT_MAX_PIXELS to a larger number if you trust it"
        )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Context in which whatever Pillow raises becomes an ImageError that names the image."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(
            f"{name}: expected at most {limit} pixels, found more, which looks like a decompression bomb; "
            "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: expected an image in a format that Pillow reads, found something else") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything, SyntaxError included
        if isinstance(error, OSError) and error.errno:  # an error of the file system, not of Pillow
            raise ImageError(f"{name}: the file cannot be read ({error.strerror})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: the image cannot be read, it seems damaged or unsupported ({reason})") from error


def _loaded(image: Image.Image, name: str, apply_exif_orientation: bool) -> tuple[str, Image.Image]:
    if getattr(image, "filename", ""):
        name = f"{name} ({image.filename})"  # type: ignore[attr-defined]
    if not (image.width and image.height):
        raise ImageError(f"{name}: expected at least one pixel, found an image of {image.width} x {image.height}")
    with reading(name):
        _check_pixels(image, name)
        image.load()
        return name, _upright(image) if apply_exif_orientation else image


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # the pixels may be fine without readable EXIF data
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image
