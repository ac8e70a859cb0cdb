"""Makes the polynomials of minibeit/ops/erf.py with mpmath:  python tests/make_erf_coefficients.py [--write]

Each is the Chebyshev interpolant of a smooth function in 60 digits, turned into powers and rounded once.  Without
--write the block of source is printed; with it, the block in erf.py is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from mpmath import mp, mpf

TARGET = Path(__file__).resolve().parent.parent / "minibeit" / "ops" / "erf.py"
START, END = "# fmt: off\n", "# fmt: on\n"


def interpolate(function: Callable, low, high, terms: int) -> list:
    """Coefficients, lowest power first, of the polynomial through `function` at the Chebyshev nodes of [low, high]."""
    nodes = [mp.cos(mp.pi * (j + mpf(1) / 2) / terms) for j in range(terms)]
    middle, half = (mpf(high) + low) / 2, (mpf(high) - low) / 2
    points = [middle + half * node for node in nodes]
    powers = mp.matrix(terms, terms)
    for row, point in enumerate(points):
        for column in range(terms):
            powers[row, column] = point**column
    return list(mp.lu_solve(powers, mp.matrix([function(point) for point in points])))


def erfcx(z):
    """exp(z^2) erfc(z); the asymptotic series where erfc itself is far too small."""
    if z < 40:
        return mp.exp(z * z) * mp.erfc(z)
    term = total = mpf(1)
    for n in range(1, 60):
        term *= -mpf(2 * n - 1) / (2 * z * z)
        total += term
    return total / (z * mp.sqrt(mp.pi))


def erfcx_in_t(k) -> Callable:
    """t -> (z + k) erfcx(z), z = k (1 + t) / (1 - t)."""

    def function(t):
        z = mpf(k) * (1 + t) / (1 - t)
        return (z + k) * erfcx(z)

    return function


def erf_over_x(v):
    """v -> erf(x) / x, x = sqrt(v)."""
    x = mp.sqrt(v)
    return mp.erf(x) / x


def erfcx_tail(w):
    """w -> z erfcx(z), z = 1 / sqrt(w)."""
    z = 1 / mp.sqrt(w)
    return z * erfcx(z)


def polynomials() -> dict[str, list[float] | list[tuple[float, float, list[float]]]]:
    """Name in erf.py -> coefficients, highest power first, or for each interval (its end, its middle, coefficients)."""
    mp.dps = 60
    far = mpf("10.3")  # float32: erfc(10.06) and gelu(-14.42) are zero
    pieces = []
    low = mpf(0)
    for high, terms in ((0.5, 15), (1.0, 15), (2.0, 18), (3.0, 17), (5.0, 20)):
        middle = (low + high) / 2
        coefficients = interpolate(lambda s, middle=middle: erfcx(middle + s), low - middle, high - middle, terms)
        pieces.append((high, float(middle), _rounded(coefficients)))
        low = mpf(high)
    return {
        "ERF32": _rounded(interpolate(lambda s: erf_over_x(8 * (1 + s)), -1, 1, 18)),
        "ERF64": _rounded(interpolate(lambda v: erf_over_x(v) - 1, 0, 1, 13)),
        "ERFCX32": _rounded(interpolate(erfcx_in_t(3), -1, (far - 3) / (far + 3), 10)),
        "ERFCX64": pieces,
        "ERFCX64_TAIL": _rounded(interpolate(erfcx_tail, 0, 1 / low**2, 17)),
    }


def _rounded(powers: list) -> list[float]:
    return [float(c) for c in reversed(powers)]


def _lines(coefficients: list[float], indent: str) -> str:
    rows = (coefficients[start : start + 4] for start in range(0, len(coefficients), 4))
    return "".join(indent + " ".join(f"{c!r}," for c in row) + "\n" for row in rows)


def source() -> str:
    """The lines between `fmt: off` and `fmt: on`."""
    text = "# made by tests/make_erf_coefficients.py; highest power first\n"
    for name, value in polynomials().items():
        text += f"{name} = (\n"
        if isinstance(value[0], float):
            text += _lines(value, "    ")
        else:
            for high, middle, coefficients in value:
                text += f"    ({high!r}, {middle!r}, (\n{_lines(coefficients, ' ' * 8)}    )),\n"
        text += ")\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the block in minibeit/ops/erf.py")
    if not parser.parse_args().write:
        print(source(), end="")
        return
    before, rest = TARGET.read_text().split(START)
    _, after = rest.split(END)
    TARGET.write_text(before + START + source() + END + after)


if __name__ == "__main__":
    main()
