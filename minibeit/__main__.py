"""The command line as a program: `minibeit`, or `python -m minibeit`."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 130
AGAIN, INSIST = 0.02, 0.8  # seconds
# Python's import system holds a lock in code that an interrupt leaves without letting go, and finalisers swallow it.
UNSAFE_FILES, UNSAFE_NAMES = "<frozen importlib", ("__del__", "_remove", "cb")


def program() -> NoReturn:
    """Runs the command that `sys.argv` names.  From its first moment to its last, Ctrl-C shows no traceback."""
    code = INTERRUPTED
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background job ignores it
    try:
        if listens:
            _raise_where_it_is_safe()
        from .cli import main

        code = main()
    except KeyboardInterrupt:  # while the command line was being imported, or while it said its last words
        print("minibeit: error: interrupted", file=sys.stderr)
    if listens:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is Python's own end
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    sys.exit(code)


def _raise_where_it_is_safe() -> None:
    """Ctrl-C becomes a KeyboardInterrupt, a moment later where Python would lose it or be left with a lock held.

    It comes again until the program ends: some libraries drop whatever is raised while they look for something.
    """
    if not hasattr(signal, "setitimer"):
        return
    told = sys.unraisablehook

    def interrupt(number: int, frame: Any) -> None:
        code = frame.f_code if frame else None
        if code and (code.co_filename.startswith(UNSAFE_FILES) or code.co_name in UNSAFE_NAMES):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            signal.setitimer(signal.ITIMER_REAL, INSIST)
            raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            told(lost)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGALRM, interrupt)
    sys.unraisablehook = unraisable


if __name__ == "__main__":
    program()
