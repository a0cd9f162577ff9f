"""Finds chains of layers and activations in a graph of torch.fx, and puts one call in place of each.

`fastmlp.trace` calls `fuse` on what recording.py has recorded. explain.py asks `activation_of` and looks for
`run_chain` when it reports what runs fused.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastmlp._load import _C
from fastmlp.activations import BY_FUNCTION, DEFAULTS, Activation, module_of
from fastmlp.runs import FUSABLE, run_parts

__all__ = ["activation_of", "fuse", "run_chain"]


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


def _member(module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module, or a new one that computes the same, with which a call may be part of a chain."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return called if type(called) in FUSABLE else None
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
        # A chain runs where its first call stood, so a Dropout joins it only if no other call stood between them:
        # random numbers must be drawn in the order of the forward.
        if member is None or (type(member) is nn.Dropout and not gapless):
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
