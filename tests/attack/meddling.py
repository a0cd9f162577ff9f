"""What may happen to a training between two calls of its step."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import fastmlp
from fastmlp import reference
from fastmlp.activations import IDENTITY, module_of
from fastmlp.problems import LOSSES
from tests.attack import drawn
from tests.attack.cases import attempt
from tests.attack.sides import Training
from tests.support.axes import ISAS


class Entry(NamedTuple):
    """Something that happens; `risky` if a step may refuse to go on."""

    make: Callable[[Training], None]
    fits: Callable[[Training], bool] = lambda training: True
    risky: bool = False


def some(training: Training) -> nn.Parameter:
    return training.case.choice(training.side.parameters)


def freeze(training: Training) -> None:
    p = some(training)
    p.requires_grad_(not p.requires_grad)
    training.case.note(f"  requires_grad {[p.requires_grad for p in training.side.parameters]}")
    if not any(p.requires_grad for p in training.side.parameters):
        training.risks.add("nothing to train")


def lr(training: Training) -> None:
    for group in training.side.optimizer.param_groups:
        group["lr"] = float(group["lr"]) * 0.5


def rule(training: Training) -> None:
    group = training.case.choice(training.side.optimizer.param_groups)
    key = training.case.choice(
        [key for key in ("weight_decay", "maximize", "dampening", "amsgrad", "eps") if key in group]
    )
    if key == "dampening" and group["nesterov"]:
        return
    group[key] = not group[key] if isinstance(group[key], bool) else group[key] * 2 + 1e-4
    training.case.note(f"  {key}")


def zero_grad(training: Training) -> None:
    training.side.optimizer.zero_grad(set_to_none=training.case.chance(0.5))


def grad_elsewhere(training: Training) -> None:
    """A gradient that is there already, however it lies."""
    for p in training.side.parameters:
        if training.case.chance(0.6) and p.requires_grad:
            p.grad, how = drawn.lay(training.case, drawn.randn(training.case, *p.shape, dtype=p.dtype), 0.7)
            training.case.note(f"  gradient {how} of {tuple(p.shape)} by {p.stride()}")


def grad_gone(training: Training) -> None:
    some(training).grad = None


def grad_held(training: Training) -> None:
    """Somebody else looks at a gradient, and must not see it change to the next one."""
    training.side.kept += [p.grad for p in training.side.parameters]


def weight_laid(training: Training) -> None:
    """The same parameter, its numbers elsewhere."""
    p = some(training)
    p.data, how = drawn.lay(training.case, p.detach(), 0.9)
    training.case.note(f"  {how}")


def state_laid(training: Training) -> None:
    for state in training.side.optimizer.state.values():
        for key, x in state.items():
            if isinstance(x, torch.Tensor) and x.dim():
                state[key] = drawn.lay(training.case, x, 0.7)[0]


def state_loaded(training: Training) -> None:
    optimizer = training.side.optimizer
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def model_loaded(training: Training) -> None:
    state = {key: x * 0.5 for key, x in training.side.model.state_dict().items()}
    training.side.model.load_state_dict(state)


def parameter_replaced(training: Training) -> None:
    """In the layer and in the optimizer's group, as those do who change a layout."""
    layer = training.case.choice([leaf for leaf in training.side.leaves if isinstance(leaf, nn.Linear)])
    old = layer.weight
    layer.weight = nn.Parameter(drawn.lay(training.case, old.detach(), 0.8)[0], old.requires_grad)
    training.case.note(f"  {tuple(old.shape)} by {layer.weight.stride()}")
    for group in training.side.optimizer.param_groups:
        group["params"] = [layer.weight if p is old else p for p in group["params"]]
    training.side.optimizer.state.pop(old, None)


def activation_replaced(training: Training) -> None:
    case, model = training.case, training.side.model
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if type(child) in reference.MODULES
    ]
    if found:
        parent, name = case.choice(found)
        other = module_of(drawn.activation(case))
        case.note(f"  {parent._modules[name]} by {other}")
        parent._modules[name] = other


def layer_replaced(training: Training) -> None:
    """The optimizer keeps the parameters of the one before."""
    case, model = training.case, training.side.model
    found = [(m, name) for m in model.modules() for name, child in m._modules.items() if isinstance(child, nn.Linear)]
    if found:
        parent, name = case.choice(found)
        parent._modules[name] = copy.deepcopy(parent._modules[name])


def fused_activation(training: Training) -> None:
    layers = [leaf for leaf in training.side.leaves if isinstance(leaf, fastmlp.Linear)]
    if layers:
        training.case.choice(layers).activation = training.case.choice([IDENTITY, drawn.activation(training.case)])


def other_group(training: Training) -> None:
    training.side.optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2, 3, dtype=training.dtype))]})


def loss_broken(training: Training) -> None:
    """A number of the loss that PyTorch refuses, or not."""
    case = training.case
    for loss in (training.side.loss_fn, training.plain_loss):
        number = LOSSES[type(loss)].number
        if number is None:
            loss.reduction = "average"  # type: ignore[assignment]
        else:
            name, _, most, _ = number
            setattr(loss, name, -1.0 if math.isinf(most) else most + 0.5)
    case.note(f"  {training.plain_loss}")


def loss_changed(training: Training) -> None:
    reduction = training.case.choice(["mean", "sum"])
    for loss in (training.side.loss_fn, training.plain_loss):
        loss.reduction = reduction  # type: ignore[assignment]
        number = LOSSES[type(loss)].number
        if number is not None:
            name, _, most, _ = number
            setattr(loss, name, min(0.75, most / 4))


def isa(training: Training) -> None:
    fastmlp.set_isa(training.case.choice(ISAS))


def other_model(training: Training) -> None:
    """Whoever sets it means that it is trained, and is told if it is not."""
    model = copy.deepcopy(training.side.model)
    _, error = attempt(lambda: setattr(training.step, "model", model))
    if error is not None:
        return training.case.refused(error)
    training.case.note("  step.model = another one")
    training.side.model = model


def shared(training: Training) -> None:
    for p in training.side.parameters:
        p.share_memory_()


def modes(training: Training) -> None:
    training.side.model.train(not training.side.model.training)


def mode_of_one(training: Training) -> None:
    leaf = training.case.choice(noise(training))
    leaf.train(not leaf.training)
    training.case.note(f"  {leaf}, training {leaf.training}")


def noise(training: Training) -> list[nn.Module]:
    return [leaf for leaf in training.side.leaves if isinstance(leaf, (nn.Dropout, nn.BatchNorm1d))]


def has_noise(training: Training) -> bool:
    return bool(noise(training))


def noise_changed(training: Training) -> None:
    """Numbers that a dropout or a norm reads at each call."""
    case = training.case
    leaf = case.choice(noise(training))
    if isinstance(leaf, nn.Dropout):
        leaf.p = case.choice([0.0, 0.25, 0.75, 1.0])
    else:
        assert isinstance(leaf, nn.BatchNorm1d)
        leaf.momentum, leaf.eps = case.choice([None, 0.3]), case.choice([1e-5, 0.3])
        leaf.track_running_stats = case.chance(0.7) and leaf.running_mean is not None
    case.note(f"  {leaf}")


def statistics_reset(training: Training) -> None:
    for leaf in noise(training):
        if isinstance(leaf, nn.BatchNorm1d):
            leaf.reset_running_stats()


def inside_inference(training: Training) -> None:
    """A call that cannot be made leaves nothing behind that later ones trip over."""
    layer = next(leaf for leaf in training.side.leaves if isinstance(leaf, nn.Linear))
    x = torch.randn(3, layer.weight.shape[1], dtype=training.dtype)
    with torch.inference_mode():
        training.side.model(x)


MEDDLING: dict[str, Entry] = {
    "requires_grad": Entry(freeze),
    "lr": Entry(lr),
    "a rule of a group": Entry(rule),
    "zero_grad": Entry(zero_grad),
    "gradients of another layout": Entry(grad_elsewhere),
    "a gradient is None": Entry(grad_gone),
    "gradients are held": Entry(grad_held),
    "a parameter's memory": Entry(weight_laid),
    "memory of the state": Entry(state_laid),
    "optimizer.load_state_dict": Entry(state_loaded),
    "model.load_state_dict": Entry(model_loaded),
    "parameter replaced": Entry(parameter_replaced),
    "activation replaced": Entry(activation_replaced),
    "layer replaced": Entry(layer_replaced, risky=True),
    "activation of a layer": Entry(fused_activation),
    "another group": Entry(other_group),
    "loss broken": Entry(loss_broken, risky=True),
    "loss changed": Entry(loss_changed),
    "set_isa": Entry(isa),
    "another model": Entry(other_model, risky=True),
    "share_memory": Entry(shared),
    "train or eval": Entry(modes),
    "train or eval of one": Entry(mode_of_one, has_noise),
    "a dropout or a norm": Entry(noise_changed, has_noise),
    "reset_running_stats": Entry(statistics_reset, has_noise),
    "inference of the model": Entry(inside_inference),
}
