"""Gradients of minibeit's models beside PyTorch's autograd through transformers, with the same weights and noise."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import parity
import torch
from random_configs import Draw
from torch.nn import functional
from transformers import AttentionInterface

from minibeit.checkpoint.names import hub_names
from minibeit.model import dropout as places
from minibeit.noise import Noise
from minibeit.ops import get_ops
from minibeit.params import flatten, param_shapes
from minibeit.train.gradients import Gradients, value_and_grad

OPS = get_ops("numpy")


@dataclass
class Training:
    """How the gradients of one call are taken, on both sides."""

    noise: Noise | None = None
    batch_statistics: bool = False
    frozen: tuple[str, ...] = ()  # patterns of canonical names
    recompute: bool = False
    targets: dict[str, np.ndarray] = field(default_factory=dict)  # of outputs, where the model has no loss of its own


def draw_training(made: Draw, hf: Any) -> Training:
    """How to train the model of `draw`, from its seed."""
    rng = np.random.default_rng([made.seed, 17])
    training = Training(recompute=bool(rng.random() < 0.4))
    B = len(made.arrays["pixel_values"])
    if made.model_type == "beit" and rng.random() < 0.7:
        step, first = int(rng.integers(1000)), int(rng.integers(5))
        training.noise = Noise(made.seed, step, tuple(range(first, first + B)))
    training.batch_statistics = made.task in ("semantic_segmentation", "backbone") and B > 1 and rng.random() < 0.6
    L = made.settings["num_hidden_layers"]
    choices = [
        ("beit.embeddings.*",),
        ("*.bias_table", "*lambda_*"),
        tuple(f"beit.encoder.{i}.*" for i in range(L // 2)) + ("beit.embeddings.*",),
        ("*norm*.weight", "*.attention.query.*", "*.fc1.weight"),
        ("beit.*",),
    ]
    if rng.random() < 0.4:
        training.frozen = choices[rng.integers(len(choices))]
    if "labels" not in made.arrays:
        outputs = parity.hf_outputs(hf, made.arrays, output_hidden_states=False, output_attentions=False)
        training.targets = {name: rng.standard_normal(array.shape) for name, array in outputs.items()}
        training.targets.pop("auxiliary_logits", None)
    return training


# minibeit's side ------------------------------------------------------------------------------------------------------


def matching_only(model: Any, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns that match a parameter of this model."""
    from fnmatch import fnmatchcase

    return tuple(p for p in patterns if any(fnmatchcase(name, p) for name in flatten(model.params)))


def our_gradients(model: Any, arrays: dict[str, Any], training: Training) -> Gradients:
    def loss(ops: Any, output: Any) -> Any:
        total = None
        for name, target in training.targets.items():
            key, _, index = name.partition(".")
            made = output[key][int(index)] if index else output[key]
            term = ops.mse_loss(made, target.astype(made.dtype))
            total = term if total is None else total + term
        return total

    extra = {"output_auxiliary_logits": True} if model.task == "semantic_segmentation" else {}  # PyTorch always does
    return value_and_grad(
        model,
        rng=training.noise,
        frozen=matching_only(model, training.frozen),
        batch_statistics=training.batch_statistics,
        recompute=training.recompute,
        loss=loss if training.targets else None,
        **arrays,
        **extra,
    )


# PyTorch's side -------------------------------------------------------------------------------------------------------


class Factors(torch.nn.Module):
    """Multiplies its input by the factors of minibeit's noise; a block calls it once for each of `calls`."""

    def __init__(self, noise: Noise, calls: tuple[int, ...], rate: float, whole_samples: bool) -> None:
        super().__init__()
        self.noise, self.calls, self.rate, self.whole_samples, self.count = noise, calls, rate, whole_samples, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = self.calls[self.count % len(self.calls)]
        self.count += 1
        if self.rate == 0:
            return x
        shape = (len(x), 1, 1) if self.whole_samples else tuple(x.shape)
        dtype = str(x.dtype).removeprefix("torch.")
        return x * torch.from_numpy(places.dropout_factors(OPS, self.noise.at(place=place), shape, self.rate, dtype))


def noisy_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """`parity.exact_attention`, its probabilities multiplied by the module's factors."""
    scores = query @ key.transpose(2, 3) * scaling
    probs = torch.softmax(scores if attention_mask is None else scores + attention_mask, -1)
    factors = getattr(module, "minibeit_factors", None)
    dropped = probs if factors is None else factors(probs)
    return (dropped @ value).transpose(1, 2).contiguous(), probs


AttentionInterface.register("noisy", noisy_attention)


def share_noise(hf: Any, noise: Noise) -> None:
    """Puts minibeit's noise in place of PyTorch's, whose generator gives other numbers."""
    config = hf.config
    hidden, L = config.hidden_dropout_prob, config.num_hidden_layers
    hf.set_attn_implementation("noisy")
    modules = list(hf.modules())
    for module in modules:
        if type(module).__name__ == "BeitEmbeddings":
            module.dropout = Factors(noise, (0,), hidden, False)
    blocks = [module for module in modules if type(module).__name__ == "BeitLayer"]
    assert len(blocks) == L
    for i, module in enumerate(blocks):
        own = noise.at(block=i + 1)
        rate = config.drop_path_rate * i / max(L - 1, 1)
        module.dropout = Factors(own, (places.ATTENTION, places.MLP), hidden, False)
        module.drop_path = Factors(own, (places.ATTENTION_PATH, places.MLP_PATH), rate, True)
        probs = Factors(own, (places.PROBS,), config.attention_probs_dropout_prob, False)
        object.__setattr__(module.attention, "minibeit_factors", probs)


def hf_gradients(hf: Any, arrays: dict[str, Any], training: Training, dtype: torch.dtype) -> dict[str, Any]:
    """{"loss": ..., canonical name: gradient, or None} and new running statistics, of a copy in `dtype`."""
    model = copy.deepcopy(hf).to(dtype)
    if training.noise is not None:
        share_noise(model, training.noise)
    elif model.config.model_type == "beit":
        model.set_attn_implementation("exact")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(training.batch_statistics)
    inputs = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.asarray(array))
        inputs[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    with torch.enable_grad():
        output = model(**inputs)
        loss = output.get("loss")
        if training.targets:
            loss = sum(
                functional.mse_loss(_part(output, name), torch.from_numpy(target).to(dtype))
                for name, target in training.targets.items()
            )
        loss.backward()
    running = {key: buffer.clone() for key, buffer in model.named_buffers()}
    none = set()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.grad is None:
                none.add(key)
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    assert all(torch.equal(buffer, running[key]) for key, buffer in model.named_buffers())
    return {"loss": loss.detach().numpy()} | parity.hf_arrays(model)


def _part(output: Any, name: str) -> torch.Tensor:
    key, _, index = name.partition(".")
    return output[key][int(index)] if index else output[key]


def both(made: Draw, training: Training, hf: Any, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """({name: ours}, {name: PyTorch's}): loss, gradient of every parameter that is learned, running statistics."""
    ours = parity.our_model(made.task, hf, dtype, **made.changes)
    result = our_gradients(ours, made.arrays, training)
    found = flatten(result.grads)
    theirs = hf_gradients(hf, made.arrays, training, getattr(torch, dtype))
    names = param_shapes(ours.config, made.task)
    prefixed, bare = hub_names(names, ours.config.model_type), hub_names(names, bare=True)
    named = {name: theirs[prefixed[name] if prefixed[name] in theirs else bare[name]] for name in names}
    mine, truth = {"loss": np.asarray(result.loss)}, {"loss": theirs["loss"]}
    frozen = matching_only(ours, training.frozen)
    from minibeit.train.gradients import matching

    left_out = matching(names, frozen) if frozen else set()
    for name in names:
        if ".running_" in name:
            if training.batch_statistics:
                mine[name], truth[name] = result.running[name], named[name]
            continue
        if name in left_out:
            assert name not in found
            continue
        mine[name] = found.get(name, np.zeros(names[name], dtype))
        truth[name] = named[name]
    return mine, truth
