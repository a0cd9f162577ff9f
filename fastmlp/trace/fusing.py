"""Finds chains of layers and activations in a graph of torch.fx, and puts one call in place of each.

`fastmlp.trace` calls `fuse` on what recording.py has recorded. explain.py asks `activation_of` and looks for
`run_chain` when it reports what runs fused.
"""

import operator
from collections.abc import Iterator, Mapping
from itertools import pairwise
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastmlp._load import _C
from fastmlp.activations import BY_FUNCTION, DEFAULTS, Activation, module_of
from fastmlp.runs import FUSABLE, Child, run_parts

__all__ = ["activation_from", "activation_of", "fuse", "held", "names_in", "run_chain"]


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
    try:
        return Activation(name, **given)
    except ValueError:
        return None  # a number that is left to torch, such as an alpha of 0 of CELU, which torch refuses


def activation_from(node: fx.Node) -> tuple[Activation, list[fx.Node]] | None:
    """The activation that a call computes, or begins to compute where it takes several; with all of these calls.

    Several make the sine of a multiple, as SIREN has it: `torch.sin(30 * z)`, where nothing else uses the product.
    """
    activation = activation_of(node)
    if activation is not None:
        return activation, [node]
    frequency = _factor_of(node)
    if frequency is None or len(node.users) != 1:
        return None
    (sine,) = node.users
    if activation_of(sine) != _SINE:
        return None
    return Activation("sin", frequency=frequency), [node, sine]


_SINE = Activation("sin")
_PRODUCTS = (("call_function", operator.mul), ("call_function", torch.mul), ("call_method", "mul"))


def _factor_of(node: fx.Node) -> float | None:
    """The number that a call multiplies a tensor by, which a float of the kernels can hold."""
    if (node.op, node.target) not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    factors = [arg for arg in node.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
    if len(factors) != 1 or len(node.all_input_nodes) != 1:
        return None
    # A tensor of another dtype may hold what is too large; torch's product would be infinite.
    return float(factors[0]) if abs(factors[0]) <= torch.finfo(torch.float32).max else None


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


#: What a call of a chain stands for: a module, or the tensors of a layer.
Member: TypeAlias = nn.Module | Tensors


def _member(module: fx.GraphModule, node: fx.Node, last: fx.Node | None) -> tuple[Member, list[fx.Node]] | None:
    """The module, or a new one that computes the same, with which a call may be part of a chain; or its tensors.

    Args:
        module: of the graph.
        node: the call.
        last: the call of which it has to get the result, if any.

    Returns:
        Also the calls that it stands for.
    """
    tensors = _tensors_of(module, node)
    if tensors is None and len(node.all_input_nodes) != 1:
        return None
    if tensors is None and node.op != "call_module":
        found = activation_from(node)
        return None if found is None else (module_of(found[0]), found[1])
    if last is not None and _input_of(node) is not last:
        return None
    if tensors is not None:
        return tensors, [node]
    called = module.get_submodule(str(node.target))
    return (called, [node]) if type(called) in FUSABLE else None


def _chain_from(module: fx.GraphModule, first: fx.Node) -> tuple[dict[fx.Node, Member], list[fx.Node]]:
    """What follows a layer, as long as nothing else sees what is passed on, each by its last call; and all calls."""
    found = _member(module, first, None)
    if found is None or not isinstance(found[0], (nn.Linear, tuple)):
        return {}, []
    chain: dict[fx.Node, Member] = {first: found[0]}
    calls, gapless = [first], True
    while len(calls[-1].users) == 1:
        (node,) = calls[-1].users
        found = _member(module, node, calls[-1])
        if found is None:
            break
        gapless = gapless and all(_before(b) is a for a, b in pairwise([calls[-1], *found[1]]))
        # A chain runs where its first call stood, so a Dropout joins it only if no other call stood between them:
        # random numbers must be drawn in the order of the forward.
        if type(found[0]) is nn.Dropout and not gapless:
            break
        calls += found[1]
        chain[calls[-1]] = found[0]
    return chain, calls


def fuse(module: fx.GraphModule) -> None:
    """Puts one call of `run_chain` in place of each chain of calls, in the graph of a module."""
    graph = module.graph
    taken: set[fx.Node] = set()
    for first in list(graph.nodes):
        chain, calls = ({}, []) if first in taken else _chain_from(module, first)
        if not chain:
            continue
        taken.update(calls)
        with graph.inserting_before(first):
            layers = {node.name: _read(module, node, member) for node, member in chain.items()}
            call = graph.call_function(run_chain, (_input_of(first), layers))
        calls[-1].replace_all_uses_with(call)
        for node in reversed(calls):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def _read(module: fx.GraphModule, node: fx.Node, member: Member) -> Any:
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
