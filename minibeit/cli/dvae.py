"""`minibeit dvae`: a vocabulary of image squares, learned from your own images."""

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

HELP = "train a tokenizer, a discrete VAE, on images without labels"
DESCRIPTION = """\
Trains a discrete VAE as DALL-E's was: squares of an image become visual tokens, from which the image is drawn again.
`minibeit pretrain --tokenizer FOLDER` takes its tokens; `minibeit tokenize` shows them.

DATA is a folder with images at any depth, or a .csv or .jsonl list with path and perhaps split in each line.  After
each epoch the number of tokens in use is logged: if few are, lower --divergence or raise --lr.
`mpiexec -n 4 minibeit dvae ...` does the same with four processes, on one machine or several (extra mpi).
"""
EXAMPLES = """\
  minibeit dvae photos/ --output tokens --image-size 112 --groups 4 --width 64 --codes 1024
  minibeit dvae digits/ --output tokens --recipe tiny --image-size 28 --groups 3 --width 32 --codes 128
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..train.recipes import TOKENIZERS

    add_images_argument(parser)
    add_output_arguments(parser)
    parser.add_argument("-m", "--model", metavar="DIR", help="a tokenizer with a decoder to train on")
    for name, text in (
        ("groups", "groups of blocks; a token is 2^(groups - 1) pixels a side (default 4)"),
        ("blocks", "blocks in a group (default 2)"),
        ("width", "channels of the first group, doubled from group to group (default 64)"),
        ("codes", "number of visual tokens (default 1024)"),
        ("channels", "1 for gray images, 3 for colour (default 3)"),
    ):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=text)
    parser.add_argument("--image-size", type=positive, metavar="S", help="side of the crops in pixels (default 112)")
    add_recipe_arguments(
        parser, TOKENIZERS, "own", without=("layer_decay", "drop_path", "smoothing", "mixup", "cutmix")
    )
    parser.add_argument("--divergence", type=float, metavar="F", help="weight of the divergence from uniform tokens")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..train.discrete_vae import DiscreteVae, ImageReconstruction
    from ..train.recipes import TOKENIZERS

    join(args)
    output, say = Path(args.output), speaker(args)
    recipe: Any = recipe_of(args, TOKENIZERS)
    check_output(args, output)
    tokenizer = _tokenizer(args)
    examples = images_of(args, say)
    side = tokenizer.config.image_size
    objective = ImageReconstruction(examples, recipe, tokenizer.config, (side, side))
    code = train(args, DiscreteVae(tokenizer), objective, recipe, output, say)
    if code == 0:
        say(f"the tokenizer of the best epoch is in {output}; minibeit pretrain DATA --tokenizer {output} ...")
    return code


def _tokenizer(args: argparse.Namespace) -> Any:
    from ..tokenizer.config import DalleTokenizerConfig
    from ..tokenizer.tokenizer import DalleTokenizer

    options: dict[str, Any] = computing(args)
    given = {name: getattr(args, name) for name in ("groups", "blocks", "width", "codes", "channels")}
    size = {} if args.image_size is None else {"image_size": args.image_size}
    if args.model is not None:
        if chosen := [f"--{name}" for name, value in given.items() if value is not None]:
            raise UsageError(f"{', '.join(chosen)}: expected to be left out with --model, whose sizes are kept")
        return DalleTokenizer.from_pretrained(args.model, **size, **options)
    config = DalleTokenizerConfig(
        num_groups=args.groups or 4,
        num_blocks_per_group=args.blocks or 2,
        hidden_size=args.width or 64,
        vocab_size=args.codes or 1024,
        input_channels=args.channels or 3,
        **size,
    )
    return DalleTokenizer(config, seed=args.seed, **options)
