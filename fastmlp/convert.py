"""Conversion of models that were written with `torch.nn`, and what it achieved.

`convert(model)` swaps the classes of modules and touches nothing else. `convert(model, trace=True)` lets torch.fx
record the forward, so that activations called as functions are seen too. In the recorded graph one node,
`run_chain`, stands for what a `fastmlp.Sequential` of the same modules would do; the modules stay where they are,
and so do the keys of the `state_dict`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, fx, nn

from fastmlp import reference
from fastmlp._load import _C
from fastmlp.activations import BY_FUNCTION, DEFAULTS, IDENTITY, Activation, module_of
from fastmlp.modules import Alone, Linear, Sequential, parts, run_parts

__all__ = ["Entry", "Report", "convert", "fusion_report", "revert"]

M = TypeVar("M", bound=nn.Module)

#: The classes that are swapped, and what for.
_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Sequential: Sequential}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}

#: An attribute of every module that was converted. In its `__dict__`, so that copies and pickles have it too.
_MARK = "_fastmlp_converted"


@overload
def convert(model: M, trace: Literal[False] = False) -> M: ...


@overload
def convert(model: nn.Module, trace: Literal[True]) -> fx.GraphModule: ...


@overload
def convert(model: nn.Module, trace: bool) -> nn.Module: ...


def convert(model: nn.Module, trace: bool = False) -> nn.Module:
    """Makes the layers of an existing model run fused.

    Without `trace` this happens in place: modules whose class is exactly `torch.nn.Linear` or `torch.nn.Sequential`
    get the class `fastmlp.Linear` or `fastmlp.Sequential`. Everything else stays: the modules themselves, their
    parameters, keys, modes and hooks, and optimizers made before. Subclasses, parametrized layers and lazy layers that
    have not run yet are left as they are. `revert` takes it back. Tools that look for exactly `torch.nn.Linear`, such
    as `torch.ao.quantization`, want the model reverted.

    With `trace` the model stays as it is, and a `torch.fx.GraphModule` with the same modules, parameters and keys is
    returned, in which activations are fused however they are called: `torch.relu(self.fc1(x))`,
    `self.fc1(x).relu_()`, `self.act(self.fc1(x))`. A layer takes part where its output has one user. Modules with
    hooks, and those of torch.nn that hold layers, such as `torch.nn.TransformerEncoderLayer`, are called. Of the
    model's attributes and methods only the forward is there; `train`, `eval` and `to` act on the modules that both
    share. As ever with torch.fx, what does not depend on the arguments is computed once, when it is recorded.

    `fusion_report` says what came of it. Converting twice is converting once.

    Args:
        model: any module; a single `torch.nn.Linear` too.
        trace: whether to record the forward with torch.fx.

    Returns:
        `model`, or the recorded module.

    Raises:
        TypeError: if `model` is not a module.
        RuntimeError: with `trace`, for a forward that torch.fx cannot record, or would record wrongly: whose course
            depends on data or on `self.training` (as in `F.dropout(x, training=self.training)`), or with hooks on
            the model itself, or in which gradients or autocast are switched.

    Example:
        >>> model = convert(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)))
        >>> type(model), type(model[0])
        (<class 'fastmlp.modules.Sequential'>, <class 'fastmlp.modules.Linear'>)
        >>> fusion_report(model)
        fused  0 + 1 + 2
    """
    _check(model)
    if trace:
        return _traced(model)
    for module in model.modules():
        fused = _FUSED.get(type(module))
        # The forward of an instance may call whatever its author wrote it for.
        if fused is not None and "forward" not in module.__dict__:
            module.__class__ = fused
            setattr(module, _MARK, True)
            if isinstance(module, Linear):
                module.activation = IDENTITY
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
    converted = {name: module for name, module in model.named_modules() if _MARK in module.__dict__}
    for name, module in converted.items():
        if type(module) not in _PLAIN:
            raise ValueError(f"{name or 'model'} has become a {type(module).__name__} since it was converted")
        if isinstance(module, Linear) and module.activation != IDENTITY:
            raise ValueError(
                f"{name or 'model'} has been given the activation {module.activation!r} since it was converted, "
                "which torch.nn.Linear cannot have; set it to None first"
            )
    for module in converted.values():
        module.__class__ = _PLAIN[type(module)]
        module.__dict__.pop(_MARK)
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
    for path, module in model.named_modules():
        earlier = frozenset(seen)
        for names, modules, reason in _found(module):
            if earlier.isdisjoint(modules) and (not reason or not modules or _matters(modules[0])):
                entries.append(Entry(tuple([f"{path}.{name}".strip(".") or "model" for name in names]), reason))
            seen.update(m for m in modules if _matters(m))
    return Report(entries)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


# What runs fused.

_Found = tuple[list[str], list[nn.Module], str]


def _found(module: nn.Module) -> Iterator[_Found]:
    """Names, modules and reason of what a module executes itself; of a layer, the layer."""
    if isinstance(module, fx.GraphModule):
        yield from _found_in_graph(module)
    elif type(module).forward is Sequential.forward:
        children = {name: child for name, child in module._modules.items() if child is not None}
        yield from _found_in_children(children, {name: name for name in children})
    elif _matters(module):
        yield [""], [module], _why_by_itself(module)


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


# The recorded forward.


def run_chain(input: Any, layers: dict[str, nn.Module]) -> Any:
    """What `fastmlp.Sequential` computes of these modules; the nodes of traced models call it.

    Example:
        >>> run_chain(torch.ones(1, 1), {"fc": nn.Linear(1, 1), "act": nn.Sigmoid()}).shape
        torch.Size([1, 1])
    """
    return run_parts(layers, input) if torch.compiler.is_compiling() else _C.run_children(layers, input)


_METHODS = {name + end: name for name in DEFAULTS for end in ("", "_") if hasattr(Tensor, name + end)}


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that a call of a function or method computes, if it has numbers for parameters."""
    table: Mapping[Any, str] = {"call_function": BY_FUNCTION, "call_method": _METHODS}.get(node.op, {})
    name = table.get(node.target)
    if name is None:
        return None
    # Every function of torch has them in this order.
    order = ("input", *DEFAULTS[name], "inplace")
    if len(node.args) > len(order):
        return None
    given: dict[str, Any] = {**dict(zip(order, node.args, strict=False)), **node.kwargs}
    input, inplace = given.pop("input", None), given.pop("inplace", False)
    if name == "gelu" and given.pop("approximate", "none") == "tanh":
        name = "gelu_tanh"
    plain = all(key in DEFAULTS[name] and isinstance(value, Real) for key, value in given.items())
    if not plain or not isinstance(inplace, bool) or not isinstance(input, fx.Node):
        return None
    return Activation(name, **given)


def _member(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module, or a new one that computes the same, with which a call may be part of a chain."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return called if type(called) in (nn.Linear, Linear, nn.Dropout, *reference.MODULES) else None
    activation = activation_of(node)
    return None if activation is None else module_of(activation)


def _chain_from(module: fx.GraphModule, first: fx.Node) -> dict[fx.Node, nn.Module]:
    """The calls that follow a layer, as long as nothing else sees what they pass on."""
    layer = _member(module, first)
    if not isinstance(layer, nn.Linear):
        return {}
    chain: dict[fx.Node, nn.Module] = {first: layer}
    last, gapless = first, True
    while len(last.users) == 1:
        (node,) = last.users
        member = _member(module, node)
        gapless = gapless and node.prev is last
        # A chain runs where its first call stood. Random numbers must be drawn in the order they were.
        if member is None or (type(member) is nn.Dropout and not gapless):
            break
        chain[node] = member
        last = node
    return chain


def _fuse(module: fx.GraphModule) -> None:
    graph = module.graph
    taken: set[fx.Node] = set()
    for first in list(graph.nodes):
        chain = {} if first in taken else _chain_from(module, first)
        if not chain:
            continue
        taken.update(chain)
        with graph.inserting_before(first):
            layers = {node.name: graph.get_attr(_place(module, node, member)) for node, member in chain.items()}
            call = graph.call_function(run_chain, (first.all_input_nodes[0], layers))
        list(chain)[-1].replace_all_uses_with(call)
        for node in reversed(chain):
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def _place(module: fx.GraphModule, node: fx.Node, member: nn.Module) -> str:
    """Where the module is; an activation that was a function gets a place. It has no keys."""
    if node.op == "call_module":
        return str(node.target)
    name = node.name
    while hasattr(module, name):
        name += "_"
    module.register_module(name, member.train(module.training))
    return name


class _Tracer(fx.Tracer):
    """Records a forward down to the modules of torch.nn and to `run_chain`."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(run_chain,))
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is called as it is. One with hooks is, so that they run at every call."""
        hooked = any(m.__dict__[hooks] for hooks in _HOOKS)
        return hooked or type(m) in (Linear, *reference.MODULES) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A node; none for what runs in a context that the graph would not remember."""
        if _modes() != self._modes:
            raise fx.proxy.TraceError("gradients or autocast are switched in its forward, which is not recorded")
        return super().create_node(kind, *args, **kwargs)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _modes() -> tuple[bool, ...]:
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _traced(model: nn.Module) -> fx.GraphModule:
    hooks = [name for name, value in model.__dict__.items() if name.endswith("_hooks") and value]
    if hooks:
        raise RuntimeError(f"fastmlp: {_name(model)} itself has hooks ({', '.join(hooks)}), which {_ADVICE}")
    (_, in_training), (root, graph) = _record(model, True), _record(model, False)
    for ours, theirs in zip(str(in_training).splitlines(), str(graph).splitlines(), strict=False):
        if ours != theirs:
            raise RuntimeError(
                f"fastmlp: the forward of {_name(model)} depends on self.training, which {_ADVICE}. nn.Dropout in "
                f"place of F.dropout can be recorded. In training it has {ours.strip()}, else {theirs.strip()}"
            )
    module = _Traced(root, graph, _name(model))
    _fuse(module)
    return module


_ADVICE = "a recorded forward would lose; convert(model) without trace keeps it"


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _record(model: nn.Module, training: bool) -> tuple[nn.Module, fx.Graph]:
    # A copy, since torch.fx leaves the constants that it meets on the module itself.
    root = object.__new__(type(model))
    root.__dict__.update(model.__dict__)
    before = {module: module.training for module in root.modules()}
    try:
        for module in before:
            module.training = training
        return root, _Tracer().trace(root)
    except Exception as error:
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record the forward of {_name(model)}; convert(model) without trace "
            f"needs no recording. It says: {error}"
        ) from error
    finally:
        for module, mode in before.items():
            module.training = mode


class _Traced(fx.GraphModule):
    """A graph module with all that the traced module holds: torch.fx takes only what the graph uses."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        constants = self._buffers.keys() - root._buffers.keys()
        self._buffers = {**root._buffers, **{name: self._buffers[name] for name in sorted(constants)}}
        self._non_persistent_buffers_set = root._non_persistent_buffers_set | constants
        self._parameters = dict(root._parameters)
        self._modules = dict(root._modules)

    def _deepcopy_init(self) -> Callable[..., None]:
        return partial(_Traced.__init__, class_name=_name(self))

    def __reduce__(self) -> tuple[Any, ...]:
        build, arguments = super().__reduce__()
        return _load, (build, arguments, _name(self))


def _load(build: Callable[..., fx.GraphModule], arguments: tuple[dict[str, Any], str], name: str) -> fx.GraphModule:
    root = nn.Module()
    root.__dict__.update(arguments[0])
    return _Traced(root, build(*arguments).graph, name)
