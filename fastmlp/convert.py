"""Conversion of models that were written with `torch.nn`, and back.

`convert(model)` swaps the classes of modules and touches nothing else. `convert(model, trace=True)` has fastmlp/trace
record the forward, so that activations called as functions are seen too.
"""

from typing import Any, Literal, TypeVar, overload

import torch
from torch import fx, nn

from fastmlp._errors import not_a_module
from fastmlp.activations import IDENTITY
from fastmlp.classes import fused_class, plain_class, stands_in
from fastmlp.linear import Linear
from fastmlp.trace import traced

__all__ = ["convert", "revert"]

M = TypeVar("M", bound=nn.Module)

#: The attribute that marks a converted module. It is in the module's `__dict__`, so copies and pickles have it too.
_MARK = "_fastmlp_converted"


@overload
def convert(model: M, trace: Literal[False] = False, inputs: None = None) -> M: ...


@overload
def convert(model: nn.Module, trace: Literal[True], inputs: tuple[Any, ...] | None = None) -> fx.GraphModule: ...


@overload
def convert(model: nn.Module, trace: bool, inputs: tuple[Any, ...] | None = None) -> nn.Module: ...


def convert(model: nn.Module, trace: bool = False, inputs: tuple[Any, ...] | None = None) -> nn.Module:
    """Makes the layers of an existing model run fused.

    Without `trace` this happens in place: modules whose class is exactly `torch.nn.Linear` or `torch.nn.Sequential`
    get the class `fastmlp.Linear` or `fastmlp.Sequential`; those of a subclass of `torch.nn.Sequential` that inherits
    its forward get a subclass of both, of the same name. Everything else stays: the modules themselves, their
    parameters, keys, modes and hooks, and optimizers made before. Other subclasses, parametrized layers, modules of
    torch.jit and lazy layers that have not run yet are left as they are. `revert` takes it back. Tools that look for
    exactly `torch.nn.Linear`, such as `torch.ao.quantization`, want the model reverted.

    With `trace` the model stays as it is, and a `torch.fx.GraphModule` with the same modules, parameters and keys is
    returned, in which activations are fused however they are called: `torch.relu(self.fc1(x))`,
    `self.fc1(x).relu_()`, `self.act(self.fc1(x))`, `torch.sin(30 * self.fc1(x))`. A layer takes part where its output
    has one user; so does one that is called as a function with tensors of the model: `F.linear(x, self.weight,
    self.bias)`. Modules with hooks, and those of torch.nn that hold layers, such as `torch.nn.TransformerEncoderLayer`,
    are called.

    A forward is recorded by executing it, on a copy of the modules, and then it and what was recorded are executed on
    an example and compared, operation by operation. Functions of torch are recorded also where they make tensors
    (`torch.zeros(4)`), draw random numbers (`torch.randn(4)`) or read parameters, so they run at every call. What
    would happen only once is refused: changing a buffer, a parameter, an attribute or a global variable, drawing
    numbers from `random` or numpy, reading elements of a tensor into Python. What a forward prints, writes to a file
    or logs is not looked at: it happens while recording, and not again. Values of Python that the forward only reads,
    such as `self.flag`, stay as they were. An argument that has a default is recorded as that default where the forward
    asks for it (`if scale is None`); the recorded module refuses any other value, and `inputs` is the way to record
    one. With `inputs` a forward may also ask its arguments for their shapes, lengths and places (`if x.dim() == 1`,
    `len(x)`, `if x.is_cuda`): it is recorded as it goes with the examples, and the recorded module refuses arguments
    of which it would get another answer.

    `fusion_report` says what came of it. Converting twice is converting once. Code that looks for exactly
    `torch.nn.Linear`, such as `model.apply(init)` with `if type(m) == nn.Linear`, passes converted layers by without a
    word: initialise first and convert then, or write `isinstance(m, nn.Linear)`.

    Args:
        model: any module; a single `torch.nn.Linear` too.
        trace: whether to record the forward with torch.fx.
        inputs: with `trace`, a tuple of examples of the forward's arguments by position, which it is recorded and
            compared with. By default they are made from the sizes of the layers. What they cover has to be given in
            every call.

    Returns:
        `model`, or the recorded module.

    Raises:
        TypeError: if `model` is not a module, or `inputs` not a tuple.
        ValueError: for `inputs` without `trace`.
        RuntimeError: with `trace`, for a forward that torch.fx cannot record, or would record wrongly: whose course
            depends on data, on `self.training` (as in `F.dropout(x, training=self.training)`) or on whether gradients
            are recorded, or that changes something, or with hooks on the model itself, or in which gradients or
            autocast are switched. The message names the reason and, if there is one, the line.

    Example:
        >>> import fastmlp
        >>> model = convert(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)))
        >>> type(model) is fastmlp.Sequential, type(model[0]) is fastmlp.Linear
        (True, True)
        >>> fastmlp.fusion_report(model)
        fused  0 + 1 + 2
    """
    _check(model)
    if trace:
        return traced(model, inputs)
    if inputs is not None:
        raise ValueError("fastmlp: inputs are examples for trace=True, and trace is False")
    for module in model.modules():
        fused = None if isinstance(module, torch.jit.ScriptModule) else fused_class(type(module))
        # A forward that was set on the instance stays what its author wrote, so the class is not changed under it.
        if fused is None or "forward" in module.__dict__:
            continue
        # The class changes last (and `revert` changes it first), because other threads may call the module meanwhile.
        if fused is Linear:
            module.__dict__["activation"] = IDENTITY
        module.__dict__[_MARK] = True
        module.__class__ = fused
    return model


def revert(model: M) -> M:
    """Takes back `convert(model)`, in place.

    Modules that were `fastmlp.Linear` or `fastmlp.Sequential` before stay so. A module made by
    `convert(model, trace=True)` keeps its graph: the model that it was made from is what to go back to.

    Args:
        model: any module.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: before anything is changed, if a converted module can no longer be what it was: a layer that has
            been given an activation since, or a parametrization.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 50), Linear(50, 1, activation="tanh"))
        >>> revert(convert(model))
        Sequential(
          (0): Linear(in_features=10, out_features=50, bias=True)
          (1): Linear(in_features=50, out_features=1, bias=True, activation=tanh)
        )
        >>> type(model), type(model[0])
        (<class 'torch.nn.modules.container.Sequential'>, <class 'torch.nn.modules.linear.Linear'>)
    """
    _check(model)
    converted = {
        name: module
        for name, module in model.named_modules()
        # A slice of a converted Sequential has the class that was made for it, but not the mark.
        if _MARK in module.__dict__ or stands_in(type(module))
    }
    for name, module in converted.items():
        if plain_class(type(module)) is None:
            raise ValueError(
                f"fastmlp: {name or 'model'} was converted and is of type {type(module).__name__} by now, of which no "
                "torch.nn module can be made; take off what was put on it first"
            )
        if isinstance(module, Linear) and module.activation != IDENTITY:
            raise ValueError(
                f"fastmlp: {name or 'model'} has been given the activation {module.activation!r} since it was "
                "converted, which torch.nn.Linear cannot have; set it to None first"
            )
    for module in converted.values():
        plain = plain_class(type(module))
        assert plain is not None
        module.__class__ = plain
        module.__dict__.pop(_MARK, None)
        module.__dict__.pop("activation", None)
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise not_a_module(model)
