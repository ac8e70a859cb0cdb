"""Which fast op is it?  The backend's ops are switched on one at a time, everything else being NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..ops import BACKENDS
from ..ops.table import TABLE, served_by
from .lockstep import Job, Report, check, model_source
from .networks import network


@dataclass
class Suspect:
    """What came out with one fast op switched on."""

    op: str
    report: Report

    @property
    def worst_ratio(self) -> float:
        return max((row.own_ratio for row in self.report.rows if row.own is not None), default=float("nan"))


def fast_ops(backend: str) -> list[str]:
    """The ops that a backend has of its own, without those that are no arithmetic."""
    if BACKENDS[backend] is None:
        raise ValueError(f"backend {backend} is NumPy itself: there is no fast op to switch on")
    return [name for name in served_by(backend) if TABLE[name].is_arithmetic]


def bisect(
    job: Job,
    backend: str,
    leave_out: Any = (),
    progress: Callable[[Suspect], Any] | None = None,
    device: int | None = None,
) -> list[Suspect]:
    """One check per fast op; the guilty ones are those whose report is not ok."""
    suspects = []
    for op in fast_ops(backend):
        model = network(job.config, job.task, job.arrays, backend=backend, only={op}, device=device)
        source = model_source(job, model, f"minibeit, {op} of {backend} alone", leave_out)
        suspects.append(Suspect(op, check(job, source, leave_out=leave_out)))
        if progress is not None:
            progress(suspects[-1])
    return suspects
