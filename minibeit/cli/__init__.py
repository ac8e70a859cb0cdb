"""The command line: one module per command, each with `HELP`, `add_arguments(parser)` and `run(args) -> exit code`.

A command module imports what it computes with inside its functions, so that `minibeit --help` is quick.
Exit codes: 0 all is well, 1 an input could not be used, 2 the command was called wrongly, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from .terminal import UsageError, note, one_line

# The modules of this folder that are commands, in the order of the help.
COMMANDS = (
    "classify",
    "segment",
    "features",
    "mask",
    "inspect",
    "convert",
    "verify",
    "models",
    "download",
    "bench",
    "warmup",
)

DEBUG_HELP = "show the traceback of an error"
DESCRIPTION = "BEiT on a CPU without a deep-learning framework: classify and segment pictures, look into checkpoints."
EPILOG = """\
examples:
  minibeit classify photo.jpg                            what is it? (the shipped model reads handwritten digits)
  minibeit classify holiday/ --model DIR --csv           a folder of pictures, by a checkpoint of your own
  minibeit segment street.jpg --model DIR --output out   a class for every pixel, as pictures
  minibeit inspect DIR                                   what is in a checkpoint, and does it fit together?

`minibeit COMMAND --help` explains a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; no error of a user's making shows a traceback without --debug."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # one line for an unreachable Hub instead of all its retries
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        _parser(None).print_help(sys.stderr)
        return 2
    try:
        args = _parser(next((word for word in words if not word.startswith("-")), None)).parse_args(words)
    except SystemExit as exit:  # argparse has said why, or shown the help
        return exit.code if isinstance(exit.code, int) else 2
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(args)


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of `command` alone, or where it is none, one with what the help lists of them all."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="minibeit",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minibeit {__version__}")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in (command,) if command in COMMANDS else COMMANDS:
        module = import_module(f".{name}", __name__)
        description = getattr(module, "DESCRIPTION", module.HELP)
        sub = subparsers.add_parser(
            name, help=module.HELP, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == command:
            module.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP)
            sub.set_defaults(run=module.run)
    return parser


def _run(args: argparse.Namespace) -> int:
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed(args, "interrupted", 130)
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # what is still buffered has nowhere to go, at exit neither
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(args, "the reader of the output has gone (broken pipe)", 1)
    except UsageError as error:
        return _failed(args, str(error), 2)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        return _failed(args, f"{error.filename}: {error.strerror}" if named else str(error), 1)
    except (ValueError, TypeError, ImportError) as error:
        return _failed(args, str(error) or type(error).__name__, 1)
    except MemoryError as error:
        return _failed(args, f"not enough memory ({error}); try a smaller --batch-size or smaller pictures", 1)
    except Exception as error:
        return _failed(args, f"{type(error).__name__}: {error} (--debug shows where; this may be a bug of minibeit)", 1)


def _failed(args: argparse.Namespace, message: str, code: int) -> int:
    with suppress(BrokenPipeError):
        if args.debug:
            traceback.print_exc()
        note(f"error: {message}")
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    kind = "warning" if issubclass(category, UserWarning) else category.__name__
    note(f"{kind}: {one_line(message)}")
