"""`minibeit inspect`: what is in a checkpoint, and whether it fits together."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import LONGEST, one_line, shown_name
from .terminal import out, print_json, table

if TYPE_CHECKING:
    from ..checkpoint.formats import Loaded
    from ..checkpoint.load import Checkpoint, Match
    from ..config import BeitConfig

HELP = "show what is in a checkpoint and whether it fits together"
DESCRIPTION = """\
Shows the config and the tensors of a checkpoint, and which tensors its model lacks or has no place for.

Reads folders in the Hub's layout and files of every format (safetensors, PyTorch, Flax, npz) without running their
code.  The exit code is 1 if a tensor is missing, unexpected, or not of the shape that the config gives.
"""
EXAMPLES = """\
  minibeit inspect DIR
  minibeit inspect model.pth --summary
  minibeit inspect microsoft/beit-base-patch16-224 --json
"""
NAMED_LABELS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..task_table import TASKS

    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, a file or an id on the Hub")
    parser.add_argument("--task", choices=list(TASKS), help="what to check it for (default: what it was made for)")
    parser.add_argument("--summary", action="store_true", help="leave out the list of tensors")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint.formats import load_file
    from ..checkpoint.load import open_checkpoint
    from ..errors import CheckpointError
    from ..hub import resolve

    path = resolve(args.checkpoint)
    loaded = load_file(path)
    try:
        checkpoint = open_checkpoint(path)
        task = args.task or checkpoint.task or closest_task(checkpoint)
        facts = _facts(path, loaded) | _fit(checkpoint, task)
    except CheckpointError as error:  # the tensors can still be shown
        facts = _facts(path, loaded) | {"fits": False, "error": str(error)}
    if args.json:
        print_json(facts)
    else:
        _print(facts, args.summary)
    return 0 if facts["fits"] else 1


def closest_task(checkpoint: Checkpoint) -> str:
    """The task whose parameters match the tensors best."""
    from ..task_table import TASKS

    def differences(task: str) -> int:
        match = _match(checkpoint, task)
        return len(match.missing) + len(match.mismatched) + len(match.unexpected)

    return min(TASKS, key=differences)


def _match(checkpoint: Checkpoint, task: str) -> Match:
    from ..checkpoint.load import match_names

    return match_names(checkpoint.tensors, checkpoint.config, task, checkpoint.naming)


def _facts(path: Path, loaded: Loaded) -> dict[str, Any]:
    """Facts about the file; no tensor is read."""
    tensors = []
    for key in loaded.tensors:
        info = loaded.tensors.info(key)
        tensors.append({"name": key, "shape": list(info.shape), "dtype": info.dtype, "numbers": _product(info.shape)})
    return {
        "checkpoint": str(path),
        "format": loaded.format,
        "wrapper": loaded.wrapper,
        "files": [str(file) for file in loaded.files],
        "bytes": sum(os.path.getsize(file) for file in loaded.files),
        "tensors": tensors,
        "numbers": sum(tensor["numbers"] for tensor in tensors),
    }


def _fit(checkpoint: Checkpoint, task: str) -> dict[str, Any]:
    from ..params import count_parameters

    match = _match(checkpoint, task)
    return {
        "made_for": checkpoint.task,
        "task": task,
        "dialect": checkpoint.naming.dialect.name,
        "software": checkpoint.naming.dialect.software,
        "config": checkpoint.config.to_dict(),
        "assumed": checkpoint.assumed,
        "parameters": count_parameters(checkpoint.config, task),
        "missing": sorted(match.missing.values()),
        "mismatched": list(match.mismatched.values()),
        "unexpected": sorted(match.unexpected),
        "fits": match.complete,
        "summary": _summary(checkpoint.config),
    }


def _summary(config: BeitConfig) -> dict[str, str]:
    """The config in words."""
    (height, width), (ph, pw), (gh, gw) = config.image_shape, config.patch_shape, config.grid
    positions = [
        text
        for flag, text in (
            (config.use_absolute_position_embeddings, "absolute"),
            (config.use_relative_position_bias, "relative bias per block"),
            (config.use_shared_relative_position_bias, "relative bias shared by the blocks"),
        )
        if flag
    ]
    labels = [shown_name(config.id2label[i]) for i in range(min(config.num_labels, NAMED_LABELS))]
    more = ", ..." if config.num_labels > NAMED_LABELS else ""
    return {
        "encoder": f"{config.num_hidden_layers} blocks, width {config.hidden_size}, {config.num_attention_heads} heads "
        f"of {config.head_size}, mlp width {config.intermediate_size}, {config.hidden_act}",
        "images": f"{height}x{width}, {config.num_channels} channels, patches of {ph}x{pw}, grid {gh}x{gw}",
        "positions": " and ".join(positions) or "none",
        "pooling": "mean of the patches" if config.use_mean_pooling else "CLS token",
        "mask token": "yes" if config.use_mask_token else "no",
        "labels": f"{config.num_labels}: {', '.join(labels)}{more}",
    }


def _print(facts: dict[str, Any], brief: bool) -> None:
    from ..task_table import in_words

    size = facts["bytes"]
    unit = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
    wrapper = f", under {facts['wrapper']}" if facts["wrapper"] else ""
    rows = [("checkpoint", facts["checkpoint"]), ("format", f"{facts['format']}{wrapper}, {unit}")]
    if len(facts["files"]) > 1:
        rows.append(("files", f"{len(facts['files'])}: {', '.join(Path(file).name for file in facts['files'])}"))
    if "task" in facts:
        rows.append(("made for", in_words(facts["made_for"] or "no task that could be told")))
        rows.append(("names", f"as in {facts['software']}"))
        rows += facts["summary"].items()
        if facts["assumed"]:
            rows.append(("no config", f"inferred from the tensors; assumed: {'; '.join(facts['assumed'])}"))
    for line in table(rows, longest=LONGEST):
        out(line)
    if not brief:
        out("")
        cells = [
            (t["name"], "x".join(map(str, t["shape"])) or "()", t["dtype"], f"{t['numbers']:,}")
            for t in facts["tensors"]
        ]
        for line in table([("tensor", "shape", "dtype", "numbers"), *cells], right=(3,)):
            out(line)
    out("")
    out(f"{len(facts['tensors']):,} tensors, {facts['numbers']:,} numbers")
    _print_fit(facts)


def _print_fit(facts: dict[str, Any]) -> None:
    if "error" in facts:
        out(f"does not fit: {one_line(facts['error'])}")
        return
    from ..task_table import in_words

    out(f"checked for {in_words(facts['task'])}, a model of {facts['parameters']:,} parameters")
    for kind, comment in (
        ("missing", "tensors that the model needs"),
        ("mismatched", "tensors of another shape"),
        ("unexpected", "tensors that the model has no place for"),
    ):
        if facts[kind]:
            out(f"{kind}: {len(facts[kind])} {comment}")
            for tensor in facts[kind]:
                out(f"  {one_line(tensor)}")
    if facts["fits"]:
        out("everything fits")


def _product(shape: tuple[int, ...]) -> int:
    from ..checkpoint.formats.lazy_tensors import count

    return count(shape)
