"""How much two workers gain over one, and what a shard costs beside its images.

    python tests/measure_cluster.py --rounds 5

Two local clusters of Dask stand side by side, one of a process and one of two, each process of one thread, with the
same model (random weights of BEiT base, mapped from a file) loaded.  In turns, first one and then the other computes
the features of the same images; then both are given empty shards of one image.  Printed are minima, medians and the
ratios, and the processor seconds of the workers for an image and of this process, which holds client and scheduler,
for a shard: those do not depend on what else the machine does.  For the ratio it should do nothing else.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from distributed import Client, LocalCluster
from PIL import Image

from minibeit import BeitBackbone, BeitConfig, BeitImageProcessor, BeitModel
from minibeit.cluster import Features, run_on_dask

WORKERS = (1, 2)
SHARD = 16  # images


def made(folder: Path, width: int, blocks: int, images: int) -> tuple[Features, list[str]]:
    """A checkpoint of random weights with what computes features by it, and paths of random JPEG images."""
    config = BeitConfig(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64,
                        intermediate_size=4 * width, use_relative_position_bias=True)  # fmt: skip
    BeitModel(config).save_pretrained(folder)
    model = BeitBackbone.from_pretrained(folder, out_indices=(blocks,), add_fpn=False, reshape_hidden_states=False)
    rng, paths = np.random.default_rng(0), []
    for i in range(images):
        low = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        paths.append(str(folder / f"{i}.jpg"))
        low.resize((640, 480), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return Features(model, BeitImageProcessor(size=224)), paths


class Nothing(Features):
    """A shard without work: what is left is the scheduler's and the file's."""

    def table(self, images):
        return self._table([{"file": image} for image in images], [])


class Took(NamedTuple):
    """Seconds of one run into a new folder: by the clock, of the workers' processors, and of this process's."""

    clock: float
    workers: float
    here: float


def took(client: Client, work: Features, images: list[str], size: int) -> Took:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        before = sum(client.run(time.process_time).values())
        start, here = time.perf_counter(), time.process_time()
        run_on_dask(images, work, folder, dask=client, shard_size=size)
        clock, here = time.perf_counter() - start, time.process_time() - here
        return Took(clock, sum(client.run(time.process_time).values()) - before, here)


def report(what: str, runs: dict[int, list[Took]], count: int, shards: int) -> None:
    """Prints the figures of one kind of run."""
    for n, found in runs.items():
        clock = [one.clock for one in found]
        low, middle = min(clock), statistics.median(clock)
        own = statistics.median(one.workers for one in found) / count
        here = statistics.median(one.here for one in found) / shards
        print(
            f"{what}, {n} workers: {count} images in {middle:.2f} s (least {low:.2f}), {count / middle:.1f} images/s; "
            f"processor: {1e3 * own:.2f} ms an image in workers, {1e3 * here:.2f} ms a shard in client and scheduler"
        )
    one, two = ([took.clock for took in runs[n]] for n in WORKERS)
    ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(one, two))
    gain = statistics.median(one) / statistics.median(two)
    print(f"{what}, two workers over one: {gain:.2f} by medians, {min(one) / min(two):.2f} by minima; turns: {ratios}")


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Runs the rounds."""
    logging.disable(logging.WARNING)  # Dask says much when clusters end
    work, images = made(folder, args.width, args.blocks, args.images)
    nothing, empty = Nothing(work.model, work.processor), images * args.empty
    clusters = [
        LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=":0", silence_logs=50) for n in WORKERS
    ]
    clients = [Client(cluster, set_as_default=False) for cluster in clusters]
    full: dict[int, list[Took]] = {n: [] for n in WORKERS}
    none: dict[int, list[Took]] = {n: [] for n in WORKERS}
    for i in range(args.rounds + 1):
        for n, client in zip(WORKERS, clients):
            runs = took(client, work, images, SHARD), took(client, nothing, empty, 1)
            if i:  # the first round compiles kernels and reads the weights
                full[n].append(runs[0])
                none[n].append(runs[1])
    report("features", full, len(images), -(-len(images) // SHARD))
    report("empty shards", none, len(empty), len(empty))
    for thing in (*clients, *clusters):
        thing.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--empty", type=int, default=4, help="times the images, in empty shards")
    with tempfile.TemporaryDirectory() as place:
        measure(parser.parse_args(), Path(place))
