"""`minibeit evaluate`: how good a model is on labelled images."""

from __future__ import annotations

import argparse

from .cluster import add_cluster_arguments, check_cluster_options, named_place
from .loading import add_model_arguments, made_for
from .measuring import CLASSIFICATION, MASKED, MEASURED, SEGMENTATION
from .reports import (
    add_report_arguments,
    check_reports,
    print_classes,
    print_figures,
    print_notes,
    write_reports,
)
from .terminal import StatusLine, UsageError, note, positive
from .views import add_view_arguments, view_options

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
DATA may also be at an address (s3://, gs://, hf://, ...), and lists may name images by address; this needs fsspec.
With --dask the images are measured by the workers of a cluster, which must see DATA under the same path or address.
"""
EXAMPLES = """\
  minibeit evaluate flowers/val --model flowers-beit --html report.html
  minibeit evaluate imagenet/ --model microsoft/beit-base-patch16-224 --crop-fraction 0.875
  minibeit evaluate ADEChallengeData2016/ --model DIR --slide --reduce-labels
  minibeit evaluate val/images/ --maps val/masks/ --model DIR --json numbers.json
  minibeit evaluate photos/val --model microsoft/beit-base-patch16-224-pt22k --tokenizer dall-e/
  minibeit evaluate imagenet/ --model DIR --dask local --workers 8 --output judged/
  minibeit evaluate s3://bucket/imagenet/ --model DIR --dask tcp://scheduler:8786 --output s3://bucket/judged
"""
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
    parser.add_argument("-o", "--output", metavar="FOLDER", help="with --dask: folder or address of the results")
    add_cluster_arguments(parser, workers=False)


def run(args: argparse.Namespace) -> int:
    if not args.model:
        raise UsageError("evaluate needs a checkpoint; give it with --model")
    check_cluster_options(args, options=("threads", "shard_size", "output"))
    _check_files(args)
    data = named_place(args, args.data)
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


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0.1 to 1, found {text!r}")
    return value
