"""Finds chains of layers and activations in a graph of torch.fx, and puts one call in place of each.

`fastmlp.trace` calls `fuse` on what recording.py has recorded. explain.py asks `activation_of` and looks for
`run_chain` when it reports what runs fused.
"""

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastmlp._load import _C
from fastmlp.activations import BY_FUNCTION, DEFAULTS, Activation, module_of
from fastmlp.runs import FUSABLE, Child, run_parts

__all__ = ["activation_of", "fuse", "held", "names_in", "run_chain"]


def run_chain(input: Any, layers: dict[str, Child]) -> Any:
    """What `fastmlp.Sequential` computes of these modules; the nodes of traced models call it.

    A pair of tensors, weight and bias or None, is a layer that the forward calls as a function.

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
    # Every function of torch takes the input, the activation's parameters and `inplace` in this order.
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


#: The weight and the bias of a layer that a forward calls as a function, as a graph reads them from a model.
Tensors: TypeAlias = tuple[fx.Node, fx.Node | None]


def _tensors_of(module: fx.GraphModule, node: fx.Node) -> Tensors | None:
    """Those of a call of `torch.nn.functional.linear` with tensors that a model holds."""
    if node.op != "call_function" or node.target is not F.linear or len(node.args) > 3:
        return None
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    weight, bias = given.get("weight"), given.get("bias")
    read = [part for part in (weight, bias) if part is not None]
    if not isinstance(given.get("input"), fx.Node) or given["input"] in read:
        return None
    if not all(isinstance(part, fx.Node) and part.op == "get_attr" for part in read):
        return None
    assert isinstance(weight, fx.Node)
    return (weight, bias) if held(module, str(weight.target)).dim() == 2 else None  # type: ignore[return-value]


def held(module: fx.GraphModule, target: str) -> Tensor:
    """A parameter, a buffer or another tensor of a graph's module, by its path."""
    path, _, name = target.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), name)
    return tensor


def _input_of(node: fx.Node) -> Any:
    """What a call of a chain gets of the one before it."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _before(node: fx.Node) -> fx.Node:
    """The call before another one; to read a tensor of the model is none."""
    found = node.prev
    while found.op == "get_attr":
        found = found.prev
    return found


def _member(module: fx.GraphModule, node: fx.Node) -> nn.Module | Tensors | None:
    """The module, or a new one that computes the same, with which a call may be part of a chain; or its tensors."""
    tensors = _tensors_of(module, node)
    if tensors is not None:
        return tensors
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return called if type(called) in FUSABLE else None
    activation = activation_of(node)
    return None if activation is None else module_of(activation)


def _chain_from(module: fx.GraphModule, first: fx.Node) -> dict[fx.Node, nn.Module | Tensors]:
    """The calls that follow a layer, as long as nothing else sees what they pass on."""
    layer = _member(module, first)
    if not isinstance(layer, (nn.Linear, tuple)):
        return {}
    chain: dict[fx.Node, nn.Module | Tensors] = {first: layer}
    last, gapless = first, True
    while len(last.users) == 1:
        (node,) = last.users
        member = _member(module, node)
        gapless = gapless and _before(node) is last
        # A chain runs where its first call stood, so a Dropout joins it only if no other call stood between them:
        # random numbers must be drawn in the order of the forward.
        if member is None or _input_of(node) is not last or (type(member) is nn.Dropout and not gapless):
            break
        chain[node] = member
        last = node
    return chain


def fuse(module: fx.GraphModule) -> None:
    """Puts one call of `run_chain` in place of each chain of calls, in the graph of a module."""
    graph = module.graph
    taken: set[fx.Node] = set()
    for first in list(graph.nodes):
        chain = {} if first in taken else _chain_from(module, first)
        if not chain:
            continue
        taken.update(chain)
        with graph.inserting_before(first):
            layers = {node.name: _read(module, node, member) for node, member in chain.items()}
            call = graph.call_function(run_chain, (_input_of(first), layers))
        list(chain)[-1].replace_all_uses_with(call)
        for node in reversed(chain):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def _read(module: fx.GraphModule, node: fx.Node, member: nn.Module | Tensors) -> Any:
    """What stands for a member in the call of a chain."""
    if isinstance(member, tuple):
        return tuple(None if part is None else module.graph.get_attr(str(part.target)) for part in member)
    return module.graph.get_attr(_place(module, node, member))


def names_in(layers: Mapping[str, Any]) -> Iterator[str]:
    """How the model calls what a node of `run_chain` runs: modules, and for a pair of tensors its call."""
    for name, layer in layers.items():
        yield name if isinstance(layer, tuple) else str(layer.target)


def _place(module: fx.GraphModule, node: fx.Node, member: nn.Module) -> str:
    """Where the module is; an activation that was a function gets a place. It has no keys."""
    if node.op == "call_module":
        return str(node.target)
    name = node.name
    while hasattr(module, name):
        name += "_"
    module.register_module(name, member.train(module.training))
    return name
