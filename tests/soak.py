"""An hour of mixed work on the numba backend: no crash, no wrong bit, no growth.

    python -X faulthandler tests/soak.py --seconds 3600 > soak.log 2>&1; echo $?

Sixteen Python threads run models of all tasks in random batches and on random numbers of threads, prepare and drop
models, and are interrupted by exceptions out of nowhere; the main thread forks, collects garbage, sends itself
signals (some of whose handlers run a model), and all of it under a limit of address space.  Every result is compared
with the bits that the images gave alone at the start.  The exit status is 0 if all was well, 1 if a result was wrong, a
child failed or memory grew, and that of the signal if the process died.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # OpenBLAS's own threads may hang when another thread forks

import numpy as np

import minibeit
from minibeit.ops import numba_cpu
from minibeit.ops.numba_cpu import pool

TASKS = {
    "BeitModel": "last_hidden_state",
    "BeitForMaskedImageModeling": "logits",
    "BeitForImageClassification": "logits",
    "BeitForSemanticSegmentation": "logits",
    "BeitBackbone": "feature_maps",
}
SHAPES = [  # width, heads, hidden, image size, most images in a batch
    (32, 2, 64, 32, 40),
    (48, 3, 100, 64, 20),
    (32, 1, 3072, 224, 16),  # 14 of these pass the limit of memory that jobs may keep alive
    (96, 4, 384, 112, 9),
    (768, 12, 3072, 64, 4),
]
IMAGES = 3
GROWTH = 300 << 20  # bytes by which the last quarter's peak may exceed the first one's; each thread keeps up to 128 MB


class Interruption(Exception):
    """Thrown into a thread, as Ctrl-C is into the main one."""


@dataclass
class Case:
    """A model, some images, and what each of them gives alone."""

    name: str
    config: Any
    most: int
    model: Any
    pixels: np.ndarray
    alone: list[list[np.ndarray]] = field(default_factory=list)


@dataclass
class Tally:
    """What happened."""

    calls: int = 0
    images: int = 0
    interrupted: int = 0
    wrong: list[str] = field(default_factory=list)
    forks: int = 0
    signals: int = 0


def outputs(model: Any, pixels: np.ndarray) -> list[np.ndarray]:
    """The arrays of a call."""
    found = getattr(model(pixels), TASKS[type(model).__name__])
    return list(found) if isinstance(found, (tuple, list)) else [found]


def make_cases() -> list[Case]:
    """All tasks in all shapes that are not too slow for them."""
    cases = []
    for task in TASKS:
        for width, heads, hidden, size, most in SHAPES:
            maps = task in ("BeitForSemanticSegmentation", "BeitBackbone")
            if maps and (width == 768 or size == 224 or size < 64):
                continue
            settings = dict(
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=hidden,
                num_hidden_layers=4 if maps else 2,
                image_size=size,
                use_relative_position_bias=True,
                use_mask_token=True,
                num_labels=5,
                vocab_size=20,
            ) | (dict(out_indices=[1, 2, 3, 4]) if maps else {})
            config = minibeit.BeitConfig.from_dict(settings)
            model = getattr(minibeit, task)(config, backend="numba")
            pixels = np.random.default_rng(0).standard_normal((IMAGES, 3, size, size), dtype=np.float32)
            case = Case(f"{task} {width} {size}", config, 2 if task.endswith("Segmentation") else most, model, pixels)
            case.alone = [[x[0].copy() for x in outputs(model, pixels[i : i + 1])] for i in range(IMAGES)]
            cases.append(case)
    return cases


def one_call(case: Case, chance: random.Random, tally: Tally) -> None:
    """A random batch of a case, compared image by image."""
    batch = chance.randint(1, case.most)
    order = [chance.randrange(IMAGES) for _ in range(batch)]
    model = case.model
    if chance.random() < 0.05:  # a model of the caller's own, dropped afterwards
        model = type(model)(case.config, backend="numba")
    with numba_cpu.num_threads(chance.choice([1, 1, 2, 3])):
        found = outputs(model, case.pixels[order])
    for part, whole in enumerate(found):
        for i, image in enumerate(order):
            if not np.array_equal(whole[i], case.alone[image][part]):
                tally.wrong.append(f"{case.name}, batch {batch}, image {i}, output {part}")
    tally.calls += 1
    tally.images += batch


def work(cases: list[Case], seed: int, end: float, tally: Tally) -> None:
    """What each thread does; an interruption may come anywhere."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                one_call(chance.choice(cases), chance, tally)
        except Interruption:
            tally.interrupted += 1


def run_worker(*arguments: Any) -> None:
    """`work`, whatever comes after its end."""
    while True:
        try:
            return work(*arguments)
        except Interruption:
            continue


def fork(cases: list[Case], chance: random.Random, tally: Tally) -> None:
    """A child that runs one case; it has a minute."""
    case = chance.choice(cases)
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        own = Tally()
        one_call(case, chance, own)
        os._exit(1 if own.wrong else 0)
    status = os.waitpid(child, 0)[1]
    tally.forks += 1
    if status:
        tally.wrong.append(f"a forked child ended with status {status} ({case.name})")


def interrupt(threads: list[threading.Thread], chance: random.Random) -> None:
    """Raises `Interruption` somewhere in one of the threads."""
    thread = chance.choice(threads)
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interruption))


def resident() -> int:
    """Bytes of memory that this process has at the moment."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def disturb(cases: list[Case], threads: list[threading.Thread], seconds: float, tally: Tally) -> list[int]:
    """The main thread: forks, interrupts, signals, collections; the memory it saw, every two seconds."""
    chance, start, seen = random.Random(0), time.monotonic(), []

    def handle(number: int, frame: Any) -> None:
        tally.signals += 1
        if tally.signals % 3 == 0:
            one_call(cases[tally.signals % len(cases)], chance, tally)

    signal.signal(signal.SIGALRM, handle)
    next_look = start
    while time.monotonic() - start < seconds:
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.3))
        what = chance.random()
        if what < 0.1:
            fork(cases, chance, tally)
        elif what < 0.4:
            interrupt(threads, chance)
        elif what < 0.5:
            gc.collect()
        elif what < 0.8:
            one_call(chance.choice(cases), chance, tally)
        else:
            time.sleep(chance.uniform(0, 0.2))
        if time.monotonic() > next_look:
            next_look += 2
            seen.append(resident())
    signal.setitimer(signal.ITIMER_REAL, 0)
    return seen


def main() -> int:
    """Runs the soak; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--limit-gb", type=float, default=8, help="of address space")
    args = parser.parse_args()
    limit = int(args.limit_gb * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.setswitchinterval(0.0005)
    cases, tally = make_cases(), Tally()
    end = time.monotonic() + args.seconds
    threads = [
        threading.Thread(target=run_worker, args=(cases, seed, end, tally), daemon=True) for seed in range(args.threads)
    ]
    for thread in threads:
        thread.start()
    seen = disturb(cases, threads, args.seconds, tally)
    for thread in threads:
        thread.join(120)
    stuck = sum(thread.is_alive() for thread in threads)
    quarter = max(1, len(seen) // 4)
    early, late = max(seen[:quarter]), max(seen[-quarter:])
    print(
        f"{tally.calls} calls of {tally.images} images, {tally.interrupted} interrupted, {tally.signals} signals, "
        f"{tally.forks} forks; memory {early >> 20} MB in the first quarter, {late >> 20} MB in the last, "
        f"{max(seen) >> 20} MB at most; {len(tally.wrong)} wrong, {stuck} threads stuck"
    )
    for line in tally.wrong[:20]:
        print("wrong:", line)
    still = pool._pool.running is not None or pool._pool.busy
    if still:
        print("wrong: the pool is not at rest")
    return 1 if tally.wrong or stuck or still or late > early + GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
