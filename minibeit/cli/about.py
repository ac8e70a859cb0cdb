"""What a bug report should contain: `minibeit --version --verbose`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

LIBRARIES = ("numpy", "numba", "llvmlite", "pillow", "safetensors", "tqdm")
EXTRAS = ("huggingface_hub", "shtab", "torch", "transformers", "cupy-cuda12x", "cupy-cuda13x")
SETTINGS = ("MINIBEIT_", "NUMBA_", "OMP_", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")


def about() -> Iterator[str]:
    """One fact per line, or the reason why it cannot be determined."""
    from .. import __version__

    yield f"minibeit {__version__} in {Path(__file__).resolve().parents[1]}"
    yield f"Python {platform.python_version()} ({platform.python_implementation()}), {platform.platform()}"
    yield f"CPU: {_said(_cpu)}"
    yield f"threads: {_said(_threads)} of {os.cpu_count()} cores"
    yield f"memory: {_said(_memory)}"
    yield f"backend: {_said(_backend)}"
    yield f"compiled for: {_said(_target)}"
    yield f"compiled kernels: {_said(_kernels)}"
    yield f"libraries: {', '.join(_versions(LIBRARIES, missing=True))}"
    yield f"extras: {', '.join(_versions(EXTRAS)) or 'none'}"
    found = sorted(key for key in os.environ if key.startswith(SETTINGS) and "TOKEN" not in key)
    yield f"environment: {', '.join(f'{key}={os.environ[key]}' for key in found) or 'nothing set'}"


def _said(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as error:  # bug reports come from machines on which something is broken
        return f"cannot be told ({type(error).__name__}: {error})"


def _cpu() -> str:
    from ..bench.measure import cpu_name

    return cpu_name()


def _threads() -> str:
    from ..ops.numba_cpu.pool import default_num_threads

    return str(default_num_threads())


def _memory() -> str:
    from ..machine import available_memory

    found = available_memory()
    return "not told by this system" if found is None else f"{found / 1e9:.1f} GB can be had"


def _target() -> str:
    from ..ops.numba_cpu.target import TILE, target

    triple, name, _ = target()
    return f"{name} ({triple}), tile {TILE.name} {TILE.rows}x{TILE.columns}"


def _backend() -> str:
    from ..ops import default_backend

    return default_backend()


def _kernels() -> str:
    from ..ops.numba_cpu import cache

    folder = cache.folder()
    return "no folder is safe to keep them in" if folder is None else str(folder)


def _versions(names: tuple[str, ...], missing: bool = False) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            if missing:
                yield f"{name} missing"
