"""Pairs of models, minibeit's and transformers', with the same weights; and the yardstick both are held to.

The yardstick: the distance from a float64 run, ours beside PyTorch float32's own.  Used by the live tests and by the
scripts that make goldens; needs torch and transformers.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import torch
import transformers
from tolerances import EPS32, FEW, FEW_FLOOR, FLOOR
from transformers import AttentionInterface

import minibeit
from minibeit.checkpoint.names import hub_names
from minibeit.params import param_shapes
from minibeit.task_table import CLASSES

OPTIONS = {"output_hidden_states": True, "output_attentions": True}


def exact_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention whose softmax keeps the dtype: transformers' "eager" rounds to float32 even in a float64 model, and
    its "sdpa" returns no probabilities.  Held against sdpa in test_live_parity."""
    scores = query @ key.transpose(2, 3) * scaling
    probs = torch.softmax(scores if attention_mask is None else scores + attention_mask, -1)
    return (probs @ value).transpose(1, 2).contiguous(), probs


AttentionInterface.register("exact", exact_attention)


def hf_model(task: str, settings: dict[str, Any], seed: int, model_type: str = "beit") -> Any:
    """A transformers model in float64 with every parameter drawn at random, norms and running statistics included.

    Defaults would hide mistakes: zero bias tables, zero biases, layer scales that are all equal.
    """
    name = CLASSES[task]
    config_class = transformers.BeitConfig
    if model_type == "data2vec-vision":
        name, config_class = name.replace("Beit", "Data2VecVision"), transformers.Data2VecVisionConfig
    options = {"add_pooling_layer": True} if task == "model" else {}
    model = getattr(transformers, name)(config_class(**settings, attn_implementation="eager"), **options).eval()
    if model_type == "beit":  # Data2Vec-Vision's eager attention is exact in float64
        model.set_attn_implementation("exact")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("running_var"):
                value.copy_(1 + 0.2 * noise.abs())
            elif value.ndim == 1 and key.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            else:
                fan_in = value[0].numel() if value.ndim > 1 else 1
                value.copy_(noise * (min(0.5, fan_in**-0.5) if key.endswith("weight") else 0.3))
    return model.double()


def hf_arrays(model: Any) -> dict[str, np.ndarray]:
    """{Hub name: float64 array} of a transformers model, names as in a file it saves."""
    if hasattr(model, "config") and model.config.model_type == "data2vec-vision":
        state = {_old_head_name(name): value for name, value in model.state_dict().items()}
    else:
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(model, model.state_dict())
    return {name: value.numpy() for name, value in state.items()}


def _old_head_name(name: str) -> str:
    """The v4 name of a segmentation head's tensor: transformers 5 renames those of Data2Vec-Vision for good."""
    name = re.sub(r"psp_modules\.blocks\.(\d+)\.conv\.", r"psp_modules.\1.1.", name)
    name = name.replace("decode_head.psp_bottleneck", "decode_head.bottleneck")
    return name.replace(".convolution.", ".conv.").replace(".normalization.", ".bn.")


def our_config(model: Any, **changes: Any) -> minibeit.BeitConfig:
    """The BeitConfig of a transformers model."""
    return minibeit.BeitConfig.from_dict(model.config.to_dict(), **changes)


def our_model(task: str, hf: Any, dtype: str, backend: str = "numpy", **changes: Any) -> Any:
    """minibeit's model of `task` with the weights of a transformers model."""
    config = our_config(hf, **changes)
    named = hf_arrays(hf)
    names = param_shapes(config, task)
    prefixed, bare = hub_names(names, config.model_type), hub_names(names, bare=True)
    arrays = {
        name: named.pop(prefixed[name] if prefixed[name] in named else bare[name]).astype(dtype) for name in names
    }
    left = [name for name in named if not name.endswith(("num_batches_tracked", "relative_position_index"))]
    assert not left, f"weights of transformers that minibeit has no place for: {left}"
    return getattr(minibeit, CLASSES[task])(config, arrays=arrays, dtype=dtype, backend=backend)


def hf_float32(model: Any) -> Any:
    """A copy in float32 that computes as transformers does by default when attention maps are asked for."""
    twin = copy.deepcopy(model).float()
    if twin.config.model_type == "beit":
        twin.set_attn_implementation("eager")
    return twin


def hf_outputs(model: Any, arrays: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """Every tensor a transformers model returns for NumPy `arrays`, and the auxiliary logits, which it does not."""
    dtype = next(model.parameters()).dtype
    inputs = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.asarray(array))
        inputs[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    kept: list[Any] = []
    hook = None
    if getattr(model, "auxiliary_head", None) is not None:
        hook = model.auxiliary_head.register_forward_hook(lambda module, args, result: kept.append(result))
    with torch.no_grad():
        named = outputs(model(**inputs, **{**OPTIONS, **options}))
    if hook is not None:
        hook.remove()
        named["auxiliary_logits"] = kept[0].numpy()
    return named


def our_outputs(model: Any, arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor that minibeit returns."""
    extra = {"output_auxiliary_logits": True} if model.task == "semantic_segmentation" else {}
    return outputs(model(**arrays, **OPTIONS, **extra))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0


def independent(error: np.ndarray, truth: np.ndarray) -> float:
    """How many numbers carry an error: (sum e^2)^2 / sum e^4 over the distinct numbers of a tensor.

    Masked patches, for one, have the same token, so that a map of thousands of numbers may have ten different ones.
    """
    if truth.size > 100_000:
        return np.inf
    _, first = np.unique(np.round(truth.ravel() / max(rms(truth), 1e-300), 9), return_index=True)
    squares = np.square(error.ravel()[first], dtype=np.float64)
    squares /= max(squares.max(), 1e-300)
    return float(squares.sum() ** 2 / max(np.square(squares).sum(), 1e-300))


def ratio(ours: np.ndarray, theirs: np.ndarray, truth: np.ndarray, expected: float = 0.0) -> float:
    """Our distance from the truth in units of PyTorch float32's own; at most FACTOR is good.

    `expected` is the relative error that float32 has in this computation.  A handful of numbers has a handful of
    errors, all small now and then, on PyTorch's side or on ours: then the yardstick is what had to be expected, and it
    is longer by three standard deviations of the root mean square of n normal numbers.
    """
    assert ours.shape == theirs.shape == truth.shape, (ours.shape, theirs.shape, truth.shape)
    assert ours.dtype == theirs.dtype == np.float32, (ours.dtype, theirs.dtype)
    assert truth.dtype == np.float64, truth.dtype
    if not truth.size:
        return 0.0
    if np.isnan(truth).any():  # the loss of no label at all
        return 0.0 if np.array_equal(np.isnan(ours), np.isnan(truth)) else np.inf
    floor, luck = FLOOR * EPS32, 1.0
    n = min(independent(side - truth, truth) for side in (ours, theirs))
    if n < FEW:
        floor, luck = max(FEW_FLOOR * EPS32, expected), 1 + 3 / np.sqrt(2 * max(n, 1))
    return rms(ours - truth) / (luck * max(rms(theirs - truth), floor * rms(truth), 1e-45))


def ratios(hf: Any, ours: Any, arrays: dict[str, Any]) -> dict[str, float]:
    """{output: our error in units of PyTorch float32's} of one call, every tensor of both sides accounted for."""
    truth, theirs = hf_outputs(hf, arrays), hf_outputs(hf_float32(hf), arrays)
    found = our_outputs(ours, arrays)
    assert set(found) == set(truth) == set(theirs), (sorted(found), sorted(truth))
    last = max((name for name in truth if name.startswith("hidden_states.")), key=lambda name: int(name[14:]))
    expected = rms(theirs[last] - truth[last]) / rms(truth[last])
    return {name: ratio(found[name], theirs[name], truth[name], expected) for name in truth}


def outputs(result: Any) -> dict[str, np.ndarray]:
    """{name: array} of every tensor in an output of either side."""
    named = {}
    for key, value in result.items():
        parts = value if isinstance(value, (tuple, list)) else [value]
        for i, part in enumerate(parts):
            array = part.detach().numpy() if isinstance(part, torch.Tensor) else np.asarray(part)
            named[f"{key}.{i}" if isinstance(value, (tuple, list)) else key] = array
    return named
