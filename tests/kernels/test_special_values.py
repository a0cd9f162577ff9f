"""Where an activation of fastmlp differs from PyTorch's at NaN, infinities, zeros and the ends of the range: exactly in
the rows of docs/special_values.md. Every activation, dtype, instruction set, value, first and second derivative.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, functional, reference
from tests.support.axes import ACTIVATIONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "special_values.md"
NAN, INF = float("nan"), float("inf")

#: Besides those of other tests: parameters at the ends of the range.
CASES = [
    *ACTIVATIONS,
    Activation("leaky_relu", negative_slope=INF),
    Activation("elu", alpha=INF),
    Activation("elu", alpha=NAN),
    Activation("softplus", beta=0.0),
    Activation("softplus", beta=-1.0),
    Activation("softplus", beta=INF),
    Activation("softplus", threshold=INF),
    Activation("celu", alpha=INF),
    Activation("sin", frequency=INF),
    Activation("sin", frequency=NAN),
]


def points(dtype: torch.dtype) -> dict[str, float]:
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    return {
        "NaN": NAN,
        "inf": INF,
        "-inf": -INF,
        "0": 0.0,
        "-0": -0.0,
        "largest": finfo.max,
        "-largest": -finfo.max,
        "smallest": smallest,
        "-smallest": -smallest,
    }


Results = tuple[Tensor, Tensor, Tensor]  # value, first and second derivative
KINDS = ("value", "derivative", "second derivative")


def differentiated(f: Callable[[Tensor], Tensor], z: Tensor) -> Results:
    """f is elementwise. The first derivative is computed by itself, since `create_graph` takes another route."""
    z = z.clone().requires_grad_()
    y = f(z)
    one = torch.ones_like(y)
    (once,) = torch.autograd.grad(y, z, one, retain_graph=True)
    (again,) = torch.autograd.grad(y, z, one, create_graph=True)
    twice = torch.zeros_like(z)
    if again.requires_grad:
        (twice,) = torch.autograd.grad(again, z, one)
    return y.detach(), once, twice


def torchs(act: Activation) -> Callable[[Tensor], Tensor]:
    def f(z: Tensor) -> Tensor:
        sums = nn.functional.linear(z[:, None], torch.ones(1, 1, dtype=z.dtype))
        return reference.activate(sums[:, 0], act.name, act.parameters)

    return f


def ours(act: Activation) -> Callable[[Tensor], Tensor]:
    return lambda z: functional.linear(z[:, None], torch.ones(1, 1, dtype=z.dtype), None, act)[:, 0]


@contextlib.contextmanager
def onednn(on: bool) -> Iterator[None]:
    torch._C._set_mkldnn_enabled(on)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


#: So many that PyTorch's vectorised loop computes the first.
COPIES = 64


def by_vectors(act: Activation, z: Tensor) -> Results:
    with onednn(False):
        return first(differentiated(torchs(act), z.repeat(COPIES)), z)


def one_by_one(act: Activation, z: Tensor) -> Results:
    """As PyTorch computes the last elements of a tensor, which fill no vector."""
    with onednn(False):
        single = [differentiated(torchs(act), z[i : i + 1]) for i in range(len(z))]
    value, once, twice = (torch.cat(parts) for parts in zip(*single, strict=True))
    return value, once, twice


def by_onednn(act: Activation, z: Tensor) -> Results:
    with onednn(True):
        return first(differentiated(torchs(act), z.repeat(COPIES)), z)


CODE = {"vectors": by_vectors, "single elements": one_by_one, "oneDNN": by_onednn}


def first(results: Results, z: Tensor) -> Results:
    value, once, twice = (t[: len(z)] for t in results)
    return value, once, twice


def text(x: float, dtype: torch.dtype) -> str:
    if x == 0:
        return "-0" if math.copysign(1, x) < 0 else "0"
    return {torch.finfo(dtype).max: "largest"}.get(x, "NaN" if math.isnan(x) else f"{x:.3g}")


def differ(ours: float, torchs: float, kind: str, dtype: torch.dtype, flushes: bool) -> bool:
    """By more than rounding. A result below the smallest normal number is as good as zero."""
    if not (math.isfinite(ours) and math.isfinite(torchs)):
        return not (math.isnan(ours) and math.isnan(torchs)) and ours != torchs
    if kind == "value" and ours == torchs == 0:
        return math.copysign(1, ours) != math.copysign(1, torchs)
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * (1 if dtype.itemsize > 2 or flushes else finfo.eps)
    return abs(ours - torchs) > 8 * finfo.eps * abs(torchs) + smallest


def name(act: Activation) -> str:
    """Without the parameters that make no difference."""
    return repr(act) if act.scalars[1] == INF else act.name


Row = tuple[str, str, str, str, str, str]  # activation, of, at, PyTorch's code, gives, fastmlp gives


def differences(isa: str, dtype: torch.dtype) -> set[Row]:
    z = torch.tensor(list(points(dtype).values()), dtype=dtype)
    # The instruction takes subnormal operands for zeros, and makes zeros of subnormal results.
    flushes = isa == "avx512_bf16" and dtype == torch.bfloat16
    seen = torch.where(z.abs() < torch.finfo(dtype).smallest_normal, torch.zeros_like(z), z) if flushes else z
    found: set[Row] = set()
    for act in CASES:
        found_by_us = first(differentiated(ours(act), z.repeat(COPIES)), z)
        for code, compute in CODE.items():
            for kind, own, theirs in zip(KINDS, found_by_us, compute(act, seen), strict=True):
                for at, a, b in zip(points(dtype), own.tolist(), theirs.tolist(), strict=True):
                    if differ(a, b, kind, dtype, flushes):
                        found.add((name(act), kind, at, code, text(b, dtype), text(a, dtype)))
    return found


def documented(dtype: torch.dtype) -> set[Row]:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["activation", "of", "at", "PyTorch's code", "gives", "fastmlp gives", "dtypes"]
    own = str(dtype).removeprefix("torch.")
    found: set[Row] = set()
    for activation, kind, at, code, theirs, fastmlps, dtypes in table[2:]:
        if dtypes == "all" or own in dtypes.split(", "):
            found.add((activation, kind, at, code, theirs, fastmlps))
    return found


def test_differences_are_those_of_the_document(isa: str, dtype: torch.dtype) -> None:
    found, expected = differences(isa, dtype), documented(dtype)
    assert found <= expected
    # Not every processor has oneDNN's code for every dtype.
    assert {row for row in expected - found if row[3] != "oneDNN"} == set()


def test_frozen_values_are_those_of_layers(isa: str, dtype: torch.dtype) -> None:
    z = torch.tensor(list(points(dtype).values()), dtype=dtype).repeat(COPIES)[:, None]
    for act in CASES:
        layer = fastmlp.Linear(1, 1, bias=False, activation=act, dtype=dtype)
        torch.nn.init.ones_(layer.weight)
        with torch.no_grad():
            expected = layer(z)
        found = fastmlp.freeze(layer)(z)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan()), act
