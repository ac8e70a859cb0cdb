"""What the commands that train have in common: their options, the folder they write, and the run itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import StatusLine, UsageError, note, out, positive, table

if TYPE_CHECKING:
    from ..train.examples import Examples
    from ..train.loop import Progress
    from ..train.objective import Objective
    from ..train.ranks import Ranks
    from ..train.recipes import Recipe

INTERRUPTED = 130
Say = Callable[[str], None]

SETTINGS: dict[str, tuple[Callable[[str], Any], str, str]] = {  # field of a recipe -> (type, letter, help)
    "epochs": (positive, "N", "how often each image is seen"),
    "batch_size": (positive, "N", "images per step; the rate changes with it unless --lr is given"),
    "lr": (float, "F", "learning rate at its peak"),
    "layer_decay": (float, "F", "factor of the rate from a block to the one below it"),
    "weight_decay": (float, "F", "weight decay of matrices"),
    "warmup": (float, "F", "epochs in which the rate rises"),
    "drop_path": (float, "F", "rate of stochastic depth in the last block"),
    "smoothing": (float, "F", "label smoothing"),
    "mixup": (float, "F", "alpha of mixup, 0 for none"),
    "cutmix": (float, "F", "alpha of cutmix, 0 for none"),
    "clip": (float, "F", "largest norm of the gradients, 0 for any"),
    "average": (float, "F", "decay of an average of the weights, which is what is kept, such as 0.999; 0 for none"),
}
OTHERS = ("masked", "divergence")  # fields of recipes that one command alone has an option for


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    """DATA of images without labels, and --held-out."""
    parser.add_argument("data", metavar="DATA", help="a folder of images, or a .csv or .jsonl list")
    parser.add_argument(
        "--held-out", type=float, default=0.05, metavar="F", help="share held out where DATA has no split (default .05)"
    )


def images_of(args: argparse.Namespace, say: Say) -> Examples:
    """The images of DATA, those that cannot be read being named."""
    from ..train.examples import read_images

    examples = read_images(args.data, args.held_out, args.seed, args.workers, args.ranks)
    for text in examples.unreadable:
        say(f"left out: {text}")
    say(f"{len(examples.train)} images to learn from, {len(examples.held_out)} held out")
    return examples


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """--output, --overwrite and --resume."""
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="what to write")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="replace what an earlier training left in FOLDER")
    there.add_argument("--resume", action="store_true", help="go on with the training that was stopped in FOLDER")


def add_recipe_arguments(
    parser: argparse.ArgumentParser, recipes: Mapping[str, Recipe], default: str, without: tuple[str, ...] = ()
) -> None:
    """--recipe, and an option for each of its settings but some."""
    parser.add_argument(
        "--recipe",
        choices=list(recipes),
        default=default,
        help=f"settings by name (default {default}); those below change them",
    )
    for name, (kind, letter, text) in SETTINGS.items():
        if name not in without:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=letter, help=text)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How the training is computed and watched."""
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of everything random (default 0)")
    parser.add_argument("--accumulate", type=positive, default=1, metavar="N", help="compute a batch in N pieces")
    parser.add_argument("--recompute", action="store_true", help="less memory for a third more time")
    parser.add_argument(
        "--backend",
        choices=["numpy", "numba", "cupy"],
        help="what computes (default numba, or $MINIBEIT_BACKEND); cupy runs on a GPU",
    )
    parser.add_argument(
        "--device", type=int, metavar="N", help="number of the GPU, with --backend cupy (default 0; of ranks, one each)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="what matrices are multiplied in (default float32); half precision needs a GPU, weights stay float32",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads that compute (default: all cores; of ranks, a share)"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="threads that decode images (default: one a core, at most 8)"
    )
    parser.add_argument(
        "--tensorboard", metavar="FOLDER", help="also write events for TensorBoard (needs the extra tensorboard)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar and no notes")


def computing(args: argparse.Namespace) -> dict[str, Any]:
    """What computes, as a model takes it.  Raises UsageError for options that only a GPU has."""
    from ..ops import GPU_BACKENDS, default_backend

    if (args.backend or default_backend()) not in GPU_BACKENDS:
        if args.dtype != "float32":
            raise UsageError(f"--dtype {args.dtype}: training in half precision needs a GPU, --backend cupy")
        if args.device is not None:
            raise UsageError("--device: names a GPU, which --backend cupy computes on")
    return dict(backend=args.backend, num_threads=args.threads, device=args.device, dtype=args.dtype)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, found {text!r}")
    return int(text)


def speaker(args: argparse.Namespace) -> Say:
    """Prints notes, unless the user wants none."""
    return (lambda text: None) if args.quiet else note


def recipe_of(args: argparse.Namespace, recipes: Mapping[str, Recipe]) -> Recipe:
    """The recipe that the options choose and change.  Raises UsageError for a number that makes no training."""
    try:
        return recipes[args.recipe].changed(**{name: getattr(args, name, None) for name in (*SETTINGS, *OTHERS)})
    except ValueError as error:
        raise UsageError(f"--{str(error).replace('_', '-', 1)}") from None


def check_output(args: argparse.Namespace, output: Path) -> None:
    """Raises UsageError if `output` cannot be written or must not be replaced; of several ranks, in the first."""
    args.ranks.from_first(lambda: _check_output(args, output))


def _check_output(args: argparse.Namespace, output: Path) -> None:
    from ..files import check_writable, identity

    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: expected a folder to write, found a file")
    for name in ("model", "tokenizer", "config", "from_scratch"):
        given = getattr(args, name, None)
        if given and Path(given).exists() and output.exists():
            folder = Path(given) if Path(given).is_dir() else Path(given).parent
            if identity(output) == identity(folder):
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{output}: this folder holds what {option} names, which is not overwritten")
    data = Path(args.data)
    if data.is_dir() and data.resolve() in (output.resolve(), *output.resolve().parents):
        raise UsageError(f"{output}: this folder is within the images to learn from; choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (args.overwrite or args.resume):
        raise UsageError(f"{output}: this folder exists; choose another --output, or --overwrite or --resume it")
    check_writable(output / "config.json")


def make_output(args: argparse.Namespace, output: Path) -> None:
    """The folder, without what an earlier training left in it; files of others stay."""
    from ..file_names import CONFIG_NAME, PREPARED_NAME, PROCESSOR_NAME, WEIGHTS_NAME
    from ..train.loop import CURVES_NAME, LOG_NAME
    from ..train.probe import PROBE_NAME, SCORES_NAME
    from ..train.state import STATE_NAME

    output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        model = (CONFIG_NAME, WEIGHTS_NAME, PREPARED_NAME, PROCESSOR_NAME)
        for name in (STATE_NAME, LOG_NAME, CURVES_NAME, PROBE_NAME, SCORES_NAME, *model):
            with suppress(FileNotFoundError):
                (output / name).unlink()


def train(
    args: argparse.Namespace,
    model: Any,
    objective: Objective,
    recipe: Recipe,
    output: Path,
    say: Say,
    frozen: tuple[str, ...] = (),
) -> int:
    """Trains `model` and reports the best epoch; the exit code."""
    from ..ops import GPU_BACKENDS
    from ..tasks.base import BeitPreTrainedModel
    from ..train.loop import trainer_of
    from ..train.start import check_device_memory, check_memory, parameters_learned
    from ..train.state import Stopped

    ranks: Ranks = args.ranks
    shares = list(map(len, ranks.shares(min(recipe.batch_size, len(objective.train)))))
    if isinstance(model, BeitPreTrainedModel):
        job = model.config, max(shares), min(args.accumulate, *shares), bool(recipe.average), args.recompute, model.task
        if model.ops.backend in GPU_BACKENDS:
            say(check_device_memory(*job, model.device or 0))
        else:
            say(check_memory(*job, objective.smallest_piece, ranks.on_host))
    learned = parameters_learned(model, frozen)
    if not learned:
        raise UsageError("--freeze: nothing is left to be learned")
    with ExitStack() as stack:
        options = {}
        if args.tensorboard and ranks.first:
            from ..train.tensorboard import events

            options["record"] = stack.enter_context(events(args.tensorboard))
        line = stack.enter_context(StatusLine(args.quiet))
        trainer = trainer_of(model)(
            model, objective, recipe, output,
            seed=args.seed, frozen=frozen, accumulate=args.accumulate, recompute=args.recompute, workers=args.workers,
            tell=lambda progress: line.show(_shown(progress)), ranks=ranks, **options,
        )  # fmt: skip
        if args.resume:
            trainer.resume()
            say(f"goes on after step {trainer.state.step} of {trainer.steps}")
        if ranks.first:
            make_output(args, output)
        together = f" on {ranks.count} ranks" if ranks.count > 1 else ""
        together += f" of {args.threads} threads" if together and args.threads else ""
        say(f"{trainer.steps} steps of {trainer.batch_size} images{together}, {learned:,} numbers learned")
        try:
            history = trainer.run()
        except Stopped as stopped:
            line.close()
            if ranks.first:
                note(f"{stopped}; the same command with --resume goes on")
            return INTERRUPTED
    if ranks.first:
        _report(history)
    return 0


def _report(history: list[dict[str, Any]]) -> None:
    best = next(row for row in reversed(history) if row["best"])
    out(f"best epoch {best['epoch']} of {len(history)}:")
    numbers = [(name, f"{value:.4f}") for name, value in best.items() if isinstance(value, float) and name != "lr"]
    for line in table(numbers, right=(1,)):
        out(f"  {line}")


def _shown(p: Progress) -> str:
    minutes, seconds = divmod(round(p.seconds_left), 60)
    right = "" if p.accuracy is None else f"right {100 * p.accuracy:.1f}%  "
    return (
        f"epoch {p.epoch}  step {p.step}/{p.steps}  loss {p.loss:.3f}  {right}"
        f"{p.images_per_s:.1f} images/s  {minutes}:{seconds:02d} left"
    )
