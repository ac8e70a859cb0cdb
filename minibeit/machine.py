"""The memory and the CPUs of this machine, and what the control groups around this process leave of them."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
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


def usable_cpus() -> int:
    """CPUs that may work for this thread at the same time: those of its affinity mask, and no more than its control
    groups have time for."""
    count, quota = len(own_cpus()), _own_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def own_cpus() -> frozenset[int]:
    """The numbers of the CPUs that this process may run on; all of the machine where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@lru_cache(maxsize=1)
def _own_quota() -> float | None:
    return cpu_quota()


def cpu_quota(membership: Path = MEMBERSHIP, root: Path = GROUPS) -> float | None:
    """CPUs that the control groups of this process and those around them pay for; None if that is not limited.

    Version 2 has `cpu.max` ("max 100000" or "150000 100000"), version 1 `cpu.cfs_quota_us` (-1: none).
    Source: the Linux kernel's Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
    """
    quotas = [quota for group in control_groups("cpu", membership, root) for quota in _quota(group)]
    return min(quotas, default=None)


def _quota(folder: Path) -> list[float]:
    """The quota that stands in a group's folder, if there is one."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        return [] if quota == "max" else [int(quota) / int(period)]
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return [int(quota) / int(period)] if int(quota) > 0 else []
    return []


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
