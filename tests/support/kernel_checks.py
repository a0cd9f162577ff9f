"""What the CUDA kernels must compute, whoever runs them: the emulator (test_cuda_kernels.py) or a GPU
(test_gpu_kernels.py).

Arguments and the values that results are compared with live on the device of the kernels, so that a GPU checks itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmlp import Activation, reference
from fastmlp.activations import IDENTITY, resolve
from fastmlp.ops import stack_of
from tests.support.bounds import assert_within, network
from tests.support.layouts import CUDA_LAYOUTS, parts_of_chunks


def edges(size: int) -> tuple[int, ...]:
    return size - 1, size, size + 1


def shapes_around(bm: int, bn: int, bk: int) -> tuple[tuple[int, int, int], ...]:
    """M, N and K: as many rows, columns and terms as a tile has, one less and one more; aligned and not; none."""
    return (
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
    )


@dataclass(frozen=True)
class KernelChecks:
    """Checks of an extension's `forward`, `infer` and `backward`.

    Attributes:
        extension: gives the extension, which takes a while to build.
        device: where its tensors live.
        rounds_sums: whether a library may multiply, which stores sums before an activation is computed from them.
    """

    extension: Callable[[], Any]
    device: str
    rounds_sums: bool = False

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def native(self, has_bias: Sequence[bool], acts: Sequence[Activation]) -> Any:
        return self.extension().Stack(*stack_of(tuple(has_bias), tuple(acts)).lists)

    def check(
        self,
        input: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        acts: Sequence[Activation],
        grad: Tensor,
    ) -> list[Tensor]:
        """Forward (keeping and not) and backward against the bounds; returns all that was computed."""
        extension = self.extension()
        has_bias = [b is not None for b in biases]
        parameters = [t for pair in zip(weights, biases, strict=True) for t in pair if t is not None]
        expected = network(input, weights, biases, acts, grad, self.rounds_sums)
        stack = self.native(has_bias, acts)
        output, hidden = extension.forward(stack, input, parameters)
        assert_within(output, expected.output, "output")
        assert torch.equal(extension.infer(stack, input, parameters), output)
        saved = [*hidden, output][: stack_of(tuple(has_bias), tuple(acts)).saved]
        gradients = extension.backward(stack, grad, input, saved, parameters, [True] * (1 + len(parameters)))
        for i, (found, bound) in enumerate(zip(gradients, expected.gradients, strict=True)):
            assert_within(found, bound, f"gradient {i}")
        return [output, *hidden, *gradients]

    def one_layer(self, m: int, n: int, k: int, dtype: torch.dtype, act: Activation, bias: bool = True) -> list[Tensor]:
        return self.check(
            self.randn(m, k, dtype=dtype),
            [self.randn(n, k, dtype=dtype) / max(k, 1) ** 0.5],
            [self.randn(n, dtype=dtype) if bias else None],
            [act],
            self.randn(m, n, dtype=dtype),
        )

    def chain(
        self,
        rows: int,
        widths: Sequence[int],
        act: Activation,
        last: Activation,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:
        """A network of these widths, every second layer without a bias."""
        pairs = list(pairwise(widths))
        return self.check(
            self.randn(rows, widths[0], dtype=dtype),
            [self.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairs],
            [self.randn(n, dtype=dtype) if i % 2 == 0 else None for i, (_, n) in enumerate(pairs)],
            [act] * (len(pairs) - 1) + [last],
            self.randn(rows, widths[-1], dtype=dtype),
        )

    def networks(self, dtype: torch.dtype, activation: Activation) -> None:
        for widths, last in (([8, 40, 16, 12], IDENTITY), ([3, 4, 3], activation), ([9, 1, 17, 2, 6], activation)):
            self.chain(35, widths, activation, last, dtype)

    def layouts(self, dtype: torch.dtype, which: str, layout: str) -> None:
        """Two layers, one of whose tensors ("input", "weight", "grad" or "saved") lies in memory as `layout` says."""
        arrange = CUDA_LAYOUTS[layout]
        m, n, k = 35, 40, 24
        input, weight = self.randn(m, k, dtype=dtype), self.randn(n, k, dtype=dtype)
        second = self.randn(8, n, dtype=dtype) / 6
        grad, bias = self.randn(m, 8, dtype=dtype), self.randn(2 * n, dtype=dtype)[::2]
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
            self.check(input, [weight, second], [bias, None], acts, grad)
            return
        expected = network(input, [weight, second], [bias, None], acts, grad)
        stack = self.native((True, False), acts)
        _, hidden = self.extension().forward(stack, input, parameters)
        saved = [arrange(hidden[0]), hidden[1] if layout.startswith("equal") else arrange(hidden[1])]
        gradients = self.extension().backward(stack, grad, input, saved, parameters, [True] * 4)
        for i, (found, bound) in enumerate(zip(gradients, expected.gradients, strict=True)):
            assert_within(found, bound, f"gradient {i}")

    def narrow_parts_of_chunks(self, dtype: torch.dtype, act: Activation) -> None:
        """Chunks of 16 bytes of which only a part is inside."""
        for widths in ((9, 20, 6), (9, 68, 6), (15, 1, 63)):
            pairs = list(pairwise(widths))
            self.check(
                parts_of_chunks(self.randn(35, widths[0], dtype=dtype)),
                [parts_of_chunks(self.randn(n, k, dtype=dtype) / k**0.5) for k, n in pairs],
                [self.randn(n, dtype=dtype) for _, n in pairs],
                [act] * len(pairs),
                parts_of_chunks(self.randn(35, widths[-1], dtype=dtype)),
            )

    def whole_numbers(self, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> None:
        """However the sums are cut, nothing is rounded but the result: a sum that stops in 16 bits shows."""

        def whole(*shape: int) -> Tensor:
            return torch.randint(-3, 4, shape, device=self.device).to(dtype)

        stack = self.native((True,), (IDENTITY,))
        for m, n, k in shapes:
            input, weight, bias, grad = whole(m, k), whole(n, k), whole(n), whole(m, n)
            exact = [t.double() for t in (input, weight, bias, grad)]
            output, _ = self.extension().forward(stack, input, [weight, bias])
            assert torch.equal(output, (exact[0] @ exact[1].T + exact[2]).to(dtype))
            gradients = self.extension().backward(stack, grad, input, [], [weight, bias], [True] * 3)
            expected = (exact[3] @ exact[1], exact[3].T @ exact[0], exact[3].sum(0))
            for found, wanted in zip(gradients, expected, strict=True):
                assert torch.equal(found, wanted.to(dtype))

    def float32_is_not_tf32(self) -> None:
        """Sums of 64 products, under a bound that factors of 11 bits break."""
        m, n, k = 64, 64, 64
        input, weight = self.randn(m, k), self.randn(n, k) / 8
        expected = network(input, [weight], [None], [IDENTITY], self.randn(m, n)).output
        assert_within(self.extension().infer(self.native((False,), (IDENTITY,)), input, [weight]), expected, "output")

        def cut(x: Tensor) -> Tensor:
            return (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

        with pytest.raises(AssertionError, match="allowed"):
            assert_within((cut(input) @ cut(weight).T).float(), expected, "output in TF32")

    def needed_gradients(self, dtype: torch.dtype) -> None:
        """What is asked for, with the same bits whatever else is."""
        act = resolve("silu")
        stack = self.native((True, True), (act, act))
        parameters = [self.randn(*shape, dtype=dtype) for shape in ((6, 5), (6,), (4, 6), (4,))]
        input, grad = self.randn(9, 5, dtype=dtype), self.randn(9, 4, dtype=dtype)
        _, saved = self.extension().forward(stack, input, parameters)
        everything = self.extension().backward(stack, grad, input, saved, parameters, [True] * 5)
        for mask in range(32):
            needs = [bool(mask >> i & 1) for i in range(5)]
            some = self.extension().backward(stack, grad, input, saved, parameters, needs)
            for need, ours, whole in zip(needs, some, everything, strict=True):
                assert (ours is not None) == need
                assert ours is None or torch.equal(ours, whole)

    def special_values(self, dtype: torch.dtype, activation: Activation, layers: int = 1) -> None:
        """NaN, infinities, zeros and kinks, with gradients of one, zero and infinity, as torch has them on the CPU.

        Of two layers, the second is the identity, and its weight one.
        """
        inf, nan, big = float("inf"), float("nan"), torch.finfo(dtype).max
        points = [nan, inf, -inf, 0.0, 3.0, -3.0, 1.0, -1.0, big, -big]
        has_bias, acts = (False,) * layers, (activation, IDENTITY)[:layers]
        weights, stack = [torch.ones(1, 1, dtype=dtype, device=self.device)] * layers, self.native(has_bias, acts)
        needs = [True] + [False] * layers
        for seed in (1.0, 0.0, inf):
            # Many copies, so that torch's vectorised loop computes the first; its scalar tail may differ.
            z = torch.tensor(points, dtype=dtype).repeat(16)
            leaf = z.clone().requires_grad_()
            y = reference.activate(leaf, activation.name, activation.parameters)
            grad = torch.full_like(z, seed)
            (expected,) = torch.autograd.grad(y, leaf, grad)
            column, seeds = z[:, None].to(self.device), grad[:, None].to(self.device)
            output, hidden = self.extension().forward(stack, column, weights)
            saved = [*hidden, output][: stack_of(has_bias, acts).saved]
            (gradient, *_) = self.extension().backward(stack, seeds, column, saved, weights, needs)
            for found, torchs, what in ((output, y.detach(), "value"), (gradient, expected, "gradient")):
                ours = found[:, 0].cpu()
                same = (ours.isnan() == torchs.isnan()) & (ours.isinf() == torchs.isinf())
                same &= ~torchs.isinf() | (ours == torchs)
                wrong = (~same[: len(points)]).nonzero().flatten()
                assert not len(wrong), [(points[i], ours[i].item(), torchs[i].item(), what, seed) for i in wrong]
