"""The CUDA kernels, run on CPU tensors by tests/emulator, against the specification.

The emulator runs one thread after another, so shapes are small: around the edges of the tiles.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastmlp import Activation
from fastmlp.activations import IDENTITY, resolve
from tests.support.axes import DTYPES
from tests.support.bounds import assert_within, network
from tests.support.emulated import ORDERS, checks, emulated, set_up
from tests.support.kernel_checks import KernelChecks, edges, shapes_around
from tests.support.layouts import CUDA_LAYOUTS

check, one_layer, chain, native = checks.check, checks.one_layer, checks.chain, checks.native

#: Sums are rounded before an activation.
by_library = KernelChecks(emulated, "cpu", rounds_sums=True)
#: As csrc/cuda/tiles.h numbers what is no tile.
LIBRARY = 3

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


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("architecture", [75, 80])
def test_shapes_around_tiles(architecture: int, tile: int, dtype: torch.dtype) -> None:
    """As many rows, columns and terms as a tile has, one less and one more; aligned and not."""
    tiles = emulated().tiles(architecture, torch.empty(0, dtype=dtype))
    assert len(tiles) == 3
    bm, bn, bk = tiles[tile]
    set_up(architecture, tile)
    for m, n, k in shapes_around(bm, bn, bk):
        one_layer(m, n, k, dtype, resolve("relu"), bias=(m + n + k) % 3 > 0)


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("architecture", [75, 80])
def test_last_layers_without_activation(architecture: int, tile: int, dtype: torch.dtype) -> None:
    """The product of the weight's gradient sums that of the bias: around its tile, of which the batch is the depth."""
    bm, bn, bk = emulated().tiles(architecture, torch.empty(0, dtype=dtype))[tile]
    set_up(architecture, tile)
    for batch, outs, ins in (
        (1, 1, 1),
        (bk, bm, bn),
        (3 * bk + 1, bm + 8, bn + 8),
        (bk - 1, bm - 8, 8),
        *((2 * bk + 5, outs, 3) for outs in edges(bm)),
        *((batch, 7, bn + 1) for batch in edges(2 * bk)),
        (0, 3, 5),
        (3, 0, 5),
        (3, 5, 0),
    ):
        one_layer(batch, outs, ins, dtype, IDENTITY)


def test_every_activation(dtype: torch.dtype, activation: Activation) -> None:
    one_layer(37, 16, 24, dtype, activation)
    one_layer(37, 5, 8, dtype, activation, bias=False)


def test_networks(dtype: torch.dtype, activation: Activation) -> None:
    """Hidden pre-activations are turned into outputs again where backward needs those."""
    set_up(fuses=False)
    checks.networks(dtype, activation)


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_fused_networks_of_every_activation(dtype: torch.dtype, activation: Activation) -> None:
    checks.networks(dtype, activation)


@pytest.mark.parametrize("epilogue", ["bias", "no_bias"])
def test_products_of_the_library(dtype: torch.dtype, activation: Activation, epilogue: str) -> None:
    """PyTorch multiplies, and passes of ours do what epilogues do: networks, single layers, gradients of biases."""
    set_up(tile=LIBRARY, fuses=False)
    by_library.networks(dtype, activation)
    for act in (activation, IDENTITY):
        by_library.one_layer(70, 9, 24, dtype, act, bias=epilogue == "bias")


def test_same_bits_in_every_order(dtype: torch.dtype) -> None:
    results = []
    for order in ORDERS:
        torch.manual_seed(0)
        set_up(order=order)
        results.append(
            one_layer(70, 40, 48, dtype, resolve("tanh"))
            + one_layer(600, 9, 7, dtype, resolve("silu"))
            + one_layer(600, 8, 72, dtype, IDENTITY)
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", CUDA_LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad", "saved"])
def test_layouts(order: str, dtype: torch.dtype, which: str, layout: str) -> None:
    set_up(order=order)
    checks.layouts(dtype, which, layout)


def fused_network(
    widths: Sequence[int], rows: int, dtype: torch.dtype, act: Activation, last: Activation = IDENTITY
) -> list[Tensor]:
    return chain(rows, widths, act, last, dtype)


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
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("architecture", [75, 80])
def test_rows_of_fused_networks_end_in_a_chunk(architecture: int, act: str, dtype: torch.dtype) -> None:
    set_up(architecture)
    checks.narrow_parts_of_chunks(dtype, resolve(act))


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


@pytest.mark.parametrize("width", [32, 64, 128])
def test_many_rows_of_fused_networks_take_large_tiles(width: int) -> None:
    """Forward of float32 has eight rows a thread from so many rows on as give a T4's multiprocessors one tile each."""
    set_up(75)
    fused_network([1, 1, width], 40 * 8192 // width, torch.float32, resolve("relu"))


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


@pytest.mark.parametrize("activation", [resolve("tanh"), IDENTITY], ids=lambda act: act.name)
def test_long_batches_are_cut(order: str, dtype: torch.dtype, activation: Activation) -> None:
    """Sums over the batch in several parts, added in order."""
    set_up(order=order)
    for m, n, k in ((1000, 8, 16), (777, 5, 3)):
        one_layer(m, n, k, dtype, activation)


def test_whole_numbers_are_summed_exactly(dtype: torch.dtype) -> None:
    checks.whole_numbers(dtype, ((9, 16, 400), (700, 8, 24), (3, 5, 333)))


@pytest.mark.parametrize("fuses", [False, True], ids=["by_layers", "fused"])
def test_only_needed_gradients(dtype: torch.dtype, fuses: bool) -> None:
    set_up(fuses=fuses)
    checks.needed_gradients(dtype)


@pytest.mark.parametrize("batch", [9, 700])
def test_bias_gradient_with_and_without_the_weight_s(dtype: torch.dtype, batch: int) -> None:
    """Without an activation it comes from the weight's product, or from a pass of its own if there is none."""
    set_up(fuses=False)
    hidden_act, outs = resolve("relu"), 24
    for widths in ([16, outs], [5, outs], [9, 6, outs]):
        pairs = list(pairwise(widths))
        acts = [hidden_act] * (len(pairs) - 1) + [IDENTITY]
        input, grad = torch.randn(batch, widths[0], dtype=dtype), torch.randn(batch, outs, dtype=dtype)
        weights = [torch.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairs]
        biases = [torch.randn(n, dtype=dtype) for _, n in pairs]
        parameters = [t for pair in zip(weights, biases, strict=True) for t in pair]
        expected = network(input, weights, biases, acts, grad).gradients
        stack = native([True] * len(pairs), acts)
        _, saved = emulated().forward(stack, input, parameters)
        everything = emulated().backward(stack, grad, input, saved, parameters, [True] * (1 + len(parameters)))
        for mask in range(2 ** len(everything)):
            needs = [bool(mask >> i & 1) for i in range(len(everything))]
            some = emulated().backward(stack, grad, input, saved, parameters, needs)
            for i, (need, ours, whole) in enumerate(zip(needs, some, everything, strict=True)):
                assert (ours is not None) == need
                if need:
                    assert_within(ours, expected[i], f"gradient {i} for {needs}")
                    # Summed in another order without the last weight.
                    assert i == len(needs) - 1 or torch.equal(ours, whole)
            assert not (needs[-1] and needs[-2]) or torch.equal(some[-1], everything[-1])


def test_special_values_are_torch_s(dtype: torch.dtype, activation: Activation, without_onednn: None) -> None:
    checks.special_values(dtype, activation)


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_special_values_of_fused_networks(dtype: torch.dtype, activation: Activation, without_onednn: None) -> None:
    checks.special_values(dtype, activation, layers=2)
