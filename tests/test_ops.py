"""Every op of the seam: NumPy in float64 beside plain loops, then every backend in float32 beside the same loops."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
from conftest import distance
from op_cases import CASES, Case
from tolerances import EPS32, FACTOR, FEW, FEW_FLOOR, FLOOR, NAIVE_OP, OP32, OP32_CASES

from minibeit.ops import BACKENDS, activations, get_ops
from minibeit.ops.table import ARITHMETIC, TABLE, names_of
from minibeit.params import Linear

REFERENCE = get_ops("numpy")


def test_every_op_has_a_case():
    # The others are tested below, those for files in test_prepared.py.
    assert names_of(ARITHMETIC) <= {case.op for case in CASES.values()} <= set(TABLE)


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_loops(name):
    case = CASES[name]
    for found, truth in zip(case.results(REFERENCE, "float64"), case.truths(), strict=True):
        assert found.dtype == np.float64
        assert distance(found, truth) <= NAIVE_OP


def errors(case: Case, ops: Any) -> list[tuple[float, float]]:
    """(distance from the loops in EPS32, the distance that is luck) of every result."""
    pairs = list(zip(case.results(ops, "float32"), case.truths(), strict=True))
    assert all(found.dtype == np.float32 for found, _ in pairs)
    return [(distance(found, truth) / EPS32, FLOOR if truth.size >= FEW else FEW_FLOOR) for found, truth in pairs]


@pytest.mark.parametrize("name", CASES)
def test_float32_beside_loops(name, ops):
    case = CASES[name]
    for (found, luck), (own, _) in zip(errors(case, ops), errors(case, REFERENCE), strict=True):
        limit = OP32_CASES.get(name, OP32) if ops.backend == "numpy" else FACTOR * max(own, luck)
        assert found <= limit, f"{found:.2f} EPS32 from the truth, NumPy {own:.2f}"


@pytest.mark.parametrize("name", CASES)
def test_arguments_stay_as_they_are(name, ops):
    case = CASES[name]
    given, before = case.given("float32"), case.given("float32")
    case.run(ops, given)
    for key, array in vars(before).items():
        assert np.array_equal(getattr(given, key), array), key


def test_nan_and_infinity_pass_through(ops):
    x = np.ones((2, 4), np.float32)
    x[1, 2] = np.nan
    layer = ops.prepare(Linear(np.ones((3, 4), np.float32), None))
    for y in (ops.linear(x, layer), ops.linear_activation(x, layer, "relu"), ops.linear_activation(x, layer, "gelu")):
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()


def test_cross_entropy_of_nothing_is_nan(ops):
    assert np.isnan(ops.cross_entropy(np.zeros((2, 3), np.float32), np.array([255, 255]), 255))


@pytest.mark.parametrize("wrong", [-1, 3, 254])
def test_cross_entropy_refuses_labels_out_of_range(ops, wrong):
    with pytest.raises(ValueError, match=rf"labels: expected class numbers 0 to 2 \(or 255 to ignore\), found {wrong}"):
        ops.cross_entropy(np.zeros((2, 3), np.float32), np.array([0, wrong]), 255)


def test_array_ops(ops):
    x = ops.asarray([[1, 2]], "float32")
    assert x.dtype == np.float32
    assert ops.asarray(x, "float32") is x
    assert ops.to_host(ops.asarray(ops.stage([[3, 4]], "float32"), "float32")).tolist() == [[3, 4]]
    assert ops.to_host(x).tolist() == [[1, 2]]
    assert ops.all_finite(x)
    assert not ops.all_finite(ops.asarray([1, np.inf], "float32"))
    assert not ops.all_finite(ops.asarray([1, np.nan], "float64"))
    scores = np.array([[0, 3, 1], [2, 3, 0], [2, 1, 1]], np.float32).T.reshape(1, 3, 3, 1)
    ids = ops.to_host(ops.argmax_channels(ops.asarray(scores, "float32")))
    assert ids.dtype == np.int64
    assert ids[0, :, 0].tolist() == [1, 1, 0]


def test_namespace():
    ops = get_ops("numpy")
    assert set(ops.origin) == set(TABLE)
    assert set(ops.origin.values()) == {"numpy"}
    assert "numpy" in BACKENDS
    with pytest.raises(ValueError, match=r"backend: expected one of numpy.*found 'tensor'"):
        get_ops("tensor")


def test_only_switches_single_ops_on():
    pytest.importorskip("numba")
    ops = get_ops("numba", only=["linear"])
    assert {name for name, origin in ops.origin.items() if origin == "numba"} == {"linear"}
    with pytest.raises(ValueError, match="only: backend numba has no op named lineer"):
        get_ops("numba", only=["lineer"])


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")
    assert get_ops().backend == "numpy"


def test_activation_names_are_those_of_the_loops():
    assert set(activations.ACTIVATIONS) == set(naive.ACTIVATIONS)
