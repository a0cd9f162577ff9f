"""Prints the polynomial coefficients of csrc/cpu/kernels/math.inl, with the error of each fit.

Each function is interpolated at Chebyshev nodes in 60-digit arithmetic, which is within a
small factor of the best polynomial of that degree; the printed error is the largest relative
error over a fine grid, before any rounding of the coefficients.

    python tools/fit_math.py
"""

from collections.abc import Callable

import mpmath as mp

mp.mp.dps = 60


def expm1_tail(r: mp.mpf) -> mp.mpf:
    """(exp(r) - 1 - r) / r^2, so that exp(r) = 1 + r + r^2 P(r)."""
    if abs(r) < mp.mpf(10) ** -15:
        return mp.mpf(1) / 2 + r / 6
    return (mp.expm1(r) - r) / r**2


def atanh_tail(u: mp.mpf) -> mp.mpf:
    """(atanh(s) / s - 1) / s^2 with u = s^2, so that log1p(x) = 2 (s + s^3 P(s^2)), s = x / (2 + x)."""
    if u < mp.mpf(10) ** -20:
        return mp.mpf(1) / 3 + u / 5
    s = mp.sqrt(u)
    return (mp.atanh(s) / s - 1) / u


def sin_tail(u: mp.mpf) -> mp.mpf:
    """(sin(r) / r - 1) / r^2 with u = r^2, so that sin(r) = r + r^3 P(r^2)."""
    if u < mp.mpf(10) ** -20:
        return mp.mpf(-1) / 6 + u / 120
    r = mp.sqrt(u)
    return (mp.sin(r) / r - 1) / u


def normal_tail(v: mp.mpf) -> mp.mpf:
    """Q(x) exp(x^2 / 2) of the normal upper tail Q, with v = 2 t - 1 and t = 4 / (4 + x)."""
    t = (v + 1) / 2
    x = 4 * (1 / t - 1)
    return mp.erfc(x / mp.sqrt(2)) * mp.exp(x * x / 2) / 2


def fit(f: Callable[[mp.mpf], mp.mpf], lo: mp.mpf, hi: mp.mpf, degree: int) -> list[mp.mpf]:
    """Coefficients, constant first, of the interpolant at Chebyshev nodes of [lo, hi]."""
    nodes = [(lo + hi) / 2 + (hi - lo) / 2 * mp.cos(mp.pi * (2 * i + 1) / (2 * degree + 2)) for i in range(degree + 1)]
    rows = mp.matrix(degree + 1, degree + 1)
    values = mp.matrix(degree + 1, 1)
    for i, x in enumerate(nodes):
        values[i] = f(x)
        for j in range(degree + 1):
            rows[i, j] = x**j
    return list(mp.lu_solve(rows, values))


def worst(f: Callable[[mp.mpf], mp.mpf], c: list[mp.mpf], lo: mp.mpf, hi: mp.mpf) -> float:
    """The largest relative error of the polynomial on a grid of [lo, hi]."""
    grid = [lo + (hi - lo) * i / 997 for i in range(1, 998)]
    return float(max(abs(mp.polyval(c[::-1], x) / f(x) - 1) for x in grid))


def main() -> None:
    half_ln2 = mp.log(2) / 2 * mp.mpf("1.001")
    quarter = (mp.pi / 2) ** 2 * mp.mpf("1.001")
    ninth = mp.mpf(1) / 9
    # The normal tail underflows at x = 14 in float and at x = 39 in double.
    far = {"float": 8 / mp.mpf(18) - 1, "double": 8 / mp.mpf(43) - 1}
    fits = [
        ("expm1_tail", expm1_tail, "float", -half_ln2, half_ln2, 4),
        ("expm1_tail", expm1_tail, "double", -half_ln2, half_ln2, 10),
        ("atanh_tail", atanh_tail, "float", mp.mpf(0), ninth, 4),
        ("atanh_tail", atanh_tail, "double", mp.mpf(0), ninth, 10),
        ("sin_tail", sin_tail, "float", mp.mpf(0), quarter, 4),
        ("sin_tail", sin_tail, "double", mp.mpf(0), quarter, 7),
        ("normal_tail", normal_tail, "float", far["float"], mp.mpf(1), 9),
        ("normal_tail", normal_tail, "double", far["double"], mp.mpf(1), 23),
    ]
    for name, f, dtype, lo, hi, degree in fits:
        c = fit(f, lo, hi, degree)
        print(f"{name}<{dtype}>: relative error {worst(f, c, lo, hi):.1e}")
        print("  {" + ", ".join(mp.nstr(x, 9 if dtype == "float" else 17) for x in c) + "}")


if __name__ == "__main__":
    main()
