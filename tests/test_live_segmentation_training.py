"""Training of segmentation beside PyTorch, live: ten steps of the loop in float64, and what transformers loads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import parity
import parity_gradients
import torch
import transformers
from cli_helpers import run, save
from PIL import Image
from segmentation_data import QUICK, pair_folder
from test_live_training import canonical
from tolerances import GRADIENT64, STEPS64
from torch.nn import functional

from minibeit import BeitForSemanticSegmentation, BeitImageProcessor
from minibeit.checkpoint.names import hub_names
from minibeit.model.dropout import dropout_factors
from minibeit.noise import Noise
from minibeit.ops import get_ops
from minibeit.params import flatten
from minibeit.train.label_maps import read_pairs
from minibeit.train.loop import Trainer
from minibeit.train.optimizer import clipped, decayed, layer_number
from minibeit.train.segmentation import Segmentation, processor_for

pytestmark = pytest.mark.live
transformers.logging.set_verbosity_error()

OPS = get_ops("numpy")
TASK, SEED, STEPS = "semantic_segmentation", 5, 10
RECIPE = dataclasses.replace(QUICK, epochs=5, scale=(40, 20), lr=7e-4, layer_decay=0.65, warmup_steps=3, clip=1.0)
SETTINGS = dict(
    image_size=32,
    patch_size=8,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=40,
    use_relative_position_bias=True,
    layer_scale_init_value=0.1,
    drop_path_rate=0.2,
    num_labels=3,
    out_indices=[1, 2, 3, 4],
    pool_scales=[1, 2, 3],
)


def transformers_loss(hf, pixels, labels):
    return hf(pixel_values=pixels, labels=labels).loss


def original_loss(hf, pixels, labels):
    """unilm's and mmseg's: pyramid of the outputs of blocks `out_indices`, means over all pixels, ignored ones too.

    The modules are those of transformers, the way through them the original's.  The heads' dropout is put before their
    last layers by `share_head_dropout`.
    """
    states = hf.beit(pixels, output_hidden_states=True).hidden_states
    B, side = len(pixels), SETTINGS["image_size"] // SETTINGS["patch_size"]
    maps = [states[i + 1][:, 1:].transpose(1, 2).reshape(B, -1, side, side) for i in hf.config.out_indices]
    maps, total = hf.fpn(tuple(maps)), 0.0
    for weight, logits in ((1.0, hf.decode_head(maps)), (0.4, hf.auxiliary_head(maps))):
        resized = functional.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        total = total + weight * functional.cross_entropy(resized, labels, reduction="none", ignore_index=255).mean()
    return total


def share_head_dropout(hf, noise, rate):
    """Channels are dropped before the last layer of each head, by minibeit's noise; returns how to stop it."""
    handles = []
    for place, head in enumerate((hf.decode_head, hf.auxiliary_head)):
        own = noise.at(block=hf.config.num_hidden_layers + 1, place=place)

        def dropped(module, inputs, own=own):
            shape = (*inputs[0].shape[:2], 1, 1)
            return (inputs[0] * torch.from_numpy(dropout_factors(OPS, own, shape, rate, "float64")),)

        handles.append(head.classifier.register_forward_pre_hook(dropped))
    return handles


@pytest.mark.parametrize(
    ("loss_of", "indices", "changes"),
    [(transformers_loss, [1, 2, 3, 4], {}), (original_loss, [0, 1, 2, 3], {"feature_convention": "unilm"})],
    ids=["transformers", "unilm"],
)
def test_ten_steps_of_the_loop(loss_of, indices, changes, tmp_path, capsys):
    original = loss_of is original_loss
    recipe = dataclasses.replace(RECIPE, mean_of_all=original, head_dropout=0.2 if original else 0.0)
    hf = parity.hf_model(TASK, {**SETTINGS, "out_indices": indices}, 1)
    ours = parity.our_model(TASK, hf, "float64", **changes)
    config, theirs = ours.config, canonical(hf, ours.config, TASK)
    pairs = read_pairs(pair_folder(tmp_path / "d", 10), 0.2)
    objective = Segmentation(pairs, processor_for(config, None, recipe, False), recipe, config)
    trainer = Trainer(ours, objective, recipe, tmp_path, seed=SEED)
    L = config.num_hidden_layers
    groups = [
        {
            "params": [parameter],
            "weight_decay": recipe.weight_decay if decayed(name, tuple(parameter.shape)) else 0.0,
            "scale": recipe.layer_decay ** (L + 1 - layer_number(name, L)),
        }
        for name, parameter in theirs.items()
    ]
    reference = torch.optim.AdamW(groups, lr=1.0)
    for module in hf.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    worst, start = {"gradient": 0.0, "weight": 0.0}, {name: a.copy() for name, a in ours.arrays.items()}
    while trainer.state.step < STEPS:
        for batch in list(trainer._batches()):
            step = trainer.state.step
            assert (batch.targets == 255).any() and not (batch.targets == 255).all()
            parity_gradients.share_noise(hf, Noise(SEED, step))
            handles = share_head_dropout(hf, Noise(SEED, step), recipe.head_dropout) if original else []
            reference.zero_grad()
            with torch.enable_grad():
                loss_of(hf, torch.from_numpy(batch.pixels).double(), torch.from_numpy(batch.targets).long()).backward()
            for handle in handles:
                handle.remove()
            before = {name: array.copy() for name, array in flatten(ours.plain_params).items()}
            running = [name for name in before if ".running_" in name]
            found = trainer._learned(objective.for_step(batch, 0.0, (0,)))
            for name in running:  # the step below takes the statistics in once more
                flatten(ours.plain_params)[name][...] = before[name]
            gradients = flatten(found.grads)
            largest = max(float(np.abs(g).max()) for g in gradients.values())
            for name, parameter in theirs.items():
                if parameter.grad is None:
                    assert name not in gradients or not gradients[name].any()
                    continue
                error = parity.rms(gradients[name] - parameter.grad.numpy())
                worst["gradient"] = max(worst["gradient"], error / max(parity.rms(gradients[name]), 1e-4 * largest))
            assert clipped(found.grads, 1.0)[1] > 1.0 or step  # clipping has work to do at the start
            torch.nn.utils.clip_grad_norm_([p for p in theirs.values() if p.grad is not None], recipe.clip)
            for group in reference.param_groups:
                group["lr"] = trainer.rate(step) * group["scale"]
            reference.step()
            trainer._step(batch)
        trainer.state.history.append({})  # the next epoch
    hub, truth = hub_names(start, config.model_type), parity.hf_arrays(hf)
    moved = 0
    for name, array in flatten(ours.plain_params).items():
        worst["weight"] = max(worst["weight"], parity.rms(array - truth[hub[name]]) / parity.rms(truth[hub[name]]))
        moved += not np.array_equal(array, start[name])
    assert moved > len(start) - 20  # transformers never reads the last block
    with capsys.disabled():
        print(f"\n{loss_of.__name__}: over {STEPS} steps gradients differ by {worst['gradient']:.1e}, weights by "
              f"{worst['weight']:.1e} at most")  # fmt: skip
    assert worst["gradient"] <= GRADIENT64 and worst["weight"] <= STEPS64


def test_transformers_loads_what_was_fine_tuned(capsys, tmp_path):
    data, model, output = (
        pair_folder(tmp_path / "d"),
        save(tmp_path / "m", "classify", num_hidden_layers=5),
        tmp_path / "o",
    )
    (tmp_path / "names.txt").write_text("ground\nred thing\ngreen thing\n")
    words = ("--task", "segmentation", "--labels", tmp_path / "names.txt", "--epochs", 2, "--crop-size", 32)
    code, _, err = run(capsys, "finetune", data, "-m", model, "-o", output, *words)
    assert code == 0, err
    theirs = transformers.AutoModelForSemanticSegmentation.from_pretrained(output).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(output, use_fast=False)
    assert theirs.config.id2label == {0: "ground", 1: "red thing", 2: "green thing"}
    file = data / "images" / "0.png"
    pixels = processor(Image.open(file), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(pixels).logits.numpy()
    own = BeitImageProcessor.from_pretrained(output)(file).pixel_values
    found = BeitForSemanticSegmentation.from_pretrained(output, backend="numpy")(own).logits
    np.testing.assert_allclose(found, expected, atol=2e-5)
