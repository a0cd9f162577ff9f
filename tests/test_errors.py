"""Every error names the argument, what was given and what was expected, on every route."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastmlp
from fastmlp import _C, functional
from fastmlp.ops import stack_of

# Without their types, since wrong types are what is tested.
linear: Any = functional.linear
mlp: Any = functional.mlp
activation: Any = fastmlp.Activation
wrong_module: Any = nn.Conv2d(1, 1, 1)
width: Any = 3

x, w, b = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)

ARGUMENTS: dict[str, tuple[tuple[Any, Any, Any], str]] = {
    "features": (
        (torch.zeros(3, 7), w, b),
        r"input has shape \[3, 7\], expected 4 in the last dimension, since weight has shape \[5, 4\]",
    ),
    "scalar": ((torch.tensor(1.0), w, b), "input has no dimension, expected at least one"),
    "weight_dim": ((x, torch.zeros(1, 5, 4), b), r"weight has shape \[1, 5, 4\], expected two dimensions"),
    "bias_size": ((x, w, torch.zeros(6)), r"bias has shape \[6\], expected \[5\], the out_features of weight"),
    "bias_dim": ((x, w, torch.zeros(5, 1)), r"bias has shape \[5, 1\], expected \[5\]"),
    "weight_dtype": ((x, w.double(), b), "weight has dtype Double, expected the dtype of input, Float"),
    "bias_dtype": ((x, w, b.double()), "bias has dtype Double, expected the dtype of input, Float"),
    "half_weight": ((x, w.half(), b), "weight has dtype Half, expected the dtype of input, Float"),
    "device": ((x, w.to("meta"), b), "weight is on meta, expected the device of input, cpu"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_linear(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
        functional.linear(*arguments, "relu")


@pytest.mark.parametrize("case", ARGUMENTS)
def test_same_text_when_gradients_are_wanted(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    if not arguments[1].is_floating_point():
        return
    with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
        functional.linear(arguments[0], arguments[1].clone().requires_grad_(), arguments[2], "relu")


@pytest.mark.parametrize("case", ["features", "weight_dim", "bias_size", "bias_dim", "weight_dtype"])
def test_same_text_on_the_composite_route(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
        functional.linear(*arguments, "relu")


@pytest.mark.parametrize("case", ["features", "weight_dim", "bias_size", "weight_dtype"])
def test_same_text_from_the_operators_and_on_meta(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    for device in ("cpu", "meta"):
        moved = [t.to(device) for t in arguments]
        with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
            torch.ops.fastmlp.infer(moved[0], moved[1:], [True], [1], [0.0, 0.0])


def test_layers_are_counted() -> None:
    with pytest.raises(RuntimeError, match=r"weights\[1\] has shape \[2, 9\], expected 5 in the last dimension"):
        functional.mlp(x, [w, torch.zeros(2, 9)], [b, None], ["relu", None])
    with pytest.raises(RuntimeError, match=r"biases\[1\] has shape \[3\], expected \[2\]"):
        functional.mlp(x, [w, torch.zeros(2, 5)], [b, torch.zeros(3)], ["relu", None])
    with pytest.raises(ValueError, match="one entry for each layer, got 2, 1 and 2"):
        functional.mlp(x, [w, w], [b], ["relu", None])
    with pytest.raises(ValueError, match="a network needs at least one layer, got none"):
        functional.mlp(x, [], [], [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear([1.0], w), "input must be a torch.Tensor, got list"),
        (lambda: linear(None, w), "input must be a torch.Tensor, got NoneType"),
        (lambda: linear(x, 3), "weight must be a torch.Tensor, got int"),
        (lambda: linear(x, w, 3.0), "bias must be a torch.Tensor, got float"),
        (lambda: mlp(x, [w, None], [b, b], ["relu", None]), r"weights\[1\] must be a torch.Tensor"),
        (lambda: linear(x, w, b, 7), "activation must be None, a name, .* got int"),
        (lambda: activation("relu", slope=1), "activation 'relu' takes no parameters, got 'slope'"),
        (lambda: activation("elu", alpha="1"), "alpha of activation 'elu' must be a number, got str"),
        (lambda: fastmlp.explain(fastmlp.Linear(2, 2)), "input must be a torch.Tensor, got NoneType"),
        (lambda: fastmlp.explain(wrong_module, x), "target must be a fastmlp.Linear, .* got Conv2d"),
        (lambda: fastmlp.MLP(4, width, 2), "hidden_features must be a sequence of sizes, got 3"),
    ],
)
def test_types(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastmlp.Linear(2, 2, activation="swish"), "activation must be one of identity, relu, .* got 'swish'"),
        (lambda: fastmlp.Linear(2, 2, activation=nn.Softmax(1)), "activation Softmax has no fused form"),
        (lambda: fastmlp.Linear(2, 2, activation=nn.Softmax), "activation Softmax has no fused form"),
        (lambda: fastmlp.MLP(2, [3], 2, nn.PReLU), "activation PReLU has no fused form"),
    ],
)
def test_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_only_torch_computes() -> None:
    """Integers and sparse layouts are torch's to accept or refuse."""
    integers = torch.arange(12).view(3, 4)
    assert torch.equal(functional.linear(integers, integers), nn.functional.linear(integers, integers))
    dense = torch.eye(4)
    torch.testing.assert_close(functional.linear(dense.to_sparse(), w), w.t())
    with pytest.raises(RuntimeError):
        torch.ops.fastmlp.infer(x.to_sparse(), [w, b], [True], [1], [0.0, 0.0])


def test_operators_check_their_lists() -> None:
    ops = torch.ops.fastmlp
    with pytest.raises(ValueError, match="activation 99 of layer 0 does not exist"):
        ops.infer(x, [w], [False], [99], [0.0, 0.0])
    with pytest.raises(ValueError, match="two scalars for each of 1 layers, got 1"):
        ops.infer(x, [w], [False], [1], [0.0])
    with pytest.raises(ValueError, match="one activation for each of 1 layers, got 2"):
        ops.infer(x, [w], [False], [1, 1], [0.0, 0.0])
    with pytest.raises(RuntimeError, match=r"expected 2 parameters .* got 1"):
        ops.infer(x, [w], [True], [1], [0.0, 0.0])


def test_backward_checks_its_arguments() -> None:
    stack = stack_of((True,), (fastmlp.Activation("relu"),))
    y, needs = torch.zeros(3, 5), [True] * 3
    for arguments, message in (
        ((torch.zeros(3, 6), x, [y], [w, b], needs), r"grad has shape \[3, 6\]"),
        ((y.double(), x, [y], [w, b], needs), "grad has dtype Double"),
        ((y, x, [], [w, b], needs), "saved has 0 tensors, expected 1"),
        ((y, x, [torch.zeros(2, 5)], [w, b], needs), r"saved\[0\] has shape \[2, 5\]"),
        ((y, x, [y], [w, b], [True]), "needs has 1 entries, expected 3"),
    ):
        with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
            _C.backward(stack.native, *arguments)


def test_nothing_is_computed_after_an_error() -> None:
    """Parameters, inputs and their version counters are as before."""
    layer = fastmlp.Linear(4, 5, activation="tanh")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    versions = [p._version for p in layer.parameters()]
    with pytest.raises(RuntimeError, match="expected 4 in the last dimension"):
        layer(torch.zeros(2, 3))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert versions == [p._version for p in layer.parameters()]


def test_memory_that_cannot_be_had_raises() -> None:
    huge = torch.zeros(1, 1).expand(1 << 40, 1)
    with pytest.raises(RuntimeError, match=r"allocate|memory"):
        functional.linear(huge, torch.zeros(1 << 12, 1))
