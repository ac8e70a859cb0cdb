"""Ten steps of pre-training beside the code of the paper, in float64: the same weights result.

That code is microsoft/unilm's folder `beit`, which is not installed: MINIBEIT_UNILM names where it lies.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import parity
import torch
from test_pretraining import CONFIG, QUICK, Brightness
from tolerances import STEPS64
from training_data import class_folders

from minibeit import BeitForMaskedImageModeling
from minibeit.model import dropout as places
from minibeit.noise import Noise
from minibeit.train.examples import read_images
from minibeit.train.loop import Trainer
from minibeit.train.pretraining import MaskedModeling, initial_arrays, processor_for

FOLDER = os.environ.get("MINIBEIT_UNILM", "")
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not FOLDER, reason="MINIBEIT_UNILM does not name the folder beit of microsoft/unilm"),
]
RECIPE = dataclasses.replace(QUICK, epochs=2, batch_size=3, lr=2e-3, warmup=1, clip=3.0, drop_path=0.4)
NAMES = ("modeling_pretrain", "modeling_finetune", "modeling_discrete_vae", "optim_factory", "utils")


class Missing(ModuleType):
    """Stands for a module that the original imports: of old versions of timm and torch, or for other tokenizers."""

    to_2tuple = staticmethod(lambda x: (x, x))
    trunc_normal_ = staticmethod(torch.nn.init.trunc_normal_)
    register_model = staticmethod(lambda function: function)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


@pytest.fixture
def original(monkeypatch):
    """The original's modules by name."""
    monkeypatch.syspath_prepend(FOLDER)
    optimizers = "adafactor adahessian adamp lookahead nadam novograd nvnovograd radam rmsprop_tf sgdp"
    timm = ["timm", "timm.utils", "timm.optim", "timm.models", "timm.models.layers", "timm.models.registry"]
    timm += [f"timm.optim.{part}" for part in optimizers.split()]
    for name in ["torch._six", "modeling_discrete_vae", *timm]:
        monkeypatch.setitem(sys.modules, name, Missing(name))
    for name in NAMES:
        if name != "modeling_discrete_vae":
            monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)


class SharedPath(torch.nn.Module):
    """Stochastic depth with minibeit's noise: its first call in a block is for attention, its second for the MLP."""

    def __init__(self, noise, rate):
        super().__init__()
        self.noise, self.rate, self.calls = noise, rate, 0

    def forward(self, x):
        place = (places.ATTENTION_PATH, places.MLP_PATH)[self.calls]
        self.calls += 1
        keep = self.noise.at(place=place).random((len(x), 1, 1)) < 1 - self.rate
        return x * torch.from_numpy(keep / (1 - self.rate))


def test_ten_steps_of_the_paper_s_code(original, tmp_path, capsys):
    config = CONFIG.replace(drop_path_rate=RECIPE.drop_path)
    theirs = original.modeling_pretrain.VisionTransformerForMaskedImageModeling(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, vocab_size=8, init_values=0.1,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).double()  # fmt: skip
    file = tmp_path / "theirs.pth"
    torch.save({"model": theirs.state_dict()}, file)
    ours = BeitForMaskedImageModeling.from_pretrained(
        file, dtype="float64", backend="numpy", drop_path_rate=RECIPE.drop_path
    )
    start = {name: np.array(array) for name, array in ours.arrays.items()}
    data = class_folders(tmp_path / "data", 8)
    objective = MaskedModeling(read_images(data), processor_for(config, RECIPE), RECIPE, ours.config, Brightness())
    (tmp_path / "out").mkdir()
    trainer = Trainer(ours, objective, RECIPE, tmp_path / "out", seed=5)
    assert trainer.steps == 10

    groups = original.optim_factory.get_parameter_groups(theirs, RECIPE.weight_decay, theirs.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.lr)
    rates = original.utils.cosine_scheduler(RECIPE.lr, RECIPE.floor, RECIPE.epochs, 5, warmup_epochs=1)
    norms = []

    def step(batch):
        number = trainer.state.step
        for i, block in enumerate(theirs.blocks):
            if i:  # the rate of the first block is 0
                block.drop_path = SharedPath(Noise(5, number).at(block=i + 1), RECIPE.drop_path * i)
        for group in optimizer.param_groups:
            group["lr"] = rates[number] * group["lr_scale"]
        mask = torch.from_numpy(batch.mask)
        logits = theirs(torch.from_numpy(batch.pixels).double(), bool_masked_pos=mask, return_all_tokens=False)
        loss = torch.nn.CrossEntropyLoss()(logits, torch.from_numpy(batch.targets[batch.mask]))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), RECIPE.clip)))
        optimizer.step()
        return loss.item()

    real, losses = trainer._step, []

    def both(batch):
        before = trainer.state.loss_sum
        expected = step(batch)
        real(batch)
        losses.append(abs((trainer.state.loss_sum - before) / len(batch) - expected) / expected)

    trainer._step = both
    trainer.run()
    torch.save({"model": theirs.state_dict()}, file)
    expected = BeitForMaskedImageModeling.from_pretrained(file, dtype="float64", backend="numpy").arrays
    worst = max(parity.rms(ours.arrays[name] - array) / parity.rms(array) for name, array in expected.items())
    with capsys.disabled():
        print(f"\nten steps of the original: weights differ by {worst:.1e}, losses by {max(losses):.1e} at most")
    assert max(norms) > RECIPE.clip > min(norms)  # clipping had work to do, and not always
    assert all(not np.array_equal(array, start[name]) for name, array in expected.items())
    assert worst <= STEPS64 and max(losses) <= STEPS64


def test_initial_weights_are_distributed_as_theirs(original):
    torch.manual_seed(0)
    theirs = original.modeling_pretrain.VisionTransformerForMaskedImageModeling(
        img_size=16, patch_size=4, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2, vocab_size=90, init_values=0.1,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, norm_layer=torch.nn.LayerNorm,
    )  # fmt: skip
    config = CONFIG.replace(hidden_size=128, intermediate_size=256, vocab_size=90)
    ours = initial_arrays(config, 0)
    for mine, name in (
        ("beit.embeddings.patch.weight", "patch_embed.proj.weight"),
        ("beit.encoder.1.attention.output.weight", "blocks.1.attn.proj.weight"),
        ("beit.encoder.0.fc1.weight", "blocks.0.mlp.fc1.weight"),
        ("beit.encoder.1.fc2.weight", "blocks.1.mlp.fc2.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        array, other = ours[mine].reshape(-1), theirs.state_dict()[name].numpy().reshape(-1)
        assert array.std() == pytest.approx(float(other.std()), rel=0.06)
        assert np.abs(array).max() == pytest.approx(float(np.abs(other).max()), rel=0.03)
