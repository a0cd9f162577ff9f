"""Recorded models: modules whose forward is a graph of torch.fx in which layers and activations are fused.

`fastmlp.convert(model, trace=True)` makes them. In the graph one node, `run_chain`, stands for what a
`fastmlp.Sequential` of the same modules would do; the modules stay where they are, and so do the keys of the
`state_dict`.
"""

import pickle
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastmlp._load import _C
from fastmlp.activations import BY_FUNCTION, DEFAULTS, Activation, module_of
from fastmlp.classes import Quiet, is_importable, new_class
from fastmlp.runs import FUSABLE, run_parts
from fastmlp.trace.comparison import compare
from fastmlp.trace.outside import Outside, is_library
from fastmlp.trace.recording import Tracer

__all__ = ["Recording", "Traced", "activation_of", "load", "place_of_inner", "record", "run_chain", "traced"]


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


#: What torch puts around a module, and the attribute where the module itself is. DistributedDataParallel is not among
#: them: who leaves it out trains without the other processes.
_AROUND = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}


def place_of_inner(module: nn.Module) -> str | None:
    """The attribute under which a wrapper of torch's has the module that it calls; None for any other module."""
    return _AROUND.get(f"{type(module).__module__}.{type(module).__qualname__}")


def record(model: nn.Module, inputs: tuple[Any, ...] | None = None) -> Recording:
    """The model recorded and fused, not compared with itself yet."""
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record {_name(model)}, a module of torch.jit, whose forward is no code of "
            "Python; convert the model that it was scripted or traced from"
        )
    if type(model).__name__ in ("OptimizedModule", "DataParallel") and (place := place_of_inner(model)) is not None:
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record {_name(model)}, which runs another module in a way of its own; convert "
            f"that one, model.{place}, first and wrap what comes of it"
        )
    if isinstance(model, LazyModuleMixin) and model.has_uninitialized_params():
        raise RuntimeError(
            f"fastmlp: {_name(model)} has no parameters before its first call; call the model once, then convert it"
        )
    hooks = [name for name, value in model.__dict__.items() if name.endswith("_hooks") and value]
    if hooks:
        raise RuntimeError(f"fastmlp: {_name(model)} itself has hooks ({', '.join(hooks)}), which {_ADVICE}")
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        raise TypeError(
            f"fastmlp: inputs must be a tuple of the forward's arguments, got {type(inputs).__name__}; for a single "
            "one pass inputs=(x,)"
        )
    given = tuple(inputs or ())
    with _explained(model), Outside(model):
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
        with _explained(model), Outside(model):
            compare(model, tracer, with_gradients, inputs)

    # What torch.fx takes the attributes of the graph from, which must not be put on the model.
    root = object.__new__(type(model))
    root.__dict__.update({**model.__dict__, **tracer.constants})
    module = _class_for(type(model))(root, graph, _name(model))
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


#: How errors of torch begin where a proxy is among sizes that are arguments of their own.
_SIZED = re.compile(r"(zeros|ones|empty|rand|randn)\(\) (takes|received)")


def _text(error: BaseException) -> str:
    """What an error says, and the line of the model's own code where it came from."""
    text = (
        str(error) if isinstance(error, fx.proxy.TraceError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    )
    sized = _SIZED.match(str(error)) if isinstance(error, TypeError) else None
    if sized is not None:
        text += f"; torch.fx records a size that depends on an argument only as a tuple, torch.{sized[1]}((n, m))"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(frame.filename)]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


def _name(model: nn.Module) -> str:
    return type(model).__name__


#: What a recorded module has of itself, though the model that was recorded may have it too.
_OWN = ("forward", "_compiled_call_impl", "_fastmlp_converted", "_fastmlp_attributes")

#: Classes of recorded modules by what they execute, so that equal recordings are of one class.
_CLASSES: "WeakValueDictionary[Any, type]" = WeakValueDictionary()


class Traced(fx.GraphModule):
    """A graph module with all that the traced module holds: torch.fx takes only what the graph uses."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        mixed = _base(type(self))
        # The class of the model, which may have a __getattr__ of its own, comes when everything is where it looks.
        _become(self, Traced, class_name)
        super().__init__(root, graph, class_name)
        constants = self._buffers.keys() - root._buffers.keys()
        self._buffers = {**root._buffers, **{name: self._buffers[name] for name in sorted(constants)}}
        self._non_persistent_buffers_set = root._non_persistent_buffers_set | constants
        self._parameters = dict(root._parameters)
        self._modules = dict(root._modules)
        more = {k: v for k, v in root.__dict__.items() if k not in (*self.__dict__, *self._buffers, *_OWN)}
        self.__dict__.update(more)
        self._fastmlp_attributes = tuple(more)
        _become(self, mixed, class_name)
        self.recompile()

    def recompile(self) -> Any:
        """As that of `torch.fx.GraphModule`, whose instances have classes of their own that hold their code.

        Those with the same code share one, as `torch.func.stack_module_state` wants it.
        """
        base, name = _base(type(self)), type(self).__name__
        _become(self, base, name)
        code = super().recompile()
        names = tuple(sorted((key, id(value)) for key, value in code.globals.items()))
        object.__setattr__(self, "__class__", _CLASSES.setdefault((base, name, code.src, names), type(self)))
        return code

    def _deepcopy_init(self) -> Callable[..., None]:
        return partial(Traced.__init__, class_name=_name(self))

    def __reduce__(self) -> tuple[Any, ...]:
        if any(
            isinstance(value, torch.Generator) for key, value in vars(self).items() if key.startswith("_opaque_obj")
        ):
            raise pickle.PicklingError(
                f"fastmlp: a recorded {_name(self)} that draws from a torch.Generator of its own cannot be pickled, "
                "since the graph names that object; pickle the model, and record it again: convert(model, trace=True)"
            )
        build, (attributes, imports) = super().__reduce__()
        kind = next((k for k in type(self).__mro__ if k.__dict__.get(_MIXED)), None)
        plain = kind.__dict__[_MIXED] if kind is not None else None
        # Of the attributes of the model, which the forward may not read any more, those that a pickle takes.
        lost = {name for name in self._fastmlp_attributes if not _is_picklable(attributes.get(name))}
        attributes = {name: value for name, value in attributes.items() if name not in lost}
        return load, (build, (attributes, imports), _name(self), plain if plain and is_importable(plain) else None)


def _is_picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        # Whatever the value's own class raises.
        return False
    return True


#: The name of the classes that torch.fx makes, one for each graph module.
_IMPL = "GraphModuleImpl"

#: An attribute of classes that were made here: the class of the model that was recorded.
_MIXED = "_fastmlp_mixed_with"


def _base(kind: type) -> type:
    """The class of which torch.fx has made one for a single graph module."""
    return next(base for base in kind.__mro__ if base.__qualname__.split(".")[-1] != _IMPL)


def _become(module: nn.Module, base: type, name: str) -> None:
    """Gives a module a class of its own."""
    object.__setattr__(module, "__class__", type(name, (base,), {"__qualname__": _IMPL}))


def _mixed(plain: type[nn.Module]) -> type[Traced]:
    """A class of recorded modules with the methods of the model's class."""
    for kind in plain.__subclasses__():
        if kind.__dict__.get(_MIXED) is plain:
            return kind  # type: ignore[return-value]
    names = {_MIXED: plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return new_class(plain.__name__, (Traced, Quiet, plain), names)


def _class_for(plain: type[nn.Module]) -> type[Traced]:
    if issubclass(plain, fx.GraphModule):
        # A recording of a recording has the methods of the first model.
        return next((kind for kind in plain.__mro__ if _MIXED in kind.__dict__), Traced)
    mixed = _mixed(plain)
    # Instances with __slots__ lie otherwise in memory, and stay without the methods of their class.
    return mixed if mixed.__basicsize__ == Traced.__basicsize__ else Traced


def load(
    build: Callable[..., fx.GraphModule],
    arguments: tuple[dict[str, Any], str],
    name: str,
    plain: type[nn.Module] | None = None,
) -> fx.GraphModule:
    """What pickles of recorded modules call."""
    root = nn.Module()
    root.__dict__.update(arguments[0])
    kind = Traced if plain is None else _class_for(plain)
    return kind(root, build(*arguments).graph, name)
