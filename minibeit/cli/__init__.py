"""The command line: one module per command, each with `HELP`, `EXAMPLES`, `add_arguments(parser)` and `run(args)`.

A command module imports what it needs to compute inside its functions, so that `minibeit --help` is quick.
Exit codes: 0 success, 1 an input could not be used, 2 wrong usage, 130 interrupted.  A command for which 1 is an
answer, as a failed check, sets the default `unusable` of its arguments to another code for inputs.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ..text import one_line
from . import ranks
from .terminal import OutputError, UsageError, flush, give_up_output, note, out, show_traceback

# The modules of this folder that are commands, in the order of the help.
COMMANDS = (
    "classify",
    "finetune",
    "pretrain",
    "dvae",
    "segment",
    "evaluate",
    "compare",
    "explore",
    "features",
    "mask",
    "tokenize",
    "inspect",
    "convert",
    "verify",
    "models",
    "download",
    "bench",
    "warmup",
    "completion",
)

INTERRUPTED = 130
DEBUG_HELP = "show the traceback of an error"
DESCRIPTION = "BEiT without a deep-learning framework: classify and segment images, fine-tune and inspect checkpoints."
EPILOG = """\
examples:
  minibeit classify {digits}
                                                         the included model reads the included handwritten digits
  minibeit classify photo.jpg --model microsoft/beit-base-patch16-224
                                                         what does it show? (needs the extra "hub", or a local folder)
  minibeit classify holiday/ --model DIR --csv           a folder of images, with a checkpoint of your own
  minibeit segment street.jpg --model DIR --output out   a class for every pixel, drawn as images
  minibeit inspect DIR                                   what is in a checkpoint, and does it fit together?
  minibeit --version --verbose                           what to include in a bug report

`minibeit COMMAND --help` explains a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; errors caused by the user show a traceback only with --debug."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _environment():
            return _main(words)
    except KeyboardInterrupt:  # before or after the command itself
        note("error: interrupted")
        return INTERRUPTED


def _main(words: list[str]) -> int:
    if not words:
        _parser(None).print_help(sys.stderr)
        return 2
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        note(f"error: there is no command {command!r}; {_hint(command)}minibeit --help lists all")
        return 2
    try:
        args = _parser(command).parse_args(words)
    except SystemExit as exit:  # argparse has said why, or shown the help
        with suppress(OutputError):
            flush()
            return exit.code if isinstance(exit.code, int) else 2
        give_up_output()
        return 1
    quiet = getattr(args, "quiet", args.command is None)
    with warnings.catch_warnings(), nullcontext() if quiet else _log_on_stderr():
        warnings.showwarning = _show_warning
        return _run(args)


def _hint(command: str) -> str:
    from ..errors import nearest

    near = nearest(command, COMMANDS)
    return f"did you mean {near[0]}? " if near else ""


@contextmanager
def _environment() -> Iterator[None]:
    """Changes to the process for the command line, undone at the end for programs that call `main`."""
    before = os.environ.get("HF_HUB_VERBOSITY")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # one line for an unreachable Hub instead of all its retries
    streams = [(s, s.errors) for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    for stream, _ in streams:  # a name that the terminal cannot show must not end the run
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in streams:
            with suppress(OSError, ValueError):  # closed, or its reader has gone
                stream.reconfigure(errors=errors)
        if before is None:
            os.environ.pop("HF_HUB_VERBOSITY", None)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose error messages contain no control characters."""

    def error(self, message: str) -> NoReturn:
        if ranks.rank():  # every rank was given these words, and the first says what is wrong with them
            sys.exit(2)
        super().error(one_line(message))


class _WithRoom(argparse.RawDescriptionHelpFormatter):
    """Help in which the longest command stands beside its explanation; argparse forgets that commands are indented."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._action_max_length = max(map(len, COMMANDS)) + 4


def whole_parser() -> argparse.ArgumentParser:
    """The parser with all commands and their arguments."""
    return _parser(None, arguments=COMMANDS)


def _parser(command: str | None, arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser with `command` alone, or if that is no command, with the help of all of them.

    Of the commands in `arguments` it has the arguments as well.
    """
    parser = _Parser(
        prog="minibeit",
        description=DESCRIPTION,
        epilog=None if command in COMMANDS else EPILOG.format(digits=_shipped_images()),
        formatter_class=_WithRoom,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("--verbose", action="store_true", help="with --version: also CPU, libraries and folders")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    parser.set_defaults(run=_version, unusable=1)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name in (command,) if command in COMMANDS else COMMANDS:
        module = import_module(f".{name}", __name__)
        sub = subparsers.add_parser(
            name,
            help=module.HELP,
            description=getattr(module, "DESCRIPTION", module.HELP),
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command or name in arguments:
            module.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP)
            sub.set_defaults(run=module.run)
    return parser


def _shipped_images() -> str:
    """The folder of the shipped images, relative to the working directory if possible."""
    import shlex

    from ..catalogue import weights_folder

    try:
        folder = str(weights_folder() / "digits" / "images")
    except FileNotFoundError:  # an installation without them says so when they are needed
        return "digits/"
    return shlex.quote(os.path.relpath(folder) if Path(folder).is_relative_to(Path.cwd()) else folder)


def _version(args: argparse.Namespace) -> int:
    if not args.version:
        raise UsageError("expected a command; `minibeit --help` lists them")
    from .. import __version__

    if not args.verbose:
        out(f"minibeit {__version__}")
        return 0
    from .about import about

    for line in about():
        out(line)
    return 0


def _run(args: argparse.Namespace) -> int:
    try:
        code = args.run(args)
        flush()
        return code
    except KeyboardInterrupt:
        return _failed(args, "interrupted", INTERRUPTED)
    except OutputError as error:
        give_up_output()
        return 1 if error.gone else _failed(args, str(error), 1)
    except UsageError as error:
        return _failed(args, str(error), 2)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        return _failed(args, f"{error.filename}: {error.strerror}" if named else str(error), args.unusable)
    except (ValueError, TypeError, ImportError) as error:
        return _failed(args, str(error) or type(error).__name__, args.unusable)
    except MemoryError as error:
        message = f"not enough memory ({error}); try a smaller --batch-size or smaller images"
        return _failed(args, message, args.unusable)
    except Exception as error:
        message = f"{type(error).__name__}: {error} (--debug shows where; this may be a bug of minibeit)"
        return _failed(args, message, args.unusable)


def _failed(args: argparse.Namespace, message: str, code: int) -> int:
    if _interrupted(sys.exc_info()[1]):
        message, code = "interrupted", INTERRUPTED
    if args.debug:
        show_traceback()
    ranks.wait_for_the_first()
    note(f"error: {message}" if ranks.rank() == 0 else f"error: rank {ranks.rank()}: {message}")
    ranks.end_all(code)
    return code


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error was caused by Ctrl-C: Python before 3.12 replaces the interrupt while it creates a class."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    kind = "warning" if issubclass(category, UserWarning) else category.__name__
    note(f"{kind}: {one_line(message)}")


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Context in which what the package logs is shown as notes."""
    import logging  # not for --help and --version

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    logger, handler = logging.getLogger("minibeit"), Notes()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
