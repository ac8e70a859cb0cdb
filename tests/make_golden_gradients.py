"""Makes data/golden_gradients.safetensors: PyTorch's float64 gradients of models of the other goldens.

Run by hand, `python tests/make_golden_gradients.py`, after make_golden.py; needs the extra verify.  It holds
for each case `CASE.loss`, `CASE.gradient.NAME` of every parameter that the loss depends on and, where batch norms use
the batch, their new running statistics `CASE.running.NAME`.  Weights, inputs and labels are those of the golden.
"""

from __future__ import annotations

import json

import numpy as np
import parity
import torch
import transformers
from golden import DATA, GRADIENT_CASES, load
from make_golden import CASES, TINY
from safetensors import safe_open
from safetensors.numpy import save_file

from minibeit.checkpoint.names import hub_names


def gradients(case: str) -> dict[str, np.ndarray]:
    name, batch = GRADIENT_CASES[case]
    golden = load(name)
    task, changes, _ = CASES[name]
    with safe_open(DATA / f"golden_{name}.safetensors", "np") as file:
        seed = int(file.metadata()["seed"])
    model = parity.hf_model(task, {**TINY, **changes}, seed)
    names = hub_names(golden.weights)
    stored = parity.hf_arrays(model)
    assert all(np.array_equal(stored[names[key]], array) for key, array in golden.weights.items())
    for module in model.modules():
        if batch and isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    inputs = {key: torch.from_numpy(array) for key, array in golden.inputs.items()}
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    loss = model(**inputs).loss
    loss.backward()
    for parameter in model.parameters():
        parameter.data.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    found = parity.hf_arrays(model)
    arrays = {"loss": loss.detach().numpy()}
    for key in golden.weights:
        if ".running_" not in key and np.any(found[names[key]]):
            arrays[f"gradient.{key}"] = found[names[key]]
        elif ".running_" in key and batch:
            arrays[f"running.{key}"] = found[names[key]]
    return {f"{case}.{key}": np.array(array, order="C") for key, array in arrays.items()}


if __name__ == "__main__":
    tensors: dict[str, np.ndarray] = {}
    for case in GRADIENT_CASES:
        tensors |= gradients(case)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    metadata = {"versions": json.dumps(versions), "made_by": "tests/make_golden_gradients.py"}
    save_file(tensors, DATA / "golden_gradients.safetensors", metadata)
