"""Every instruction set, dtype, activation and layout against the specification."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmlp import _C, Activation, reference
from fastmlp.activations import IDENTITY, resolve
from fastmlp.ops import Stack, stack_of
from tests.support.axes import tiles
from tests.support.bounds import assert_within, network
from tests.support.kernel_checks import KernelChecks
from tests.support.layouts import LAYOUTS, strided
from tests.support.memory import Buffers

checks = KernelChecks(lambda: _C, "cpu")
check, one_layer = checks.check, checks.one_layer


def edges(size: int) -> list[int]:
    return sorted({0, 1, size - 1, size, size + 1})


def test_shapes_around_register_tile(isa: str, dtype: torch.dtype) -> None:
    size = tiles(isa, dtype)
    for m in [*edges(size["MR"]), 2 * size["MR"] + 3]:
        for n in [*edges(size["NR"]), 2 * size["NR"] + 5]:
            for k in (0, 1, 2, 17):
                one_layer(m, n, k, dtype, resolve("relu"), bias=(m + n + k) % 2 == 0)
    assert _C.last_isa() == isa


def test_few_rows(isa: str, dtype: torch.dtype) -> None:
    """Batches for which the weight is not packed, and the first for which it is."""
    size = tiles(isa, dtype)
    lanes = size["lanes"]
    for m in (*range(1, 15), 27, 28, 29, 2 * size["MR"] + 1):
        for k in (lanes - 1, lanes, lanes + 1, 2 * lanes + 3, 67):
            for n in (1, 3, 4, lanes, lanes + 1, size["NR"] + 7):
                one_layer(m, n, k, dtype, resolve("relu"), bias=n % 2 == 0)
    one_layer(3, 5, 2 * size["KC"] + 3, dtype, resolve("mish"))
    one_layer(15, 3, 9001, dtype, resolve("tanh"))
    one_layer(2, size["NC"] + 9, 33, dtype, resolve("sigmoid"))


def test_streamed_operands(isa: str, dtype: torch.dtype) -> None:
    """Few rows of C, or a short sum, where the other operand is read in place, and the first that is packed."""
    size = tiles(isa, dtype)
    wide = size["stream_columns"]
    for m in (1, 2, 3, 4, 5, 7, 28, 29):
        for k in (2 * size["NR"] - 1, 2 * size["NR"], wide + 1, 2 * wide + 5):
            for n in (1, 5, size["MR"] + 1):
                one_layer(m, n, k, dtype, resolve("relu"))
    for n in (size["chain"], size["chain"] + 1, 2 * size["chain"] + 1):
        one_layer(2, n, wide - 1, dtype, resolve("tanh"))
    one_layer(3, 7, size["NC"] + wide + 1, dtype, resolve("tanh"))


def test_paths_meet(isa: str, dtype: torch.dtype) -> None:
    """Every batch around the ones at which inner products and streaming give way to packed panels."""
    for m in range(8, 74):
        one_layer(m, 5, 64, dtype, resolve("relu"))
        one_layer(m, 2 * tiles(isa, dtype)["NR"] + 1, 300, dtype, resolve("tanh"))
    for k in range(1, 11):
        for n in (1, 5, 17, tiles(isa, dtype)["NC"] + 1):
            one_layer(70, n, k, dtype, resolve("silu"))


def test_few_rows_and_columns_of_strided_operands(isa: str, dtype: torch.dtype) -> None:
    for arrange in (strided, LAYOUTS["transposed"], LAYOUTS["equal_columns"]):
        for m, n in ((1, 40), (3, 50), (40, 1), (50, 3)):
            for k in (tiles(isa, dtype)["lanes"] + 1, 300):
                input, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype) / k**0.5
                grad = torch.randn(m, n, dtype=dtype)
                check(arrange(input), [weight], [None], [resolve("tanh")], grad)
                check(input, [arrange(weight)], [None], [resolve("tanh")], grad)
                check(arrange(input), [arrange(weight)], [None], [resolve("tanh")], grad)


def test_whole_numbers_are_summed_exactly(isa: str, dtype: torch.dtype) -> None:
    size = tiles(isa, dtype)
    shapes = (
        (3, 40, 2 * size["KC"] + 3),
        (size["MR"] + 1, 2, 2 * size["KC"] + 3),
        (40, size["NR"] + 1, 3 * size["KC"] + 1),
        (1100, 3, size["KC"] + 1),
        (3, 3 * size["KC"] + 1, 40),
        (5000, 7, 13),
    )
    checks.whole_numbers(dtype, shapes)


@pytest.mark.parametrize("shape", [(64, 256, 64), (64, 1024, 64), (64, 64, 2048), (3, 1024, 512), (100, 3, 2000)])
def test_errors_are_at_most_twice_those_of_torch(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """The largest error among the elements of each product."""
    m, n, k = shape
    stack = stack_of((False,), (resolve("identity"),))
    tensors = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
    longer = np.longdouble if dtype == torch.float64 else np.float64

    def products(input: Any, weight: Any, grad: Any) -> list[Any]:
        return [input @ weight.T, grad @ weight, grad.T @ input]

    def errors(found: Sequence[Tensor | None]) -> list[Any]:
        pairs = zip(found, products(*(t.double().numpy().astype(longer) for t in tensors)), strict=True)
        return [abs(f.double().numpy() - exact).max() for f, exact in pairs if f is not None]

    input, weight, grad = tensors
    ours = [_C.infer(stack.native, input, [weight]), *_C.backward(stack.native, grad, input, [], [weight], [True] * 2)]
    for found, torchs in zip(errors(ours), errors(products(*tensors)), strict=True):
        assert found <= 2 * torchs


@pytest.mark.parametrize("name", ["gelu", "tanh", "identity"])
def test_shapes_around_cache_blocks(isa: str, dtype: torch.dtype, name: str) -> None:
    size = tiles(isa, dtype)
    act = resolve(name)
    for k in (size["KC"] - 1, size["KC"], size["KC"] + 1, 2 * size["KC"] + 1, 3 * size["KC"] - 1):
        one_layer(3, 5, k, dtype, act)
        one_layer(5, k, 3, dtype, act)
    for m in (size["MC"] - 1, size["MC"] + 1, 2 * size["MC"] + 3):
        one_layer(m, 7, 11, dtype, act)
    for n in (size["NC"] - 1, size["NC"] + 1):
        one_layer(3, n, 4, dtype, act)


def test_long_batch_is_split_for_weight_gradients(isa: str, dtype: torch.dtype) -> None:
    for m in (1023, 2048, 2049, 5003):
        one_layer(m, 6, 9, dtype, resolve("tanh"))


def test_every_activation(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    size = tiles(isa, dtype)
    for m, n, k in ((size["MR"] + 1, size["NR"] + 3, 19), (37, 5, 8), (2, 41, 64)):
        one_layer(m, n, k, dtype, activation)
        one_layer(m, n, k, dtype, activation, bias=False)


def test_networks(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    """Hidden pre-activations are turned into outputs again where backward needs those."""
    for widths, last in (([7, 33, 5, 12], IDENTITY), ([3, 4, 3], activation), ([9, 1, 17, 2, 6], activation)):
        pairs = list(pairwise(widths))
        acts = [activation] * (len(pairs) - 1) + [last]
        check(
            torch.randn(29, widths[0], dtype=dtype),
            [torch.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairs],
            [torch.randn(n, dtype=dtype) if i % 2 == 0 else None for i, (_, n) in enumerate(pairs)],
            acts,
            torch.randn(29, widths[-1], dtype=dtype),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad", "saved"])
@pytest.mark.parametrize("name", ["identity", "sigmoid", "silu"])
def test_layouts(isa: str, dtype: torch.dtype, which: str, layout: str, name: str) -> None:
    size = tiles(isa, dtype)
    m, n, k = size["MR"] + 2, size["NR"] + 2, 21
    arrange = LAYOUTS[layout]
    act = resolve(name)
    input, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    grad, bias = torch.randn(m, n, dtype=dtype), torch.randn(2 * n, dtype=dtype)[::2]
    if which == "input":
        input = arrange(input)
    elif which == "weight":
        weight = arrange(weight)
    elif which == "grad":
        grad = arrange(grad)
    if which != "saved":
        check(input, [weight], [bias], [act], grad)
        return
    if layout in ("equal_rows", "equal_columns", "one_value"):
        weight, input, bias = weight[:1].expand_as(weight), input[:1].expand_as(input), bias[:1].expand_as(bias)
    expected = network(input, [weight], [bias], [act], grad)
    stack = stack_of((True,), (act,))
    output, hidden = _C.forward(stack.native, input, [weight, bias])
    saved = [arrange(t) for t in (hidden or [output])[: stack.saved]]
    gradients = _C.backward(stack.native, grad, input, saved, [weight, bias], [True] * 3)
    for i, (found, bound) in enumerate(zip(gradients, expected.gradients, strict=True)):
        assert found is not None
        assert_within(found, bound, f"gradient {i}")


@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, 2, 5), (2, 3, 2, 5), (2, 1, 3, 2, 5), (0, 5), (2, 0, 5)])
def test_leading_dimensions(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    act = resolve("gelu")
    stack = stack_of((True,), (act,))
    input, weight, bias = torch.randn(shape, dtype=dtype), torch.randn(4, 5, dtype=dtype), torch.randn(4, dtype=dtype)
    grad = torch.randn(*shape[:-1], 4, dtype=dtype)
    for x in (input, input.transpose(0, -2).contiguous().transpose(0, -2) if input.dim() > 2 else input):
        expected = network(x.reshape(-1, 5), [weight], [bias], [act], grad.reshape(-1, 4))
        output, hidden = _C.forward(stack.native, x, [weight, bias])
        assert output.shape == grad.shape
        assert_within(output.reshape(-1, 4), expected.output, "output")
        gradients = _C.backward(stack.native, grad, x, hidden, [weight, bias], [True] * 3)
        assert gradients[0] is not None
        assert gradients[0].shape == x.shape
        for found, bound in zip(gradients, expected.gradients, strict=True):
            assert found is not None
            assert_within(found.reshape(bound.value.shape), bound, "gradient")


def test_nothing_is_written_outside_outputs(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    size = tiles(isa, dtype)
    for m, n, k in ((1, 1, 1), (size["MR"] + 1, size["NR"] + 1, 3), (5, size["NR"] - 1, size["KC"] + 1)):
        widths = [k, n, 3]
        acts = (activation, activation)
        stack = stack_of((True, True), acts)
        parameters = [t for i in range(2) for t in (torch.randn(widths[i + 1], widths[i]), torch.randn(widths[i + 1]))]
        parameters = [p.to(dtype) for p in parameters]
        input, grad = torch.randn(m, k, dtype=dtype), torch.randn(m, 3, dtype=dtype)
        output, hidden = _C.forward(stack.native, input, parameters)
        buffers = Buffers()
        output_in, hidden_in = buffers.like(output), [buffers.like(h) for h in hidden]
        _C.forward_into(stack.native, input, parameters, output_in, hidden_in)
        assert torch.equal(output_in, output)
        assert all(torch.equal(a, b) for a, b in zip(hidden_in, hidden, strict=True))
        saved = hidden if len(hidden) == stack.saved else [*hidden, output]
        gradients = _C.backward(stack.native, grad, input, saved, parameters, [True] * 5)
        into = [buffers.like(g) for g in gradients if g is not None]
        _C.backward_into(stack.native, grad, input, saved, parameters, into)
        assert all(g is not None and torch.equal(a, g) for a, g in zip(into, gradients, strict=True))
        assert buffers.intact()


def through(stack: Stack, z: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """act(z) and grad act'(z) by the kernels: a layer with weight 1."""
    one = torch.ones(1, 1, dtype=z.dtype)
    output, hidden = _C.forward(stack.native, z[:, None], [one])
    saved = (hidden or [output])[: stack.saved]
    gradients = _C.backward(stack.native, grad[:, None], z[:, None], saved, [one], [True, False])
    assert gradients[0] is not None
    return output[:, 0], gradients[0][:, 0]


def test_special_values_are_torch_s(isa: str, dtype: torch.dtype, activation: Activation, without_onednn: None) -> None:
    """NaN, infinities, zeros of both signs and kinks, with gradients of one, zero and infinity."""
    inf, nan, big = float("inf"), float("nan"), torch.finfo(dtype).max
    points = [nan, inf, -inf, 0.0, -0.0, 3.0, -3.0, 1.0, -1.0, big, -big]
    for seed in (1.0, 0.0, inf):
        # Many copies, so that torch's vectorised loop computes the first; its scalar tail may differ.
        z = torch.tensor(points, dtype=dtype).repeat(16).requires_grad_()
        y = reference.activate(z, activation.name, activation.parameters)
        (expected,) = torch.autograd.grad(y, z, torch.full_like(z, seed))
        found, gradient = through(stack_of((False,), (activation,)), z.detach(), torch.full_like(z, seed))
        for ours, torchs, what in ((found, y.detach(), "value"), (gradient, expected, "gradient")):
            same = (ours.isnan() == torchs.isnan()) & (ours.isinf() == torchs.isinf())
            same &= ~torchs.isinf() | (ours == torchs)
            if what == "value":
                # A sum of products is never -0.0, so that an activation sees +0.0 only.
                zero = (torchs == 0) & (z == 0) & ~z.signbit()
                same &= ~zero | (ours.signbit() == torchs.signbit())
            wrong = (~same[: len(points)]).nonzero().flatten()
            assert not len(wrong), [(points[i], ours[i].item(), torchs[i].item(), what, seed) for i in wrong]


def test_signed_zero(isa: str, dtype: torch.dtype) -> None:
    """relu(-0.0) is -0.0 in torch's vectorised loop; a sum of +0 and -0 is +0 in both."""
    z = torch.full((64,), -0.0, dtype=dtype)
    stack = stack_of((True,), (resolve("relu"),))
    ones = torch.ones(64, 1, dtype=dtype)
    ours = _C.infer(stack.native, torch.zeros(1, 1, dtype=dtype), [ones, z])[0]
    torchs = torch.relu(torch.nn.functional.linear(torch.zeros(1, 1, dtype=dtype), ones, z))[0]
    assert torch.equal(ours.signbit(), torchs.signbit())


def test_only_needed_gradients(isa: str) -> None:
    act = resolve("tanh")
    stack = stack_of((True, True), (act, act))
    parameters = [torch.randn(6, 5), torch.randn(6), torch.randn(4, 6), torch.randn(4)]
    input, grad = torch.randn(9, 5), torch.randn(9, 4)
    output, hidden = _C.forward(stack.native, input, parameters)
    saved = [*hidden, output]
    everything = _C.backward(stack.native, grad, input, saved, parameters, [True] * 5)
    for mask in range(32):
        needs = [bool(mask >> i & 1) for i in range(5)]
        some = _C.backward(stack.native, grad, input, saved, parameters, needs)
        for need, ours, whole in zip(needs, some, everything, strict=True):
            assert (ours is not None) == need
            if ours is not None and whole is not None:
                assert torch.equal(ours, whole)


def test_row_sums_have_one_owner() -> None:
    """More threads than columns of tiles: two of them once added to the same bias gradient."""
    act = resolve("identity")
    stack = stack_of((True,), (act,))
    before = torch.get_num_threads()
    try:
        for threads in (5, 8, 13, 32):
            torch.set_num_threads(threads)
            for m, n, k in ((2000, 96, 128), (1500, 150, 100), (2047, 85, 121), (6000, 8, 32)):
                grad, input, weight = torch.ones(m, n), torch.randn(m, k), torch.randn(n, k)
                for _ in range(20):
                    sums = _C.backward(stack.native, grad, input, [], [weight, weight[:, 0]], [False, True, True])[2]
                    assert sums is not None
                    assert bool((sums == m).all())
    finally:
        torch.set_num_threads(before)


def test_same_bits_for_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    act = resolve("gelu")
    stack = stack_of((True, True), (act, act))
    before = torch.get_num_threads()
    try:
        # The last ones have few tiles for the threads, and blocks of k whose sums come one after another;
        # then rows that do not fill the last block of a forward that keeps nothing.
        shapes = ((300, (257, 190, 75)), (20000, (3, 40, 2)), (5000, (64, 64, 64)), (2000, (128, 96, 96)))
        for m, widths in (*shapes, (1500, (100, 150, 121)), (2055, (600, 601, 3))):
            parameters = [t for k, n in pairwise(widths) for t in (torch.randn(n, k), torch.randn(n))]
            parameters = [p.to(dtype) for p in parameters]
            input, grad = torch.randn(m, widths[0], dtype=dtype), torch.randn(m, widths[-1], dtype=dtype)
            results = []
            for threads in (1, 2, 3, 5, 7, 8, 13):
                torch.set_num_threads(threads)
                output, hidden = _C.forward(stack.native, input, parameters)
                gradients = _C.backward(stack.native, grad, input, hidden, parameters, [True] * 5)
                results.append([output, _C.infer(stack.native, input, parameters), *hidden, *gradients])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
