"""The error function to full precision, in plain NumPy: neither NumPy nor our dependencies have one.

Every function here follows from three identities:

    erf(x)  = x + x S(x^2)              for |x| < 1
    erfc(z) = exp(-z^2) erfcx(z)        for z >= 0, where erfcx is smooth: 1 at 0, about 1 / (z sqrt(pi)) far out
    Phi(-a) = erfc(a / sqrt(2)) / 2

For float32 the computation is in float64, with shorter polynomials, and rounded once: one float64 exp costs less than
the corrections that a float32 exp would need.  Errors are in units in the last place (ulp) of the exact result and
measured in tests/test_erf.py; tests/make_erf_coefficients.py computes the polynomials by Chebyshev interpolation in
high precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

BLOCK = 16384  # elements; the five float64 work arrays of one block (640 KiB) stay in a core's second-level cache

# fmt: off
# made by tests/make_erf_coefficients.py; highest power first
ERF32 = (
    -0.0002375303008633824, 0.0005955966060005109, -0.00036323960546510515, 0.0006199186266208,
    -0.0028438421375724847, 0.005571999462168701, -0.008445061534000995, 0.013912674213802432,
    -0.022530380754105718, 0.03321488463790601, -0.04575393377883074, 0.05985653048124558,
    -0.07472896226500954, 0.09021197583802171, -0.1077104012536239, 0.13167500462304274,
    -0.17657623355634394, 0.35353099633699614,
)
ERF64 = (
    5.957176147748911e-11, -1.1372848856791674e-09, 1.4659775274047436e-08, -1.6350312701054695e-07,
    1.6461000484121368e-06, -1.4925595266831182e-05, 0.0001205533111164271, -0.000854832698083379,
    0.0052239776248180145, -0.026866170645076792, 0.11283791670954879, -0.3761263890318375,
    0.1283791670955126,
)
ERFCX32 = (
    -0.00033360915326409067, -0.0004984463506948651, 0.0030785995082857442, -0.001217028742470569,
    -0.026836918752070543, 0.11952717087401908, -0.31046657996561466, 0.5902284326821933,
    -0.8833944619730129, 1.0740069060826916,
)
ERFCX64 = (
    (0.5, 0.25, (
        5.46363566721607e-05, -0.00015452371207748627, 0.0004097462309896427, -0.0010782349789184742,
        0.0027289617601667852, -0.006614801340381783, 0.015298471502174742, -0.03359113532502458,
        0.06959167063456342, -0.13496689305704973, 0.24251673515972216, -0.3980464164160558,
        0.5845450744234932, -0.7432058932300143, 0.7703465477309968,
    )),
    (1.0, 0.75, (
        4.6468063021709155e-06, -1.4426531927022256e-05, 4.236277872839012e-05, -0.00012332254905491935,
        0.00034675112699586235, -0.0009385135840131843, 0.002437637348879293, -0.006051532258236163,
        0.014289198666091785, -0.03189726204019368, 0.06679054252756783, -0.12983606199487813,
        0.2309581315512983, -0.3679726916557954, 0.5069376502931449,
    )),
    (2.0, 1.5, (
        -3.4778531023839574e-09, 1.329844554951821e-08, -4.585146974854072e-08, 1.6708703859197203e-07,
        -5.961119446974675e-07, 2.067088490322641e-06, -6.974987241686018e-06, 2.2864294807967016e-05,
        -7.265892257522832e-05, 0.00022330994586274217, -0.0006619300663930904, 0.0018861348769562312,
        -0.005145957547985475, 0.013377340953068511, -0.032930905299562635, 0.07615103985547739,
        -0.16362291773256007, 0.3215854164543175,
    )),
    (3.0, 2.5, (
        2.1168892627144388e-10, -9.328660140673967e-10, 3.8118510954230204e-09, -1.614785687396776e-08,
        6.714129675618682e-08, -2.7295767244566295e-07, 1.0852224970131965e-06, -4.214295295531393e-06,
        1.5961853148605915e-05, -5.8868964744129743e-05, 0.00021101982428404107, -0.0007335909371371925,
        0.002467036815701451, -0.008001569382101644, 0.024937997086656904, -0.07434734678979467,
        0.2108063640611436,
    )),
    (5.0, 4.0, (
        -7.864096887526549e-15, 4.5186611782302996e-14, -2.173112052355108e-13, 1.2141881566298733e-12,
        -6.782456620562273e-12, 3.695983937315369e-11, -1.9861829552105646e-10, 1.0530722449975213e-09,
        -5.5033694358493295e-09, 2.833198414033159e-08, -1.4359644229893238e-07, 7.16045663192627e-07,
        -3.5103666498778564e-06, 1.6905649257995712e-05, -7.99088803055526e-05, 0.0003703524689955394,
        -0.0016811820767461145, 0.0074654332449755716, -0.032383506095021455, 0.13699945762506138,
    )),
)
ERFCX64_TAIL = (
    26064491681.05815, -10958591931.109385, 2267374200.443125, -317326595.5506557,
    35382559.19331092, -3555907.2965911725, 355624.82414664095, -37885.395469732066,
    4466.177326289666, -595.6280752233623, 91.63665570935859, -16.661223276692482,
    3.7024941408592476, -1.0578554691497286, 0.4231421876608148, -0.28209479177387814,
    0.5641895835477563,
)
# fmt: on

Row = np.ndarray  # one block of elements, in a kernel
_SQRT_HALF = 0.7071067811865476
_ERFC_ZERO = 28.0  # erfc(28) < 2^-1075: zero in float64
_GELU_ZERO = 39.0  # 39 Phi(-39) is zero in float64 too


def erf(x: np.ndarray) -> np.ndarray:
    """erf(x) = 2/sqrt(pi) int_0^x exp(-t^2) dt of every element, in the shape and dtype of x: float32 or float64.

    Error at most 0.6 ulp in float32, 1.3 ulp in float64.  Raises TypeError for other dtypes.
    """
    return _by_blocks("erf", x, _erf32, _erf64)


def erfc(x: np.ndarray) -> np.ndarray:
    """erfc(x) = 1 - erf(x) of every element without the cancellation, in the shape and dtype of x: float32 or float64.

    Error at most 0.6 ulp in float32, 3.3 ulp in float64.  Raises TypeError for other dtypes.
    """
    return _by_blocks("erfc", x, _erfc32, _erfc64)


def gelu(x: np.ndarray) -> np.ndarray:
    """gelu(x) = x Phi(x), Phi the cumulative normal distribution, in the shape and dtype of x: float32 or float64.

    Computed as max(x, 0) - |x| Phi(-|x|), so that the negative tail keeps its relative accuracy until it underflows:
    error at most 0.6 ulp in float32, 4.8 ulp in float64.  In that tail PyTorch's x/2 (1 + erf(x / sqrt(2))) suffers
    from cancellation: in float32 it is about 20% off at -5 and zero below -5.5, though its absolute error stays below
    about 1e-6.  gelu(-inf) is 0, the limit.  Raises TypeError for other dtypes.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016), section 2.
    """
    return _by_blocks("gelu", x, _gelu32, _gelu64)


def _by_blocks(name: str, x: np.ndarray, kernel32: Callable, kernel64: Callable) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: x must be float32 or float64, found {x.dtype}; convert it with x.astype")
    kernel = kernel32 if x.dtype == np.float32 else kernel64
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty(flat.shape, x.dtype)
    work = np.empty((5, min(BLOCK, flat.size)))
    with np.errstate(under="ignore"):  # the tail correctly underflows to zero
        for start in range(0, flat.size, BLOCK):
            block = flat[start : start + BLOCK]
            kernel(block, out[start : start + BLOCK], *work[:, : block.size])
    return out.reshape(x.shape)


def _horner(coefficients: Sequence[float], t: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out = c[0] t^n + c[1] t^(n-1) + ... + c[n]; returns `out`."""
    np.multiply(t, coefficients[0], out=out)
    for c in coefficients[1:-1]:
        np.add(out, c, out=out)
        np.multiply(out, t, out=out)
    return np.add(out, coefficients[-1], out=out)


def _erfcx32(z: np.ndarray, out: np.ndarray, t: np.ndarray) -> None:
    """out = exp(z^2) erfc(z) = P(t) / (z + 3), t = (z - 3) / (z + 3), to 5e-9 for 0 <= z <= 10.3; overwrites z."""
    np.subtract(z, 3.0, out=t)
    np.add(z, 3.0, out=z)
    np.divide(1.0, z, out=z)
    np.multiply(t, z, out=t)
    _horner(ERFCX32, t, out)
    np.multiply(out, z, out=out)


def _erfcx64(z: np.ndarray, out: np.ndarray) -> None:
    """out = exp(z^2) erfc(z) for z >= 0: one polynomial per interval, centred so that its terms decrease fast."""
    np.copyto(out, z)  # keeps NaN, which is in no interval
    low = 0.0
    for high, middle, coefficients in ERFCX64:
        chosen = np.flatnonzero((z >= low) & (z < high))
        t = z[chosen] - middle
        out[chosen] = _horner(coefficients, t, np.empty_like(t))
        low = high
    chosen = np.flatnonzero(z >= low)
    t = z[chosen]
    out[chosen] = _horner(ERFCX64_TAIL, 1.0 / (t * t), np.empty_like(t)) / t


def _times_exp(y: np.ndarray, z: np.ndarray, scale: float, h: np.ndarray, d: np.ndarray, e: np.ndarray) -> None:
    """y *= exp(-scale z^2).  z is split into h + l with h^2 exact: the rounding error of z^2 = 700 would be multiplied
    by 700 in exp.
    """
    np.copyto(h, z.astype(np.float32))
    np.subtract(z, h, out=d)
    np.add(z, h, out=e)
    np.multiply(d, e, out=d)
    np.multiply(d, scale, out=d)
    np.multiply(h, h, out=e)
    np.multiply(e, -scale, out=e)
    np.exp(e, out=e)
    np.multiply(y, e, out=y)
    _horner((-1 / 6, 1 / 2, -1.0), d, e)  # exp(-d) - 1 = d (-1 + d/2 - d^2/6), d < 5e-5
    np.multiply(e, d, out=e)
    np.multiply(e, y, out=e)
    np.add(y, e, out=y)


def _gelu32(x: Row, out: Row, wide: Row, a: Row, z: Row, t: Row, y: Row) -> None:
    np.copyto(wide, x)
    np.absolute(wide, out=a)
    np.minimum(a, _GELU_ZERO, out=a)  # not inf: inf * 0 is NaN
    np.multiply(a, _SQRT_HALF, out=z)
    _erfcx32(z, y, t)
    np.multiply(y, a, out=y)
    np.multiply(a, a, out=a)
    np.multiply(a, -0.5, out=a)
    np.exp(a, out=a)
    np.multiply(y, a, out=y)
    np.multiply(y, 0.5, out=y)
    np.maximum(wide, 0.0, out=wide)
    np.subtract(wide, y, out=wide)
    np.copyto(out, wide, casting="same_kind")


def _gelu64(x: Row, out: Row, a: Row, y: Row, h: Row, d: Row, e: Row) -> None:
    np.absolute(x, out=a)
    np.minimum(a, _GELU_ZERO, out=a)
    np.multiply(a, _SQRT_HALF, out=h)
    _erfcx64(h, y)
    np.multiply(y, a, out=y)
    np.multiply(y, 0.5, out=y)
    _times_exp(y, a, 0.5, h, d, e)
    np.maximum(x, 0.0, out=out)
    np.subtract(out, y, out=out)


def _erf32(x: Row, out: Row, wide: Row, s: Row, y: Row, *_: Row) -> None:
    np.copyto(wide, x)
    np.maximum(wide, -4.0, out=wide)  # erf(4) rounds to 1
    np.minimum(wide, 4.0, out=wide)
    np.multiply(wide, wide, out=s)
    np.multiply(s, 1 / 8, out=s)
    np.subtract(s, 1.0, out=s)
    _horner(ERF32, s, y)
    np.multiply(y, wide, out=y)
    np.copyto(out, y, casting="same_kind")


def _erfc32(x: Row, out: Row, wide: Row, z: Row, t: Row, y: Row, e: Row) -> None:
    np.copyto(wide, x)
    np.absolute(wide, out=z)
    np.minimum(z, _ERFC_ZERO, out=z)
    np.multiply(z, z, out=e)
    np.negative(e, out=e)
    np.exp(e, out=e)
    _erfcx32(z, y, t)
    np.multiply(y, e, out=y)
    np.subtract(2.0, y, out=y, where=wide < 0)
    np.copyto(out, y, casting="same_kind")


def _erf64(x: Row, out: Row, z: Row, y: Row, h: Row, d: Row, e: Row) -> None:
    np.absolute(x, out=z)
    near = z < 1
    _erfc64_far(z, y, h, d, e)
    np.subtract(1.0, y, out=y)
    np.copysign(y, x, out=y)
    _erf64_near(z, x, e, h, d)
    np.copyto(y, e, where=near)
    np.copyto(out, y)


def _erfc64(x: Row, out: Row, z: Row, y: Row, h: Row, d: Row, e: Row) -> None:
    np.absolute(x, out=z)
    near = z < 0.5
    _erfc64_far(z, y, h, d, e)
    np.subtract(2.0, y, out=y, where=x < 0)
    _erf64_near(z, x, e, h, d)
    np.subtract(1.0, e, out=y, where=near)
    np.copyto(out, y)


def _erfc64_far(z: np.ndarray, y: np.ndarray, h: np.ndarray, d: np.ndarray, e: np.ndarray) -> None:
    """y = erfc(z); clips z where erfc(z) is zero."""
    np.minimum(z, _ERFC_ZERO, out=z)
    _erfcx64(z, y)
    _times_exp(y, z, 1.0, h, d, e)


def _erf64_near(z: np.ndarray, x: np.ndarray, out: np.ndarray, s: np.ndarray, t: np.ndarray) -> None:
    """out = erf(x) where z = |x| < 1."""
    np.minimum(z, 1.0, out=s)
    np.multiply(s, s, out=t)
    np.copysign(s, x, out=s)
    _horner(ERF64, t, out)
    np.multiply(out, s, out=out)
    np.add(out, s, out=out)
