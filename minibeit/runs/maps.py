"""The class of every pixel of many images, drawn into files as `minibeit segment` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import shown_name
from .found import Found
from .marks import as_text
from .results import check_finite, unusable

if TYPE_CHECKING:
    import numpy as np

    from ..colours import Colour
    from ..sliding import Inference

AHEAD = 2  # images that are read before they are computed


def segmented(
    work: Iterable[tuple[Found, dict[str, Path]]],
    model: Any,
    processor: Any,
    how: Inference,
    colours: list[Colour],
    mark: str,
    workers: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Writes the results of each image to its files; yields what they show, or why there are none.

    Images are read ahead by `workers` threads.
    """
    from ..images.ahead import read_ahead

    read = read_ahead(work, lambda one: (*one, _read(one[0], processor)), workers, most=AHEAD)
    for entry, paths, picture in read:
        try:
            if isinstance(picture, ValueError):
                raise picture
            yield _segment(entry, picture, paths, model, processor, how, colours, mark)
        except ValueError as error:
            result = unusable(entry.file, entry.named(str(error)))
            yield {"file": result.file, "error": result.error}


def _read(entry: Found, processor: Any) -> Any:
    """The image of a file, or the ValueError that says why there is none."""
    from ..images.opening import read_picture

    try:
        if entry.error is not None:
            raise ValueError(entry.error)
        return read_picture(entry.source, processor.apply_exif_orientation)
    except ValueError as error:
        return error


def _segment(
    entry: Found,
    picture: Any,
    paths: dict[str, Path],
    model: Any,
    processor: Any,
    how: Inference,
    colours: list[Colour],
    mark: str,
) -> dict[str, Any]:
    from .. import drawing
    from ..images.loading import load_image
    from ..sliding import largest_logit, largest_mean_probability, views_of

    size = picture.height, picture.width
    views = views_of(lambda pixels: check_finite(model(pixels).logits), processor, picture, size, how)
    if how.views == 1:
        logits = next(views).logits
        labels = largest_logit(logits, size)
    else:
        labels = largest_mean_probability(views, size)
    classes = _shares(labels, model.config.id2label, colours)
    drawing.save_png(drawing.indexed(labels, colours), paths["labels"], pnginfo=as_text(mark))
    key = [(colours[c["index"]], shown_name(c["label"]), drawing.share_text(c["share"])) for c in classes]
    drawing.save_png(drawing.legend(key), paths["legend"])
    if "overlay" in paths or "figure" in paths:
        overlay = drawing.overlay(load_image(picture, entry.file, channels=3), labels, colours)
        if "overlay" in paths:
            drawing.save_png(overlay, paths["overlay"])
        if "figure" in paths:
            drawing.save_png(drawing.with_legend(overlay, key), paths["figure"])
    if "scores" in paths:
        from ..checkpoint.formats.npz_file import write_npz

        write_npz(paths["scores"], {"logits": logits})
    return {
        "file": entry.file,
        "height": size[0],
        "width": size[1],
        **{kind: str(path) for kind, path in paths.items()},
        "classes": classes,
    }


def _shares(labels: np.ndarray, names: dict[int, str], colours: list[Colour]) -> list[dict[str, Any]]:
    """The classes that occur, the largest first."""
    import numpy as np

    counts = np.bincount(labels.ravel(), minlength=len(names))
    return [
        {
            "index": int(i),
            "label": names[int(i)],
            "pixels": int(counts[i]),
            "share": float(counts[i] / labels.size),
            "color": list(colours[i]),
        }
        for i in np.argsort(-counts, kind="stable")
        if counts[i]
    ]
