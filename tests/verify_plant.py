"""Planted faults: the mistakes people make when they write BEiT again, each with the array where it must be found.

A fault changes the model under test, never the truth: its weights, its config, one of its ops, or an ops' result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from conftest import random_weights, tiny_config

from minibeit.ops import reference
from minibeit.params import ConvTranspose, LayerNorm, table_rows
from minibeit.tasks import task_class
from minibeit.verify.known_mistakes import half
from minibeit.verify.lockstep import Job, Report, check, model_source


@dataclass
class Fault:
    """`plant(model)` breaks a model; `guilty` is where it shows first; `says` stands in the diagnosis."""

    name: str
    guilty: str
    plant: Callable[[Any], Any]
    says: str = ""
    task: str = "image_classification"
    settings: dict[str, Any] | None = None


SETTINGS = dict(use_relative_position_bias=True, layer_scale_init_value=0.1, num_hidden_layers=3)
SEGMENTATION = dict(num_hidden_layers=4, out_indices=[1, 2, 3, 4], image_size=(16, 24), auxiliary_concat_input=True)


def job(task: str, seed: int = 0, batch: int = 2, **settings: Any) -> Job:
    """A tiny model of a task with random weights and pixels."""
    extra = SEGMENTATION if task == "semantic_segmentation" else {}
    if task == "masked_image_modeling":
        extra = dict(use_mask_token=True)
    config = tiny_config(**{**SETTINGS, **extra, **settings})
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((batch, config.num_channels, *config.image_shape), dtype=np.float32)
    inputs = {"pixel_values": pixels}
    if task == "masked_image_modeling":
        inputs["bool_masked_pos"] = rng.random((batch, config.grid[0] * config.grid[1])) < 0.4
    return Job(config, task, random_weights(config, task, seed, "float32"), inputs)


def model_of(made: Job, backend: str = "numpy") -> Any:
    """The model under test, without any fault yet."""
    return task_class(made.task)(made.config, arrays=dict(made.arrays), backend=backend)


def report_of(fault: Fault, seed: int = 0, yardstick: Any = None) -> Report:
    """What the verifier says about a model with this fault; `yardstick(job)` makes another than NumPy."""
    made = job(fault.task, seed, **(fault.settings or {}))
    model = model_of(made)
    model.ops = SimpleNamespace(**vars(model.ops))
    model = fault.plant(model) or model
    return check(made, model_source(made, model, fault.name), yardstick and yardstick(made))


# Ways to plant ------------------------------------------------------------------------------------------------------


def weights(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """Replaces weights; names have `__` for dots."""

    def plant(model: Any) -> Any:
        arrays = dict(model.arrays)
        for key, change in changes.items():
            name = key.replace("__", ".")
            arrays[name] = np.ascontiguousarray(change(arrays[name].copy()), np.float32)
        return type(model)(model.config, arrays=arrays, backend="numpy")

    return plant


def config(**changes: Any) -> Callable[[Any], Any]:
    """Another config on the same weights."""
    return lambda model: type(model)(model.config.replace(**changes), arrays=model.arrays, backend="numpy")


def op(name: str, faulty: Callable[..., Any], call: int | None = None) -> Callable[[Any], Any]:
    """Replaces an op: all its calls, or the one of that number (from 0)."""

    def plant(model: Any) -> None:
        good, count = getattr(model.ops, name), [0]

        def maybe(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return (faulty if call is None or count[0] == call + 1 else good)(*args, **kwargs)

        setattr(model.ops, name, maybe)

    return plant


def after(name: str, change: Callable[[Any], Any], call: int | None = None) -> Callable[[Any], Any]:
    """Changes the result of an op."""
    return op(name, lambda *args, **kwargs: change(getattr(reference, name)(*args, **kwargs)), call)


def bf16(x: np.ndarray) -> np.ndarray:
    return half(x, "bfloat16").astype(np.float32)


def f16(x: np.ndarray) -> np.ndarray:
    return half(x, "float16").astype(np.float32)


def index_of(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Any], None]:
    """Replaces the index of every position bias."""

    def attention(q: Any, k: Any, v: Any, bias: Any, *args: Any, **kwargs: Any) -> Any:
        index = change(reference.relative_position_index(bias.grid), table_rows(bias.grid))
        return reference.attend(q, k, v, bias.table, index, *args, **kwargs)

    return op("attention", attention)


def swap_cls(index: np.ndarray, R: int) -> np.ndarray:
    first, second = index == R - 3, index == R - 2
    index[first], index[second] = R - 2, R - 3
    return index


def turn(index: np.ndarray, R: int) -> np.ndarray:
    """The index that (width, height) instead of (height, width) gives; for a grid of 3x2."""
    gh, gw = 3, 2
    row, column = np.arange(gh * gw) // gw, np.arange(gh * gw) % gw
    index[1:, 1:] = (column[:, None] - column + gw - 1) * (2 * gh - 1) + row[:, None] - row + gh - 1
    return index


def swap_rows(table: np.ndarray, one: int, two: int) -> np.ndarray:
    table[[one, two]] = table[[two, one]]
    return table


def one_wrong_row(table: np.ndarray) -> np.ndarray:
    table[7] += 0.01
    return table


def biased_keys(x: Any, p: Any, num_heads: int) -> Any:
    q, k, v = reference.project_qkv(x, p, num_heads)
    return q, k + p.query.bias.reshape(1, num_heads, 1, -1), v


def attention_with(**changes: Any) -> Callable[..., Any]:
    def faulty(q: Any, k: Any, v: Any, bias: Any, return_probs: bool = False, keep: Any = None) -> Any:
        q = q * np.float32(changes.get("factor", 1))
        bias = None if changes.get("no_bias") else bias
        context, probs = reference.attention(q, k, v, bias, True)
        if changes.get("mixed_heads"):
            B, H, N, d = q.shape
            context = context.reshape(B, N, H, d).swapaxes(2, 3).reshape(B, N, -1)
        if changes.get("half_probs"):
            probs = f16(probs)
            context = (probs @ v).transpose(0, 2, 1, 3).reshape(context.shape)
        return (context, probs) if return_probs else context

    return faulty


def no_scale(x: Any, layer: Any, scale: Any, residual: Any, keep: Any = None) -> Any:
    return reference.linear_residual(x, layer, None, residual)


def scaled_before_bias(x: Any, layer: Any, scale: Any, residual: Any, keep: Any = None) -> Any:
    return residual + scale * reference.linear(x, replace(layer, bias=None)) + layer.bias


def relu_dropped(x: Any, layer: Any) -> Any:
    return reference.batch_norm(reference.conv2d(x, layer.conv), layer.bn)


def batch_norm_eps(eps: float) -> Callable[..., Any]:
    def faulty(x: Any, layer: Any) -> Any:
        bn = replace(layer.bn, running_var=layer.bn.running_var + np.float32(eps - 1e-5))
        return reference.conv_bn_relu(x, replace(layer, bn=bn))

    return faulty


def resized_with(resize: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(maps: Any, layer: Any, size: Any) -> Any:
        return reference.conv_bn_relu(np.concatenate([resize(x, size) for x in maps], 1), layer)

    return faulty


def align_corners(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    def matrix(old: int, new: int) -> np.ndarray:
        position = np.arange(new) * ((old - 1) / max(new - 1, 1))
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old))).astype(x.dtype)

    return matrix(x.shape[2], size[0]) @ x @ matrix(x.shape[3], size[1]).T


def nearest(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(new) * old // new for old, new in zip(x.shape[2:], size))
    return x[:, :, rows][:, :, :, columns]


def flipped(x: Any, deconv: ConvTranspose) -> Any:
    return reference.conv_transpose(x, replace(deconv, weight=deconv.weight[:, :, ::-1, ::-1]))


def averaged(x: np.ndarray) -> np.ndarray:
    B, C, h, w = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(B, C, h // 2, 2, w // 2, 2).mean((3, 5))


def tiles(x: np.ndarray, size: int) -> np.ndarray:
    """Adaptive pooling with cells that do not overlap."""
    B, C, h, w = x.shape
    y = reference.adaptive_avg_pool(x, size)
    for i in range(size):
        for j in range(size):
            rows, columns = (
                slice(i * h // size, max((i + 1) * h // size, i * h // size + 1)),
                slice(j * w // size, max((j + 1) * w // size, j * w // size + 1)),
            )
            y[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return y


def pooling_with_cls(model: Any) -> None:
    """The mean of all tokens: the CLS token is averaged in by the norm of the pooler."""
    states: list[Any] = []
    good_norm, good_residual = model.ops.layer_norm, model.ops.linear_residual

    def residual(*args: Any) -> Any:
        states.append(good_residual(*args))
        return states[-1]

    def norm(x: Any, p: LayerNorm, eps: float) -> Any:
        return good_norm(states[-1].mean(1) if x.ndim == 2 else x, p, eps)

    model.ops.linear_residual, model.ops.layer_norm = residual, norm


def pooling_cls_only(model: Any) -> None:
    states: list[Any] = []
    good_norm, good_residual = model.ops.layer_norm, model.ops.linear_residual

    def residual(*args: Any) -> Any:
        states.append(good_residual(*args))
        return states[-1]

    model.ops.linear_residual = residual
    model.ops.layer_norm = lambda x, p, eps: good_norm(states[-1][:, 0] if x.ndim == 2 else x, p, eps)


def unbiased_variance(x: np.ndarray, p: LayerNorm, eps: float) -> np.ndarray:
    D = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt(np.square(centred).sum(-1, keepdims=True) / (D - 1) + x.dtype.type(eps)) * p.weight + p.bias
    )


def no_softmax_shift(model: Any) -> None:
    """exp without subtracting the largest score: overflows as soon as scores are large."""

    def faulty(q: Any, k: Any, v: Any, bias: Any, return_probs: bool = False, keep: Any = None) -> Any:
        with np.errstate(all="ignore"):
            scores = q @ k.swapaxes(2, 3) * np.float32(q.shape[-1] ** -0.5) * 400
            e = np.exp(scores)
            probs = e / e.sum(-1, keepdims=True)
            context = (probs @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)
        return (context, probs) if return_probs else context

    model.ops.attention = faulty
