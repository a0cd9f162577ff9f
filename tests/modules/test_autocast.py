"""Autocast of the CPU: the dtypes of native modules, by the fused route."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import fastmlp
from fastmlp import Activation, functional, reference
from fastmlp.activations import IDENTITY, module_of
from tests.support.bounds import assert_within, network

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def low(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if PyTorch's operations compute a network."""

    def fail(*_: object) -> None:
        raise AssertionError("the composite route ran")

    monkeypatch.setattr(reference, "mlp", fail)


def pair(act: Activation = IDENTITY) -> tuple[fastmlp.MLP, nn.Sequential]:
    """The same network of ours and of torch, in float32."""
    ours = fastmlp.MLP(6, [5, 4], 3, act, act)
    children: list[nn.Module] = []
    for k, n in ((6, 5), (5, 4), (4, 3)):
        children += [nn.Linear(k, n)] if act == IDENTITY else [nn.Linear(k, n), module_of(act)]
    native = nn.Sequential(*children)
    native.load_state_dict(ours.state_dict())
    return ours, native


def gradients(module: nn.Module, x: Tensor, seed: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    return list(torch.autograd.grad(module(leaf), [leaf, *module.parameters()], seed))


@pytest.mark.usefixtures("only_kernels")
def test_dtypes_as_native_and_values_within_bounds(activation: Activation, low: torch.dtype) -> None:
    ours, native = pair(activation)
    x, seed = torch.randn(7, 6), torch.randn(7, 3).to(low)
    with torch.autocast("cpu", low):
        y, found, expected_dtypes = ours(x), gradients(ours, x, seed), [t.dtype for t in gradients(native, x, seed)]
        assert y.dtype == native(x).dtype == low
        with torch.no_grad():
            assert torch.equal(ours(x), y)
    assert [t.dtype for t in found] == expected_dtypes == [torch.float32] * 7
    cast = [p.detach().to(low) for p in ours.parameters()]
    expected = network(x.to(low), cast[::2], list(cast[1::2]), [activation] * 3, seed)
    assert_within(y, expected.output, "output")
    for i, (gradient, bounded) in enumerate(zip(found, expected.gradients, strict=True)):
        assert torch.equal(gradient, gradient.to(low).float())
        assert_within(gradient.to(low), bounded, f"gradient {i}")


@pytest.mark.usefixtures("only_kernels")
def test_every_derivative_is_that_of_a_cast_network(low: torch.dtype) -> None:
    ours, _ = pair(Activation("tanh"))
    cast = pair(Activation("tanh"))[0].to(low)
    cast.load_state_dict(ours.state_dict())
    x, seed = torch.randn(7, 6), torch.randn(7, 3).to(low)
    expected = gradients(cast, x.to(low), seed)
    with torch.autocast("cpu", low):
        inside = gradients(ours, x, seed)
        y = ours(x)
    outside = torch.autograd.grad(y, list(ours.parameters()), seed)
    assert all(torch.equal(a, b.float()) for a, b in zip(inside, expected, strict=True))
    assert all(torch.equal(a, b.float()) for a, b in zip(outside, expected[1:], strict=True))


def test_second_derivatives(low: torch.dtype) -> None:
    ours, _ = pair(Activation("tanh"))
    cast = pair(Activation("tanh"))[0].to(low)
    cast.load_state_dict(ours.state_dict())
    x = torch.randn(7, 6)

    def penalty(module: nn.Module, input: Tensor) -> list[Tensor]:
        leaf = input.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(leaf).sum(), leaf, create_graph=True)
        weights = [p for p in module.parameters() if p.dim() == 2]
        return list(torch.autograd.grad(slope.to(low).pow(2).sum(), weights))

    expected = penalty(cast, x.to(low))
    with torch.autocast("cpu", low):
        found = penalty(ours, x)
    assert all(bool(g.abs().max() > 0) for g in expected)
    assert all(torch.equal(a, b.float()) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("only_kernels")
def test_backward_in_a_region_keeps_the_dtype_of_forward() -> None:
    ours, _ = pair(Activation("gelu"))
    x, seed = torch.randn(7, 6), torch.randn(7, 3)
    expected = gradients(ours, x, seed)
    y = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, list(ours.parameters()), seed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))


@pytest.mark.parametrize("input", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_that_meet_as_native(input: torch.dtype, parameters: torch.dtype) -> None:
    ours, native = pair(Activation("relu"))
    x = torch.ones(7, 6).to(input)
    for module in (ours, native):
        module.to(parameters)
    with torch.autocast("cpu", torch.bfloat16):
        if not input.is_floating_point or (input == torch.float64) != (parameters == torch.float64):
            for module in (ours, native):
                with pytest.raises(RuntimeError, match="dtype"):
                    module(x)
            return
        assert ours(x).dtype == native(x).dtype
        for a, b in zip(ours.parameters(), native.parameters(), strict=True):
            dtypes = [torch.autograd.grad(m(x).sum(), p)[0].dtype for m, p in ((ours, a), (native, b))]
            assert dtypes == [parameters] * 2
        assert fastmlp.explain(ours, x) == ("direct", "")


def test_nested_regions(low: torch.dtype) -> None:
    ours, _ = pair(Activation("relu"))
    x = torch.randn(7, 6)
    other = torch.float16 if low == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", low):
        y = ours(x)
        with torch.autocast("cpu", enabled=False):
            assert ours(x).dtype == torch.float32
            with pytest.raises(RuntimeError, match="dtype"):
                ours(x.to(low))
        with torch.autocast("cpu", other):
            assert ours(x).dtype == other
        assert torch.equal(ours(x), y)
    assert ours(x).dtype == torch.float32


def test_vectors_and_other_devices(low: torch.dtype) -> None:
    x, w = torch.randn(2, 3, 6), torch.randn(6)
    with torch.autocast("cpu", low):
        assert torch.equal(functional.linear(x, w, None, "relu"), torch.relu(nn.functional.linear(x, w)))
        # Tensors that are not on the device of the region stay what they are.
        assert pair()[0].to("meta")(x.to("meta")).dtype == torch.float32


def test_errors_name_what_was_given() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"fastmlp: input has shape \[2, 3\], expected 4"),
    ):
        fastmlp.Linear(4, 5)(torch.randn(2, 3))


def test_explained() -> None:
    ours, _ = pair(Activation("relu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert fastmlp.explain(ours, torch.randn(2, 6)) == ("direct", "")
        assert fastmlp.explain(torch.randn(2, 6)) == ("direct", "")
        assert fastmlp.explain(ours, torch.randn(2, 6, device="meta")).name == "composite"
        with pytest.raises(RuntimeError, match="dtype"):
            fastmlp.explain(ours, torch.randn(2, 6, dtype=torch.float64))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, low: torch.dtype) -> None:
    ours, _ = pair(Activation("gelu"))
    x, seed = torch.randn(7, 6, requires_grad=True), torch.randn(7, 3).to(low)
    parameters = list(ours.parameters())
    results = []
    for again in (False, True):
        ours.zero_grad()
        with torch.autocast("cpu", low):
            y = checkpoint(ours, x, use_reentrant=use_reentrant) if again else ours(x)
        # Recomputed outside of the region.
        y.backward(seed)
        results.append([p.grad for p in parameters])
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


TRANSFORMS: dict[str, Callable[[nn.Module, dict[str, Tensor], Tensor], Any]] = {
    "vmap": lambda m, p, x: vmap(m)(x),
    "grad": lambda m, p, x: grad(lambda q: functional_call(m, q, (x,)).float().pow(2).sum())(p),
    "per sample": lambda m, p, x: vmap(grad(lambda q, t: functional_call(m, q, (t,)).sum()), (None, 0))(p, x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str, low: torch.dtype) -> None:
    """PyTorch's operations compute them, cast as ever."""
    ours, native = pair(Activation("silu"))
    x, state = torch.randn(7, 6), dict(ours.state_dict())
    with torch.autocast("cpu", low):
        found, expected = (TRANSFORMS[name](m, state, x) for m in (ours, native))
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_compiled(where: str, low: torch.dtype) -> None:
    ours, _ = pair(Activation("tanh"))
    x, seed = torch.randn(7, 6), torch.randn(7, 3).to(low)

    def in_region(t: Tensor) -> Tensor:
        with torch.autocast("cpu", low):
            return ours(t)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(in_region if where == "inside" else ours, backend=counter, fullgraph=True, dynamic=True)
    parameters = list(ours.parameters())
    expected = in_region(x)
    slopes = torch.autograd.grad(expected, parameters, seed)
    with torch.autocast("cpu", low, enabled=where == "outside"):
        y = f(x)
        found = torch.autograd.grad(y, parameters, seed)
        assert f(x[:3]).dtype == low
        assert counter.frame_count == 1
        with torch.no_grad():
            assert torch.equal(f(x), expected)
    # The same casts and the same kernels: the same bits.
    assert torch.equal(y, expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, slopes, strict=True))
