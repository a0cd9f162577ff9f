"""The CUDA kernels, run on CPU tensors by tests/emulator, against the specification.

The emulator runs one thread after another, so shapes are small: around the edges of the tiles.
"""

from collections.abc import Iterator

import pytest
import torch

from fastmlp import Activation
from fastmlp.activations import IDENTITY, resolve
from tests.emulated import emulated
from tests.kernel_checks import LAYOUTS, KernelChecks, shapes_around

checks = KernelChecks(emulated, "cpu")
check, one_layer, chain, native = checks.check, checks.one_layer, checks.chain, checks.native

ORDERS = ("fifo", "lifo", "1", "2")


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


def test_fused_networks_of_every_activation(activation: Activation) -> None:
    checks.networks(torch.float32, activation)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad", "saved"])
def test_layouts(order: str, dtype: torch.dtype, which: str, layout: str) -> None:
    set_up(order=order)
    checks.layouts(dtype, which, layout)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 150])
def test_fused_networks(order: str, rows: int) -> None:
    """Narrow networks of float32 in one kernel: rows and widths around its tiles, more runs of rows than blocks."""
    set_up(75, order=order)
    act = resolve("gelu")
    for widths in ([1, 1, 1], [128, 128, 128], [7, 9, 8, 127, 3]) if rows in (33, 64) else ([8, 17, 16],):
        chain(rows, widths, act, IDENTITY if rows % 2 else act)


def test_blocks_of_fused_networks_take_several_runs_of_rows() -> None:
    set_up(75)
    rows = 32 * 80 + 50  # 80 blocks on a T4
    weights, biases = [torch.randn(5, 3), torch.randn(2, 5)], [torch.randn(5), torch.randn(2)]
    check(torch.randn(rows, 3), weights, biases, [resolve("tanh"), resolve("sigmoid")], torch.randn(rows, 2))


def test_infinite_weights_stay_in_their_rows() -> None:
    """A fused network's rows and lines past the end must not turn infinity times zero into NaN."""
    parameters = [torch.full((3, 5), float("inf")), torch.randn(9, 3)]
    stack = native((False, False), (resolve("relu"), IDENTITY))
    results = []
    for fuses in (True, False):
        set_up(fuses=fuses)
        input, grad = torch.full((35, 5), -1.0), torch.ones(35, 9)
        output, hidden = emulated().forward(stack, input, parameters)
        results.append([output, *emulated().backward(stack, grad, input, hidden, parameters, [True] * 3)])
    for ours, layers in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), layers.isnan())
    assert bool((results[0][0] == 0).all())
    assert bool((results[0][2] == 0).all())


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
