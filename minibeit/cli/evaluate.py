"""`minibeit evaluate`: how good a model is on labelled images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import check_finite, check_outputs
from .loading import add_model_arguments, config_of, load_model, load_processor, load_tokenizer, made_for
from .reports import (
    add_report_arguments,
    check_reports,
    print_classes,
    print_figures,
    print_notes,
    reports,
    write_reports,
)
from .terminal import StatusLine, UsageError, note, positive
from .views import add_view_arguments, config_changes, inference_of, processor_of, view_options

if TYPE_CHECKING:
    import numpy as np

    from ..config import BeitConfig
    from ..evaluate.evaluation import Evaluation

HELP = "measure a model on labelled images"
DESCRIPTION = """\
Measures a classifier (top-1, top-5, loss, every class), a segmentation model (mean IoU, mean and pixel accuracy, every
class) or a model of masked image modelling (loss, token accuracy), each figure with its 95% interval.

DATA for a classifier is a folder with a folder of images for each class (within val/ if there is one), a .csv or .jsonl
list as `minibeit finetune` reads it, or ImageNet's folder of validation images with the devkit beside it.  DATA for
segmentation has images/ and annotations/ as ADE20K does, or is a folder of images whose label maps are in --maps.  For
masked image modelling it is any folder or list of images, and --tokenizer says which tokens are to be predicted.
Of data with a split, the held-out images are measured; of other data all, and a note says so.
An image that cannot be used is named on stderr and left out, the exit code is 1.
"""
EXAMPLES = """\
  minibeit evaluate flowers/val --model flowers-beit --html report.html
  minibeit evaluate imagenet/ --model microsoft/beit-base-patch16-224 --crop-fraction 0.875
  minibeit evaluate ADEChallengeData2016/ --model DIR --slide --reduce-labels
  minibeit evaluate val/images/ --maps val/masks/ --model DIR --json numbers.json
  minibeit evaluate photos/val --model microsoft/beit-base-patch16-224-pt22k --tokenizer dall-e/
"""
CLASSIFICATION, SEGMENTATION, MASKED = "image_classification", "semantic_segmentation", "masked_image_modeling"
OWN = {
    CLASSIFICATION: ("crop_fraction", "labels"),
    SEGMENTATION: ("maps", "reduce_labels", "colours"),
    MASKED: ("tokenizer",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="labelled images, see above")
    add_model_arguments(parser, "a checkpoint of classification or semantic segmentation")
    parser.add_argument(
        "-b", "--batch-size", type=positive, metavar="B",
        help="images computed at a time (default 8), of segmentation windows (default 1)",
    )  # fmt: skip
    add_report_arguments(parser)
    group = parser.add_argument_group("classification")
    group.add_argument(
        "--crop-fraction",
        type=_fraction,
        metavar="F",
        help="resize the shorter side to S / F and take the central S x S pixels, S being the model's size, bicubic: "
        "0.875 below 384 pixels and 1 from there as BEiT's authors, 0.9 as timm (default: as the image processor says)",
    )
    group.add_argument("--labels", metavar="FILE", help="true classes of ImageNet's validation images, if not found")
    group = parser.add_argument_group("masked image modelling")
    group.add_argument(
        "-t", "--tokenizer", metavar="DIR|FILE", help="what makes the visual tokens, such as DALL-E's dVAE"
    )
    group = parser.add_argument_group("segmentation")
    group.add_argument("--maps", metavar="DIR", help="the label maps of the images in DATA, by the same names")
    group.add_argument(
        "--colours", metavar="FILE",
        help="maps show classes as colours: R G B and a name in each line, the name 'ignored' for no class",
    )  # fmt: skip
    group.add_argument(
        "--reduce-labels",
        action=argparse.BooleanOptionalAction,
        help="in label maps 0 means nothing and every other k the class k - 1, as in ADE20K (default: as the image "
        "processor says)",
    )
    add_view_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not args.model:
        raise UsageError("evaluate needs a checkpoint; give it with --model")
    data = Path(args.data)
    _check_files(args)
    task = task_of(args.model)
    _check_options(args, task)
    with StatusLine(args.quiet) as line:
        evaluation = MEASURED[task](args, data, line)
    for sentence in evaluation.left_out:
        note(f"left out: {sentence}")
    if not evaluation.images:
        raise ValueError(f"{data}: none of the images can be used")
    write_reports(args, evaluation)
    print_figures(evaluation)
    print_classes(evaluation.classes, evaluation.unit)
    if not args.quiet:
        print_notes(evaluation)
    return 1 if evaluation.left_out else 0


def task_of(model: str) -> str:
    """What a checkpoint is to be measured at.  Raises CheckpointError for one without such a head."""
    from ..errors import CheckpointError
    from ..task_table import in_words

    task = made_for(model)
    if task is None or task not in MEASURED:
        made = f"was made for {in_words(task)}" if task else "has no head that is known"
        raise CheckpointError(
            f"{model}: evaluate measures {', '.join(map(in_words, MEASURED))}, but this checkpoint {made}"
        )
    return task


def _check_files(args: argparse.Namespace) -> None:
    """Raises UsageError for reports that would take the place of each other, of an image, or of what is read."""
    inputs = [file for file in (args.data, args.labels, args.colours) if file]
    check_reports(args, inputs, [args.model, args.tokenizer])


def _check_options(args: argparse.Namespace, task: str) -> None:
    others = [name for other, names in OWN.items() if other != task for name in names]
    given = {name: getattr(args, name) for name in others}
    strange = [
        f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        for name, value in given.items()
        if value is not None
    ]
    if task != SEGMENTATION:
        strange += [option for option in view_options(args) if task != MASKED or option != "--imagenet-mean"]
    if strange:
        from ..task_table import in_words

        raise UsageError(f"{strange[0]}: the checkpoint was made for {in_words(task)}, which has no such option")


# Tasks ----------------------------------------------------------------------------------------------------------------


def _classification(args: argparse.Namespace, data: Path, line: StatusLine) -> Evaluation:
    from ..evaluate.classification import evaluate_classification, pixels_of
    from ..evaluate.imagenet import found_truth
    from ..evaluate.labelled import labelled_images
    from ..tasks.image_classification import BeitForImageClassification

    config = config_of(args.model, fetched=True)  # by `task_of`
    if args.crop_fraction is not None and config.image_shape[0] != config.image_shape[1]:
        height, width = config.image_shape
        raise UsageError(f"--crop-fraction: takes squares, but the model's images are {height} x {width} pixels")
    labelled = labelled_images(data, config, None if args.labels is None else Path(args.labels))
    truth = found_truth(data) if data.is_dir() else None
    check_outputs(reports(args), [*(image.path for image in labelled.images), *([str(truth)] if truth else [])])
    model = load_model(BeitForImageClassification, args, fetched=True)
    processor = load_processor(args.model, model.config, args.quiet)
    read = pixels_of(processor, args.crop_fraction, min(model.config.image_shape))
    return evaluate_classification(
        _logits(model),
        labelled,
        read,
        batch_size=args.batch_size or 8,
        **_facts(args, line, len(labelled.images), _preparation(processor) | _cropped(args, model.config.image_shape)),
    )


def _segmentation(args: argparse.Namespace, data: Path, line: StatusLine) -> Evaluation:
    import dataclasses

    import numpy as np

    from ..evaluate.maps import paired
    from ..evaluate.segmentation import evaluate_segmentation
    from ..evaluate.split import without_split
    from ..sliding import SQUASH, segment
    from ..tasks.semantic_segmentation import BeitForSemanticSegmentation
    from .segment import palette

    pairs = paired(data, None if args.maps is None else Path(args.maps))
    check_outputs(reports(args), [file for pair in pairs for file in (pair.path, pair.map)])
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
    return evaluate_segmentation(
        lambda image, shape: segment(_logits(model), processor, image, shape, how),
        pairs,
        [config.id2label[i] for i in range(config.num_labels)],
        np.array(palette("auto", config.num_labels)),
        read_map=read_map,
        upright=processor.apply_exif_orientation,
        seed=args.seed,
        notes=without_split(data, pairs),
        **_facts(args, line, len(pairs), settings),
    )


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


def _masked_modeling(args: argparse.Namespace, data: Path, line: StatusLine) -> Evaluation:
    from ..evaluate.masked_modeling import evaluate_masked_modeling, unlabelled_images
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

    return evaluate_masked_modeling(
        network,
        model.config,
        processor,
        tokenizer,
        paths,
        batch_size=args.batch_size or 8,
        seed=args.seed,
        notes=without_split(data, images),
        **_facts(args, line, len(paths), {"tokenizer": args.tokenizer} | seen),
    )


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


def _facts(args: argparse.Namespace, line: StatusLine, count: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What every task is given."""
    from .. import __version__

    return dict(
        model=args.model,
        data=args.data,
        settings={**settings, "dtype": args.dtype, "minibeit": __version__},
        workers=args.workers,
        worst=args.worst,
        draw=args.html is not None,
        tell=lambda done: line.show(f"{done} of {count} images"),
    )


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0.1 to 1, found {text!r}")
    return value
