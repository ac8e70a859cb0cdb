"""Times the tokenizer's encoder at full size beside PyTorch, in turns in one process; the tokens must agree first.

    python tests/measure_tokenizer.py [ROUNDS] [--batch B] [--threads N] [--backend numba]   needs torch, transformers

PyTorch runs FlavaImageCodebook of transformers, which is DALL-E's encoder, on the same random weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from minibeit import DalleTokenizer, DalleTokenizerConfig
from minibeit.tokenizer.names import FLAVA
from minibeit.tokenizer.params import param_shapes

PAUSE = 0.05  # seconds for the threads of one to stop spinning before the other starts
SIDE = 112


def contestants(backend: str, threads: int) -> tuple[Callable, Callable]:
    """Two functions from pixels to visual tokens, with the same weights."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    codebook = FlavaImageCodebook(FlavaImageCodebookConfig()).eval()
    config, state = DalleTokenizerConfig(n_init=None), codebook.state_dict()
    arrays = {name: state[FLAVA.translate(name.removeprefix("encoder."))].numpy() for name in param_shapes(config)}
    tokenizer = DalleTokenizer(config, arrays=arrays, backend=backend, num_threads=threads)

    def theirs(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return codebook.get_codebook_indices(torch.from_numpy(x)).numpy()

    return tokenizer.encode, theirs


def timed(function: Callable, x: np.ndarray) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    function(x)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--backend", default="numba")
    args = parser.parse_args()
    ours, theirs = contestants(args.backend, args.threads)
    x = np.random.default_rng(0).uniform(0.1, 0.9, (args.batch, 3, SIDE, SIDE)).astype(np.float32)
    agree = float((ours(x) == theirs(x)).mean())
    assert agree > 0.999, f"only {agree:.2%} of the tokens agree; nothing was timed"
    times: dict[str, list[float]] = {"minibeit": [], "PyTorch": []}
    for i in range(args.rounds):
        both = [("minibeit", ours), ("PyTorch", theirs)]
        for name, function in both if i % 2 else both[::-1]:
            times[name].append(timed(function, x))
    for name, found in times.items():
        print(f"{name}: median {1000 * statistics.median(found):.0f} ms, least {1000 * min(found):.0f} ms")
    ratios = [b / a for a, b in zip(*times.values())]
    print(
        f"PyTorch / minibeit: {statistics.median(times['PyTorch']) / statistics.median(times['minibeit']):.2f} by the "
        f"medians, {min(times['PyTorch']) / min(times['minibeit']):.2f} by the least, {statistics.median(ratios):.2f} "
        f"round by round; batch {args.batch}, {args.threads} threads, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
