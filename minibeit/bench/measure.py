"""Starts the processes: exports, then all contestants in turns, then each in separate processes."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import flops, gpu, low_precision, training
from .contestants import EXPORTED, FORWARD_PEERS, label, missing, version
from .profile import Entry
from .workloads import TASKS, Workload, write_checkpoint

AGREE = 1e-4  # relative RMS; float32 engines differ by some 1e-6 (segmentation 1e-5), bfloat16 by 1e-2
# Of gradients: through UPerNet's many ReLUs PyTorch float32 is 3.3e-4 from float64 at 512x512, minibeit 0.8e-4.
AGREE_TRAINED = 1e-3
SECONDS = 20.0  # of rounds, if their number is not given
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How to measure, the same for all workloads; `starts` is the number of fresh processes per contestant."""

    contestants: tuple[str, ...]
    threads: int
    repeats: int | None = None
    starts: int = 1
    explicit: bool = False  # the user named the peers: if one fails, that is an error
    seconds: float = SECONDS
    dtype: str = "float32"
    device: int | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return bool(set(self.contestants) & set(gpu.CONTESTANTS))


@dataclass
class Result:
    """What one contestant did on one workload."""

    name: str
    times: list[float]
    difference: float  # relative RMS from the first contestant's output
    peak_rss_bytes: int | None = None
    cold_starts: list[float] = field(default_factory=list)
    peak_device_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds per run."""
        return statistics.median(self.times)


@dataclass
class Table:
    """All results of one workload."""

    workload: Workload
    threads: int
    operations: int
    roofs: list[float]  # operations per second
    results: list[Result]
    skipped: list[str]
    dtype: str = "float32"

    @property
    def roof(self) -> float | None:
        """Median of the roofs measured between the contestants' turns."""
        return statistics.median(self.roofs) if self.roofs else None

    def rate(self, result: Result) -> float:
        """Operations per second, by the direct count."""
        return self.operations / result.median

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; times in seconds."""
        B = self.workload.batch_size
        return {
            **self.workload.to_dict(),
            "threads": self.threads,
            "dtype": self.dtype,
            "gflop": self.operations / 1e9,
            "roof_gflops": {"median": None, "best": None}
            if not self.roofs
            else {"median": statistics.median(self.roofs) / 1e9, "best": max(self.roofs) / 1e9},
            "skipped": self.skipped,
            "results": [
                {
                    "contestant": r.name,
                    "versions": version(r.name),
                    "median_s": r.median,
                    "min_s": min(r.times),
                    "times_s": r.times,
                    "images_per_s": B / r.median,
                    "gflops": self.rate(r) / 1e9,
                    "share_of_roof": self.rate(r) / self.roof if self.roof else None,
                    "relative_rms_from_first": r.difference,
                    "peak_rss_mb": None if r.peak_rss_bytes is None else r.peak_rss_bytes / 1e6,
                    "peak_device_mb": None if r.peak_device_bytes is None else r.peak_device_bytes / 1e6,
                    "cold_start_s": statistics.median(r.cold_starts) if r.cold_starts else None,
                    "cold_starts_s": r.cold_starts,
                }
                for r in self.results
            ],
        }


def machine() -> dict[str, Any]:
    """A description of the machine, for the report."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return facts | {"python": platform.python_version(), "time": time.strftime("%Y-%m-%d %H:%M:%S%z")}


def load_average() -> float | str:
    """The load average of the last minute; "?" if the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "?"


def cpu_name() -> str:
    """The name of the CPU and, if numba is there, its LLVM name and the vector width that minibeit uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    elif sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or name
    from .roof import available

    if not available():
        return name
    from llvmlite import binding

    from ..ops.numba_cpu.target import TILE

    return f"{name} ({binding.get_host_cpu_name()}, {TILE.name})"


def choose_peers(
    names: Sequence[str] | None,
    say: Say,
    on_gpu: bool = False,
    in_training: bool = False,
    dtype: str = "float32",
) -> tuple[str, ...]:
    """The peers to measure: those named, or all installed.  Raises ValueError or ImportError for named ones."""
    chosen: list[str] = []
    low = None if on_gpu else low_precision.PEERS.get(dtype)
    known = low or tuple(gpu.PEERS if on_gpu else training.PEERS if in_training else FORWARD_PEERS)
    for name in known if names is None else names:
        if name not in known:
            place = " on a GPU" if on_gpu else " in training" if in_training else f" in {dtype}" if low else ""
            raise ValueError(f"--against: expected none or some of {', '.join(known)}{place}, found {name!r}")
        absent = missing(name, dtype)
        if absent and names is not None:
            raise ImportError(f"--against {name} needs {' and '.join(absent)}: pip install {' '.join(absent)}")
        if absent:
            say(f"{label(name)} is left out: {', '.join(absent)} not installed")
        else:
            chosen += gpu.PEERS[name] if on_gpu else [name]
    return tuple(chosen)


def measure(workload: Workload, plan: Plan, folder: Path, say: Say) -> Table:
    """Measures one workload; `folder` keeps checkpoints and exports.

    Raises ValueError if outputs disagree or a required contestant fails.
    """
    checkpoint = folder / workload.model
    if not (checkpoint / "config.json").exists():
        say(f"{workload.name}: writing random weights")
        write_checkpoint(workload, checkpoint)
    skipped: list[str] = []
    jobs = {}
    for name in plan.contestants:
        own = plan.dtype if plan.dtype == "int8" else "float32"  # of the exported model
        exports = folder / f"{workload.model}-{workload.batch_size}-{name}{'-int8' if own == 'int8' else ''}"
        job = dict(workload=workload.to_dict(), folder=str(checkpoint), exports=str(exports))
        options: dict[str, Any] = dict(dtype=plan.dtype, device=plan.device)
        if name in EXPORTED and not (exports / EXPORTED[name]).exists():
            verb = "compiled" if workload.training else "exported"
            say(f"{workload.name}: being {verb} for {label(name)}")
            problem = _lines(dict(job, job="export", name=name, dtype=own), plan.threads)[-1].get("error")
            if problem and plan.explicit:
                raise ValueError(f"{label(name)}: {workload.name} cannot be {verb}: {problem}")
            if problem:
                skipped.append(f"{label(name)}: cannot be {verb} ({problem})")
                say(f"{workload.name}: left out: {skipped[-1]}")
                continue
        jobs[name] = job | options
    say(f"{workload.name}: {', '.join(map(label, jobs))} in turns")
    table = _interleave(workload, plan, jobs, skipped)
    for i in range(plan.starts):
        for result in table.results:
            say(f"{workload.name}: {label(result.name)} in a process of its own, {i + 1} of {plan.starts}")
            _start(result, jobs[result.name], plan.threads)
    return table


def _interleave(workload: Workload, plan: Plan, jobs: dict[str, Any], skipped: list[str]) -> Table:
    root = Path(next(iter(jobs.values()))["folder"]).parent
    links = {name: job["exports"] for name, job in jobs.items()}
    common = dict(workload=workload.to_dict(), folder=str(root / workload.model), exports=links)
    options: dict[str, Any] = dict(names=list(jobs), threads=plan.threads, repeats=plan.repeats, seconds=plan.seconds)
    agree = _allowed_difference(workload, plan)
    options |= dict(dtype=plan.dtype, device=plan.device, agree=agree)
    lines = _lines(dict(common, **options, job="interleaved"), plan.threads)
    if "error" in lines[-1]:
        raise ValueError(f"{workload.name}: {lines[-1]['error']}")
    differences = lines[0]["differences"]
    for name, difference in differences.items():
        if not difference < agree:
            raise ValueError(
                f"{workload.name}: the output of {label(name)} differs from {label(next(iter(jobs)))} by relative RMS "
                f"{difference:.1e}, expected less than {agree:.0e}; nothing was timed"
            )
    measured = lines[1]
    results = [Result(name, measured["times"][name], differences[name]) for name in jobs]
    count = flops.training_step if workload.training else flops.total
    operations = count(workload.config, TASKS[workload.task][0], workload.batch_size)
    return Table(workload, plan.threads, operations, measured["roofs"], results, skipped, plan.dtype)


def _allowed_difference(workload: Workload, plan: Plan) -> float:
    if plan.on_gpu:
        return max(gpu.allowed_difference(plan.dtype), AGREE_TRAINED if workload.training else 0.0)
    return AGREE_TRAINED if workload.training else low_precision.AGREE.get(plan.dtype, AGREE)


def _start(result: Result, job: dict[str, Any], threads: int) -> None:
    """Runs a contestant in a fresh process: time from its start to the first output, and peak memory."""
    start = time.perf_counter()
    arrivals: list[float] = []
    lines = _lines(dict(job, job="once", name=result.name, threads=threads), threads, arrivals)
    if "error" in lines[-1]:
        raise ValueError(f"{label(result.name)}: {lines[-1]['error']}")
    result.cold_starts.append(arrivals[0] - start)
    if lines[1]["peak_rss_bytes"] is not None:
        result.peak_rss_bytes = max(lines[1]["peak_rss_bytes"], result.peak_rss_bytes or 0)
    if lines[1]["peak_device_bytes"] is not None:
        result.peak_device_bytes = max(lines[1]["peak_device_bytes"], result.peak_device_bytes or 0)


def profile(name: str, workload: Workload, plan: Plan, folder: Path) -> tuple[dict[str, Entry], float]:
    """({op: cost}, seconds) of one forward pass of a backend, in a separate process (see `profile.profile`)."""
    job: dict[str, Any] = dict(
        job="profile", name=name, workload=workload.to_dict(), folder=str(folder / workload.model)
    )
    job |= dict(dtype=plan.dtype, device=plan.device)
    line = _lines(dict(job, runs=plan.repeats or 5), plan.threads)[-1]
    if "error" in line:
        raise ValueError(f"{label(name)}: {line['error']}")
    return {op: Entry(**entry) for op, entry in line["ops"].items()}, line["seconds"]


def _lines(job: dict[str, Any], threads: int, arrivals: list[float] | None = None) -> list[dict[str, Any]]:
    """The lines that a worker prints; `arrivals` collects the time at which each arrived."""
    command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(job)]
    lines = []
    with tempfile.TemporaryFile("w+", errors="replace") as chatter:
        options: dict[str, Any] = dict(env=_environment(threads), stdout=subprocess.PIPE, stderr=chatter, text=True)
        with subprocess.Popen(command, **options) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if arrivals is not None:
                    arrivals.append(time.perf_counter())
                lines.append(json.loads(line))
        chatter.seek(0)
        tail = chatter.read()
    if not lines or (process.returncode and "error" not in lines[-1]):
        words = tail.strip().splitlines()[-1:] or ["no message"]
        lines.append({"error": f"the process ended with code {process.returncode} ({words[0]}); out of memory?"})
    return lines


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MINIBEIT_NUM_THREADS")
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {**os.environ, **quiet, **dict.fromkeys(names, str(threads)), "PYTHONPATH": path}
