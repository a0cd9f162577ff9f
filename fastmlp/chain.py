"""Reads a model as the flat list of modules that its input passes through, one after another.

`fastmlp.freeze` and `fastmlp.TrainStep` call it first. It says what a model is made of; which of the modules can be
frozen or trained is for its callers to say.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastmlp._errors import not_a_child, not_a_module, place_of
from fastmlp.activations import module_of
from fastmlp.linear import Linear
from fastmlp.modules import Sequential
from fastmlp.runs import FUSABLE, form_obstacle, original_forwards, watched_obstacle
from fastmlp.trace import (
    Reshape,
    activation_from,
    ending_of,
    flattening_of,
    names_in,
    place_of_inner,
    record,
    run_chain,
)

__all__ = [
    "AT_ENDS",
    "CONTAINERS",
    "LEAVES",
    "Ends",
    "Link",
    "Uncompared",
    "ends_of",
    "layers_of",
    "link_of_tensors",
    "links",
    "obstacle_of_form",
    "replaced",
]

#: The modules that stand before the layers of a chain or after them, and the attributes that say what they do.
AT_ENDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    Reshape: ("name", "numbers"),
}

#: What a function of each row is called that may follow the last layer.
_HEADS: dict[type[nn.Module], str] = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax"}

#: The classes of the modules that a chain is made of.
_KINDS: tuple[type[nn.Module], ...] = (*FUSABLE, nn.AlphaDropout, nn.BatchNorm1d, *AT_ENDS)

#: The forward of each of them, unless somebody has replaced it.
LEAVES = original_forwards(_KINDS)

#: The forwards of containers that call one child after another. Containers are dissolved.
CONTAINERS = (nn.Sequential.forward, Sequential.forward)


class Link(NamedTuple):
    """A module of a chain.

    Attributes:
        name: where it is in the model, as `named_modules` has it; for an activation or a flattening that the forward
            calls as a function, the name of the call.
        module: the module itself, or a new one for such a call.
    """

    name: str
    module: nn.Module


class Uncompared(TypeError):
    """A forward that was recorded as a chain, and cannot be compared with a call of it or differs from that.

    Attributes:
        chain: what was recorded. Its parameters may be why the forward cannot be called.
    """

    def __init__(self, text: str, chain: list[Link]) -> None:
        super().__init__(text)
        self.chain = chain


def links(model: nn.Module, name: str = "") -> list[Link]:
    """The modules through which `model(input)` passes one after another, with containers dissolved.

    The leaves are layers (exactly `torch.nn.Linear` and `fastmlp.Linear`), the activations that have a fused form,
    `torch.nn.Identity`, `Dropout`, `AlphaDropout` and `BatchNorm1d`, in whatever mode they are. The first one may be a
    `torch.nn.Flatten` of all dimensions from 1 on, which also stands for calls that do the same, such as
    `x.flatten(1)` and `x.view(x.size(0), -1)`. After the last layer there may be a `torch.nn.Softmax` or `LogSoftmax`
    along the features, and after that `torch.nn.Flatten`, `Unflatten`, and calls such as `x.squeeze(-1)` and
    `x.view(-1, 2, 3)`. Activations that follow these come first in the list, since they compute the same there. Modules
    other than containers are recorded as `convert(model, trace=True)` does.

    Args:
        model: any module.
        name: where it is, if it is a part of another one.

    Raises:
        TypeError: naming the module and the reason, if the model is not one chain of such modules: hooks, replaced
            forwards, parametrizations, other classes, or a forward that uses a result twice or does something else.

    Example:
        >>> [name for name, _ in links(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 1))))]
        ['0', '1.0', '1.1']
    """
    if not isinstance(model, nn.Module):
        raise not_a_module(model)
    found = list(_links(name, model))
    first = found[:1] if found and isinstance(found[0].module, nn.Flatten) else []
    for link in first:
        if len(found) > 1 and _numbers(link.module) != (1, -1):
            dims = "dimensions {} to {}".format(*_numbers(link.module))
            _refuse(*link, f"it flattens {dims}, and only 1 to -1 can be taken")
    layers: list[Link] = []
    ending: list[Link] = []
    for link in found[len(first) :]:
        if type(link.module) in AT_ENDS:
            if type(link.module) in _HEADS and ending:
                _refuse(*link, f"it follows {place_of(*ending[-1])}, where the features may lie otherwise")
            ending.append(link)
            continue
        role = FUSABLE.get(type(link.module))
        after = [] if role in ("nothing", "dropout") or isinstance(link.module, nn.AlphaDropout) else ending
        for before in after:
            if type(before.module) in _HEADS:
                _refuse(*before, f"only a change of shape may follow it, and {place_of(*link)} does")
            if role != "activation":
                _refuse(
                    *before,
                    "only the first module of a chain may flatten its input, and others change the shape only behind "
                    f"the last layer, but {place_of(*link)} follows",
                )
        layers.append(link)
    return [*first, *layers, *ending]


class Ends(NamedTuple):
    """What a chain does before its layers and after them.

    Attributes:
        flattens: whether it flattens all dimensions of its input from 1 on.
        matrices_only: whether its input has two dimensions then, or must have them.
        head: what it makes of the rows of the last layer: none, softmax or log_softmax.
        reshapings: calls that give the output another shape, each the method and its arguments, sizes one by one.
    """

    flattens: bool
    matrices_only: bool
    head: str
    reshapings: list[tuple[str, tuple[int, ...]]]


def ends_of(chain: Sequence[Link]) -> Ends:
    """The ends of a chain that `links` has made.

    Example:
        >>> ends_of(links(nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Unflatten(-1, (2, 2)))))
        Ends(flattens=False, matrices_only=False, head='softmax', reshapings=[('unflatten', (-1, 2, 2))])
    """
    flattens = bool(chain) and isinstance(chain[0].module, nn.Flatten)
    ending = [link.module for link in chain[flattens:] if type(link.module) in AT_ENDS]
    heads = [module for module in ending if type(module) in _HEADS]
    return Ends(
        flattens,
        any(module.dim == 1 for module in heads),
        _HEADS[type(heads[0])] if heads else "none",
        [(_method(module), _numbers(module)) for module in ending if module not in heads],
    )


def layers_of(chain: Sequence[Link]) -> Sequence[Link]:
    """A chain without its ends."""
    return [link for link in chain if type(link.module) not in AT_ENDS]


def _method(module: nn.Module) -> str:
    return module.name if isinstance(module, Reshape) else type(module).__name__.lower()


def _numbers(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Flatten):
        return module.start_dim, module.end_dim
    if isinstance(module, nn.Unflatten):
        return module.dim, *module.unflattened_size
    assert isinstance(module, Reshape)
    return module.numbers


def _links(name: str, module: nn.Module) -> Iterator[Link]:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        _refuse(name, module, "it is a module of torch.jit, which runs its own code; use the model that was scripted")
    if kind in LEAVES:
        reason = replaced(module, LEAVES[kind]) or watched_obstacle(module) or obstacle_of_form(module)
        if reason is not None:
            _refuse(name, module, reason)
        yield Link(name, module)
    elif kind.forward in CONTAINERS:
        reason = replaced(module, kind.forward) or watched_obstacle(module)
        if reason is not None:
            _refuse(name, module, reason)
        for key, child in module._modules.items():
            if child is None:
                raise not_a_child(_join(name, key))
            yield from _links(_join(name, key), child)
    elif (place := place_of_inner(module)) is not None:
        inner = f"model.{_join(name, place)}"
        _refuse(name, module, f"it only calls the module {inner}, which is the one to use")
    elif isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        _refuse(name, module, f"{kind.__name__} is not a module with parameters yet; call the model once before")
    elif not isinstance(module, fx.GraphModule) and (
        isinstance(module, _KINDS) or kind.__module__.startswith("torch.")
    ):
        _refuse(name, module, f"{kind.__name__} is not a module that is fused")
    else:
        yield from _recorded(name, module)


def replaced(module: nn.Module, forward: Callable[..., Any]) -> str | None:
    """What is to be said of a module whose class computes by another forward than this one; None if it does not."""
    kind = type(module)
    own = kind.forward is not forward or kind.__call__ not in (nn.Module.__call__, Linear.__call__)
    return f"the forward of {kind.__name__} was replaced" if own else None


def obstacle_of_form(module: nn.Module) -> str | None:
    """Why no chain takes a module of one of its classes as it is; None if it does."""
    if isinstance(module, (nn.Softmax, nn.LogSoftmax)) and not (type(module.dim) is int and module.dim in (-1, 1)):
        return f"its dim is {module.dim!r}, expected -1 or 1, the dimension of the features"
    if isinstance(module, nn.Unflatten) and not (type(module.dim) is int and _are_sizes(module.unflattened_size)):
        return f"its arguments are {module.dim!r} and {module.unflattened_size!r}, expected an int and a tuple of ints"
    if isinstance(module, nn.Flatten) and not _are_sizes((module.start_dim, module.end_dim)):
        return f"its dimensions are {module.start_dim!r} and {module.end_dim!r}, expected ints"
    return form_obstacle(module)


def _are_sizes(sizes: object) -> bool:
    return isinstance(sizes, tuple) and all(type(size) is int and abs(size) < 2**62 for size in sizes)


def _recorded(name: str, module: nn.Module) -> Iterator[Link]:
    reason = watched_obstacle(module)
    if reason is not None:
        _refuse(name, module, reason)
    try:
        recorded, check = record(module)
    except RuntimeError as error:
        raise TypeError(f"{error}") from error
    # An argument that was recorded as its default has no users, so it is no input of the chain.
    inputs = [node for node in recorded.graph.nodes if node.op == "placeholder" and _is_input(node)]
    if len(inputs) != 1:
        _refuse(name, module, f"its forward has {len(inputs)} inputs")
    (source,) = inputs
    left = [node for node in recorded.graph.nodes if node.op.startswith("call_")]
    own: list[Link] = []
    flattening = flattening_of(source)
    if flattening is not None:
        own.append(Link(_join(name, flattening.node.name), nn.Flatten()))
        yield own[0]
        left = [node for node in left if node not in (flattening.node, *flattening.sizes)]
        source = flattening.node
    while True:
        if len(source.users) != 1:
            reason = f"its forward uses {_value(source)} {len(source.users)} times, where a chain does once"
            _refuse(name, module, reason)
        (node,) = source.users
        if node.op == "output":
            break
        for link in _links_of(name, module, recorded, node, source):
            own.append(link)
            yield link
        found = activation_from(node)
        calls = [node] if found is None else found[1]
        left = [call for call in left if call not in calls]
        source = calls[-1]
    if node.args != (source,):
        _refuse(name, module, "its forward returns something else than one tensor")
    if left:
        _refuse(name, module, f"its forward calls {left[0].name}, which is not part of a chain of layers")
    if flattening is not None and flattening.features is not None and not any(_is_layer(link) for link in own):
        # The comparison sees whether the layer after it has so many in_features, if it has that layer.
        _refuse(name, module, f"its forward makes rows of {flattening.features} elements, and no layer follows in it")
    try:
        check()
    except RuntimeError as error:
        raise Uncompared(f"{error}", own) from error


def _is_layer(link: Link) -> bool:
    return FUSABLE.get(type(link.module)) == "layer"


def _is_input(node: fx.Node) -> bool:
    return not node.args or bool(node.users)


def _links_of(name: str, module: nn.Module, traced: fx.GraphModule, node: fx.Node, source: fx.Node) -> Iterator[Link]:
    activation, ending = activation_from(node), ending_of(node, source)
    if node.op == "call_function" and node.target is run_chain:
        layers: dict[str, Any] = node.args[1]  # type: ignore[assignment]
        for layer in layers.values():
            if isinstance(layer, tuple):
                link = link_of_tensors(module, traced, layer)
                if link is None:
                    others = "other tensors than the weight and bias of one module"
                    _refuse(name, module, f"its forward calls linear with {others}")
                yield Link(_join(name, link.name) if link.name else name, link.module)
            else:
                yield from _links(_join(name, str(layer.target)), traced.get_submodule(str(layer.target)))
        return
    elif node.op == "call_module" and node.args == (source,) and not node.kwargs:
        targets = [str(node.target)]
    elif activation is not None and node.all_input_nodes == [source]:
        yield Link(_join(name, activation[1][-1].name), module_of(activation[0]))
        return
    elif ending is not None:
        reason = obstacle_of_form(ending)
        if reason is not None:
            _refuse(_join(name, node.name), ending, reason)
        yield Link(_join(name, node.name), ending)
        return
    else:
        _refuse(name, module, f"its forward calls {node.name}, which is not part of a chain of layers")
    for target in targets:
        yield from _links(_join(name, target), traced.get_submodule(target))


def link_of_tensors(module: nn.Module, traced: fx.GraphModule, pair: tuple[fx.Node, fx.Node | None]) -> Link | None:
    """A layer that a forward calls as a function, with the weight and bias of one module, as a link of that module.

    None if these tensors are not the weight and bias of one module.

    Args:
        module: whose forward it is.
        traced: its recording.
        pair: what reads the weight and the bias there.
    """
    path = str(pair[0].target).rpartition(".")[0]
    # The recording has a dictionary of its own for the parameters of the module that was recorded.
    owner = traced.get_submodule(path) if path else module
    own = owner._parameters
    expected = [_join(path, key) if own.get(key) is not None else None for key in ("weight", "bias")]
    if not {"weight", "bias"} <= own.keys() or [part and str(part.target) for part in pair] != expected:
        return None
    return Link(path, sharing(owner))


def sharing(owner: nn.Module) -> nn.Linear:
    """A layer that has the parameters of another module: whatever becomes of them there becomes of them here."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer._parameters = owner._parameters
    layer.out_features, layer.in_features = owner._parameters["weight"].shape  # type: ignore[union-attr]
    return layer


def _value(node: fx.Node) -> str:
    """What errors call a value of a recorded forward."""
    if node.op == "placeholder":
        return f"its input {node.name}"
    if node.op == "call_function" and node.target is run_chain:
        return f"the result of {list(names_in(node.args[1]))[-1]}"  # type: ignore[arg-type]
    return f"the result of {node.target if node.op == 'call_module' else node.name}"


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _refuse(name: str, module: nn.Module, reason: str) -> NoReturn:
    raise TypeError(f"fastmlp: {place_of(name, module)} cannot be part of a chain of layers: {reason}")
