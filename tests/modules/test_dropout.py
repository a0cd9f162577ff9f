"""Dropout in training as part of a run: torch's masks from torch's generator, and derivatives of every order."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastmlp
from fastmlp import Activation, reference
from fastmlp.activations import module_of
from fastmlp.runs import Run, parts
from tests.support.axes import ISAS
from tests.support.compiling import compiled
from tests.support.derivatives import assert_same
from tests.support.training import Loop, Maker, assert_equal_to_rounding, everything

F64 = torch.float64


def chain(*layers: nn.Module) -> Callable[[], nn.Sequential]:
    return lambda: nn.Sequential(*copy.deepcopy(layers))


#: Four features become three, each model by one run.
MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "behind activations": chain(
        nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 3)
    ),
    "of a kept pre-activation": chain(
        nn.Linear(4, 9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, 5), nn.SiLU(), nn.Dropout(0.3), nn.Linear(5, 3)
    ),
    "without activations": chain(nn.Linear(4, 9), nn.Dropout(0.5), nn.Linear(9, 3, bias=False)),
    "last": chain(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3), nn.Dropout(0.4)),
    "last, behind an activation": chain(nn.Linear(4, 9), nn.ELU(), nn.Linear(9, 3), nn.Sigmoid(), nn.Dropout(0.4)),
    "last, of a kept pre-activation": chain(nn.Linear(4, 3), nn.GELU(), nn.Dropout(0.4)),
    "one layer": chain(nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.4)),
    "all and nothing": chain(
        nn.Linear(4, 9), nn.Dropout(1.0), nn.Linear(9, 5), nn.Dropout(0.0), nn.Tanh(), nn.Dropout(1), nn.Linear(5, 3)
    ),
    "in place": chain(
        nn.Linear(4, 9), nn.Dropout(0.5, inplace=True), nn.Linear(9, 5), nn.GELU(), nn.Dropout(0.5, True),
        nn.Linear(5, 3), nn.Dropout(0.5, inplace=True),
    ),
    "wide": chain(
        nn.Linear(4, 300), nn.ReLU(), nn.Dropout(0.5), nn.Linear(300, 280), nn.GELU(), nn.Dropout(0.3),
        nn.Linear(280, 3), nn.Dropout(0.1),
    ),
    "narrow, wide and narrow": chain(
        nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 200), nn.Dropout(0.5), nn.Linear(200, 190),
        nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(190, 9), nn.SiLU(), nn.Dropout(0.5), nn.Linear(9, 3),
    ),
}  # fmt: skip


@pytest.fixture(params=list(MODELS))
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Sequential]:
    return MODELS[request.param]


def both(make: Callable[[], nn.Sequential], dtype: torch.dtype = F64) -> tuple[nn.Sequential, Any]:
    """A model of torch's, and ours of the same children, which are one run."""
    plain = make().to(dtype)
    ours = fastmlp.Sequential(*plain)
    assert [type(part) for part in parts(ours._modules)] == [Run]
    return plain, ours


def results(model: nn.Module, x: Tensor, weight: Tensor | None = None) -> list[Tensor | None]:
    """The output, gradients of everything, second derivatives, and where the generator stands."""
    torch.manual_seed(7)
    output = model(x)
    after = torch.rand(3, dtype=F64)
    wanted = [x, *model.parameters()]
    loss = output.pow(3).sum() if weight is None else (output * weight).sum()
    first = grad(loss, wanted, retain_graph=True)
    again = grad(output.pow(3).sum(), wanted, create_graph=True)
    second = grad(torch.stack([g.pow(2).sum() for g in again]).sum(), wanted, allow_unused=True)
    return [after, output, *first, *again, *second]


def nodes_of(output: Tensor) -> list[str]:
    assert output.grad_fn is not None
    return [output.grad_fn.name(), *(node.name() for node, _ in output.grad_fn.next_functions if node is not None)]


@pytest.mark.parametrize("shape", [(7, 4), (4,), (2, 3, 4), (70, 4), (0, 4)], ids=str)
def test_everything_is_as_in_torch(isa: str, make: Callable[[], nn.Sequential], shape: tuple[int, ...]) -> None:
    plain, ours = both(make)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    weight = torch.randn(3, shape[0], dtype=F64).t() if len(shape) == 2 else None
    if not any(getattr(child, "inplace", False) for child in plain):
        assert_same(results(ours, x, weight), results(plain, x, weight))
    torch.manual_seed(7)
    output = ours(x)
    assert "FusedNetwork" in nodes_of(output)[0]
    assert set(nodes_of(output)[1:]) == {"torch::autograd::AccumulateGrad"}
    state = torch.get_rng_state()
    torch.manual_seed(7)
    expected = plain(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same([output, *grad(output.sum(), ours.parameters())], [expected, *grad(expected.sum(), ours.parameters())])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.manual_seed(7)
            assert_same([ours(x)], [expected])
            assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 2**-53, 1.0, 1, True])
def test_bits_of_what_is_kept(dtype: torch.dtype, p: float) -> None:
    """Of a layer that passes its input on, every element is the input times what torch multiplies with."""
    layer = nn.Linear(11, 11, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(11, dtype=dtype))
    x = torch.randn(500, 11, dtype=dtype)
    torch.manual_seed(3)
    found = fastmlp.Sequential(layer, nn.Dropout(p))(x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(found, nn.functional.dropout(x, p))
    assert torch.equal(torch.get_rng_state(), state)
    (gradient,) = grad(found.sum(), [layer.weight], retain_graph=True)
    (again,) = grad(found.sum(), [layer.weight])
    assert torch.equal(gradient, again)


def test_every_activation(activation: Activation) -> None:
    act = module_of(activation)
    plain, ours = both(lambda: nn.Sequential(nn.Linear(4, 6), act, nn.Dropout(0.4), nn.Linear(6, 3), act, nn.Dropout()))
    x = torch.randn(6, 4, dtype=F64, requires_grad=True)
    assert_same(results(ours, x), results(plain, x))


def test_special_values() -> None:
    """What is dropped is multiplied by zero, so that no NaN and no infinity vanishes."""
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
    x = torch.tensor([float("nan"), float("inf"), -1.0]).diag_embed().sum(0).expand(64, 3)
    for p in (0.5, 1.0):
        models = [kind(nn.Linear(3, 3), nn.Dropout(p)) for kind in (nn.Sequential, fastmlp.Sequential)]
        found = []
        for model in models:
            model[0] = layer
            torch.manual_seed(1)
            found.append(model(x))
        assert torch.equal(found[0].isnan(), found[1].isnan())
        assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


def test_derivatives_by_differences(make: Callable[[], nn.Sequential]) -> None:
    _, ours = both(make)
    if sum(p.numel() for p in ours.parameters()) > 1000:
        ours = fastmlp.Sequential(
            nn.Linear(4, 5), nn.Softplus(), nn.Dropout(0.3), nn.Linear(5, 3), nn.Dropout()
        ).double()
    names = [name for name, _ in ours.named_parameters()]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        torch.manual_seed(2)
        return functional_call(ours, dict(zip(names, tensors, strict=True)), (x,))

    inputs = [torch.randn(3, 4, dtype=F64, requires_grad=True), *ours.parameters()]
    assert gradcheck(function, inputs, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


def test_only_some_gradients(make: Callable[[], nn.Sequential]) -> None:
    plain, ours = both(make)
    if any(getattr(child, "inplace", False) for child in plain):
        plain, ours = both(MODELS["last"])
    x = torch.randn(6, 4, dtype=F64)
    # Of many parameters not all subsets.
    subsets = range(2 ** len(list(plain.parameters())))
    for i in subsets if len(subsets) <= 64 else random.Random(1).sample(subsets, 64):
        for j, parameter in enumerate(plain.parameters()):
            parameter.requires_grad_(bool(i >> j & 1))
        wanted = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        found = []
        for model in (ours, plain):
            torch.manual_seed(1)
            output = model(x)
            assert output.requires_grad == bool(wanted)
            found.append([output, *(grad(output.pow(2).sum(), wanted) if wanted else [])])
        assert_same(*found)


def test_probability_and_mode_are_read_at_each_call() -> None:
    plain, ours = both(MODELS["behind activations"])
    x = torch.randn(40, 4, dtype=F64)
    for p, training in ((0.5, True), (0.1, True), (0.0, True), (1.0, True), (0.7, False), (0.7, True)):
        ours.train(training)
        ours[2].p = p
        found = []
        for model in (ours, plain):
            torch.manual_seed(1)
            found.append(model(x))
        assert_same(found[:1], found[1:])


@pytest.mark.parametrize("name", ["narrow, wide and narrow", "last, behind an activation"])
def test_fifty_steps(name: str) -> None:
    """A converted model by the usual loop ends where the model that is not converted does; masks included."""

    def scenario(make: Maker) -> dict[str, Tensor]:
        model: nn.Module = MODELS[name]().double()
        # assert_equal_to_rounding asks for a loop and for what stands beside it.
        model = model if make is Loop else fastmlp.convert(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        step = Loop(model, nn.MSELoss(), optimizer)
        seen = []
        for _ in range(50):
            x, y = torch.randn(9, 4, dtype=F64), torch.randn(9, 3, dtype=F64)
            seen.append(torch.stack([step(x, y), torch.rand((), dtype=F64)]))
        return {"losses and generator": torch.stack(seen), **everything(model, optimizer)}

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    plain, ours = both(MODELS["behind activations"])
    x = torch.randn(6, 4, dtype=F64, requires_grad=True)
    found = []
    for model in (ours, plain):
        torch.manual_seed(1)
        output = checkpoint(model, x, use_reentrant=reentrant)
        for parameter in plain.parameters():
            parameter.grad = None
        output.pow(2).sum().backward()
        gradients = [p.grad for p in plain.parameters()]
        found.append([output, *gradients, torch.rand(1, dtype=F64)])
    assert_same(*found)


@pytest.mark.parametrize("pack", [lambda t: t.clone(), lambda t: t.t().contiguous().t(), lambda t: t.repeat(1, 2)])
def test_saved_tensors_may_be_packed(make: Callable[[], nn.Sequential], pack: Callable[[Tensor], Tensor]) -> None:
    plain, ours = both(make)
    x = torch.randn(6, 4, dtype=F64)
    found = []
    for model in (ours, plain):
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (pack(t), t.shape) if t.dim() == 2 else (t, None),
            lambda packed: packed[0] if packed[1] is None else packed[0][:, : packed[1][1]],
        ):
            output = model(x)
            found.append([output, *grad(output.pow(2).sum(), list(plain.parameters()))])
    assert_same(*found)


def test_masks_that_hooks_replace_are_refused() -> None:
    _, ours = both(MODELS["one layer"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:2] if t.dtype == torch.uint8 else t):
        output = ours(torch.randn(6, 4, dtype=F64))
        with pytest.raises(RuntimeError, match=r"fastmlp: saved\[0\] has shape \[2, 3\], expected leading dimensions"):
            output.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.float() if t.dtype == torch.uint8 else t):
        output = ours(torch.randn(6, 4, dtype=F64))
        with pytest.raises(
            RuntimeError, match=r"saved\[0\] has dtype torch.float32, expected torch.uint8, of what drop"
        ):
            output.sum().backward()


def test_transforms_call_the_module() -> None:
    plain, ours = both(MODELS["behind activations"])
    x, t = torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)
    for function in (
        lambda model: vmap(model, randomness="different")(x),
        lambda model: vmap(model, randomness="same")(x),
        lambda model: torch.stack(jvp(model, (x,), (t,))),
        lambda model: functional_call(model, {"0.bias": torch.ones(9, dtype=F64)}, (x,)),
    ):
        found = []
        for model in (ours, plain):
            torch.manual_seed(1)
            found.append(function(model))
        assert_same(found[:1], found[1:])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(ours)(x)


def test_autocast_and_other_dtypes_call_the_module() -> None:
    for dtype, context in (
        (torch.float32, torch.autocast("cpu", torch.bfloat16)),
        (torch.bfloat16, torch.autocast("cpu", enabled=False)),
    ):
        plain = MODELS["behind activations"]().to(dtype)
        ours = fastmlp.Sequential(*plain)
        x = torch.randn(60, 4, dtype=dtype)
        found = []
        for model in (ours, plain):
            torch.manual_seed(1)
            with context:
                output = model(x)
            found.append([output == 0, torch.rand(3)])
            assert output.dtype == torch.bfloat16
        # What is dropped is the same; other elements are rounded to sixteen bits, at other places than in torch.
        assert torch.equal(found[0][1], found[1][1])
        entry = fastmlp.explain(fastmlp.Sequential(*ours), x)
        assert entry.name == ("children" if dtype == torch.bfloat16 else "direct")
        with context:
            assert fastmlp.explain(fastmlp.Sequential(*ours), x).name == "children"
    assert "which layers do not compute on CPU in torch.bfloat16" in fastmlp.explain(ours, x).reason


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_dynamo_calls_the_module() -> None:
    torch._dynamo.reset()
    plain, ours = both(MODELS["behind activations"])
    x = torch.randn(6, 4, dtype=F64)
    run = compiled(ours)
    found = []
    for model in (run, plain):
        torch.manual_seed(1)
        output = model(x)
        found.append([output, *grad(output.pow(2).sum(), list(plain.parameters()))])
    assert_same(*found)


def test_traces() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.drop = nn.Linear(4, 9), nn.Linear(9, 3), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.drop(torch.relu(self.first(x))))

    plain = Net().double()
    traced = fastmlp.convert(plain, trace=True)
    assert repr(fastmlp.fusion_report(traced)) == "fused  first + relu + drop + second"
    x = torch.randn(6, 4, dtype=F64, requires_grad=True)
    assert_same(results(traced, x), results(plain, x))


def test_reports() -> None:
    ours = fastmlp.Sequential(
        nn.Dropout(), nn.Linear(4, 3), nn.Dropout(), nn.ReLU(), nn.Linear(3, 3), nn.Dropout(), nn.Dropout(),
        nn.Linear(3, 3), nn.ReLU(), nn.Dropout(inplace=True),
    )  # fmt: skip
    assert repr(fastmlp.fusion_report(ours)) == (
        "fused  1 + 2\nkept   3: a Dropout in training mode precedes it\nfused  4 + 5\nfused  7 + 8"
    )
    reasons = fastmlp.explain(ours, torch.zeros(2, 4)).reason.split("; ")
    assert reasons == [
        "0: Dropout is in training mode, and no layer that is fused precedes it",
        "3: a Dropout in training mode precedes it",
        "6: Dropout is in training mode, and the layer before it drops already",
        "9: Dropout is in training mode, and would change in place what an activation keeps for backward",
    ]


def test_attributes_that_only_the_module_refuses_or_reads() -> None:
    for name, value, error in (("p", 1.5, ValueError), ("p", float("nan"), None), ("p", "half", TypeError)):
        ours = fastmlp.Sequential(nn.Linear(4, 3), nn.Dropout())
        setattr(ours[1], name, value)
        assert len(parts(ours._modules)) == 2
        if error is not None:
            with pytest.raises(error):
                ours(torch.zeros(2, 4))
    ours = fastmlp.Sequential(nn.Linear(4, 3), nn.Dropout())
    setattr(ours[1], "training", 1)  # noqa: B010  (no mode that torch's own code sets, nor its types allow)
    assert len(parts(ours._modules)) == 2
    with pytest.raises(TypeError, match="must be bool, not int"):
        ours(torch.zeros(2, 4))


def test_the_specification_drops() -> None:
    """`reference.mlp` with what torch multiplies with is torch's Dropout."""
    plain = MODELS["without activations"]().double()
    x = torch.randn(5, 4, dtype=F64)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    noise = torch.empty(5, 9, dtype=F64).bernoulli_(0.5) / 0.5
    first, bias, second = plain.parameters()
    assert_same([reference.mlp(x, [first, second], [bias, None], [("identity", {})] * 2, [noise, None])], [expected])
