"""The derivative of every activation of `hidden_act`, each on a NumPy array of any shape, keeping its dtype.

At a kink the derivative is the one PyTorch takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..activations import gelu, sigmoid, softplus
from ..erf import erfc


def derivative(name: str, x: np.ndarray) -> np.ndarray:
    """f'(x) of an activation; in float64, since NumPy's float32 exp and tanh are off by more than a rounding step."""
    return DERIVATIVES[name](x.astype(np.float64, copy=False)).astype(x.dtype, copy=False)


def gelu_derivative(x: np.ndarray) -> np.ndarray:
    """Phi(x) + x phi(x): the normal distribution function and x times its density."""
    return 0.5 * erfc(x * -math.sqrt(0.5)) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def gelu_tanh_derivative(x: np.ndarray) -> np.ndarray:
    """With t = tanh(c (x + a x^3)), c = sqrt(2 / pi), a = 0.044715: (1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(c * (x + a * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * a * x * x)


def silu_derivative(x: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """Of x s, s = sigmoid(slope x): s + slope x s (1 - s)."""
    s = sigmoid(slope * x)
    return s + slope * x * s * (1 - s)


def mish_derivative(x: np.ndarray) -> np.ndarray:
    """With t = tanh(softplus(x)): t + x (1 - t^2) sigmoid(x)."""
    t = np.tanh(softplus(x))
    return t + x * (1 - t * t) * sigmoid(x)


def laplace_derivative(x: np.ndarray) -> np.ndarray:
    """The normal density of mean sqrt(1/2) and variance 1/(4 pi), to the digits of the activation."""
    z = (x - 0.707107) / (0.282095 * math.sqrt(2))
    return np.exp(-z * z) / (math.sqrt(2 * math.pi) * 0.282095)


def sqrtsoftplus_derivative(x: np.ndarray) -> np.ndarray:
    """sigmoid(x) / (2 sqrt(softplus(x)))."""
    return sigmoid(x) / (2 * np.sqrt(softplus(x)))


def step(x: np.ndarray) -> np.ndarray:
    """1 where x > 0, else 0: the derivative of relu."""
    return (x > 0).astype(x.dtype)


def _within(x: np.ndarray, derivative: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.where((x >= low) & (x <= high), derivative, 0).astype(derivative.dtype, copy=False)


def _sigmoid_derivative(x: np.ndarray) -> np.ndarray:
    s = sigmoid(x)
    return s * (1 - s)


DERIVATIVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": gelu_derivative,
    "gelu_10": lambda x: _within(gelu(x), gelu_derivative(x), -10, 10),
    "gelu_accurate": gelu_tanh_derivative,
    "gelu_fast": gelu_tanh_derivative,
    "gelu_new": gelu_tanh_derivative,
    "gelu_python": gelu_derivative,
    "gelu_python_tanh": gelu_tanh_derivative,
    "gelu_pytorch_tanh": gelu_tanh_derivative,
    "hardswish": lambda x: np.where(x >= 3, 1, _within(x, (2 * x + 3) / 6, -3, 3)).astype(x.dtype, copy=False),
    "laplace": laplace_derivative,
    "leaky_relu": lambda x: np.where(x > 0, 1, 0.01).astype(x.dtype),
    "linear": np.ones_like,
    "mish": mish_derivative,
    "quick_gelu": lambda x: silu_derivative(x, 1.702),
    "relu": step,
    "relu2": lambda x: 2 * np.maximum(x, 0),
    "relu6": lambda x: step(x) * (x < 6),
    "sigmoid": _sigmoid_derivative,
    "silu": silu_derivative,
    "sqrtsoftplus": sqrtsoftplus_derivative,
    "swish": silu_derivative,
    "tanh": lambda x: 1 - np.square(np.tanh(x)),
}
