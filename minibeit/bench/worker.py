"""The process that measures: `python -m minibeit.bench.worker JOB`, JOB being JSON; answers with lines of JSON.

Everything that a library prints goes to stderr: the lines on stdout are the answer, and their arrival times are
measurements.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import gpu, roof, training
from .contestants import export, load
from .profile import profile, profile_step
from .workloads import Workload, model_class, pixels

PAUSE = 0.05  # seconds for the threads of one contestant to stop spinning before the next one starts
ROOF = "roof"  # measured in turns like a contestant
ONE_RUN = 3.0  # seconds; a slower contestant runs once, since memory would be the same in a second run

Runner = Callable[[Any], Any]


def main() -> int:
    """Runs the job and returns the exit code; an error is a line of JSON too."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    try:
        for line in JOBS[job.pop("job")](**job):
            print(json.dumps(line), file=answer, flush=True)
    except Exception as error:  # a peer may raise anything; the parent reports it in one sentence
        text = str(error).strip().splitlines() or [""]
        print(json.dumps({"error": f"{type(error).__name__}: {text[0][:300]}"}), file=answer, flush=True)
        return 1
    return 0


def run_export(
    name: str, workload: dict[str, Any], folder: str, exports: str, dtype: str = "float32"
) -> Iterator[dict[str, Any]]:
    """Exports the model for a peer."""
    export(name, Workload(**workload), Path(folder), Path(exports), dtype)
    yield {"exported": True}


def run_once(
    name: str,
    workload: dict[str, Any],
    folder: str,
    exports: str,
    threads: int,
    dtype: str = "float32",
    device: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Loads and runs one contestant: a line as soon as it has an output, then a line with the peak memory."""
    shape = Workload(**workload)
    x = pixels(shape)
    start = time.perf_counter()
    forward = load(name, shape, Path(folder), Path(exports), threads, dtype, device)
    first = forward(x)
    yield {"first_output": list(first.shape)}
    if shape.training:
        for _ in range(training.STEPS - 1):
            forward(x)
    elif time.perf_counter() - start < ONE_RUN:
        forward(x)
    on_device = getattr(forward, "peak_bytes", None)
    yield {"peak_rss_bytes": peak_rss(), "peak_device_bytes": None if on_device is None else on_device()}


def run_interleaved(
    names: list[str],
    workload: dict[str, Any],
    folder: str,
    exports: dict[str, str],
    threads: int,
    repeats: int | None,
    seconds: float,
    dtype: str = "float32",
    device: int | None = None,
    *,
    agree: float,
) -> Iterator[dict[str, Any]]:
    """Times all contestants in turns, after one run of each; outputs that differ by `agree` or more end it there."""
    shape = Workload(**workload)
    x = pixels(shape)
    contestants = {name: load(name, shape, Path(folder), Path(exports[name]), threads, dtype, device) for name in names}
    outputs, warm = {}, {}
    for name, forward in contestants.items():
        start = time.perf_counter()
        outputs[name] = forward(x)
        warm[name] = time.perf_counter() - start
    found = differences(outputs)
    yield {"differences": found}
    if not all(difference < agree for difference in found.values()):
        return
    outputs.clear()
    for name, forward in contestants.items():
        if warm[name] < ONE_RUN:  # the first run also allocated memory and chose algorithms
            warm[name] = timed(forward, x)
    rounds = repeats or max(3, min(25, round(seconds / sum(warm.values()))))
    roofs: list[float] = []
    runners: dict[str, Runner] = dict(contestants)
    if roof.available() and not set(names) & set(gpu.CONTESTANTS):
        roof.measure(threads)  # compiles
        runners[ROOF] = lambda _: roofs.extend(roof.measure(threads) for _ in range(15))
    times = take_turns(runners, x, rounds)
    yield {"times": {name: times[name] for name in names}, "roofs": roofs}


def run_profile(
    name: str, workload: dict[str, Any], folder: str, runs: int, dtype: str = "float32", device: int | None = None
) -> Iterator[dict[str, Any]]:
    """Times the ops of one of minibeit's backends."""
    shape = Workload(**workload)
    if shape.training:
        entries, seconds = profile_step(training.load(name, shape, Path(folder), 1, dtype, device), pixels(shape), runs)
    else:
        model = model_class(shape.task).from_pretrained(folder, backend=name, dtype=dtype, device=device)
        entries, seconds = profile(model, pixels(shape), runs)
    yield {"ops": {op: asdict(entry) for op, entry in entries.items()}, "seconds": seconds}


def differences(outputs: dict[str, Any]) -> dict[str, float]:
    """Relative RMS distance of each output from the first one.  Raises ValueError for a wrong shape or zeros."""
    import numpy as np

    first = next(iter(outputs))
    truth = np.asarray(outputs[first], np.float64)
    size = float(np.sqrt(np.mean(np.square(truth))))
    if not size > 0 or not np.isfinite(size):
        raise ValueError(f"{first}: the output has RMS {size}; times of such numbers mean nothing")
    found = {}
    for name, output in outputs.items():
        if output.shape != truth.shape:
            raise ValueError(f"{name}: expected an output of shape {truth.shape} as of {first}, found {output.shape}")
        found[name] = float(np.sqrt(np.mean(np.square(output - truth)))) / size
    return found


def take_turns(contestants: dict[str, Runner], x: Any, rounds: int) -> dict[str, list[float]]:
    """{name: seconds in each round}; every round starts with a different contestant."""
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(PAUSE)
            times[name].append(timed(contestants[name], x))
    gc.enable()
    return times


def timed(forward: Runner, x: Any) -> float:
    """Seconds of one run, measured by the contestant itself if it can."""
    measured = getattr(forward, "seconds", None)
    if measured is not None:
        return measured(x)
    start = time.perf_counter()
    forward(x)
    return time.perf_counter() - start


def peak_rss() -> int | None:
    """The peak memory of this process in bytes; None if the system does not tell.

    Linux's getrusage includes the parent's memory from before the child started, so /proc is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
        return None if line is None else int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


JOBS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "export": run_export,
    "once": run_once,
    "interleaved": run_interleaved,
    "profile": run_profile,
}

if __name__ == "__main__":
    sys.exit(main())
