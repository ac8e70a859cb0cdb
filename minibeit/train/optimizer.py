"""AdamW over one flat vector of all weights, with a rate and a decay for each; clipping; the average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops import host_dtype
from ..params import flatten, unflatten
from .gradients import matching

CACHED = 1 << 15  # numbers
SELDOM_DECAYED = ("cls_token", "position_embeddings")


def layer_number(name: str, num_layers: int) -> int:
    """0 for the embeddings, i + 1 for block i, L + 1 for everything else: the heads, their norms, a shared table."""
    if name.startswith("beit.embeddings."):
        return 0
    if name.startswith("beit.encoder."):
        return int(name.split(".")[2]) + 1
    return num_layers + 1


def decayed(name: str, shape: tuple[int, ...], tables: bool = True, tokens: bool = False) -> bool:
    """Whether weight decay acts on a parameter of that canonical name.

    Not on vectors (biases, norms, layer scales), nor, unless `tokens`, on the CLS token and absolute positions.  As in
    the original the mask token and the position bias tables are decayed, the latter unless `tables` is false.
    """
    if len(shape) < 2 or (name.endswith(SELDOM_DECAYED) and not tokens):
        return False
    return tables or not name.endswith("bias_table")


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in the flat vectors, and how it is learned."""

    name: str
    start: int
    stop: int
    rate: float  # factor of the learning rate
    decay: float  # weight decay


class AdamW:
    """Adam with decoupled weight decay; the weights of `model` are updated where they lie.

    On construction the model's parameters are moved into one flat vector, `weights`, and become views of it.  With
    g a gradient, t the steps a parameter has seen, and its own rate and decay:

        w = w (1 - rate decay),  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
        w = w - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    The rate of a parameter in layer i of L + 1 (see `layer_number`) is `layer_decay`^(L + 1 - i) times that of the
    step, and that of position bias tables `table_rate` times as large.  `frozen` has names or glob patterns of what is
    not learned.  Raises ValueError for numbers out of range.
    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019; LayerDecayValueAssigner in microsoft/unilm beit.
    """

    aligned = 1  # a slot begins at a multiple of so many elements

    def __init__(
        self,
        model: Any,
        *,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay_tables: bool = True,
        decay_tokens: bool = False,
        table_rate: float = 1.0,
        frozen: str | Iterable[str] = (),
    ) -> None:
        _check(weight_decay, layer_decay, betas, eps)
        self.betas, self.eps = betas, eps
        self.ops, self._num_threads, self.dtype = model.ops, model.num_threads, model.dtype
        named = flatten(model.plain_params)
        left_out = matching(named, frozen)
        learned = [name for name in named if name not in left_out and ".running_" not in name]
        start, self.slots = 0, []
        for name in learned:
            shape = named[name].shape
            rate = table_rate if name.endswith("bias_table") else 1.0
            if layer_decay != 1:  # a tokenizer has no such layers
                L = model.config.num_hidden_layers
                rate *= layer_decay ** (L + 1 - layer_number(name, L))
            decay = weight_decay if decayed(name, shape, decay_tables, decay_tokens) else 0.0
            stop = start + math.prod(shape)
            self.slots.append(Slot(name, start, stop, rate, decay))
            start = stop + -stop % self.aligned
        self._numbers = {slot.name: i for i, slot in enumerate(self.slots)}
        self._allocate(start, host_dtype(model.dtype))
        views = {slot.name: self.weights[slot.start : slot.stop].reshape(named[slot.name].shape) for slot in self.slots}
        for name, view in views.items():
            view[...] = self._here(named[name])
        adopt(model, views, self._here)

    def _allocate(self, size: int, dtype: str) -> None:
        self.weights = np.empty(size, dtype)
        # Unlike those of zeros_like they take no memory until the first step, when the model's old arrays are gone.
        self.mean, self.square = np.zeros(size, dtype), np.zeros(size, dtype)
        self.steps = np.zeros(len(self.slots), np.int64)

    def _here(self, array: np.ndarray) -> Any:
        """A copy of a model's array where the optimizer's vectors are."""
        return np.array(array)

    def vectors(self) -> dict[str, np.ndarray]:
        """What a training that goes on needs, by the names in its saved state, slot after slot without gaps."""
        return {"weights": self.weights, "mean": self.mean, "square": self.square, "steps": self.steps}

    def step(self, grads: Any, rate: float) -> None:
        """One update by a tree of gradients; a parameter without a gradient stays as it is."""
        _check_rate(rate)
        named = flatten(grads)
        for slot in self.slots:
            if named.get(slot.name) is not None:
                self.update(slot.name, named[slot.name], rate)

    def update(self, name: str, gradient: np.ndarray, rate: float) -> None:
        """One update of one parameter."""
        _check_rate(rate)
        number = self._numbers[name]
        slot = self.slots[number]
        w, m, v = (vector[slot.start : slot.stop] for vector in (self.weights, self.mean, self.square))
        self.steps[number] += 1
        settings = (rate * slot.rate, slot.decay, self.betas, self.eps)
        with self.ops.num_threads(self._num_threads):
            self.ops.adamw(w, gradient.reshape(-1), m, v, settings, int(self.steps[number]))


class EarlyStep:
    """A step that updates each parameter as soon as the backward has completed its gradient, which is then dropped.

    So the gradients are never in memory together; it takes a step that needs none of them but its own: no clipping, no
    sum over pieces.  Called with a name and a gradient, it returns what is to be kept of the gradient: nothing, but
    from the first one on that is not finite all of them, and nothing is updated any more.
    """

    def __init__(self, optimizer: AdamW, rate: float) -> None:
        self.optimizer, self.rate, self.squares = optimizer, rate, 0.0

    def __call__(self, name: str, gradient: np.ndarray) -> np.ndarray | None:
        self.squares += _sum_of_squares(gradient)
        if not math.isfinite(self.squares):
            return gradient
        self.optimizer.update(name, gradient, self.rate)
        return None

    @property
    def norm(self) -> float:
        """The norm of all gradients so far."""
        return math.sqrt(self.squares)


def adopt(model: Any, views: Mapping[str, np.ndarray], here: Callable[[Any], Any] = np.array) -> None:
    """Makes arrays of other places the model's parameters of those canonical names; the others become `here`'s.

    From here no backend keeps a packed copy, which would be that of yesterday's weights: it packs where it computes.
    """
    params = model.plain_params
    named = {name: views[name] if name in views else here(array) for name, array in flatten(params).items()}
    model.params = unflatten(params, named)
    model._arrays = named


def set_running(model: Any, running: Mapping[str, np.ndarray]) -> None:
    """Writes new running statistics of batch norms, by canonical name, into the model's own arrays."""
    if model.ops.backend == "numba":  # its packed convolutions have the old statistics folded into them
        adopt(model, {name: array for name, array in flatten(model.plain_params).items() if name not in running})
    named = flatten(model.params)
    for name, array in running.items():
        named[name][...] = model.ops.asarray(array, array.dtype.name)


# Gradients ------------------------------------------------------------------------------------------------------------


def global_norm(grads: Any) -> float:
    """The root of the sum of all squares."""
    return math.sqrt(sum(map(_sum_of_squares, flatten(grads).values())))


def _sum_of_squares(g: np.ndarray) -> float:
    """In float64, in parts that stay in the cache."""
    flat = g.reshape(-1)
    parts = (flat[i : i + CACHED] for i in range(0, flat.size, CACHED))
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)


def clipped(grads: Any, largest: float) -> tuple[Any, float]:
    """(gradients scaled so that their global norm is at most `largest`, the norm before).

    The factor is min(1, largest / (norm + 1e-6)), as in PyTorch.
    """
    norm = global_norm(grads)
    factor = min(1.0, largest / (norm + 1e-6))
    if factor == 1:
        return grads, norm
    return unflatten(grads, {name: g * g.dtype.type(factor) for name, g in flatten(grads).items()}), norm


# Average of weights ---------------------------------------------------------------------------------------------------


class AverageOfWeights:
    """The exponential moving average (EMA) of an optimizer's weights: a = decay a + (1 - decay) w after each step."""

    def __init__(self, optimizer: AdamW, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number of at least 0 and below 1, found {decay}")
        self.optimizer = optimizer
        self.decay = decay
        self.average = optimizer.weights.copy()

    def update(self) -> None:
        """Takes in the weights as they are now."""
        self.average += (1 - self.decay) * (self.optimizer.weights - self.average)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which the model has the averaged weights, to be evaluated or saved; then it has its own again."""
        own = self.optimizer.weights.copy()
        self.optimizer.weights[...] = self.average
        try:
            yield
        finally:
            self.optimizer.weights[...] = own


def _check_rate(rate: float) -> None:
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"learning rate: expected a number of at least 0, found {rate}")


def _check(weight_decay: float, layer_decay: float, betas: tuple[float, float], eps: float) -> None:
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay: expected a number of at least 0, found {weight_decay}")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: expected a number above 0 and up to 1, found {layer_decay}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers of at least 0 and below 1, found {betas}")
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, found {eps}")
