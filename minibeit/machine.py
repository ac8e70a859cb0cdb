"""The memory of this machine, and what the control groups around this process leave of it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

MEMBERSHIP, GROUPS, MEMORY = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/meminfo")


def control_groups(controller: str, membership: Path = MEMBERSHIP, root: Path = GROUPS) -> Iterator[Path]:
    """Folders that may hold the limits of this process's control groups and of those around them.

    `membership` is a file like /proc/self/cgroup, `root` a folder like /sys/fs/cgroup.  Version 2 has one hierarchy,
    version 1 one for each controller ("cpu", "memory").  Within a container some of the folders are not to be seen.
    Source: the Linux kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/cgroups.rst.
    """
    try:
        lines = membership.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        yield from (mount / folder for folder in (group, *group.parents) for mount in mounts)


def available_memory(swap: bool = False) -> int | None:
    """The bytes that this process can still have: of the machine's without swapping, or with `swap` by swapping, and no
    more than its control groups allow.  None where the system does not tell.

    macOS tells only how much memory it has in all.
    """
    found = [
        _of_windows() if sys.platform == "win32" else _of_the_system(swap),
        *map(_left_in, control_groups("memory")),
    ]
    return min((size for size in found if size is not None), default=None)


def _of_the_system(swap: bool) -> int | None:
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
        names = ("MemAvailable", "SwapFree") if swap else ("MemAvailable",)
        return sum(int(lines[name].split()[0]) * 1024 for name in names)
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in(group: Path) -> int | None:
    """What a control group's limit leaves; cached files count as free.  None where there is no limit."""
    for limit, used, prefix in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
        with suppress(OSError, ValueError):
            most, now = (int((group / f"memory.{name}").read_text()) for name in (limit, used))
            cached = 0
            with suppress(OSError, ValueError):
                lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = sum(int(lines.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            return max(0, most - now + cached)
    return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "most_pages", "pages", "space", "left", "more")),
    ]


def _of_windows() -> int | None:
    status = _MemoryStatus(size=ctypes.sizeof(_MemoryStatus))
    told = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined, unused-ignore]
    return status.available if told else None
