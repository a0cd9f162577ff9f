"""Layers that stand in for those of `torch.nn`."""

import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Sizes
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as nn_module
from torch import Tensor, nn

from fastmlp import functional, reference
from fastmlp._errors import described
from fastmlp._load import _C
from fastmlp.activations import DEFAULTS, IDENTITY, Activation, ActivationLike, module_of, resolve
from fastmlp.autograd import Names, composed_forward, run
from fastmlp.ops import Stack, stack_of

__all__ = ["MLP", "Linear", "Sequential"]


class _Called(nn.Module):
    """Calls cost a third of those of `torch.nn.Module` while nothing, such as a hook, wants to see them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.__call__`."""
        if not torch.compiler.is_compiling():
            output = _C.call_module(self, args, kwargs)
            if output is not NotImplemented:
                return output
            # Another thread may have reverted the module since this call began: it is what its class is now.
            kind = type(self)
            following: Any = super(_Called, kind) if issubclass(kind, _Called) else kind
            return following.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class Linear(_Called, nn.Linear):
    """`torch.nn.Linear` with an optional activation, computed as one operation.

    Parameters, initialisation from the same seed and `state_dict` are those of `torch.nn.Linear`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        activation: None, a name, a function such as `torch.relu`, a module of `torch.nn` (class or instance) or a
            `fastmlp.Activation`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an activation without a fused form.
        TypeError: for an activation of the wrong type.

    Shape:
        input (*, in_features), output (*, out_features).

    Example:
        >>> layer = Linear(10, 50, activation="relu")
        >>> layer
        Linear(in_features=10, out_features=50, bias=True, activation=relu)
        >>> layer(torch.zeros(3, 10)).shape
        torch.Size([3, 50])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: ActivationLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act = resolve(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation: Activation = act

    def __setattr__(self, name: str, value: Any) -> None:
        # Whatever form an activation is given in, now or later, it is kept as an Activation.
        kept: Any = resolve(value) if name == "activation" else value
        super().__setattr__(name, kept)

    def forward(self, input: Tensor) -> Tensor:
        """Act(input weight^T + bias)."""
        if not torch.compiler.is_compiling():
            output = _C.run_layer(self, input)
            if output is not None:
                return output
        # Another thread may have reverted the module since this call began.
        activation = getattr(self, "activation", IDENTITY)
        return functional.linear(input, self.weight, self.bias, activation)

    def extra_repr(self) -> str:
        """As `torch.nn.Linear`, and the activation if there is one."""
        text = super().extra_repr()
        return text if self.activation == IDENTITY else f"{text}, activation={self.activation!r}"


class Sequential(_Called, nn.Sequential):
    """`torch.nn.Sequential` whose layers run as one operation.

    Children, their names, `state_dict`, hooks, indexing and editing are those of `torch.nn.Sequential`. At each call
    the longest runs of layers are looked for afresh: a run begins at a module whose class is exactly
    `torch.nn.Linear` or `fastmlp.Linear`; each layer takes the activation module that follows it, if it has a
    fused form; `torch.nn.Identity`, and `torch.nn.Dropout` outside of training, are passed over. A run executes as
    one operation, with one node in the autograd graph, and its children are not called. Every other child is
    called as it is, at its place: other modules, and those that have hooks, are parametrized, or have a forward
    of their own. `fastmlp.explain` names them.

    Args:
        *args: modules, or one dictionary of modules, as `torch.nn.Sequential` takes them.

    Shape:
        as the modules have it; input (*, in_features) for a layer.

    Example:
        >>> model = Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
        >>> model(torch.zeros(3, 10)).shape
        torch.Size([3, 1])
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def forward(self, input: Any) -> Any:
        """The last child's output for the first one's input."""
        if torch.compiler.is_compiling():
            return run_parts(self._modules, input)
        return _C.run_children(self._modules, input)


class MLP(Sequential):
    """A multilayer perceptron with the children that one would write by hand.

    `MLP(10, [50], 1)` holds `Linear(10, 50), ReLU(), Linear(50, 1)` under the keys of the
    `torch.nn.Sequential` of the same modules, so their `state_dict`s are interchangeable. It is a
    `fastmlp.Sequential`, which runs it as one operation.

    Args:
        in_features: size of the last dimension of the input.
        hidden_features: sizes of the hidden layers; may be empty.
        out_features: size of the last dimension of the output.
        activation: after each hidden layer: None, a name, a function such as `torch.relu`, a module of `torch.nn`
            or a `fastmlp.Activation`.
        output_activation: after the last layer; None for none.
        bias: whether the layers have biases.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an activation without a fused form, or a negative size.
        TypeError: for an activation of the wrong type, a size that is no integer, or hidden_features that is no
            sequence.

    Shape:
        input (*, in_features), output (*, out_features).

    Example:
        >>> MLP(10, [50], 1)
        MLP(
          (0): Linear(in_features=10, out_features=50, bias=True)
          (1): ReLU()
          (2): Linear(in_features=50, out_features=1, bias=True)
        )
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sizes[int],
        out_features: int,
        activation: ActivationLike = "relu",
        output_activation: ActivationLike = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inner, last = resolve(activation), resolve(output_activation, "output_activation")
        scalar = isinstance(hidden_features, Tensor) and hidden_features.dim() == 0
        if scalar or isinstance(hidden_features, str) or not isinstance(hidden_features, Iterable):
            raise TypeError(
                "fastmlp: hidden_features must be a sequence of sizes, such as [50] for one hidden layer of 50, "
                f"got {described(hidden_features)}"
            )
        hidden = [_size(f"hidden_features[{i}]", size) for i, size in enumerate(hidden_features)]
        widths = [_size("in_features", in_features), *hidden, _size("out_features", out_features)]
        children: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            children.append(Linear(fan_in, fan_out, bias=bias, device=device, dtype=dtype))
            act = inner if i < len(widths) - 2 else last
            if act != IDENTITY:
                children.append(module_of(act))
        super().__init__(*children)

    def __getitem__(self, index: slice | int) -> nn.Module:
        """A child, or a `fastmlp.Sequential` of several."""
        if isinstance(index, slice):
            return Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _size(name: str, size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        return size
    try:
        if isinstance(size, bool):
            raise TypeError
        number = operator.index(size)
    except TypeError:
        raise TypeError(f"fastmlp: {name} must be an integer, got {described(size)}") from None
    if not 0 <= number < 1 << 63:
        raise ValueError(f"fastmlp: {name} must be at least 0 and below 2^63, got {described(number)}")
    return number


def run_parts(children: Mapping[str, nn.Module | None], input: Any) -> Any:
    """What a `Sequential` of these children computes, for Dynamo, which cannot see into `_C.run_children`."""
    for part in parts(children):
        if isinstance(part, Alone):
            input = part.child(input)
        else:
            input = run(part.stack(), input, tuple(part.parameters), part.called())
    return input


@dataclass
class Run:
    """Children of a `Sequential` that execute as one operation.

    Attributes:
        names: of the children.
        layers: those of them that are layers.
        parameters: weight and, where there is one, bias of each layer.
        has_bias: one for each layer.
        activations: one for each layer.
        is_first: whether their input is that of the whole.
    """

    names: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    has_bias: list[bool] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    is_first: bool = True

    def stack(self) -> Stack:
        """The layers without their tensors."""
        return stack_of(tuple(self.has_bias), tuple(self.activations))

    def called(self) -> Names:
        """What errors call the input and the layers."""
        return ("input" if self.is_first else f"the input of {self.names[0]}", self.layers)


class Alone(NamedTuple):
    """A child of a `Sequential` that is called as it is, and why."""

    name: str
    child: nn.Module
    reason: str


def parts(children: Mapping[str, nn.Module | None]) -> list[Run | Alone]:
    """What a `Sequential` of these children executes, one after the other.

    The rule of csrc/python/modules.cpp once more, for Dynamo, which cannot see into that, and for explanations.
    """
    found: list[Run | Alone] = []
    run: Run | None = None
    for name, child in children.items():
        if child is None:
            raise TypeError(f"fastmlp: child {name!r} is None, expected a module")
        reason = why_called(child) or _why_not_in(run, child)
        if reason is not None:
            found.append(Alone(name, child, reason))
            run = None
            continue
        if run is None or _is_of_another_kind(run, child):
            run = Run(is_first=not found)
            found.append(run)
        _take(run, name, child)
    return found


def why_called(child: nn.Module) -> str | None:
    """Why a child cannot be part of any run, or None."""
    kind = type(child)
    if kind not in _FORWARDS:
        return f"{kind.__name__} is not a module that is fused"
    if kind.forward is not _FORWARDS[kind] or kind.__call__ is not _call_of(kind):
        return f"the forward of {kind.__name__} was replaced"
    reason = watched_obstacle(child)
    if reason is None and kind is nn.Dropout and child.training is not False and child.p != 0:
        reason = "Dropout is in training mode"
    return reason or form_obstacle(child)


def watched_obstacle(module: nn.Module) -> str | None:
    """Why a module has to be called itself, if something such as a hook wants to see that."""
    if any(_GLOBAL_HOOKS):
        return "there are hooks on all modules"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "it was compiled by itself"
    return None


def form_obstacle(module: nn.Module) -> str | None:
    """Why a layer or an activation has no fused form, if its class has one."""
    kind = type(module)
    # As some leave them: tensors, or a form that only torch knows how to refuse.
    names = DEFAULTS[reference.MODULES[kind]] if kind in reference.MODULES else ()
    if not all(isinstance(getattr(module, name), (int, float)) for name in names):
        return "its attributes are not numbers"
    if isinstance(module, nn.GELU) and module.approximate not in ("none", "tanh"):
        return f"its form is {module.approximate!r}"
    # Attributes in place of parameters, as in replicas: the layer knows where they are.
    own = module._parameters
    if kind in (nn.Linear, Linear) and (own.get("weight") is None or "bias" not in own):
        return "its parameters are not where torch.nn.Linear keeps them"
    return None


def _call_of(kind: type[nn.Module]) -> Any:
    return _Called.__call__ if kind is Linear else nn.Module.__call__


def _why_not_in(run: Run | None, child: nn.Module) -> str | None:
    if type(child) is nn.Linear or type(child) is Linear:
        return None
    if run is None:
        return "no layer that is fused precedes it"
    if type(child) is not nn.Dropout and type(child) is not nn.Identity and run.activations[-1] != IDENTITY:
        return "the layer before it has an activation already"
    return None


def _is_of_another_kind(run: Run, child: nn.Module) -> bool:
    weight, first = child._parameters.get("weight"), run.parameters[0]
    return weight is not None and (weight.dtype != first.dtype or weight.device != first.device)


def _take(run: Run, name: str, child: nn.Module) -> None:
    run.names.append(name)
    if type(child) is nn.Linear or type(child) is Linear:
        weight, bias = child._parameters["weight"], child._parameters["bias"]
        assert weight is not None
        run.layers.append(name)
        run.parameters.append(weight)
        if bias is not None:
            run.parameters.append(bias)
        run.has_bias.append(bias is not None)
        run.activations.append(child.activation if isinstance(child, Linear) else IDENTITY)
    elif type(child) is not nn.Dropout and type(child) is not nn.Identity:
        run.activations[-1] = resolve(child)


_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)

#: The modules that may be part of a run, and how each computes, unless somebody has replaced that already.
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, Linear, nn.Dropout, *reference.MODULES)
_FORWARDS = {
    kind: kind.forward
    for kind in _KINDS
    if kind.forward.__module__ == kind.__module__ and not hasattr(kind.forward, "__wrapped__")
}

_C.register_modules(
    nn.Linear,
    Linear,
    nn.Dropout,
    Sequential,
    {kind: (name, tuple(DEFAULTS[name])) for kind, name in reference.MODULES.items()},
    {name: kind for kind, name in enumerate(DEFAULTS)},
    _FORWARDS,
    _GLOBAL_HOOKS,
)
_C.set_composed_forward(composed_forward)
