"""Does pre-training help where labels are few?  The paper's claim in miniature, on Fashion-MNIST.

    python weights/study_pretraining.py DATA --output study              three seeds, hours on two cores
    python weights/study_pretraining.py DATA --output study --quick      one seed of a tenth of the images, minutes

DATA is the folder with the four .gz files of Fashion-MNIST (Debian's package dataset-fashion-mnist has them in
/usr/share/datasets/fashion-mnist).  A tokenizer is trained on the images, then a small BEiT is pre-trained on them
without labels.  It is fine-tuned with 100, 600, 6,000 and all labels, and so is one of random weights.  `study.json`
gets every number, `table.md` the accuracies on the 10,000 test images, `study.png` the curves (needs matplotlib).
With --peer the pre-training runs once more in PyTorch through transformers (extra verify), on the same batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import time
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
SIDE, LABELS = 28, (100, 600, 6000, 60000)
TOKENS = DalleTokenizerConfig(
    num_groups=3, num_blocks_per_group=1, hidden_size=16, vocab_size=128, n_init=16, input_channels=1, image_size=SIDE
)
CONFIG = BeitConfig(
    **{**PRETRAINING_PRESETS["tiny"], "num_channels": 1, "vocab_size": TOKENS.vocab_size, "drop_path_rate": 0.0}
)


def main() -> None:
    """The study, from images to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, one seed, fewer epochs")
    parser.add_argument("--peer", action="store_true", help="also pre-train in PyTorch through transformers")
    args = parser.parse_args()
    images, test = (6000, 1000) if args.quick else (60000, 10000)
    everything = read_examples(export(args.data, args.output / "images", images, test))
    found: dict[str, Any] = {"images": images, "test": test, "runs": []}
    for seed in range(1 if args.quick else args.seeds):
        found["runs"].append(run(everything, args.output / f"seed{seed}", seed, args.quick, args.peer))
        (args.output / "study.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.output / "table.md").write_text(table(found["runs"]))
    plot(found["runs"], args.output / "study.png")
    print((args.output / "table.md").read_text())


def run(everything: Examples, folder: Path, seed: int, quick: bool, peer: bool) -> dict[str, Any]:
    """One seed: a tokenizer, a pre-trained model, and both starts fine-tuned with each number of labels."""
    started = time.monotonic()
    order = np.random.default_rng(seed).permutation(len(everything.train)).tolist()
    judged, seen = order[: len(order) // 20], order[len(order) // 20 :]  # none of the test images
    unlabelled = dataclasses.replace(
        everything,
        train=tuple(everything.train[i] for i in seen),
        held_out=tuple(everything.train[i] for i in judged),
    )
    recipe = TOKENIZERS["tiny"].changed(epochs=3 if quick else None)
    vae = DiscreteVae(DalleTokenizer(TOKENS, seed=seed))
    objective: Any = ImageReconstruction(unlabelled, recipe, TOKENS, (SIDE, SIDE))
    tokenizer_log = trained(vae, objective, recipe, folder / "tokenizer", seed)
    tokenizer = DalleTokenizer.from_pretrained(folder / "tokenizer")

    pre = PRETRAINING["tiny"].changed(epochs=6 if quick else None)
    model = BeitForMaskedImageModeling(CONFIG, arrays=initial_arrays(CONFIG, seed))
    objective = MaskedModeling(unlabelled, processor_for(CONFIG, pre), pre, CONFIG, tokenizer)
    result: dict[str, Any] = {"seed": seed, "tokenizer": tokenizer_log}
    if peer:
        result["peer"] = peer_losses(model, objective, pre, folder / "peer", seed)
    result["pretraining"] = trained(model, objective, pre, folder / "pretrained", seed)
    result["seconds_before_labels"] = round(time.monotonic() - started)

    CONFIG.replace(
        use_shared_relative_position_bias=False, use_relative_position_bias=True, use_mask_token=False
    ).save_pretrained(folder / "scratch")
    result["top1"] = {}
    for count in LABELS:
        if count <= len(everything.train):
            few = labelled(everything, count, seed)
            for start in ("pretrained", "scratch"):
                score = finetuned(few, folder, start, seed)
                result["top1"].setdefault(start, {})[count] = score
                print(f"seed {seed}, {count} labels, {start}: {100 * score:.2f}%", flush=True)
    return result


def export(data: Path, folder: Path, images: int, test: int) -> Path:
    """The first images of both parts as PNG files in class folders."""
    for part, stem, count in (("train", "train", images), ("val", "t10k", test)):
        pixels = unzipped(data / f"{stem}-images-idx3-ubyte.gz", 16)
        labels = unzipped(data / f"{stem}-labels-idx1-ubyte.gz", 8)
        for i, (square, label) in enumerate(zip(pixels.reshape(-1, SIDE, SIDE)[:count], labels)):
            file = folder / part / NAMES[label] / f"{i:05}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(square).save(file)
    return folder


def unzipped(file: Path, header: int) -> np.ndarray:
    """The bytes of a file behind its header."""
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def labelled(everything: Examples, count: int, seed: int) -> Examples:
    """As many labels of each class, drawn by `seed`."""
    rng, chosen = np.random.default_rng(seed), []
    for name in everything.names:
        own = [example for example in everything.train if example.label == name]
        chosen += [own[i] for i in rng.permutation(len(own))[: count // len(everything.names)]]
    return dataclasses.replace(everything, train=tuple(chosen))


def finetuned(few: Examples, folder: Path, start: str, seed: int) -> float:
    """Top-1 on the test images after the last epoch; no epoch is chosen by them."""
    epochs = int(np.clip(120_000 // len(few.train), 5, 200))  # so that few labels are seen often
    recipe = RECIPES["tiny"].changed(epochs=epochs, batch_size=min(64, len(few.train)), lr=1e-3, average=0.0)
    source = str(folder / start)
    model = from_checkpoint(source, few, seed=seed) if start == "pretrained" else from_scratch(source, few, seed=seed)
    unjudged = dataclasses.replace(few, held_out=())
    objective = Classification(unjudged, processor_for(CONFIG, PRETRAINING["tiny"]), recipe, CONFIG.image_shape)
    trainer = trainer_of(model, objective, recipe, folder / f"{start}-{len(few.train)}", seed)
    trainer.run()
    return trainer.evaluate(few.held_out)["top1"]


def trained(model: Any, objective: Any, recipe: Any, folder: Path, seed: int) -> list[dict[str, Any]]:
    """The log of a training."""
    return trainer_of(model, objective, recipe, folder, seed).run()


def trainer_of(model: Any, objective: Any, recipe: Any, folder: Path, seed: int) -> Trainer:
    """A trainer that writes into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(model, objective, recipe, folder, seed=seed)


def peer_losses(model: Any, objective: Any, recipe: Any, folder: Path, seed: int) -> list[float]:
    """The mean loss of each epoch of the same pre-training in PyTorch: same weights, batches and schedule."""
    import torch
    import transformers

    from minibeit.train.optimizer import decayed

    feed = trainer_of(BeitForMaskedImageModeling(model.config), objective, recipe, folder, seed)
    model.save_pretrained(folder)
    theirs = transformers.BeitForMaskedImageModeling.from_pretrained(folder).train()
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


def table(runs: list[dict[str, Any]]) -> str:
    """Accuracies in per cent, the mean over the seeds and their smallest and largest."""
    counts = list(runs[0]["top1"]["scratch"])
    lines = [
        "| start | " + " | ".join(f"{count:,} labels" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for start, what in (("scratch", "random weights"), ("pretrained", "pre-trained without labels")):
        cells = []
        for count in counts:
            scores = 100 * np.array([run["top1"][start][count] for run in runs])
            cells.append(f"{scores.mean():.1f} ({scores.min():.1f} to {scores.max():.1f})")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Accuracy by number of labels, and the losses of pre-training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), dpi=160, layout="constrained")
    for start, colour in (("scratch", "tab:gray"), ("pretrained", "tab:blue")):
        for i, run in enumerate(runs):
            scores = run["top1"][start]
            left.plot(list(scores), [100 * s for s in scores.values()], "o-", color=colour, label="" if i else start)
    left.set(xscale="log", xlabel="labels", ylabel="test images right, %")
    left.legend()
    for i, run in enumerate(runs):
        right.plot([row["train_loss"] for row in run["pretraining"]], color="tab:blue", label="" if i else "minibeit")
        if "peer" in run:
            right.plot(run["peer"], "--", color="tab:orange", label="PyTorch")
    right.set(xlabel="epoch", ylabel="loss of masked tokens")
    right.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
