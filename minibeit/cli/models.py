"""minibeit models: the published checkpoints that the manifest knows."""

from __future__ import annotations

import argparse
from typing import Any

from .terminal import note, out, print_json, table

HELP = "list the published checkpoints: task, size, parameters, labels, licence"
DESCRIPTION = """\
Lists the published checkpoints.  Those on the Hub can be used by their id, --model ID; for those published as a file,
`minibeit download ID` says where it is.  MB is the size in float32, the dtype of nearly all published files.
"""
EXAMPLES = """\
  minibeit models
  minibeit models large imagenet-1k
  minibeit models ade --json
"""
COLUMNS = ("id", "task", "size", "pixels", "parameters", "MB", "labels", "licence", "from")
SEARCHED = ("id", "task", "size", "labels")
BYTES = 4  # of a float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", help="show only those with all of these words in id, task, size or labels, in any case"
    )
    parser.add_argument("--json", action="store_true", help="print all that the manifest holds, as JSON")


def run(args: argparse.Namespace) -> int:
    from .. import catalogue

    rows = {id: _row(id, entry) for id, entry in catalogue.manifest().items()}
    words = [word.lower() for word in args.words]
    found = {id: row for id, row in rows.items() if all(word in _searched(row) for word in words)}
    if not found:
        near = catalogue.nearest(" ".join(args.words))
        note(f"no published checkpoint matches {' '.join(args.words)}{'; near are ' + ', '.join(near) if near else ''}")
    if args.json:
        print_json({id: entry for id, entry in catalogue.manifest().items() if id in found})
    elif found:
        for line in table([COLUMNS, *found.values()], right=(3, 4, 5)):
            out(line)
    return 0 if found else 1


def _searched(row: tuple[str, ...]) -> str:
    cells = dict(zip(COLUMNS, row))
    return " ".join(cells[column] for column in SEARCHED).lower()


def _row(id: str, entry: dict[str, Any]) -> tuple[str, ...]:
    count = entry["parameters"]
    size = f"{BYTES * count / 1e6:,.0f}"
    where = "file" if "file" in entry else "Hub"
    return (
        *(id, entry["task"], entry["size"], str(entry["image_size"]), f"{count:,}", size),
        *(entry["labels"] or "-", entry["license"], where),
    )
