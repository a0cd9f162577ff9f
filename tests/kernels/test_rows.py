"""Layer normalisation and softmax of rows, and their gradients, against float64 and against torch."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from fastmlp import _C
from tests.support.bounds import ULPS, Bounded, assert_within, gamma

REAL = [torch.float32, torch.float64]
#: Around vectors of 2 to 16 lanes.
WIDTHS = [1, 2, 3, 4, 5, 6, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65, 130]
#: Around blocks of as many rows.
ROWS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 40]
#: Beyond a chain of 32 vectors, and of 1024 rows that are a chunk of a sum.
LARGE = [(3, 1100), (2500, 5), (4200, 36)]
#: Of softmax, which takes narrow rows.
NARROW = [*product(ROWS, range(1, 16)), (4200, 3), (2500, 15)]
SHAPES = [*product((1, 9, 17), WIDTHS), *product(ROWS, (6, 37)), *LARGE]


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def junk(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, rstd = (junk(*shape, dtype=x.dtype) for shape in (x.shape, x.shape[:1], x.shape[:1]))
    _C.layer_norm(x, weight, bias, eps, output, mean, rstd)
    return output, mean, rstd


def expected_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Bounded, ...]:
    """Output, mean and rstd: a mean of n terms errs by gamma_n of theirs, and what follows carries that along."""
    dtype, u, n = x.dtype, unit(x.dtype), x.shape[1]
    exact = x.double()
    mean = exact.mean(1, keepdim=True)
    of_mean = gamma(n + 1, dtype) * exact.abs().mean(1, keepdim=True)
    d = exact - mean
    of_d = of_mean + u * (d.abs() + of_mean)
    variance = (d * d).mean(1, keepdim=True)
    of_variance = (2 * d.abs() * of_d + of_d**2).mean(1, keepdim=True)
    of_variance = of_variance + gamma(n + 3, dtype) * ((d.abs() + of_d) ** 2).mean(1, keepdim=True)
    rstd = (variance + eps).rsqrt()
    least = (variance - of_variance).clamp(min=0) + eps * (1 - u)
    of_rstd = (least.rsqrt() - rstd) + ULPS * u * least.rsqrt()
    normal = d * rstd
    error = of_d * (rstd + of_rstd) + d.abs() * of_rstd
    error = error + 2 * u * (normal.abs() + error)
    w = torch.ones(n, dtype=torch.float64) if weight is None else weight.double()
    b = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
    y = normal * w + b
    error = error * w.abs() + 2 * u * ((normal.abs() + error) * w.abs() + b.abs())
    return Bounded(y, error), Bounded(mean[:, 0], of_mean[:, 0]), Bounded(rstd[:, 0], of_rstd[:, 0])


def expected_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Bounded, Bounded, Bounded]:
    """Of input, weight and bias, from the mean and rstd that are given, which are exact here."""
    dtype, u, (rows, n) = x.dtype, unit(x.dtype), x.shape
    grad, r = g.double(), rstd.double()[:, None]
    normal = (x.double() - mean.double()[:, None]) * r
    w = torch.ones(n, dtype=torch.float64) if weight is None else weight.double()
    v = grad * w
    plain, scaled = v.mean(1, keepdim=True), (v * normal).mean(1, keepdim=True)
    of_plain = gamma(n + 3, dtype) * v.abs().mean(1, keepdim=True)
    of_scaled = gamma(n + 6, dtype) * (v * normal).abs().mean(1, keepdim=True)
    whole = v.abs() + plain.abs() + of_plain + normal.abs() * (scaled.abs() + of_scaled)
    error = of_plain + normal.abs() * of_scaled + gamma(8, dtype) * whole
    of_weight = gamma(rows + 4, dtype) * (grad * normal).abs().sum(0)
    return (
        Bounded(r * (v - plain - normal * scaled), r * error * (1 + 2 * u)),
        Bounded((grad * normal).sum(0), of_weight),
        Bounded(grad.sum(0), gamma(rows, dtype) * grad.abs().sum(0)),
    )


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_layer_norm(isa: str, dtype: torch.dtype, affine: str) -> None:
    for (rows, n), offset in product(SHAPES, (0.0, 3.0)):
        x = torch.randn(rows, n, dtype=dtype) * 2 + offset
        weight = torch.randn(n, dtype=dtype) if affine in ("both", "weight") else None
        bias = torch.randn(n, dtype=dtype) if affine in ("both", "bias") else None
        found = layer_norm(x, weight, bias, 1e-5)
        for ours, bound, what in zip(
            found, expected_norm(x, weight, bias, 1e-5), ("output", "mean", "rstd"), strict=True
        ):
            assert_within(ours, bound, f"{what} of {rows} x {n}")
        # The bounds are about what torch computes.
        torchs = torch.native_layer_norm(
            x.double(),
            [n],
            weight if weight is None else weight.double(),
            bias if bias is None else bias.double(),
            1e-5,
        )[0]
        assert torch.allclose(expected_norm(x, weight, bias, 1e-5)[0].value, torchs, 1e-9, 1e-9)
    assert _C.last_isa() == isa


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("has_weight", [True, False])
def test_layer_norm_backward(isa: str, dtype: torch.dtype, has_weight: bool) -> None:
    for rows, n in SHAPES:
        x, g = torch.randn(rows, n, dtype=dtype) + 0.5, torch.randn(rows, n, dtype=dtype)
        weight = torch.randn(n, dtype=dtype) if has_weight else None
        _, mean, rstd = layer_norm(x, weight, None, 1e-5)
        found = [junk(*shape, dtype=dtype) for shape in ((rows, n), (n,), (n,))]
        _C.layer_norm_backward(g, x, mean, rstd, weight, *found)
        bounds = expected_norm_backward(g, x, mean, rstd, weight)
        for ours, bound, what in zip(found, bounds, ("input", "weight", "bias"), strict=True):
            assert_within(ours, bound, f"gradient of {what} of {rows} x {n}")
        doubles = [t.double() for t in (g, x, mean[:, None], rstd[:, None])]
        torchs = torch.ops.aten.native_layer_norm_backward(
            doubles[0],
            doubles[1],
            [n],
            doubles[2],
            doubles[3],
            torch.ones(n).double() if weight is None else weight.double(),
            torch.zeros(n).double(),
            [True] * 3,
        )
        for bound, theirs in zip(bounds, torchs, strict=True):
            assert torch.allclose(bound.value, theirs, 1e-9, 1e-9 * rstd.max().item())
    assert _C.last_isa() == isa


def test_gradients_that_are_asked_for(isa: str) -> None:
    """Each alone has the bits that it has among others."""
    for rows, n in ((9, 6), (40, 65), (2500, 17)):
        x, g, weight = torch.randn(rows, n), torch.randn(rows, n), torch.randn(n)
        _, mean, rstd = layer_norm(x, weight, None, 1e-5)
        whole = [junk(*shape, dtype=x.dtype) for shape in ((rows, n), (n,), (n,))]
        _C.layer_norm_backward(g, x, mean, rstd, weight, *whole)
        for mask in range(8):
            some = [torch.full_like(t, float("nan")) if mask >> i & 1 else None for i, t in enumerate(whole)]
            _C.layer_norm_backward(g, x, mean, rstd, weight, *some)
            for ours, all_of_it in zip(some, whole, strict=True):
                assert ours is None or torch.equal(ours, all_of_it)


def softmax(x: Tensor, log: bool) -> Tensor:
    output = junk(*x.shape, dtype=x.dtype)
    _C.softmax(x, output, log)
    return output


def softmax_backward(g: Tensor, y: Tensor, log: bool) -> Tensor:
    grad_input = junk(*g.shape, dtype=g.dtype)
    _C.softmax_backward(g, y, grad_input, log)
    return grad_input


def expected_softmax(x: Tensor, log: bool) -> Bounded:
    """A rounded argument d of exp changes it by u |d|; the sum and its logarithm carry that along."""
    dtype, u, n = x.dtype, unit(x.dtype), x.shape[1]
    d = x.double() - x.double().amax(1, keepdim=True)
    e = d.exp()
    of_e = e * u * (d.abs() + 2 * ULPS) + torch.finfo(dtype).smallest_normal
    total = e.sum(1, keepdim=True)
    relative = (of_e.sum(1, keepdim=True) + gamma(n, dtype) * (total + of_e.sum(1, keepdim=True))) / total
    if log:
        y = d - total.log()
        return Bounded(y, u * d.abs() + 2 * relative + ULPS * u * total.log() + 2 * u * y.abs())
    y = e / total
    return Bounded(y, of_e / total * (1 + relative) + y * (2 * relative + 4 * u))


def expected_softmax_backward(g: Tensor, y: Tensor, log: bool) -> Bounded:
    """From the output that is given."""
    dtype, u, n = g.dtype, unit(g.dtype), g.shape[1]
    grad, out = g.double(), y.double()
    if log:
        e, total, most = out.exp(), grad.sum(1, keepdim=True), grad.abs().sum(1, keepdim=True)
        of_total = gamma(n, dtype) * most
        error = e * (of_total + 2 * ULPS * u * (total.abs() + of_total)) + torch.finfo(dtype).smallest_normal * most
        return Bounded(grad - e * total, error + 2 * u * (grad.abs() + e * total.abs() + error))
    total = (grad * out).sum(1, keepdim=True)
    of_total = gamma(n + 1, dtype) * (grad * out).abs().sum(1, keepdim=True)
    return Bounded(out * (grad - total), out * (of_total + 3 * u * (grad.abs() + total.abs() + of_total)))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("log", [True, False])
def test_softmax(isa: str, dtype: torch.dtype, log: bool) -> None:
    name = "_log_softmax" if log else "_softmax"
    backward = getattr(torch.ops.aten, f"{name}_backward_data")
    for (rows, n), scale in product(NARROW, (1.0, 30.0)):
        x, g = torch.randn(rows, n, dtype=dtype) * scale - 2, torch.randn(rows, n, dtype=dtype)
        y = softmax(x, log)
        bound = expected_softmax(x, log)
        assert_within(y, bound, f"{name} of {rows} x {n}")
        assert torch.allclose(bound.value, getattr(torch.ops.aten, name)(x.double(), 1, False), 1e-9, 1e-12)
        bound = expected_softmax_backward(g, y, log)
        assert_within(softmax_backward(g, y, log), bound, f"gradient of {name} of {rows} x {n}")
        assert torch.allclose(bound.value, backward(g.double(), y.double(), 1, torch.float64), 1e-9, 1e-12)
    assert _C.last_isa() == isa


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("log", [True, False])
def test_special_values_of_softmax(isa: str, dtype: torch.dtype, log: bool) -> None:
    """NaN, infinities and the largest numbers, wherever in a row they stand, give what torch gives."""
    inf, nan, big = math.inf, math.nan, torch.finfo(dtype).max
    rows = [[a, b, 1.0] for a in (nan, inf, -inf, 0.0, big, -big) for b in (nan, inf, -inf, 1.0, big, -big)]
    name = "_log_softmax" if log else "_softmax"
    backward = getattr(torch.ops.aten, f"{name}_backward_data")
    for n in (3, 6, 15):
        for at in {0, n - 3, (n - 3) // 2}:
            x = torch.zeros(len(rows) + 1, n, dtype=dtype)
            x[:-1, at : at + 3] = torch.tensor(rows, dtype=dtype)
            x[-1] = -inf
            y, theirs = softmax(x, log), getattr(torch.ops.aten, name)(x, 1, False)
            assert torch.allclose(y, theirs, 1e-5, 1e-6, equal_nan=True)
            for g in (torch.ones_like(x), x):
                ours, torchs = softmax_backward(g, theirs, log), backward(g, theirs, 1, dtype)
                finite = torchs.isfinite() & ours.isfinite()
                assert torch.equal(ours.isnan(), torchs.isnan())
                assert torch.allclose(ours[finite], torchs[finite], 1e-5, 1e-6)
                assert torch.equal(ours[~finite].nan_to_num(7), torchs[~finite].nan_to_num(7))


@pytest.mark.parametrize("dtype", REAL)
def test_special_values_of_layer_norm(isa: str, dtype: torch.dtype) -> None:
    """A row with NaN or an infinity is NaN throughout, as torch has it, and no other row is."""
    for n, value in product((1, 3, 16, 37), (math.nan, math.inf, -math.inf)):
        x, g = torch.randn(20, n, dtype=dtype), torch.randn(20, n, dtype=dtype)
        x[4, n // 2] = x[17, 0] = value
        weight, bias = torch.ones(n, dtype=dtype), torch.zeros(n, dtype=dtype)
        output, mean, rstd = layer_norm(x, None, None, 1e-5)
        theirs, their_mean, their_rstd = torch.native_layer_norm(x, [n], weight, bias, 1e-5)
        assert torch.equal(output.isnan(), theirs.isnan())
        assert torch.equal(mean.isfinite(), their_mean.flatten().isfinite())
        assert torch.equal(rstd.isnan(), their_rstd.flatten().isnan())
        found = [torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)]
        _C.layer_norm_backward(g, x, their_mean.flatten(), their_rstd.flatten(), None, *found)
        torchs = torch.ops.aten.native_layer_norm_backward(
            g, x, [n], their_mean, their_rstd, weight, bias, [True, True, True]
        )
        for ours, torchs_own in zip(found, torchs, strict=True):
            assert torch.equal(ours.isnan(), torchs_own.isnan())


def test_equal_columns(isa: str) -> None:
    """Rows without variance, of large numbers: lanes past the end of a row take no part."""
    for n, value in product((3, 6, 17, 33), (2.0**13, 2.0**121)):
        x = torch.full((5, n), value)
        output, mean, rstd = layer_norm(x, None, None, 1e-5)
        assert torch.equal(mean, x[:, 0])
        assert torch.equal(output, torch.zeros_like(x))
        grad_input = torch.empty_like(x)
        _C.layer_norm_backward(torch.ones_like(x), x, mean, rstd, None, grad_input, None, None)
        assert grad_input.abs().max() <= 1e-3


def test_bits_depend_on_no_threads_and_no_neighbours(isa: str) -> None:
    before = torch.get_num_threads()
    x, g, weight = torch.randn(5000, 70), torch.randn(5000, 70), torch.randn(70)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, mean, rstd = layer_norm(x, weight, weight, 1e-5)
            grads = [torch.empty_like(t) for t in (x, weight, weight)]
            _C.layer_norm_backward(g, x, mean, rstd, weight, *grads)
            narrow = x[:, :6].clone()
            y = softmax(narrow, True)
            of_softmax = softmax_backward(g[:, :6].clone(), y, True)
            results.append([output, mean, rstd, *grads, y, of_softmax, softmax(narrow, False)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    for first in (1, 5, 16):
        assert torch.equal(
            layer_norm(x[first : first + 3].clone(), weight, weight, 1e-5)[0], results[0][0][first : first + 3]
        )
        assert torch.equal(softmax(x[first : first + 3, :6].clone(), False), results[0][-1][first : first + 3])


def test_neighbours_are_not_written(isa: str) -> None:
    for rows, n in product((1, 9, 17), (1, 6, 15, 37)):

        def guarded(*shape: int) -> tuple[Tensor, Tensor]:
            count = math.prod(shape)
            whole = torch.full((count + 64,), 7.0)
            return whole, whole[32 : 32 + count].view(shape)

        x, g = torch.randn(rows, n), torch.randn(rows, n)
        written = [guarded(rows, n), guarded(rows), guarded(rows), guarded(rows, n), guarded(n), guarded(n)]
        m = min(n, 15)
        written += [guarded(rows, m), guarded(rows, m)]
        parts = [part for _, part in written]
        _C.layer_norm(x, None, None, 1e-5, *parts[:3])
        _C.layer_norm_backward(g, x, parts[1], parts[2], None, *parts[3:6])
        _C.softmax(x[:, :m].clone(), parts[6], True)
        _C.softmax_backward(g[:, :m].clone(), parts[6], parts[7], True)
        for whole, _ in written:
            assert (whole[:32] == 7).all()
            assert (whole[-32:] == 7).all()


def test_no_rows(isa: str) -> None:
    empty, of_rows = torch.empty(0, 5), torch.empty(0)
    _C.layer_norm(empty, None, None, 1e-5, empty, of_rows, of_rows)
    weight, bias = torch.full((5,), 7.0), torch.full((5,), 7.0)
    _C.layer_norm_backward(empty, empty, of_rows, of_rows, None, empty, weight, bias)
    assert weight.tolist() == bias.tolist() == [0.0] * 5
    _C.softmax(empty, empty, True)
    _C.softmax_backward(empty, empty, empty, True)


def test_a_gradient_over_what_it_follows_from(isa: str) -> None:
    """Softmax's gradient may be written over either operand, and its output over the input."""
    for n in (6, 15):
        for log in (True, False):
            x, g = torch.randn(19, n), torch.randn(19, n)
            y = softmax(x, log)
            expected = softmax_backward(g, y, log)
            for over in (0, 1):
                grad, output = g.clone(), y.clone()
                written = (grad, output)[over]
                _C.softmax_backward(grad, output, written, log)
                assert torch.equal(written, expected)
            _C.softmax(x, x, log)
            assert torch.equal(x, y)


def test_what_does_not_fit_raises() -> None:
    x, of_rows, of_columns = torch.ones(4, 6), torch.ones(4), torch.ones(6)
    with pytest.raises(ValueError, match=r"fastmlp: weight is \[4\], expected \[6\]"):
        _C.layer_norm(x, of_rows, None, 1e-5, x, of_rows, of_rows)
    with pytest.raises(TypeError, match="fastmlp: output is of Double, expected Float"):
        _C.softmax(x, x.double(), True)
    with pytest.raises(TypeError, match="fastmlp: input is of Half, expected float32 or float64"):
        _C.softmax(x.half(), x.half(), True)
    with pytest.raises(ValueError, match=r"fastmlp: input is \[6\], expected \[rows, columns\]"):
        _C.softmax(of_columns, of_columns, True)
    with pytest.raises(ValueError, match="fastmlp: input has 16 columns, expected at most 15"):
        _C.softmax(torch.ones(4, 16), torch.ones(4, 16), True)
    with pytest.raises(ValueError, match="fastmlp: grad_input has gaps in memory"):
        _C.softmax_backward(x, x, torch.ones(6, 4).t(), False)
    with pytest.raises(ValueError, match=r"fastmlp: mean is \[6\], expected \[4\]"):
        _C.layer_norm_backward(x, x, of_columns, of_rows, None, x, None, None)


def test_rows_that_are_worth_a_node(isa: str) -> None:
    """Fewer columns than a vector of torch's has lanes of float32."""
    assert _C.softmax_columns() == (15 if isa.startswith("avx512") else 7)


def test_on_a_tape() -> None:
    tape = _C.Tape()

    def new(*shape: int) -> Tensor:
        strides = torch.empty(shape).stride()
        return tape.tensor(tape.add_tensor(tape.add_memory("tape", 96), torch.empty(0), shape, strides, 0))

    matrix, other, of_rows, of_columns = new(4, 6), new(4, 6), new(4), new(6)
    tape.add_layer_norm(matrix, of_columns, None, 1e-5, other, of_rows, of_rows, "here")
    tape.add_layer_norm_backward(matrix, other, of_rows, of_rows, None, None, of_columns, None, "here")
    tape.add_softmax(matrix, other, True, "here")
    tape.add_softmax_backward(matrix, other, matrix, False, "here")
    assert tape.calls == tape.direct_calls == 4
    names = ["layer_norm", "layer_norm_backward", "log_softmax", "softmax_backward"]
    assert [(name, place) for name, place, _ in tape.times()] == [(name, "here") for name in names]
