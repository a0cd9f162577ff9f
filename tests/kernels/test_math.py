"""Largest errors of the vectorised functions in units in the last place, against 40 digits."""

from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from torch import Tensor

from fastmlp import _C
from fastmlp.activations import resolve
from fastmlp.ops import stack_of
from tests.support.elementwise import compute

mp.mp.dps = 40

#: Name of the activation, its exact counterpart, range of arguments, and the error that math.inl
#: states for it (gelu and the like: where the result is not cancelled away).
CASES: list[tuple[str, Callable[[mp.mpf], mp.mpf], float, float, float]] = [
    ("tanh", mp.tanh, -12, 12, 3),
    ("sigmoid", lambda x: 1 / (1 + mp.exp(-x)), -80, 40, 3),
    ("elu", lambda x: mp.expm1(x) if x < 0 else x, -40, 1, 2),
    ("celu", lambda x: mp.expm1(x) if x < 0 else x, -40, 1, 2),
    ("sin", mp.sin, -40, 40, 2),
    ("sin", mp.sin, -24000, 24000, 2),
    ("softplus", lambda x: mp.log1p(mp.exp(x)), -60, 19, 3),
    ("gelu", lambda x: x * mp.ncdf(x), -2, 6, 6),
    ("mish", lambda x: x * mp.tanh(mp.log1p(mp.exp(x))), -10, 15, 5),
    ("silu", lambda x: x / (1 + mp.exp(-x)), -30, 30, 4),
]


def ulps(found: Tensor, exact: list[mp.mpf]) -> float:
    """The largest distance in units in the last place of the exact results."""
    finfo = torch.finfo(found.dtype)
    worst = 0.0
    for value, wanted in zip(found.tolist(), exact, strict=True):
        exponent = max(mp.frexp(wanted)[1] - 1, mp.frexp(mp.mpf(finfo.tiny))[1] - 1)
        worst = max(worst, float(abs(mp.mpf(value) - wanted) / mp.ldexp(mp.mpf(finfo.eps), int(exponent))))
    return worst


def by_kernel(name: str, x: Tensor) -> Tensor:
    stack = stack_of((False,), (resolve(name),))
    return _C.infer(stack.native, x[:, None], [torch.ones(1, 1, dtype=x.dtype)])[:, 0]


@pytest.mark.parametrize(("name", "exact", "low", "high", "stated"), CASES, ids=lambda c: str(c)[:12])
def test_ulps(
    isa: str,
    dtype: torch.dtype,
    name: str,
    exact: Callable[[mp.mpf], mp.mpf],
    low: float,
    high: float,
    stated: float,
) -> None:
    near_zero = torch.logspace(-30, 0, 200, dtype=dtype)
    x = torch.cat([torch.empty(800, dtype=dtype).uniform_(low, high), near_zero, -near_zero])
    found = by_kernel(name, x)
    assert ulps(found, [exact(mp.mpf(v)) for v in x.tolist()]) <= stated


def test_exp(isa: str, dtype: torch.dtype) -> None:
    """exp over its whole range, by the derivative of elu with alpha -1: -exp(z) for z < 0."""
    from fastmlp import Activation

    # To just above the smallest normal number of the dtype.
    lowest = float(mp.log(mp.mpf(torch.finfo(dtype).smallest_normal))) + 0.25
    x = torch.empty(2000, dtype=dtype).uniform_(lowest, 0)
    stack = stack_of((False,), (Activation("elu", alpha=-1.0),))
    ones = torch.ones(2000, 1, dtype=dtype)
    gradient = _C.backward(stack.native, ones, x[:, None], [x[:, None]], [ones[:1]], [True, False])[0]
    assert gradient is not None
    assert ulps(-gradient[:, 0], [mp.exp(mp.mpf(v)) for v in x.tolist()]) <= 1


#: Of instructions of elementwise programs: exact counterpart, range of arguments, and the error that math.inl states.
INSTRUCTIONS: list[tuple[str, Callable[[mp.mpf], mp.mpf], float, float, float]] = [
    ("exp", mp.exp, -80, 80, 1),
    ("expm1", mp.expm1, -60, 80, 2),
    ("expm1", mp.expm1, -1, 1.5, 2),
    ("log", mp.log, 0.4, 2.5, 1),
    ("log", mp.log, 1e-3, 1e30, 1),
    ("log1p", mp.log1p, -0.9999, 1.5, 2),
    ("log1p", mp.log1p, 0, 1e12, 2),
    ("cos", mp.cos, -40, 40, 3),
]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("name", "exact", "low", "high", "stated"), INSTRUCTIONS, ids=lambda c: str(c)[:12])
def test_instructions(
    isa: str,
    double: bool,
    name: str,
    exact: Callable[[mp.mpf], mp.mpf],
    low: float,
    high: float,
    stated: float,
) -> None:
    dtype = torch.float64 if double else torch.float32
    x = torch.empty(1500, dtype=dtype).uniform_(low, high)
    near = torch.logspace(-38, -0.01, 500, dtype=dtype)  # in float32 the smallest ones are subnormal
    x = torch.cat([x, near] if name == "log" else [x, near, -near])
    if name in ("log", "log1p"):
        x = torch.cat([x, 1 + near] if name == "log" else [x, near - 1])
        x = x[x > (0 if name == "log" else -1)]
    assert ulps(compute(name, [x]), [exact(mp.mpf(v)) for v in x.tolist()]) <= stated


def test_large_arguments_of_sin(isa: str, dtype: torch.dtype) -> None:
    """Beyond the range of the fast reduction, each lane by its own value."""
    x = torch.tensor([1e6, 0.5, 1e9, -3e15, 2.0, 1e30, -1e-3, 7.5e4], dtype=dtype)
    x = x[x.isfinite()]  # not 1e30 in float16
    assert ulps(by_kernel("sin", x), [mp.sin(mp.mpf(v)) for v in x.tolist()]) <= 2
    alone = torch.cat([by_kernel("sin", v[None]) for v in x])
    assert torch.equal(alone, by_kernel("sin", x))
