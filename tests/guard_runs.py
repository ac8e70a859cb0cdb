"""Random models of all tasks on the numba backend, held to their own results image by image; for guard mode."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

import minibeit
from minibeit.ops import numba_cpu
from minibeit.ops.numba_cpu import memory, pool, queue

TASKS = {
    "model": ("BeitModel", "last_hidden_state"),
    "masked_image_modeling": ("BeitForMaskedImageModeling", "logits"),
    "image_classification": ("BeitForImageClassification", "logits"),
    "semantic_segmentation": ("BeitForSemanticSegmentation", "logits"),
    "backbone": ("BeitBackbone", "feature_maps"),
}
WIDTHS = (32, 48, 64, 96, 100, 128, 192, 320, 384, 768, 1280)
SIZES = (32, 48, 64, 80, 96, 112, 160, 224, 384, 512, 640, 1024)
BATCHES = (1, 2, 3, 5, 8, 16, 17, 33, 64, 65)
THREADS = (1, 2, 3, 5, 7)
LIMITS = (0, 1 << 16, 1 << 20, 1 << 26, 1 << 40)  # bytes that are kept, and that jobs may keep alive
MOST_WORK = 1.2e8  # multiplications of one model's call, about, and fifty of its weights: some 0.1 s
GRAND = 40  # every so many models one may be 20 times as large


def draw(seed: int) -> tuple[str, minibeit.BeitConfig, int, np.random.Generator]:
    """(task, config, batch size, what else is random); sizes are drawn until the work is bounded."""
    rng = np.random.default_rng(seed)
    task = str(rng.choice(list(TASKS)))
    maps = task in ("semantic_segmentation", "backbone")
    allowed = MOST_WORK * (20 if seed % GRAND == 0 else 1)
    while True:
        width, size, batch = (int(rng.choice(values)) for values in (WIDTHS, SIZES, BATCHES))
        patch = int(rng.choice([16, 16, 8, 32]))
        if size % patch or (maps and size // patch < 2):
            continue
        layers, hidden = int(rng.integers(1, 3)) + 3 * maps, int(rng.choice([1, 2, 4])) * width
        tokens = (size // patch) ** 2 + 1
        work = batch * tokens * layers * (4 * width**2 + 2 * width * hidden + 2 * tokens * width)
        weights = layers * (4 * width**2 + 2 * width * hidden)
        if task == "semantic_segmentation":
            work += batch * tokens * 16 * width**2 * 60
            weights += 40 * width**2
        if work < allowed and 50 * weights < allowed:
            break
    heads = int(rng.choice([h for h in (1, 2, 3, 4, 5, 8, 12, 16) if width % h == 0]))
    bias = int(rng.integers(3))
    settings: dict[str, Any] = dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden + int(rng.choice([0, 0, 1])),
        image_size=size,
        patch_size=patch,
        use_relative_position_bias=bias == 1,
        use_shared_relative_position_bias=bias == 2,
        use_absolute_position_embeddings=bias == 0,
        use_mask_token=task == "masked_image_modeling",
        use_mean_pooling=bool(rng.integers(2)),
        vocab_size=int(rng.integers(2, 100)),
        num_labels=int(rng.integers(1, 40)),
        hidden_act=str(rng.choice(["gelu", "relu", "tanh"])),
    )
    if maps:
        settings["out_indices"] = [1, 2, 3, 4]
    return task, minibeit.BeitConfig.from_dict(settings), batch, rng


def outputs(model: Any, pixels: np.ndarray) -> list[np.ndarray]:
    """The arrays of a call."""
    found = getattr(model(pixels), TASKS[model.task][1])
    return [np.array(x) for x in (found if isinstance(found, (tuple, list)) else [found])]


def check(seed: int) -> None:
    """Runs one random model twice as a batch, and some of its images alone.  Raises AssertionError."""
    task, config, batch, rng = draw(seed)
    memory._KEPT_BYTES, queue._MOST_HELD = (int(rng.choice(LIMITS)) for _ in range(2))
    threads = int(rng.choice(THREADS))
    pool.usable_cpus = lambda: threads
    model = getattr(minibeit, TASKS[task][0])(config, backend="numba", seed=seed)
    pixels = rng.standard_normal((batch, 3, *config.image_shape), dtype=np.float32)
    story = f"seed {seed}, {task}, batch {batch}, {threads} threads, {config.to_dict()}"
    with numba_cpu.num_threads(threads):
        first, second = outputs(model, pixels), outputs(model, pixels)
        assert all(np.isfinite(x).all() for x in first), f"not finite: {story}"
        assert all(map(np.array_equal, first, second)), f"differs when called again: {story}"
        for i in {0, batch - 1}:
            alone = outputs(model, pixels[i : i + 1])
            assert all(np.array_equal(x[i], y[0]) for x, y in zip(first, alone)), f"image {i} differs: {story}"


def run(seed: int, count: int, seconds: float) -> int:
    """How many of `count` random models from `seed` on were checked within the time."""
    end = time.monotonic() + seconds
    for i in range(count):
        if time.monotonic() > end:
            return i
        check(seed + i)
    return count
