"""Derivatives of every order, by value."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

import fastmlp
from fastmlp import _C, Activation, functional, reference
from fastmlp.activations import IDENTITY, resolve
from tests.support.derivatives import Case, assert_same, subsets

Function = Callable[..., Tensor]


def stacks(act: Activation) -> list[Case]:
    mixed = Activation("tanh")
    return [
        Case([4, 5], [act], [True]),
        Case([4, 5], [act], [False]),
        Case([3, 4, 2], [act, act], [True, False]),
        Case([2, 3, 4, 2], [mixed, act, IDENTITY], [True, True, True]),
    ]


def test_gradcheck(activation: Activation) -> None:
    for case in stacks(activation):
        assert gradcheck(case.ours, case.tensors)


def test_gradgradcheck(activation: Activation) -> None:
    for case in stacks(activation):
        assert gradgradcheck(case.ours, case.tensors)


def test_forward_mode_and_batched_gradients(activation: Activation) -> None:
    for case in stacks(activation)[2:]:
        assert gradcheck(
            case.ours,
            case.tensors,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert gradgradcheck(case.ours, case.tensors, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (1, 4)])
def test_gradcheck_of_other_shapes(shape: tuple[int, ...]) -> None:
    case = Case([4, 3, 2], [resolve("silu"), IDENTITY], [True, True])
    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(case.ours, (input, *case.parameters))
    if input.numel():
        assert gradgradcheck(case.ours, (input, *case.parameters))


@pytest.mark.parametrize("layers", [1, 2])
def test_every_subset_of_requires_grad(layers: int) -> None:
    case = Case([4, 3, 5][: layers + 1], [resolve("gelu"), resolve("elu")][:layers], [True] * layers)
    subsets(case, list(itertools.product([False, True], repeat=len(case.tensors))))


@pytest.mark.parametrize("layers", [3, 5, 8])
def test_sampled_subsets_of_requires_grad(layers: int) -> None:
    acts = [resolve(n) for n in ("tanh", "mish", "relu", "sin", "identity", "softplus", "selu", "silu")]
    case = Case([3, 4, 2, 5, 3, 4, 3, 2, 3][: layers + 1], acts[:layers], ([True, False] * 4)[:layers])
    masks = torch.rand(60, len(case.tensors)) < torch.rand(60, 1)
    subsets(case, [tuple(m) for m in masks.tolist()])


def test_fourth_derivative() -> None:
    case = Case([1, 5, 3, 1], [resolve("tanh"), resolve("sin"), IDENTITY], [True] * 3, rows=4)
    results = []
    for f in (case.ours, case.torchs):
        y, chain = f(*case.tensors), []
        for _ in range(4):
            (y,) = grad(y.sum(), case.input, create_graph=True)
            chain.append(y)
        results.append([*chain, *grad(y.sum(), case.parameters[:1])])
    assert_same(*results)


def test_loss_of_second_derivatives(activation: Activation) -> None:
    """As in physics-informed training: `backward` differentiates for the third time."""
    for frozen in (None, 1, 3):
        case = Case([2, 4, 3, 1], [activation, activation, IDENTITY], [True, True, False], rows=5)
        if frozen is not None:
            case.tensors[frozen].requires_grad_(False)
        parameters = [t for t in case.parameters if t.requires_grad]
        results = []
        for f in (case.ours, case.torchs):
            u = f(*case.tensors)
            (first,) = grad(u.sum(), case.input, create_graph=True)
            (second,) = grad(first[:, 0].sum(), case.input, create_graph=True, materialize_grads=True)
            residual = u * first[:, :1] + first[:, 1:] - second[:, :1]
            results.append([first, second, *grad(residual.square().mean(), parameters)])
        assert_same(*results)


def test_backward_twice() -> None:
    case = Case([4, 3, 2], [resolve("tanh"), resolve("gelu")], [True, True])
    y = case.ours(*case.tensors).sum()
    y.backward(retain_graph=True)
    once = [t.grad.clone() for t in case.tensors if t.grad is not None]
    y.backward()
    assert_same([t.grad for t in case.tensors], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("which", ["input", "weight", "bias", "output"])
def test_changes_in_place_are_detected(which: str) -> None:
    case = Case([4, 3, 2], [resolve("tanh"), resolve("tanh")], [True, True])
    y = case.ours(*case.tensors)
    changed = {"input": case.input, "weight": case.parameters[2], "bias": case.parameters[1], "output": y}[which]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_output_of_identity_may_be_changed_in_place() -> None:
    case = Case([4, 3], [IDENTITY], [True])
    results = []
    for f in (case.ours, case.torchs):
        y = f(*case.tensors)
        y += 1
        results.append(grad(torch.relu_(y).sum(), case.tensors))
    assert_same(*results)


def test_expanded_and_strided_gradients() -> None:
    case = Case([4, 6, 3], [resolve("silu"), resolve("sigmoid")], [True, True])
    for reduce in (
        lambda y: y.sum(),
        lambda y: y[:, ::2].sum(),
        lambda y: y.t().reshape(-1)[1:].sum(),
        lambda y: y.mean(),
    ):
        assert_same(*[grad(reduce(f(*case.tensors)), case.tensors) for f in (case.ours, case.torchs)])


def test_shared_and_dependent_weights() -> None:
    acts = [resolve("tanh"), resolve("gelu")]
    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for f in (
        lambda ws: functional.mlp(x, ws, [None, None], acts),
        lambda ws: reference.mlp(x, ws, [None, None], [(a.name, a.parameters) for a in acts]),
    ):
        (first,) = grad(f([w, w * 2 + w.t()]).sum(), w, create_graph=True)
        (second,) = grad(first.pow(2).sum(), w)
        results.append([first, second])
    assert_same(*results)


def test_gradient_of_a_subclass_or_dual_goes_the_composite_way() -> None:
    """A gradient that is not plain, though forward was."""
    case = Case([4, 3], [resolve("gelu")], [True])
    y = case.ours(*case.tensors)
    seeds = torch.randn(5, *y.shape, dtype=torch.float64)
    batched = grad(y, case.tensors, seeds, is_grads_batched=True, retain_graph=True)
    one_by_one = [grad(y, case.tensors, s, retain_graph=True) for s in seeds]
    assert_same(batched, [torch.stack(g) for g in zip(*one_by_one, strict=True)])


def test_hooks_and_checkpointing() -> None:
    case = Case([4, 3, 2], [resolve("mish"), resolve("tanh")], [True, True])
    packed: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = case.ours(*case.tensors)
    expected = grad(case.torchs(*case.tensors).sum(), case.tensors)
    assert_same(grad(y.sum(), case.tensors), expected)
    assert len(packed) == 1 + 4 + 2
    again = torch.utils.checkpoint.checkpoint(case.ours, *case.tensors, use_reentrant=False)
    assert_same(grad(again.sum(), case.tensors), expected)
    seen: list[Tensor] = []
    y = case.ours(*case.tensors)
    y.register_hook(seen.append)
    assert y.grad_fn is not None
    y.sum().backward()
    assert len(seen) == 1


def test_no_graph_without_need() -> None:
    layer = fastmlp.Linear(4, 3, activation="relu")
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with torch.inference_mode():
        assert layer(x).is_inference()
    layer.requires_grad_(False)
    assert layer(x).grad_fn is None
    assert layer(x.requires_grad_()).grad_fn is not None


def test_inference_tensor_as_input() -> None:
    layer = fastmlp.Linear(4, 3, activation="relu")
    with torch.inference_mode():
        x = torch.randn(2, 4)
    with torch.no_grad():
        assert_same([layer(x)], [torch.relu(nn.functional.linear(x, layer.weight, layer.bias))])
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(x)


def test_plain_calls_take_the_direct_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a kernel has computed is computed again, not even under create_graph."""

    def fail(*_: object) -> None:
        raise AssertionError("the composite route ran")

    monkeypatch.setattr(reference, "mlp", fail)
    case = Case([4, 3, 2], [resolve("gelu"), resolve("tanh")], [True, False])
    grad(case.ours(*case.tensors).sum(), case.tensors)
    grad(case.ours(*case.tensors).sum(), case.tensors, create_graph=True)
    with torch.no_grad():
        case.ours(*case.tensors)
    assert fastmlp.explain(case.input) == ("direct", "")


def test_routes_are_explained() -> None:
    layer, x = fastmlp.Linear(4, 3), torch.randn(2, 4)
    assert fastmlp.explain(layer, x) == ("direct", "")

    class Marked(Tensor):
        pass

    reasons = {
        "subclass": fastmlp.explain(layer, x.as_subclass(Marked)),
        "no kernels for the device": fastmlp.explain(layer, x.to("meta")),
        "no kernels for the dtype": fastmlp.explain(layer, x.to(torch.complex64)),
        "subclass ": fastmlp.explain(layer, nn.Parameter(x).as_subclass(Marked)),
    }
    with torch.autograd.forward_ad.dual_level():
        reasons["forward-mode"] = fastmlp.explain(layer, x)
    torch.func.vmap(lambda t: reasons.setdefault("functorch", fastmlp.explain(layer, t)) and t)(x)
    for word, route in reasons.items():
        assert route.name == "composite"
        assert word.strip() in route.reason


def test_subclasses_keep_their_type() -> None:
    class Marked(Tensor):
        pass

    layer = fastmlp.Linear(4, 3, activation="tanh")
    x = torch.randn(2, 4)
    assert type(layer(x.as_subclass(Marked))) is Marked
    assert_same([layer(x.as_subclass(Marked)).as_subclass(Tensor)], [layer(x)])


def test_last_isa_moves_with_backward() -> None:
    """Backward of a plain gradient runs our kernels too: the other ISA is the one last seen."""
    before = fastmlp.get_isa()
    y = fastmlp.Linear(4, 3)(torch.randn(2, 4))
    try:
        fastmlp.set_isa("portable")
        y.sum().backward()
        assert _C.last_isa() == "portable"
    finally:
        fastmlp.set_isa(before)
