"""`minibeit warmup`: compile the kernels of the fast backend before they are needed."""

from __future__ import annotations

import argparse

from .terminal import out

HELP = "compile the fast kernels now, so that the next run need not"
EXAMPLES = """\
  minibeit warmup
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Has no options."""


def run(args: argparse.Namespace) -> int:
    from ..ops import numba_cpu

    out(f"the kernels of the numba backend are ready, after {numba_cpu.warmup():.1f} s")
    return 0
