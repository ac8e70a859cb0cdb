"""The CuPy backend's backwards, on the stand-in, beside the definitions in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import test_backward as t
from conftest import distance
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend
from cuda_on_cpu.world import counted
from tolerances import BACKWARD32, EPS32, EPS64

from minibeit.ops import backward, get_ops
from minibeit.ops.backward.maps import BatchStatistics
from minibeit.ops.table import fast_backwards

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no g++ to compile CUDA C++ with")
NAMES = fast_backwards("cupy")
CASES = {name: case for name, case in t.CASES.items() if case[0] in NAMES}
WITH_STATISTICS = {name: case for name, case in CASES.items() if "_bn_" in case[0]}


@pytest.fixture(scope="module")
def cupy():
    with cupy_backend() as module:
        yield module


def moved(x, move):
    """`x` with move(array) in place of every array."""
    if isinstance(x, (list, tuple)):
        return type(x)(moved(part, move) for part in x)
    if isinstance(x, dict):
        return {name: moved(part, move) for name, part in x.items()}
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: moved(getattr(x, f.name), move) for f in dataclasses.fields(x)})
    return move(x)


def up(cupy, x):
    return moved(x, lambda y: cupy.asarray(y) if isinstance(y, np.ndarray) else y)


def down(cupy, x):
    return moved(x, lambda y: y.get() if isinstance(y, cupy.ndarray) else y)


def waited_for(name, args):
    """Whether something comes down: labels and masks on the device, and what NumPy differentiates."""
    if name == "linear_activation":
        return args[2] not in ("gelu", "gelu_python")
    return name in ("cross_entropy", "masked_patches")


def truth(name, args, options, statistics=None):
    extra = {} if statistics is None else {"statistics": statistics}
    forward = getattr(backward, f"{name}_forward", None)
    made, saved = forward(*args, **options, **extra) if forward else t.forward(name, args, options)
    g = t.cotangents(made)
    return made, g, getattr(backward, f"{name}_backward")(g, saved, *args, **options)


def found(cupy, name, args, options, g, statistics=None, dtype=None):
    """(forward, gradients) on the device, in a model of `dtype`, by default that of g."""
    ops = get_ops("cupy", dtype=dtype or next(iter(t.arrays_of(g).values())).dtype.name)
    extra = {} if statistics is None else {"statistics": statistics}
    args, options, g = up(cupy, args), up(cupy, options), up(cupy, g)
    forward = getattr(ops, f"{name}_forward", None)
    made, saved = forward(*args, **options, **extra) if forward else (getattr(ops, name)(*args, **options), None)
    return made, getattr(ops, f"{name}_backward")(g, saved, *args, **options)


def arrays(x):
    """`x`, numbers as arrays without an axis."""
    return x if isinstance(x, tuple) else np.asarray(x)


def check(result, expected, step):
    result, expected = t.arrays_of(result), t.arrays_of(expected)
    assert set(result) == set(expected)
    for path, array in expected.items():
        assert distance(result[path], array) <= BACKWARD32 * step, path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_backward_is_that_of_the_definition(cupy, case, dtype):
    name, args, options = CASES[case]
    made, g, expected = truth(name, args, options)
    there, g = t.in_dtype((args, arrays(g)), dtype)
    options = {option: t.in_dtype(value, dtype) for option, value in options.items()}
    result = down(cupy, found(cupy, name, there, options, g))
    check(result, (arrays(made), expected), EPS32 if dtype == "float32" else EPS64)


@pytest.mark.parametrize("case", WITH_STATISTICS)
def test_batch_norms_use_the_batch(cupy, case):
    name, args, options = WITH_STATISTICS[case]
    theirs, ours = BatchStatistics(), BatchStatistics()
    made, g, expected = truth(name, args, options, theirs)
    found_made, result = down(cupy, found(cupy, name, args, options, g, ours))
    if name == "conv_transpose_bn_gelu":  # the batch's mean takes the bias out again: its gradient is rounding alone
        for grads in (result, expected):
            assert np.abs(grads[1].bias).max() < 100 * EPS64
            grads[1].bias[:] = 0
    check((found_made, result), (made, expected), EPS64)
    (_, moments), (_, true) = ours._seen[0], theirs._seen[0]
    assert moments.count.get() == true.count
    check(down(cupy, (moments.mean, moments.var)), (true.mean, true.var), EPS64)


@pytest.mark.parametrize("case", CASES)
def test_nothing_comes_down_and_the_same_bits_come_twice(cupy, case):
    name, args, options = CASES[case]
    _, g, _ = truth(name, args, options)
    statistics = BatchStatistics() if case in WITH_STATISTICS else None
    with counted() as count:
        _, first = found(cupy, name, args, options, arrays(g), statistics)
        down_ = [copy.place for copy in count.copies if copy.way == "download"]
        assert waited_for(name, args) or not down_
    _, second = found(cupy, name, args, options, arrays(g), statistics)
    first, second = (t.arrays_of(down(cupy, grads)) for grads in (first, second))
    assert first and all(np.array_equal(first[path], second[path]) for path in first)


def test_every_backward_has_a_case():
    assert {case[0] for case in CASES.values()} == set(NAMES)
