"""The CUDA kernels, run on CPU tensors by tests/emulator, against the specification.

The emulator runs one thread after another, so shapes are small: around the edges of the tiles.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmlp import Activation, reference
from fastmlp.activations import IDENTITY, resolve
from fastmlp.ops import stack_of
from tests.bounds import assert_within, network
from tests.conftest import DTYPES
from tests.emulated import emulated

ORDERS = ("fifo", "lifo", "1", "2")
#: Dtypes of the kernels that take a whole network; bfloat16 has them from sm_80 on.
FUSED = [dtype for dtype in DTYPES if dtype != torch.float64]


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    """The order in which the threads of a block run between barriers."""
    return request.param


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    set_up()


def set_up(architecture: int = 80, tile: int = -1, order: str = "fifo", fuses: bool = True) -> None:
    """What the next passes run with; tile -1 leaves the choice to the static table."""
    emulated().set_up(architecture, tile, order, fuses)


def native(has_bias: Sequence[bool], acts: Sequence[Activation]) -> Any:
    stack = stack_of(tuple(has_bias), tuple(acts))
    return emulated().Stack(list(stack.has_bias), list(stack.kinds), list(stack.scalars))


def check(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    acts: Sequence[Activation],
    grad: Tensor,
) -> list[Tensor]:
    """Forward (keeping and not) and backward against the bounds; returns all that was computed."""
    has_bias = [b is not None for b in biases]
    parameters = [t for pair in zip(weights, biases, strict=True) for t in pair if t is not None]
    expected = network(input, weights, biases, acts, grad)
    stack = native(has_bias, acts)
    output, hidden = emulated().forward(stack, input, parameters)
    assert_within(output, expected.output, "output")
    assert torch.equal(emulated().infer(stack, input, parameters), output)
    saved = [*hidden, output][: stack_of(tuple(has_bias), tuple(acts)).saved]
    gradients = emulated().backward(stack, grad, input, saved, parameters, [True] * (1 + len(parameters)))
    for i, (found, bound) in enumerate(zip(gradients, expected.gradients, strict=True)):
        assert_within(found, bound, f"gradient {i}")
    return [output, *hidden, *gradients]


def one_layer(m: int, n: int, k: int, dtype: torch.dtype, act: Activation, bias: bool = True) -> list[Tensor]:
    return check(
        torch.randn(m, k, dtype=dtype),
        [torch.randn(n, k, dtype=dtype) / max(k, 1) ** 0.5],
        [torch.randn(n, dtype=dtype) if bias else None],
        [act],
        torch.randn(m, n, dtype=dtype),
    )


def edges(size: int) -> tuple[int, ...]:
    return size - 1, size, size + 1


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("architecture", [75, 80])
def test_shapes_around_tiles(architecture: int, tile: int, dtype: torch.dtype) -> None:
    """As many rows, columns and terms as a tile has, one less and one more; aligned and not."""
    tiles = emulated().tiles(architecture, torch.empty(0, dtype=dtype))
    assert len(tiles) == 3
    bm, bn, bk = tiles[tile]
    set_up(architecture, tile)
    for m, n, k in (
        (1, 1, 1),
        (bm, bn, bk),
        (bm, bn, 3 * bk),
        (bm + 8, bn + 8, 2 * bk + 8),
        (bm - 8, 8, bk + 16),
        *((m, 5, 3) for m in edges(bm)),
        *((3, n, 5) for n in edges(bn)),
        *((7, 9, k) for k in edges(2 * bk)),
        (0, 3, 5),
        (3, 0, 5),
        (3, 5, 0),
    ):
        one_layer(m, n, k, dtype, resolve("relu"), bias=(m + n + k) % 3 > 0)


def test_every_activation(dtype: torch.dtype, activation: Activation) -> None:
    one_layer(37, 16, 24, dtype, activation)
    one_layer(37, 5, 8, dtype, activation, bias=False)


def test_networks(dtype: torch.dtype, activation: Activation) -> None:
    """Hidden pre-activations are turned into outputs again where backward needs those."""
    set_up(fuses=False)
    networks(dtype, activation)


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_fused_networks_of_every_activation(dtype: torch.dtype, activation: Activation) -> None:
    networks(dtype, activation)


def networks(dtype: torch.dtype, activation: Activation) -> None:
    for widths, last in (([8, 40, 16, 12], IDENTITY), ([3, 4, 3], activation), ([9, 1, 17, 2, 6], activation)):
        pairs = list(pairwise(widths))
        check(
            torch.randn(35, widths[0], dtype=dtype),
            [torch.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairs],
            [torch.randn(n, dtype=dtype) if i % 2 == 0 else None for i, (_, n) in enumerate(pairs)],
            [activation] * (len(pairs) - 1) + [last],
            torch.randn(35, widths[-1], dtype=dtype),
        )


def test_same_bits_in_every_order(dtype: torch.dtype) -> None:
    results = []
    for order in ORDERS:
        torch.manual_seed(0)
        set_up(order=order)
        results.append(one_layer(70, 40, 48, dtype, resolve("tanh")) + one_layer(600, 9, 7, dtype, resolve("silu")))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def strided(x: Tensor) -> Tensor:
    wide = torch.zeros(x.shape[0] * 3, x.shape[1] * 2, dtype=x.dtype)
    wide[::3, ::2] = x
    return wide[::3, ::2]


def misaligned(x: Tensor) -> Tensor:
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype)
    buffer[1:] = x.flatten()
    return buffer[1:].view_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": strided,
    "misaligned": misaligned,
    "padded_rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "equal_rows": lambda x: x[:1].expand_as(x),
    "equal_columns": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad", "saved"])
def test_layouts(order: str, dtype: torch.dtype, which: str, layout: str) -> None:
    set_up(order=order)
    arrange = LAYOUTS[layout]
    m, n, k = 35, 40, 24
    input, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    second = torch.randn(8, n, dtype=dtype) / 6
    grad, bias = torch.randn(m, 8, dtype=dtype), torch.randn(2 * n, dtype=dtype)[::2]
    if which == "input":
        input = arrange(input)
    elif which == "weight":
        weight, second = arrange(weight), arrange(second)
    elif which == "grad":
        grad = arrange(grad)
    elif layout in ("equal_rows", "equal_columns"):
        input, weight, bias = input[:1].expand_as(input), weight[:1].expand_as(weight), bias[:1].expand_as(bias)
    acts = (resolve("sigmoid"), resolve("silu"))
    parameters = [weight, bias, second]
    if which != "saved":
        check(input, [weight, second], [bias, None], acts, grad)
        return
    expected = network(input, [weight, second], [bias, None], acts, grad)
    stack = native((True, False), acts)
    _, hidden = emulated().forward(stack, input, parameters)
    saved = [arrange(hidden[0]), hidden[1] if layout.startswith("equal") else arrange(hidden[1])]
    gradients = emulated().backward(stack, grad, input, saved, parameters, [True] * 4)
    for i, (found, bound) in enumerate(zip(gradients, expected.gradients, strict=True)):
        assert_within(found, bound, f"gradient {i}")


def fused_network(
    widths: Sequence[int], rows: int, dtype: torch.dtype, act: Activation, last: Activation = IDENTITY
) -> list[Tensor]:
    pairs = list(pairwise(widths))
    return check(
        torch.randn(rows, widths[0], dtype=dtype),
        [torch.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairs],
        [torch.randn(n, dtype=dtype) if i % 2 == 0 else None for i, (_, n) in enumerate(pairs)],
        [act] * (len(pairs) - 1) + [last],
        torch.randn(rows, widths[-1], dtype=dtype),
    )


@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 150])
def test_fused_networks(order: str, rows: int, dtype: torch.dtype) -> None:
    """Narrow networks in one kernel: rows and widths around its tiles."""
    set_up(80 if dtype == torch.bfloat16 else 75, order=order)
    act = resolve("gelu" if rows % 3 else "relu")
    for widths in ([1, 1, 1], [128, 128, 128], [7, 9, 8, 127, 3]) if rows in (33, 64) else ([8, 17, 16],):
        fused_network(widths, rows, dtype, act, IDENTITY if rows % 2 else act)


@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize("act", ["relu", "sigmoid", "silu"])
def test_fused_widths(act: str, dtype: torch.dtype) -> None:
    """Around fragments of 8 and 16 features, and where shared memory is laid out for wider ones."""
    for widths in ([15, 17, 16, 33, 1], [64, 63, 65, 8], [8, 24, 31, 2], [64, 48, 64, 64]):
        fused_network(widths, 37, dtype, resolve(act))


@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize("act", ["relu", "tanh", "silu"])
@pytest.mark.parametrize("architecture", [75, 80])
def test_weights_of_fused_networks_take_turns(architecture: int, act: str, dtype: torch.dtype) -> None:
    """Those of more layers than shared memory holds: one at a time, or the next one's ahead."""
    set_up(architecture)
    for widths in ([16, *[64] * 12, 3], [128, 128, 72, 128], [5, *[9] * 16]):
        fused_network(widths, 135, dtype, resolve(act))


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_blocks_of_fused_networks_take_several_runs_of_rows(dtype: torch.dtype) -> None:
    """More than a T4, or an A100, has at once."""
    architecture = 80 if dtype == torch.bfloat16 else 75
    set_up(architecture)
    rows = 32 * 80 + 50 if dtype == torch.float32 else 128 * (120 if architecture == 75 else 324) + 50
    fused_network([3, 5, 2], rows, dtype, resolve("tanh"), resolve("sigmoid"))
    if dtype != torch.float32:
        fused_network([2, 65, 1], 128 * 40 + 70 if architecture == 75 else 128 * 108 + 70, dtype, resolve("relu"))


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_fused_networks_have_the_same_bits_in_every_order(dtype: torch.dtype) -> None:
    results = []
    for order in ORDERS:
        torch.manual_seed(0)
        set_up(order=order)
        results.append(
            fused_network([9, 64, 33, 5], 150, dtype, resolve("silu"))
            + fused_network([64, 100, 128], 70, dtype, resolve("relu"), resolve("relu"))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_fused_networks_of_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape).to(dtype)

    stack = native((True, True), (resolve("relu"), IDENTITY))
    for rows, widths in ((300, (24, 40, 9)), (131, (100, 128, 30))):
        input, grad = whole(rows, widths[0]), whole(rows, widths[2])
        parameters = [whole(widths[1], widths[0]), whole(widths[1]), whole(widths[2], widths[1]), whole(widths[2])]
        first, first_bias, second, second_bias = (t.double() for t in parameters)
        hidden = (input.double() @ first.T + first_bias).relu()
        output, saved = emulated().forward(stack, input, parameters)
        assert torch.equal(saved[0].double(), hidden)
        assert torch.equal(output, (hidden @ second.T + second_bias).to(dtype))
        inner = (grad.double() @ second) * (hidden > 0)
        expected = (
            inner @ first,
            inner.T @ input.double(),
            inner.sum(0),
            grad.double().T @ hidden,
            grad.double().sum(0),
        )
        gradients = emulated().backward(stack, grad, input, saved, parameters, [True] * 5)
        for found, wanted in zip(gradients, expected, strict=True):
            assert torch.equal(found, wanted.to(dtype))


@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize(("act", "infinite"), [("relu", 0), ("leaky_relu", 0), ("leaky_relu", 1)])
def test_infinite_weights_stay_in_their_rows(act: str, infinite: int, dtype: torch.dtype) -> None:
    """A fused network's rows and lines past the end must not turn infinity times zero into NaN."""
    parameters = [torch.rand(shape, dtype=dtype) for shape in ((3, 5), (9, 3), (4, 9))]
    parameters[infinite].fill_(float("inf"))
    stack = native((False,) * 3, (resolve(act), resolve(act), IDENTITY))
    results = []
    for fuses in (True, False):
        set_up(fuses=fuses)
        input, grad = torch.full((35, 5), -1.0, dtype=dtype), torch.ones(35, 4, dtype=dtype)
        output, hidden = emulated().forward(stack, input, parameters)
        results.append([output, *emulated().backward(stack, grad, input, hidden, parameters, [True] * 4)])
    for ours, layers in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), layers.isnan())
    assert not results[0][0].isnan().any()
    assert not results[0][2].isnan().any()


def test_long_batches_are_cut(order: str, dtype: torch.dtype) -> None:
    """Sums over the batch in several parts, added in order."""
    set_up(order=order)
    for m, n, k in ((1000, 8, 16), (777, 5, 3)):
        one_layer(m, n, k, dtype, resolve("tanh"))


def test_whole_numbers_are_summed_exactly(dtype: torch.dtype) -> None:
    """However the sums are cut, nothing is rounded but the result: a sum that stops in 16 bits shows."""

    def whole(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape).to(dtype)

    stack = native((True,), (IDENTITY,))
    for m, n, k in ((9, 16, 400), (700, 8, 24), (3, 5, 333)):
        input, weight, bias, grad = whole(m, k), whole(n, k), whole(n), whole(m, n)
        exact = [t.double() for t in (input, weight, bias, grad)]
        output, _ = emulated().forward(stack, input, [weight, bias])
        assert torch.equal(output, (exact[0] @ exact[1].T + exact[2]).to(dtype))
        gradients = emulated().backward(stack, grad, input, [], [weight, bias], [True] * 3)
        expected = (exact[3] @ exact[1], exact[3].T @ exact[0], exact[3].sum(0))
        for found, wanted in zip(gradients, expected, strict=True):
            assert torch.equal(found, wanted.to(dtype))


@pytest.mark.parametrize("fuses", [False, True], ids=["by_layers", "fused"])
def test_only_needed_gradients(dtype: torch.dtype, fuses: bool) -> None:
    set_up(fuses=fuses)
    act = resolve("silu")
    stack = native((True, True), (act, act))
    parameters = [torch.randn(s, dtype=dtype) for s in ((6, 5), (6,), (4, 6), (4,))]
    input, grad = torch.randn(9, 5, dtype=dtype), torch.randn(9, 4, dtype=dtype)
    _, saved = emulated().forward(stack, input, parameters)
    everything = emulated().backward(stack, grad, input, saved, parameters, [True] * 5)
    for mask in range(32):
        needs = [bool(mask >> i & 1) for i in range(5)]
        some = emulated().backward(stack, grad, input, saved, parameters, needs)
        for need, ours, whole in zip(needs, some, everything, strict=True):
            assert (ours is not None) == need
            assert ours is None or torch.equal(ours, whole)


def test_special_values_are_torch_s(dtype: torch.dtype, activation: Activation, without_onednn: None) -> None:
    """NaN, infinities, zeros and kinks, with gradients of one, zero and infinity."""
    inf, nan, big = float("inf"), float("nan"), torch.finfo(dtype).max
    points = [nan, inf, -inf, 0.0, 3.0, -3.0, 1.0, -1.0, big, -big]
    one, stack = torch.ones(1, 1, dtype=dtype), native((False,), (activation,))
    for seed in (1.0, 0.0, inf):
        # Many copies, so that torch's vectorised loop computes the first; its scalar tail may differ.
        z = torch.tensor(points, dtype=dtype).repeat(16)
        leaf = z.clone().requires_grad_()
        y = reference.activate(leaf, activation.name, activation.parameters)
        grad = torch.full_like(z, seed)
        (expected,) = torch.autograd.grad(y, leaf, grad)
        output, hidden = emulated().forward(stack, z[:, None], [one])
        saved = (hidden or [output])[: stack_of((False,), (activation,)).saved]
        (gradient, _) = emulated().backward(stack, grad[:, None], z[:, None], saved, [one], [True, False])
        for ours, torchs, what in ((output[:, 0], y.detach(), "value"), (gradient[:, 0], expected, "gradient")):
            same = (ours.isnan() == torchs.isnan()) & (ours.isinf() == torchs.isinf())
            same &= ~torchs.isinf() | (ours == torchs)
            wrong = (~same[: len(points)]).nonzero().flatten()
            assert not len(wrong), [(points[i], ours[i].item(), torchs[i].item(), what, seed) for i in wrong]
