"""Images per second of decoding alone, of the model alone, and of both at the same time, in turns.

    python tests/measure_read_ahead.py [IMAGES] [ROUNDS] [draft]

60 JPEGs of 12 megapixels, base at 224x224 with random weights, batches of 8, as `minibeit classify` has them.  Beside
each rate stand the processor seconds for an image: where images and model share all CPUs, no order of work can exceed
the CPUs divided by the sum of both, which is the last line.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from minibeit import BeitConfig, BeitForImageClassification, BeitImageProcessor, read_ahead
from minibeit.cli.inputs import run_batches
from minibeit.images.ahead import default_workers
from minibeit.runs.found import Found

WIDTH, HEIGHT, BATCH = 4000, 3000, 8
SHARES = (0.09, 0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16)  # of the octaves, from the finest


def photographs(folder: Path, count: int) -> list[str]:
    """JPEGs of some 4 MB with detail of every size, more of the coarse, as photographs have it."""
    rng = np.random.default_rng(0)
    octaves = [rng.integers(0, 256, (HEIGHT >> k, WIDTH >> k, 3), dtype=np.uint8) for k in range(1, 9)]
    large = [np.asarray(Image.fromarray(o).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)) for o in octaves]
    scene = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for k, octave in enumerate(large):
        scene += octave * np.float32(SHARES[k])
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{i}.jpg"))
        Image.fromarray(np.roll(scene, 61 * i, axis=1).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def timed(work, part: list[str]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work(part)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    draft = sys.argv[-1] == "draft"
    count, rounds = (int(word) for word in (*sys.argv[1 : len(sys.argv) - draft], 60, 3)[:2])
    config = BeitConfig(num_labels=1000, use_relative_position_bias=True)
    model, processor = BeitForImageClassification(config), BeitImageProcessor(draft=draft)
    batch = np.random.default_rng(0).standard_normal((BATCH, 3, 224, 224)).astype(np.float32)
    model(batch)
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder), count)
        print(f"{count} images of {sum(Path(path).stat().st_size for path in paths) / count / 1e6:.1f} MB")
        works = {
            "decoding": lambda part: [None for _ in read_ahead(part, processor, workers=2)],
            "model": lambda part: [model(batch[: len(part[i : i + BATCH])]) for i in range(0, len(part), BATCH)],
            "both": lambda part: list(
                run_batches([Found(path) for path in part], processor, lambda x: model(x).logits, BATCH, quiet=True)
            ),
        }
        spent = {name: np.zeros(2) for name in works}
        for i in range(rounds):
            part = paths[count * i // rounds : count * (i + 1) // rounds]
            for name, work in works.items():
                spent[name] += timed(work, part)
    for name, (wall, cpu) in spent.items():
        print(f"{name:10} {count / wall:6.2f} images/s, {cpu / count:.3f} processor seconds an image")
    rates = {name: count / wall for name, (wall, _) in spent.items()}
    print(f"both / the slower of the two: {rates['both'] / min(rates['decoding'], rates['model']):.2f}")
    cpus, alone = default_workers(), (spent["decoding"][1] + spent["model"][1]) / count
    print(f"both / {cpus} CPUs divided by the processor seconds of both alone: {rates['both'] * alone / cpus:.2f}")


if __name__ == "__main__":
    main()
