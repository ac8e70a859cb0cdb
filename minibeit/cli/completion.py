"""`minibeit completion`: the script with which a shell completes minibeit's words."""

from __future__ import annotations

import argparse
from typing import Any

from .terminal import out

HELP = "print the script with which a shell completes commands, options and files"
DESCRIPTION = """\
Prints a script for a shell, which then completes commands, options, their choices and the names of files.

It needs shtab (pip install "minibeit[completion]"), the script itself needs nothing.
"""
EXAMPLES = """\
  minibeit completion bash > ~/.local/share/bash-completion/completions/minibeit
  minibeit completion zsh > ~/.zfunc/_minibeit
"""
SHELLS = ("bash", "zsh")
FILES = ("FILE", "DIR", "FOLDER", "IMAGE", "PNG", "DATA", "CHECKPOINT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")


def run(args: argparse.Namespace) -> int:
    from . import whole_parser

    try:
        import shtab
    except ImportError:
        raise ImportError('completion needs shtab: pip install "minibeit[completion]"') from None
    parser = whole_parser()
    _mark_files(parser, shtab.FILE)
    out(shtab.complete(parser, shell=args.shell))
    return 0


def _mark_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Marks the arguments of all commands that are names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_files(command, files)
        elif isinstance(action.metavar, str) and any(word in action.metavar for word in FILES):
            action.complete = files  # type: ignore[attr-defined]
