"""One call from images to results: `pipeline(task, model)(images)`, with the tasks and results of transformers.

`computed` is what the command line has in common with it: images are read ahead by threads and computed in batches.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from .checkpoint.load import open_checkpoint
from .checkpoint.packed_file import prepared_file, read_prepared
from .config import BeitConfig
from .errors import nearest, unknown_keywords
from .image_processor import BeitImageProcessor, default_processor
from .images.ahead import read_ahead
from .images.loading import decoded, load_image
from .images.opening import is_picture
from .loading_options import LOADING, WHERE, Loading
from .masking import block_mask
from .sliding import largest_logit
from .tasks import task_class

Item = TypeVar("Item")
AHEAD = 2  # batches that are read before they are computed
ON_CPU = (None, -1, "cpu")


def computed(
    items: Iterable[Item],
    read: Callable[[Item], np.ndarray],
    compute: Callable[[np.ndarray], Iterable[Any]],
    batch_size: int = 1,
    workers: int | None = None,
) -> Iterator[tuple[Item, Any]]:
    """(item, its value) for all items in their order; the value is a ValueError where there is none.

    `read` makes an array of an item, in threads ahead of `compute`, which makes a sequence of values of a batch of
    arrays.  Arrays of different shapes do not share a batch.  Only ValueErrors of the two become values.
    """

    def tried(item: Item) -> tuple[Item, Any]:
        try:
            return item, read(item)
        except ValueError as error:
            return item, error

    waiting: list[tuple[Item, Any]] = []
    shape, count = None, 0
    for item, array in read_ahead(items, tried, workers, AHEAD * batch_size):
        good = isinstance(array, np.ndarray)
        if good and count and array.shape != shape:
            yield from _values(waiting, compute)
            waiting, count = [], 0
        waiting.append((item, array))
        if good:
            shape, count = array.shape, count + 1
        if count in (0, batch_size):
            yield from _values(waiting, compute)
            waiting, count = [], 0
    yield from _values(waiting, compute)


def _values(waiting: list[tuple[Item, Any]], compute: Callable[[np.ndarray], Any]) -> Iterator[tuple[Item, Any]]:
    arrays = [array for _, array in waiting if isinstance(array, np.ndarray)]
    refused: ValueError | None = None
    values: Iterator[Any] = iter(())
    try:
        values = iter(compute(np.stack(arrays)) if arrays else ())
    except ValueError as error:
        refused = error
    for item, array in waiting:
        yield item, (refused or next(values)) if isinstance(array, np.ndarray) else array


class Pipeline:
    """A model, its image processor, and what becomes of the outputs; made by `pipeline`.

    An image is whatever the processor takes: a path, a file:// URL, bytes, a file object, a PIL image, an array.
    Attributes: `task`, `model`, `image_processor`, `batch_size`, `num_workers`, and `options`, defaults of a call.
    """

    task: ClassVar[str]
    model_task: ClassVar[str]
    OPTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: Any,
        image_processor: BeitImageProcessor,
        batch_size: int = 1,
        num_workers: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.image_processor = model, image_processor
        self.batch_size, self.num_workers = batch_size, num_workers
        self._check(options)
        self.options = options

    def __call__(
        self, images: Any, *, batch_size: int | None = None, num_workers: int | None = None, **options: Any
    ) -> Any:
        """The result for one image; a list of results for a list of images or an array of one axis more.

        For a generator, or anything else that can be iterated over, an iterator that computes as it is asked.  Images
        are read ahead by `num_workers` threads and computed `batch_size` at a time.  `options` are those of the task.
        Raises ImageError, naming the image, in the place of its result.
        """
        self._check(options)
        chosen = {**self.options, **options}
        size, workers = batch_size or self.batch_size, self.num_workers if num_workers is None else num_workers
        if _is_one(images):
            return next(self._results([images], chosen, 1, 1))
        several = isinstance(images, (list, tuple)) or hasattr(images, "ndim")
        results = self._results(images, chosen, size, None if workers is None else max(workers, 1))
        return list(results) if several else results

    def _results(self, images: Iterable[Any], options: dict[str, Any], size: int, workers: int | None) -> Iterator[Any]:
        read = _Read(self.image_processor)
        named = ((f"images[{i}]", image) for i, image in enumerate(images))
        for one in computed(map(_Item, named), read, lambda pixels: self.outputs(pixels, **options), size, workers):
            if isinstance(one[1], ValueError):
                raise one[1]
            yield self.result(one[1], one[0].shape, **options)

    def outputs(self, pixel_values: np.ndarray, **options: Any) -> Iterable[Any]:  # (B, C, H, W) -> B of them
        """What the model computes for each image of a batch."""
        raise NotImplementedError

    def result(self, output: Any, shape: tuple[int, int], **options: Any) -> Any:
        """What the caller gets for an image of `shape` (H, W)."""
        raise NotImplementedError

    def _check(self, options: dict[str, Any]) -> None:
        unknown = [name for name in options if name not in self.OPTIONS]
        if unknown:
            raise unknown_keywords(self.task, unknown, (*self.OPTIONS, "batch_size", "num_workers"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"


class ImageClassificationPipeline(Pipeline):
    """[{"label": "cat", "score": 0.9}, ...] for an image, the largest score first.

    Options: `top_k` (5) and `function_to_apply`, "softmax", "sigmoid" or "none", by default what the
    config's `problem_type` asks for, and for a single output the sigmoid, as in transformers.
    """

    task, model_task = "image-classification", "image_classification"
    OPTIONS = ("top_k", "function_to_apply")

    def outputs(self, pixel_values: np.ndarray, **_: Any) -> Any:  # -> (B, K)
        """The logits."""
        return self.model(pixel_values).logits

    def result(
        self, output: Any, shape: tuple[int, int], top_k: int | None = 5, function_to_apply: str | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        """The `top_k` labels with the highest scores."""
        config = self.model.config
        scores = scores_of(output, function_to_apply or _function_of(config))
        best = np.argsort(-scores, kind="stable")[: 5 if top_k is None else top_k]
        return [{"label": config.id2label[i], "score": float(scores[i])} for i in best.tolist()]


class ImageSegmentationPipeline(Pipeline):
    """[{"score": None, "label": "wall", "mask": a PIL image of 0 and 255}, ...] for an image, by class number.

    Masks have the size of the image.  Options: `subtask`, which is "semantic", and the thresholds that transformers
    takes, which make no difference to a semantic segmentation there either.
    """

    task, model_task = "image-segmentation", "semantic_segmentation"
    OPTIONS = ("subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold")

    def outputs(self, pixel_values: np.ndarray, subtask: str | None = "semantic", **_: Any) -> Any:  # -> (B, K, h, w)
        """The logits."""
        if subtask not in (None, "semantic"):
            raise ValueError(f"subtask: this model finds the class of every pixel, 'semantic', found {subtask!r}")
        return self.model(pixel_values).logits

    def result(self, output: Any, shape: tuple[int, int], **_: Any) -> list[dict[str, Any]]:
        """The classes that occur."""
        labels = largest_logit(output, shape)
        return [
            {
                "score": None,
                "label": self.model.config.id2label[int(i)],
                "mask": Image.fromarray((labels == i).astype(np.uint8) * np.uint8(255)),
            }
            for i in np.unique(labels)
        ]


class ImageFeatureExtractionPipeline(Pipeline):
    """Nested lists of floats for an image: (1, N, D), the last hidden state, or (1, D) with `pool=True`.

    Option `return_tensors=True`: the NumPy array itself.
    """

    task, model_task = "image-feature-extraction", "model"
    OPTIONS = ("pool", "return_tensors")

    def outputs(self, pixel_values: np.ndarray, pool: bool | None = False, **_: Any) -> Any:
        """Hidden states (B, N, D) or pooled vectors (B, D)."""
        output = self.model(pixel_values)
        if pool and output.get("pooler_output") is None:
            raise ValueError("pool=True needs a BeitModel with a pooling layer, which this model is not")
        return output.pooler_output if pool else output[0]

    def result(self, output: Any, shape: tuple[int, int], return_tensors: Any = False, **_: Any) -> Any:
        """The arrays of one image, with the axis of the batch."""
        return output[None] if return_tensors else output[None].tolist()


class FillMaskPipeline(Pipeline):
    """For each hidden patch [{"score": 0.5, "token": 17, "row": 0, "column": 3}, ...]: its likeliest visual tokens.

    transformers has this task for text alone.  Options: `top_k` (5); `bool_masked_pos`, (gh, gw) or (P,), which patches
    are hidden, the same for every image; without it blocks that are the share `ratio` (0.4) of the patches, drawn from
    `seed` (0) as in BEiT's pre-training.
    """

    task, model_task = "fill-mask", "masked_image_modeling"
    OPTIONS = ("top_k", "bool_masked_pos", "ratio", "seed")

    def outputs(
        self, pixel_values: np.ndarray, bool_masked_pos: Any = None, ratio: float = 0.4, seed: int = 0, **_: Any
    ) -> Any:
        """(mask (gh, gw), logits (P, V)) of each image."""
        height, width = self.model.config.patch_shape
        grid = pixel_values.shape[2] // height, pixel_values.shape[3] // width
        if bool_masked_pos is None:
            mask = block_mask(grid, round(ratio * grid[0] * grid[1]), np.random.default_rng(seed))
        else:
            mask = np.asarray(bool_masked_pos, bool)
            if mask.size != grid[0] * grid[1]:
                raise ValueError(f"bool_masked_pos: expected a flag for each of {grid} patches, found {mask.shape}")
        masks = np.repeat(mask.reshape(1, -1), len(pixel_values), axis=0)
        logits = self.model(pixel_values, bool_masked_pos=masks).logits
        return ((mask.reshape(grid), one) for one in logits)

    def result(
        self, output: Any, shape: tuple[int, int], top_k: int | None = 5, **_: Any
    ) -> list[list[dict[str, Any]]]:
        """The `top_k` tokens of each hidden patch, row by row."""
        mask, logits = output
        found = []
        for row, column in np.argwhere(mask).tolist():
            scores = scores_of(logits[row * mask.shape[1] + column], "softmax")
            best = np.argsort(-scores, kind="stable")[: 5 if top_k is None else top_k].tolist()
            found.append([{"score": float(scores[i]), "token": i, "row": row, "column": column} for i in best])
        return found


PIPELINES: dict[str, type[Pipeline]] = {
    kind.task: kind
    for kind in (
        ImageClassificationPipeline,
        ImageSegmentationPipeline,
        ImageFeatureExtractionPipeline,
        FillMaskPipeline,
    )
}
TASK_OF = {kind.model_task: task for task, kind in PIPELINES.items()}


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    image_processor: Any = None,
    batch_size: int = 1,
    num_workers: int | None = None,
    device: Any = None,
    **options: Any,
) -> Pipeline:
    """A function from images to results: pipeline("image-classification", "my-folder")("photo.jpg", top_k=3).

    `task` is "image-classification", "image-segmentation", "image-feature-extraction" or "fill-mask", by default that
    of the checkpoint; the class of each says what its results are.  `model` is a folder, a file, an id on the Hub or a
    model; `image_processor` too, by default that of the model.  `device` is the number of a GPU, or "cuda:0"; "cpu" and
    -1 are the default.  `options` are those of the task's calls, as defaults, and keywords of `from_pretrained`.
    Raises ValueError for an unknown task, and what loading raises.
    """
    if model is None:
        raise ValueError("pipeline: expected a checkpoint or a model; give model=")
    kind = _kind(task, model, options)
    defaults = {name: options.pop(name) for name in kind.OPTIONS if name in options}
    if not _is_path(model):
        if options or device not in ON_CPU:
            raise unknown_keywords("pipeline of a model that is loaded", options or ["device"], kind.OPTIONS)
        loaded, source = model, getattr(model, "name_or_path", "")
    else:
        where = {} if device in ON_CPU else {"backend": "cupy", "device": _number(device)}
        loaded, source = task_class(kind.model_task).from_pretrained(model, **where, **options), model
    if not isinstance(image_processor, BeitImageProcessor):
        words = {name: value for name, value in options.items() if name in WHERE}
        image_processor = _processor(image_processor or source, loaded.config, words, image_processor is None)
    return kind(loaded, image_processor, batch_size, num_workers, **defaults)


def scores_of(logits: np.ndarray, function: str) -> np.ndarray:  # (K,) -> (K,) float64
    """Logits as they are ("none"), or their "softmax" or "sigmoid"."""
    x = np.asarray(logits, np.float64)
    if function == "sigmoid":
        return 0.5 * (1 + np.tanh(0.5 * x))  # without overflow
    if function == "softmax":
        x = np.exp(x - x.max())
        return x / x.sum()
    if function != "none":
        raise ValueError(f"function_to_apply: expected 'softmax', 'sigmoid' or 'none', found {function!r}")
    return x


def _function_of(config: BeitConfig) -> str:
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


class _Item:
    """An image on its way: how messages name it, and, once it was read, its height and width."""

    def __init__(self, named: tuple[str, Any]) -> None:
        self.name, self.image = named
        self.shape = (0, 0)


class _Read:
    """Pixel values (C, H, W) of an item, whose shape it notes and whose image it lets go."""

    def __init__(self, processor: BeitImageProcessor) -> None:
        self.processor = processor

    def __call__(self, item: _Item) -> np.ndarray:
        name, image = decoded(item.image, item.name, self.processor.apply_exif_orientation)
        item.image, words = None, {}
        if not isinstance(image, Image.Image):
            image, words = load_image(image, name, channels=None), {"input_data_format": "channels_last"}
        item.shape = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
        return self.processor(image, **words).pixel_values[0]


def _is_one(images: Any) -> bool:
    """Whether it is one image rather than several; an array of four axes is a batch."""
    return is_picture(images) or (hasattr(images, "ndim") and images.ndim < 4)


def _is_path(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike))


def _kind(task: str | None, model: Any, options: dict[str, Any]) -> type[Pipeline]:
    if task is None:
        made_for = _task_of(model, options) if _is_path(model) else type(model).task
        if made_for not in TASK_OF:
            raise ValueError(f"pipeline: this model is for none of {', '.join(PIPELINES)}; name the task")
        return PIPELINES[TASK_OF[made_for]]
    if task not in PIPELINES:
        near = nearest(task, PIPELINES)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"pipeline: expected a task among {', '.join(PIPELINES)}, found {task!r}{hint}")
    kind = PIPELINES[task]
    if not _is_path(model) and type(model).task != kind.model_task and kind.model_task != "model":
        needed = task_class(kind.model_task).__name__
        raise ValueError(f"pipeline: {task} needs a {needed}, found a {type(model).__name__}")
    return kind


def _task_of(model: Any, options: dict[str, Any]) -> str | None:
    file = prepared_file(model)
    if file:
        return read_prepared(file).task
    return open_checkpoint(model, loading=Loading(**{k: v for k, v in options.items() if k in LOADING})).task


def _number(device: Any) -> int:
    text = str(device).removeprefix("cuda").removeprefix(":") or "0"
    if not text.isdecimal():
        raise ValueError(f"device: expected 'cpu', 'cuda', 'cuda:N' or the number of a GPU, found {device!r}")
    return int(text)


def _processor(source: Any, config: BeitConfig, words: dict[str, Any], may_lack: bool) -> BeitImageProcessor:
    """The processor in `source`; with `may_lack` a plain one, with a warning, where there is none."""
    try:
        if source:
            return BeitImageProcessor.from_pretrained(source, **words)
    except FileNotFoundError:
        if not may_lack:
            raise
    warnings.warn(
        f"there are no settings of an image processor: images are resized to {config.image_shape} and normalised with "
        "mean 0.5 and standard deviation 0.5; give image_processor= for others",
        stacklevel=3,
    )
    return default_processor(config)
