"""What may happen to a model between two calls of a frozen network."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import reference
from fastmlp.activations import IDENTITY, module_of
from tests.attack import drawn, nets
from tests.attack.cases import Case
from tests.support.axes import ISAS


@dataclass
class Net:
    """A model whose changes are drawn.

    Attributes:
        case: that draws.
        model: as it is now.
        dtype: of its parameters.
        others: what must stay alive.
        handles: of hooks that are on leaves.
    """

    case: Case
    model: nn.Module
    dtype: torch.dtype
    others: list[Any] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    may_refuse: bool = True

    @property
    def leaves(self) -> list[nn.Module]:
        return nets.flat(self.model)

    @property
    def held(self) -> list[nn.Module]:
        """The leaves that are modules of the model, and not made here for an activation that is called."""
        modules = set(self.model.modules())
        return [leaf for leaf in self.leaves if leaf in modules]

    @property
    def layers(self) -> list[nn.Linear]:
        return [leaf for leaf in self.leaves if isinstance(leaf, nn.Linear)]

    @property
    def norms(self) -> list[nn.BatchNorm1d]:
        return [leaf for leaf in self.leaves if isinstance(leaf, nn.BatchNorm1d)]

    def train(self, mode: bool) -> None:
        self.model.train(mode)
        self.case.note(f"train({mode})")

    def must_refuse(self) -> bool:
        """Whether there is something that a frozen network would have to call."""
        return bool(self.handles)

    def may_refuse_now(self) -> bool:
        """Whether the model is something that `freeze` says it does not take."""
        if self.handles:
            return True
        layer, active, waiting = None, False, False
        for leaf in self.leaves:
            if leaf.training and isinstance(leaf, nn.BatchNorm1d):
                return True
            if leaf.training and isinstance(leaf, (nn.Dropout, nn.AlphaDropout)) and leaf.p > 0:
                return True
            if isinstance(leaf, nn.Linear):
                layer, waiting = leaf, False
                active = isinstance(leaf, fastmlp.Linear) and leaf.activation != IDENTITY
                if leaf.weight.dtype != self.dtype:
                    return True
            elif isinstance(leaf, nn.BatchNorm1d):
                waiting = waiting or layer is None or active
            elif not isinstance(leaf, (nn.Dropout, nn.AlphaDropout, nn.Identity)):
                if layer is None or waiting or active:
                    return True
                active = True
        return waiting or layer is None

    def place_of(self, leaf: nn.Module) -> tuple[nn.Module, str] | None:
        """The module that holds a leaf, and its name there."""
        for parent in self.model.modules():
            for name, child in parent._modules.items():
                if child is leaf:
                    return parent, name
        return None


class Change(NamedTuple):
    """Something that happens to a model; `unseen` if a frozen network says that it needs `refresh`."""

    make: Callable[[Net], None]
    fits: Callable[[Net], bool] = lambda net: True
    unseen: bool = False


def a_tensor(net: Net) -> Tensor:
    leaf = net.case.choice([leaf for leaf in net.leaves if leaf.state_dict()])
    tensors: list[Tensor] = [*leaf.parameters(), *leaf.buffers()]
    floats = [t for t in tensors if t.is_floating_point()]
    found = net.case.choice(floats)
    net.case.note(f"  of {type(leaf).__name__} {tuple(found.shape)}")
    return found


def in_place(net: Net) -> None:
    tensor = a_tensor(net)
    with torch.no_grad():
        tensor.mul_(net.case.choice([0.5, 2.0, 1.25]))


def one_entry(net: Net) -> None:
    """Of a running variance too, which stays positive."""
    tensor = a_tensor(net)
    with torch.no_grad():
        tensor.view(-1)[:1].fill_(0.75) if tensor.is_contiguous() else tensor.fill_(0.5)


def load_state(net: Net) -> None:
    state = {key: x.clone() for key, x in net.model.state_dict().items()}
    for x in state.values():
        if x.is_floating_point():
            x.mul_(0.75)
    net.model.load_state_dict(state, assign=net.case.chance(0.3))


def step_of_torch(net: Net) -> None:
    parameters = [p for p in net.model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.full_like(p, 0.125)
    optimizer = torch.optim.SGD(parameters, lr=0.5) if parameters else None
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def new_data(net: Net) -> None:
    layer = net.case.choice(net.layers)
    layer.weight.data = drawn.lay(net.case, layer.weight.detach() * -0.5)[0]


def has_square(net: Net) -> bool:
    return any(layer.weight.shape[0] == layer.weight.shape[1] > 1 for layer in net.layers)


def data_transposed(net: Net) -> None:
    """Another view of the same memory."""
    layer = net.case.choice([layer for layer in net.layers if layer.weight.shape[0] == layer.weight.shape[1] > 1])
    layer.weight.data = layer.weight.data.t()


def can_lose_rows(net: Net) -> bool:
    layers = net.layers
    last = net.leaves[-1]
    return layers[-1].weight.shape[0] > 1 and not net.norms and (last is layers[-1] or not isinstance(last, nn.Linear))


def data_cut(net: Net) -> None:
    layer = net.layers[-1]
    layer.weight.data = layer.weight.data[:-1]
    if layer.bias is not None:
        layer.bias.data = layer.bias.data[:-1]


def can_be_fewer_columns(net: Net) -> bool:
    return net.layers[0].weight.shape[1] > 1 and net.layers[0] is net.leaves[0]


def data_narrowed(net: Net) -> None:
    net.layers[0].weight.data = net.layers[0].weight.data[:, 1:]


def new_parameter(net: Net) -> None:
    layer = net.case.choice(net.layers)
    layer.weight = nn.Parameter(drawn.lay(net.case, layer.weight.detach() * 0.5)[0])


def bias_comes_or_goes(net: Net) -> None:
    layer = net.case.choice(net.layers)
    n = layer.weight.shape[0]
    made = nn.Parameter(drawn.randn(net.case, n, dtype=net.dtype))
    setattr(layer, "bias", None if layer.bias is not None else made)  # noqa: B010


def replace(net: Net, leaf: nn.Module, other: nn.Module) -> None:
    place = net.place_of(leaf)
    assert place is not None
    other.train(leaf.training)
    setattr(*place, other) if not isinstance(place[0], nn.ModuleList) else place[0].__setitem__(int(place[1]), other)
    # The one that is replaced may be freed, or not.
    if net.case.chance(0.5):
        net.others.append(leaf)


def layer_replaced(net: Net) -> None:
    leaf = net.case.choice([leaf for leaf in net.layers if net.place_of(leaf) is not None])
    other = nn.Linear(max(leaf.in_features, 1), max(leaf.out_features, 1), leaf.bias is not None, dtype=net.dtype)
    other.weight = nn.Parameter(leaf.weight.detach() * 0.5)
    if leaf.bias is not None:
        other.bias = nn.Parameter(leaf.bias.detach() + 1)
    replace(net, leaf, other)


def activations_of(net: Net) -> list[nn.Module]:
    """That are children of something."""
    return [leaf for leaf in net.leaves if type(leaf) in reference.MODULES and net.place_of(leaf) is not None]


def activation_replaced(net: Net) -> None:
    leaf = net.case.choice(activations_of(net))
    other = module_of(drawn.activation(net.case))
    net.case.note(f"  {leaf} by {other}")
    replace(net, leaf, other)


def fused_layers(net: Net) -> list[fastmlp.Linear]:
    return [leaf for leaf in net.leaves if isinstance(leaf, fastmlp.Linear)]


def fused_activation(net: Net) -> None:
    layer = net.case.choice(fused_layers(net))
    act = drawn.activation(net.case)
    net.case.note(f"  {layer} gets {act}")
    layer.activation = act


def numbers_of_activations(net: Net) -> list[nn.Module]:
    return [leaf for leaf in activations_of(net) if isinstance(leaf, (nn.LeakyReLU, nn.ELU))]


def activation_number(net: Net) -> None:
    leaf = net.case.choice(numbers_of_activations(net))
    if isinstance(leaf, nn.LeakyReLU):
        leaf.negative_slope = net.case.choice([0.25, 0.75, -0.5])
    elif isinstance(leaf, nn.ELU):
        leaf.alpha = net.case.choice([0.25, 0.75, 1.5])


def hook(net: Net) -> None:
    leaf = net.case.choice(net.held)
    kind = net.case.choice(["forward", "forward_pre"])
    net.case.note(f"  {kind} hook on {leaf}")
    if kind == "forward":
        net.handles.append(leaf.register_forward_hook(lambda module, args, output: output * 2))
    else:
        net.handles.append(leaf.register_forward_pre_hook(lambda module, args: (args[0] * 2,)))


def hook_of_model(net: Net) -> None:
    net.handles.append(net.model.register_forward_hook(lambda module, args, output: output * 2))


def own_forward(net: Net) -> None:
    """A forward of the instance, which is in no class."""
    leaf = net.case.choice(net.held)
    forward = leaf.forward
    leaf.forward = lambda x: forward(x) * 2

    class Handle:
        def remove(self) -> None:
            del leaf.__dict__["forward"]

    net.handles.append(Handle())


def unhook(net: Net) -> None:
    net.handles.pop().remove()


def eps(net: Net) -> None:
    net.case.choice(net.norms).eps = net.case.choice([1e-5, 0.01, 0.5, 2.0])


def statistics(net: Net) -> None:
    """A batch in training mode moves them."""
    norm = net.case.choice(net.norms)
    mode = norm.training
    norm.train()(drawn.randn(net.case, 7, norm.num_features, dtype=net.dtype, scale=2))
    norm.train(mode)


def to_dtype(net: Net, swap: bool = False) -> None:
    net.dtype = net.case.choice([torch.float32, torch.float64, torch.bfloat16])
    net.case.note(f"  to {net.dtype}")
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        net.model.to(net.dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def swapped(net: Net) -> None:
    layer = net.case.choice(net.layers)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach() * -1))


def modes(net: Net) -> None:
    net.train(not net.model.training)


def isa(net: Net) -> None:
    fastmlp.set_isa(net.case.choice(ISAS))


def grown(net: Net) -> None:
    """A layer more at the end of a Sequential."""
    assert isinstance(net.model, nn.Sequential)
    n = net.layers[-1].weight.shape[0]
    net.model.append(nets.linear(net.case, n, drawn.size(net.case), True, net.dtype))


def shrunk(net: Net) -> None:
    assert isinstance(net.model, nn.Sequential)
    del net.model[-1]


def can_shrink(net: Net) -> bool:
    model = net.model
    return isinstance(model, nn.Sequential) and len(model) > 2 and all(not list(m.children()) for m in model)


def shared_memory(net: Net) -> None:
    net.model.share_memory()


def parametrized(net: Net) -> None:
    """A weight that is computed at each access; the class of the layer is another then."""
    layer = net.case.choice(net.layers)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())

    class Handle:
        def remove(self) -> None:
            nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    net.handles.append(Handle())


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


CHANGES: dict[str, Change] = {
    "in place": Change(in_place),
    "one entry": Change(one_entry),
    "load_state_dict": Change(load_state),
    "a step of torch": Change(step_of_torch),
    ".data, new": Change(new_data),
    ".data, transposed": Change(data_transposed, has_square),
    ".data, fewer rows": Change(data_cut, can_lose_rows),
    ".data, fewer columns": Change(data_narrowed, can_be_fewer_columns),
    "new parameter": Change(new_parameter),
    "bias comes or goes": Change(bias_comes_or_goes),
    "layer replaced": Change(layer_replaced, lambda net: any(net.place_of(leaf) is not None for leaf in net.layers)),
    "activation replaced": Change(activation_replaced, lambda net: bool(activations_of(net))),
    "activation of a layer": Change(fused_activation, lambda net: bool(fused_layers(net))),
    "number of an activation": Change(activation_number, lambda net: bool(numbers_of_activations(net)), unseen=True),
    "hook": Change(hook),
    "hook on the model": Change(hook_of_model),
    "forward of an instance": Change(own_forward),
    "hook taken off": Change(unhook, lambda net: bool(net.handles)),
    "parametrization": Change(parametrized, lambda net: not net.handles),
    "eps": Change(eps, lambda net: bool(net.norms)),
    "statistics": Change(statistics, lambda net: any(norm.num_features for norm in net.norms)),
    "to another dtype": Change(to_dtype),
    "to another dtype by swapping": Change(lambda net: to_dtype(net, swap=True)),
    "swap_tensors": Change(swapped),
    "train or eval": Change(modes),
    "set_isa": Change(isa),
    "a layer more": Change(grown, lambda net: isinstance(net.model, nn.Sequential)),
    "a child fewer": Change(shrunk, can_shrink),
    "share_memory": Change(shared_memory),
}
