"""`minibeit finetune`: a classifier of your own pictures."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import one_line
from .terminal import StatusLine, UsageError, note, out, positive, table

if TYPE_CHECKING:
    from ..train.examples import Examples
    from ..train.loop import Progress
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
INTERRUPTED = 130


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
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="what to write")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="replace what a former training left in FOLDER")
    there.add_argument("--resume", action="store_true", help="go on with the training that was stopped in FOLDER")
    parser.add_argument(
        "--recipe", choices=list(RECIPES), default="own", help="settings by name (default own); those below change them"
    )
    for name, kind, text in (
        ("epochs", positive, "times that each picture is seen"),
        ("batch-size", positive, "pictures per step; the rate changes with it unless --lr is given"),
        ("lr", float, "learning rate at its peak"),
        ("layer-decay", float, "factor of the rate from a block to the one below it"),
        ("weight-decay", float, "weight decay of matrices"),
        ("warmup", float, "epochs in which the rate rises"),
        ("drop-path", float, "rate of stochastic depth in the last block"),
        ("smoothing", float, "label smoothing"),
        ("mixup", float, "alpha of mixup, 0 for none"),
        ("cutmix", float, "alpha of cutmix, 0 for none"),
        ("clip", float, "largest norm of the gradients, 0 for any"),
        ("average", float, "decay of an average of the weights, which is what is kept, such as 0.999; 0 for none"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__[0].upper().replace("P", "N"), help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default 0)")
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
    parser.add_argument("--accumulate", type=positive, default=1, metavar="N", help="compute a batch in N pieces")
    parser.add_argument("--recompute", action="store_true", help="less memory for a third more time")
    parser.add_argument("--backend", choices=["numpy", "numba"], help="what computes (default numba)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads that compute (default: all cores)")
    parser.add_argument("--workers", type=positive, default=min(8, os.cpu_count() or 1), metavar="N",
                        help="threads that decode pictures (default: one a core, at most 8)")  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no notes")


def run(args: argparse.Namespace) -> int:
    from ..train.examples import read_examples

    output = Path(args.output)
    recipe = _recipe(args)
    _check_output(args, output)
    names = _own_classes(args) if args.keep_classes else None
    examples = read_examples(args.data, args.held_out, args.seed, names, args.workers)
    say: Callable[[str], None] = (lambda text: None) if args.quiet else note
    for text in examples.unreadable:
        say(f"left out: {text}")
    say(_summary(examples))
    if args.linear_probe:
        return _probe(args, examples, output, say)
    return _train(args, examples, recipe, output, say)


def _train(
    args: argparse.Namespace, examples: Examples, recipe: Recipe, output: Path, say: Callable[[str], None]
) -> int:
    from ..train.loop import Trainer
    from ..train.start import (
        check_memory,
        from_checkpoint,
        from_scratch,
        frozen_patterns,
        parameters_learned,
        processor_for,
    )
    from ..train.state import Stopped

    options: dict[str, Any] = dict(
        drop_path=recipe.drop_path, seed=args.seed, backend=args.backend, image_size=args.image_size,
        num_threads=args.threads,
    )  # fmt: skip
    if args.from_scratch is None:
        model = from_checkpoint(args.model, examples, keep_classes=args.keep_classes, **options)
    else:
        model = from_scratch(args.from_scratch, examples, **options)
    processor = processor_for(model.config, args.model)
    size = min(recipe.batch_size, len(examples.train))
    say(check_memory(model.config, size, min(args.accumulate, size), bool(recipe.average), args.recompute))
    frozen = frozen_patterns(args.freeze, model.config)
    if not parameters_learned(model, frozen):
        raise UsageError("--freeze: nothing is left to be learned")
    with StatusLine(args.quiet) as line:
        trainer = Trainer(
            model, examples, processor, recipe, output,
            seed=args.seed, frozen=frozen, accumulate=args.accumulate, recompute=args.recompute, workers=args.workers,
            tell=lambda progress: line.show(_shown(progress)),
        )  # fmt: skip
        if args.resume:
            trainer.resume()
            say(f"goes on after step {trainer.state.step} of {trainer.steps}")
        _make(args, output)
        learned = parameters_learned(model, frozen)
        say(f"{trainer.steps} steps of {trainer.batch_size} pictures, {learned:,} numbers learned")
        try:
            history = trainer.run()
        except Stopped as stopped:
            line.close()
            note(f"{stopped}; the same command with --resume goes on")
            return INTERRUPTED
    _report(history)
    say(f"the model of the best epoch is in {output}; minibeit classify PICTURE --model {output}")
    return 0


def _probe(args: argparse.Namespace, examples: Examples, output: Path, say: Callable[[str], None]) -> int:
    from ..train.probe import probe, write_probe
    from ..train.start import processor_for

    if args.from_scratch is not None or args.resume or args.freeze:
        raise UsageError("--linear-probe: expected --model, and neither --resume nor --freeze")
    from ..tasks.model import BeitModel

    model = BeitModel.from_pretrained(args.model, backend=args.backend, num_threads=args.threads)
    processor = processor_for(model.config, args.model)
    started = time.monotonic()
    result = probe(
        model, examples, processor, seed=args.seed, batch_size=args.batch_size or 32, epochs=args.epochs or 100,
        lr=args.lr, workers=args.workers, tell=say,
    )  # fmt: skip
    _make(args, output)
    write_probe(output, result, examples)
    rows: list[tuple[str, ...]] = [("block", "loss", "top1", "top5")]
    rows += [(str(i + 1), *(f"{row[k]:.4f}" for k in ("loss", "top1", "top5"))) for i, row in enumerate(result.rows)]
    for line in table(rows, right=(0, 1, 2, 3)):
        out(line)
    best = result.rows[result.best]
    out(f"best: block {result.best + 1}, {100 * best['top1']:.2f}% of the {result.judged} right")
    say(f"{time.monotonic() - started:.0f} s; the layers are in {output}")
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    from ..train.recipes import recipe

    fields = ("epochs", "batch_size", "lr", "layer_decay", "weight_decay", "warmup", "drop_path", "smoothing", "mixup",
              "cutmix", "clip", "average")  # fmt: skip
    try:
        return recipe(args.recipe).changed(**{name: getattr(args, name) for name in fields})
    except ValueError as error:
        raise UsageError(f"--{str(error).replace('_', '-', 1)}") from None


def _check_output(args: argparse.Namespace, output: Path) -> None:
    from ..files import check_writable, identity

    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: expected a folder to write, found a file")
    if args.model is not None and output.exists() and Path(args.model).exists():
        model = Path(args.model)
        if identity(output) == identity(model if model.is_dir() else model.parent):
            raise UsageError(f"{output}: this is the checkpoint to start from, which is not overwritten")
    if output.is_dir() and any(output.iterdir()) and not (args.overwrite or args.resume):
        raise UsageError(f"{output}: this folder exists; choose another --output, or --overwrite or --resume it")
    check_writable(output / "config.json")


def _make(args: argparse.Namespace, output: Path) -> None:
    """The folder, without what an earlier training left in it; files of others stay."""
    from ..train.loop import CURVES_NAME, LOG_NAME
    from ..train.state import STATE_NAME

    output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in (STATE_NAME, LOG_NAME, CURVES_NAME):
            with suppress(FileNotFoundError):
                (output / name).unlink()


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


def _report(history: list[dict[str, Any]]) -> None:
    best = next(row for row in reversed(history) if row["best"])
    out(f"best epoch {best['epoch']} of {len(history)}:")
    numbers = [(name, f"{value:.4f}") for name, value in best.items() if isinstance(value, float) and name != "lr"]
    for line in table(numbers, right=(1,)):
        out(f"  {line}")


def _shown(p: Progress) -> str:
    minutes, seconds = divmod(round(p.seconds_left), 60)
    return (
        f"epoch {p.epoch}  step {p.step}/{p.steps}  loss {p.loss:.3f}  right {100 * p.accuracy:.1f}%  "
        f"{p.images_per_s:.1f} images/s  {minutes}:{seconds:02d} left"
    )
