"""The options that choose a model, and loading the model and image processor that they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import note

if TYPE_CHECKING:
    from ..config import BeitConfig

SHIPPED = "digits"


def add_model_arguments(parser: argparse.ArgumentParser, what: str, half: bool = True) -> None:
    """--model, --backend, --device and --dtype; `what` describes the checkpoints that the command takes.

    `half`: whether float16, bfloat16 and int8 are offered.
    """
    parser.add_argument("-m", "--model", metavar="DIR|FILE", help=what)
    add_backend_arguments(parser, half)


def add_backend_arguments(parser: argparse.ArgumentParser, half: bool = True) -> None:
    """--backend, --device and --dtype."""
    from ..ops import BACKENDS, DEFAULT_BACKEND, DTYPES, HALF_DTYPES, LOW_DTYPES

    parser.add_argument(
        "--backend",
        choices=list(BACKENDS),
        help=f"what computes (default {DEFAULT_BACKEND}, or $MINIBEIT_BACKEND); numpy is the slow reference, "
        "cupy runs on a GPU",
    )
    parser.add_argument("--device", type=int, metavar="N", help="number of the GPU, with --backend cupy (default 0)")
    parser.add_argument(
        "--dtype",
        choices=list(dict.fromkeys([*DTYPES, *((*LOW_DTYPES, *HALF_DTYPES) if half else ())])),
        default="float32",
        help=f"precision (default float32{'; int8 needs a CPU, float16 a GPU' if half else ''})",
    )


def shipped_checkpoint() -> Path:
    """The folder of the checkpoint that comes with minibeit, installed or in a source tree."""
    from ..catalogue import weights_folder

    return weights_folder() / SHIPPED


def load_model(model_class: Any, args: argparse.Namespace, fetched: bool = False, **fields: Any) -> Any:
    """The model that the options choose; `fields` of its config are replaced.  With `fetched` the Hub was asked before.

    Raises CheckpointError for a checkpoint without the head of the task: a random head would give random answers.
    """
    check_head(args.model, model_class.task, fetched)  # which fetches it, if it is on the Hub
    return model_class.from_pretrained(
        args.model, dtype=args.dtype, backend=args.backend, device=args.device, local_files_only=True, **fields
    )


def load_tokenizer(args: argparse.Namespace, beside_model: bool = False) -> Any:
    """The tokenizer of --tokenizer, on the backend that the options choose.

    `beside_model`: --dtype is a model's, and a low precision that a tokenizer lacks becomes float32.
    """
    from ..ops import LOW_DTYPES
    from ..tokenizer.tokenizer import DalleTokenizer

    on_cpu = args.backend != "cupy"
    dtype = "float32" if beside_model and on_cpu and args.dtype in LOW_DTYPES else args.dtype
    return DalleTokenizer.from_pretrained(args.tokenizer, dtype=dtype, backend=args.backend, device=args.device)


def check_decoder(tokenizer: Any, name: str) -> None:
    """Raises CheckpointError for a tokenizer that cannot draw."""
    from ..errors import CheckpointError

    if not tokenizer.has_decoder:
        raise CheckpointError(
            f"{name}: drawing needs a tokenizer with a decoder, this one has none; give a folder with decoder.pkl "
            "beside encoder.pkl, or leave out --output"
        )


def config_of(model: str, fetched: bool = False) -> BeitConfig:
    """The config of a checkpoint or a prepared file."""
    from ..checkpoint.load import open_checkpoint
    from ..checkpoint.packed_file import prepared_file, read_prepared
    from ..loading_options import Loading

    file = prepared_file(model)
    return (
        read_prepared(file).config if file else open_checkpoint(model, loading=Loading(local_files_only=fetched)).config
    )


def made_for(model: str) -> str | None:
    """The task of a checkpoint or a prepared file, as far as it says or shows one."""
    from ..checkpoint.load import open_checkpoint
    from ..checkpoint.packed_file import prepared_file, read_prepared

    file = prepared_file(model)
    return read_prepared(file).task if file else open_checkpoint(model).task


def check_head(model: str, task: str, fetched: bool = False) -> None:
    """Raises CheckpointError for a checkpoint that lacks tensors of `task`."""
    from ..checkpoint.heads import check_head
    from ..loading_options import Loading

    check_head(model, task, Loading(local_files_only=fetched))


def add_draft_argument(parser: argparse.ArgumentParser) -> None:
    """--draft, for commands that resize whole images."""
    parser.add_argument(
        "--draft",
        action="store_true",
        help="decode large JPEGs at a half, a quarter or an eighth of their size: much faster, a little less exact",
    )


def load_processor(model: str, config: BeitConfig, quiet: bool = False) -> Any:
    """The image processor of a checkpoint that was loaded; where it has none, a plain one, described on stderr."""
    from ..file_names import PROCESSOR_NAME, beside
    from ..hub import resolve
    from ..image_processor import BeitImageProcessor, default_processor
    from ..loading_options import FETCHED

    place = resolve(model, FETCHED)
    file = beside(place, PROCESSOR_NAME)
    if file.is_file():
        return BeitImageProcessor.from_pretrained(file)
    if not quiet:
        height, width = config.image_shape
        note(
            f"{place} has no {PROCESSOR_NAME}: images are resized to {height}x{width} (bilinear) and "
            "normalised with mean 0.5 and standard deviation 0.5"
        )
    return default_processor(config)
