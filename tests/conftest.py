"""What the tests share: the available backends, random configs and weights, and an array's distance from the truth."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("MINIBEIT_BACKEND", "numpy")  # tests of a fast backend name it; the others test the model

import numpy as np
import pytest

from minibeit import BeitConfig
from minibeit.ops import BACKENDS, PositionBias, get_ops
from minibeit.ops.table import TABLE
from minibeit.params import param_shapes


def gpu_missing() -> str | None:
    """Why backend cupy cannot run here, or None if it can."""
    try:
        get_ops("cupy")
    except (ImportError, OSError) as error:
        return f"no CUDA device: {error}"
    return None


def available_backends() -> list[Any]:
    """Every backend, for `parametrize`; without a GPU, cupy is skipped with that reason.

    A backend whose library is installed but fails to import is an error, not a skip.
    """
    names: list[Any] = [name for name in BACKENDS if name == "numpy" or importlib.util.find_spec(name) is not None]
    reason = gpu_missing()
    if reason is None:
        return names
    return [name for name in names if name != "cupy"] + [pytest.param("cupy", marks=pytest.mark.skip(reason=reason))]


def on_host(ops: Any) -> SimpleNamespace:
    """`ops` of a GPU for tests: they take NumPy arrays and unprepared leaves, and return NumPy arrays."""

    def up(x: Any) -> Any:
        if isinstance(x, (np.ndarray, np.generic)):
            return ops.asarray(x, x.dtype)
        if isinstance(x, list):
            return [up(part) for part in x]
        if isinstance(x, PositionBias):
            return replace(x, table=up(x.table))
        return x

    def down(x: Any) -> Any:
        return tuple(map(down, x)) if isinstance(x, tuple) else ops.to_host(x)

    def wrapped(op: Any) -> Any:
        return lambda *args, **kwargs: down(op(*map(up, args), **{name: up(x) for name, x in kwargs.items()}))

    arithmetic = {name for name, op in TABLE.items() if op.is_arithmetic or op.shape or name == "masked_patches"}
    table = {name: wrapped(op) if name in arithmetic else op for name, op in vars(ops).items()}
    return SimpleNamespace(**table)


@pytest.fixture(params=available_backends(), scope="session")
def ops(request):
    """The ops of each backend in turn."""
    ops = get_ops(request.param)
    return on_host(ops) if request.param == "cupy" else ops


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tiny_config(**changes) -> BeitConfig:
    """A BEiT small enough for plain loops: 2 blocks, width 12, 3 heads, 3x2 patches."""
    settings = dict(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        image_size=(12, 8),
        patch_size=4,
        vocab_size=10,
        num_labels=5,
        auxiliary_channels=6,
        pool_scales=[1, 2, 3],
    )
    return BeitConfig.from_dict({**settings, **changes})


def random_weights(config: BeitConfig, task: str, seed: int = 0, dtype: str = "float64") -> dict[str, np.ndarray]:
    """{canonical name: array}: no zeros and no ones, which would hide mistakes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in param_shapes(config, task).items():
        noise = rng.standard_normal(shape)
        if name.endswith("running_var"):
            noise = 1 + 0.2 * np.abs(noise)
        elif len(shape) == 1 and name.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise *= min(0.5, np.prod(shape[1:]) ** -0.5) if len(shape) > 1 and name.endswith("weight") else 0.3
        arrays[name] = noise.astype(np.float32).astype(dtype)  # exact in float32, so both dtypes have the same weights
    return arrays


def make(model_class, config: BeitConfig, dtype: str = "float64", backend: str = "numpy", seed: int = 0):
    """A model with `random_weights`."""
    arrays = random_weights(config, model_class.task, seed, dtype)
    return model_class(config, arrays=arrays, dtype=dtype, backend=backend)


def rms(x) -> float:
    x = np.asarray(x, np.float64)
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def distance(found, truth) -> float:
    """Root mean square of the difference relative to that of the truth; shapes must agree."""
    found, truth = np.asarray(found), np.asarray(truth)
    assert found.shape == truth.shape, (found.shape, truth.shape)
    return rms(np.asarray(found, np.float64) - truth) / max(rms(truth), 1e-300)
