"""TrainStep against the four lines of the loop: networks, losses, optimizers and options, drawn at random."""

import copy
import itertools
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, problems
from fastmlp.activations import IDENTITY
from tests.support.axes import ACTIVATIONS, ISAS
from tests.support.endings import LOSSES_AFTER
from tests.support.optimizers import ARGUMENTS
from tests.support.rounding import Results
from tests.support.training import (
    FORMS,
    LOSSES,
    OPTIMIZERS,
    Loop,
    Maker,
    Network,
    Optimizer,
    Side,
    after_a_step,
    assert_equal_to_rounding,
    draw_loss,
    draw_optimizer,
    everything,
    optimizer_of,
    targets,
)

STEPS = 50
BATCHES = 3
WIDTHS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100]
ROWS: list[tuple[int, ...]] = [(), (1,), (2,), (7,), (16,), (33,), (64,), (2, 5), (3, 1, 4)]
#: softplus jumps at its threshold, by more than the bounds see where layers before have rounded: not at 20.
SMOOTH = [Activation("softplus", beta=2.5) if act.name == "softplus" else act for act in ACTIVATIONS]
DTYPES = [torch.float32, torch.float64]
#: torch computes these by 1 + tanh(z) and 1 + erf(z), which cancel where z is negative, by more than the bounds allow.
CANCELLING = ("gelu", "gelu_tanh")


pytestmark = pytest.mark.usefixtures("as_before")


@dataclass(frozen=True)
class Drawn:
    """A training without its numbers."""

    seed: int
    dtype: torch.dtype
    net: Network
    form: str
    rows: tuple[int, ...]
    loss_fn: nn.Module
    optimizer: str
    arguments: dict[str, Any]
    grouping: str
    options: dict[str, Any]
    ours: bool  # the optimizer is of fastmlp.optim

    def __str__(self) -> str:
        return f"{self.seed}-{type(self.loss_fn).__name__}-{self.optimizer}"

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        shape = (*self.rows, self.net.widths[-1])
        return [
            (torch.randn(*self.rows, self.net.widths[0], dtype=self.dtype), targets(self.loss_fn, shape, self.dtype))
            for _ in range(BATCHES)
        ]

    def groups(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        if self.grouping == "two":
            other = {"lr": self.arguments["lr"] / 3, "weight_decay": 0.05}
            return (
                [{"params": parameters[::2]}, {"params": parameters[1::2], **other}] if parameters[1:] else parameters
            )
        return parameters[1:] if self.grouping == "not all" and parameters[1:] else parameters

    def side(self, model: nn.Module, module: Any, make: Maker) -> Side:
        optimizer = optimizer_of(module, self.optimizer, self.arguments, self.groups(model))
        return Side(model, optimizer, make(model, copy.deepcopy(self.loss_fn), optimizer, **self.options))


def draw(seed: int) -> Drawn:
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 2]
    layers = random_.choice([1, 2, 2, 3, 3, 4, 5])
    widths = [random_.choice(WIDTHS) for _ in range(layers + 1)]
    if seed % 40 == 24:  # layers that do not go together
        widths = [300, 520, 257, 10]
        layers = 3
    # Every loss with every optimizer, whatever the dtype.
    number, kind = divmod(seed // 2, len(LOSSES))
    rows = random_.choice(ROWS)
    if LOSSES[kind] == "ce":
        rows = random_.choice([rows for rows in ROWS if len(rows) < 2])
        widths[-1] = max(widths[-1], 2)
    form_of_loss = 2 * number + kind % 2 if LOSSES[kind] == "ce" else number // len(OPTIMIZERS) + kind
    loss_fn = draw_loss(random_, LOSSES[kind], form_of_loss, widths[-1], dtype)
    acts = [random_.choice(SMOOTH) for _ in range(layers)]
    if random_.random() < 0.8:
        acts[-1] = IDENTITY
    name = OPTIMIZERS[number % len(OPTIMIZERS)]
    arguments = draw_optimizer(random_, name)
    count = int(torch.Size(rows).numel()) * (1 if isinstance(loss_fn, nn.CrossEntropyLoss) else widths[-1])
    if name == "SGD" and getattr(loss_fn, "reduction", None) == "sum":
        arguments["lr"] /= count  # or it would leave all bounds
    options: dict[str, Any] = random_.choice(
        [{}, {}, {"max_norm": 0.5}, {"max_norm": 1e3}, {"clip_value": 0.01}, {"keep_grads": False}]
    )
    if random_.random() < 0.25 and options.get("keep_grads", True):
        options = options | {"accumulate": random_.choice([2, 3])}
    net = Network(tuple(widths), tuple(acts), tuple(random_.random() < 0.8 for _ in range(layers)))
    grouping = random_.choice(["one", "one", "two", "not all"])
    if grouping == "not all" and options:
        grouping = "one"
    form = random_.choice(FORMS)
    return Drawn(seed, dtype, net, form, rows, loss_fn, name, arguments, grouping, options, random_.random() < 0.4)


DRAWN = [draw(seed) for seed in range(200)]


def test_what_is_drawn() -> None:
    """Every activation, loss, optimizer, form and option, and what may go wrong together."""
    assert {act for d in DRAWN for act in d.net.activations} == set(SMOOTH)
    losses = [kind for kind in problems.LOSSES if kind not in LOSSES_AFTER]
    for dtype in DTYPES:
        drawn = [d for d in DRAWN if d.dtype == dtype]
        assert {d.form for d in drawn} == set(FORMS)
        assert {d.rows for d in drawn} == set(ROWS)
        assert {(type(d.loss_fn), d.optimizer) for d in drawn} == set(itertools.product(losses, OPTIMIZERS))
        assert {key for d in drawn for key in d.options} == {"max_norm", "clip_value", "keep_grads", "accumulate"}
        entropies = [d.loss_fn for d in drawn if isinstance(d.loss_fn, nn.CrossEntropyLoss)]
        seen = {(e.weight is None, e.label_smoothing > 0, e.reduction) for e in entropies}
        assert seen == set(itertools.product([True, False], [True, False], ["mean", "sum"])), dtype
        for key in ("momentum", "dampening", "weight_decay", "nesterov", "maximize"):
            assert {bool(d.arguments[key]) for d in drawn if d.optimizer == "SGD"} == {True, False}, key
        for key in ("weight_decay", "amsgrad", "maximize"):
            assert {bool(d.arguments[key]) for d in drawn if d.optimizer == "Adam"} == {True, False}, key
        for key in ("weight_decay", "momentum", "centered", "maximize"):
            assert {bool(d.arguments[key]) for d in drawn if d.optimizer == "RMSprop"} == {True, False}, key
        assert {d.grouping for d in drawn} == {"one", "two", "not all"}
        assert {d.ours for d in drawn} == {True, False}


def unowned(d: Drawn) -> bool:
    return d.grouping == "not all" and len(list(d.net.torchs(d.dtype).parameters())) > 1


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_every_step(drawn: Drawn) -> None:
    """Each of 50 steps from the loop's numbers lies within the bounds, and so does the loop's own."""
    torch.manual_seed(drawn.seed)
    model = drawn.net.torchs(drawn.dtype)
    sides = {}
    for isa in ISAS:
        module = fastmlp.optim if drawn.ours else torch.optim
        sides[isa] = drawn.side(drawn.net.like(model, drawn.form), module, fastmlp.TrainStep)
    loop = drawn.side(model, torch.optim, Loop)
    batches = drawn.batches()
    cancels = any(act.name in CANCELLING for act in drawn.net.activations)
    keeps = drawn.options.get("keep_grads", True)
    for call in range(STEPS if max(drawn.net.widths) <= 100 else 8):
        input, target = batches[call % BATCHES]
        for side in sides.values():
            if call:
                side.copy_from(loop)
        if unowned(drawn):  # whose gradients the loop adds up
            for side in (loop, *sides.values()):
                side.model.zero_grad()
        expected = after_a_step(drawn.net, loop, drawn.loss_fn, input, target, call)
        loss = loop.step(input, target)
        if not cancels:
            expected.check(loss, loop, f"loop, call {call}", keeps)
        for isa, side in sides.items():
            fastmlp.set_isa(isa)
            expected.check(side.step(input, target), side, f"{isa}, call {call}", keeps)


FREE = [d for d in DRAWN if d.dtype == torch.float64 and max(d.net.widths) <= 100][::3]


@pytest.mark.parametrize("drawn", FREE, ids=str)
def test_fifty_steps_on_their_own(drawn: Drawn) -> None:
    """In float64, from the same start."""
    batches = drawn.batches()

    def scenario(make: Maker) -> Results:
        model: nn.Module = drawn.net.torchs(drawn.dtype)
        module: Any = torch.optim
        if make is not Loop:
            model = drawn.net.like(model, drawn.form)
            module = fastmlp.optim if drawn.ours else torch.optim
        side = drawn.side(model, module, make)
        losses = torch.stack([side.step(*batches[call % BATCHES]) for call in range(STEPS)])
        names = drawn.net.torchs(drawn.dtype).state_dict()
        found = everything(model, side.optimizer)
        for name, mine in zip(names, list(model.state_dict()), strict=True):
            for key in [key for key in found if key == mine or key.startswith(f"{mine}.")]:
                found[f"- {name}{key[len(mine) :]}"] = found.pop(key)
        return {"losses": losses} | dict(sorted(found.items()))

    assert_equal_to_rounding(scenario, ISAS)


NET = Network((6, 9, 5, 3), (Activation("tanh"), Activation("gelu"), IDENTITY), (True, True, True))
F64 = torch.float64

#: They keep all kinds of state.
STATEFUL: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    *((name, arguments | {"weight_decay": 0.01}) for name, arguments in ARGUMENTS.items()),
]

#: What steps, one letter for each call: the loop, or what is tried in its place.
ORDERS = ["LLLLTTTT", "TTTTLLLL", "LTLTLTLT", "LLTTTLLT"]


class Saved:
    """Everything that a checkpoint holds, written and read as `torch.save` does."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.data = pickle.dumps((model.state_dict(), optimizer.state_dict()))

    def load(self, model: nn.Module, optimizer: Optimizer) -> None:
        of_model, of_optimizer = pickle.loads(self.data)
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)


Restart = Callable[[nn.Module, Optimizer, Callable[[nn.Module], Optimizer]], tuple[nn.Module, Optimizer]]


def in_place(
    model: nn.Module, optimizer: Optimizer, fresh: Callable[[nn.Module], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    Saved(model, optimizer).load(model, optimizer)
    return model, optimizer


def new_optimizer(
    model: nn.Module, optimizer: Optimizer, fresh: Callable[[nn.Module], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    made = fresh(model)
    Saved(model, optimizer).load(model, made)
    return model, made


def all_new(
    model: nn.Module, optimizer: Optimizer, fresh: Callable[[nn.Module], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    other = NET.torchs(F64)
    made = fresh(other)
    Saved(model, optimizer).load(other, made)
    return other, made


def copied(
    model: nn.Module, optimizer: Optimizer, fresh: Callable[[nn.Module], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    return copy.deepcopy((model, optimizer))


def pickled(
    model: nn.Module, optimizer: Optimizer, fresh: Callable[[nn.Module], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    made: tuple[nn.Module, Optimizer] = pickle.loads(pickle.dumps((model, optimizer)))
    return made


def restored(
    model: nn.Module, optimizer: Optimizer, fresh: Callable[[nn.Module], Optimizer]
) -> tuple[nn.Module, Optimizer]:
    """Back to an earlier state, after steps that are to be forgotten."""
    saved = Saved(model, optimizer)
    loop = Loop(model, nn.MSELoss(), optimizer)
    for _ in range(2):
        loop(torch.ones(2, 6, dtype=F64), torch.zeros(2, 3, dtype=F64))
    saved.load(model, optimizer)
    return model, optimizer


RESTARTS: list[Restart] = [in_place, new_optimizer, all_new, copied, pickled, restored]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "fastmlp"])
@pytest.mark.parametrize(("name", "arguments"), STATEFUL)
def test_crossing_over(order: str, ours: bool, name: str, arguments: dict[str, Any]) -> None:
    """The loop and the step in turns, on the same model and optimizer."""

    def scenario(make: Maker) -> Results:
        model = NET.torchs(F64)
        module = fastmlp.optim if ours and make is not Loop else torch.optim
        optimizer = optimizer_of(module, name, arguments, model.parameters())
        steps = {"L": Loop(model, nn.MSELoss(), optimizer), "T": make(model, nn.MSELoss(), optimizer)}
        losses = []
        for letter in order:
            losses.append(steps[letter](torch.randn(8, 6, dtype=F64), torch.randn(8, 3, dtype=F64)))
        return {"losses": torch.stack(losses)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("restart", RESTARTS)
@pytest.mark.parametrize("sides", ["TT", "LT", "TL"])
@pytest.mark.parametrize(("name", "arguments"), [STATEFUL[1], STATEFUL[2], STATEFUL[4]])
def test_checkpoints(restart: Restart, sides: str, name: str, arguments: dict[str, Any]) -> None:
    """Saved on one side after three steps and read on the other; the step is made anew only with what it is made of."""

    def scenario(make: Maker) -> Results:
        model: nn.Module = NET.torchs(F64)
        modules = {letter: fastmlp.optim if letter == "T" and make is not Loop else torch.optim for letter in "LT"}
        makers: dict[str, Maker] = {"L": Loop, "T": make}
        optimizer = optimizer_of(modules[sides[0]], name, arguments, model.parameters())
        step = makers[sides[0]](model, nn.MSELoss(), optimizer)
        losses = []
        for call in range(6):
            if call == 3:
                before = model, optimizer

                def fresh(model: nn.Module) -> Optimizer:
                    return optimizer_of(modules[sides[1]], name, {"lr": 1.0}, model.parameters())

                model, optimizer = restart(model, optimizer, fresh)
                if (model, optimizer) != before or sides[0] != sides[1]:
                    step = makers[sides[1]](model, nn.MSELoss(), optimizer)
            losses.append(step(torch.randn(8, 6, dtype=F64), torch.randn(8, 3, dtype=F64)))
        return {"losses": torch.stack(losses)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


#: Faults of optimizers and losses, each so small that a fixed tolerance might have passed it.
FAULTS: dict[str, Callable[[Side], None]] = {
    "learning rate": lambda side: side.optimizer.param_groups[0].update(
        lr=side.optimizer.param_groups[0]["lr"] * 1.001
    ),
    "second beta": lambda side: side.optimizer.param_groups[0].update(betas=(0.9, 0.99901)),
    "epsilon": lambda side: side.optimizer.param_groups[0].update(eps=1.01e-3),
    "weight decay": lambda side: side.optimizer.param_groups[0].update(weight_decay=0.0101),
    "amsgrad": lambda side: side.optimizer.param_groups[0].update(amsgrad=False),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_step_is_found_out(fault: str, dtype: torch.dtype) -> None:
    model = NET.torchs(dtype)
    sides = []
    for made in (model, copy.deepcopy(model)):
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.01, amsgrad=True)
        sides.append(Side(made, optimizer, Loop(made, nn.MSELoss(), optimizer)))
    right, wrong = sides
    found = False
    for call in range(20):
        input, target = torch.randn(8, 6, dtype=dtype), torch.randn(8, 3, dtype=dtype) * 0.5**call
        expected = after_a_step(NET, right, nn.MSELoss(), input, target, call)
        expected.check(right.step(input, target), right, "right")
        if call == 10:
            FAULTS[fault](wrong)
        loss = wrong.step(input, target)
        try:
            expected.check(loss, wrong, "wrong")
        except AssertionError:
            assert call >= 10
            found = True
            break
        wrong.copy_from(right)
    assert found
