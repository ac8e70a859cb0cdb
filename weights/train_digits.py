"""Trains the shipped checkpoint weights/digits with the original implementation, transformers on PyTorch.

    python weights/train_digits.py            train, then write weights/digits and the golden logits (about 3 minutes)
    python weights/train_digits.py --golden   only write the golden logits of the checkpoint that is there

Data: scikit-learn's handwritten digits, 8x8 pixels of 17 gray levels; a fifth is held out.  The settings below were
chosen on a quarter of the other images, set aside for that, and the model is then trained on all of them.  Needs torch,
transformers and scikit-learn: pip install "minibeit[verify]" scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import sklearn
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import BeitConfig, BeitForImageClassification
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

SEED, EPOCHS, BATCH, PEAK_RATE, WEIGHT_DECAY, WARMUP = 0, 70, 32, 2e-3, 0.05, 200
SIZE, PATCH = 32, 8
TABLE_RATE = 10  # the bias tables are all the model knows of places, and start at zero: at 1 training takes far longer
FOLDER = Path(__file__).resolve().parent / "digits"
GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "data" / "digits_logits.safetensors"


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) uint8, gray level g of 16 as 255 g / 16 rounded, labels, training and held-out indices."""
    data = load_digits()
    images = np.rint(data.images * 255 / 16).astype(np.uint8)
    train, held_out = train_test_split(
        np.arange(len(images)), test_size=0.2, random_state=SEED, shuffle=True, stratify=data.target
    )
    return images, data.target.astype(np.int64), np.sort(train), np.sort(held_out)


def processor() -> BeitImageProcessorPil:
    return BeitImageProcessorPil(
        do_resize=True,
        size={"height": SIZE, "width": SIZE},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_reduce_labels=False,
    )


def pixels(images: np.ndarray) -> torch.Tensor:
    """Pixel values (B, 3, 32, 32) float32 in [-1, 1], as the processor gives them for the PNGs that ship."""
    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    return processor()(pictures, return_tensors="pt").pixel_values


def config() -> BeitConfig:
    names = {digit: str(digit) for digit in range(10)}
    return BeitConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        use_relative_position_bias=True,
        use_mean_pooling=True,
        layer_scale_init_value=1.0,
        initializer_range=0.1,
        drop_path_rate=0.1,
        id2label=names,
        label2id={name: digit for digit, name in names.items()},
    )


def moved(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every picture turned by up to 12 degrees, scaled by up to a tenth, shifted by up to a ninth of its half width."""

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(len(x), generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(12)), 1 + uniform(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, -sin, uniform(0.11)], 1), torch.stack([sin, cos, uniform(0.11)], 1)]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x + 1, grid, align_corners=False) - 1  # what comes in from outside is paper


def train(x: torch.Tensor, y: torch.Tensor) -> BeitForImageClassification:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = BeitForImageClassification(config()).train()
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "bias_table" not in name]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
        {"params": tables, "weight_decay": 0.0, "lr": PEAK_RATE * TABLE_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE)
    steps = EPOCHS * (len(x) // BATCH)

    def rate(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(EPOCHS):
        order, total = torch.randperm(len(x), generator=generator), 0.0
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            logits = model(moved(x[chosen], generator)).logits
            loss = torch.nn.functional.cross_entropy(logits, y[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1:3d}  training loss {total / (len(x) // BATCH):.4f}", flush=True)
    return model.eval()


def write_checkpoint(model: BeitForImageClassification, images, labels, train_indices, held_out) -> None:
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    model.save_pretrained(FOLDER)
    (FOLDER / "model.safetensors").chmod(0o644)  # the library leaves it readable by its owner only
    processor().save_pretrained(FOLDER)
    split = {"seed": SEED, "train": train_indices.tolist(), "held_out": held_out.tolist()}
    (FOLDER / "split.json").write_text(json.dumps(split) + "\n")
    np.savez_compressed(
        FOLDER / "held_out.npz",
        images=images[held_out],
        labels=labels[held_out].astype(np.uint8),
        indices=held_out.astype(np.int16),
    )
    for digit in range(10):  # the first held-out one of each class, whatever the model makes of it
        index = next(i for i in held_out if labels[i] == digit)
        Image.fromarray(images[index]).save(FOLDER / "images" / f"digit_{digit}_{index:04d}.png", optimize=True)


def write_golden(images: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> None:
    """PyTorch's logits in float32 and float64 of every held-out picture, from the checkpoint as it ships."""
    eager = BeitForImageClassification.from_pretrained(FOLDER, attn_implementation="eager").eval()
    exact = BeitForImageClassification.from_pretrained(FOLDER, attn_implementation="sdpa").eval().double()
    x = pixels(images[held_out])
    with torch.no_grad():
        logits32 = eager(x).logits
        logits64 = exact(x.double()).logits  # not eager: its softmax is float32 whatever the model is
    tensors = {
        "logits_float32": logits32.numpy(),
        "logits_float64": logits64.numpy(),
        "labels": labels[held_out],
        "indices": held_out.astype(np.int64),
    }
    metadata = versions() | {"seed": str(SEED), "made_by": "weights/train_digits.py"}
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, GOLDEN, metadata)
    right = int((logits32.argmax(1).numpy() == labels[held_out]).sum())
    print(f"float32 and float64 differ by at most {(logits32 - logits64).abs().max():.2e} in a logit")
    print(f"held out: {right} of {len(held_out)} right ({100 * right / len(held_out):.2f}%)")


def versions() -> dict[str, str]:
    modules = (np, torch, transformers, sklearn)
    return {module.__name__: module.__version__ for module in modules}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", action="store_true", help="do not train; write only the golden logits")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same weights from run to run
    images, labels, train_indices, held_out = digits()
    if not arguments.golden:
        start = time.perf_counter()
        model = train(pixels(images[train_indices]), torch.from_numpy(labels[train_indices]))
        print(f"trained in {time.perf_counter() - start:.0f} s with {versions()}")
        write_checkpoint(model, images, labels, train_indices, held_out)
    write_golden(images, labels, held_out)


if __name__ == "__main__":
    main()
