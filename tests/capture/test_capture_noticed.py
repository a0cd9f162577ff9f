"""What a captured function notices between two calls: each change, captured and not, with the same bits afterwards.

Each program runs three times: by itself, captured, and by itself without the change. The last one has to come out
otherwise, because else a change that went unnoticed would not be seen here.
"""

import collections
import functools
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastmlp
from tests import support
from tests.support import settings

CALLS = 14
CHANGED = 5  # before this call


class Change(NamedTuple):
    """A program, and what is changed between two calls.

    Attributes:
        make: makes the program: `step`, which is captured; `model` and `optimizer` if it has some.
        change: what is done; it may return what undoes it.
        kept: whether the recording stays valid.
    """

    make: Callable[[], SimpleNamespace]
    change: Callable[[SimpleNamespace], Any]
    kept: bool


CHANGES: dict[str, Change] = {}


def change(make: Callable[[], SimpleNamespace], kept: bool = False) -> Callable[..., Any]:
    def note(function: Callable[[SimpleNamespace], Any]) -> Callable[[SimpleNamespace], Any]:
        name = getattr(function, "__name__", "")
        assert name not in CHANGES
        CHANGES[name] = Change(make, function, kept)
        return function

    return note


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)


def training(
    optimizer_of: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    zero: bool = True,
) -> SimpleNamespace:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.1), nn.Dropout(0.3), nn.Linear(8, 2)]
    model = nn.Sequential(*layers)
    optimizer = optimizer_of(model.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        if zero:
            optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return SimpleNamespace(step=step, model=model, optimizer=optimizer)


def adding() -> SimpleNamespace:
    """Gradients add up, which is another recording where there are none yet."""
    return SimpleNamespace(**vars(training(zero=False)), recorded=3)


adam = functools.partial(training, lambda p: torch.optim.Adam(p, lr=0.01))


# Modules.


@change(training)
def evaluate(program: SimpleNamespace) -> None:
    program.model.eval()


@change(training)
def evaluate_one_child(program: SimpleNamespace) -> None:
    program.model[3].eval()


@change(training)
def probability_of_dropout(program: SimpleNamespace) -> None:
    program.model[3].p = 0.6


@change(training)
def no_dropout(program: SimpleNamespace) -> None:
    program.model[3].p = 0.0


@change(training)
def momentum_of_batch_norm(program: SimpleNamespace) -> None:
    program.model[1].momentum = 0.5


@change(training)
def cumulative_batch_norm(program: SimpleNamespace) -> None:
    program.model[1].momentum = 0.25


@change(training)
def epsilon_of_batch_norm(program: SimpleNamespace) -> None:
    program.model[1].eps = 0.1


@change(training)
def slope(program: SimpleNamespace) -> None:
    program.model[2].negative_slope = 0.5


@change(training)
def parameter_swapped(program: SimpleNamespace) -> None:
    program.model[0].weight = nn.Parameter(torch.ones(8, 4))


@change(training)
def parameter_removed(program: SimpleNamespace) -> None:
    program.model[4].bias = None


@change(training)
def buffer_swapped(program: SimpleNamespace) -> None:
    program.model[1].running_mean = torch.ones(8)


@change(training)
def buffers_removed(program: SimpleNamespace) -> None:
    program.model[1].running_mean = program.model[1].running_var = None


@change(training)
def child_swapped(program: SimpleNamespace) -> None:
    program.model[2] = nn.Tanh()


@change(training)
def child_added(program: SimpleNamespace) -> None:
    program.model.append(nn.Tanh())


@change(training)
def child_removed(program: SimpleNamespace) -> None:
    del program.model[3]


@change(training)
def tied(program: SimpleNamespace) -> None:
    program.model[4].bias = program.model[0].bias = nn.Parameter(torch.zeros(8)[:2].repeat(4)[:2])
    program.model[0].bias = None


@change(training)
def parametrized(program: SimpleNamespace) -> None:
    parametrize.register_parametrization(program.model[0], "weight", nn.Tanh())


@change(training, kept=True)
def memory_of_a_parameter(program: SimpleNamespace) -> None:
    program.model[0].weight.data = torch.ones(8, 4)


@change(training)
def strides_of_a_parameter(program: SimpleNamespace) -> None:
    program.model[0].weight.data = torch.ones(4, 8).t()


@change(training, kept=True)
def memory_of_a_buffer(program: SimpleNamespace) -> None:
    program.model[1].running_mean.data = torch.ones(8)


@change(training, kept=True)
def written_in_place(program: SimpleNamespace) -> None:
    with torch.no_grad():
        program.model[0].weight.mul_(2)
        program.model[1].running_var.fill_(3)


@change(training, kept=True)
def state_dict_loaded(program: SimpleNamespace) -> None:
    program.model.load_state_dict(changed_state(program.model))


def changed_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: value.clone() // 2 if key.endswith("tracked") else value * 0.5 for key, value in model.state_dict().items()
    }


@change(training)
def state_dict_assigned(program: SimpleNamespace) -> None:
    program.model.load_state_dict(changed_state(program.model), assign=True)


@change(training)
def frozen(program: SimpleNamespace) -> None:
    program.model[0].requires_grad_(False)


@change(training)
def frozen_after_zero_grad(program: SimpleNamespace) -> None:
    program.model[0].requires_grad_(False)
    program.optimizer.zero_grad()


@change(training)
def forward_of_an_object(program: SimpleNamespace) -> None:
    layer = program.model[2]
    layer.forward = lambda x: x * 0.3


# Hooks.


@change(training)
def forward_hook(program: SimpleNamespace) -> None:
    program.model[0].register_forward_hook(lambda module, args, output: output * 2)


@change(training)
def forward_pre_hook(program: SimpleNamespace) -> None:
    program.model[4].register_forward_pre_hook(lambda module, args: args[0] * 2)


@change(training)
def backward_hook(program: SimpleNamespace) -> None:
    program.model[4].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))


@change(training)
def backward_pre_hook(program: SimpleNamespace) -> None:
    program.model[4].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))


@change(training)
def hook_of_all_modules(program: SimpleNamespace) -> Any:
    mine = set(program.model.modules())
    hook = global_hooks.register_module_forward_hook(
        lambda module, args, output: output * 2 if module in mine and isinstance(module, nn.Linear) else None
    )
    return hook.remove


def hooked() -> SimpleNamespace:
    program = training()
    program.handle = program.model[0].register_forward_hook(lambda module, args, output: output * 2)
    return program


@change(hooked)
def forward_hook_removed(program: SimpleNamespace) -> None:
    program.handle.remove()


@change(training)
def hook_of_a_parameter(program: SimpleNamespace) -> None:
    program.model[0].weight.register_hook(lambda gradient: gradient * 2)


def double_gradient(leaf: Tensor) -> None:
    assert leaf.grad is not None
    leaf.grad.mul_(2)


@change(training)
def hook_after_accumulation(program: SimpleNamespace) -> None:
    program.model[0].weight.register_post_accumulate_grad_hook(double_gradient)


def hooked_parameter() -> SimpleNamespace:
    program = training()
    program.handle = program.model[0].weight.register_hook(lambda gradient: gradient * 2)
    return program


@change(hooked_parameter)
def hook_of_a_parameter_removed(program: SimpleNamespace) -> None:
    program.handle.remove()


@change(hooked_parameter)
def hook_of_a_parameter_replaced(program: SimpleNamespace) -> None:
    program.handle.remove()
    program.model[0].weight.register_hook(lambda gradient: gradient * 3)


@change(training, kept=True)
def hook_before_steps(program: SimpleNamespace) -> None:
    program.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: scale_gradients(program))


@change(training, kept=True)
def hook_after_steps(program: SimpleNamespace) -> None:
    def clamp(*_: Any) -> None:
        with torch.no_grad():
            program.model[0].weight.clamp_(-0.1, 0.1)

    program.optimizer.register_step_post_hook(clamp)


@change(training, kept=True)
def hook_of_all_optimizers(program: SimpleNamespace) -> Any:
    mine = program.optimizer
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: scale_gradients(program) if optimizer is mine else None
    )
    return hook.remove


def scale_gradients(program: SimpleNamespace) -> None:
    for parameter in program.model.parameters():
        parameter.grad.mul_(0.5)


# Gradients.


@change(adding)
def gradients_to_none(program: SimpleNamespace) -> None:
    program.optimizer.zero_grad()


@change(adding, kept=True)
def gradients_to_zero(program: SimpleNamespace) -> None:
    program.optimizer.zero_grad(set_to_none=False)


@change(adding, kept=True)
def gradients_written(program: SimpleNamespace) -> None:
    scale_gradients(program)


@change(adding, kept=True)
def gradients_swapped(program: SimpleNamespace) -> None:
    for parameter in program.model.parameters():
        parameter.grad = torch.ones_like(parameter)


@change(adding)
def one_gradient_to_none(program: SimpleNamespace) -> None:
    program.model[0].weight.grad = None


# Optimizers.


@change(training, kept=True)
def learning_rate(program: SimpleNamespace) -> None:
    program.optimizer.param_groups[0]["lr"] = 0.01


@change(training, kept=True)
def weight_decay(program: SimpleNamespace) -> None:
    program.optimizer.param_groups[0]["weight_decay"] = 0.1


@change(training, kept=True)
def nesterov(program: SimpleNamespace) -> None:
    program.optimizer.param_groups[0]["nesterov"] = True


@change(adam, kept=True)
def betas(program: SimpleNamespace) -> None:
    program.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


@change(adam, kept=True)
def state_written(program: SimpleNamespace) -> None:
    for state in program.optimizer.state.values():
        state["exp_avg"].mul_(2)
        state["step"].fill_(1)


@change(adam, kept=True)
def state_swapped(program: SimpleNamespace) -> None:
    for state in program.optimizer.state.values():
        state["exp_avg_sq"] = torch.ones_like(state["exp_avg_sq"])


@change(adam, kept=True)
def state_cleared(program: SimpleNamespace) -> None:
    program.optimizer.state.clear()


@change(adam)
def optimizer_state_loaded(program: SimpleNamespace) -> None:
    fresh = adam()
    fresh.step(*batch(99))
    program.optimizer.load_state_dict(fresh.optimizer.state_dict())


def partly() -> SimpleNamespace:
    """Other gradients than these add up."""
    return SimpleNamespace(**vars(training(lambda p: torch.optim.SGD(list(p)[:2], lr=0.1))), recorded=3)


@change(partly)
def group_added(program: SimpleNamespace) -> None:
    program.optimizer.add_param_group({"params": list(program.model[4].parameters()), "lr": 0.5})


@change(partly)
def parameter_added_to_a_group(program: SimpleNamespace) -> None:
    program.optimizer.param_groups[0]["params"].append(program.model[4].weight)


@change(partly)
def parameter_taken_from_a_group(program: SimpleNamespace) -> None:
    program.optimizer.param_groups[0]["params"].pop()


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=CALLS + 1),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedulers_outside_need_no_new_recording(kind: str) -> None:
    losses = []
    for captured in (False, True):
        program = training()
        schedule = SCHEDULES[kind](program.optimizer)
        step = fastmlp.capture(program.step, fuse=False) if captured else program.step
        all_of_it = []
        for i in range(CALLS):
            torch.manual_seed(i)
            loss = step(*batch(i))
            schedule.step(*([loss.detach()] if kind == "plateau" else []))
            all_of_it += [loss.detach(), *(p.detach().clone() for p in program.model.parameters())]
        losses.append(all_of_it)
        assert not isinstance(step, fastmlp.Captured) or step.replays == CALLS - 2
        rates = program.optimizer.param_groups[0]["lr"]
        assert rates != 0.1
    assert all(map(torch.equal, *losses))


# Numbers and objects of the program.


SCALE = 2.0
FACTORS = [2.0, 3.0]


def doubled(x: Tensor) -> Tensor:
    return x * 2


HELPER: Callable[[Tensor], Tensor] = doubled


class Kind(Enum):
    PLAIN = 1
    SQUARED = 2


class Config:
    shift = 1.0

    def __init__(self, scale: float = 2.0) -> None:
        self.scale = scale


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 2.0


class Scaled(nn.Module):
    shift = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.sizes = [1.0, 2.0]
        self.options = {"squared": False}
        self.kind = Kind.PLAIN
        self.config = Config()
        self.layers: list[nn.Module] = [nn.Tanh(), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        x = (x * self.scale + self.shift) * self.sizes[1] * self.config.scale
        for layer in self.layers:
            x = layer(x)
        x = x.square() if self.kind is Kind.SQUARED else x
        return x.exp() if self.options["squared"] else x


def scaled() -> SimpleNamespace:
    model = Scaled()
    return SimpleNamespace(step=lambda x, y: model(x), model=model)


@change(scaled)
def number_of_a_module(program: SimpleNamespace) -> None:
    program.model.scale = 3.0


@change(scaled)
def item_of_a_module_s_list(program: SimpleNamespace) -> None:
    program.model.sizes[1] = 3.0


@change(scaled)
def list_of_a_module_swapped(program: SimpleNamespace) -> None:
    program.model.sizes = [1.0, 3.0]


@change(scaled)
def entry_of_a_module_s_dict(program: SimpleNamespace) -> None:
    program.model.options["squared"] = True


@change(scaled)
def dict_of_a_module_swapped(program: SimpleNamespace) -> None:
    program.model.options = {"squared": True}


@change(scaled)
def member_of_an_enum(program: SimpleNamespace) -> None:
    program.model.kind = Kind.SQUARED


@change(scaled)
def number_of_a_module_s_config(program: SimpleNamespace) -> None:
    program.model.config.scale = 3.0


@change(scaled)
def config_of_a_module_swapped(program: SimpleNamespace) -> None:
    program.model.config = Config(3.0)


@change(scaled)
def number_that_hides_a_class_s(program: SimpleNamespace) -> None:
    program.model.shift = 2.0


@change(scaled)
def number_of_a_module_s_class(program: SimpleNamespace) -> Any:
    Scaled.shift = 2.0
    return lambda: setattr(Scaled, "shift", 1.0)


@change(scaled)
def module_in_a_list(program: SimpleNamespace) -> None:
    program.model.layers[1] = nn.Sigmoid()


@change(scaled)
def module_appended_to_a_list(program: SimpleNamespace) -> None:
    program.model.layers.append(nn.Sigmoid())


def of_settings() -> SimpleNamespace:
    """Reads an imported module."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        x = settings.function(x * settings.scale) * settings.weight * settings.Rates.beta
        return x.square() if settings.squared else x

    return SimpleNamespace(step=step)


def of_a_package() -> SimpleNamespace:
    return SimpleNamespace(step=lambda x, y: x * support.settings.scale)


def of_an_import() -> SimpleNamespace:
    """Imports what it reads."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        from tests.support import settings as own
        from tests.support.settings import weight

        return x * own.scale * weight

    return SimpleNamespace(step=step)


def setting(name: str, value: Any, of: Any = settings) -> Callable[[SimpleNamespace], Any]:
    def change(_: SimpleNamespace) -> Any:
        before = getattr(of, name)
        setattr(of, name, value)
        return lambda: setattr(of, name, before)

    change.__name__ = f"{name}_of_{of.__name__}"
    return change


for _name, _value in {"scale": 3.0, "squared": True, "weight": torch.zeros(4), "function": torch.cos}.items():
    change(of_settings)(setting(_name, _value))
change(of_settings)(setting("beta", 0.5, settings.Rates))


@change(of_a_package)
def number_of_a_package_s_module(program: SimpleNamespace) -> Any:
    return setting("scale", 3.0)(program)


@change(of_an_import)
def number_of_a_module_that_is_imported_within(program: SimpleNamespace) -> Any:
    return setting("scale", 3.0)(program)


@change(of_an_import)
def tensor_that_is_imported_within(program: SimpleNamespace) -> Any:
    return setting("weight", torch.zeros(4))(program)


class Named:
    """Reads an attribute by its name."""

    scale = 2.0

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        # The rule would have `self.scale` here, but how a written name in `getattr` is noticed is what is tested.
        scaled: Tensor = x * getattr(self, "scale")  # noqa: B009
        return scaled


@change(lambda: SimpleNamespace(step=(named := Named()).step, named=named))
def attribute_by_its_name(program: SimpleNamespace) -> None:
    program.named.scale = 3.0


def keyword() -> SimpleNamespace:
    def step(x: Tensor, y: Tensor, scale: float) -> Tensor:
        return x * scale

    return SimpleNamespace(step=functools.partial(step, scale=2.0))


@change(keyword)
def keyword_of_a_partial_function(program: SimpleNamespace) -> None:
    program.step.keywords["scale"] = 3.0


def closure() -> SimpleNamespace:
    scale, factors, options = 2.0, [2.0, 3.0], {"scale": 2.0, "inner": {"shift": 1.0}}
    config, slotted, function, builtin = Config(), Slotted(), doubled, torch.tanh
    kind, dtype, bound = Kind.PLAIN, torch.float32, functools.partial(torch.add, alpha=2)
    weight, weights, named, pair = torch.ones(4), [torch.ones(4)], {"weight": torch.ones(4)}, (2.0, torch.ones(4))
    more: dict[str, float] = {"a": 1.0}

    def step(x: Tensor, y: Tensor) -> Tensor:
        x = x * scale * factors[0] * options["scale"] + options["inner"]["shift"]  # type: ignore[index, operator]
        for factor in factors:
            x = x * factor
        x = builtin(function(x) * config.scale * slotted.scale + config.shift)
        x = bound(x, x) * weight * weights[0] * named["weight"] * pair[0] * pair[1]
        for value in more.values():
            x = x * value
        return (x.square() if kind is Kind.SQUARED else x).to(dtype)

    def swap(**values: Any) -> None:
        nonlocal scale, factors, options, config, function, builtin, kind, dtype, bound
        nonlocal weight, weights, named, pair
        scale, factors = values.get("scale", scale), values.get("factors", factors)
        options, config = values.get("options", options), values.get("config", config)
        function, builtin = values.get("function", function), values.get("builtin", builtin)
        kind, dtype, bound = values.get("kind", kind), values.get("dtype", dtype), values.get("bound", bound)
        weight, weights = values.get("weight", weight), values.get("weights", weights)
        named, pair = values.get("named", named), values.get("pair", pair)

    held = {"factors": factors, "options": options, "config": config, "slotted": slotted, "more": more}
    return SimpleNamespace(step=step, swap=swap, weights=weights, named=named, bound=bound, weight=weight, **held)


SWAPPED = {
    "number": {"scale": 3.0},
    "sign of zero": {"scale": -2.0},
    "whole number": {"scale": 5},
    "list": {"factors": [2.0, 4.0]},
    "longer list": {"factors": [2.0, 3.0, 4.0]},
    "dictionary": {"options": {"scale": 3.0, "inner": {"shift": 1.0}}},
    "object": {"config": Config(3.0)},
    "function": {"function": lambda x: x * 3},
    "function of C": {"builtin": torch.sigmoid},
    "member of an enum": {"kind": Kind.SQUARED},
    "dtype": {"dtype": torch.float64},
    "partial": {"bound": functools.partial(torch.add, alpha=3)},
    "tensor": {"weight": torch.full((4,), 2.0)},
    "list of a tensor": {"weights": [torch.full((4,), 2.0)]},
    "dictionary of a tensor": {"named": {"weight": torch.full((4,), 2.0)}},
    "tuple": {"pair": (3.0, torch.ones(4))},
    "tuple of a tensor": {"pair": (2.0, torch.full((4,), 2.0))},
}
for _name, _values in SWAPPED.items():
    CHANGES[f"variable: {_name}"] = Change(closure, functools.partial(lambda v, p: p.swap(**v), _values), False)


@change(closure)
def item_of_a_list(program: SimpleNamespace) -> None:
    program.factors[1] = 4.0


@change(closure)
def item_appended(program: SimpleNamespace) -> None:
    program.factors.append(4.0)


@change(closure)
def entry_of_a_dictionary(program: SimpleNamespace) -> None:
    program.options["scale"] = 3.0


@change(closure)
def entry_of_an_inner_dictionary(program: SimpleNamespace) -> None:
    program.options["inner"]["shift"] = 3.0


@change(closure)
def entry_added(program: SimpleNamespace) -> None:
    program.more["b"] = 3.0


@change(closure)
def tensor_in_a_list(program: SimpleNamespace) -> None:
    program.weights[0] = torch.full((4,), 2.0)


@change(closure)
def tensor_in_a_dictionary(program: SimpleNamespace) -> None:
    program.named["weight"] = torch.full((4,), 2.0)


@change(closure, kept=True)
def tensor_written(program: SimpleNamespace) -> None:
    program.weight.mul_(2)


@change(closure)
def attribute(program: SimpleNamespace) -> None:
    program.config.scale = 3.0


@change(closure)
def attribute_in_a_slot(program: SimpleNamespace) -> None:
    program.slotted.scale = 3.0


@change(closure)
def attribute_of_a_class(program: SimpleNamespace) -> Any:
    Config.shift = 2.0
    return lambda: setattr(Config, "shift", 1.0)


@change(closure)
def keyword_of_a_partial(program: SimpleNamespace) -> None:
    program.bound.keywords["alpha"] = 3


class Priors:
    def __init__(self) -> None:
        self.prior, self.factors = torch.distributions.Normal(0.0, 1.0), np.ones(3)
        self.window, self.longer = collections.deque([1.0, 2.0]), [2.0] * 100

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return self.prior.log_prob(x) * self.factors[1] * self.window[-1] * self.longer[-1]


def of_objects() -> SimpleNamespace:
    priors = Priors()
    return SimpleNamespace(step=priors.step, priors=priors)


@change(of_objects)
def distribution_swapped(program: SimpleNamespace) -> None:
    program.priors.prior = torch.distributions.Normal(1.0, 1.0)


@change(of_objects)
def array_swapped(program: SimpleNamespace) -> None:
    program.priors.factors = np.full(3, 2.0)


@change(of_objects)
def appended_to_a_deque(program: SimpleNamespace) -> None:
    program.priors.window.append(3.0)


@change(of_objects)
def appended_to_a_long_list(program: SimpleNamespace) -> None:
    program.priors.longer.append(3.0)


@change(of_objects)
def long_list_swapped(program: SimpleNamespace) -> None:
    program.priors.longer = [3.0] * 100


def global_numbers() -> SimpleNamespace:
    def step(x: Tensor, y: Tensor) -> Tensor:
        return HELPER(x * SCALE * FACTORS[1]) + Config.shift

    return SimpleNamespace(step=step)


@change(global_numbers)
def global_number(program: SimpleNamespace) -> Any:
    return set_global("SCALE", 3.0)


@change(global_numbers)
def global_function(program: SimpleNamespace) -> Any:
    return set_global("HELPER", lambda x: x * 3)


@change(global_numbers)
def global_list(program: SimpleNamespace) -> Any:
    return set_global("FACTORS", [2.0, 5.0])


@change(global_numbers)
def item_of_a_global_list(program: SimpleNamespace) -> Any:
    FACTORS[1] = 5.0
    return lambda: FACTORS.__setitem__(1, 3.0)


@change(global_numbers)
def attribute_of_a_global_class(program: SimpleNamespace) -> Any:
    Config.shift = 2.0
    return lambda: setattr(Config, "shift", 1.0)


def set_global(name: str, value: Any) -> Callable[[], None]:
    before = globals()[name]
    globals()[name] = value
    return lambda: globals().__setitem__(name, before)


def defaults() -> SimpleNamespace:
    def helper(x: Tensor, scale: float = 2.0, factors: list[float] = [2.0], *, shift: float = 1.0) -> Tensor:  # noqa: B006
        return x * scale * factors[0] + shift

    def step(x: Tensor, y: Tensor, options: dict[str, float] = {"scale": 2.0}) -> Tensor:  # noqa: B006
        return helper(x) * options["scale"]

    return SimpleNamespace(step=step, helper=helper)


@change(defaults)
def default_number(program: SimpleNamespace) -> None:
    program.helper.__defaults__ = (3.0, [2.0])


@change(defaults)
def default_number_of_a_keyword(program: SimpleNamespace) -> None:
    program.helper.__kwdefaults__["shift"] = 3.0


@change(defaults)
def item_of_a_default(program: SimpleNamespace) -> None:
    program.helper.__defaults__[1][0] = 3.0


@change(defaults)
def entry_of_a_default(program: SimpleNamespace) -> None:
    program.step.__defaults__[0]["scale"] = 3.0


class Agent:
    rate = 2.0

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.scale = 2.0
        self.options = {"scale": 2.0}
        self.target = torch.ones(2)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - self.target * self.rate) * self.scale * self.options["scale"]


def method() -> SimpleNamespace:
    agent = Agent()
    return SimpleNamespace(step=agent.step, agent=agent)


@change(method)
def number_of_self(program: SimpleNamespace) -> None:
    program.agent.scale = 3.0


@change(method)
def entry_of_self(program: SimpleNamespace) -> None:
    program.agent.options["scale"] = 3.0


@change(method)
def options_of_self(program: SimpleNamespace) -> None:
    program.agent.options = {"scale": 3.0}


@change(method)
def model_of_self(program: SimpleNamespace) -> None:
    torch.manual_seed(1)
    program.agent.model = nn.Linear(4, 2, bias=False)


@change(method)
def tensor_of_self(program: SimpleNamespace) -> None:
    program.agent.target = torch.zeros(2)


@change(method)
def class_of_self(program: SimpleNamespace) -> Any:
    Agent.rate = 3.0
    return lambda: setattr(Agent, "rate", 2.0)


def run(program: SimpleNamespace, step: Callable[..., Any], i: int) -> list[Any]:
    """A call, and all that is there afterwards."""
    torch.manual_seed(i)
    result = step(*batch(i))
    found = [result.detach().clone(), torch.get_rng_state()]
    model, optimizer = getattr(program, "model", None), getattr(program, "optimizer", None)
    if model is not None:
        found += [value.clone() for value in model.state_dict().values()]
        found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if optimizer is not None:
        for state in optimizer.state.values():
            found += [value.clone() for value in state.values() if isinstance(value, Tensor)]
    return found


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", CHANGES)
def test_noticed(name: str) -> None:
    make, change, kept = CHANGES[name]
    unchanged = make()
    expected = [run(unchanged, unchanged.step, i) for i in range(CALLS)]
    eager, twin = make(), make()
    captured = fastmlp.capture(twin.step, fuse=False)
    recorded = getattr(twin, "recorded", 2)
    undo = []
    try:
        for i in range(CALLS):
            if i == CHANGED:
                assert captured.replays == CHANGED - recorded
                undo = [change(eager), change(twin)]
            now = run(eager, eager.step, i)
            if i < CHANGED:
                assert equal(now, expected[i])
            if i == CHANGED:
                assert not equal(now, expected[i])
            assert equal(run(twin, captured, i), now), f"call {i}"
    finally:
        for function in reversed(undo):
            if function is not None:
                function()
    if kept:
        assert captured.replays == CALLS - recorded
    else:
        assert CALLS - recorded > captured.replays >= CALLS - recorded - 3


def test_hooks_of_arguments_are_noticed() -> None:
    """They belong to one tensor, so that a recording of all that look alike cannot have them."""

    def slope(x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad((x**3).sum(), x)
        return slope

    captured, twin = fastmlp.capture(slope), fastmlp.capture(slope, otherwise="eager")
    tensors = [batch(i)[0].requires_grad_() for i in range(6)]
    for x in tensors[:4]:
        assert torch.equal(captured(x), slope(x))
        twin(x)
    assert captured.replays == 2
    for x in tensors[4:]:
        x.register_hook(lambda gradient: gradient * 2)
    message = r"fastmlp: capture: .*slope: an argument, .*, has hooks, .*: do in the function what they do"
    with pytest.raises(fastmlp.CaptureError, match=message):
        captured(tensors[4])
    with pytest.warns(RuntimeWarning, match="has hooks"):
        assert torch.equal(twin(tensors[4]), slope(tensors[4]))
    assert torch.equal(twin(tensors[5]), slope(tensors[5]))
    assert torch.equal(captured(tensors[0]), slope(tensors[0]))
    assert (captured.replays, twin.replays) == (3, 2)


def test_results_may_have_hooks() -> None:
    def doubled(x: Tensor) -> Tensor:
        y = x * weight
        y.register_hook(lambda gradient: gradient * 2)
        return y

    weight = nn.Parameter(torch.ones(4))
    captured = fastmlp.capture(doubled)
    for i in range(4):
        assert torch.equal(captured(batch(i)[0]), batch(i)[0])
    assert captured.replays == 2


def test_an_argument_that_a_variable_holds_too() -> None:
    """It is that very tensor in a recording; with another one in its place there is another recording."""
    held = torch.ones(3)

    def function(a: Tensor, b: Tensor) -> Tensor:
        held.add_(a)
        return held * b + a

    captured, other = fastmlp.capture(function), torch.full((3,), 2.0)
    calls = [(0, 1)] * 3 + [(1, 1), (1, 0), (0, 1), (1, 1), (1, 1), (1, 0), (1, 0), (0, 1)]
    for pair in calls:
        tensors, before = (held, other), held.clone()
        found = captured(*(tensors[i] for i in pair))
        after = held.clone()
        held.copy_(before)
        expected = function(*(tensors[i] for i in pair))
        assert torch.equal(found, expected)
        assert torch.equal(after, held)
        held.copy_(after.remainder(5))
    assert captured.replays >= 4
