"""What `minibeit evaluate` measures: for each task its images, its model, and the evaluation, here or on Dask."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..places import FETCHERS, is_address, place
from ..runs.results import SHARD_READERS, check_finite
from .cluster import measured_on_dask, named_place
from .inputs import check_outputs
from .loading import config_of, load_model, load_processor, load_tokenizer
from .reports import reports
from .terminal import StatusLine, UsageError
from .views import config_changes, inference_of, processor_of

if TYPE_CHECKING:
    import numpy as np

    from ..config import BeitConfig
    from ..evaluate.evaluation import Evaluation

CLASSIFICATION, SEGMENTATION, MASKED = "image_classification", "semantic_segmentation", "masked_image_modeling"


def _classification(args: argparse.Namespace, data: Path, line: StatusLine) -> Evaluation:
    from ..evaluate.classification import classification_of, evaluate_classification, judged_images, pixels_of
    from ..evaluate.imagenet import found_truth
    from ..evaluate.labelled import labelled_images
    from ..tasks.image_classification import BeitForImageClassification

    config = config_of(args.model, fetched=True)  # by `task_of`
    if args.crop_fraction is not None and config.image_shape[0] != config.image_shape[1]:
        height, width = config.image_shape
        raise UsageError(f"--crop-fraction: takes squares, but the model's images are {height} x {width} pixels")
    labelled = labelled_images(data, config, None if args.labels is None else place(args.labels))
    paths = [image.path for image in labelled.images]
    truth = found_truth(data) if data.is_dir() and not is_address(args.data) else None
    check_outputs(reports(args), [*paths, *([str(truth)] if truth else [])])
    model = load_model(BeitForImageClassification, args, fetched=True)
    processor = load_processor(args.model, model.config, args.quiet)
    read = pixels_of(processor, args.crop_fraction, min(model.config.image_shape))
    compute, outputs, batch_size = _logits(model), labelled.outputs, args.batch_size or 8
    facts = _facts(args, _preparation(processor) | _cropped(args, model.config.image_shape))
    if args.dask is None:
        return evaluate_classification(
            compute, labelled, read, batch_size=batch_size, **_reading(args, line, len(paths), paths), **facts
        )
    from ..cluster.evaluation import JUDGED

    readers = _readers(paths, SHARD_READERS)
    measured, seconds = measured_on_dask(
        args,
        lambda images: judged_images(compute, images, outputs, read, batch_size=batch_size, workers=readers),
        JUDGED,
        model,
        {**facts["settings"], "processor": processor.to_dict()},
        labelled.images,
    )
    return classification_of(measured, labelled, seconds=seconds, **facts)


def _segmentation(args: argparse.Namespace, data: Path, line: StatusLine) -> Evaluation:
    import dataclasses

    import numpy as np

    from ..evaluate.maps import paired
    from ..evaluate.segmentation import Gallery, evaluate_segmentation, segmentation_of, segmented_images
    from ..evaluate.split import without_split
    from ..sliding import SQUASH, segment
    from ..tasks.semantic_segmentation import BeitForSemanticSegmentation
    from .segment import palette

    pairs = paired(data, None if args.maps is None else named_place(args, args.maps))
    paths = [file for pair in pairs for file in (pair.path, pair.map)]
    check_outputs(reports(args), paths)
    model = load_model(BeitForSemanticSegmentation, args, fetched=True, **config_changes(args))
    config = model.config
    how = inference_of(args, config)
    processor = processor_of(args, load_processor(args.model, config, args.quiet))
    read_map = _map_reader(args, processor, config)
    settings = {
        **({"mode": how.mode, "flip": how.flip} if how.mode == SQUASH else dataclasses.asdict(how)),
        "reduce_labels": read_map.reduce,
        "feature_convention": config.feature_convention,
        **_preparation(processor),
    }
    if how.mode != SQUASH:
        settings.update(size={"shortest_edge": how.short_side}, filter="bilinear")
    compute = _logits(model)
    names = [config.id2label[i] for i in range(config.num_labels)]
    colours = np.array(palette("auto", config.num_labels))

    def predict(image: Any, shape: tuple[int, int]) -> np.ndarray:
        return segment(compute, processor, image, shape, how)

    reading = dict(read_map=read_map, upright=processor.apply_exif_orientation)
    facts = dict(seed=args.seed, notes=without_split(data, pairs), **_facts(args, settings))
    if args.dask is None:
        return evaluate_segmentation(
            predict, pairs, names, colours, **reading, **_reading(args, line, len(pairs), paths), **facts
        )
    from ..cluster.evaluation import SEGMENTED

    classes, readers = len(names), _readers(paths, SHARD_READERS)
    measured, seconds = measured_on_dask(
        args,
        lambda some: segmented_images(predict, some, classes, **reading, workers=readers),
        SEGMENTED,
        model,
        {**facts["settings"], "processor": processor.to_dict(), **_of_maps(read_map)},
        pairs,
    )
    gallery = Gallery(names, colours, facts.pop("worst"), draw=False)
    for found in measured.records:
        gallery.see(found)
    if facts.pop("draw"):  # those few once more, in this process
        chosen = {one.path for one in gallery.worst}
        gallery = Gallery(names, colours, gallery.most, draw=True)
        segmented_images(predict, [pair for pair in pairs if pair.path in chosen], classes, **reading, seen=gallery.see)
    return segmentation_of(measured, names, colours, gallery.worst, seconds=seconds, **facts)


def _map_reader(args: argparse.Namespace, processor: Any, config: BeitConfig) -> Any:
    """How label maps are read; a table of colours is brought into the order of the model's classes."""
    import dataclasses

    import numpy as np

    from ..train.label_maps import MapReader, read_colours

    if args.colours is None:
        reduce = processor.do_reduce_labels if args.reduce_labels is None else args.reduce_labels
        return MapReader(reduce=reduce)
    if args.reduce_labels:
        raise UsageError("--reduce-labels is for maps of numbers; in --colours what is no class is called 'ignored'")
    table, numbers = read_colours(args.colours), {name: i for i, name in config.id2label.items()}
    strays = [name for name in table.names if name not in numbers]
    if strays:
        raise UsageError(f"--colours {args.colours}: expected the model's classes, found {strays[0]!r} among them")
    order = np.arange(256, dtype=np.uint8)  # 255, what is ignored, stays itself
    order[: len(table.names)] = [numbers[name] for name in table.names]
    return MapReader(dataclasses.replace(table, classes=order[table.classes]))


def _of_maps(read_map: Any) -> dict[str, Any]:
    """What segmentation on Dask depends on and its settings do not say, and on what it does not depend."""
    colours = read_map.colours
    table = None if colours is None else [colours.keys.tolist(), colours.classes.tolist()]
    return {"colours": table, "batch_size": None}


def _masked_modeling(args: argparse.Namespace, data: Path, line: StatusLine) -> Evaluation:
    from ..evaluate.masked_modeling import (
        evaluate_masked_modeling,
        masked_modeling_of,
        predicted_images,
        unlabelled_images,
    )
    from ..evaluate.split import without_split
    from ..tasks.masked_image_modeling import BeitForMaskedImageModeling

    if not args.tokenizer:
        raise UsageError("this checkpoint predicts visual tokens; say with --tokenizer what makes them")
    images = unlabelled_images(data)
    paths = [image.path for image in images]
    check_outputs(reports(args), paths)
    tokenizer = load_tokenizer(args, beside_model=True)
    model = load_model(BeitForMaskedImageModeling, args, fetched=True)
    processor = processor_of(args, load_processor(args.model, model.config, args.quiet))
    height, width = model.config.image_shape  # to which images are resized, whatever the processor says
    seen = _preparation(processor) | {"size": {"height": height, "width": width}, "filter": "bicubic"}
    seen.pop("crop_size", None)

    def network(pixels: np.ndarray, **inputs: Any) -> Any:
        output = model(pixels, **inputs)
        check_finite(output.logits)
        return output

    config, batch_size = model.config, args.batch_size or 8
    facts = dict(
        seed=args.seed, notes=without_split(data, images), **_facts(args, {"tokenizer": args.tokenizer} | seen)
    )
    if args.dask is None:
        reading = _reading(args, line, len(paths), paths)
        return evaluate_masked_modeling(
            network, config, processor, tokenizer, paths, batch_size=batch_size, **reading, **facts
        )
    from ..cluster.evaluation import PREDICTED
    from ..cluster.works import fingerprint

    readers = _readers(paths, SHARD_READERS)
    measured, seconds = measured_on_dask(
        args,
        lambda some: predicted_images(
            network, config, processor, tokenizer, some, batch_size=batch_size, workers=readers
        ),
        PREDICTED,
        model,
        {**facts["settings"], "processor": processor.to_dict(), "tokenizer": fingerprint(tokenizer)},
        paths,
    )
    return masked_modeling_of(measured, config, seconds=seconds, **facts)


MEASURED: dict[str, Callable[[argparse.Namespace, Path, StatusLine], Evaluation]] = {
    CLASSIFICATION: _classification,
    SEGMENTATION: _segmentation,
    MASKED: _masked_modeling,
}


def _logits(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: check_finite(model(pixels).logits)


def _preparation(processor: Any) -> dict[str, Any]:
    """What the image processor does, in short."""
    from PIL.Image import Resampling

    names = ("size", *(["crop_size"] if processor.do_center_crop else []), "image_mean", "image_std")
    return {name: getattr(processor, name) for name in names} | {"filter": Resampling(processor.resample).name.lower()}


def _cropped(args: argparse.Namespace, shape: tuple[int, int]) -> dict[str, Any]:
    """What --crop-fraction puts in its place."""
    if args.crop_fraction is None:
        return {}
    size = {"shortest_edge": int(min(shape) / args.crop_fraction)}
    return {"crop_fraction": args.crop_fraction, "size": size, "crop_size": min(shape), "filter": "bicubic"}


def _facts(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What every task is given."""
    from .. import __version__

    return dict(
        model=args.model,
        data=args.data,
        settings={**settings, "dtype": args.dtype, "minibeit": __version__},
        worst=args.worst,
        draw=args.html is not None,
    )


def _reading(args: argparse.Namespace, line: StatusLine, count: int, paths: Sequence[str]) -> dict[str, Any]:
    """What every task is given that reads `count` images from `paths` in this process."""
    from ..images.ahead import default_workers

    workers = args.workers or _readers(paths, default_workers())
    return dict(workers=workers, tell=lambda done: line.show(f"{done} of {count} images"))


def _readers(paths: Sequence[str], usual: int) -> int:
    """The threads that read images, more where they mostly wait for what they fetch."""
    return FETCHERS if any(map(is_address, paths)) else usual
