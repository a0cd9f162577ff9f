"""fastmlp.optim around the arithmetic: closures, hooks, checkpoints, and parameters that only torch can update."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastmlp import optim
from tests.support.compiling import compiled
from tests.support.optimizers import checked_step, form, made, parameters, set_gradients
from tests.support.training import FUSED, OPTIMIZERS, Optimizer

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture(params=OPTIMIZERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stepped(name: str, **more: Any) -> tuple[list[nn.Parameter], Optimizer]:
    """After two steps."""
    params = parameters()
    optimizer = made(name, params, **more)
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    return params, optimizer


def test_classes(name: str) -> None:
    ours, torchs = getattr(optim, name), getattr(torch.optim, name)
    assert issubclass(ours, torchs)
    assert ours is not torchs
    params = parameters()
    assert repr(made(name, params)) == repr(made(name, params, torch.optim))
    assert made(name, params).defaults == made(name, params, torch.optim).defaults


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1},
        {"weight_decay": -1},
        {"momentum": -0.5},
        {"nesterov": True, "momentum": 0},
        {"betas": (1.0, 0.9)},
        {"eps": -1},
        {"alpha": -0.1},
        {"foreach": True, "fused": True},
        {"fused": True, "differentiable": True},
        {"lr": torch.ones(2)},
        {"lr": torch.tensor(0.1), "foreach": True},
        {"unknown": 1},
    ],
    ids=str,
)
def test_errors_are_those_of_torch(name: str, arguments: dict[str, Any]) -> None:
    outcomes: list[Any] = []
    for module in (torch.optim, optim):
        try:
            getattr(module, name)(parameters(), **arguments)
        except Exception as error:
            outcomes.append((type(error), str(error).replace("__init__", "")))
        else:
            outcomes.append((type(None), ""))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "more", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"maximize": True}], ids=str
)
def test_how_torch_would_step(name: str, more: dict[str, Any]) -> None:
    if name not in FUSED and "fused" in more:
        with pytest.raises(TypeError, match="fused"):
            made(name, parameters(), **more)
        return
    params = parameters()
    optimizer = made(name, params, **more)
    for _ in range(4):
        set_gradients(params)
        checked_step(optimizer)


def test_lr_as_a_tensor(name: str) -> None:
    params, lr = parameters(torch.float64), torch.tensor(0.1, dtype=torch.float64)
    optimizer = made(name, params, lr=lr)
    for _ in range(4):
        set_gradients(params)
        checked_step(optimizer)
        lr *= 0.7
    assert optimizer.param_groups[0]["lr"] is lr


# State.


def test_parameters_without_gradients(name: str) -> None:
    """No state, no change; their count of steps begins when they have one."""
    params = parameters()
    optimizer = made(name, params)
    before = params[1].detach().clone()
    for _ in range(2):
        set_gradients(params)
        params[1].grad = None
        checked_step(optimizer)
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    set_gradients(params)
    checked_step(optimizer)
    if name != "SGD":
        assert [optimizer.state[p]["step"].item() for p in params] == [3, 1, 3, 3]
    for p in params:
        p.grad = None
    versions = [p._version for p in params]
    optimizer.step()
    assert [p._version for p in params] == versions


def test_no_state_without_momentum() -> None:
    params = parameters()
    results = []
    for module in (torch.optim, optim):
        optimizer = module.SGD(params, lr=0.1)
        set_gradients(params)
        optimizer.step()
        results.append(form(optimizer.state_dict()))
    assert results[0] == results[1]


@pytest.mark.parametrize("way", ["ours to torch's", "torch's to ours", "ours to ours"])
def test_checkpoints(name: str, way: str) -> None:
    source, target = ({"ours": optim, "torch's": torch.optim}[side] for side in way.split(" to "))
    torch.manual_seed(0)
    params, optimizer = parameters(), None
    optimizer = made(name, params, source)
    for _ in range(3):
        set_gradients(params)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = made(name, params, target, lr=9.0)
    other.load_state_dict(torch.load(file))
    assert form(other.state_dict()) == form(optimizer.state_dict())
    for p in params:
        for key, x in optimizer.state[p].items():
            assert torch.equal(other.state[p][key], x)
    set_gradients(params)
    checked_step(other)


def test_state_is_read_afresh(name: str) -> None:
    params, optimizer = stepped(name)
    for state in optimizer.state.values():
        for key in state:
            state[key] = state[key] * 2
    set_gradients(params)
    checked_step(optimizer)
    del optimizer.state[params[0]]
    set_gradients(params)
    checked_step(optimizer)
    optimizer.state.clear()
    set_gradients(params)
    checked_step(optimizer)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(name: str, way: str) -> None:
    params, optimizer = stepped(name)
    optimizer.register_step_post_hook(nothing)
    copied: tuple[list[nn.Parameter], Optimizer]
    copied = (
        copy.deepcopy((params, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((params, optimizer)))
    )
    others, other = copied
    assert type(other) is type(optimizer)
    assert other.param_groups[0]["params"][0] is others[0]
    before = [p.detach().clone() for p in params]
    set_gradients(others)
    checked_step(other)
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))


def nothing(*args: Any) -> None: ...


def test_groups_may_be_added(name: str) -> None:
    params, optimizer = stepped(name)
    more = parameters(torch.float64)
    optimizer.add_param_group({"params": more, "lr": 0.5, "weight_decay": 0.1})
    for _ in range(2):
        set_gradients([*params, *more])
        checked_step(optimizer)


def test_version_counters(name: str) -> None:
    params, optimizer = stepped(name)
    tensors = [*params, *(x for state in optimizer.state.values() for x in state.values())]
    before = [(id(x), x.data_ptr(), x._version) for x in tensors]
    set_gradients(params)
    optimizer.step()
    after = [*params, *(x for state in optimizer.state.values() for x in state.values())]
    for x, (identity, pointer, version) in zip(after, before, strict=True):
        assert (id(x), x.data_ptr()) == (identity, pointer)
        assert x._version > version


def test_autograd_notices_a_step(name: str) -> None:
    params, optimizer = stepped(name)
    saved = [params[0], next(x for x in optimizer.state[params[0]].values() if x.dim() > 0)]
    outputs = [(torch.ones(5, 3, requires_grad=True) * x).sum() for x in saved]
    set_gradients(params)
    optimizer.step()
    for output in outputs:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


# Closures and hooks.


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "under no_grad"])
def test_closures(name: str, grad: bool) -> None:
    """Called once, with gradients enabled, before the step, which returns what they return."""
    params = parameters()
    optimizer = made(name, params)
    losses: list[Tensor] = []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(torch.stack([p.square().sum() for p in params]).sum())
        losses[-1].backward()
        return losses[-1]

    with torch.set_grad_enabled(grad):
        for call in range(5):
            loss: Any = optimizer.step(closure)
            assert loss is losses[-1]
            assert len(losses) == call + 1
            assert torch.is_grad_enabled() == grad
    assert losses[-1] < losses[0]
    assert optimizer.step() is None
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)


@pytest.mark.parametrize("to_none", [True, False, None])
def test_zero_grad(name: str, to_none: bool | None) -> None:
    params = parameters()
    params[3].requires_grad_(False)
    params[3].grad = torch.ones_like(params[3])
    optimizer = made(name, params)
    leaf = params[0] * 2
    (leaf.square().sum() + params[2]).backward(create_graph=False)
    grads = [p.grad for p in params]
    before = [None if grad is None else grad.clone() for grad in grads]
    optimizer.zero_grad(*([] if to_none is None else [to_none]))
    for p, grad, value in zip(params, grads, before, strict=True):
        if grad is None or value is None:
            assert p.grad is None
        elif to_none is False:
            assert p.grad is grad
            assert not grad.any()
        else:
            assert p.grad is None
            assert torch.equal(grad, value)


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True:UserWarning")
def test_zero_grad_of_a_gradient_with_a_graph(name: str) -> None:
    """Which is detached where it stays."""
    p = nn.Parameter(torch.ones(3))
    (p * p * p).sum().backward(create_graph=True)
    assert p.grad is not None
    assert p.grad.grad_fn is not None
    made(name, [p]).zero_grad(set_to_none=False)
    assert p.grad is not None
    assert p.grad.grad_fn is None
    assert not p.grad.any()
    p.grad = None


@pytest.mark.parametrize("everywhere", [False, True], ids=["of the optimizer", "of all"])
def test_hooks(name: str, everywhere: bool) -> None:
    params = parameters()
    optimizer = made(name, params)
    seen: list[Any] = []

    def before(given: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append((given is optimizer, "before", params[1].detach().clone()))

    def after(given: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append((given is optimizer, "after", params[1].detach().clone()))

    handles = (
        [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        if everywhere
        else [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    )
    start = params[1].detach().clone()
    set_gradients(params)
    optimizer.step()
    for handle in handles:
        handle.remove()
    set_gradients(params)
    end = params[1].detach().clone()
    optimizer.step()
    assert [entry[:2] for entry in seen] == [(True, "before"), (True, "after")]
    assert torch.equal(seen[0][2], start)
    assert torch.equal(seen[1][2], end)
    assert not torch.equal(start, end)


def test_schedulers(name: str) -> None:
    """Without warnings, which would be errors."""
    for build in (
        lambda optimizer: StepLR(optimizer, 2, 0.5),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
    ):
        params = parameters()
        optimizer = made(name, params)
        scheduler = build(optimizer)
        for _ in range(6):
            set_gradients(params)
            checked_step(optimizer)
            scheduler.step()


def test_under_the_profiler(name: str) -> None:
    params, optimizer = stepped(name)
    set_gradients(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        checked_step(optimizer)
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= names


# Models.


def test_a_convolutional_network(name: str, isa: str) -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(4 * 36), nn.Linear(4 * 36, 3)
    )
    model = model.to(memory_format=torch.channels_last)
    optimizer = made(name, model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(5, 1, 8, 8)), torch.tensor([0, 1, 2, 0, 1])).backward()
        checked_step(optimizer)


def test_a_recurrent_network(name: str) -> None:
    """Parameters of which one appears in two places."""
    model = nn.LSTM(4, 6, num_layers=2)
    tied = nn.Linear(6, 6)
    optimizer = made(name, [*model.parameters(), *tied.parameters()])
    for _ in range(3):
        optimizer.zero_grad()
        tied(tied(model(torch.randn(3, 2, 4))[0])).square().sum().backward()
        checked_step(optimizer)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model(name: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer, run = made(name, model.parameters()), compiled(model)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (run(torch.ones(3, 4)) - 1).square().mean()
        loss.backward()
        checked_step(optimizer)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradient_of_the_same_memory_as_the_parameter() -> None:
    """As in regularisation by hand: p.grad = p."""
    results = []
    for module in (torch.optim, optim):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(40))
        optimizer = module.SGD([p], lr=0.5)
        p.grad = p.detach()
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("elements", [3, 1 << 17])
def test_a_parameter_that_stands_twice(name: str, elements: int) -> None:
    """torch warns of it, and moves the parameter once after the other, each time by what the time before has left."""
    torch.manual_seed(0)
    start, grads = torch.randn(elements), [torch.randn(elements) for _ in range(3)]
    found = []
    for module in (torch.optim, optim):
        p, other = nn.Parameter(start.clone()), nn.Parameter(torch.ones(2))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = made(name, [p, other, p], module, foreach=False)
        for grad in grads:
            p.grad, other.grad = grad.clone(), torch.ones(2)
            optimizer.step()
        found.append([p.detach(), other.detach(), *(x for x in optimizer.state[p].values() if x is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
