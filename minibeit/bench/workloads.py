"""What is measured: tasks in the shapes of the published models, with random weights in a file in the Hub's layout."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.save import save_checkpoint
from ..config import BeitConfig
from ..params import param_shapes
from ..task_table import CLASSES
from ..tasks import task_class

SIZES: dict[str, dict[str, Any]] = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "digits": dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, patch_size=4),
}
OUT_INDICES = {"base": (3, 5, 7, 11), "large": (7, 11, 15, 23), "digits": (1, 2, 3, 4)}

# name of the task -> (name in `task_table`, classes, image size)
TASKS: dict[str, tuple[str, int, int]] = {
    "classification": ("image_classification", 1000, 224),
    "mim": ("masked_image_modeling", 2, 224),
    "segmentation": ("semantic_segmentation", 150, 640),
    "backbone": ("backbone", 2, 224),
}
DIGITS_IMAGE = 32
TRAINED_IMAGE = {"segmentation": 512}  # where it is another size than in use


@dataclass(frozen=True)
class Workload:
    """One row of a table: a task, a model size, an image size, a batch size; a forward pass or a step of training."""

    task: str
    size: str
    image_size: int
    batch_size: int
    training: bool = False

    @property
    def name(self) -> str:
        images = "" if self.batch_size == 1 else f" x {self.batch_size}"
        step = ", a training step" if self.training else ""
        return f"{self.size} {self.image_size} {self.task}{images}{step}"

    @property
    def model(self) -> str:
        """Name of the checkpoint: the same for every batch size."""
        return f"{self.task}-{self.size}-{self.image_size}"

    @property
    def config(self) -> BeitConfig:
        """The config of the published model of this task and size, with a bias table in every block."""
        settings = dict(
            SIZES[self.size],
            image_size=self.image_size,
            use_relative_position_bias=True,
            num_labels=TASKS[self.task][1],
            use_mask_token=self.task == "mim",
        )
        if self.task in ("segmentation", "backbone"):
            settings["out_indices"] = OUT_INDICES[self.size]
        return BeitConfig.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def make(task: str, size: str, image_size: int | None, batch_size: int, training: bool = False) -> Workload:
    """The workload, with the task's usual image size if none is given.  Raises ValueError if it is impossible."""
    usual = (
        DIGITS_IMAGE if size == "digits" else TRAINED_IMAGE.get(task, TASKS[task][2]) if training else TASKS[task][2]
    )
    workload = Workload(task, size, image_size or usual, batch_size, training)
    ph, pw = workload.config.patch_shape
    if workload.image_size % ph or workload.image_size % pw:
        raise ValueError(f"--image-size: expected a multiple of the patch size {ph}, found {workload.image_size}")
    if task == "segmentation" and min(workload.config.grid) < 2:
        raise ValueError(f"--image-size: segmentation needs 2x2 patches, {workload.image_size} pixels give fewer")
    return workload


def model_class(task: str) -> Any:
    """minibeit's class of the task."""
    return task_class(TASKS[task][0])


def write_checkpoint(workload: Workload, folder: Path, seed: int = 0) -> Path:
    """Writes `config.json` and `model.safetensors` with random weights; returns the folder.

    No zeros and no ones, so that no engine can skip anything, and no denormal numbers.
    """
    name = TASKS[workload.task][0]
    config = workload.config.replace(architectures=(CLASSES[name],))
    rng = np.random.default_rng(seed)
    arrays = {key: _random(key, shape, rng) for key, shape in param_shapes(config, name).items()}
    save_checkpoint(folder, config, name, arrays)
    return folder


def _random(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(shape, dtype=np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "weight" and len(shape) > 1:  # keeps activations at their magnitude, even with 27,648 inputs
        fan_in = shape[0] if "deconv" in name else int(np.prod(shape[1:]))
        return noise * np.float32(fan_in**-0.5)
    if last.startswith("lambda"):
        return 0.1 + 0.01 * noise
    if last in ("weight", "running_var"):
        return 1 + 0.1 * np.abs(noise)
    return 0.3 * noise


def pixels(workload: Workload, seed: int = 1) -> np.ndarray:  # -> (B, C, height, width)
    """Random pixel values of the magnitude of normalised images."""
    c = workload.config
    shape = (workload.batch_size, c.num_channels, *c.image_shape)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
