"""Why something does not run fused: `explain` says it of a call, of a model and of a captured function.

The reasons for a child of a `Sequential` are those of runs.py; those for an input are those of csrc/python/route.cpp.
walking.py walks models of any class, ways.py asks each way of fastmlp what it makes of a model. `fusion_report` is the
part of it that says what of a model runs fused as it is; `TrainStep.explain`, in training.py, what `TrainStep` says.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor, fx, nn

from fastmlp import reference
from fastmlp._errors import described, not_a_module, not_a_tensor
from fastmlp._load import _C
from fastmlp.autograd import autocast, why_not_direct
from fastmlp.capture import Captured
from fastmlp.linear import Linear
from fastmlp.modules import Sequential
from fastmlp.runs import Alone, Child, Layer, Run, parts
from fastmlp.trace import activation_of, held, names_in, run_chain
from fastmlp.walking import Findings, Route, is_piece, joined, reached
from fastmlp.ways import Explanation, explain_captured, explain_model

__all__ = ["Entry", "Explanation", "Report", "Route", "explain", "fusion_report"]


@overload
def explain(target: Tensor) -> Route: ...


@overload
def explain(target: nn.Module, input: Tensor | tuple[Any, ...]) -> Route: ...


@overload
def explain(
    target: nn.Module,
    input: None = None,
    *,
    inputs: tuple[Any, ...] | None = None,
    target_of_loss: Tensor | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Explanation: ...


@overload
def explain(target: Captured[..., Any]) -> Explanation: ...


def explain(
    target: nn.Module | Tensor | Captured[..., Any],
    input: Tensor | tuple[Any, ...] | None = None,
    *,
    inputs: tuple[Any, ...] | None = None,
    target_of_loss: Tensor | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Route | Explanation:
    """Says why something runs fused, or why it does not: of a call, of a whole model, or of a captured function.

    **Of a call**, `explain(model, input)`: which route the call would take now. Plain tensors on the CPU, and on a GPU
    if the build has CUDA kernels, go directly to the fused kernels, under autocast once they are cast. Under transforms
    of `torch.func`, forward-mode AD, tensor subclasses, and for dtypes and devices without kernels, the same function
    runs as a composition of PyTorch's operations; for CUDA tensors the reason names the command that builds the
    kernels. Under `torch.compile` the fused kernels run as registered operators, which this function, called outside,
    cannot see. The model may be of any class. What is neither a layer of fastmlp nor a `Sequential` is walked: a copy
    of it is called with the input, so that each fused part is judged by the input that reaches it.

    **Of a model**, `explain(model)` without an input: what each way of fastmlp makes of the model as it is written, and
    the reason where a way does not take it: `convert`, `convert(trace=True)`, `freeze`, and `TrainStep` with the loss
    and the optimizer that are given. With `inputs`, examples of what the forward is called with, also what `capture`
    makes of a training step; then copies of the model are called and trained for three steps. The model itself stays as
    it is.

    **Of a captured function**: what was recorded, or why nothing is.

    Args:
        target: a module, the input itself, or what `capture` returned.
        input: the input of the call, a tensor of any shape that the module takes; for a module of several inputs a
            tuple of them.
        inputs: for the question about a whole model, a tuple of examples of the forward's arguments by position.
        target_of_loss: for the same, what the loss compares the output with. By default zeros: classes for
            `CrossEntropyLoss` and `NLLLoss`, and otherwise of the output's shape.
        loss_fn: for the same, the loss; by default `torch.nn.MSELoss()`.
        optimizer: for the same, of the model's parameters; by default `torch.optim.Adam`.

    Returns:
        Of a call or a tensor a `Route`: its name and the reason for it. "direct": everything goes to the kernels, and
        the reason is empty. "composite": PyTorch's operations. "children": parts of the model are called by themselves;
        the reason names each. Otherwise an `Explanation`, with an answer for each way; printed, it is text.

    Raises:
        TypeError: if `target` is something else, if there are two inputs, or if a module that has to be walked cannot
            be copied.
        RuntimeError: as the call would on the direct route, for shapes or dtypes that do not belong together.

    Example:
        >>> explain(torch.zeros(3, 10))
        Route(name='direct', reason='')
        >>> explain(torch.zeros(3, 10, dtype=torch.complex64))
        Route(name='composite', reason='there are no kernels for the dtype')
        >>> explain(Sequential(nn.Linear(10, 5), nn.LayerNorm(5)), torch.zeros(3, 10))
        Route(name='children', reason='1: LayerNorm is not a module that is fused')
        >>> explain(nn.Linear(10, 5), torch.zeros(3, 10))
        Route(name='composite', reason='model: it is not converted')
        >>> explain(nn.Sequential(nn.Linear(10, 5), nn.ReLU()))
        as it is                    fused  nothing
                                    kept   0: it is not converted
                                    kept   1: it is called by itself; trace=True sees what comes before it
        convert(model)              fused  0 + 1
        convert(model, trace=True)  fused  0 + 1
        freeze(model)               FrozenMLP(10 -> 5 relu, torch.float32)
        TrainStep                   takes it with MSELoss and Adam
        capture                     not tried: it needs examples of the forward's arguments, inputs=(...)
    """
    more = {"inputs": inputs, "target_of_loss": target_of_loss, "loss_fn": loss_fn, "optimizer": optimizer}
    given = [name for name, value in more.items() if value is not None]
    if given and (input is not None or not isinstance(target, nn.Module)):
        raise TypeError(
            f"fastmlp: {given[0]} was given, which is of the question about a whole model: explain(model, "
            f"{given[0]}=...) with a module as target and without input"
        )
    if isinstance(target, (Captured, Tensor)):
        return _of_no_module(target, input)
    if not isinstance(target, nn.Module):
        expected = "a torch.nn.Module, a tensor or a captured function"
        raise TypeError(f"fastmlp: target must be {expected}, got {described(target)}")
    if input is None:
        return explain_model(target, inputs, target_of_loss, loss_fn, optimizer, fusion_report)
    return _of_call(target, input)


def _of_no_module(target: Tensor | Captured[..., Any], input: Any) -> Route | Explanation:
    """The answer for a tensor, or for a captured function."""
    if isinstance(target, Captured):
        if input is not None:
            raise TypeError(
                f"fastmlp: target is a captured function, which is explained without an input, and input was given, "
                f"{described(input)}; call the function with it instead"
            )
        return explain_captured(target)
    if input is not None:
        raise TypeError(
            f"fastmlp: target is a tensor, which is the input itself, and input was given too, {described(input)}; "
            "pass one of them, or the module that is called as target"
        )
    return _route(target, None)


def _of_call(target: nn.Module, input: Any) -> Route:
    """The route of a call of a module."""
    arguments = input if isinstance(input, tuple) else (input,)
    if not arguments or not isinstance(arguments[0], Tensor):
        given_input = arguments[0] if arguments else input
        raise not_a_tensor("input", given_input, next((p.dtype for p in target.parameters()), None))
    if is_piece(target) and len(arguments) == 1:
        return joined(_of_piece(target, arguments[0]))
    return _walked(target, arguments)


def _of_piece(target: nn.Module, input: Tensor) -> Findings:
    """The route of a `Linear` or a `Sequential`, and what of it is called by itself."""
    if isinstance(target, Linear):
        return Findings(_route(input, Run([""], [Layer("", target.weight, target.bias, target.activation)])), {})
    return _of_children(target._modules, input)


def _of_children(children: Mapping[str, Child | None], input: Tensor) -> Findings:
    """The same of what a `Sequential`, or a chain of a recorded model, runs."""
    alone: dict[str, str] = {}
    drops = why_not_direct(input, ()) is None and not torch.is_autocast_enabled(input.device.type)
    for part in parts(children, drops):
        if isinstance(part, Alone):
            alone[part.name] = part.reason
        elif not alone:
            # Only the first run is checked with the input, because the inputs of later runs are not known before they
            # are computed.
            route = _route(input, part)
            if route.reason:
                return Findings(route, {})
    return Findings(Route("direct", ""), alone)


def _walked(model: nn.Module, arguments: tuple[Any, ...]) -> Route:
    """The route of a call of a module of any class, whose fused parts are judged by the inputs that reach them."""
    kept = {" + ".join(entry.names): entry.reason for entry in fusion_report(model) if entry.reason}
    found = reached(model, arguments, _of_piece, _of_children)
    pieces = {name: piece for name, piece in found.pieces.items() if piece.route.name == "direct"}
    reasons = {name: piece.route.reason for name, piece in found.pieces.items() if piece.route.reason}
    for name, piece in pieces.items():
        reasons.update({f"{name}.{child}".removeprefix("model."): reason for child, reason in piece.alone.items()})
    for name, reason in {**kept, **found.others}.items():
        reasons.setdefault(name, reason)
    if not pieces:
        reasons = reasons or {"model": "it has no layer that fastmlp computes"}
        return Route("composite", "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return joined(Findings(Route("direct", ""), reasons))


def _route(input: Tensor, run: Run | None) -> Route:
    parameters = run.parameters() if run else ()
    reason = why_not_direct(input, parameters)
    if reason is None and run:
        input, *cast = autocast(input, *parameters)
        _C.check_forward(run.stack().native, input, cast, True, run.called())
    return Route("direct", "") if reason is None else Route("composite", reason)


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
        >>> import fastmlp
        >>> class SimpleNN(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.act, self.fc2 = nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)
        ...
        ...     def forward(self, x):
        ...         return self.fc2(self.act(self.fc1(x)))
        >>> fusion_report(fastmlp.convert(SimpleNN()))
        fused  fc1
        kept   act: it is called by itself; trace=True sees what comes before it
        fused  fc2
        >>> fusion_report(fastmlp.convert(SimpleNN(), trace=True))
        fused  fc1 + act + fc2
    """
    if not isinstance(model, nn.Module):
        raise not_a_module(model)
    entries: list[Entry] = []
    seen: set[nn.Module] = set()
    registered = set(model.modules())
    scripted: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(scripted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            # Python executes nothing that is inside of a scripted module, so its children are not reported.
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


#: Modules that execute as one operation, or one module that does not: names, the modules, and the reason.
_Found: TypeAlias = tuple[list[str], list[nn.Module], str]


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
        # A module that is neither a layer nor an activation gets no entry; layers that it holds are looked at later.
        if not modules or not reason or _matters(modules[0]):
            yield names, [m for m in modules if _matters(m)], reason


def _found_in_children(children: Mapping[str, Child], names: Mapping[str, str]) -> Iterator[_Found]:
    for part in parts(children):
        keys, reason = ([part.name], part.reason) if isinstance(part, Alone) else (part.names, "")
        modules = [child for child in map(children.__getitem__, keys) if isinstance(child, nn.Module)]
        yield [names[key] for key in keys], modules, reason


def _found_in_graph(module: fx.GraphModule) -> Iterator[_Found]:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is run_chain:
            nodes: dict[str, Any] = node.args[1]
            names = dict(zip(nodes, names_in(nodes), strict=True))
            owners = {name: _owner(module, nodes[key]) for key, name in names.items()}
            found = _found_in_children({key: _child(module, layer) for key, layer in nodes.items()}, names)
            for called, modules, reason in found:
                # The forward of a layer that called F.linear runs here, so the layer itself has no entry of its own.
                others = [] if reason else [owner for name in called if (owner := owners[name]) is not None]
                yield called, modules + others, reason
        elif node.op == "call_module" and type(module.get_submodule(node.target)) in reference.MODULES:
            yield [node.target], [module.get_submodule(node.target)], _why_not_in_a_chain(node)
        elif activation_of(node) is not None:
            yield [node.name], [], _why_not_in_a_chain(node)


def _child(module: fx.GraphModule, layer: Any) -> Child:
    """What a chain in a graph runs."""
    if isinstance(layer, tuple):
        weight, bias = (None if node is None else held(module, str(node.target)) for node in layer)
        assert weight is not None
        return weight, bias
    return module.get_submodule(str(layer.target))


def _owner(module: fx.GraphModule, layer: Any) -> nn.Module | None:
    """The module whose weight a chain in a graph was called with as a function; None for a module that was called."""
    return module.get_submodule(str(layer[0].target).rpartition(".")[0]) if isinstance(layer, tuple) else None


def _matters(module: nn.Module) -> bool:
    """Whether a report mentions a module: layers and activations."""
    # Layers are known by name, because quantized layers and the wrappers of other libraries are no subclasses.
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
