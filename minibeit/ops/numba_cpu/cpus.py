"""How many CPUs this process may use: those of its affinity mask, and no more than its control group has time for."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ...machine import GROUPS, MEMBERSHIP, control_groups


def usable_cpus() -> int:
    """CPUs that may work for this thread at the same time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _own_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


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
