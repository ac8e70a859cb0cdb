"""The loss of a batch and its gradient with respect to every parameter of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..noise import Noise
from ..ops import GPU_BACKENDS, host_dtype
from ..ops.backward.maps import BatchStatistics
from ..params import flatten, unflatten
from ..tape import Node, Tape, gradients, values
from ..trace import Trace

Array = Any


@dataclass(frozen=True)
class Gradients:
    """What `value_and_grad` returns; `loss, grads = value_and_grad(...)` takes the first two of it."""

    loss: Any  # a number, or where it was not waited for an array
    grads: Any  # the tree of the model's parameters: a gradient for each, None for what is frozen or has no part
    output: Any  # what the model returned: the logits, and whatever else was asked for
    running: dict[str, np.ndarray]  # new running statistics of batch norms, by canonical name

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.grads))


def value_and_grad(
    model: Any,
    pixel_values: Any,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    rng: np.random.Generator | Noise | None = None,
    frozen: str | Iterable[str] = (),
    batch_statistics: bool | BatchStatistics = False,
    recompute: bool = False,
    trace: Trace | None = None,
    weight: float | Array = 1.0,
    ready: Callable[[str, Array], Array | None] | None = None,
    wait: bool = True,
    **inputs: Any,
) -> Gradients:
    """The loss of one batch and its gradients; the model is not changed.

    `inputs` (labels, bool_masked_pos) go to the model, whose own loss is taken; or `loss(ops, output)` makes another
    of its output, by ops.  `rng` switches dropout and stochastic depth on: the noise of this step (`Noise`), or a
    generator.  `frozen` has the names or glob patterns of parameters that are not learned.  `batch_statistics` makes
    batch norms use those of the batch, True its own alone.  With `recompute` each block keeps its input alone and
    is run again in the backward: less memory, the same gradients, a third more work.  `trace` collects intermediates of
    the forward.  The gradients are those of `weight` times the loss: its share of the loss of a larger batch;
    an array, on a GPU, may scale the loss as well.  Without `wait` the loss, the output and running statistics stay
    where they were computed, so that nothing waits for a GPU.
    `ready(name, gradient)` is called for each parameter as soon as its gradient is complete, while those of earlier
    layers are still to come; what it returns takes the gradient's place, and None drops it.  It may change the
    parameter, which the rest of the backward does not read.

    Raises ValueError for a pattern that matches no parameter, and whatever the model raises it for.
    """
    statistics = BatchStatistics() if batch_statistics is True else batch_statistics or None
    tape = Tape(model.ops, statistics, recompute)
    params = model.plain_params
    noted = Trace(() if trace is None else trace.select)
    with model.ops.num_threads(model.num_threads):
        params = placed(params, model)
        named = flatten(params)
        watched = tape.watch(params, matching(named, frozen))
        output = recorded(model, tape, watched).forward(pixel_values, rng=rng, trace=noted, **inputs)
        made = output.get("loss") if loss is None else loss(tape.ops, output)
        if made is None:
            raise ValueError(
                "labels: expected labels for the model's own loss, or a `loss` of its output, found neither"
            )
        if isinstance(made, Node):
            begin = weight if hasattr(weight, "shape") else np.full_like(made.value, weight)
            tape.backward(made, begin, _handing_over(watched, ready))
    if trace is not None:
        for name, array in noted.items():
            trace.record(name, values(array))
    grads = unflatten(
        params,
        {name: gradients(leaf) if isinstance(leaf, Node) else None for name, leaf in flatten(watched).items()},
    )
    plain = type(output)(**{name: values(value) for name, value in output.items()})
    running = {} if statistics is None else statistics.running(named, model.ops.to_host)
    running = {name: model.ops.to_host(array) for name, array in running.items()} if wait else running
    return Gradients(float(values(made)) if wait else values(made), grads, plain, running)


def _handing_over(watched: Any, ready: Callable[[str, Array], Array | None] | None) -> Callable[[Node], None] | None:
    if ready is None:
        return None
    names = {leaf: name for name, leaf in flatten(watched).items() if isinstance(leaf, Node)}

    def final(node: Node) -> None:
        if node.gradient is not None:
            node.gradient = ready(names[node], node.gradient)

    return final


def placed(params: Any, model: Any) -> Any:
    """`params` where the model computes; a training has them there already."""
    if model.ops.backend not in GPU_BACKENDS:
        return params
    dtype = host_dtype(model.dtype)
    return unflatten(params, {name: model.ops.asarray(array, dtype) for name, array in flatten(params).items()})


def recorded(model: Any, tape: Tape, params: Any) -> Any:
    """`model` with `params` in place of its own, its ops noted by `tape`."""
    twin = object.__new__(type(model))  # copy.copy would make a model anew and pack its weights, in every step
    vars(twin).update(vars(model), ops=tape.ops, params=params)
    return twin


def matching(names: Iterable[str], patterns: str | Iterable[str]) -> set[str]:
    """The names that match one of the glob patterns.  Raises ValueError for a pattern that matches none."""
    found: set[str] = set()
    names = list(names)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(f"frozen: {pattern!r} matches no parameter; their names are like {names[0]!r}")
        found |= hits
    return found
