"""Which children of a `fastmlp.Sequential` execute as one operation, and why others are called by themselves.

The rule of csrc/python/modules.cpp once more, for Dynamo, which cannot see into that, and for explanations. Both read
one table, `FUSABLE`, which `register` hands to C++. A test draws children at random and asserts that the two agree.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from fastmlp import reference
from fastmlp._errors import not_a_child
from fastmlp._load import _C
from fastmlp.activations import DEFAULTS, HAS_GRADIENT_FROM_OUTPUT, IDENTITY, POSITIVE, Activation, resolve
from fastmlp.autograd import Names, composed_forward, run
from fastmlp.hooks import GLOBAL_HOOKS, has_hooks
from fastmlp.linear import Called, Linear
from fastmlp.ops import Stack, stack_of

__all__ = [
    "FUSABLE",
    "Alone",
    "Child",
    "Layer",
    "Run",
    "form_obstacle",
    "original_forwards",
    "parts",
    "register",
    "run_parts",
    "watched_obstacle",
    "why_called",
]

#: What a `Sequential` runs: a module, or of a recorded forward the weight and bias of a layer that has no module.
Child: TypeAlias = nn.Module | tuple[Tensor, Tensor | None]

#: What a module is in a run: a layer, the activation of the layer before it, dropout of that layer's output (nothing
#: outside of training), or nothing.
Role: TypeAlias = Literal["layer", "activation", "dropout", "nothing"]

#: The modules that may be part of a run, by their exact class, since a subclass may compute something else.
FUSABLE: dict[type[nn.Module], Role] = {
    nn.Linear: "layer",
    Linear: "layer",
    **dict.fromkeys(reference.MODULES, "activation"),
    nn.Identity: "nothing",
    nn.Dropout: "dropout",
}


def original_forwards(kinds: Iterable[type[nn.Module]]) -> dict[type[nn.Module], Callable[..., Any]]:
    """How modules of these classes compute; without those classes whose forward somebody has replaced before us."""
    return {
        kind: kind.forward
        for kind in kinds
        if kind.forward.__module__ == kind.__module__ and not hasattr(kind.forward, "__wrapped__")
    }


_FORWARDS = original_forwards(FUSABLE)


def register(sequential: type[nn.Module]) -> None:
    """Hands the table to csrc/python/modules.cpp, once.

    Args:
        sequential: the class whose forward runs its children.
    """
    _C.register_modules(
        nn.Linear,
        Linear,
        nn.Dropout,
        nn.BatchNorm1d,
        sequential,
        {kind: (name, tuple(DEFAULTS[name])) for kind, name in reference.MODULES.items()},
        {name: kind for kind, name in enumerate(DEFAULTS)},
        original_forwards([*FUSABLE, nn.BatchNorm1d]),
        GLOBAL_HOOKS,
    )
    _C.set_composed_forward(composed_forward)


def run_parts(children: Mapping[str, Child | None], input: Any) -> Any:
    """What a `Sequential` of these children computes, for Dynamo, which cannot see into `_C.run_children`."""
    # The operators that Dynamo sees have no dropout.
    for part in parts(children, drops=False):
        if isinstance(part, Alone):
            input = part.child(input)
        else:
            input = run(part.stack(), input, part.parameters(), part.called())
    return input


@dataclass
class Layer:
    """A layer of a run: its name, its tensors, and the activation and the dropout in training that it computes too."""

    name: str
    weight: Tensor
    bias: Tensor | None
    activation: Activation
    drops: bool = False


@dataclass
class Run:
    """Children of a `Sequential` that execute as one operation.

    Attributes:
        names: of all of these children.
        layers: one for each child that is a layer.
        is_first: whether their input is that of the whole.
    """

    names: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    is_first: bool = True

    def stack(self) -> Stack:
        """The layers without their tensors and their dropout."""
        has_bias = [layer.bias is not None for layer in self.layers]
        return stack_of(tuple(has_bias), tuple([layer.activation for layer in self.layers]))

    def parameters(self) -> tuple[Tensor, ...]:
        """Weight and, where there is one, bias of each layer."""
        tensors = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        return tuple([tensor for tensor in tensors if tensor is not None])

    def called(self) -> Names:
        """What errors call the input and the layers."""
        input = "input" if self.is_first else f"the input of {self.names[0]}"
        return input, [layer.name for layer in self.layers]


class Alone(NamedTuple):
    """A child of a `Sequential` that is called as it is, and why."""

    name: str
    child: nn.Module
    reason: str


def parts(children: Mapping[str, Child | None], drops: bool = True) -> list[Run | Alone]:
    """What a `Sequential` of these children executes, one after the other.

    Args:
        children: as the container holds them.
        drops: whether dropout in training may be part of a run. It may not where a call does not go directly to the
            kernels, or under autocast.

    Raises:
        TypeError: for a child that is None.

    Example:
        >>> [type(part).__name__ for part in parts({"0": nn.Linear(2, 3), "1": nn.Tanh(), "2": nn.LayerNorm(3)})]
        ['Run', 'Alone']
    """
    found: list[Run | Alone] = []
    run: Run | None = None
    for name, child in children.items():
        if child is None:
            raise not_a_child(name)
        if isinstance(child, tuple):
            run = _run_for(run, child[0], found)
            run.names.append(name)
            run.layers.append(Layer(name, *child, IDENTITY))
            continue
        reason = why_called(child) or _why_not_in(run, child, drops)
        if reason is not None:
            found.append(Alone(name, child, reason))
            run = None
            continue
        run = _run_for(run, child._parameters.get("weight"), found)
        _take(run, name, child)
    return found


def _run_for(run: Run | None, weight: Tensor | None, found: list[Run | Alone]) -> Run:
    """The run that goes on, or a new one, where the weight of a child is of another kind than those before it."""
    if run is not None:
        first = run.layers[0].weight
        if weight is None or (weight.dtype, weight.device) == (first.dtype, first.device):
            return run
    run = Run(is_first=not found)
    found.append(run)
    return run


def why_called(child: nn.Module) -> str | None:
    """Why a child cannot be part of any run, or None."""
    kind = type(child)
    if kind not in _FORWARDS:
        return f"{kind.__name__} is not a module that is fused"
    if kind.forward is not _FORWARDS[kind] or kind.__call__ is not _call_of(kind):
        return f"the forward of {kind.__name__} was replaced"
    reason = watched_obstacle(child)
    if reason is None and kind is nn.Dropout and _drops(child):
        # In this order, because only numbers are sure to compare.
        numbers = isinstance(child.p, (int, float)) and 0 < child.p <= 1
        if child.training is not True or not numbers or not isinstance(child.inplace, bool):
            reason = "Dropout is in training mode, and its attributes are not those that torch.nn.Dropout gives it"
    return reason or form_obstacle(child)


def watched_obstacle(module: nn.Module) -> str | None:
    """Why a module must be called by itself, if something such as a hook wants to see its call; None otherwise."""
    if any(GLOBAL_HOOKS):
        return "there are hooks on all modules"
    if has_hooks(module):
        return "it has hooks"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "it was compiled by itself"
    return None


def form_obstacle(module: nn.Module) -> str | None:
    """Why a layer or an activation of a class with a fused form has none; None otherwise."""
    kind = type(module)
    # Users may have set the attributes to tensors, or to a form that only torch knows how to refuse.
    names = DEFAULTS[reference.MODULES[kind]] if kind in reference.MODULES else ()
    if not all(isinstance(getattr(module, name), (int, float)) for name in names):
        return "its attributes are not numbers"
    for name in names:
        if name in POSITIVE[reference.MODULES[kind]] and not getattr(module, name) > 0:
            return f"its {name} is {getattr(module, name)}, expected a number above 0"
    if isinstance(module, nn.GELU) and module.approximate not in ("none", "tanh"):
        return f"its form is {module.approximate!r}"
    # Replicas of DataParallel hold plain attributes in place of parameters, which only the layer's own forward finds.
    own = module._parameters
    if FUSABLE.get(kind) == "layer" and (own.get("weight") is None or "bias" not in own):
        return "its parameters are not where torch.nn.Linear keeps them"
    return None


def _call_of(kind: type[nn.Module]) -> Any:
    return Called.__call__ if kind is Linear else nn.Module.__call__


def _drops(dropout: Any) -> bool:
    """Whether a `Dropout` does anything."""
    return dropout.training is not False and bool(dropout.p != 0)


def _why_not_in(run: Run | None, child: nn.Module, drops: bool) -> str | None:
    role = FUSABLE[type(child)]
    if role == "layer":
        return None
    if role == "dropout" and _drops(child) and (run is None or not drops):
        return "Dropout is in training mode" + ("" if run else ", and no layer that is fused precedes it")
    if run is None:
        return "no layer that is fused precedes it"
    last = run.layers[-1]
    if role == "activation" and last.drops:
        return "a Dropout in training mode precedes it"
    if role == "activation" and last.activation != IDENTITY:
        return "the layer before it has an activation already"
    if role == "dropout" and _drops(child):
        return _why_not_dropped(run, bool(child.inplace))
    return None


def _why_not_dropped(run: Run, in_place: bool) -> str | None:
    first, last = run.layers[0].weight, run.layers[-1]
    if not _C.layers_drop(first.device.type, first.dtype):
        where = f"on {first.device.type.upper()} in {first.dtype}"
        return f"Dropout is in training mode, which layers do not compute {where}"
    if last.drops:
        return "Dropout is in training mode, and the layer before it drops already"
    # torch raises in backward if such an output has been changed.
    if in_place and last.activation != IDENTITY and last.activation.name in HAS_GRADIENT_FROM_OUTPUT:
        return "Dropout is in training mode, and would change in place what an activation keeps for backward"
    return None


def _take(run: Run, name: str, child: nn.Module) -> None:
    run.names.append(name)
    role = FUSABLE[type(child)]
    if role == "layer":
        weight, bias = child._parameters["weight"], child._parameters["bias"]
        assert weight is not None
        activation = child.activation if isinstance(child, Linear) else IDENTITY
        run.layers.append(Layer(name, weight, bias, activation))
    elif role == "activation":
        run.layers[-1].activation = resolve(child)
    elif role == "dropout" and _drops(child):
        run.layers[-1].drops = True
