"""`minibeit finetune`: a classifier of your own pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import one_line
from .terminal import UsageError, out, positive, table
from .training import (
    Say,
    add_output_arguments,
    add_recipe_arguments,
    add_run_arguments,
    check_output,
    make_output,
    recipe_of,
    speaker,
    train,
)

if TYPE_CHECKING:
    from ..train.examples import Examples
    from ..train.recipes import Recipe

HELP = "train a classifier on your own pictures"
DESCRIPTION = """\
Trains a checkpoint to name what is on your pictures; `minibeit classify` and transformers load the folder it writes.

DATA is a folder with a folder of pictures for each class (perhaps within train/ and val/), or a .csv or .jsonl file
with path and label, labels (several, separated by ; in CSV), value or values (numbers) and perhaps split in each line.
Ctrl-C stops after the step at hand and saves; the same command with --resume goes on, with the same result in the end.
"""
EXAMPLES = """\
  minibeit finetune flowers/ --model microsoft/beit-base-patch16-224-pt22k --output flowers-beit
  minibeit finetune flowers/ --model DIR --output OUT --epochs 10 --freeze 8   the first 8 blocks stay as they are
  minibeit finetune flowers/ --model DIR --output OUT --resume     go on where it stopped
  minibeit finetune flowers/ --model DIR --output OUT --linear-probe   a linear layer on each block, in minutes
  minibeit finetune digits/ --from-scratch tiny --recipe tiny --output digits-beit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..train.recipes import PRESETS, RECIPES

    parser.add_argument("data", metavar="DATA", help="a folder of class folders, or a .csv or .jsonl list")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("-m", "--model", metavar="DIR|FILE", help="the checkpoint to start from")
    start.add_argument(
        "--from-scratch",
        metavar="CONFIG",
        help=f"random weights instead: a config.json, or a preset ({', '.join(PRESETS)})",
    )
    add_output_arguments(parser)
    add_recipe_arguments(parser, RECIPES, "own")
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
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..train.examples import read_examples
    from ..train.recipes import RECIPES

    output, say = Path(args.output), speaker(args)
    if args.linear_probe and (args.from_scratch is not None or args.resume or args.freeze):
        raise UsageError("--linear-probe: expected --model, and neither --resume nor --freeze")
    recipe = recipe_of(args, RECIPES)
    check_output(args, output)
    names = _own_classes(args) if args.keep_classes else None
    examples = read_examples(args.data, args.held_out, args.seed, names, args.workers)
    for text in examples.unreadable:
        say(f"left out: {text}")
    say(_summary(examples))
    if args.linear_probe:
        return _probe(args, examples, output, say)
    return _train(args, examples, recipe, output, say)


def _train(args: argparse.Namespace, examples: Examples, recipe: Recipe, output: Path, say: Say) -> int:
    from ..train.objective import Classification
    from ..train.start import from_checkpoint, from_scratch, frozen_patterns, processor_for

    options: dict[str, Any] = dict(
        drop_path=recipe.drop_path, seed=args.seed, backend=args.backend, image_size=args.image_size,
        num_threads=args.threads,
    )  # fmt: skip
    if args.from_scratch is None:
        model = from_checkpoint(args.model, examples, keep_classes=args.keep_classes, **options)
    else:
        model = from_scratch(args.from_scratch, examples, **options)
    objective = Classification(examples, processor_for(model.config, args.model), recipe, model.config.image_shape)
    code = train(args, model, objective, recipe, output, say, frozen_patterns(args.freeze, model.config))
    if code == 0:
        say(f"the model of the best epoch is in {output}; minibeit classify IMAGE --model {output}")
    return code


def _probe(args: argparse.Namespace, examples: Examples, output: Path, say: Say) -> int:
    from ..tasks.model import BeitModel
    from ..train.probe import probe, write_probe
    from ..train.start import processor_for

    model = BeitModel.from_pretrained(args.model, backend=args.backend, num_threads=args.threads)
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


def _own_classes(args: argparse.Namespace) -> list[str]:
    from .loading import check_head, config_of

    if args.model is None:
        raise UsageError("--keep-classes: expected --model, whose classes are kept")
    check_head(args.model, "image_classification")
    config = config_of(args.model)
    return [config.id2label[i] for i in range(config.num_labels)]


def _summary(examples: Examples) -> str:
    kinds = {"regression": "numbers"}
    what = kinds.get(examples.problem, "classes")
    return (
        f"{len(examples.train)} pictures to learn from, {len(examples.held_out)} held out, "
        f"{len(examples.names)} {what}: {one_line(', '.join(examples.names), 200)}"
    )
