"""One call from images to results: `pipeline(task, model)(images)`, with the tasks and results of transformers."""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from .checkpoint.heads import check_head
from .checkpoint.load import open_checkpoint
from .checkpoint.packed_file import prepared_file, read_prepared
from .colours import class_colours
from .config import BeitConfig
from .drawing import class_map, png
from .errors import nearest, unknown_keywords
from .image_processor import BeitImageProcessor, default_processor
from .images.ahead import computed
from .images.loading import decoded, load_image
from .images.opening import is_picture
from .loading_options import LOADING, WHERE, Loading
from .masking import block_mask
from .scores import scores
from .sliding import largest_logit
from .tasks import task_class

SHOWN = 640  # pixels of the longer side of an image in Jupyter
ON_CPU = (None, -1, "cpu")
PROBLEMS = {"softmax": "single_label_classification", "sigmoid": "multi_label_classification", "none": "regression"}


class Pipeline:
    """A model, its image processor, and what becomes of the outputs; made by `pipeline`.

    An image is whatever the processor takes: a path, a file:// URL, bytes, a file object, a PIL image, an array.
    Attributes: `task`, `model`, `image_processor`, `batch_size`, `num_workers`, and `options`, defaults of a call.
    """

    task: ClassVar[str]
    model_task: ClassVar[str]
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    keeps_photo = False

    def __init__(
        self,
        model: Any,
        image_processor: BeitImageProcessor,
        batch_size: int = 1,
        num_workers: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.image_processor = model, image_processor
        self.batch_size, self.num_workers = _positive("batch_size", batch_size), num_workers
        self._check(options)
        self.options = options

    def __call__(
        self, inputs: Any = None, *, batch_size: int | None = None, num_workers: int | None = None, **options: Any
    ) -> Any:
        """The result for one image; a list of results for a list of images or an array of one axis more.

        For a generator, or anything else that can be iterated over, an iterator that computes as it is asked.  Images
        are read ahead by `num_workers` threads and computed `batch_size` at a time.  `options` are those of the task;
        the images may also be called `images=`.  Raises ImageError, naming the image, in the place of its result.
        """
        images = options.pop("images", inputs)
        self._check(options)
        chosen = {**self.options, **options}
        size = _positive("batch_size", self.batch_size if batch_size is None else batch_size)
        workers = self.num_workers if num_workers is None else num_workers
        if _is_one(images):
            return next(self._results([images], chosen, 1, 1))
        if isinstance(images, Mapping) or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
            raise TypeError(f"{self.task}: expected an image or several, found {type(images).__name__}")
        several = isinstance(images, (list, tuple)) or hasattr(images, "ndim")
        results = self._results(images, chosen, size, None if workers is None else max(workers, 1))
        return list(results) if several else results

    def _results(self, images: Iterable[Any], options: dict[str, Any], size: int, workers: int | None) -> Iterator[Any]:
        read = _Read(self.image_processor, self.keeps_photo)
        named = ((f"images[{i}]", image) for i, image in enumerate(images))
        for one in computed(map(_Item, named), read, lambda pixels: self.outputs(pixels, **options), size, workers):
            if isinstance(one[1], ValueError):
                raise one[1]
            yield self.result(one[1], one[0], **options)

    def outputs(self, pixel_values: np.ndarray, **options: Any) -> Iterable[Any]:  # (B, C, H, W) -> B of them
        """What the model computes for each image of a batch."""
        raise NotImplementedError

    def result(self, output: Any, item: _Item, **options: Any) -> Any:
        """What the caller gets for an image."""
        raise NotImplementedError

    def _check(self, options: dict[str, Any]) -> None:
        unknown = [name for name in options if name not in self.OPTIONS]
        if unknown:
            raise unknown_keywords(self.task, unknown, (*self.OPTIONS, "batch_size", "num_workers"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"


class Classes(list[dict[str, Any]]):
    """The labels and scores of one image, which Jupyter shows as a table."""

    def _repr_html_(self) -> str:
        rows = (f"<tr><td>{html.escape(one['label'])}</td><td>{one['score']:.4g}</td></tr>" for one in self)
        return f"<table><tr><th>label</th><th>score</th></tr>{''.join(rows)}</table>"


class Segments(list[dict[str, Any]]):
    """The masks of one image, which Jupyter shows over the image, with a legend."""

    def __init__(self, segments: Iterable[dict[str, Any]], numbers: list[int], classes: int, photo: Any) -> None:
        super().__init__(segments)
        self.numbers, self.classes, self.photo = numbers, classes, photo

    def __reduce__(self) -> tuple[Any, ...]:
        return Segments, (list(self), self.numbers, self.classes, self.photo)

    def _repr_png_(self) -> bytes:
        size = self.photo.size if self.photo else _fitted(self[0]["mask"].size)
        labels = np.zeros(size[::-1], np.int64)
        for number, one in zip(self.numbers, self):
            labels[np.asarray(one["mask"].resize(size, Image.Resampling.NEAREST)) > 0] = number
        names = {number: one["label"] for number, one in zip(self.numbers, self)}
        photo = None if self.photo is None else np.asarray(self.photo)
        return png(class_map(labels, names, class_colours(self.classes), photo))


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
        self, output: Any, item: _Item, top_k: int | None = 5, function_to_apply: str | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        """The `top_k` labels with the highest scores."""
        config = self.model.config
        values = scores_of(output, function_to_apply or _function_of(config))
        best = np.argsort(-values, kind="stable")[: 5 if top_k is None else top_k]
        return Classes({"label": config.id2label[i], "score": float(values[i])} for i in best.tolist())


class ImageSegmentationPipeline(Pipeline):
    """[{"score": None, "label": "wall", "mask": a PIL image of 0 and 255}, ...] for an image, by class number.

    Masks have the size of the image.  Options: `subtask`, which is "semantic", and the thresholds that transformers
    takes, which make no difference to a semantic segmentation there either.
    """

    task, model_task = "image-segmentation", "semantic_segmentation"
    keeps_photo = True
    OPTIONS = ("subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold")

    def outputs(self, pixel_values: np.ndarray, subtask: str | None = "semantic", **_: Any) -> Any:  # -> (B, K, h, w)
        """The logits."""
        if subtask not in (None, "semantic"):
            raise ValueError(f"subtask: this model finds the class of every pixel, 'semantic', found {subtask!r}")
        return self.model(pixel_values).logits

    def result(self, output: Any, item: _Item, **_: Any) -> list[dict[str, Any]]:
        """The classes that occur."""
        labels, names = largest_logit(output, item.shape), self.model.config.id2label
        numbers = np.unique(labels).tolist()
        masks = (Image.fromarray((labels == i).astype(np.uint8) * np.uint8(255)) for i in numbers)
        found = ({"score": None, "label": names[i], "mask": mask} for i, mask in zip(numbers, masks))
        return Segments(found, numbers, len(names), item.photo)


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

    def result(self, output: Any, item: _Item, return_tensors: Any = False, **_: Any) -> Any:
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

    def result(self, output: Any, item: _Item, top_k: int | None = 5, **_: Any) -> list[list[dict[str, Any]]]:
        """The `top_k` tokens of each hidden patch, row by row."""
        mask, logits = output
        found = []
        for row, column in np.argwhere(mask).tolist():
            shares = scores_of(logits[row * mask.shape[1] + column], "softmax")
            best = np.argsort(-shares, kind="stable")[: 5 if top_k is None else top_k].tolist()
            found.append([{"score": float(shares[i]), "token": i, "row": row, "column": column} for i in best])
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
        loaded, source = _loaded(kind, model, {**where, **options}), model
    if not isinstance(image_processor, BeitImageProcessor):
        words = {name: value for name, value in options.items() if name in WHERE}
        image_processor = _processor(image_processor or source, loaded.config, words, image_processor is None)
    return kind(loaded, image_processor, batch_size, num_workers, **defaults)


def scores_of(logits: np.ndarray, function: str) -> np.ndarray:  # (K,) -> (K,) float64
    """Logits as they are ("none"), or their "softmax" or "sigmoid"."""
    if function not in PROBLEMS:
        raise ValueError(f"function_to_apply: expected one of {', '.join(map(repr, PROBLEMS))}, found {function!r}")
    return scores(logits, PROBLEMS[function])


def _function_of(config: BeitConfig) -> str:
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


class _Item:
    """An image on its way: how messages name it, and, once it was read, its height and width."""

    def __init__(self, named: tuple[str, Any]) -> None:
        self.name, self.image = named
        self.shape = (0, 0)
        self.photo: Image.Image | None = None  # small, for Jupyter


class _Read:
    """Pixel values (C, H, W) of an item, whose shape it notes and whose image it lets go."""

    def __init__(self, processor: BeitImageProcessor, keeps_photo: bool = False) -> None:
        self.processor, self.keeps_photo = processor, keeps_photo

    def __call__(self, item: _Item) -> np.ndarray:
        name, image = decoded(item.image, item.name, self.processor.apply_exif_orientation)
        item.image, words = None, {}
        if not isinstance(image, Image.Image):
            image, words = load_image(image, name, channels=None), {"input_data_format": "channels_last"}
        item.shape = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
        if self.keeps_photo and isinstance(image, Image.Image):
            item.photo = image.convert("RGB").resize(_fitted(image.size), Image.Resampling.BOX)
        return self.processor(image, **words).pixel_values[0]


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    """A size with a longer side of at most SHOWN pixels."""
    factor = min(1.0, SHOWN / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _is_one(images: Any) -> bool:
    """Whether it is one image rather than several; an array of four axes is a batch."""
    return is_picture(images) or (hasattr(images, "ndim") and images.ndim < 4)


def _is_path(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike))


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive whole number, found {value!r}")
    return value


def _loaded(kind: type[Pipeline], model: Any, words: dict[str, Any]) -> Any:
    """The model of a checkpoint, which must have the task's head."""
    if kind.model_task != "model":
        check_head(model, kind.model_task, _how(words))
    with warnings.catch_warnings():
        if kind.model_task == "model":
            warnings.filterwarnings("ignore", "(?s).*another task's head are not used")  # features need none
        return task_class(kind.model_task).from_pretrained(model, **words)


def _how(words: dict[str, Any]) -> Loading:
    return Loading(**{name: value for name, value in words.items() if name in LOADING and value is not None})


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
    return open_checkpoint(model, loading=_how(options)).task


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
