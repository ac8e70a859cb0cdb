"""The command line as a program: `minibeit`, or `python -m minibeit`."""

from __future__ import annotations

import sys
from typing import NoReturn

INTERRUPTED = 130


def program() -> NoReturn:
    """Runs the command that `sys.argv` names.  From its first moment to its last, Ctrl-C shows no traceback."""
    code = INTERRUPTED
    try:
        from .cli import main

        code = main()
    except KeyboardInterrupt:  # while the command line was being imported, or while it said its last words
        print("minibeit: error: interrupted", file=sys.stderr)
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is Python's own end
    sys.exit(code)


if __name__ == "__main__":
    program()
