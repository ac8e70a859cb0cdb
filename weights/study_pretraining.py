"""Does pre-training help where labels are few?  The paper's claim in miniature, on Fashion-MNIST.

    python weights/study_pretraining.py DATA --output study              three seeds, an hour or two on two cores
    python weights/study_pretraining.py DATA --output study --quick      one seed of a tenth of the images, minutes

DATA is the folder with the four .gz files of Fashion-MNIST (Debian's package dataset-fashion-mnist has them in
/usr/share/datasets/fashion-mnist).  A tokenizer is trained on a third of the images, then a small BEiT is pre-trained
on them all without labels.  It is fine-tuned with 100, 600, 6,000 and all labels, and so is one of random weights.
`study.json` gets every number, `table.md` the accuracies on the 10,000 test images, `study.png` the curves (needs
matplotlib).  With --peer one pre-training runs once more in PyTorch through transformers (extra verify), on the same
batches.  Every training is a job of one thread; jobs that are done are not done again, so a stopped study goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minibeit import BeitConfig, BeitForMaskedImageModeling
from minibeit.tokenizer.config import DalleTokenizerConfig
from minibeit.tokenizer.tokenizer import DalleTokenizer
from minibeit.train.discrete_vae import DiscreteVae, ImageReconstruction
from minibeit.train.examples import Examples, read_examples
from minibeit.train.loop import Trainer
from minibeit.train.objective import Classification
from minibeit.train.pretraining import MaskedModeling, initial_arrays, processor_for
from minibeit.train.recipes import PRETRAINING, PRETRAINING_PRESETS, RECIPES, TOKENIZERS
from minibeit.train.start import from_checkpoint, from_scratch

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FILES = {  # of each part: images, labels
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "val": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SIDE, LABELS = 28, (100, 600, 6000, 60000)
EPOCHS = {100: 200, 600: 100, 6000: 10, 60000: 2}  # of fine-tuning, so that few labels are seen often
PRETRAINING_EPOCHS = 3
TOKENS = DalleTokenizerConfig(
    num_groups=3, num_blocks_per_group=1, hidden_size=16, vocab_size=128, n_init=16, input_channels=1, image_size=SIDE
)
CONFIG = BeitConfig(
    **{**PRETRAINING_PRESETS["tiny"], "num_channels": 1, "vocab_size": TOKENS.vocab_size, "drop_path_rate": 0.0}
)
FINE_TUNED = CONFIG.replace(
    use_shared_relative_position_bias=False, use_relative_position_bias=True, use_mask_token=False
)
PRETRAINED, SCRATCH = "pretrained", "scratch"


@dataclass(frozen=True)
class Job:
    """One training.  `kind` is a function's name; `start` and `count` belong to fine-tuning."""

    kind: str
    output: Path
    images: int
    seed: int = 0
    start: str = ""
    count: int = 0

    @property
    def folder(self) -> Path:
        """Where it writes."""
        part = f"{self.start}-{self.count}" if self.start else self.kind
        return self.output / f"seed{self.seed}" / part

    @property
    def examples(self) -> Examples:
        """The images with their labels, the 10,000 (quick: 1,000) test images held out."""
        return read_examples(self.output / "images")


def main() -> None:
    """The study, from images to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, one seed")
    parser.add_argument("--peer", action="store_true", help="also pre-train in PyTorch through transformers")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="jobs at a time, of one thread each")
    args = parser.parse_args()
    missing = [name for names in FILES.values() for name in names if not (args.data / name).is_file()]
    if missing:
        parser.error(f"{args.data}: expected the four files of Fashion-MNIST, found no {missing[0]}")
    images, test = (6000, 1000) if args.quick else (60000, 10000)
    export(args.data, args.output / "images", images, test)
    FINE_TUNED.save_pretrained(args.output / SCRATCH)
    stages = jobs(args.output, images, range(1 if args.quick else args.seeds), args.peer)
    os.environ |= {"MINIBEIT_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        results = [(job, result) for stage in stages for job, result in zip(stage, pool.map(done, stage))]
    report(results, args.output)


def jobs(output: Path, images: int, seeds: Sequence[int], peer: bool) -> list[list[Job]]:
    """Three stages: what needs nothing, what needs the tokenizer, and what needs a pre-trained model."""
    counts = sorted((count for count in LABELS if count <= images), reverse=True)  # the longest first

    def tuned(start: str) -> list[Job]:
        return [Job("finetuned", output, images, seed, start, count) for count in counts for seed in seeds]

    second = [Job("pretrained", output, images, seed) for seed in seeds] + [Job("peer", output, images)] * peer
    return [[Job("tokenizer", output, images), *tuned(SCRATCH)], second, tuned(PRETRAINED)]


def done(job: Job) -> Any:
    """What the job found, which is kept in its folder."""
    file = job.folder / "result.json"
    if not file.exists():
        started = time.process_time()
        job.folder.mkdir(parents=True, exist_ok=True)
        result = {"tokenizer": tokenizer, "pretrained": pretrained, "peer": peer, "finetuned": finetuned}[job.kind](job)
        print(f"{job.folder}: {time.process_time() - started:.0f} s of processor time", flush=True)
        file.write_text(json.dumps(result))
    return json.loads(file.read_text())


def tokenizer(job: Job) -> list[dict[str, Any]]:
    """The log of a tokenizer's training, on a third of the images."""
    recipe = TOKENIZERS["tiny"].changed(epochs=4)
    vae = DiscreteVae(DalleTokenizer(TOKENS, seed=job.seed))
    few = unlabelled(job)
    few = dataclasses.replace(few, train=few.train[: job.images // 3])
    objective: Any = ImageReconstruction(few, recipe, TOKENS, (SIDE, SIDE))
    return Trainer(vae, objective, recipe, job.folder, seed=job.seed).run()  # type: ignore[arg-type]


def unlabelled(job: Job) -> Examples:
    """The training images in an order of the seed's; a twentieth is held out, and none of the test images is there."""
    everything = job.examples
    order = np.random.default_rng(job.seed).permutation(len(everything.train))
    images = [everything.train[i] for i in order.tolist()]
    held_out = len(images) // 20
    return dataclasses.replace(everything, train=tuple(images[held_out:]), held_out=tuple(images[:held_out]))


def masked_modelling(job: Job) -> tuple[Any, Any, Any]:
    """(a model of random weights, its objective, the recipe); all seeds share a tokenizer."""
    recipe = PRETRAINING["tiny"].changed(epochs=PRETRAINING_EPOCHS)
    tokens = DalleTokenizer.from_pretrained(Job("tokenizer", job.output, job.images).folder)
    model = BeitForMaskedImageModeling(CONFIG, arrays=initial_arrays(CONFIG, job.seed))
    return model, MaskedModeling(unlabelled(job), processor_for(CONFIG, recipe), recipe, CONFIG, tokens), recipe


def pretrained(job: Job) -> list[dict[str, Any]]:
    """The log of a pre-training."""
    model, objective, recipe = masked_modelling(job)
    return Trainer(model, objective, recipe, job.folder, seed=job.seed).run()


def finetuned(job: Job) -> float:
    """Top-1 on the test images after the last epoch; no epoch is chosen by them."""
    few = labelled(job.examples, job.count, job.seed)
    batch_size = min(64, len(few.train) // 4)
    recipe = RECIPES["tiny"].changed(epochs=EPOCHS[job.count], batch_size=batch_size, lr=1e-3, average=0.0)
    if job.start == PRETRAINED:
        model = from_checkpoint(str(Job("pretrained", job.output, job.images, job.seed).folder), few, seed=job.seed)
    else:
        model = from_scratch(str(job.output / SCRATCH), few, seed=job.seed)
    unjudged = dataclasses.replace(few, held_out=())
    objective = Classification(unjudged, processor_for(CONFIG, PRETRAINING["tiny"]), recipe, CONFIG.image_shape)
    trainer = Trainer(model, objective, recipe, job.folder, seed=job.seed)
    trainer.run()
    return trainer.evaluate(few.held_out)["top1"]


def labelled(everything: Examples, count: int, seed: int) -> Examples:
    """As many labels of each class, drawn by `seed`."""
    rng, chosen = np.random.default_rng(seed), []
    for name in everything.names:
        own = [example for example in everything.train if example.label == name]
        chosen += [own[i] for i in rng.permutation(len(own))[: count // len(everything.names)]]
    return dataclasses.replace(everything, train=tuple(chosen))


def peer(job: Job) -> list[float]:
    """The mean loss of each epoch of the same pre-training in PyTorch: same weights, batches and schedule."""
    import torch
    import transformers

    from minibeit.train.optimizer import decayed

    torch.set_num_threads(1)
    model, objective, recipe = masked_modelling(job)
    feed = Trainer(model, objective, recipe, job.folder, seed=job.seed)  # for its batches and rates
    model.save_pretrained(job.folder)
    theirs = transformers.BeitForMaskedImageModeling.from_pretrained(job.folder).train()
    groups = [
        {"params": [p], "weight_decay": recipe.weight_decay if decayed(name, tuple(p.shape)) else 0.0}
        for name, p in theirs.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    losses = []
    for epoch in range(recipe.epochs):
        feed.state.history = [{}] * epoch
        total, images = 0.0, 0
        for batch in feed._batches():
            for group in optimizer.param_groups:
                group["lr"] = feed.rate(feed.state.step)
            mask = torch.from_numpy(batch.mask)
            labels = torch.from_numpy(batch.targets[batch.mask])
            loss = theirs(torch.from_numpy(batch.pixels), bool_masked_pos=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), recipe.clip)
            optimizer.step()
            feed.state.step += 1
            total, images = total + loss.item() * len(batch), images + len(batch)
        losses.append(total / images)
    return losses


# Images and report ----------------------------------------------------------------------------------------------------


def export(data: Path, folder: Path, images: int, test: int) -> None:
    """The first images of both parts as PNG files in class folders."""
    for (part, (of_pixels, of_labels)), count in zip(FILES.items(), (images, test)):
        pixels, labels = unzipped(data / of_pixels, 16), unzipped(data / of_labels, 8)
        for i, (square, label) in enumerate(zip(pixels.reshape(-1, SIDE, SIDE)[:count], labels)):
            file = folder / part / NAMES[label] / f"{i:05}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(square).save(file)


def unzipped(file: Path, header: int) -> np.ndarray:
    """The bytes of a file behind its header."""
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def report(results: list[tuple[Job, Any]], output: Path) -> None:
    """Writes study.json, table.md and study.png."""
    found: dict[str, Any] = {"top1": {SCRATCH: {}, PRETRAINED: {}}}
    for job, result in results:
        if job.start:
            found["top1"][job.start].setdefault(job.count, []).append(result)
        else:
            found.setdefault(job.kind, []).append(result)
    (output / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / "table.md").write_text(table(found["top1"]))
    plot(found, output / "study.png")
    print((output / "table.md").read_text())


def table(top1: dict[str, dict[int, list[float]]]) -> str:
    """Accuracies in per cent, the mean over the seeds and their smallest and largest."""
    counts = sorted(top1[SCRATCH])
    lines = [
        "| start | " + " | ".join(f"{count:,} labels" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for start, what in ((SCRATCH, "random weights"), (PRETRAINED, "pre-trained without labels")):
        cells = []
        for count in counts:
            scores = 100 * np.array(top1[start][count])
            cells.append(f"{scores.mean():.1f} ({scores.min():.1f} to {scores.max():.1f})")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], file: Path) -> None:
    """Accuracy by number of labels, and the losses of pre-training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), dpi=160, layout="constrained")
    for start, colour, name in (
        (SCRATCH, "tab:gray", "random weights"),
        (PRETRAINED, "tab:blue", "pre-trained without labels"),
    ):
        counts = sorted(found["top1"][start])
        scores = 100 * np.array([found["top1"][start][count] for count in counts])  # (counts, seeds)
        left.plot(counts, scores.mean(1), "-", color=colour, label=name)
        left.plot(counts, scores, ".", color=colour)
    left.set(xscale="log", xlabel="labels", ylabel="test images right, %")
    left.set_xticks(counts, [f"{count:,}" for count in counts], minor=False)
    left.legend()
    for i, log in enumerate(found["pretrained"]):
        losses = [row["train_loss"] for row in log]
        right.plot(range(1, len(losses) + 1), losses, color="tab:blue", label="" if i else "minibeit, each seed")
    for losses in found.get("peer", ()):
        right.plot(range(1, len(losses) + 1), losses, "--", color="tab:orange", label="PyTorch, the first seed")
    right.set(xlabel="epoch", ylabel="loss of masked tokens, nats", xticks=range(1, len(losses) + 1))
    right.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
