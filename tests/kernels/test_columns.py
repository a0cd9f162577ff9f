"""Batch normalisation of columns, and its gradients, against float64 and against torch."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from fastmlp import _C
from tests.support.bounds import ULPS, Bounded, assert_within, gamma

REAL = [torch.float32, torch.float64]
#: Around vectors of 2 to 16 lanes, and around four of them.
WIDTHS = [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 47, 63, 64, 65, 130]
#: Around tiles of 32 rows.
ROWS = [2, 3, 7, 31, 32, 33, 64, 65, 100]
#: Beyond 1024 rows that are a chunk of a sum.
LARGE = [(1023, 7), (2500, 5), (4200, 36), (3, 1100)]
SHAPES = [*product((2, 9, 40), WIDTHS), *product(ROWS, (1, 6, 37)), *LARGE]
#: The last one is far more than the standard deviation.
OFFSETS = [0.0, 3.0, 3000.0]
EPS, MOMENTUM = 1e-5, 0.3

Optional = Tensor | None


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def junk(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def in_training(
    x: Tensor, weight: Optional, bias: Optional, running: tuple[Optional, Optional], momentum: float = MOMENTUM
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd; moves the running statistics."""
    output, mean, rstd = (junk(*shape, dtype=x.dtype) for shape in (x.shape, x.shape[1:], x.shape[1:]))
    _C.batch_norm(x, weight, bias, *running, True, momentum, EPS, output, mean, rstd)
    return output, mean, rstd


def in_eval(x: Tensor, weight: Optional, bias: Optional, mean: Tensor, variance: Tensor) -> Tensor:
    output = junk(*x.shape, dtype=x.dtype)
    _C.batch_norm(x, weight, bias, mean, variance, False, 0.0, EPS, output, None, None)
    return output


def chain(rows: int) -> int:
    """How many roundings a sum over rows takes: one for each row of a tile, and one for each tile."""
    return min(rows, 32) + math.ceil(rows / 32)


def double(tensor: Optional, like: Tensor, value: float) -> Tensor:
    return torch.full(like.shape[1:], value, dtype=torch.float64) if tensor is None else tensor.double()


def scaled(d: Tensor, of_d: Tensor, rstd: Tensor, of_rstd: Tensor, w: Tensor, b: Tensor, u: float) -> Bounded:
    """d rstd w + b, for d and rstd with so much error."""
    y = d * rstd * w
    error = (of_d * (rstd + of_rstd) + d.abs() * of_rstd) * w.abs()
    return Bounded(y + b, error + 3 * u * (y.abs() + error + b.abs()))


def expected_in_training(
    x: Tensor, weight: Optional, bias: Optional, running: tuple[Tensor, Tensor], momentum: float = MOMENTUM
) -> tuple[Bounded, ...]:
    """Output, mean, rstd, running mean and running variance.

    Each mean, of a tile or of all rows so far, errs by the chain of its sum and by four roundings for each tile that
    was joined. The deviations within a tile add up to zero, so that the error of its mean counts by its square; between
    tiles it counts by the distance of their means, which is at most a standard deviation in the mean.
    """
    dtype, u, n = x.dtype, unit(x.dtype), x.shape[0]
    exact = x.double()
    terms = chain(n) + 4 * math.ceil(n / 32) + 1
    mean, of_mean = exact.mean(0), gamma(terms, dtype) * exact.abs().mean(0)
    of_any = gamma(terms, dtype) * exact.abs().amax(0)
    d = exact - mean
    variance = (d * d).mean(0)
    deviation = variance.sqrt()
    of_variance = 5 * of_any**2 + gamma(terms + 8, dtype) * (deviation + 3 * of_any) ** 2
    if n > 32:
        of_variance += 4 * of_any * deviation
    rstd = (variance + EPS).rsqrt()
    least = (variance - of_variance).clamp(min=0) + EPS * (1 - u)
    of_rstd = (least.rsqrt() - rstd) + ULPS * u * least.rsqrt()
    y = scaled(
        d, of_mean + u * (d.abs() + of_mean), rstd, of_rstd, double(weight, x, 1), double(bias, x, 0), unit(dtype)
    )
    moved = []
    sample = n / (n - 1)
    for was, now, error in zip(
        running, (mean, variance * sample), (of_mean, of_variance * sample * (1 + u)), strict=True
    ):
        parts = momentum * (now.abs() + error) + (1 - momentum) * was.double().abs()
        value = momentum * now + (1 - momentum) * was.double()
        moved.append(Bounded(value, momentum * error + gamma(6, dtype) * parts))
    return y, Bounded(mean, of_mean), Bounded(rstd, of_rstd), *moved


def expected_in_eval(x: Tensor, weight: Optional, bias: Optional, mean: Tensor, variance: Tensor) -> Bounded:
    u, rstd = unit(x.dtype), (variance.double() + EPS).rsqrt()
    d = x.double() - mean.double()
    return scaled(d, u * d.abs(), rstd, ULPS * u * rstd, double(weight, x, 1), double(bias, x, 0), u)


def expected_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, of_rstd: Tensor, weight: Optional, training: bool
) -> tuple[Bounded, Bounded, Bounded]:
    """Of input, weight and bias, from the mean that is given, and from the rstd with so much error."""
    dtype, n = x.dtype, x.shape[0]
    grad, d, r = g.double(), x.double() - mean.double(), rstd.double()
    r_most = r + of_rstd
    plain, of_plain = grad.sum(0), gamma(chain(n) + 1, dtype) * grad.abs().sum(0)
    dots, of_dots = (grad * d).sum(0), gamma(chain(n) + 4, dtype) * (grad * d).abs().sum(0)
    scale = r * double(weight, x, 1)
    of_scale = of_rstd * double(weight, x, 1).abs()
    of_weight = r_most * (of_dots + gamma(2, dtype) * dots.abs()) + of_rstd * dots.abs()
    value, error, most = grad, torch.zeros_like(grad), grad.abs()
    if training:
        slope = dots * r * r / n
        of_slope = (of_dots + gamma(4, dtype) * (dots.abs() + of_dots)) * r * r / n
        value = grad - plain / n - d * slope
        most = grad.abs() + (plain.abs() + of_plain) / n + d.abs() * (slope.abs() + of_slope)
        error = of_plain / n + d.abs() * of_slope
    error = error + gamma(6, dtype) * most
    return (
        Bounded(value * scale, error * (scale.abs() + of_scale) + value.abs() * of_scale),
        Bounded(dots * r, of_weight),
        Bounded(plain, of_plain),
    )


def some(affine: str, name: str, n: int, dtype: torch.dtype) -> Optional:
    return torch.randn(n, dtype=dtype) if affine in ("both", name) else None


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_in_training(isa: str, dtype: torch.dtype, affine: str) -> None:
    for (rows, n), offset in product(SHAPES, OFFSETS):
        x = torch.randn(rows, n, dtype=dtype) * 2 + offset
        weight, bias = some(affine, "weight", n, dtype), some(affine, "bias", n, dtype)
        running = torch.randn(n, dtype=dtype), torch.rand(n, dtype=dtype)
        bounds = expected_in_training(x, weight, bias, running)
        doubles = [t if t is None else t.double().clone() for t in (x, weight, bias, *running)]
        found = *in_training(x, weight, bias, running), *running
        names = ("output", "mean", "rstd", "running mean", "running variance")
        for ours, bound, what in zip(found, bounds, names, strict=True):
            assert_within(ours, bound, f"{what} of {rows} x {n}")
        # The bounds are about what torch computes.
        torchs = torch.ops.aten.native_batch_norm(*doubles, True, MOMENTUM, EPS)
        for bound, theirs in zip(bounds, (*torchs, *doubles[3:]), strict=True):
            assert theirs is not None
            assert torch.allclose(bound.value, theirs, 1e-8, 1e-8)
    assert _C.last_isa() == isa


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_in_eval(isa: str, dtype: torch.dtype, affine: str) -> None:
    for (rows, n), offset in product([*SHAPES, (1, 1), (1, 37)], OFFSETS):
        x = torch.randn(rows, n, dtype=dtype) * 2 + offset
        weight, bias = some(affine, "weight", n, dtype), some(affine, "bias", n, dtype)
        mean, variance = torch.randn(n, dtype=dtype) + offset, torch.rand(n, dtype=dtype)
        before = mean.clone(), variance.clone()
        bound = expected_in_eval(x, weight, bias, mean, variance)
        assert_within(in_eval(x, weight, bias, mean, variance), bound, f"output of {rows} x {n}")
        assert all(map(torch.equal, (mean, variance), before))
        doubles = [t if t is None else t.double() for t in (x, weight, bias, mean, variance)]
        assert torch.allclose(bound.value, torch.ops.aten.native_batch_norm(*doubles, False, 0.0, EPS)[0], 1e-9, 1e-9)
    assert _C.last_isa() == isa


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients(isa: str, dtype: torch.dtype, has_weight: bool, training: bool) -> None:
    for (rows, n), offset in product(SHAPES, (0.0, 3.0)):
        x, g = torch.randn(rows, n, dtype=dtype) + offset, torch.randn(rows, n, dtype=dtype)
        weight = torch.randn(n, dtype=dtype) if has_weight else None
        found = [junk(*shape, dtype=dtype) for shape in ((rows, n), (n,), (n,))]
        if training:
            _, mean, rstd = in_training(x, weight, None, (None, None))
            _C.batch_norm_backward(g, x, mean, rstd, None, EPS, weight, *found)
            statistics = mean, rstd, torch.zeros(n)
        else:
            mean, variance = torch.randn(n, dtype=dtype), torch.rand(n, dtype=dtype)
            _C.batch_norm_backward(g, x, mean, None, variance, EPS, weight, *found)
            exact = (variance.double() + EPS).rsqrt()
            statistics = mean, exact, ULPS * unit(dtype) * exact
        bounds = expected_backward(g, x, *statistics, weight, training)
        for ours, bound, what in zip(found, bounds, ("input", "weight", "bias"), strict=True):
            assert_within(ours, bound, f"gradient of {what} of {rows} x {n}")
        one = torch.ones(n).double() if weight is None else weight.double()
        own = (None, None) if training else (mean.double(), variance.double())
        saved = (mean.double(), rstd.double()) if training else (None, None)
        torchs = torch.ops.aten.native_batch_norm_backward(
            g.double(), x.double(), one, *own, *saved, training, EPS, [True] * 3
        )
        for bound, theirs in zip(bounds, torchs, strict=True):
            assert torch.allclose(bound.value, theirs, 1e-9, 1e-9 * max(statistics[1].max().item(), 1.0))
    assert _C.last_isa() == isa


def test_results_that_are_asked_for(isa: str) -> None:
    """Each alone has the bits that it has among others."""
    for rows, n in ((9, 6), (40, 65), (2500, 17)):
        x, g, weight = torch.randn(rows, n), torch.randn(rows, n), torch.randn(n)
        start = torch.randn(n), torch.rand(n)

        def forward(x: Tensor, weight: Tensor, start: tuple[Tensor, Tensor], mask: int) -> list[Optional]:
            shapes = x.shape, x.shape[1:], x.shape[1:]
            whole = [junk(*shape, dtype=x.dtype) for shape in shapes] + [tensor.clone() for tensor in start]
            asked = [tensor if mask >> i & 1 else None for i, tensor in enumerate(whole)]
            output, mean, rstd, *running = asked
            _C.batch_norm(x, weight, None, running[0], running[1], True, MOMENTUM, EPS, output, mean, rstd)
            return asked

        everything = forward(x, weight, start, 31)
        for mask in range(32):
            for ours, all_of_it in zip(forward(x, weight, start, mask), everything, strict=True):
                assert ours is None or (all_of_it is not None and torch.equal(ours, all_of_it))
        _, mean, rstd, *_ = everything
        assert mean is not None
        for r, variance in ((rstd, None), (None, start[1])):
            whole = [torch.full_like(t, math.nan) for t in (x, weight, weight)]
            _C.batch_norm_backward(g, x, mean, r, variance, EPS, weight, whole[0], whole[1], whole[2])
            for mask in range(8):
                asked = [torch.full_like(t, math.nan) if mask >> i & 1 else None for i, t in enumerate(whole)]
                _C.batch_norm_backward(g, x, mean, r, variance, EPS, weight, asked[0], asked[1], asked[2])
                assert all(t is None or torch.equal(t, other) for t, other in zip(asked, whole, strict=True))


@pytest.mark.parametrize("dtype", REAL)
def test_special_values(isa: str, dtype: torch.dtype) -> None:
    """A column with NaN or an infinity is what torch has for it, and no other column is touched."""
    for rows, n, value in product((2, 20, 70, 3000), (1, 3, 16, 70), (math.nan, math.inf, -math.inf)):
        x, g = torch.randn(rows, n, dtype=dtype), torch.randn(rows, n, dtype=dtype)
        x[rows // 2, n // 2] = x[rows - 1, 0] = value
        ours, theirs = (torch.zeros(n, dtype=dtype), torch.ones(n, dtype=dtype)), (torch.zeros(n), torch.ones(n))
        theirs = theirs[0].to(dtype), theirs[1].to(dtype)
        found = in_training(x, None, None, ours)
        torchs = torch.ops.aten.native_batch_norm(x, None, None, *theirs, True, MOMENTUM, EPS)
        for a, b in zip((*found, *ours), (*torchs, *theirs), strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a[a.isinf()], b[b.isinf()])
        grads = [torch.empty_like(t) for t in (x, found[1], found[1])]
        for training in (True, False):
            statistics = (torchs[1], torchs[2], None) if training else (theirs[0], None, torch.ones_like(theirs[1]))
            mean, rstd, variance = statistics
            _C.batch_norm_backward(g, x, mean, rstd, variance, EPS, None, *grads)
            of_torch = torch.ops.aten.native_batch_norm_backward(
                g, x, torch.ones_like(theirs[0]), theirs[0], variance, *torchs[1:], training, EPS, [True] * 3
            )
            for a, b in zip(grads, of_torch, strict=True):
                assert torch.equal(a.isnan(), b.isnan())


def test_columns_without_variance(isa: str) -> None:
    """Of large numbers, over several tiles; and with no `eps` either, where torch has a reciprocal of zero."""
    for rows, n, value in product((2, 32, 40, 96), (3, 17, 64), (2.0**13, 2.0**120)):
        x = torch.full((rows, n), value)
        running = torch.zeros(n), torch.ones(n)
        output, mean, _ = in_training(x, None, None, running)
        assert torch.equal(mean, x[0])
        assert torch.equal(output, torch.zeros_like(x))
        assert torch.equal(running[1], torch.full((n,), 1 - MOMENTUM))
    rstd = torch.ones(n)
    _C.batch_norm(x, None, None, None, None, True, 0.1, 0.0, None, None, rstd)
    assert torch.equal(rstd, torch.zeros(n))
    assert torch.equal(
        rstd, torch.ops.aten.native_batch_norm(torch.ones(4, n), None, None, None, None, True, 0.1, 0.0)[2]
    )


def test_one_row_is_as_torch_has_it(isa: str) -> None:
    """Its variance as a sample is 0 / 0. Torch's modules raise an error before they come to the operator."""
    x, running, torchs = torch.randn(1, 5), (torch.zeros(5), torch.ones(5)), (torch.zeros(5), torch.ones(5))
    found = in_training(x, None, None, running)
    theirs = torch.ops.aten.native_batch_norm(x, None, None, *torchs, True, MOMENTUM, EPS)
    assert torch.equal(found[0], torch.zeros(1, 5))  # torch rounds the mean's share of the output
    for a, b in zip((*found[1:], *running), (*theirs[1:], *torchs), strict=True):
        assert torch.allclose(a, b, equal_nan=True)
    assert running[1].isnan().all()


def test_bits_depend_on_no_threads_and_no_neighbours(isa: str) -> None:
    before = torch.get_num_threads()
    results = []
    matrices = [(torch.randn(*shape), torch.randn(*shape)) for shape in ((5000, 70), (600, 1100))]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for x, g in matrices:
                weight, bias = torch.ones(x.shape[1]) * 3, torch.ones(x.shape[1])
                running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
                output, mean, rstd = in_training(x, weight, bias, running)
                grads = [torch.empty_like(t) for t in (x, weight, bias)]
                _C.batch_norm_backward(g, x, mean, rstd, None, EPS, weight, *grads)
                evaluated = in_eval(x, weight, bias, *running)
                results.append([output, mean, rstd, *running, *grads, evaluated])
    finally:
        torch.set_num_threads(before)
    for i, other in enumerate(results[2:], 2):
        assert all(torch.equal(a, b) for a, b in zip(results[i % 2], other, strict=True))
    for first, last in ((0, 1), (3, 20), (5, 70)):
        some_columns = in_training(matrices[0][0][:, first:last].clone(), None, None, (None, None))
        assert torch.equal(some_columns[1], results[0][1][first:last])
        assert torch.equal(some_columns[2], results[0][2][first:last])


def test_neighbours_are_not_written(isa: str) -> None:
    for rows, n in product((2, 33), (1, 6, 15, 37, 65)):

        def guarded(*shape: int) -> tuple[Tensor, Tensor]:
            whole = torch.full((math.prod(shape) + 64,), 7.0)
            return whole, whole[32 : 32 + math.prod(shape)].view(shape)

        x, g = torch.randn(rows, n), torch.randn(rows, n)
        written = [guarded(*shape) for shape in ((rows, n), *[(n,)] * 4, (rows, n), (n,), (n,))]
        parts = [part for _, part in written]
        _C.batch_norm(x, None, None, parts[3], parts[4], True, MOMENTUM, EPS, *parts[:3])
        _C.batch_norm_backward(g, x, parts[1], parts[2], None, EPS, None, *parts[5:])
        for whole, _ in written:
            assert (whole[:32] == 7).all()
            assert (whole[-32:] == 7).all()


def test_what_does_not_fit_raises() -> None:
    x, of_rows, of_columns = torch.ones(4, 6), torch.ones(4), torch.ones(6)
    none = (None, None)
    with pytest.raises(ValueError, match=r"fastmlp: weight is \[4\], expected \[6\]"):
        _C.batch_norm(x, of_rows, None, *none, True, 0.1, EPS, x, *none)
    with pytest.raises(TypeError, match="fastmlp: running_mean is of Double, expected Float"):
        _C.batch_norm(x, None, None, of_columns.double(), None, True, 0.1, EPS, x, *none)
    with pytest.raises(ValueError, match="running_mean or running_variance is missing, expected both"):
        _C.batch_norm(x, None, None, of_columns, None, False, 0.1, EPS, x, *none)
    with pytest.raises(ValueError, match=r"fastmlp: input is \[0, 6\], expected a row at least"):
        _C.batch_norm(x[:0], None, None, *none, True, 0.1, EPS, x[:0], *none)
    with pytest.raises(TypeError, match="fastmlp: input is of Half, expected float32 or float64"):
        _C.batch_norm(x.half(), None, None, *none, True, 0.1, EPS, None, *none)
    with pytest.raises(ValueError, match="fastmlp: rstd and running_variance are both given, expected one of them"):
        _C.batch_norm_backward(x, x, of_columns, of_columns, of_columns, EPS, None, x, *none)
    with pytest.raises(ValueError, match="fastmlp: rstd and running_variance are both missing, expected one"):
        _C.batch_norm_backward(x, x, of_columns, *none, EPS, None, x, *none)
    with pytest.raises(ValueError, match="fastmlp: grad_input has gaps in memory"):
        _C.batch_norm_backward(x, x, of_columns, of_columns, None, EPS, None, torch.ones(6, 4).t(), *none)


def test_on_a_tape() -> None:
    tape = _C.Tape()

    def new(*shape: int) -> Tensor:
        strides = torch.empty(shape).stride()
        return tape.tensor(tape.add_tensor(tape.add_memory("tape", 96), torch.empty(0), shape, strides, 0))

    x, y, mean, rstd = new(4, 6), new(4, 6), new(6), new(6)
    tape.add_batch_norm(x, None, None, None, None, True, 0.1, EPS, y, mean, rstd, "here")
    tape.add_batch_norm_backward(y, x, mean, rstd, None, EPS, None, None, new(6), None, "here")
    assert tape.calls == tape.direct_calls == 2
    names = ["batch_norm", "batch_norm_backward"]
    assert [(name, place) for name, place, _ in tape.times()] == [(name, "here") for name in names]
