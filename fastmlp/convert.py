"""Conversion of models that were written with `torch.nn`, and what it achieved.

`convert(model)` swaps the classes of modules and touches nothing else. `convert(model, trace=True)` lets torch.fx
record the forward, so that activations called as functions are seen too. In the recorded graph one node,
`run_chain`, stands for what a `fastmlp.Sequential` of the same modules would do; the modules stay where they are,
and so do the keys of the `state_dict`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import fx, nn

from fastmlp import reference
from fastmlp.activations import IDENTITY
from fastmlp.classes import fused_class, plain_class, stands_in
from fastmlp.modules import Alone, Linear, Sequential, parts
from fastmlp.trace import Traced, activation_of, load, run_chain, traced
from fastmlp.trace.recording import Tracer

__all__ = ["Entry", "Report", "convert", "fusion_report", "revert", "run_chain"]

# The names that these have in pickles of models that were recorded before they had files of their own.
_Traced, _Tracer, _load = Traced, Tracer, load

M = TypeVar("M", bound=nn.Module)


#: An attribute of every module that was converted. In its `__dict__`, so that copies and pickles have it too.
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
    `self.fc1(x).relu_()`, `self.act(self.fc1(x))`. A layer takes part where its output has one user. Modules with
    hooks, and those of torch.nn that hold layers, such as `torch.nn.TransformerEncoderLayer`, are called.

    A forward is recorded by executing it, on a copy of the modules, and then it and what was recorded are executed on
    an example and compared, operation by operation. Functions of torch are recorded also where they make tensors
    (`torch.zeros(4)`), draw random numbers (`torch.randn(4)`) or read parameters, so they run at every call. What
    would happen only once is refused: changing a buffer, a parameter, an attribute or a global variable, drawing
    numbers from `random` or numpy, reading elements of a tensor into Python. What a forward prints, writes to a file
    or logs is not looked at: it happens while recording, and not again. Values of Python that the forward only reads,
    such as `self.flag`, stay as they were. An argument that has a default is recorded as that default where the forward
    asks for it (`if scale is None`); the recorded module refuses any other value, and `inputs` is the way to record
    one.

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
        >>> model = convert(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)))
        >>> type(model), type(model[0])
        (<class 'fastmlp.modules.Sequential'>, <class 'fastmlp.modules.Linear'>)
        >>> fusion_report(model)
        fused  0 + 1 + 2
    """
    _check(model)
    if trace:
        return traced(model, inputs)
    if inputs is not None:
        raise ValueError("fastmlp: inputs are examples for trace=True, and trace is False")
    for module in model.modules():
        fused = None if isinstance(module, torch.jit.ScriptModule) else fused_class(type(module))
        # The forward of an instance may call whatever its author wrote it for.
        if fused is None or "forward" in module.__dict__:
            continue
        # Other threads may call the module meanwhile: its class is the last that changes, and the first that goes back.
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
        # A slice of a converted module has its class, and no mark.
        if _MARK in module.__dict__ or stands_in(type(module))
    }
    for name, module in converted.items():
        if plain_class(type(module)) is None:
            raise ValueError(
                f"fastmlp: {name or 'model'} has become a {type(module).__name__} since it was converted, of which no "
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


class Entry(NamedTuple):
    """A line of a `Report`.

    Attributes:
        names: of the modules, and in a traced model of the calls, that execute as one operation; or of the one
            that does not.
        reason: why it does not; empty for what is fused.
    """

    names: tuple[str, ...]
    reason: str


class Report(tuple[Entry, ...]):
    """What `fusion_report` found, an `Entry` each. Printed, one line each."""

    def __repr__(self) -> str:
        return "\n".join(
            f"{'kept ' if entry.reason else 'fused'}  {' + '.join(entry.names)}{entry.reason and f': {entry.reason}'}"
            for entry in self
        )

    __str__ = __repr__


def fusion_report(model: nn.Module) -> Report:
    """Says which layers and activations of a model run fused, which do not, and why.

    It looks at the model as it is now: before or after `convert`, copied, loaded, with hooks added since, in training
    mode or not. Whether the kernels then take a certain input is for `explain` to say.

    Args:
        model: any module.

    Returns:
        A tuple of entries, each with names and a reason; printed, it is text.

    Raises:
        TypeError: if `model` is not a module.

    Example:
        >>> class SimpleNN(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.act, self.fc2 = nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)
        ...
        ...     def forward(self, x):
        ...         return self.fc2(self.act(self.fc1(x)))
        >>> fusion_report(convert(SimpleNN()))
        fused  fc1
        kept   act: it is called by itself; trace=True sees what comes before it
        fused  fc2
        >>> fusion_report(convert(SimpleNN(), trace=True))
        fused  fc1 + act + fc2
    """
    _check(model)
    entries: list[Entry] = []
    seen: set[nn.Module] = set()
    registered = set(model.modules())
    scripted: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(scripted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            # Of what is in it nothing is executed by Python.
            scripted = (*scripted, f"{path}." if path else "")
        found = list(_found(module))
        for names, modules, reason in found:
            if seen.isdisjoint(modules):
                entries.append(Entry(tuple([f"{path}.{name}".strip(".") or "model" for name in names]), reason))
        for _, modules, _ in found:
            seen.update(modules)
        for name, reason in _unregistered(module, registered):
            entries.append(Entry((f"{path}.{name}".strip("."),), reason))
    return Report(entries)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastmlp: model must be a torch.nn.Module, got {type(model).__name__}")


# What runs fused.

_Found = tuple[list[str], list[nn.Module], str]


def _found(module: nn.Module) -> Iterator[_Found]:
    """Names, modules and reason of what a module executes itself; of a layer, the layer."""
    if isinstance(module, torch.jit.ScriptModule):
        yield [""], [], "it is a module of torch.jit, which runs its own code; convert the model before it is scripted"
        return
    if isinstance(module, fx.GraphModule):
        found = _found_in_graph(module)
    elif type(module).forward is Sequential.forward:
        children = {name: child for name, child in module._modules.items() if child is not None}
        found = _found_in_children(children, {name: name for name in children})
    else:
        found = iter([([""], [module], _why_by_itself(module))])
    for names, modules, reason in found:
        # Modules that are neither layers nor activations have entries of their own, if they hold some.
        if not modules or not reason or _matters(modules[0]):
            yield names, [m for m in modules if _matters(m)], reason


def _found_in_children(children: Mapping[str, nn.Module], names: Mapping[str, str]) -> Iterator[_Found]:
    for part in parts(children):
        keys, reason = ([part.name], part.reason) if isinstance(part, Alone) else (part.names, "")
        yield [names[key] for key in keys], [children[key] for key in keys], reason


def _found_in_graph(module: fx.GraphModule) -> Iterator[_Found]:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is run_chain:
            nodes: dict[str, fx.Node] = node.args[1]
            names = {key: str(attribute.target) for key, attribute in nodes.items()}
            yield from _found_in_children({key: module.get_submodule(name) for key, name in names.items()}, names)
        elif node.op == "call_module" and type(module.get_submodule(node.target)) in reference.MODULES:
            yield [node.target], [module.get_submodule(node.target)], _why_not_in_a_chain(node)
        elif activation_of(node) is not None:
            yield [node.name], [], _why_not_in_a_chain(node)


def _matters(module: nn.Module) -> bool:
    # By name, since quantized layers and the wrappers of other libraries are no subclasses.
    return type(module) in reference.MODULES or "Linear" in type(module).__name__


def _unregistered(module: nn.Module, registered: set[nn.Module]) -> Iterator[tuple[str, str]]:
    """Attributes of a module that hold layers which it does not know of, and why they do not run fused."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    for name, value in module.__dict__.items():
        if name == "_modules" or not isinstance(value, (list, tuple, dict)):
            continue
        held = list(value.values() if isinstance(value, dict) else value)
        layers = {m for item in held if isinstance(item, nn.Module) for m in item.modules() if _matters(m)}
        if layers - registered:
            kind, wanted = ("dictionary", "ModuleDict") if isinstance(value, dict) else ("list", "ModuleList")
            kind = "tuple" if isinstance(value, tuple) else kind
            yield (
                name,
                f"its layers are in a plain {kind}, where torch.nn.Module sees none of them, nor their parameters; "
                f"make it a torch.nn.{wanted}",
            )


def _why_by_itself(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if type(module) is Linear:
        return ""
    if type(module) is nn.Linear:
        return "it is not converted"
    if type(module) in reference.MODULES:
        return "it is called by itself; trace=True sees what comes before it"
    if isinstance(module, nn.LazyLinear):
        return "it has no parameters yet; convert again after a first call"
    kind = type(module)
    return f"its class {kind.__module__}.{kind.__qualname__} is not torch.nn.Linear and may compute something else"


def _why_not_in_a_chain(node: fx.Node) -> str:
    before = node.all_input_nodes[0] if node.all_input_nodes else None
    if before is None or before.target is not run_chain:
        return "no layer that is fused precedes it"
    if len(before.users) == 1:
        return "it was recorded apart from the layers before it"
    return f"the result before it is used {len(before.users)} times"
