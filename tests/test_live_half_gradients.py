"""Gradients in half precision beside those of PyTorch's autocast, live: ours may be at most twice as far from float64.

The CuPy backend runs on the stand-in, PyTorch on the CPU; rounding is that of the formats on both.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import parity
import parity_gradients
import torch
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend
from tolerances import FACTOR

from minibeit.checkpoint.names import hub_names
from minibeit.params import flatten, param_shapes
from minibeit.train.gradients import value_and_grad

pytestmark = [pytest.mark.live, pytest.mark.skipif(kernels.compiler() is None, reason="no g++")]
STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
MODELS = {  # heads of 64 numbers, which the fused attention takes, and others
    "classifier": ("image_classification", dict(use_relative_position_bias=True, use_mean_pooling=True, num_labels=5)),
    "masked": (
        "masked_image_modeling",
        dict(use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=40),
    ),
    "other heads": ("image_classification", dict(use_relative_position_bias=True, num_attention_heads=4, num_labels=3)),
    "absolute": ("image_classification", dict(use_absolute_position_embeddings=True, layer_scale_init_value=0.0)),
}


def model_and_inputs(kind):
    task, changes = MODELS[kind]
    settings = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, image_size=80,
                    patch_size=8, layer_norm_eps=1e-12)  # fmt: skip
    hf = parity.hf_model(task, {**settings, **changes}, seed=3)
    rng = np.random.default_rng(4)
    arrays = {"pixel_values": rng.standard_normal((3, 3, 80, 80), dtype=np.float32)}
    if task == "masked_image_modeling":
        mask = rng.random((3, 100)) < 0.4
        arrays |= {"bool_masked_pos": mask, "labels": rng.integers(0, 40, int(mask.sum()))}
    else:
        arrays["labels"] = rng.integers(0, hf.config.num_labels, 3)
    return task, hf, arrays


def pytorch(hf, arrays, dtype):
    """{Hub name: gradient} of float32 weights under autocast."""
    model = copy.deepcopy(hf).float()
    model.set_attn_implementation("sdpa")
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    with torch.enable_grad(), torch.autocast("cpu", getattr(torch, dtype)):
        loss = model(**tensors).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return parity.hf_arrays(model)


def both_errors(kind, dtype):
    """{canonical name: (our error, PyTorch's)}, each relative to the gradient's root mean square in float64."""
    task, hf, arrays = model_and_inputs(kind)
    truth = parity_gradients.hf_gradients(hf, arrays, parity_gradients.Training(), torch.float64)
    theirs = pytorch(hf, arrays, dtype)
    plain = parity.our_model(task, hf, "float32")
    with cupy_backend():
        model = type(plain)(plain.config, arrays=plain.arrays, dtype=dtype, backend="cupy")
        grads = value_and_grad(model, **arrays).grads
        found = {name: model.ops.to_host(array) for name, array in flatten(grads).items()}
    names = param_shapes(plain.config, task)
    prefixed, bare = hub_names(names, "beit"), hub_names(names, bare=True)
    wanted = {name: truth[prefixed[name] if prefixed[name] in truth else bare[name]] for name in found}
    named = {name: theirs[prefixed[name] if prefixed[name] in theirs else bare[name]] for name in found}
    largest = max(map(parity.rms, wanted.values()))
    sizes = {name: max(parity.rms(array), 1e-3 * largest) for name, array in wanted.items()}
    return {
        name: tuple(parity.rms(side[name].reshape(array.shape) - array) / sizes[name] for side in (found, named))
        for name, array in wanted.items()
    }


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_as_near_as_those_of_autocast(kind, dtype, capsys):
    errors = both_errors(kind, dtype)
    ratios = {name: ours / max(theirs, STEP[dtype] / 4) for name, (ours, theirs) in errors.items()}
    ours, theirs = np.sqrt(np.mean(np.square(list(errors.values())), axis=0))
    with capsys.disabled():
        worst = max(ratios, key=ratios.get)
        print(f"\n{kind}, {dtype}: ours {ours:.1e}, autocast {theirs:.1e}, worst {worst} {ratios[worst]:.2f}")
    assert ours <= FACTOR * theirs
    assert max(ratios.values()) <= FACTOR, {name: errors[name] for name, r in ratios.items() if r > FACTOR}
