"""erf, erfc and gelu against mpmath and the standard library over their whole range: the errors the docstrings name."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from minibeit.ops.erf import BLOCK, erf, erfc, gelu

# Largest errors in ulp.  Measured: float32 on 10.7 million evenly spaced bit patterns 0.54, 0.58, 0.58; float64 on
# 40 000 random points of each interval 1.26, 3.06, 4.42, the sum of the five to eight roundings of the formula.
ULPS = {
    ("erf", "float32"): 0.6,
    ("erfc", "float32"): 0.6,
    ("gelu", "float32"): 0.6,
    ("erf", "float64"): 1.3,
    ("erfc", "float64"): 3.3,
    ("gelu", "float64"): 4.8,
}
FUNCTIONS = {"erf": erf, "erfc": erfc, "gelu": gelu}
INTERVALS = {
    "erf": [(-7, -1), (-1, 0), (0, 0.5), (0.5, 1), (1, 2), (2, 7), (-1e-3, 1e-3)],
    "erfc": [(-7, -1), (-1, 0), (0, 0.5), (0.5, 1), (1, 2), (2, 3), (3, 5), (5, 10.1), (10, 26.5), (26.5, 28)],
    "gelu": [(-39, -37), (-37, -14.5), (-14.5, -12), (-12, -5), (-5, -1), (-1, 0), (0, 1), (1, 10), (-1e-3, 1e-3)],
}
EDGES = [0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 10.3, 28.0, 39.0, 0.5**0.5, 2**0.5, 3 * 2**0.5, 5 * 2**0.5]


def exact(name: str, x: float):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 40
    x = mpmath.mpf(x)
    if name == "gelu":
        return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2
    return getattr(mpmath, name)(x)


def largest_error(name: str, x: np.ndarray) -> tuple[float, float]:
    """(largest error in ulp of the right answer, where)."""
    worst = (0.0, math.nan)
    for point, value in zip(x.tolist(), FUNCTIONS[name](x).tolist(), strict=True):
        right = exact(name, point)
        ulp = abs(float(np.spacing(x.dtype.type(float(right)))))
        worst = max(worst, (float(abs(value - right) / ulp), point))
    return worst


@pytest.mark.parametrize(("name", "dtype"), ULPS)
def test_error_over_the_whole_range(name, dtype):
    rng = np.random.default_rng(0)
    for low, high in INTERVALS[name]:
        error, where = largest_error(name, rng.uniform(low, high, 1500).astype(dtype))
        assert error <= ULPS[name, dtype], f"{name}({where!r}) in {dtype} is {error:.2f} ulp off"


@pytest.mark.parametrize(("name", "dtype"), ULPS)
def test_error_where_formulas_meet_and_at_the_ends_of_the_format(name, dtype):
    edges = np.array(EDGES, dtype)
    info = np.finfo(dtype)
    tiny = np.array([info.smallest_subnormal, 3 * info.smallest_subnormal, info.smallest_normal, 1e-30, 1e-9], dtype)
    beside = [np.nextafter(edges, edges.dtype.type(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([edges, *beside, tiny])
    error, where = largest_error(name, np.concatenate([x, -x]))
    assert error <= ULPS[name, dtype], f"{name}({where!r}) in {dtype} is {error:.2f} ulp off"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_the_standard_library(dtype):
    x = np.linspace(-6, 6, 60_001).astype(dtype)
    eps = np.finfo(dtype).eps
    for ours, theirs in ((erf, math.erf), (erfc, math.erfc)):
        right = np.array([theirs(v) for v in x.tolist()])
        assert np.all(np.abs(ours(x) - right) <= 3 * eps * np.abs(right))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(dtype):
    big = np.finfo(dtype).max
    x = np.array([-np.inf, -big, -50, 0.0, 50, big, np.inf, np.nan], dtype)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        np.testing.assert_array_equal(erf(x), np.array([-1, -1, -1, 0, 1, 1, 1, np.nan], dtype))
        np.testing.assert_array_equal(erfc(x), np.array([2, 2, 2, 1, 0, 0, 0, np.nan], dtype))
        np.testing.assert_array_equal(gelu(x), np.array([0, 0, 0, 0, 50, big, np.inf, np.nan], dtype))
    assert math.copysign(1, erf(np.array(-0.0, dtype))) == -1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", [erf, erfc, gelu])
def test_shape_dtype_layout_and_input_are_kept(function, dtype):
    x = np.random.default_rng(1).standard_normal((3, BLOCK // 2 + 5, 2)).astype(dtype)  # more than one block
    before = x.copy()
    y = function(x)
    assert y.dtype == x.dtype and y.shape == x.shape
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(function(x.T), y.T)
    np.testing.assert_array_equal(function(x[::-1, ::3]), y[::-1, ::3])
    np.testing.assert_array_equal(function(x[0, 0, 0]), y[0, 0, 0])
    assert function(x[:0]).shape == (0, *x.shape[1:])


@pytest.mark.parametrize("wrong", [np.arange(3), np.ones(3, np.float16), np.ones(3, complex)])
def test_other_dtypes_are_refused_by_name(wrong):
    with pytest.raises(TypeError, match=f"gelu: x must be float32 or float64, found {wrong.dtype}"):
        gelu(wrong)


def test_negative_tail_keeps_its_relative_accuracy():
    x = np.linspace(-13, -5, 1000, dtype=np.float32)
    right = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()])
    assert np.abs(gelu(x) / right - 1).max() < 1e-7
    textbook = x.astype(np.float64) * 0.5 * (1 + erf(x * np.float32(0.5**0.5)))  # what cancels
    assert np.abs(textbook / right - 1).max() > 0.9


def test_coefficients_are_those_of_the_generator():
    pytest.importorskip("mpmath")
    from make_erf_coefficients import END, START, TARGET, source

    assert TARGET.read_text().split(START)[1].split(END)[0] == source()
