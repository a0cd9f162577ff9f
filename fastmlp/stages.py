"""Reads a model for `fastmlp.freeze`: its layers with what is folded into them, and a watch that notices changes.

Called when a model is frozen, and again after each change of it. frozen.py does the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

import torch
from torch import Tensor, nn

from fastmlp import reference
from fastmlp._errors import described, place_of
from fastmlp._load import _C
from fastmlp.activations import DEFAULTS, IDENTITY, Activation, resolve
from fastmlp.chain import AT_ENDS, Ends, Link, ends_of, layers_of, links
from fastmlp.frozen_graph import CALLED, read
from fastmlp.linear import Linear
from fastmlp.recipe import Constant, Graph, Recipe

__all__ = ["GraphPlan", "Layer", "Plan", "Stage", "Tensors", "check_alike", "layers_of_stages", "seen"]

#: For each module that is watched, its parameters and buffers by name.
Tensors: TypeAlias = Sequence[Mapping[str, Tensor | None]]


class Layer(NamedTuple):
    """A layer as it is frozen: with what is folded into it."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype  # of the weight before anything was folded into it


class Norm(NamedTuple):
    """A BatchNorm1d that is folded into a layer. `place` is its position among the watched modules."""

    name: str
    place: int
    eps: float

    def affine(self, features: int, expected: str, tensors: Tensors, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factor and summand of each feature: (x - mean) / sqrt(var + eps) * weight + bias."""
        own = {
            key: _tensor(f"{self.name}.{key}", tensors[self.place].get(key), device).double()
            for key in ("running_mean", "running_var", "weight", "bias")
            if key.startswith("running_") or tensors[self.place].get(key) is not None
        }
        for key, tensor in own.items():
            if tensor.shape != (features,):
                raise RuntimeError(
                    f"fastmlp: {self.name}.{key} has shape {list(tensor.shape)}, expected [{features}], {expected}"
                )
        scale = (own["running_var"] + self.eps).rsqrt()
        if "weight" in own:
            scale = scale * own["weight"]
        shift = -own["running_mean"] * scale
        return scale, shift + own["bias"] if "bias" in own else shift


@dataclass
class Stage:
    """A layer and what is folded into it. `place` is its position among the watched modules."""

    name: str
    place: int
    activation: Activation
    before: list[Norm]
    after: list[Norm] = field(default_factory=list)

    def where(self, key: str) -> str:
        """How a parameter of the layer is called in the model."""
        return f"{self.name}.{key}" if self.name else key

    def layer(self, tensors: Tensors) -> Layer:
        """Weight and bias as they are now."""
        linear = tensors[self.place]
        if not {"weight", "bias"} <= linear.keys():
            raise TypeError(f"fastmlp: the parameters of {self.name} are not where torch.nn.Linear keeps them")
        weight = _tensor(self.where("weight"), linear["weight"])
        own = linear["bias"]
        bias = None if own is None else _tensor(self.where("bias"), own, weight.device)
        dtype = weight.dtype
        if str(dtype).removeprefix("torch.") not in _C.dtypes():
            raise RuntimeError(
                f"fastmlp: {self.where('weight')} has dtype {dtype}, expected one of {', '.join(_C.dtypes())}"
            )
        if weight.dim() != 2:
            shape = f"{self.where('weight')} has shape {list(weight.shape)}"
            raise RuntimeError(f"fastmlp: {shape}, expected two dimensions, (out_features, in_features)")
        if bias is not None and bias.dtype != dtype:
            expected = f"expected {dtype}, that of {self.where('weight')}"
            raise RuntimeError(f"fastmlp: {self.where('bias')} has dtype {bias.dtype}, {expected}")
        out_features, in_features = weight.shape
        if bias is not None and bias.shape != (out_features,):
            shape = f"{self.where('bias')} has shape {list(bias.shape)}"
            raise RuntimeError(f"fastmlp: {shape}, expected [{out_features}], the out_features of the layer")
        layer = self.name or "the layer"
        for norm in reversed(self.before):
            scale, shift = norm.affine(in_features, f"the in_features of {layer}", tensors, weight.device)
            weight = weight.double()
            bias = weight @ shift if bias is None else bias.double() + weight @ shift
            weight = weight * scale
        for norm in self.after:
            scale, shift = norm.affine(out_features, f"the out_features of {layer}", tensors, weight.device)
            weight = weight.double() * scale[:, None]
            bias = shift if bias is None else bias.double() * scale + shift
        return Layer(weight, bias, dtype)


def check_alike(stage: Stage, layer: Layer, first: Stage, expected: Layer) -> None:
    """Raises unless a layer has the dtype and the device of the first one."""
    name = stage.where("weight")
    if layer.dtype != expected.dtype:
        raise RuntimeError(
            f"fastmlp: {name} has dtype {layer.dtype}, expected {expected.dtype}, that of {first.where('weight')}"
        )
    if layer.weight.device != expected.weight.device:
        where = f"expected {expected.weight.device}, where {first.where('weight')} is"
        raise RuntimeError(f"fastmlp: {name} is on {layer.weight.device}, {where}")


def layers_of_stages(stages: Sequence[Stage], tensors: Tensors) -> list[Layer]:
    """The layers of a chain as they are now, which fit together."""
    layers = [stage.layer(tensors) for stage in stages]
    for stage, layer, before in zip(stages, layers, [None, *layers], strict=False):
        check_alike(stage, layer, stages[0], layers[0])
        if before is not None and layer.weight.shape[1] != before.weight.shape[0]:
            raise RuntimeError(
                f"fastmlp: {stage.where('weight')} has shape {list(layer.weight.shape)}, expected "
                f"{before.weight.shape[0]} in the last dimension, the out_features of the layer before"
            )
    return layers


class Plan(NamedTuple):
    """A chain: its layers, and what it does before and after them."""

    stages: list[Stage]
    ends: Ends

    @property
    def matrices_only(self) -> bool:
        """Whether inputs must have two dimensions, but for those that are flattened."""
        return self.ends.matrices_only or any(stage.before or stage.after for stage in self.stages)

    def fits(self, tensors: Tensors) -> bool:
        """Whether it is still what the model is, with these tensors."""
        return True


@dataclass
class GraphPlan:
    """A graph, with the places of modules among those that are watched.

    Attributes:
        networks: the layers of each.
        constants: of each its place, and that of the norm that it is of, if it is of one.
        recipe: as `_C.load_frozen_graph` takes it.
        matrices_only: whether inputs must have two dimensions.
        sizes: of the layers, when it was read.
    """

    networks: list[list[Stage]]
    constants: list[tuple[int, Constant, Norm | None]]
    recipe: Recipe
    matrices_only: bool
    sizes: list[object] = field(default_factory=list)

    def fits(self, tensors: Tensors) -> bool:
        """Whether it is still what the model is, with these tensors: of the same shapes and dtypes."""
        return self.sizes_of(tensors) == self.sizes

    def sizes_of(self, tensors: Tensors) -> list[object]:
        """Shapes and dtypes of all that it reads."""
        places = [stage.place for stages in self.networks for stage in stages] + [one[0] for one in self.constants]
        found = (tensor for place in places for tensor in tensors[place].values())
        return [tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in found]

    def values(self, tensors: Tensors, first: Layer) -> list[Tensor]:
        """The constants as they are now, where the first layer is and of its dtype."""
        device, dtype = first.weight.device, first.dtype
        found = []
        for place, (name, key, features), norm in self.constants:
            if norm is not None:
                pair = norm.affine(features, "its num_features", tensors, device)
                found.append(pair[key == "shift"].to(dtype))
                continue
            where = f"{name}.{key}" if name else key
            tensor = _tensor(where, tensors[place].get(key), device)
            if tensor.dtype != dtype:
                raise RuntimeError(f"fastmlp: {where} has dtype {tensor.dtype}, expected {dtype}, that of the layers")
            found.append(tensor.reshape(-1).clone())
        return found


def _tensor(name: str, tensor: Tensor | None, device: torch.device | None = None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fastmlp: {name} must be a torch.Tensor, got {described(tensor)}")
    obstacle = _C.device_obstacle(str(tensor.device))
    if obstacle is not None:
        raise RuntimeError(f"fastmlp: {name} is on {tensor.device}, and {obstacle}")
    if device is not None and tensor.device != device:
        raise RuntimeError(f"fastmlp: {name} is on {tensor.device}, expected {device}, where the layer's weight is")
    reason = _C.obstacle(tensor, ())
    if reason is not None and tensor.is_floating_point():
        raise RuntimeError(f"fastmlp: {name} cannot be frozen: {reason}")
    return tensor.detach()


def _stages_of(chain: Sequence[Link], places: Mapping[str, int]) -> list[Stage]:
    stages: list[Stage] = []
    norms: list[Link] = []  # for the next layer

    def folded(link: Link) -> Norm:
        return Norm(link.name, places[link.name], cast(nn.BatchNorm1d, link.module).eps)

    for link in chain:
        module = link.module
        stage = stages[-1] if stages else None
        if isinstance(module, nn.Linear):
            if link.name not in places:
                _refuse(link, "it is no submodule of the model")
            activation = module.activation if isinstance(module, Linear) else IDENTITY
            stages.append(Stage(link.name, places[link.name], activation, [folded(norm) for norm in norms]))
            norms = []
        elif isinstance(module, nn.BatchNorm1d):
            if module.training:
                _refuse(link, "it is in training mode; call model.eval() first")
            if module.running_mean is None or module.running_var is None:
                _refuse(link, "it has no running statistics")
            if stage is not None and stage.activation == IDENTITY and not norms:
                stage.after.append(folded(link))
            else:
                norms.append(link)
        elif isinstance(module, (nn.Dropout, nn.AlphaDropout)):
            if module.training and module.p > 0:
                _refuse(link, "it is in training mode; call model.eval() first")
        elif resolve(module) != IDENTITY:
            if stage is None:
                _refuse(link, "no layer precedes it")
            if norms:
                _refuse(norms[0], "there is no layer between it and an activation, nor after it")
            if stage.activation != IDENTITY:
                _refuse(link, "the layer before it has an activation already")
            stage.activation = resolve(module)
    if norms:
        _refuse(norms[0], "an activation precedes it and no layer follows")
    if not stages:
        raise TypeError("fastmlp: model cannot be frozen: it has no layer")
    return stages


def _refuse(link: Link, reason: str) -> NoReturn:
    raise TypeError(f"fastmlp: {place_of(link.name, link.module)} cannot be frozen: {reason}")


# How a model is watched.

#: A module as `_C.Watch` takes it: the position of its parent in the list, its name there, the module, its number of
#: children (-1 for a leaf), and the names of the attributes, parameters and buffers to watch.
_Watched: TypeAlias = tuple[int, str, nn.Module, int, Sequence[str], Sequence[str], Sequence[str]]

#: How often a model is read again because another thread has exchanged its modules meanwhile.
_ATTEMPTS = 100


def seen(model: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[_C.Watch, Tensors]:
    """A watch of a model, and the tensors that it recorded: all of one moment.

    The plan of the watch is a `Plan`, or a `GraphPlan` where the model is no chain. `inputs` are examples of the
    arguments of a graph, or None.

    The watch of a chain begins before anything is read that it compares, so that no change falls between.
    """
    for _ in range(_ATTEMPTS):
        before = _held(model)
        try:
            watch = _watch_of(model, inputs, before)
        except Exception as error:
            # If something was exchanged meanwhile, the error may be about a mixture of old and new: read again.
            if _are_others(before, _held(model)):
                continue
            if "OptimizedModule" in str(error):
                raise TypeError(
                    "fastmlp: model is, or holds, what torch.compile returned, which runs compiled code; freeze the "
                    "module itself, compiled._orig_mod, since a frozen network needs no compilation"
                ) from error
            raise
        # A graph is read before its watch begins, so the watch may be one of what was put in since.
        if isinstance(watch.plan, GraphPlan) and _are_others(before, _held(model)):
            continue
        tensors = watch.read()
        if tensors is not None:
            return watch, tensors
    raise RuntimeError(
        "fastmlp: another thread gave the model other modules or tensors again and again while it was read: call again "
        "when that thread is done"
    )


def _watch_of(model: nn.Module, inputs: tuple[Any, ...] | None, before: Sequence[object]) -> _C.Watch:
    try:
        chain = links(model)
        entries, places = _watched(model, chain, None)
        watch = _C.Watch(entries)
        watch.plan = Plan(_stages_of(layers_of(chain), places), ends_of(chain))
    except TypeError as error:
        # What another thread changes meanwhile may be no chain, though it was one before and will be one.
        if not isinstance(model, nn.Module) or _are_others(before, _held(model)):
            raise
        try:
            return _watch_of_graph(model, read(model, inputs))
        except TypeError as other:
            if str(other) == str(error):
                raise
            text = str(other).removeprefix("fastmlp: ")
            raise TypeError(f"{error}; nor is it a graph of layers: {text}") from other
    return watch


def _watch_of_graph(model: nn.Module, graph: Graph) -> _C.Watch:
    links = [*(link for network in graph.networks for link in network), *graph.called]
    entries, places = _watched(model, links, graph.tensors)
    watch = _C.Watch(entries)
    norms = {link.name: link.module for link in graph.called if isinstance(link.module, nn.BatchNorm1d)}
    constants = [
        (
            places[constant.name],
            constant,
            Norm(constant.name, places[constant.name], norms[constant.name].eps) if constant.name in norms else None,
        )
        for constant in graph.constants
    ]
    networks = [_stages_of(chain, places) for chain in graph.networks]
    watch.plan = GraphPlan(networks, constants, graph.recipe, graph.matrices_only)
    return watch


def _held(model: nn.Module) -> list[object]:
    """All modules, tensors and their memory, which is none that anything else can get while this list lives."""
    found: list[object] = []
    for module in _modules_of(model):
        found.append(module)
        for tensor in (*tuple(module._parameters.values()), *tuple(module._buffers.values())):
            found.append(tensor)
            if tensor is not None and torch._C._has_storage(tensor):
                found.append(tensor.untyped_storage())
    return found


def _are_others(before: Sequence[object], after: Sequence[object]) -> bool:
    """Whether a model holds something else than before."""

    def identity(part: object) -> int:
        # Each call of untyped_storage makes a Python object of its own for the same memory.
        return part._cdata if isinstance(part, torch.UntypedStorage) else id(part)

    return list(map(identity, before)) != list(map(identity, after))


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules; another thread may replace some meanwhile."""
    if not isinstance(model, nn.Module):
        return []
    found, seen = [model], {id(model)}
    for module in found:
        children = [child for child in tuple(module._modules.values()) if child is not None and id(child) not in seen]
        seen.update(map(id, children))
        found.extend(children)
    return found


def _watched(
    model: nn.Module, chain: Sequence[Link], tensors: Sequence[tuple[str, str]] | None
) -> tuple[list[_Watched], dict[str, int]]:
    """The modules of a chain and those that hold them, as `_C.Watch` takes them, and where each is in the list.

    Args:
        model: that they are of.
        chain: the modules.
        tensors: of a graph, the parameters and buffers that are watched besides: names of modules, and their own. Of
            a graph all modules are watched.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    # An activation that the forward calls as a function is no module of the model, so it cannot be watched. Of a layer
    # that it calls so the module is watched that holds its parameters, as a layer or as what it is besides.
    watched: dict[str, nn.Module] = {}
    for link in chain:
        module = modules.get(link.name)
        if link.module is module:
            watched[link.name] = link.module
        elif module is not None and link.module._parameters is module._parameters:
            watched.setdefault(link.name, link.module)
    places: dict[str, int] = {}
    found: list[_Watched] = []

    def add(name: str) -> int:
        if name not in places:
            parent, _, key = name.rpartition(".")
            above = add(parent) if name else 0
            places[name] = len(found)
            module, link = modules[name], watched.get(name)
            attributes, parameters, buffers = _what_matters(link or module)
            own = [key for other, key in tensors or () if other == name]
            parameters = [*dict.fromkeys([*parameters, *(key for key in own if key in module._parameters)])]
            buffers = [*dict.fromkeys([*buffers, *(key for key in own if key in module._buffers)])]
            children = -1 if link is module else len(module._modules)
            found.append((above, key, module, children, attributes, parameters, buffers))
        return places[name]

    for name in ("", *watched, *(() if tensors is None else modules)):
        add(name)
    return found, places


def _what_matters(module: nn.Module) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Names of the attributes, parameters and buffers that say what a module of a chain computes."""
    if isinstance(module, nn.Linear):
        return ("activation",) if isinstance(module, Linear) else (), ("weight", "bias"), ()
    if isinstance(module, nn.BatchNorm1d):
        # The number of batches is watched, because training changes the statistics without raising their version
        # counters, but raises that of this number.
        return ("training", "eps"), ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
    if type(module) in AT_ENDS:
        return AT_ENDS[type(module)], (), ()
    if isinstance(module, (nn.Dropout, nn.AlphaDropout)):
        return ("training", "p"), (), ()
    if type(module) in CALLED:
        return (*CALLED[type(module)], ())
    name = reference.MODULES.get(type(module))
    return (*(DEFAULTS[name] if name else ()), *(("approximate",) if name == "gelu" else ())), (), ()
