"""Compiled kernels on disk.  What lies there is run, so only files are read that nobody else can have written.

The folder and all above it, up to the user's home or the root, must belong to the user or to root and be writable by
nobody else.  Where that is not so, or nothing can be written, each process compiles for itself and says so once.
Windows keeps other users out of a home by means that are not looked at here: its folders are taken as they are.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import llvmlite

from .target import target

_DIGEST_BYTES = 32
_LONGEST_WAIT = 120.0  # seconds for another process that compiles; then both do
_NEW = ".new-"  # what is being written; a killed process leaves it behind
_LEFT_BEHIND = 3600.0  # seconds after which nobody writes to it any more
_SAFELY = sum(getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_OWNERS_ARE_KNOWN = hasattr(os, "geteuid")

# Settings of numba that change no machine code; of all others each value has a folder of its own.
_HARMLESS = ("NUMBA_CACHE_", "NUMBA_CUDA_", "NUMBA_NUM_THREADS", "NUMBA_DEFAULT_NUM_THREADS", "NUMBA_THREADING_LAYER")

_complained = False


class _Unusable(Exception):
    """Why a folder is not used."""


def notice(text: str, end: str = "\n") -> None:
    """Writes to stderr, whose loss is no reason to fail."""
    with suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)


@lru_cache(maxsize=1)
def folder() -> Path | None:
    """The folder of the compiled kernels, made if need be; None, which is said once, where there is none to trust.

    It lies under NUMBA_CACHE_DIR, else in the user's cache folder.  A relative NUMBA_CACHE_DIR (or XDG_CACHE_HOME) is
    ignored: each working directory would get a cache of its own.
    """
    base = _base()
    if base is None:
        _complain("there is no home folder")
        return None
    place = Path(os.path.realpath(base)) / f"kernels-{fingerprint()[:16]}"
    try:
        _make(place)
    except _Unusable as reason:
        _complain(str(reason))
    except OSError as error:
        _complain(_reason(error, place))
    else:
        return place
    return None


def read(name: str) -> bytes | None:
    """The machine code in the file `name`; None if there is none that is whole, of this folder and safe to run."""
    place = folder()
    if place is None:
        return None
    try:
        with open(place / name, "rb", opener=_open_own) as file:
            content = file.read()
    except OSError:
        return None
    code = content[_DIGEST_BYTES:]
    return code if _digest(name, code) == content[:_DIGEST_BYTES] else None


def write(name: str, code: bytes) -> None:
    """Keeps machine code in the file `name`; where that fails it says so once, and leaves nothing behind."""
    import tempfile

    place = folder()
    if place is None:
        return
    try:
        descriptor, temporary = tempfile.mkstemp(dir=place, prefix=_NEW)
        try:
            os.chmod(temporary, 0o600)  # mkstemp's mode, less what the umask takes away
            with os.fdopen(descriptor, "wb") as file:
                file.write(_digest(name, code) + code)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, place / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sweep(place)
    except OSError as error:
        _complain(_reason(error, place))


@contextmanager
def alone() -> Iterator[None]:
    """Within the block no other process is in such a block, unless one stays for minutes or there are no locks here.

    The system drops the lock of a process that is killed.
    """
    place = folder()
    with ExitStack() as stack:
        if place is not None:
            with suppress(OSError, ImportError):  # a system without locks of files
                _wait_for(stack.enter_context(open(place / "lock", "ab", opener=_open_own)).fileno())
        yield


def _base() -> Path | None:
    chosen = os.environ.get("NUMBA_CACHE_DIR", "")
    if os.path.isabs(chosen):
        return Path(chosen)
    home = _home()
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA", os.path.join(home, "AppData", "Local"))
    elif sys.platform == "darwin":
        caches = os.path.join(home, "Library", "Caches")
    else:
        caches = os.environ.get("XDG_CACHE_HOME", "")
        caches = caches if os.path.isabs(caches) else os.path.join(home, ".cache")
    return Path(caches) / "minibeit" if os.path.isabs(caches) else None


def _home() -> str:
    home = os.path.expanduser("~")  # stays "~" where neither HOME nor the system knows of one
    return home if os.path.isabs(home) else ""


def _make(folder: Path) -> None:
    """Makes the folder and what it lies in, where missing; raises _Unusable for what others could change.

    It looks from above down, so that nobody can exchange what has been looked at.  No link is left in the path.
    """
    home = Path(os.path.realpath(_home() or "/"))
    steps = [*reversed(folder.parents), folder]
    shared = False  # whether all users can make folders in one of them, if not remove those of others
    for step in steps[steps.index(home) :] if home in steps else steps:
        try:
            status = os.lstat(step)
        except FileNotFoundError:
            with suppress(FileExistsError):  # by another process, just now
                os.mkdir(step, 0o700)
                os.chmod(step, 0o700)  # whatever the umask takes away
            status = os.lstat(step)
        if not stat.S_ISDIR(status.st_mode):
            raise _Unusable(f"{str(step)!r} is no folder")
        if _OWNERS_ARE_KNOWN:
            _check_owner(step, status)
            shared = shared or bool(status.st_mode & 0o022)
    if shared and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
        raise _Unusable(f"{str(folder)!r} lies where all users can write and is not yours alone, as chmod 700 makes it")


def _check_owner(step: Path, status: os.stat_result) -> None:
    """Others may have no more rights to a folder than to the system's folder for temporary files."""
    if status.st_uid not in (os.geteuid(), 0):
        raise _Unusable(f"{str(step)!r} belongs to another user, number {status.st_uid}")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise _Unusable(f"other users can write to {str(step)!r}, until chmod go-w")


def _open_own(path: str, flags: int) -> int:
    """Opens a file of the user or of root that nobody else can write to, under this name or another."""
    descriptor = os.open(path, flags | _SAFELY, 0o600)
    status = os.fstat(descriptor)
    safe = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if _OWNERS_ARE_KNOWN:
        safe = safe and status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022
    if not safe:
        os.close(descriptor)
        raise PermissionError(f"{path} may have been written by others")
    return descriptor


def _wait_for(lock: int) -> None:
    """Takes the lock; returns without it after a while, and where the file system has none."""
    end = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < end:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by a forked child
            return
        except (BlockingIOError, PermissionError):
            time.sleep(0.02)


def _sweep(place: Path) -> None:
    """Removes what killed processes did not finish."""
    for left in place.glob(f"{_NEW}*"):
        with suppress(OSError):
            if left.lstat().st_mtime < time.time() - _LEFT_BEHIND:
                left.unlink()


def _complain(reason: str) -> None:
    global _complained
    if not _complained:
        _complained = True
        notice(
            f"minibeit: no kernels are kept on disk ({reason}), so that each process makes its own; "
            "set NUMBA_CACHE_DIR to the absolute path of a folder that only you can write to."
        )


def _reason(error: OSError, place: Path) -> str:
    return f"{str(place)!r}: {error.strerror or error}"


def _digest(name: str, code: bytes) -> bytes:
    """Of the code and of what it is: a file copied to another name, CPU or version is no kernel of that."""
    return hashlib.sha256(f"{fingerprint()} {name}\n".encode() + code).digest()


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """A digest of all that machine code depends on besides its kernel's file (see `Kernel`), in hexadecimal digits.

    The backend's sources (kernels take constants from the modules that run them), the versions of Python and of the
    compiler, the target, and numba's settings.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    triple, *cpu = target()
    system = re.sub(r"(darwin|macosx?)[\d.]+", r"\1", triple)  # each update of macOS has a number of its own
    versions = sys.version_info[:3], sys.implementation.name, _numba_version(), llvmlite.__version__
    digest.update(repr((versions, system, cpu, _settings())).encode())
    return digest.hexdigest()


def _settings() -> list[object]:
    """What the environment and the file that numba looks for in the working directory tell the compiler."""
    names = sorted(name for name in os.environ if name.startswith("NUMBA_") and not name.startswith(_HARMLESS))
    settings: list[object] = [(name, os.environ[name]) for name in names]
    with suppress(OSError):
        file = Path(".numba_config.yaml")
        settings.append(file.read_bytes() if file.is_file() else b"")
    return settings


def _numba_version() -> bytes:
    """The file in which numba keeps its version, or where it is installed: read without importing it."""
    spec = find_spec("numba")
    if spec is None or spec.origin is None:
        return b""
    version = Path(spec.origin).with_name("_version.py")
    return version.read_bytes() if version.is_file() else spec.origin.encode()
