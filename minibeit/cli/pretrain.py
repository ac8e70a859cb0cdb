"""`minibeit pretrain`: masked image modelling on your own images, without labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .ranks import join
from .terminal import UsageError, positive
from .training import (
    add_images_argument,
    add_output_arguments,
    add_recipe_arguments,
    add_run_arguments,
    check_output,
    computing,
    images_of,
    recipe_of,
    speaker,
    train,
)

HELP = "pre-train a model on images without labels"
DESCRIPTION = """\
Pre-trains a BEiT as in the paper: blocks of patches are masked, and the model learns to predict their visual tokens,
which a tokenizer makes of the image.  No labels are needed.  What it writes is a checkpoint of masked image modelling,
to be fine-tuned with `minibeit finetune --model FOLDER`.

DATA is a folder with images at any depth, or a .csv or .jsonl list with path and perhaps split in each line.
Ctrl-C stops after the step at hand and saves; the same command with --resume goes on, with the same result in the end.
`mpiexec -n 4 minibeit pretrain ...` does the same with four processes, on one machine or several (extra mpi).
"""
EXAMPLES = """\
  minibeit pretrain photos/ --tokenizer dall-e/ --config base --output photos-beit
  minibeit pretrain photos/ --tokenizer dall-e/ --config base --output photos-beit --resume     go on where it stopped
  minibeit pretrain photos/ --tokenizer dall-e/ --model DIR --output OUT     train on from a checkpoint
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..train.recipes import PRETRAINING, PRETRAINING_PRESETS

    add_images_argument(parser)
    parser.add_argument(
        "-t",
        "--tokenizer",
        metavar="DIR|FILE",
        required=True,
        help="what makes the visual tokens, such as DALL-E's dVAE",
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--config",
        metavar="CONFIG",
        help=f"what to train from random weights: a config.json, or a preset ({', '.join(PRETRAINING_PRESETS)})",
    )
    start.add_argument("-m", "--model", metavar="DIR|FILE", help="a checkpoint of masked image modelling to train on")
    add_output_arguments(parser)
    add_recipe_arguments(parser, PRETRAINING, "own", without=("layer_decay", "smoothing", "mixup", "cutmix"))
    parser.add_argument("--masked", type=float, metavar="F", help="share of the patches to mask (default 75/196)")
    parser.add_argument("--image-size", type=positive, metavar="S", help="height and width in pixels")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..tokenizer.tokenizer import DalleTokenizer
    from ..train import start
    from ..train.pretraining import MaskedModeling, processor_for
    from ..train.recipes import PRETRAINING

    join(args)
    output, say = Path(args.output), speaker(args)
    recipe: Any = recipe_of(args, PRETRAINING)
    check_output(args, output)
    tokenizer = DalleTokenizer.from_pretrained(args.tokenizer, **computing(args))
    model = _model(args, tokenizer, recipe)
    examples = images_of(args, say)
    if args.model is None:
        processor = processor_for(model.config, recipe)
    else:  # its weights know pixels of this mean and deviation
        processor = start.processor_for(model.config, args.model)
    objective = MaskedModeling(examples, processor, recipe, model.config, tokenizer)
    code = train(args, model, objective, recipe, output, say)
    if code == 0:
        say(f"the model of the best epoch is in {output}; minibeit finetune DATA --model {output} --output FOLDER")
    return code


def _model(args: argparse.Namespace, tokenizer: Any, recipe: Any) -> Any:
    from ..tasks.masked_image_modeling import BeitForMaskedImageModeling
    from ..train.pretraining import new_model
    from .loading import check_head

    options: dict[str, Any] = dict(seed=args.seed, **computing(args))
    if args.config is not None:
        return new_model(args.config, tokenizer, drop_path=recipe.drop_path, image_size=args.image_size, **options)
    check_head(args.model, BeitForMaskedImageModeling.task)
    fields = {} if args.image_size is None else {"image_size": args.image_size}
    model = BeitForMaskedImageModeling.from_pretrained(
        args.model, drop_path_rate=recipe.drop_path, local_files_only=True, **fields, **options
    )
    if not model.config.use_mask_token:
        raise UsageError(f"{args.model}: expected a checkpoint with a mask token, use_mask_token in its config")
    return model
