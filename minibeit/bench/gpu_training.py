"""Contestants that train on a GPU: minibeit and PyTorch, eager and compiled, timed by events of the device.

A step takes pixels from main memory and returns the gradient of the patch embedding there, as those of `training` do.
In half precision all have float32 weights; in float16 the loss is scaled.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..model.masked_modeling import IGNORE_INDEX
from ..train.gradients import value_and_grad
from . import gpu, training
from .workloads import Workload, model_class


def load(name: str, workload: Workload, folder: Path, dtype: str, device: int | None) -> gpu.GpuForward:
    """The contestant: step(pixels) -> gradient, and what times it."""
    if name == "cupy":
        model = model_class(workload.task).from_pretrained(folder, backend="cupy", dtype=dtype, device=device)
        return gpu.minibeit_forward(model, step=CupyStep(model, workload))
    step = TorchStep(workload, folder, dtype, device, compiled=name == "torch-compiled")
    return gpu.torch_contestant(step.torch, step, step.place)


class CupyStep:
    """minibeit's step: as that of `TrainerOnDevice`, of one piece."""

    def __init__(self, model: Any, workload: Workload) -> None:
        from ..train.device import AdamWOnDevice, SumsOnDevice, Uploads
        from ..train.ranks import Ranks

        self.model = model
        with model.ops.num_threads(None):
            self.optimizer = AdamWOnDevice(model, weight_decay=training.DECAY)
            self.sums = SumsOnDevice(self.optimizer.slots, self.optimizer.weights.dtype, Ranks())
            self.uploads = Uploads()
        self.options: dict[str, Any] = dict(training.inputs(workload))
        self.options["batch_statistics"] = training.batch_statistics(workload)
        if workload.task == "mim":  # as in pre-training, where the host counts the masked patches
            labels = self.options.pop("labels")
            self.options["return_all_tokens"] = False
            self.options["loss"] = lambda ops, output: ops.cross_entropy(output.logits, labels, IGNORE_INDEX)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        device, sums = self.optimizer.device, self.sums
        with self.model.ops.num_threads(None):
            scale = float(device.control[0]) if self.optimizer.half else 1.0
            sums.begin()
            found = value_and_grad(
                self.model, self.uploads.upload(x), weight=device.scaled(1.0), ready=partial(sums.add, last=True),
                wait=False, **self.options,
            )  # fmt: skip
            sums.end()
            device.step(sums.vector, found.loss.reshape(1), sums.seen(), training.RATE, float("inf"))
            slot = sums.slots[training.LAST]
            return sums.vector[slot.start : slot.stop].get() / np.float32(scale)


class TorchStep:
    """The step of transformers' model on the same GPU: autocast in half precision, the fused AdamW, SDPA."""

    def __init__(self, workload: Workload, folder: Path, dtype: str, device: int | None, compiled: bool) -> None:
        torch = self.torch = import_module("torch")
        self.place, self.half = gpu.torch_place(torch, device), dtype != "float32"
        self.kind = getattr(torch, dtype)
        self.model = training.trained_by_torch(workload, folder, torch).to(self.place)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.RATE, weight_decay=training.DECAY, fused=True
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
        inputs = training.inputs(workload)
        self.inputs = {name: torch.from_numpy(array).to(self.place) for name, array in inputs.items()}
        self.forward = torch.compile(self.model) if compiled else self.model

    def __call__(self, x: np.ndarray) -> np.ndarray:
        torch = self.torch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", self.kind, enabled=self.half):
            loss = self.forward(pixel_values=torch.from_numpy(x).to(self.place), **self.inputs).loss
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        gradient = self.model.beit.embeddings.patch_embeddings.projection.weight.grad
        return gradient.cpu().numpy().reshape(-1)  # the scaler's step has divided it by the scale
