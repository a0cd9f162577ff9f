"""The fused parts of a model of any class, and the inputs that reach them, for `explain`.

A copy of the model is called, in which hooks see the inputs of layers and `Sequential`s of fastmlp. A recorded model is
executed node by node instead, because its chains are no modules.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastmlp import reference
from fastmlp._errors import described
from fastmlp.linear import Linear
from fastmlp.modules import Sequential
from fastmlp.runs import Alone, Child, parts
from fastmlp.trace import activation_of, guards, names_in, run_chain

__all__ = ["Findings", "Reached", "Route", "is_piece", "joined", "reached", "unfused_calls"]


class Route(NamedTuple):
    """How a call would run, and why; see `explain`."""

    name: str
    reason: str


class Findings(NamedTuple):
    """What was found of a fused part: its route, and by name why some of it is called by itself."""

    route: Route
    alone: dict[str, str]


@dataclass
class Reached:
    """What a call of a model runs.

    Attributes:
        pieces: by name, the fused parts that the call reaches, or might reach.
        others: by name, why something else of the model is not fused.
    """

    pieces: dict[str, Findings] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def joined(findings: Findings) -> Route:
    """One route for a part and what of it is called by itself."""
    if not findings.alone:
        return findings.route
    return Route("children", "; ".join(f"{name}: {reason}" for name, reason in findings.alone.items()))


def is_piece(module: nn.Module) -> bool:
    """Whether a call of the module goes to the fused kernels by itself."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    return type(module) is Linear or type(module).forward is Sequential.forward


def reached(
    model: nn.Module,
    arguments: tuple[Any, ...],
    of_piece: Callable[[nn.Module, Tensor], Findings],
    of_children: Callable[[Mapping[str, Child | None], Tensor], Findings],
) -> Reached:
    """What a call of a model runs, asked of each part with the input that reaches it.

    Args:
        model: of any class. A copy of it is called, once, if anything of it may be fused.
        arguments: of the call.
        of_piece: what is found of a layer or `Sequential` with an input.
        of_children: the same of the layers of a chain of a recorded model.

    Raises:
        TypeError: if the model cannot be copied.
    """
    found = Reached()
    pieces = {id(module): (name, module) for name, module in _pieces(model, "")}
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    if not pieces and not graphs:
        return found
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            f"fastmlp: target, {described(model)}, cannot be copied, and a copy of it would be called to see which "
            f"inputs reach its layers: {type(error).__name__}: {error}"
        ) from error
    names = dict(pieces.values())

    def seen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and name not in found.pieces:
                found.pieces[name or "model"] = of_piece(names[name], given[0])

        return look

    # Only the index of a device with one is forked for, because others have no generator of their own.
    own = {a.device.index for a in arguments if isinstance(a, Tensor) and a.device.index is not None}
    with torch.random.fork_rng(devices=sorted(own)):
        for name in names:
            copied.get_submodule(name).register_forward_pre_hook(seen(name))
        if isinstance(copied, fx.GraphModule):
            _Executed(copied, found, of_children).run(*arguments)
        else:
            for name, module in copied.named_modules():
                if isinstance(module, fx.GraphModule):
                    module.forward = _Executed(module, found, of_children, f"{name}.").run
            copied(*arguments)
            if not is_piece(model):
                called = " and ".join(name for name in found.pieces) or "no fused part"
                found.others["model"] = (
                    f"Python executes the forward of {type(model).__name__}, which calls {called} one after the other; "
                    "convert(model, trace=True) records it as one graph"
                )
    return found


def _pieces(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that go to the kernels by themselves, and are not part of a larger one that does."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    inner: Mapping[str, nn.Module | None] = module._modules
    if is_piece(module):
        yield name, module
        found = parts({key: child for key, child in module._modules.items() if child is not None})
        inner = {part.name: module._modules.get(part.name) for part in found if isinstance(part, Alone)}
    elif isinstance(module, fx.GraphModule):
        called = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
        inner = {target: module.get_submodule(target) for target in called}
    for key, child in inner.items():
        if isinstance(child, nn.Module):
            yield from _pieces(child, f"{name}.{key}".removeprefix("."))


class _Executed(fx.Interpreter):
    """Executes a recorded model, and notes what reaches its chains."""

    def __init__(
        self,
        module: fx.GraphModule,
        found: Reached,
        of_children: Callable[[Mapping[str, Child | None], Tensor], Findings],
        prefix: str = "",
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # errors stay as they are
        self.found, self.of_children, self.prefix = found, of_children, prefix
        found.others.update({prefix + name: reason for name, reason in unfused_calls(module).items()})

    def run_node(self, n: fx.Node) -> Any:
        """As the base class, noting what reaches a chain."""
        if n.op == "call_function" and n.target is run_chain:
            (input, layers), _ = self.fetch_args_kwargs_from_env(n)
            nodes: dict[str, Any] = n.args[1]  # type: ignore[assignment]
            names = dict(zip(nodes, names_in(nodes), strict=True))
            if isinstance(input, Tensor):
                found = self.of_children(layers, input)
                alone = {names[key]: reason for key, reason in found.alone.items()}
                self.found.pieces[self.prefix + " + ".join(names.values())] = Findings(found.route, {})
                self.found.others.update({self.prefix + name: reason for name, reason in alone.items()})
        return super().run_node(n)


def unfused_calls(module: fx.GraphModule) -> dict[str, str]:
    """What a recorded model calls besides layers and activations, by name, and the reason why that is not fused."""
    found: dict[str, str] = {}
    for n in module.graph.nodes:
        if n.op not in ("call_function", "call_method", "call_module") or n.target is run_chain:
            continue
        if n.op == "call_module":
            inner = module.get_submodule(str(n.target))
            known = type(inner) in reference.MODULES or any(is_piece(one) for one in inner.modules())
            name, called = type(inner).__name__, str(n.target)
        else:
            # Of an activation that is called the report gives the reason; guards only check the arguments.
            known = activation_of(n) is not None or getattr(n.target, "__module__", "") == guards.__name__
            name, called = getattr(n.target, "__name__", str(n.target)), n.name
        if not known:
            found[called] = f"{name} is neither a layer nor an activation, and is called by itself"
    return found
