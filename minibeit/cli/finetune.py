"""`minibeit finetune`: a classifier or a segmenter of your own images."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import one_line
from .ranks import join
from .terminal import UsageError, out, positive, table
from .training import (
    Say,
    add_output_arguments,
    add_recipe_arguments,
    add_run_arguments,
    check_output,
    computing,
    make_output,
    recipe_of,
    speaker,
    train,
)

if TYPE_CHECKING:
    from ..train.examples import Examples
    from ..train.label_maps import Pairs
    from ..train.recipes import Recipe

HELP = "train a classifier, or a segmenter, on your own images"
DESCRIPTION = """\
Trains a checkpoint to name what is on your images; `minibeit classify` and transformers load the folder it writes.

DATA is a folder with a folder of images for each class (perhaps within train/ and val/), or a .csv or .jsonl file
with path and label, labels (several, separated by ; in CSV), value or values (numbers) and perhaps split in each line.

With --task segmentation it is trained to name every pixel, for `minibeit segment`.  DATA is then a folder with images/
and masks/ (or labels/ or annotations/), in which maps are named as their images are, perhaps each with training/ and
validation/ in it as ADE20K has them, or a .csv or .jsonl file with path, map and perhaps split in each line.  Maps are
gray or palette images whose numbers are the classes, 255 being ignored, or colours, with --colours.

Ctrl-C stops after the step at hand and saves; the same command with --resume goes on, with the same result in the end.
`mpiexec -n 4 minibeit finetune ...` does the same with four processes, on one machine or several (extra mpi).
"""
EXAMPLES = """\
  minibeit finetune flowers/ --model microsoft/beit-base-patch16-224-pt22k --output flowers-beit
  minibeit finetune flowers/ --model DIR --output OUT --epochs 10 --freeze 8   the first 8 blocks stay as they are
  minibeit finetune flowers/ --model DIR --output OUT --resume     go on where it stopped
  minibeit finetune flowers/ --model DIR --output OUT --linear-probe   a linear layer on each block, in minutes
  minibeit finetune digits/ --from-scratch tiny --recipe tiny --output digits-beit
  minibeit finetune streets/ --task segmentation --labels names.txt --model DIR --output streets-beit
  minibeit finetune ADE/ --task segmentation --labels ade20k --reduce-labels --recipe ade-base-640 -m DIR -o OUT
"""
TASKS = {"classification": "image_classification", "segmentation": "semantic_segmentation"}
PUBLISHED = "ade-"  # how the names of recipes begin that have a crop size of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..train.recipes import PRESETS, RECIPES
    from ..train.segmentation_recipes import SEGMENTATION_PRESETS, SEGMENTATION_RECIPES

    parser.add_argument("data", metavar="DATA", help="a folder, or a .csv or .jsonl list")
    parser.add_argument("--task", choices=list(TASKS), default="classification", help="default classification")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("-m", "--model", metavar="DIR|FILE", help="the checkpoint to start from")
    start.add_argument(
        "--from-scratch",
        metavar="CONFIG",
        help=f"random weights instead: a config.json, or a preset ({', '.join({**PRESETS, **SEGMENTATION_PRESETS})})",
    )
    add_output_arguments(parser)
    add_recipe_arguments(parser, {**RECIPES, **SEGMENTATION_RECIPES}, "own")
    parser.add_argument(
        "--held-out", type=float, default=0.1, metavar="F", help="share held out where DATA has no split"
    )
    parser.add_argument("--image-size", type=positive, metavar="S", help="height and width in pixels")
    parser.add_argument(
        "--freeze", action="append", default=[], metavar="WHAT",
        help="what is not learned: encoder, a number of blocks, or a pattern of names; may be repeated",
    )  # fmt: skip
    parser.add_argument("--keep-classes", action="store_true", help="train on with the checkpoint's classes and head")
    parser.add_argument("--linear-probe", action="store_true", help="learn one linear layer on each block's features")
    maps = parser.add_argument_group("segmentation")
    maps.add_argument(
        "--labels", metavar="FILE", help="names of the classes 0, 1, ..., one a line or JSON; or ade20k for its 150"
    )
    maps.add_argument(
        "--reduce-labels", action="store_true", help="0 in a map is ignored, every other k is class k - 1 (ADE20K)"
    )
    maps.add_argument(
        "--colours", metavar="FILE",
        help="maps show classes as colours: R G B and a name in each line, the name 'ignored' for no class",
    )  # fmt: skip
    maps.add_argument(
        "--crop-size", type=positive, metavar="S",
        help="height and width of what the model sees, in pixels (default: the model's, or that of an ade recipe)",
    )  # fmt: skip
    maps.add_argument(
        "--feature-convention", choices=["transformers", "unilm"],
        help="which hidden states a new head reads: transformers' cannot be of the last block, and only minibeit knows "
        "unilm's (default: the checkpoint's)",
    )  # fmt: skip
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..train.examples import read_examples
    from ..train.recipes import RECIPES

    _check_words(args)
    join(args)
    output, say = Path(args.output), speaker(args)
    if args.task == "segmentation":
        return _segmentation(args, output, say)
    recipe = recipe_of(args, RECIPES)
    check_output(args, output)
    names = _own_classes(args, TASKS[args.task]) if args.keep_classes else None
    examples = read_examples(args.data, args.held_out, args.seed, names, args.workers, args.ranks)
    for text in examples.unreadable:
        say(f"left out: {text}")
    say(_summary(examples))
    if args.linear_probe:
        if args.ranks.count > 1:
            raise UsageError("--linear-probe: is computed by one process; start it without mpiexec")
        return _probe(args, examples, output, say)
    return _train(args, examples, recipe, output, say)


def _train(args: argparse.Namespace, examples: Examples, recipe: Recipe, output: Path, say: Say) -> int:
    from ..train.objective import Classification
    from ..train.start import from_checkpoint, from_scratch, frozen_patterns, processor_for

    options: dict[str, Any] = dict(
        drop_path=recipe.drop_path, seed=args.seed, image_size=args.image_size, **computing(args)
    )
    if args.from_scratch is None:
        model = from_checkpoint(args.model, examples, keep_classes=args.keep_classes, **options)
    else:
        model = from_scratch(args.from_scratch, examples, **options)
    objective = Classification(examples, processor_for(model.config, args.model), recipe, model.config.image_shape)
    code = train(args, model, objective, recipe, output, say, frozen_patterns(args.freeze, model.config))
    if code == 0:
        say(f"the model of the best epoch is in {output}; minibeit classify IMAGE --model {output}")
    return code


def _check_words(args: argparse.Namespace) -> None:
    """Raises UsageError for options that do not belong together."""
    from ..train.recipes import RECIPES
    from ..train.segmentation_recipes import SEGMENTATION_RECIPES

    segmentation = args.task == "segmentation"
    recipes = list(SEGMENTATION_RECIPES if segmentation else RECIPES)
    if args.recipe not in recipes:
        raise UsageError(f"--recipe: for --task {args.task} expected one of {', '.join(recipes)}, found {args.recipe}")
    others = ("smoothing", "mixup", "cutmix", "image_size", "linear_probe") if segmentation else (
        "labels", "reduce_labels", "colours", "crop_size", "feature_convention"
    )  # fmt: skip
    for name in others:
        if getattr(args, name) is not None and getattr(args, name) is not False:
            hint = "; --crop-size says what the model sees" if name == "image_size" else ""
            raise UsageError(f"--{name.replace('_', '-')}: has no meaning with --task {args.task}{hint}")
    if args.linear_probe and (args.from_scratch is not None or args.resume or args.freeze):
        raise UsageError("--linear-probe: expected --model, and neither --resume nor --freeze")
    if args.colours is not None and args.reduce_labels:
        raise UsageError("--reduce-labels: is for maps of numbers; in --colours what is no class is called 'ignored'")
    if sum((args.labels is not None, args.colours is not None, segmentation and args.keep_classes)) > 1:
        raise UsageError("--labels, --colours, --keep-classes: each of them says what the classes are; give one")


def _segmentation(args: argparse.Namespace, output: Path, say: Say) -> int:
    from ..train.label_maps import MapReader, read_colours, read_pairs
    from ..train.segmentation import Segmentation, from_checkpoint, from_scratch, processor_for
    from ..train.segmentation_recipes import SEGMENTATION_RECIPES, SegmentationRecipe
    from ..train.start import frozen_patterns

    recipe = recipe_of(args, SEGMENTATION_RECIPES)
    assert isinstance(recipe, SegmentationRecipe)
    check_output(args, output)
    read_map = MapReader(None if args.colours is None else read_colours(args.colours), args.reduce_labels)
    names = _class_names(args)
    pairs = read_pairs(args.data, args.held_out, args.seed, names, read_map, args.workers, args.ranks)
    for text in pairs.left_out:
        say(f"left out: {text}")
    say(_summary_of_pairs(pairs))
    _check_pieces(min(recipe.batch_size, len(pairs.train)), args.accumulate, Segmentation.smallest_piece)
    options: dict[str, Any] = dict(
        drop_path=recipe.drop_path, seed=args.seed, **computing(args),
        image_size=args.crop_size or (recipe.crop_size if args.recipe.startswith(PUBLISHED) else None),
        convention=args.feature_convention,
    )  # fmt: skip
    if args.from_scratch is None:
        model = from_checkpoint(args.model, pairs.names, keep_classes=args.keep_classes, **options)
    else:
        model = from_scratch(args.from_scratch, pairs.names, **options)
    config = model.config
    if config.feature_convention == "unilm":
        say("feature_convention is unilm: transformers, which does not know it, will read other hidden states")
    recipe = recipe.cropped(min(config.image_shape))
    processor = processor_for(config, args.model, recipe, args.reduce_labels)
    objective = Segmentation(pairs, processor, recipe, config)
    code = train(args, model, objective, recipe, output, say, frozen_patterns(args.freeze, config))
    if code == 0:
        say(
            f"the model of the best epoch is in {output}; minibeit segment IMAGE --model {output} --output FOLDER "
            "--overlay"
        )
    return code


def _class_names(args: argparse.Namespace) -> list[str] | None:
    """The names of the classes, if the user or the checkpoint says them."""
    from ..labels import names
    from .classify import given_names

    if args.keep_classes:
        return _own_classes(args, TASKS[args.task])
    if args.labels is None:
        return None
    found = names("ade20k") if args.labels == "ade20k" else given_names(Path(args.labels))
    for i, name in enumerate(found):
        if not name.strip() or name in found[:i]:
            raise UsageError(f"--labels {args.labels}: expected a name of its own for class {i}, found {name!r}")
    return found


def _check_pieces(size: int, pieces: int, least: int) -> None:
    if size // min(pieces, size) < least:
        raise UsageError(
            f"--batch-size: batch norm takes its statistics of at least {least} images at a time, found {size} in "
            f"{min(pieces, size)} {'piece' if pieces == 1 else 'pieces'}; give more images, a larger batch or fewer "
            "--accumulate"
        )


def _summary_of_pairs(pairs: Pairs) -> str:
    return (
        f"{len(pairs.train)} images with label maps to learn from, {len(pairs.held_out)} held out, "
        f"{len(pairs.names)} classes: {one_line(', '.join(pairs.names), 200)}"
    )


def _probe(args: argparse.Namespace, examples: Examples, output: Path, say: Say) -> int:
    from ..tasks.model import BeitModel
    from ..train.probe import probe, write_probe
    from ..train.start import processor_for

    model = BeitModel.from_pretrained(args.model, **computing(args))
    processor = processor_for(model.config, args.model)
    started = time.monotonic()
    result = probe(
        model, examples, processor, seed=args.seed, batch_size=args.batch_size or 32, epochs=args.epochs or 100,
        lr=args.lr, workers=args.workers, tell=say,
    )  # fmt: skip
    make_output(args, output)
    write_probe(output, result, examples)
    rows: list[tuple[str, ...]] = [("block", "loss", "top1", "top5")]
    rows += [(str(i + 1), *(f"{row[k]:.4f}" for k in ("loss", "top1", "top5"))) for i, row in enumerate(result.rows)]
    for line in table(rows, right=(0, 1, 2, 3)):
        out(line)
    best = result.rows[result.best]
    out(f"best: block {result.best + 1}, {100 * best['top1']:.2f}% of the {result.judged} right")
    say(f"{time.monotonic() - started:.0f} s; the layers are in {output}")
    return 0


def _own_classes(args: argparse.Namespace, task: str) -> list[str]:
    from .loading import check_head, config_of

    if args.model is None:
        raise UsageError("--keep-classes: expected --model, whose classes are kept")
    check_head(args.model, task)
    config = config_of(args.model, fetched=True)
    return [config.id2label[i] for i in range(config.num_labels)]


def _summary(examples: Examples) -> str:
    kinds = {"regression": "numbers"}
    what = kinds.get(examples.problem, "classes")
    return (
        f"{len(examples.train)} pictures to learn from, {len(examples.held_out)} held out, "
        f"{len(examples.names)} {what}: {one_line(', '.join(examples.names), 200)}"
    )
