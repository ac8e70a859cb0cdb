"""Twenty steps of training beside PyTorch's AdamW through transformers, live, in float64: the same weights result."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import parity
import parity_gradients
import torch
import transformers
from tolerances import STEPS64

from minibeit.checkpoint.names import hub_names
from minibeit.noise import Noise
from minibeit.params import flatten, param_shapes
from minibeit.train.gradients import value_and_grad
from minibeit.train.optimizer import AdamW, clipped, decayed, layer_number, set_running
from minibeit.train.schedule import Cosine, Polynomial

pytestmark = pytest.mark.live
transformers.logging.set_verbosity_error()

STEPS, DECAY, LAYER_DECAY, CLIP = 20, 0.05, 0.65, 3.0
SETTINGS = dict(
    image_size=12,
    patch_size=3,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=40,
    use_mask_token=True,
    use_relative_position_bias=True,
    use_shared_relative_position_bias=True,
    use_absolute_position_embeddings=True,
    layer_scale_init_value=0.1,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    drop_path_rate=0.2,
    vocab_size=30,
    num_labels=5,
    out_indices=[0, 1, 2, 3],
    pool_scales=[1, 2, 3],
)


def canonical(hf, config, task):
    """{canonical name: parameter of the transformers model}."""
    marked = copy.deepcopy(hf)
    parameters = dict(hf.named_parameters())
    with torch.no_grad():
        for number, name in enumerate(parameters):
            marked.get_parameter(name).fill_(number + 1)
    arrays, listed = parity.hf_arrays(marked), list(parameters.values())
    names = param_shapes(config, task)
    hub = hub_names(names, config.model_type)
    return {name: listed[int(arrays[hub[name]].flat[0]) - 1] for name in names if ".running_" not in name}


def batches(task):
    rng = np.random.default_rng(3)
    for _ in range(STEPS):
        batch = {"pixel_values": rng.standard_normal((3, 3, 12, 12))}
        if task == "image_classification":
            batch["labels"] = rng.integers(0, 5, 3)
        elif task == "masked_image_modeling":
            batch["bool_masked_pos"] = rng.random((3, 16)) < 0.4
            batch["labels"] = rng.integers(0, 30, int(batch["bool_masked_pos"].sum()))
        else:
            batch["labels"] = rng.integers(0, 5, (3, 20, 17))
        yield batch


@pytest.mark.parametrize(
    ("task", "schedule"),
    [
        ("image_classification", Cosine(4e-3, STEPS, warmup=5, floor=1e-6)),
        ("masked_image_modeling", Cosine(1.5e-3, STEPS, warmup=3)),
        ("semantic_segmentation", Polynomial(7e-4, STEPS, warmup=4)),
    ],
)
def test_twenty_steps(task, schedule, capsys):
    hf = parity.hf_model(task, SETTINGS, 1)
    ours = parity.our_model(task, hf, "float64")
    start = {name: array.copy() for name, array in ours.arrays.items()}
    theirs, L = canonical(hf, ours.config, task), SETTINGS["num_hidden_layers"]
    groups = [
        {
            "params": [parameter],
            "weight_decay": DECAY if decayed(name, tuple(parameter.shape)) else 0.0,
            "scale": LAYER_DECAY ** (L + 1 - layer_number(name, L)),
        }
        for name, parameter in theirs.items()
    ]
    reference = torch.optim.AdamW(groups, lr=1.0)
    optimizer = AdamW(ours, weight_decay=DECAY, layer_decay=LAYER_DECAY)
    statistics = task == "semantic_segmentation"
    for module in hf.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(statistics)
    norms = []
    for step, batch in enumerate(batches(task)):
        noise = Noise(7, step)
        parity_gradients.share_noise(hf, noise)
        reference.zero_grad()
        for group in reference.param_groups:
            group["lr"] = schedule(step) * group["scale"]
        with torch.enable_grad():
            loss = hf(**{name: torch.from_numpy(array) for name, array in batch.items()}).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in theirs.values() if p.grad is not None], CLIP)
        reference.step()

        result = value_and_grad(ours, rng=noise, batch_statistics=statistics, **batch)
        grads, norm = clipped(result.grads, CLIP)
        norms.append(norm)
        optimizer.step(grads, schedule(step))
        set_running(ours, result.running)
        assert abs(result.loss - loss.item()) <= STEPS64 * abs(result.loss)
    assert max(norms) > CLIP or task != "image_classification"  # clipping had work to do
    hub, found = hub_names(start, ours.config.model_type), parity.hf_arrays(hf)
    worst = 0.0
    for name, array in flatten(ours.params).items():
        expected = found[hub[name]]
        assert np.isfinite(array).all()
        if not name.endswith("mask_token") or task == "masked_image_modeling":
            assert not np.array_equal(array, start[name]), f"{name} did not move"
        worst = max(worst, parity.rms(array - expected) / parity.rms(expected))
    with capsys.disabled():
        print(
            f"\n{task}: weights after {STEPS} steps differ by {worst:.1e} at most; "
            f"{sum(norm > CLIP for norm in norms)} steps were clipped"
        )
    assert worst <= STEPS64
