"""Contestants that train: each turns a checkpoint folder into a function that does one full step on pixels.

A step is forward, loss, backward and AdamW on all parameters, in float32 and without dropout.  It returns the gradient
of the patch embedding, which the backward reaches last: in the first step those of all contestants must agree.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..train.gradients import value_and_grad
from ..train.optimizer import AdamW, EarlyStep
from . import gpu
from .workloads import Workload, model_class

BACKENDS = {"numba": "minibeit numba", "numpy": "minibeit numpy", "numba-recompute": "minibeit numba, recomputing"}
PEERS = {"torch": "PyTorch eager", "inductor": "PyTorch compiled"}
MARKS = {"inductor": "compiled"}  # a file that says that a peer has compiled the model before
STEPS = 3  # before the peak of memory is read: PyTorch makes the optimizer's state in the first
RATE, DECAY = 1e-5, 0.05
LAST = "beit.embeddings.patch.weight"  # what the backward reaches last
MASKED = 0.4  # of the patches

Inputs = dict[str, np.ndarray]


def load(
    name: str, workload: Workload, folder: Path, threads: int, dtype: str = "float32", device: int | None = None
) -> Any:
    """The contestant: step(pixels) -> gradient.  minibeit's threads are set by the environment, PyTorch's here."""
    if name in gpu.CONTESTANTS:
        from . import gpu_training

        return gpu_training.load(name, workload, folder, dtype, device)
    if name in BACKENDS:
        backend, _, recompute = name.partition("-")
        return Step(model_class(workload.task).from_pretrained(folder, backend=backend), workload, bool(recompute))
    return TorchStep(workload, folder, threads, compiled=name == "inductor")


def inputs(workload: Workload, seed: int = 2) -> Inputs:
    """What goes to the model beside the pixels: labels, and the mask of masked modelling."""
    c, rng, B = workload.config, np.random.default_rng(seed), workload.batch_size
    if workload.task == "classification":
        return {"labels": rng.integers(0, c.num_labels, B)}
    if workload.task == "segmentation":
        return {"labels": rng.integers(0, c.num_labels, (B, *c.image_shape))}
    P = c.grid[0] * c.grid[1]
    mask = rng.permuted(np.tile(np.arange(P) < MASKED * P, (B, 1)), axis=1)
    return {"bool_masked_pos": mask, "labels": rng.integers(0, c.vocab_size, int(mask.sum()))}


def batch_statistics(workload: Workload) -> bool:
    """Whether batch norms use the batch: with one image the smallest map has one value per channel, and no spread."""
    return workload.task == "segmentation" and workload.batch_size > 1


class Step:
    """minibeit's step."""

    def __init__(self, model: Any, workload: Workload, recompute: bool = False) -> None:
        self.model = model
        self.optimizer = AdamW(model, weight_decay=DECAY)
        self.options: dict[str, Any] = dict(inputs(workload), batch_statistics=batch_statistics(workload))
        self.options["recompute"] = recompute

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.optimizer.ops = self.model.ops  # which a profile exchanges
        early, kept = EarlyStep(self.optimizer, RATE), []

        def ready(name: str, gradient: np.ndarray) -> None:
            early(name, gradient)
            if name == LAST:
                kept.append(gradient)

        value_and_grad(self.model, x, ready=ready, **self.options)
        return kept[0]


def trained_by_torch(workload: Workload, folder: Path, torch: Any) -> Any:
    """transformers' model, as it is trained."""
    from .contestants import transformers_model

    model = transformers_model(workload, folder, drop_path_rate=0.0).train()
    if not batch_statistics(workload):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    return model


class TorchStep:
    """The step of transformers' model, with PyTorch's fused AdamW."""

    def __init__(self, workload: Workload, folder: Path, threads: int, compiled: bool) -> None:
        torch = import_module("torch")
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = trained_by_torch(workload, folder, torch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
        self.inputs = {name: torch.from_numpy(array) for name, array in inputs(workload).items()}
        self.forward = torch.compile(self.model) if compiled else self.model

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.optimizer.zero_grad(set_to_none=True)
        self.forward(pixel_values=self.torch.from_numpy(x), **self.inputs).loss.backward()
        self.optimizer.step()
        return self.model.beit.embeddings.patch_embeddings.projection.weight.grad.numpy()
