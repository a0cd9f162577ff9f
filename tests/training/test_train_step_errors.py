"""What TrainStep refuses, by name: when it is made, and at a call before anything is written."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastmlp
from tests.support.small import OwnLinear
from tests.support.steps import ERRORS, explain, make, refused, snapshot, unchanged


class OwnSGD(torch.optim.SGD):
    """Whoever derives from an optimizer may step otherwise."""


class OwnLoss(nn.MSELoss):
    """As above."""


class Doubled(nn.Module):
    """Not one chain: the first layer's output is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(y) + y


def network(*more: nn.Module) -> Any:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), *more, nn.Linear(5, 3))


def sgd(model: nn.Module, **arguments: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | arguments))


def with_hook(register: Callable[[Any], Any]) -> Any:
    model = network()
    register(model)
    return model


def with_gradient(p: nn.Parameter) -> nn.Parameter:
    p.grad = torch.ones_like(p)
    return p


def nothing(*args: Any) -> None: ...


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "alpha dropout": (lambda: network(nn.AlphaDropout(0.1)), "AlphaDropout"),
    "alpha dropout in eval mode": (lambda: network(nn.AlphaDropout(0.1)).eval(), "AlphaDropout"),
    "dropout in place": (lambda: network(nn.Dropout(0.1, inplace=True)), "Dropout.* in place"),
    "layer norm": (lambda: network(nn.LayerNorm(5)), "LayerNorm"),
    "convolution": (lambda: nn.Conv1d(4, 3, 1), "Conv1d"),
    "own layer": (lambda: network(OwnLinear(5, 5)), "OwnLinear"),
    "not a chain": (Doubled, "Doubled|fc1|chain"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
        "ParametrizedLinear|parametriz",
    ),
    "forward hook": (lambda: with_hook(lambda m: m[1].register_forward_hook(nothing)), "hook"),
    "forward pre-hook": (lambda: with_hook(lambda m: m[0].register_forward_pre_hook(nothing)), "hook"),
    "backward hook": (lambda: with_hook(lambda m: m[2].register_full_backward_hook(nothing)), "hook"),
    "hook of the model": (lambda: with_hook(lambda m: m.register_forward_hook(nothing)), "hook"),
    "hook of a parameter": (lambda: with_hook(lambda m: m[2].weight.register_hook(nothing)), "hook"),
    "replaced forward": (lambda: with_hook(lambda m: setattr(m[2], "forward", nothing)), "forward"),
    "bfloat16": (lambda: network().bfloat16(), "(?i)bfloat16"),
    "complex": (lambda: nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64)), "(?i)complex"),
    "meta": (lambda: network().to("meta"), "meta"),
    "mixed dtypes": (lambda: with_hook(lambda m: m[2].double()), "(?i)dtype|double|float64"),
    "no layers": (lambda: nn.Sequential(), "(?i)sequential|layer|model"),
}
LOSSES: dict[str, tuple[Callable[[], Any], str]] = {
    "own loss": (OwnLoss, "OwnLoss"),
    "another loss": (nn.SoftMarginLoss, "SoftMarginLoss"),
    "a function": (lambda: nn.functional.soft_margin_loss, "the function soft_margin_loss"),
    "no reduction": (lambda: nn.MSELoss(reduction="none"), "reduction"),
    "weight of BCE": (lambda: nn.BCEWithLogitsLoss(weight=torch.ones(3)), "weight"),
    "hook of the loss": (lambda: hooked(nn.MSELoss()), "hook"),
}
OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "own optimizer": (lambda model: OwnSGD(model.parameters(), lr=0.1), "OwnSGD"),
    "LBFGS": (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS"),
    "Rprop": (lambda model: torch.optim.Rprop(model.parameters()), "Rprop"),
    "NAdam": (lambda model: torch.optim.NAdam(model.parameters()), "NAdam"),
    "no optimizer": (lambda model: None, "optimizer"),
}


def hooked(loss_fn: nn.Module) -> nn.Module:
    loss_fn.register_forward_hook(nothing)
    return loss_fn


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    isa = fastmlp.get_isa()
    yield
    fastmlp.set_isa(isa)


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str) -> None:
    build, text = MODELS[case]
    model = build()
    parameters = list(model.parameters()) or [nn.Parameter(torch.zeros(1))]
    refused(model, nn.MSELoss(), torch.optim.SGD(parameters, lr=0.1), text)


@pytest.mark.parametrize("case", LOSSES)
def test_losses(case: str) -> None:
    build, text = LOSSES[case]
    model = network()
    refused(model, build(), sgd(model), text)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_optimizers(case: str) -> None:
    build, text = OPTIMIZERS[case]
    model = network()
    refused(model, nn.MSELoss(), build(model), text)


def test_no_model() -> None:
    refused(torch.relu, nn.MSELoss(), sgd(network()), "model|relu")  # type: ignore[arg-type]


def test_every_reason_is_given() -> None:
    """Not only the first."""
    model = network(nn.LayerNorm(5), nn.AlphaDropout(0.5))
    text = " ".join(explain(model, OwnLoss(), OwnSGD(model.parameters(), lr=0.1)))
    for word in ("LayerNorm", "AlphaDropout", "OwnLoss", "OwnSGD"):
        assert word in text


#: Of the refused models, losses and optimizers those of which the loop is right as it is.
BEYOND = {
    *("alpha dropout in eval mode", "alpha dropout", "layer norm", "own layer", "not a chain", "parametrized"),
    *("own loss", "another loss", "a function", "weight of BCE", "own optimizer", "Rprop", "NAdam"),
}


@pytest.mark.parametrize("case", sorted(BEYOND))
def test_capture_is_named_and_takes_the_loop(case: str) -> None:
    def state(captured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = MODELS[case][0]() if case in MODELS else network()
        loss_fn = LOSSES[case][0]() if case in LOSSES else nn.MSELoss()
        optimizer = OPTIMIZERS[case][0](model) if case in OPTIMIZERS else sgd(model)
        *_, last = explain(model, loss_fn, optimizer)
        assert last.startswith("fastmlp.capture takes loops of any kind")
        refused(model, loss_fn, optimizer, r"; fastmlp\.capture takes .* decorate it with @fastmlp\.capture$")

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        function = fastmlp.capture(step, fuse=False) if captured else step
        width = 5 if case == "not a chain" else 3
        found = [function(torch.randn(6, 4), torch.randn(6, width)) for _ in range(5)]
        if isinstance(function, fastmlp.Captured):
            assert function.replays == 3
        return [*found, *(p.detach() for p in model.parameters())]

    assert all(map(torch.equal, state(False), state(True)))


@pytest.mark.parametrize("case", sorted({"mixed dtypes", "no layers", "meta", "no reduction", "LBFGS", "no optimizer"}))
def test_capture_is_not_named_for_mistakes(case: str) -> None:
    model = MODELS[case][0]() if case in MODELS else network()
    loss_fn = LOSSES[case][0]() if case in LOSSES else nn.MSELoss()
    if case in OPTIMIZERS:
        optimizer = OPTIMIZERS[case][0](model)
    else:
        optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    assert "capture" not in " ".join(explain(model, loss_fn, optimizer))


def test_nothing_to_explain() -> None:
    middles = (nn.Dropout(0.0), nn.Dropout(0.5), nn.Identity(), nn.BatchNorm1d(5), nn.Tanh())
    for model in (network(), *map(network, middles), network(nn.Dropout(0.5, inplace=True)).eval()):
        assert explain(model, nn.MSELoss(), sgd(model)) == ()
        make(model, nn.MSELoss(), sgd(model))


def test_global_hooks() -> None:
    model = network()
    optimizer = sgd(model)
    step = make(model, nn.MSELoss(), optimizer)
    handle = nn.modules.module.register_module_forward_hook(nothing)
    try:
        refused(model, nn.MSELoss(), optimizer, "hook")
        unchanged(step, model, optimizer, torch.zeros(2, 4), torch.zeros(2, 3), "hook")
    finally:
        handle.remove()
    step(torch.zeros(2, 4), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_norm": 1.0, "clip_value": 1.0}, "max_norm.*clip_value"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": -1}, "accumulate"),
        ({"accumulate": 2, "keep_grads": False}, "keep_grads"),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], text: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"fastmlp: .*{text}"):
        make(model, nn.MSELoss(), sgd(model), **options)


# At a call.


x, y, classes = torch.randn(2, 4), torch.rand(2, 3), torch.tensor([0, 2])
ce, bce = nn.CrossEntropyLoss(ignore_index=-1), nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))

ARGUMENTS: dict[str, tuple[nn.Module, Any, Any, str]] = {
    "features": (nn.MSELoss(), torch.zeros(2, 7), y, r"input.*\[2, 7\]"),
    "scalar": (nn.MSELoss(), torch.tensor(1.0), y, "input"),
    "dtype": (nn.MSELoss(), x.double(), y, "dtype.*input|input.*dtype"),
    "integers": (nn.MSELoss(), torch.zeros(2, 4, dtype=torch.int64), y, "input"),
    "device": (nn.MSELoss(), x.to("meta"), y, "input"),
    "no tensor": (nn.MSELoss(), [[0.0] * 4] * 2, y, "input"),
    "None": (nn.MSELoss(), None, y, "input"),
    "target rows": (nn.MSELoss(), x, torch.zeros(3, 3), "target"),
    "target columns": (nn.L1Loss(), x, torch.zeros(2, 4), "target"),
    "broadcast": (nn.MSELoss(), x, torch.zeros(2, 1), "target"),
    "broadcast rows": (nn.HuberLoss(), x, torch.zeros(3), "target"),
    "more dimensions": (bce, x, torch.zeros(1, 2, 3), "target"),
    "target dtype": (nn.MSELoss(), x, y.double(), "(?i)target.*dtype"),
    "integer target": (bce, x, torch.zeros(2, 3, dtype=torch.int64), "(?i)target.*dtype"),
    "target device": (nn.MSELoss(), x, y.to("meta"), "target"),
    "no target": (nn.MSELoss(), x, None, "target"),
    "class too large": (ce, x, torch.tensor([0, 3]), "target"),
    "class negative": (ce, x, torch.tensor([-2, 0]), "target"),
    "class far away": (ce, x, torch.tensor([0, 2**62]), "target"),
    "last class wrong": (ce, torch.randn(64, 4), torch.tensor([0] * 63 + [5]), "target"),
    "probabilities": (ce, x, torch.rand(2, 3), "target"),
    "int32": (ce, x, classes.int(), "(?i)target.*dtype"),
    "classes rows": (ce, x, torch.tensor([0, 1, 2]), "target"),
    "classes in columns": (ce, x, classes[:, None], "target"),
    "three dimensions": (ce, torch.randn(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64), "input|output|target"),
    "weight of other classes": (nn.CrossEntropyLoss(torch.ones(4)), x, classes, "weight"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"keep_grads": False}], ids=str)
def test_arguments(case: str, options: dict[str, Any]) -> None:
    """Also in the middle of an accumulation, which goes on as if there had been no such call."""
    loss_fn, input, target, text = ARGUMENTS[case]
    right: Tensor | None = classes if isinstance(loss_fn, nn.CrossEntropyLoss) else y
    if text == "weight":
        right = None
    torch.manual_seed(1)
    model = network()
    optimizer = sgd(model)
    step = make(model, loss_fn, optimizer, **options)
    unchanged(step, model, optimizer, input, target, text)
    if right is None:
        return
    step(x, right)
    unchanged(step, model, optimizer, input, target, text)
    step(x, right)
    torch.manual_seed(1)
    same = network()
    other = make(same, loss_fn, sgd(same), **options)
    for _ in range(2):
        other(x, right)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (lambda m: m[1].register_forward_hook(nothing), "hook"),
    "backward hook": (lambda m: m[2].register_full_backward_hook(nothing), "hook"),
    "hook of the model": (lambda m: m.register_forward_pre_hook(nothing), "hook"),
    "hook of a parameter": (lambda m: m[0].weight.register_hook(nothing), "hook"),
    "post-accumulate hook": (lambda m: m[0].weight.register_post_accumulate_grad_hook(nothing), "hook"),
    "forward": (lambda m: setattr(m[2], "forward", nothing), "forward"),
    "child": (lambda m: m.append(nn.LayerNorm(3)), "LayerNorm"),
    "features of a norm": (lambda m: m.append(nn.BatchNorm1d(4)), r"3\.weight has shape \(4,\), expected \(3,\)"),
    "dropout in place": (lambda m: m.append(nn.Dropout(0.5, inplace=True)), "Dropout.* in place"),
    "own layer": (lambda m: m.__setitem__(2, OwnLinear(5, 3)), "OwnLinear"),
    "weight norm": (lambda m: parametrizations.weight_norm(m[2]), "ParametrizedLinear|parametriz"),
    "dtype of a child": (lambda m: m[2].double(), "(?i)dtype"),
    "dtype": (lambda m: m.bfloat16(), "(?i)dtype|bfloat16"),
    "device": (lambda m: m.to("meta"), "meta|CPU"),
    "width": (lambda m: m.__setitem__(2, nn.Linear(6, 3)), "weight|shape|exchanged"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_can_no_longer_run(case: str) -> None:
    change, text = CHANGES[case]
    model = network()
    optimizer = sgd(model)
    step = make(model, nn.MSELoss(), optimizer)
    step(x, y)
    change(model)
    unchanged(step, model, optimizer, x, y, text)


def test_dropout_in_training_mode() -> None:
    """Taken while it does nothing."""
    model = network(nn.Dropout(0.5, inplace=True)).eval()
    optimizer = sgd(model)
    step = make(model, nn.MSELoss(), optimizer)
    step(x, y)
    model.train()
    unchanged(step, model, optimizer, x, y, "Dropout")
    model[2].p = 0.0
    step(x, y)
    model[2].p = 0.5
    model.eval()
    step(x, y)


def test_a_loss_that_can_no_longer_run() -> None:
    model, loss_fn = network(), nn.MSELoss()
    optimizer = sgd(model)
    step = make(model, loss_fn, optimizer)
    step(x, y)
    loss_fn.reduction = "none"
    unchanged(step, model, optimizer, x, y, "reduction")
    loss_fn.reduction = "sum"
    loss_fn.register_forward_hook(nothing)
    unchanged(step, model, optimizer, x, y, "hook")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"])
def test_state_of_another_shape(key: str) -> None:
    """As somebody may have loaded it: an error, ours or torch's, whose step it may be left to; never a crash."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    step = make(model, nn.MSELoss(), optimizer)
    step(x, y)
    optimizer.state[model[2].weight][key] = torch.zeros(7)
    with pytest.raises(ERRORS):
        step(x, y)


def test_state_that_lacks_a_key() -> None:
    """amsgrad switched on after the state was made: torch raises, too."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    step = make(model, nn.MSELoss(), optimizer)
    step(x, y)
    optimizer.param_groups[0]["amsgrad"] = True
    before = snapshot(model, optimizer)
    with pytest.raises((*ERRORS, KeyError), match="max_exp_avg_sq"):
        step(x, y)
    assert snapshot(model, optimizer) == before


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((2, 3), "a group of the optimizer's param_groups is of type int, expected a dictionary"),
        ([None], "a group of the optimizer's param_groups is of type NoneType, expected a dictionary"),
        ("groups", "must be lists or tuples, got str"),
        ([{"params": 5}], "must be lists or tuples, got int"),
    ],
)
def test_groups_that_are_none(groups: Any, message: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = make(model, nn.MSELoss(), optimizer)
    step(x, y)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.param_groups = groups
    with pytest.raises(TypeError, match=f"^fastmlp: .*{message}"):
        step(x, y)
    assert all(map(torch.equal, before, model.parameters()))
