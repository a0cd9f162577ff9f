"""Reads a model that is no chain for `fastmlp.freeze`: as networks, and what lies between them, for one row.

Called by stages.py, once a model and after changes of its modules. `fastmlp.trace` records the forward, and that
recording is executed within a recorder of tapes, for each of several numbers of rows: each stretch of layers as one
network, all else as it is. What comes of that is fused as for any tape (`fastmlp/tape`), and described without its rows
(recipe.py). All numbers of rows must have the same description; what has none is refused, because only what is
described so gives a row the same bits in any batch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fastmlp._errors import place_of
from fastmlp._load import _C
from fastmlp.activations import IDENTITY, module_of
from fastmlp.chain import AT_ENDS, LEAVES, Link, link_of_tensors, obstacle_of_form, replaced
from fastmlp.linear import Linear
from fastmlp.recipe import Constant, Description, Graph, Refusal, refuse
from fastmlp.runs import FUSABLE, watched_obstacle
from fastmlp.tape.elements import COMPUTED
from fastmlp.tape.lower import fused
from fastmlp.tape.recorder import Recorder
from fastmlp.tape.trace import CaptureError, Node, Operation, Ref, Trace
from fastmlp.trace import activation_of, record, run_chain, settled

__all__ = ["CALLED", "read"]

#: The modules between networks that are called as they are, with the attributes and parameters that they compute with.
CALLED: dict[type[nn.Module], tuple[Sequence[str], Sequence[str]]] = {
    nn.LayerNorm: (("eps", "normalized_shape"), ("weight", "bias")),
    **{kind: (AT_ENDS[kind], ()) for kind in (nn.Softmax, nn.LogSoftmax)},
    nn.Hardtanh: (("min_val", "max_val", "inplace"), ()),
    nn.ReLU6: (("min_val", "max_val", "inplace"), ()),
}
_CALLED_FORWARDS = {kind: kind.forward for kind in CALLED}

#: The forwards of the modules that networks are made of.
_IN_NETWORKS = {kind: forward for kind, forward in LEAVES.items() if kind not in AT_ENDS}

#: Functions and methods whose result has as many features as their input.
_KEEPING_SIZE = frozenset(
    ("add", "sub", "mul", "truediv", "div", "neg", "clamp", "clip", "abs", "log", "exp", "sqrt", "clone", "contiguous")
)

#: Activations as functions that write to their input.
_IN_PLACE = frozenset(
    getattr(owner, name)
    for owner in (torch, nn.functional)
    for name in dir(owner)
    if name.endswith("_") and not name.startswith("_")
)

#: The dimensions of rows that a description is made of, and compared with; and, where the description is the same for
#: them, that the graph takes inputs of any number of dimensions.
_ROWS, _OTHER_ROWS = (13,), (11,)
_OTHER_DIMENSIONS: tuple[tuple[int, ...], ...] = ((3, 5), ())


def read(model: nn.Module, inputs: tuple[Any, ...] | None) -> Graph:
    """The graph that a model is.

    Args:
        model: any module.
        inputs: examples of its arguments, or None where their features follow from its layers.

    Raises:
        TypeError: naming what cannot be described, and why.
    """
    reason = watched_obstacle(model)
    if reason is not None:
        refuse(model, reason)
    try:
        recorded, check = record(model, inputs)
        if any(node.target is settled for node in recorded.graph.nodes):
            refuse(model, "its forward asks its arguments for a value, a size or a place, and may get others later")
        reader = _Reader(model, recorded, inputs)
        graph = reader.describe(_ROWS)
        if reader.describe(_OTHER_ROWS) != graph:
            refuse(model, "what its forward does depends on the number of rows")
        graph.matrices_only = reader.has_norm or any(reader.tried(rows) != graph for rows in _OTHER_DIMENSIONS)
        reader.check_single_rows(graph)
        check(inputs or reader.example())
    except Refusal:
        raise
    except RuntimeError as error:
        raise TypeError(f"{error}") from error
    return graph


class _Reader:
    """Executes a recorded forward on some rows, and describes what it does."""

    def __init__(self, model: nn.Module, recorded: fx.GraphModule, inputs: tuple[Any, ...] | None) -> None:
        self.model = model
        self._recorded = recorded
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._links: dict[fx.Node, list[Link]] = {}
        nodes = list(recorded.graph.nodes)
        self._inputs = [node for node in nodes if node.op == "placeholder" and (node.users or not node.args)]
        self._nodes = [node for node in nodes if node.op != "placeholder"]
        layers = [link for node in self._nodes for link in self._links_of(node) if _is_layer(link)]
        if not layers:
            refuse(model, "it has no layer")
        weight = _weight(layers[0])
        self._like = weight.detach()
        if weight.dtype not in COMPUTED or weight.device.type not in _C.packing_devices():
            refuse(
                model,
                f"it is no chain of layers, and others are frozen in float32 and float64 on the CPU; its parameters "
                f"are {weight.dtype} on {weight.device}",
            )
        self.has_norm = False
        self._stand_ins = self._made_stand_ins()
        self._features = [self._features_of(i, node, inputs) for i, node in enumerate(self._inputs)]

    def example(self) -> tuple[Tensor, ...]:
        """Arguments of the forward."""
        like = self._like
        return tuple(
            torch.linspace(-1, 1, 2 * size, dtype=like.dtype, device=like.device).view(2, size)
            for size in self._features
        )

    def check_single_rows(self, graph: Graph) -> None:
        """Refuses a forward that gives the results of one row another shape, as `squeeze` without a dimension does."""
        trace, _ = self._performed((1,))
        if [len(trace.values[value].sizes) for value, *_ in trace.results] != [2 - one for one in graph.recipe[2]]:
            refuse(self.model, "the shape of what its forward returns for a single row is not that for several")

    def tried(self, rows: tuple[int, ...]) -> Graph | None:
        """What describe() returns, or None if it refuses."""
        try:
            return self.describe(rows)
        except (TypeError, RuntimeError, IndexError, ValueError):
            return None

    def describe(self, rows: tuple[int, ...]) -> Graph:
        """What the forward does with inputs of these dimensions and their features."""
        trace, constants = self._performed(rows)
        description = Description(
            self.model, self._like.dtype, self._constant_of, trace, rows, self._features, constants
        )
        recipe = description.recipe()
        return Graph(self._networks, self._between, self._tensors, description.constants, recipe, False)

    def _performed(self, rows: tuple[int, ...]) -> tuple[Trace, list[Operation]]:
        """The forward executed and fused, and what `fused` returns."""
        self._networks: list[list[Link]] = []
        self._between: list[Link] = []
        self._tensors: list[tuple[str, str]] = []
        self._now = ""  # the name of the node that is executed
        device = self._like.device
        # Whatever modes the caller is in: what is frozen are tensors as a model outside of them has.
        plain = torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False)
        with plain[0], plain[1], plain[2]:
            arguments = [self._like.new_zeros(*rows, features) for features in self._features]
            recorder = Recorder(type(self.model).__name__, arguments, [], False)
            try:
                with _generator_put_back(recorder), recorder:
                    results = self._execute(recorder, arguments)
            except CaptureError as error:
                reason, _, _ = str(error).partition(f"{recorder.name}: ")[2].rpartition(", in ")
                self.refuse(self._now, reason)
            trace = recorder.trace
            trace.results = [(recorder.value_of(tensor, ""), False, False) for tensor in results]
            return trace, fused(trace)

    def refuse(self, node: str, reason: str) -> NoReturn:
        """Refuses what a node of the forward does."""
        refuse(self.model, f"its forward calls {node}: {reason}")

    def _constant_of(self, tensor: Tensor | None) -> Constant | None:
        """What a tensor stands for."""
        found = (name for name, own in self._stand_ins.items() if own is tensor)
        return next((Constant(*name, self._stand_ins[name].numel()) for name in found), None)

    def _made_stand_ins(self) -> dict[tuple[str, str], Tensor]:
        """Tensors in place of the model's, which nothing may write to; by the names of modules, and their own."""
        found: dict[tuple[str, str], Tensor] = {}

        def copy(name: str, key: str, tensor: Tensor | None) -> None:
            if tensor is None:
                return
            if tensor.dim() > 2 or not tensor.is_contiguous() or not tensor.numel():
                where = f"{name}.{key}".removeprefix(".")
                refuse(self.model, f"its tensor {where} has more than two dimensions, gaps, or no elements")
            found[name, key] = tensor.detach().clone()

        for node in self._nodes:
            if node.op == "get_attr" and _is_read(node):
                name, _, key = str(node.target).rpartition(".")
                module = self._modules.get(name)
                if module is not None:
                    copy(name, key, {**module._parameters, **module._buffers}.get(key))
            for link in self._links_of(node):
                if isinstance(link.module, nn.BatchNorm1d):
                    features = link.module.num_features
                    found |= {(link.name, key): self._like.new_ones(features) for key in ("scale", "shift")}
                elif isinstance(link.module, nn.LayerNorm):
                    for key in ("weight", "bias"):
                        copy(link.name, key, link.module._parameters.get(key))
        return found

    # Inputs.

    def _features_of(self, index: int, node: fx.Node, inputs: tuple[Any, ...] | None) -> int:
        if inputs is not None and index < len(inputs):
            example = inputs[index]
            if not isinstance(example, Tensor) or not example.dim():
                refuse(self.model, f"inputs[{index}], the example of its argument {node.name}, is no tensor of rows")
            return example.shape[-1]
        found = next(self._sizes(node), None)
        if found is None:
            refuse(
                self.model,
                f"how many features its input {node.name} has does not follow from its layers; give examples of its "
                "inputs, as in freeze(model, inputs=(x,))",
            )
        return found

    def _sizes(self, node: fx.Node) -> Iterator[int]:
        """The sizes of the last dimension that users of a value ask for."""
        for user in node.users:
            links = self._links_of(user)
            for link in links:
                if _is_layer(link):
                    yield _weight(link).shape[1]
                elif isinstance(link.module, nn.BatchNorm1d):
                    yield link.module.num_features
                elif isinstance(link.module, nn.LayerNorm):
                    yield link.module.normalized_shape[-1]
                else:
                    continue
                break
            else:
                split = user.target in (torch.split, "split") and len(user.args) > 1
                if split and isinstance(user.args[1], (tuple, list)):
                    yield sum(size for size in user.args[1] if isinstance(size, int))
                elif links or getattr(user.target, "__name__", user.target) in _KEEPING_SIZE:
                    yield from self._sizes(user)

    # Execution.

    def _links_of(self, node: fx.Node) -> list[Link]:
        """The modules that a node calls one after another; none for what is no module or activation."""
        if node not in self._links:
            self._links[node] = list(self._found_in(node))
        return self._links[node]

    def _found_in(self, node: fx.Node) -> Iterator[Link]:
        if _is_chain(node):
            for layer in node.args[1].values():  # type: ignore[union-attr]
                yield self._layer_of(node, layer) if isinstance(layer, tuple) else self._link(layer)  # type: ignore[arg-type]
        elif node.op == "call_module":
            yield self._link(node)
        elif not _is_in_place(node) and (activation := activation_of(node)) is not None:
            yield Link(node.name, module_of(activation))

    def _link(self, node: fx.Node) -> Link:
        return Link(str(node.target), self._recorded.get_submodule(str(node.target)))

    def _layer_of(self, node: fx.Node, pair: tuple[fx.Node, fx.Node | None]) -> Link:
        """A layer that the forward calls as a function."""
        link = link_of_tensors(self.model, self._recorded, pair)
        if link is None:
            refuse(self.model, "its forward calls linear with other tensors than the weight and bias of one module")
        return link

    def _execute(self, recorder: Recorder, arguments: Sequence[Tensor]) -> list[Tensor]:
        """The results of the forward."""
        env: dict[fx.Node, Any] = dict(zip(self._inputs, arguments, strict=True))
        passed: set[fx.Node] = set()
        *nodes, output = self._nodes
        for node in nodes:
            if node in passed:
                continue
            before = len(recorder.trace.events)
            self._now = node.name
            if node.op == "get_attr":
                if _is_read(node):
                    env[node] = self._attribute(node)
                continue
            group = self._group_from(node)
            if group:
                passed.update(group)
                links = [link for each in group for link in self._links_of(each)]
                env[group[-1]] = self._sequence(recorder, node, links, env[node.all_input_nodes[0]])
            else:
                env[node] = self._called(node, env)
            for event in recorder.trace.events[before:]:
                event.place = node.name
        return self._returned(recorder, fx.node.map_arg(output.args[0], env.__getitem__))

    def _group_from(self, node: fx.Node) -> list[fx.Node]:
        """The calls of layers, activations and norms from here on of which nobody else sees what they pass on."""
        group: list[fx.Node] = []
        while self._is_of_sequence(node):
            group.append(node)
            if len(node.users) != 1:
                break
            (node,) = node.users
            if len(set(node.all_input_nodes)) != 1 + self._layers_in(node):
                break
        return group

    def _layers_in(self, node: fx.Node) -> int:
        """How many of a node's inputs are modules, or tensors of layers."""
        return sum(each.op == "get_attr" for each in node.all_input_nodes) if _is_chain(node) else 0

    def _is_of_sequence(self, node: fx.Node) -> bool:
        links = self._links_of(node)
        return bool(links) and all(type(link.module) in _IN_NETWORKS for link in links)

    def _sequence(self, recorder: Recorder, node: fx.Node, links: Sequence[Link], x: Any) -> Tensor:
        """What modules compute one after another: networks as long as can be, and what is left between them."""
        left: list[Link] = []
        for link in links:
            self._check(link)
            if not isinstance(link.module, (nn.Dropout, nn.AlphaDropout, nn.Identity)):
                left.append(link)
            else:
                self._between.append(link)
        letters = "".join(map(_letter, left))
        at = 0
        for match in re.finditer(r"(?:N*(?:LN*A?|M))+", letters):
            for link in left[at : match.start()]:
                x = self._computed(link, x)
            x = self._network(recorder, node, left[match.start() : match.end()], x)
            at = match.end()
        for link in left[at:]:
            x = self._computed(link, x)
        return x

    def _check_above(self, name: str) -> None:
        """Refuses a module within another one whose call something wants to see."""
        while name:
            name = name.rpartition(".")[0]
            holder = self._modules.get(name, self.model)
            reason = watched_obstacle(holder)
            if reason is not None:
                raise Refusal(f"fastmlp: {place_of(name, holder)} cannot be frozen: {reason}")

    def _check(self, link: Link) -> None:
        module, kind = link.module, type(link.module)
        reason = None
        if link.name in self._modules:
            self._check_above(link.name)
            # The module itself, or the one that holds the tensors of a layer that the forward calls as a function.
            holder = self._modules[link.name]
            reason = replaced(module, _IN_NETWORKS[kind]) or watched_obstacle(holder) or obstacle_of_form(module)
        if isinstance(module, nn.BatchNorm1d):
            self.has_norm = True
            if module.running_mean is None or module.running_var is None:
                reason = reason or "it has no running statistics"
        random = isinstance(module, (nn.Dropout, nn.AlphaDropout)) and module.p > 0
        if module.training and (random or isinstance(module, nn.BatchNorm1d)):
            reason = reason or "it is in training mode; call model.eval() first"
        if reason is not None:
            raise Refusal(f"fastmlp: {place_of(link.name, module)} cannot be frozen: {reason}")

    def _network(self, recorder: Recorder, node: fx.Node, links: list[Link], x: Tensor) -> Tensor:
        weights = [_weight(link) for link in links if _is_layer(link)]
        in_features, out_features = weights[0].shape[1], weights[-1].shape[0]
        if not x.dim() or x.shape[-1] != in_features:
            self.refuse(
                node.name, f"it gets {x.shape[-1] if x.dim() else 'no'} features, where the layer takes {in_features}"
            )
        y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
        made = recorder.value_of(y, node.name)
        args = Ref(recorder.value_of(x, node.name)), len(self._networks), Ref(made)
        recorder.trace.events.append(Node("network", args, [made], node.name))
        self._networks.append(links)
        return y

    def _computed(self, link: Link, x: Tensor) -> Tensor:
        """An activation or a norm that no layer precedes."""
        self._between.append(link)
        if not isinstance(link.module, nn.BatchNorm1d):
            return link.module(x)
        scale, shift = (self._stand_ins[link.name, key] for key in ("scale", "shift"))
        return torch.addcmul(shift, x, scale)

    def _attribute(self, node: fx.Node) -> Any:
        name, _, key = str(node.target).rpartition(".")
        value = getattr(self._recorded.get_submodule(name), key)
        if not isinstance(value, Tensor):
            return value
        if (name, key) not in self._stand_ins:
            self.refuse(node.name, "it is a tensor that is neither a parameter nor a buffer of the model")
        self._check_above(str(node.target))
        self._tensors.append((name, key))
        return self._stand_ins[name, key]

    def _called(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        try:
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return self._call_module(node, args, kwargs)
        except (IndexError, ValueError, RuntimeError) as error:
            if isinstance(error, (CaptureError, Refusal)):
                raise
            self.refuse(node.name, f"{type(error).__name__}: {error}")

    def _call_module(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        link = self._link(node)
        module, kind = link.module, type(link.module)
        self._check_above(link.name)
        if kind in AT_ENDS and kind not in CALLED:
            reason: str | None = "only a chain of layers may begin or end with it"
        elif kind not in CALLED:
            reason = f"{kind.__name__} is not a module that is frozen"
        else:
            reason = replaced(module, _CALLED_FORWARDS[kind]) or watched_obstacle(module) or obstacle_of_form(module)
        if reason is not None:
            raise Refusal(f"fastmlp: {place_of(*link)} cannot be frozen: {reason}")
        self._between.append(link)
        if not isinstance(module, nn.LayerNorm):
            return module(*args, **kwargs)
        if len(module.normalized_shape) != 1:
            self.refuse(node.name, "it normalises more than the last dimension")
        weight, bias = (self._stand_ins.get((link.name, key)) for key in ("weight", "bias"))
        return nn.functional.layer_norm(args[0].contiguous(), module.normalized_shape, weight, bias, module.eps)

    def _returned(self, recorder: Recorder, value: Any) -> list[Tensor]:
        """The results, each in memory of its own."""
        if isinstance(value, list) or (type(value) is tuple and len(value) == 1):
            refuse(self.model, "its forward returns a list, or a tuple of one; return a tensor or a tuple of several")
        results: list[Tensor] = []
        for one in value if type(value) is tuple else (value,):
            if not isinstance(one, Tensor):
                refuse(self.model, "its forward returns something else than a tensor, or a tuple of tensors")
            memory = recorder.trace.values[recorder.value_of(one, "")].memory
            taken = any(recorder.trace.values[recorder.value_of(other, "")].memory == memory for other in results)
            whole = one.is_contiguous() and one.nbytes == recorder.trace.memories[memory].bytes
            own = recorder.trace.memories[memory].source == ("new",)
            results.append(one if own and whole and not taken else one.clone(memory_format=torch.contiguous_format))
        return results


@contextmanager
def _generator_put_back(recorder: Recorder) -> Iterator[None]:
    """Puts torch's generator back where a forward has drawn from it, which is refused later.

    Only then, because other threads may draw from it meanwhile.
    """
    state = torch.get_rng_state()
    try:
        yield
    finally:
        operations = (event for event in recorder.trace.events if isinstance(event, Operation))
        if any(torch.Tag.nondeterministic_seeded in operation.func.tags for operation in operations):
            torch.set_rng_state(state)


def _weight(link: Link) -> Tensor:
    weight = link.module.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_chain(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is run_chain


def _is_read(node: fx.Node) -> bool:
    """Whether the forward computes with what a node reads from a model otherwise than as with a layer."""
    return not all(_is_chain(user) and user.args[0] is not node for user in node.users)


def _is_layer(link: Link) -> bool:
    return FUSABLE.get(type(link.module)) == "layer"


def _is_in_place(node: fx.Node) -> bool:
    """Whether a call of a function or method writes to its input, so that others may see what it makes."""
    method = node.op == "call_method" and str(node.target).endswith("_")
    return method or node.target in _IN_PLACE or True in (*node.args[1:], node.kwargs.get("inplace"))


def _letter(link: Link) -> str:
    """What a module of a sequence is: a layer, one with an activation of its own, a norm, or an activation."""
    if _is_layer(link):
        return "M" if isinstance(link.module, Linear) and link.module.activation != IDENTITY else "L"
    return "N" if isinstance(link.module, nn.BatchNorm1d) else "A"
