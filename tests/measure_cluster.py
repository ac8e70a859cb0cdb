"""How much two workers gain over one, and what a shard costs beside its images.

    python tests/measure_cluster.py --rounds 5

Two local clusters of Dask stand side by side, one of a process and one of two, each process of one thread, with the
same model (random weights, mapped from a file) loaded.  In turns, first one and then the other computes the features
of the same images; then both are given empty shards.  Printed are minima, medians and the ratio of the medians.  The
machine should do nothing else, and have a core for each worker and a little more for the scheduler.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

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


def seconds(client: Client, work: Features, images: list[str], size: int) -> float:
    """Of one run into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_on_dask(images, work, folder, dask=client, shard_size=size)
        return time.perf_counter() - start


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Prints the figures."""
    work, images = made(folder, args.width, args.blocks, args.images)
    times: dict[tuple[str, int], list[float]] = {}
    clusters = [LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None) for n in WORKERS]
    clients = [Client(cluster, set_as_default=False) for cluster in clusters]
    nothing = Nothing(work.model, work.processor)
    for i in range(args.rounds + 1):
        for n, client in zip(WORKERS, clients):
            for name, took in (
                ("images", seconds(client, work, images, SHARD)),
                ("empty shards", seconds(client, nothing, images * args.empty, 1)),
            ):
                if i:  # the first round loads the model and compiles
                    times.setdefault((name, n), []).append(took)
    for (name, n), found in sorted(times.items()):
        count = len(images) if name == "images" else len(images) * args.empty
        low, middle = min(found), statistics.median(found)
        print(f"{name:12} {n} workers: min {low:.2f} s, median {middle:.2f} s, {count / middle:.1f} a second")
    for name in ("images", "empty shards"):
        one, two = (times[name, n] for n in WORKERS)
        ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(one, two))
        gain = statistics.median(one) / statistics.median(two)
        print(f"{name:12} two workers over one: {gain:.2f} (minima {min(one) / min(two):.2f}; in turns {ratios})")
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
