"""`fastmlp.derivatives` against nested calls of `torch.autograd.grad`, by every route, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, derivatives, functional, reference
from fastmlp.activations import DEFAULTS
from tests.support.compiling import compiled
from tests.support.derivatives import Case, assert_same
from tests.support.jets import nested

SMOOTH = ["tanh", "sin", "softplus", "gelu", "sigmoid", "silu", "gelu_tanh", "mish"]
SUMS = [[(1, 1)], [(0, 1)], [(0, 0), (1, 1)]]


def double_mlp(activation: str = "tanh", outputs: int = 1) -> fastmlp.MLP:
    torch.manual_seed(3)
    return fastmlp.MLP(2, [12, 9], outputs, activation, dtype=torch.float64)


def asked(input: Tensor, *parameters: Tensor, acts: list[Activation], bias: list[bool]) -> tuple[Tensor, ...]:
    """All kinds of derivatives at once."""
    flat = iter(parameters)
    pairs = [(next(flat), next(flat) if b else None) for b in bias]
    weights, biases = [p[0] for p in pairs], [p[1] for p in pairs]
    found = functional.mlp_derivatives(input, weights, biases, acts, None, [1, (0, 1)], [0, 1])
    assert found.laplacian is not None
    return found.value, found.first, found.second, found.laplacian


def expected(input: Tensor, *parameters: Tensor, acts: list[Activation], bias: list[bool]) -> tuple[Tensor, ...]:
    flat = iter(parameters)
    pairs = [(next(flat), next(flat) if b else None) for b in bias]
    value, *others = nested(input, [p[0] for p in pairs], [p[1] for p in pairs], acts, [0, 1], SUMS)
    return value, torch.stack(others[:2], -1), torch.stack(others[2:4], -1), others[4]


@pytest.mark.parametrize("name", DEFAULTS)
def test_values_first_and_second_gradients(name: str) -> None:
    torch.manual_seed(5)
    act = Activation(name)
    case = Case([2, 7, 6, 2], [act, act, Activation("identity")], [True, False, True], rows=5)
    results = []
    for function in (asked, expected):
        found = function(*case.tensors, acts=case.acts, bias=case.bias)
        loss = torch.stack([(i + 1) * t.sin().sum() for i, t in enumerate(found)]).sum()
        plain = torch.autograd.grad(loss, case.tensors, retain_graph=True, materialize_grads=True)
        first = torch.autograd.grad(loss, case.tensors, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad([g.sin().sum() for g in first], case.tensors, materialize_grads=True)
        results.append([*found, *plain, *first, *second])
    assert_same(*results)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    torch.manual_seed(1)
    act = Activation(name)
    case = Case([2, 4, 3, 1], [act, act, Activation("identity")], [True, True, True], rows=2)
    function: Callable[..., Any] = lambda *t: asked(*t, acts=case.acts, bias=case.bias)  # noqa: E731
    assert torch.autograd.gradcheck(function, case.tensors)
    assert torch.autograd.gradgradcheck(function, case.tensors)


def test_of_a_model() -> None:
    model = double_mlp(outputs=3)
    x = torch.randn(17, 2, dtype=torch.float64)
    value, first, second, laplacian = derivatives(model, x, [-1], [(0, -1)], [0, 1])
    tensors = list(model.parameters())
    weights, biases = tensors[::2], tensors[1::2]
    acts = [Activation("tanh"), Activation("tanh"), Activation("identity")]
    y, y_x, _, y_tx, both = nested(x, weights, biases, acts, [1, 0], [[(1, 0)], [(0, 0), (1, 1)]])
    assert value.shape == (17, 3)
    assert first.shape == (17, 3, 1)
    assert second.shape == (17, 3, 1)
    assert_same([value, first[..., 0], second[..., 0], laplacian], [y, y_x, y_tx, both])
    assert_same([value], [model(x)])


def test_what_is_not_asked_for_is_not_there() -> None:
    found = derivatives(double_mlp(), torch.zeros(4, 2, dtype=torch.float64), [])
    assert [None if t is None else tuple(t.shape) for t in found] == [(4, 1), (4, 1, 0), (4, 1, 0), None]
    found = derivatives(double_mlp(), torch.zeros(4, 2, dtype=torch.float64))
    assert found.first.shape == (4, 1, 2)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    model, x = double_mlp(outputs=2), torch.randn(*leading, 2, dtype=torch.float64, requires_grad=True)
    found = derivatives(model, x, second=[0], laplacian=[0, 1])
    flat = derivatives(model, x.reshape(-1, 2), second=[0], laplacian=[0, 1])
    for one, other in zip(found, flat, strict=True):
        assert one is not None
        assert other is not None
        assert one.shape == (*leading, *other.shape[1:])
        assert torch.equal(one.reshape(other.shape), other)
    found.second.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_nested_containers_and_dropout_outside_of_training() -> None:
    inner = nn.Sequential(nn.Linear(5, 4), nn.Softplus())
    model = nn.Sequential(nn.Linear(2, 5), fastmlp.Sin(), nn.Sequential(inner, nn.Dropout(0.5)), nn.Linear(4, 1))
    x = torch.randn(6, 2)
    with pytest.raises(TypeError, match=r"fastmlp: 2\.1 \(Dropout\) cannot be .* Dropout is in training mode"):
        derivatives(model, x)
    model.eval()
    torch.testing.assert_close(derivatives(model, x).value, model(x))


def test_changes_of_the_model_are_seen() -> None:
    model, x = double_mlp(), torch.randn(5, 2, dtype=torch.float64)
    before = derivatives(model, x, second=[0])
    model[1] = nn.Sigmoid()
    assert not torch.allclose(derivatives(model, x, second=[0]).second, before.second)
    with torch.no_grad():
        first_weight(model).add_(1)
    assert_same([derivatives(model, x).value], [model(x)])


def first_weight(model: nn.Sequential) -> Tensor:
    """The weight of the first layer."""
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    return weight


def burgers_step(model: nn.Module, points: Tensor) -> Tensor:
    u, first, second, _ = derivatives(model, points, second=[1])
    return (first[..., 0] + u * first[..., 1] - 0.1 * second[..., 0]).square().mean()


def nested_step(model: nn.Module, points: Tensor) -> Tensor:
    points = points.detach().requires_grad_()
    u = model(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 1].sum(), points, create_graph=True)
    return (first[:, :1] + u * first[:, 1:] - 0.1 * second[:, 1:]).square().mean()


def test_training_follows_nested_autograd() -> None:
    one = double_mlp()
    other = nn.Sequential(*[copy.deepcopy(child) for child in one])
    fastmlp.revert(other)
    points = torch.rand(40, 2, dtype=torch.float64)
    losses: list[list[float]] = []
    for model, step in ((one, burgers_step), (other, nested_step)):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = step(model, points)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(*losses, strict=True):
        assert abs(a - b) <= 1e-9 * abs(b)


def captured_losses(capture: Callable[..., Any]) -> tuple[Tensor, list[Tensor], Any]:
    """Of a step, of which the model changes after 12 calls."""
    torch.manual_seed(0)
    model = fastmlp.MLP(2, [20, 20], 1, "tanh")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    @capture
    def step(points: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = burgers_step(model, points)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = [step(torch.rand(64, 2)) for _ in range(12)]
    model[1] = nn.Sigmoid()
    losses += [step(torch.rand(64, 2)) for _ in range(6)]
    return torch.stack(losses), [p.detach() for p in model.parameters()], step


def test_captured() -> None:
    """A tape calls the two operators, with the same bits, and sees when the model changes."""
    losses, parameters, _ = captured_losses(lambda function: function)
    same, others, step = captured_losses(fastmlp.capture(fuse=False))
    assert torch.equal(losses, same)
    assert all(map(torch.equal, parameters, others))
    assert (step.calls, step.replays) == (18, 14)
    called = step.report().tapes[-1].torch
    assert [called[f"fastmlp::{name}"] for name in ("derivatives", "derivatives_backward")] == [1, 1]
    fused, *_ = captured_losses(fastmlp.capture)
    torch.testing.assert_close(fused, losses)


def test_captured_where_there_are_no_kernels() -> None:
    """The composite route is recorded as operations of torch."""
    torch.manual_seed(0)
    model, points = fastmlp.MLP(2, [8], 1, "tanh", dtype=torch.bfloat16), torch.rand(16, 2, dtype=torch.bfloat16)
    step = fastmlp.capture(lambda x: derivatives(model, x, second=[0]).second, fuse=False)
    expected = derivatives(model, points, second=[0]).second
    assert all(torch.equal(step(points), expected) for _ in range(5))
    assert step.replays == 3


def test_dtypes_without_kernels() -> None:
    model = double_mlp()
    exact = derivatives(model, torch.rand(5, 2, dtype=torch.float64), second=[0])
    torch.manual_seed(0)
    low = copy.deepcopy(model).bfloat16()
    found = derivatives(low, torch.rand(5, 2, dtype=torch.bfloat16), second=[0])
    assert found.second.dtype == torch.bfloat16
    assert found.second.shape == exact.second.shape


def test_autocast() -> None:
    """As autocast has it, the products are of bfloat16."""
    model, x = double_mlp().float(), torch.rand(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivatives(model, x, second=[0])
    assert found.value.dtype == torch.bfloat16
    torch.testing.assert_close(found.second.float(), derivatives(model, x, second=[0]).second, rtol=0.1, atol=0.1)


def test_transforms() -> None:
    model, x = double_mlp(), torch.randn(6, 2, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    weights = [parameters[f"{i}.weight"] for i in (0, 2, 4)]
    biases = [parameters[f"{i}.bias"] for i in (0, 2, 4)]

    def residual(x: Tensor, *weights: Tensor) -> Tensor:
        found = functional.mlp_derivatives(x, weights, biases, ["tanh", "tanh", None], second=[1])
        return (found.first[..., 0] - found.second[..., 0]).square().sum()

    rows = torch.func.vmap(residual, in_dims=(0, None, None, None))(x, *weights)
    each = torch.stack([residual(row, *weights) for row in x])
    assert_same([rows], [each])
    by_func = torch.func.grad(residual, argnums=(0, 1, 2, 3))(x, *weights)
    leaves = [x.clone().requires_grad_(), *weights]
    assert_same(by_func, torch.autograd.grad(residual(*leaves), leaves))
    tangents = tuple(torch.ones_like(t) for t in (x, *weights))
    slope = torch.func.jvp(residual, (x, *weights), tangents)[1]
    assert_same([slope], [sum((g * t).sum() for g, t in zip(by_func, tangents, strict=True))])


def test_batched_gradients() -> None:
    model, x = double_mlp(outputs=2), torch.randn(4, 2, dtype=torch.float64)
    found = derivatives(model, x, second=[0]).second
    basis = torch.eye(found.numel(), dtype=torch.float64).reshape(-1, *found.shape)
    weight = first_weight(model)
    (batched,) = torch.autograd.grad(found, weight, basis, is_grads_batched=True, retain_graph=True)
    single = torch.stack([torch.autograd.grad(found, weight, one, retain_graph=True)[0] for one in basis])
    assert_same([batched], [single])


def test_compiled() -> None:
    model, x = double_mlp(), torch.randn(5, 2, dtype=torch.float64)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            u, first, second, _ = derivatives(self.net, x, second=[1])
            return first[..., 0] + u * first[..., 1] - 0.1 * second[..., 0]

    torch._dynamo.reset()
    found = compiled(Residual())(x)
    assert_same([found], [Residual()(x)])
    gradients = torch.autograd.grad(found.sum(), first_weight(model))
    assert_same(gradients, torch.autograd.grad(Residual()(x).sum(), first_weight(model)))


def test_meta_tensors() -> None:
    with torch.device("meta"):
        model, x = fastmlp.MLP(2, [5], 1, "tanh"), torch.zeros(7, 2)
    found = derivatives(model, x, second=[0, 1], laplacian=[0])
    assert [tuple(t.shape) for t in found if t is not None] == [(7, 1), (7, 1, 2), (7, 1, 2), (7, 1)]


def test_parameters_changed_before_backward_are_noticed() -> None:
    model = double_mlp()
    found = derivatives(model, torch.rand(3, 2, dtype=torch.float64)).first.sum()
    with torch.no_grad():
        first_weight(model).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_outputs_may_be_changed_in_place() -> None:
    model, x = double_mlp(), torch.rand(3, 2, dtype=torch.float64)
    found = derivatives(model, x, second=[0])
    for tensor in found[:3]:
        tensor.mul_(2)
    changed = torch.autograd.grad([t.sum() for t in found[:3]], first_weight(model))
    plain = derivatives(model, x, second=[0])
    assert_same(changed, torch.autograd.grad([2 * t.sum() for t in plain[:3]], first_weight(model)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"first": [2]}, IndexError, "fastmlp: first holds the axis 2, expected -2 to 1, since input has 2 features"),
        ({"second": [(0, -3)]}, IndexError, "fastmlp: second holds the axis -3"),
        ({"laplacian": [5]}, IndexError, "fastmlp: laplacian holds the axis 5"),
        ({"first": 0}, TypeError, r"fastmlp: first must be a list of axes of the input, such as \[0\], got int 0"),
        ({"second": [0.5]}, TypeError, r"fastmlp: second\[0\] must be an axis of the input, an integer, got float 0.5"),
        ({"second": [(0, 1, 1)]}, TypeError, r"fastmlp: second\[0\] must be .* a pair of them, got \(0, 1, 1\)"),
        ({"laplacian": [True]}, TypeError, r"fastmlp: laplacian\[0\] must be an axis of the input"),
        ({"input": [[0.0, 1.0]]}, TypeError, "fastmlp: input must be a torch.Tensor, got list"),
        ({"input": torch.zeros(3, 5)}, RuntimeError, "fastmlp: input has shape .3, 5., expected 2 in"),
        ({"input": torch.zeros(3, 2).double()}, RuntimeError, "fastmlp: input has dtype torch.float64"),
        ({"model": torch.tanh}, TypeError, "fastmlp: model must be a torch.nn.Module, got"),
        ({"model": nn.Linear(2, 1)}, TypeError, r"fastmlp: model \(Linear\) cannot be .* pass the one that it holds"),
        ({"model": nn.Sequential()}, TypeError, r"fastmlp: model \(Sequential\) cannot .* it has no layer"),
        ({"model": nn.Sequential(nn.Tanh(), nn.Linear(2, 1))}, TypeError, r"fastmlp: 0 \(Tanh\) cannot be"),
        ({"model": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))}, TypeError, r"fastmlp: 1 \(LayerNorm\) cannot be"),
        (
            {"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())},
            TypeError,
            "the parameters of 0 and of 1 differ in dtype or device",
        ),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": fastmlp.MLP(2, [3], 1, "tanh"), "input": torch.zeros(3, 2)} | change
    with pytest.raises(error, match=message):
        derivatives(**arguments)


def test_hooks_are_not_passed_by() -> None:
    model = double_mlp()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"fastmlp: model \(MLP\) cannot be .* it has hooks"):
        derivatives(model, torch.zeros(1, 2, dtype=torch.float64))
    model = double_mlp()
    model[2].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"fastmlp: 2 \(Linear\) cannot be .* it has hooks"):
        derivatives(model, torch.zeros(1, 2, dtype=torch.float64))


def test_slopes_of_the_specification() -> None:
    """The value is that of the activation, and the others are what torch's autograd has, also at kinks and far out."""
    z = torch.tensor([-90.0, -21.0, -3.0, -1.0, -0.0, 0.0, 0.5, 3.0, 19.5, 25.0, 90.0], dtype=torch.float64)
    assert reference.SLOPES.keys() == reference.FUNCTIONS.keys()
    for name, function in reference.FUNCTIONS.items():
        for parameters in (dict(DEFAULTS[name]), {key: 0.75 * value for key, value in DEFAULTS[name].items()}):
            leaf = z.clone().requires_grad_()
            value = function(leaf, **parameters)
            (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            second = torch.zeros_like(z)
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), leaf, materialize_grads=True)
            for ours, theirs in zip(reference.SLOPES[name](z, **parameters), (value, first, second), strict=True):
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-14, msg=name)
