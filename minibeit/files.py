"""Files are written beside their place and renamed into it, so that nobody ever sees half of one."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary file that becomes `path` when the block ends well, and vanishes when it raises.

    The temporary file stands in the same folder, since a rename is atomic only within one file system.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600, a plain open() honours the umask
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
