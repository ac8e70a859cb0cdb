"""Reads the goldens that make_golden.py wrote, without PyTorch, and runs minibeit on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import minibeit
from minibeit.task_table import CLASSES

DATA = Path(__file__).parent / "data"
NAMES = (
    "absolute_positions",
    "absolute_positions_resized",
    "backbone",
    "block_bias",
    "both_biases_resized",
    "cls_pooling",
    "masked",
    "non_square",
    "segmentation",
    "shared_bias",
)

GRADIENT_CASES = {  # case of golden_gradients -> golden, whether batch norms use the batch
    "block_bias": ("block_bias", False),
    "regression": ("absolute_positions", False),
    "masked": ("masked", False),
    "segmentation": ("segmentation", False),
    "segmentation_batch": ("segmentation", True),
}


@dataclass(frozen=True)
class Golden:
    """One pass of a tiny model in PyTorch; arrays by name."""

    task: str
    config: minibeit.BeitConfig
    weights: dict[str, np.ndarray]  # canonical names, float32
    inputs: dict[str, np.ndarray]
    truth: dict[str, np.ndarray]  # float64: intermediates by the names in our traces, outputs as `output.NAME`
    float32_rms: dict[str, float]  # PyTorch float32's distance from the truth
    versions: dict[str, str]

    def model(self, dtype: str, backend: str = "numpy", **changes: Any) -> Any:
        weights = {name: array.astype(dtype) for name, array in self.weights.items()}
        config = self.config.replace(**changes)
        return getattr(minibeit, CLASSES[self.task])(config, arrays=weights, dtype=dtype, backend=backend)

    def run(self, dtype: str, backend: str = "numpy", **changes: Any) -> dict[str, np.ndarray]:
        """What minibeit computes, under the names of `truth`."""
        trace = minibeit.Trace()
        model = self.model(dtype, backend, **changes)
        out = model(**self.inputs, trace=trace)
        kept = [name for name in trace if not name.endswith("bias_table")]  # that one is a weight, resized
        found = {name: model.ops.to_host(trace[name]) for name in kept}
        for name, value in out.items():
            if isinstance(value, tuple):
                found.update({f"output.{name}.{i}": part for i, part in enumerate(value)})
            elif name not in ("logits", "auxiliary_logits"):
                found[f"output.{name}"] = np.asarray(value)
        return found


@cache
def load(name: str) -> Golden:
    with safe_open(DATA / f"golden_{name}.safetensors", "np") as file:
        metadata = file.metadata()
        arrays = {key: file.get_tensor(key) for key in list(file.keys())}

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}

    return Golden(
        task=metadata["task"],
        config=minibeit.BeitConfig.from_dict(json.loads(metadata["config"])),
        weights=part("weight."),
        inputs=part("input."),
        truth=part("truth."),
        float32_rms=json.loads(metadata["float32_rms"]),
        versions=json.loads(metadata["versions"]),
    )


@cache
def load_gradients(case: str) -> dict[str, np.ndarray]:
    """PyTorch's float64 loss, gradients and running statistics of one of GRADIENT_CASES."""
    with safe_open(DATA / "golden_gradients.safetensors", "np") as file:
        return {key[len(case) + 1 :]: file.get_tensor(key) for key in list(file.keys()) if key.startswith(f"{case}.")}
