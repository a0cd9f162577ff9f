"""What watches or replaces parts of a training loop, done to the side under attack and to each twin alike."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules import module as nn_module

from tests.attack.sides import TORCHS, Side, Training


def told(side: Side, word: str, result: Any = None) -> Callable[..., Any]:
    """A hook that tells that it was called."""

    def hook(*args: Any, **kwargs: Any) -> Any:
        side.log.append(word)
        return result

    return hook


def on_parameter(index: int) -> Callable[[Side], None]:
    """A hook on its gradient. torch registers none while a parameter is frozen, but keeps the one that it has."""

    def make(side: Side) -> None:
        p = side.parameters[index]
        frozen = not p.requires_grad
        p.requires_grad_(True)
        side.kept.append(p.register_hook(told(side, "tensor hook")))
        p.requires_grad_(not frozen)

    return make


def on_accumulated(index: int) -> Callable[[Side], None]:
    return lambda side: side.kept.append(
        side.parameters[index].register_post_accumulate_grad_hook(told(side, "post accumulate hook"))
    )


def on_node(index: int, before: bool) -> Callable[[Side], None]:
    """As DistributedDataParallel hooks itself to a parameter."""

    def make(side: Side) -> None:
        with torch.enable_grad():
            p = side.parameters[index]
            node = p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        assert node is not None
        hook = told(side, "hook of the node")
        side.kept += [node, node.register_prehook(hook) if before else node.register_hook(hook)]

    return make


def on_step(after: bool) -> Callable[[Side], None]:
    def make(side: Side) -> None:
        register = side.optimizer.register_step_post_hook if after else side.optimizer.register_step_pre_hook
        side.kept.append(register(told(side, "hook of the step")))

    return make


def replaced_step(kind: str) -> Callable[[Side], None]:
    """`optimizer.step` of the instance; "skips" does nothing, "wraps" is named as what it replaces."""

    def make(side: Side) -> None:
        step = side.optimizer.step

        def other(*args: Any, **kwargs: Any) -> Any:
            side.log.append("replaced step")
            return None if kind == "skips" else step(*args, **kwargs)

        made = functools.wraps(step)(other) if kind == "wraps" else other
        side.optimizer.step = made  # type: ignore[method-assign]

    return make


def scheduled(side: Side) -> None:
    """A scheduler replaces `optimizer.step` by a method of its own."""
    side.kept.append(torch.optim.lr_scheduler.LambdaLR(side.optimizer, lambda epoch: 0.5**epoch))


def on_leaf(index: int, kind: str) -> Callable[[Side], None]:
    def make(side: Side) -> None:
        register = getattr(side.leaves[index], f"register_{kind}_hook")
        side.kept.append(register(told(side, f"{kind} hook of a leaf")))

    return make


def on_model(kind: str) -> Callable[[Side], None]:
    return lambda side: side.kept.append(getattr(side.model, f"register_{kind}_hook")(told(side, f"{kind} hook")))


def on_loss(side: Side) -> None:
    side.kept.append(side.loss_fn.register_forward_hook(told(side, "hook of the loss")))


def loss_of_instance(side: Side) -> None:
    forward = side.loss_fn.forward

    def other(*args: Any) -> Any:
        side.log.append("replaced loss")
        return forward(*args)

    side.loss_fn.forward = other


def watch(training: Training) -> None:
    """Draws one of these."""
    case, side = training.case, training.side
    index = case.random.randrange(len(side.parameters))
    # The model has no module of an activation that it calls as a function.
    modules = set(side.model.modules())
    own = [i for i, module in enumerate(side.leaves) if module in modules]
    leaf = own[case.random.randrange(len(side.leaves)) % len(own)]
    kinds = ("forward", "forward_pre", "full_backward")
    options: dict[str, Callable[[Side], None]] = {
        "tensor hook": on_parameter(index),
        "post accumulate hook": on_accumulated(index),
        "hook after a node": on_node(index, False),
        "hook before a node": on_node(index, True),
        "hook after the step": on_step(True),
        "hook before the step": on_step(False),
        "replaced step": replaced_step("calls"),
        "replaced step, wraps": replaced_step("wraps"),
        "replaced step, skips": replaced_step("skips"),
        "scheduler": scheduled,
        "hook of a leaf": on_leaf(leaf, case.choice(kinds)),
        "hook of the model": on_model(case.choice(kinds)),
        "hook of the loss": on_loss,
        "loss of an instance": loss_of_instance,
    }
    name = case.choice(list(options))
    needs_gradient = any(word in name for word in ("tensor hook", "accumulate", "node"))
    if needs_gradient and not side.parameters[index].requires_grad:
        return
    case.act(f"watch: {name}", f"parameter {index}, leaf {leaf}")
    if name.startswith("replaced step") and case.chance(0.4):
        # Whoever replaced it did so before there was a scheduler, or after.
        training.setup("scheduler", scheduled)
    training.setup(name, options[name])
    if name.startswith("replaced step, wraps") and case.chance(0.4):
        training.setup("scheduler", scheduled)
    training.skips = training.skips or "replaced step, skips" in training.risks


def watch_everywhere(training: Training) -> None:
    """Draws what watches all modules, or replaces a method of a class; taken back when the case ends."""
    case, side = training.case, training.side
    kinds = ["global forward hook", "loss of a class"]
    # Twins are torch's own optimizers.
    kind = case.choice([*kinds, "step of a class"] if type(side.optimizer) in TORCHS.values() else kinds)
    case.act(f"watch: {kind}")
    training.risks.add(kind)
    log = training.everywhere
    if kind == "global forward hook":
        handle = nn_module.register_module_forward_hook(lambda *args: log.append("global hook"))
        training.undo.append(handle.remove)
        return
    key, of = ("forward", type(side.loss_fn)) if kind == "loss of a class" else ("step", type(side.optimizer))
    owner: Any = next(cls for cls in of.__mro__ if key in cls.__dict__)
    original = owner.__dict__[key]

    @functools.wraps(original)
    def other(*args: Any, **kwargs: Any) -> Any:
        log.append(kind)
        return original(*args, **kwargs)

    setattr(owner, key, other)
    training.undo.append(lambda: setattr(owner, key, original))
