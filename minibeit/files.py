"""Atomic writes: a file is written under a temporary name in its folder, then renamed, so it is never seen half done.

A process that is killed while writing leaves its temporary file behind.  Such files are called
`.minibeit-HOST-PID-RANDOM.tmp` and are locked while they are written; the next process that writes into the folder
removes those that are not locked.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .places import Address, place

if TYPE_CHECKING:
    import mmap

try:
    import fcntl
except ImportError:  # Windows, where a file that someone has open cannot be removed
    fcntl = None  # type: ignore[assignment]

MARK, END = ".minibeit-", ".tmp"
STALE = 24 * 3600  # seconds until another host's temporary, whose lock may be invisible here, counts as abandoned
# Errors of writing, which the system reports without a file name.
_NAMELESS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EPIPE, getattr(errno, "EDQUOT", errno.ENOSPC))
_MOST_LINKS, _MOST_FOLDERS = 40, 1000
_cleaned: set[Path] = set()  # folders that this process has cleaned


@contextmanager
def atomic_write(path: str | os.PathLike[str] | Address) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` if the block succeeds, and is removed if it raises.

    The temporary file is in the same folder, since a rename is atomic only within one file system.  A symbolic link
    is kept and its target replaced; the new file inherits the permissions of the one it replaces.  A pipe or a device
    gets the bytes once they are complete; so does an address.
    Raises OSError that names `path`, never the temporary file.
    """
    if isinstance(path, Address):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    target = _target(path)
    if target is None:
        with _through(path) as file:
            yield file
        return
    with _naming(path), _temporary_file(target.parent) as (temporary, file):
        yield file
        file.flush()
        with suppress(OSError):  # the replaced file may belong to another user
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode) & 0o777)
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        _replace(temporary, target)


@contextmanager
def scratch_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path`, in the same file system, for what will become `path`; removed at the end.

    Raises OSError that names `path`.
    """
    import shutil

    parent = Path(os.path.abspath(path)).parent
    with _naming(path):
        _clean(parent)
        while True:
            folder = parent / _name()
            os.mkdir(folder, 0o700)
            lock = None if fcntl is None else os.open(folder, os.O_RDONLY)
            if lock is None or _mine(lock, folder):
                break
    try:
        with _naming(path):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError, naming `path`, if `atomic_write(path)` would fail: no folder, no permission, no space.

    If folders have yet to be created, the nearest existing one is tried.  Leaves nothing behind.
    """
    target = _target(path)
    if target is None:
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with _naming(path), _temporary_file(folder) as (_, file):
        file.write(b"\0")
        file.flush()


def identity(path: Any) -> Any:
    """A value that is equal for two paths or addresses of the same file, also through links or with case ignored."""
    there = place(str(path))
    if isinstance(there, Address):
        return there.canonical
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def mapped_file(array: Any) -> mmap.mmap | None:
    """The memory map that an array is a read-only view of; None for any other array.

    Pages of such a map may be dropped: they are read from the file again.  In a writable map that would lose changes.
    """
    import mmap

    base = array
    while hasattr(base, "flags") or isinstance(base, memoryview):
        if not base.readonly if isinstance(base, memoryview) else base.flags.writeable:
            return None
        base = base.obj if isinstance(base, memoryview) else base.base
    return base if isinstance(base, mmap.mmap) else None


def _target(path: str | os.PathLike[str]) -> Path | None:
    """The file that a rename may replace; None for a pipe, a device, and anything under /dev or /proc."""
    place = Path(os.path.abspath(path))
    for _ in range(_MOST_LINKS):
        real = Path(os.path.realpath(place.parent)) / place.name
        if real.is_relative_to("/proc") or (real.is_relative_to("/dev") and not real.is_relative_to("/dev/shm")):
            return None
        if not real.is_symlink():
            break
        place = real.parent / os.readlink(real)
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    special = real.exists() and not real.is_file() and not real.is_dir()
    return None if special else real


def _replace(temporary: Path, target: Path) -> None:
    """Renames; Windows refuses to replace a file that a program has open or mapped, as a loaded model has its own."""
    try:
        os.replace(temporary, target)
    except PermissionError as error:
        if sys.platform != "win32" or not target.is_file():
            raise
        reason = "cannot be replaced while it is in use, as by a model that was loaded from it; write to another folder"
        raise PermissionError(error.errno, reason, os.fspath(target)) from None


@contextmanager
def _through(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file whose content is copied to a pipe or a device at the end."""
    import shutil
    import tempfile

    with tempfile.TemporaryFile() as file:
        yield file  # type: ignore[misc]
        file.seek(0)
        with _naming(path), open(path, "wb") as special:
            shutil.copyfileobj(file, special)


@contextmanager
def _temporary_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """(path, open file) of a new file with default permissions; removed at the end if it still exists."""
    _clean(folder)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        temporary = folder / _name()
        descriptor = os.open(temporary, flags, 0o666)
        if _mine(descriptor, temporary):
            break
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield temporary, file
    finally:
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors about temporary files into errors about `path`, which the user knows."""
    try:
        yield
    except OSError as error:
        named = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else ""
        temporary = any(part.startswith(MARK) for part in Path(named).parts)
        if not temporary and not (error.filename is None and error.errno in _NAMELESS):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _name() -> str:
    return f"{MARK}{_host()}-{os.getpid()}-{os.urandom(6).hex()}{END}"


def _host() -> str:
    import platform
    import zlib

    return f"{zlib.crc32(platform.node().encode()):08x}"


def _mine(descriptor: int, path: Path) -> bool:
    """Locks a new temporary file until it is closed or the process ends, even if killed.

    Closes it and returns False if another process cleaned it away before it was locked.
    """
    if fcntl is None:
        return True
    with suppress(OSError):  # a file system without locks; there nothing is cleaned up either
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with suppress(OSError):
        if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return True
    os.close(descriptor)
    return False


def _held(descriptor: int) -> bool:
    """Whether another process has locked an open temporary file; if not, locks it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # or the file system has no locks
        return True
    return False


def _clean(folder: Path) -> None:
    """Removes what killed processes left in `folder`, once per folder; never a file that is being written."""
    if folder in _cleaned:
        return
    if len(_cleaned) >= _MOST_FOLDERS:
        _cleaned.clear()
    _cleaned.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(MARK) and entry.name.endswith(END):
                with suppress(OSError):
                    _remove_if_abandoned(entry)


def _remove_if_abandoned(entry: os.DirEntry[str]) -> None:
    import shutil

    seen = entry.stat(follow_symlinks=False)
    folder = stat.S_ISDIR(seen.st_mode)
    if not folder and not stat.S_ISREG(seen.st_mode):
        return
    if hasattr(os, "getuid") and seen.st_uid != os.getuid():
        return
    if not entry.name.startswith(f"{MARK}{_host()}-") and time.time() - seen.st_mtime < STALE:
        return
    if fcntl is None:
        shutil.rmtree(entry.path) if folder else os.unlink(entry.path)
        return
    descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _held(descriptor):
            shutil.rmtree(entry.path) if folder else os.unlink(entry.path)
    finally:
        os.close(descriptor)
