"""Recorded models: modules whose forward is a graph of torch.fx in which layers and activations are fused.

`fastmlp.convert(model, trace=True)` makes them. In the graph one node, `run_chain`, stands for what a
`fastmlp.Sequential` of the same modules would do; the modules stay where they are, and so do the keys of the
`state_dict`.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastmlp import reference
from fastmlp._load import _C
from fastmlp.activations import BY_FUNCTION, DEFAULTS, Activation, module_of
from fastmlp.comparison import compare
from fastmlp.modules import Linear, run_parts
from fastmlp.recording import Tracer, is_library

__all__ = ["Recording", "Traced", "activation_of", "load", "record", "run_chain", "traced"]


def run_chain(input: Any, layers: dict[str, nn.Module]) -> Any:
    """What `fastmlp.Sequential` computes of these modules; the nodes of traced models call it.

    Example:
        >>> run_chain(torch.ones(1, 1), {"fc": nn.Linear(1, 1), "act": nn.Sigmoid()}).shape
        torch.Size([1, 1])
    """
    if torch.compiler.is_compiling():
        return run_parts(layers, input)
    if isinstance(input, fx.Proxy):
        return input.tracer.create_proxy("call_function", run_chain, (input, layers), {})
    return _C.run_children(layers, input)


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


_ADVICE = "a recorded forward would lose; convert(model) without trace keeps it"


class Recording(NamedTuple):
    """A recorded model, and what raises if it does something else than the model."""

    module: "Traced"
    check: Callable[[], None]


def traced(model: nn.Module, inputs: tuple[Any, ...] | None) -> fx.GraphModule:
    """What `convert(model, trace=True, inputs=inputs)` returns."""
    recording = record(model, inputs)
    recording.check()
    return recording.module


def record(model: nn.Module, inputs: tuple[Any, ...] | None = None) -> Recording:
    """The model recorded and fused, not compared with itself yet."""
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record {_name(model)}, a module of torch.jit, whose forward is no code of "
            "Python; convert the model that it was scripted or traced from"
        )
    hooks = [name for name, value in model.__dict__.items() if name.endswith("_hooks") and value]
    if hooks:
        raise RuntimeError(f"fastmlp: {_name(model)} itself has hooks ({', '.join(hooks)}), which {_ADVICE}")
    given = inputs or ()
    with _explained(model):
        with torch.enable_grad():
            in_training = Tracer(given, True).record(model)
            with_gradients = Tracer(given, False).record(model)
            again = Tracer(given, False).record(model)
        tracer = Tracer(given, False)
        with torch.no_grad():
            graph = tracer.record(model)
        _same(model, with_gradients, again, "something that changes from call to call", "Once it has")
        advice = "nn.Dropout in place of F.dropout can be recorded. In training it has"
        _same(model, in_training, with_gradients, "self.training", advice)
        _same(model, with_gradients, graph, "torch.is_grad_enabled()", "With gradients it has")

    def check() -> None:
        with _explained(model):
            compare(model, tracer, with_gradients, inputs)

    # What torch.fx takes the attributes of the graph from, which must not be put on the model.
    root = object.__new__(type(model))
    root.__dict__.update({**model.__dict__, **tracer.constants})
    module = Traced(root, graph, _name(model))
    _fuse(module)
    return Recording(module, check)


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except _Refusal:
        raise
    except Exception as error:
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record the forward of {_name(model)}; convert(model) without trace "
            f"needs no recording. It says: {_text(error)}"
        ) from error


class _Refusal(RuntimeError):
    """An error that is complete as it is."""


def _same(model: nn.Module, first: fx.Graph, second: fx.Graph, what: str, advice: str) -> None:
    for ours, theirs in zip(str(first).splitlines(), str(second).splitlines(), strict=False):
        if ours != theirs:
            raise _Refusal(
                f"fastmlp: the forward of {_name(model)} depends on {what}, which {_ADVICE}. {advice} {ours.strip()}, "
                f"else {theirs.strip()}"
            )


def _text(error: BaseException) -> str:
    """What an error says, and the line of the model's own code where it came from."""
    text = str(error) if isinstance(error, fx.proxy.TraceError) else f"{type(error).__name__}: {error}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(frame.filename)]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


def _name(model: nn.Module) -> str:
    return type(model).__name__


class Traced(fx.GraphModule):
    """A graph module with all that the traced module holds: torch.fx takes only what the graph uses."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        constants = self._buffers.keys() - root._buffers.keys()
        self._buffers = {**root._buffers, **{name: self._buffers[name] for name in sorted(constants)}}
        self._non_persistent_buffers_set = root._non_persistent_buffers_set | constants
        self._parameters = dict(root._parameters)
        self._modules = dict(root._modules)

    def _deepcopy_init(self) -> Callable[..., None]:
        return partial(Traced.__init__, class_name=_name(self))

    def __reduce__(self) -> tuple[Any, ...]:
        build, arguments = super().__reduce__()
        return load, (build, arguments, _name(self))


def load(build: Callable[..., fx.GraphModule], arguments: tuple[dict[str, Any], str], name: str) -> fx.GraphModule:
    """What pickles of recorded modules call."""
    root = nn.Module()
    root.__dict__.update(arguments[0])
    return Traced(root, build(*arguments).graph, name)
