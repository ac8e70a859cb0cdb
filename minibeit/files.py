"""Files are written beside their place and renamed into it, so that nobody ever sees half of one.

A process that is killed while it writes leaves its temporary file behind.  Such files are called
`.minibeit-HOST-PID-RANDOM.tmp` and are locked by whoever writes them; the next process that writes into the folder
removes those that nobody holds.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that someone has open cannot be removed
    fcntl = None  # type: ignore[assignment]

MARK, END = ".minibeit-", ".tmp"
STALE = 24 * 3600  # seconds after which a temporary of another host, whose locks may not be seen here, is given up
# Errors of writing, which come without the name of the file.
_NAMELESS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EPIPE, getattr(errno, "EDQUOT", errno.ENOSPC))
_MOST_LINKS, _MOST_FOLDERS = 40, 1000
_cleaned: set[Path] = set()  # folders this process has looked through


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends well, and vanishes when it raises.

    The temporary file stands in the same folder, since a rename is atomic only within one file system.  A symbolic link
    stays one, its target is replaced; a file that is replaced hands its permissions on.  A pipe or a device gets the
    bytes when they are complete.
    Raises OSError that names `path`, never the temporary file.
    """
    target = _target(path)
    if target is None:
        with _through(path) as file:
            yield file
        return
    with _naming(path), _temporary_file(target.parent, path) as (temporary, file):
        yield file
        file.flush()
        with suppress(OSError):  # the file that was there may belong to somebody else
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode) & 0o777)
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()
        os.replace(temporary, target)


@contextmanager
def scratch_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `path`, in the same file system, for what is to become `path`; removed at the end.

    Raises OSError that names `path`.
    """
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
    """Raises OSError, naming `path`, where `atomic_write(path)` would fail: no folder, no permission, no space.

    Of folders that are yet to be made the nearest one that exists is tried.  Nothing is left behind.
    """
    target = _target(path)
    if target is None:
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with _naming(path), _temporary_file(folder, path) as (_, file):
        file.write(b"\0")
        file.flush()


def identity(path: str | os.PathLike[str]) -> Any:
    """Equal for two paths that lead to one file, also by links and on file systems that ignore case."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def mapped_file(array: Any) -> mmap.mmap | None:
    """The file that an array is a read-only view of; None for any other array.

    Pages of such a file may be dropped, they are read again when needed; a private copy would lose what was written.
    """
    base = array
    while hasattr(base, "flags") or isinstance(base, memoryview):
        if not base.readonly if isinstance(base, memoryview) else base.flags.writeable:
            return None
        base = base.obj if isinstance(base, memoryview) else base.base
    return base if isinstance(base, mmap.mmap) else None


def _target(path: str | os.PathLike[str]) -> Path | None:
    """The file that a rename may replace; None for a pipe, a device, and what the system shows under /dev or /proc."""
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


@contextmanager
def _through(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file whose bytes go to a pipe or a device at the end."""
    import tempfile  # rarely needed

    with tempfile.TemporaryFile() as file:
        yield file  # type: ignore[misc]
        file.seek(0)
        with _naming(path), open(path, "wb") as special:
            shutil.copyfileobj(file, special)


@contextmanager
def _temporary_file(folder: Path, path: str | os.PathLike[str]) -> Iterator[tuple[Path, BinaryIO]]:
    """(path, open file) of a new file with the permissions of any new file; removed at the end if it is still there."""
    _clean(folder)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        temporary = folder / _name()
        descriptor = os.open(temporary, flags, 0o666)
        if _mine(descriptor, temporary):
            break
    try:
        with os.fdopen(descriptor, "w+b") as file:
            try:
                yield temporary, file
            except OSError as error:
                if error.filename is None and error.errno in _NAMELESS:
                    raise OSError(error.errno, error.strerror, os.fspath(path)) from None
                raise
    finally:
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about temporary files become errors about `path`, which the user knows."""
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
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _mine(descriptor: int, path: Path) -> bool:
    """Locks a new temporary until it is closed or the process ends, however it ends.

    False, and closed, where somebody who cleans up came between its creation and the lock.
    """
    if fcntl is None:
        return True
    with suppress(OSError):  # a file system without locks, on which nobody cleans up either
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with suppress(OSError):
        if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
            return True
    os.close(descriptor)
    return False


def _held(descriptor: int) -> bool:
    """Whether somebody holds an open temporary; if not, we do from now on."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # or the file system has no locks
        return True
    return False


def _clean(folder: Path) -> None:
    """Removes what killed processes left in `folder`, once for each folder; never what somebody is writing."""
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
