"""What TrainStep does as the loop does: schedulers, hooks, gradients, and changes between calls."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastmlp
from tests.support.axes import ISAS
from tests.support.rounding import Results
from tests.support.steps import F64, batch, gradients_left_behind, losses, network, sgd
from tests.support.training import FUSED, OPTIMIZERS, Loop, Maker, Optimizer, assert_equal_to_rounding, everything

pytestmark = pytest.mark.usefixtures("as_before")


def module_of(make: Maker) -> Any:
    """Ours step with our optimizers."""
    return torch.optim if make is Loop else fastmlp.optim


# Schedulers and options of optimizers.

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, T_max=6),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=10),  # betas and momentum too
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_schedulers(name: str, kind: str) -> None:
    """Also without a warning that steps are called in a wrong order, which would be an error."""

    def scenario(make: Maker) -> Results:
        model = network()
        arguments = {"lr": 0.05} | ({"momentum": 0.9} if kind == "SGD" else {})
        optimizer: Optimizer = getattr(module_of(make), kind)(model.parameters(), **arguments)
        scheduler = SCHEDULERS[name](optimizer)
        step = make(model, nn.MSELoss(), optimizer)
        found, rates = [], []
        for _ in range(6):
            found.append(step(*batch()))
            scheduler.step(*([found[-1]] if name == "ReduceLROnPlateau" else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        assert len(set(rates)) > 1
        return {"losses": torch.stack(found), "rates": torch.tensor(rates)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


def lr_as_tensor(make: Maker, optimizer: Callable[..., Optimizer]) -> Results:
    model, rate = network(), torch.tensor(0.05, dtype=F64)
    made = optimizer(model.parameters(), lr=rate)
    step = make(model, nn.MSELoss(), made)
    first = losses(step)
    rate.mul_(0.3)
    return {"first": first, "second": losses(step)} | everything(model, made)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_lr_as_a_tensor(kind: str) -> None:
    """Read afresh at each call, since it may be changed in place."""
    assert_equal_to_rounding(lambda make: lr_as_tensor(make, getattr(module_of(make), kind)), ISAS)


def test_numbers_of_other_types() -> None:
    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = module_of(make).SGD(model.parameters(), lr=1, momentum=0, weight_decay=False)
        step = make(model, nn.MSELoss(), optimizer, max_norm=1)
        return {"losses": losses(step)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("arguments", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_how_torch_would_step(kind: str, arguments: dict[str, bool]) -> None:
    if kind not in FUSED and "fused" in arguments:
        return

    def scenario(make: Maker) -> Results:
        model = network()
        extra = {"amsgrad": True} if kind.startswith("Adam") else {"momentum": 0.9}
        # torch's fused kernels are no operations that `Rounding` knows.
        how = {} if make is Loop and "fused" in arguments else arguments
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, weight_decay=0.1, **extra, **how)
        return {"losses": losses(make(model, nn.MSELoss(), optimizer))} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


# What is changed between calls.


def replace_parameter(model: Any, optimizer: Optimizer) -> None:
    """The optimizer keeps the old one, which has no gradient any more."""
    model[2].weight = nn.Parameter(torch.randn(5, 9, dtype=F64))


def replace_child(model: Any, optimizer: Optimizer) -> None:
    model[4] = nn.Linear(5, 3, dtype=F64)
    optimizer.add_param_group({"params": model[4].parameters(), "lr": 0.2, "weight_decay": 0.1})


def other_width(model: Any, optimizer: Optimizer) -> None:
    model[0], model[2] = nn.Linear(6, 17, dtype=F64), nn.Linear(17, 5, bias=False, dtype=F64)
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[2].parameters()]})


def more_children(model: Any, optimizer: Optimizer) -> None:
    model.append(nn.Sigmoid())
    model.append(nn.Linear(3, 3, dtype=F64))


def other_activation(model: Any, optimizer: Optimizer) -> None:
    model[1] = nn.SiLU()


def load(model: Any, optimizer: Optimizer) -> None:
    model.load_state_dict(network().state_dict())


def load_by_assignment(model: Any, optimizer: Optimizer) -> None:
    """New parameters, which the optimizer does not have."""
    model.load_state_dict(network().state_dict(), assign=True)


def load_optimizer(model: Any, optimizer: Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.02
    state["state"][1]["momentum_buffer"] *= 2
    optimizer.load_state_dict(state)


def other_memory(model: Any, optimizer: Optimizer) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def transposed_memory(model: Any, optimizer: Optimizer) -> None:
    model[2].weight.data = model[2].weight.data.t().contiguous().t()


def without_state(model: Any, optimizer: Optimizer) -> None:
    optimizer.state.clear()


def some_without_state(model: Any, optimizer: Optimizer) -> None:
    del optimizer.state[model[2].weight]


def freeze(model: Any, optimizer: Optimizer) -> None:
    for p in (model[0].weight, model[0].bias, model[2].bias):
        p.requires_grad_(False)


def freeze_all_but_one(model: Any, optimizer: Optimizer) -> None:
    model.requires_grad_(False)
    model[2].weight.requires_grad_()


def other_options(model: Any, optimizer: Optimizer) -> None:
    optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.1, nesterov=True, lr=0.01)


def no_momentum(model: Any, optimizer: Optimizer) -> None:
    optimizer.param_groups[0].update(momentum=0, maximize=True)


def new_group(model: Any, optimizer: Optimizer) -> None:
    """One parameter goes to a group of its own."""
    (bias,) = (p for p in optimizer.param_groups[0]["params"] if p is model[4].bias)
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not bias]
    optimizer.add_param_group({"params": [bias], "lr": 0.001, "momentum": 0.3})


def evaluation(model: Any, optimizer: Optimizer) -> None:
    model.eval()


CHANGES: list[Callable[[Any, Optimizer], None]] = [
    replace_parameter,
    load,
    load_by_assignment,
    load_optimizer,
    other_memory,
    transposed_memory,
    without_state,
    some_without_state,
    freeze,
    freeze_all_but_one,
    other_options,
    no_momentum,
    new_group,
    gradients_left_behind,
    evaluation,
]


#: Other modules in place of those that the step was made of.
EXCHANGES = [replace_child, other_width, more_children, other_activation]


@pytest.mark.parametrize("change", [*CHANGES, *EXCHANGES], ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}], ids=str)
def test_changes_between_calls(change: Callable[[Any, Optimizer], None], options: dict[str, Any]) -> None:
    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = module_of(make).SGD(model.parameters(), lr=0.05, momentum=0.9)
        step = make(model, nn.MSELoss(), optimizer, **options)
        first = losses(step)
        change(model, optimizer)
        return {"first": first, "second": losses(step)} | everything(model, optimizer)

    if change in EXCHANGES:
        right_or_refused(scenario, "modules")
    else:
        assert_equal_to_rounding(scenario, ISAS[-1:])


def test_a_loss_that_is_changed() -> None:
    def scenario(make: Maker) -> Results:
        model, loss_fn = network(), nn.HuberLoss()
        optimizer = sgd(model.parameters())
        step = make(model, loss_fn, optimizer)
        first = losses(step)
        loss_fn.delta, loss_fn.reduction = 0.2, "sum"
        return {"first": first, "second": losses(step)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS[-1:])


def test_dtypes_may_change() -> None:
    model = network(torch.float32)
    optimizer = sgd(model.parameters(), momentum=0)
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    assert step(*batch(torch.float32)).dtype == torch.float32
    model.double()
    assert step(*batch()).dtype == F64
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {F64}


# Parameters that the model and the optimizer do not share.


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"clip_value": 0.01}], ids=str)
def test_a_parameter_that_the_optimizer_lacks(options: dict[str, Any], accumulate: int) -> None:
    """It gets a gradient, which zero_grad of the optimizer does not know: it is added to at each call."""

    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = module_of(make).AdamW([p for p in model.parameters() if p is not model[2].weight])
        step = make(model, nn.MSELoss(), optimizer, accumulate=accumulate, **options)
        return {"losses": losses(step, 7)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


def test_a_parameter_that_the_model_lacks() -> None:
    """Without a gradient it stays as it is, without state."""

    def scenario(make: Maker) -> Results:
        model, other = network(), nn.Parameter(torch.randn(3, dtype=F64))
        optimizer = module_of(make).AdamW([other, *model.parameters()])
        step = make(model, nn.MSELoss(), optimizer)
        found = {"losses": losses(step)} | everything(model, optimizer)
        assert other.grad is None
        assert other not in optimizer.state
        return found

    assert_equal_to_rounding(scenario, ISAS)


def right_or_refused(scenario: Callable[[Maker], Results], name: str) -> None:
    """As the loop, or an error that names what is in the way."""
    try:
        scenario(fastmlp.TrainStep)
    except (TypeError, RuntimeError) as error:
        assert str(error).startswith("fastmlp: ")  # noqa: PT017
        assert name in str(error)  # noqa: PT017
    else:
        assert_equal_to_rounding(scenario, ISAS)


def test_a_parameter_that_the_model_lacks_with_a_gradient() -> None:
    def scenario(make: Maker) -> Results:
        model, other = network(), nn.Parameter(torch.randn(3, dtype=F64))
        other.grad = torch.ones_like(other)
        optimizer = torch.optim.AdamW([other, *model.parameters()])
        step = make(model, nn.MSELoss(), optimizer)
        return {"losses": losses(step)} | everything(model, optimizer)

    right_or_refused(scenario, "optimizer")


def test_tied_weights() -> None:
    def scenario(make: Maker) -> Results:
        model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        model[2].weight = model[0].weight
        optimizer = sgd(model.parameters())
        return {"losses": losses(make(model, nn.MSELoss(), optimizer))} | everything(model, optimizer)

    right_or_refused(scenario, "weight")


def test_a_layer_that_occurs_twice() -> None:
    def scenario(make: Maker) -> Results:
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 3)).double()
        optimizer = sgd(model.parameters())
        return {"losses": losses(make(model, nn.MSELoss(), optimizer))} | everything(model, optimizer)

    right_or_refused(scenario, "weight")


def test_an_input_that_requires_a_gradient() -> None:
    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = sgd(model.parameters())
        step, (input, target) = make(model, nn.MSELoss(), optimizer), batch()
        input.requires_grad_()
        loss = step(input, target)
        return {"loss": loss, "input": input.grad if input.grad is not None else torch.zeros(())}

    right_or_refused(scenario, "input")


@pytest.mark.parametrize("left", [False, True])
def test_frozen_parameters_are_left_alone(left: bool) -> None:
    """Their gradient, if somebody left one, is cleared as zero_grad does."""
    model = network()
    for p in (model[0].weight, model[4].bias):
        p.requires_grad_(False)
        p.grad = torch.ones_like(p) if left else None
    before = {p: (p.detach().clone(), p._version) for p in model.parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    losses(fastmlp.TrainStep(model, nn.MSELoss(), optimizer))
    for p, (value, version) in before.items():
        assert torch.equal(p, value)
        assert p._version == version
        assert p.grad is None
        assert p not in optimizer.state


# Hooks.


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["of the optimizer", "of all"])
def test_hooks_of_the_step(kind: str, everywhere: bool) -> None:
    """They see gradients and parameters where the loop shows them, and may change gradients."""

    def scenario(make: Maker) -> Results:
        model, seen = network(), []
        optimizer = getattr(module_of(make), kind)(model.parameters(), lr=0.05)
        step = make(model, nn.MSELoss(), optimizer)

        def before(given: Optimizer, args: Any, kwargs: Any) -> None:
            assert given is optimizer
            seen.append(everything(model, given))
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= 0.5

        def after(given: Optimizer, args: Any, kwargs: Any) -> None:
            assert given is optimizer
            seen.append(everything(model, given))

        handles = (
            [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
            if everywhere
            else [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        )
        found = losses(step, 3)
        for handle in handles:
            handle.remove()
        assert len(seen) == 6
        losses(step, 1)
        assert len(seen) == 6
        snapshots = {f"{i} {name}": x for i, results in enumerate(seen) for name, x in results.items()}
        return {"losses": found} | snapshots | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS[-1:])


def test_hooks_run_only_when_a_step_is_made() -> None:
    model, seen = network(), []
    optimizer = sgd(model.parameters())
    optimizer.register_step_post_hook(lambda *args: seen.append(1))
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer, accumulate=3)
    counts = []
    for _ in range(7):
        step(*batch())
        counts.append(len(seen))
    assert counts == [0, 0, 1, 1, 1, 2, 2]


def test_under_the_profiler() -> None:
    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = module_of(make).AdamW(model.parameters())
        step = make(model, nn.MSELoss(), optimizer)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = losses(step, 2)
        assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}
        return {"losses": found} | everything(model, optimizer)

    expected, found = (scenario(make) for make in (Loop, fastmlp.TrainStep) if torch.manual_seed(0))
    assert list(found) == list(expected)
    torch.manual_seed(0)
    model = network()
    optimizer = fastmlp.optim.AdamW(model.parameters())
    plain = losses(fastmlp.TrainStep(model, nn.MSELoss(), optimizer), 2)
    assert torch.equal(found["losses"], plain)


# Accumulation.


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"clip_value": 1e-2}], ids=str)
def test_accumulation(options: dict[str, Any]) -> None:
    """Batches of different sizes; parameters stay until the last of them."""

    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = module_of(make).AdamW(model.parameters())
        step = make(model, nn.MSELoss(), optimizer, accumulate=3, **options)
        found: dict[str, Tensor] = {}
        for call, rows in enumerate([8, 3, 1, 5, 5, 2, 4]):
            found |= {f"{call} loss": step(*batch(rows=rows))}
            found |= {f"{call} {name}": x for name, x in everything(model, optimizer).items()}
        return found

    assert_equal_to_rounding(scenario, ISAS)


def test_leading_dimensions_and_layouts() -> None:
    """Strided, expanded and transposed inputs and targets."""
    shapes: Sequence[tuple[int, ...]] = [(), (1,), (4,), (2, 3), (2, 1, 3)]

    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = sgd(model.parameters())
        step, found = make(model, nn.MSELoss(), optimizer), []
        for shape in shapes:
            x, y = torch.randn(*shape, 12, dtype=F64)[..., ::2], torch.randn(*shape, 3, 2, dtype=F64)[..., 1]
            found.append(step(x, y))
            if shape:
                found.append(step(x.transpose(0, -2).contiguous().transpose(0, -2), y))
                found.append(step(x[:1].expand(x.shape), y[..., :1].expand(y.shape)))
        return {"losses": torch.stack(found)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)
