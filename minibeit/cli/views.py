"""The options that say how an image is shown to a segmentation model, and what they stand for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .terminal import UsageError, positive

if TYPE_CHECKING:
    from ..config import BeitConfig
    from ..sliding import Inference


def add_view_arguments(parser: argparse.ArgumentParser) -> None:
    """--slide, --whole and what changes them; `args.batch_size` is left to the command."""
    from ..config import FEATURE_CONVENTIONS

    group = parser.add_argument_group(
        "how an image is shown to the model",
        "Without --slide or --whole the image processor decides, which for published\n"
        "checkpoints squashes images to a square. The papers' numbers are made with\n"
        "--slide; of several views the probabilities are averaged.",
    )
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--slide", action="store_true", help="overlapping windows at the image's own proportions")
    mode.add_argument("--whole", action="store_true", help="the whole image at its own proportions, in one pass")
    group.add_argument(
        "--window", type=positive, metavar="N", help="side of a window (default: the model's image size)"
    )
    group.add_argument("--stride", type=positive, metavar="N", help="from window to window (default: 2/3 of a window)")
    group.add_argument(
        "--short-side", type=positive, metavar="N", help="what the shorter side is resized to (default: a window)"
    )
    group.add_argument(
        "--scales", type=float, nargs="+", metavar="F", help="factors of --short-side, such as 0.5 0.75 1 1.25 1.5 1.75"
    )
    group.add_argument("--flip", action="store_true", help="also the mirror image of each view")
    group.add_argument(
        "--imagenet-mean",
        action="store_true",
        help="normalise by ImageNet's mean and standard deviation, with which the published ADE20K models were trained",
    )
    group.add_argument(
        "--feature-convention",
        choices=FEATURE_CONVENTIONS,
        help="which hidden states the head reads: those it was trained with (unilm), or those that transformers takes "
        "(default: as the checkpoint says)",
    )


def view_options(args: argparse.Namespace) -> list[str]:
    """The options of `add_view_arguments` that are given, as the user writes them."""
    names = (
        "slide",
        "whole",
        "window",
        "stride",
        "short_side",
        "scales",
        "flip",
        "imagenet_mean",
        "feature_convention",
    )
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def config_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the model's config that the options replace."""
    return {} if args.feature_convention is None else {"feature_convention": args.feature_convention}


def inference_of(args: argparse.Namespace, config: BeitConfig) -> Inference:
    """What the options say for a model.  Raises UsageError for options that do not go together."""
    from ..sliding import SLIDE, SQUASH, WHOLE, Inference

    mode = SLIDE if args.slide else WHOLE if args.whole else SQUASH
    for name, modes in (("window", "--slide"), ("stride", "--slide"), ("short_side", "--slide or --whole"),
                        ("scales", "--slide or --whole")):  # fmt: skip
        if getattr(args, name) is not None and f"--{mode}" not in modes:
            raise UsageError(f"--{name.replace('_', '-')} goes with {modes}, which is not given")
    window = args.window or min(config.image_shape)
    try:
        return Inference(
            mode=mode,
            window=window,
            stride=args.stride or max(window * 2 // 3, 1),
            short_side=args.short_side or window,
            scales=tuple(args.scales or (1.0,)),
            flip=args.flip,
            batch_size=args.batch_size or 1,
            patch=max(config.patch_shape),
        )
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def processor_of(args: argparse.Namespace, processor: Any) -> Any:
    """The image processor with the means that the options choose.  Raises UsageError for other than three channels."""
    if not args.imagenet_mean:
        return processor
    if isinstance(processor.image_mean, list) and len(processor.image_mean) != 3:
        raise UsageError(f"--imagenet-mean is for three channels, the model takes {len(processor.image_mean)}")
    from ..images.types import IMAGENET_MEAN, IMAGENET_STD

    means = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    settings = {**processor.to_dict(), "do_normalize": True, **means}
    return type(processor).from_dict(settings)
