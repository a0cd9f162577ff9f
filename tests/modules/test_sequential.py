"""What a Sequential runs as one operation, and that it computes what nn.Sequential does, whatever was done to it."""

import copy
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import fastmlp
from fastmlp import Sin, reference
from fastmlp.runs import Alone, Run, parts
from tests.support.derivatives import assert_same

F64 = torch.float64

# torch deprecates what users still have: the older weight_norm, and TorchScript.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
]


def sample(*shape: int) -> Tensor:
    return torch.randn(*(shape or (7, 4)), dtype=F64, requires_grad=True)


def make() -> Any:
    """Any: children are edited without asking for their types."""
    return fastmlp.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


def plan(model: nn.Sequential) -> str:
    """What runs, in order: the names of a run's children with + between them, of every other child in brackets."""
    return " ".join("+".join(p.names) if isinstance(p, Run) else f"({p.name})" for p in parts(model._modules))


def operations(module: nn.Module) -> int:
    """Nodes that a call adds to the graph: a run is one, and so is a layer of ours that is called."""
    if isinstance(module, fastmlp.Sequential):
        return sum(1 if isinstance(p, Run) else operations(p.child) for p in parts(module._modules))
    return int(isinstance(module, fastmlp.Linear)) + sum(operations(child) for child in module.children())


def nodes(output: Tensor) -> int:
    """Fused operations in the graph of an output."""
    found, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [following for following, _ in node.next_functions]
    return sum("FusedNetwork" in node.name() for node in found)


def outcome(forward: Callable[[Tensor], Tensor], input: Tensor, model: nn.Module) -> list[Tensor | None]:
    """The output and every gradient, in the least precise dtype of the model."""
    torch.manual_seed(3)  # for Dropout
    output = forward(input)
    tensors = [t for t in (input, *model.parameters()) if t.requires_grad]
    results = [output, *torch.autograd.grad(output.pow(2).sum(), tensors, allow_unused=True)]
    least = max((p.dtype for p in model.parameters()), key=lambda dtype: torch.finfo(dtype).eps, default=F64)
    return [t if t is None else t.to(least) for t in results]


class Calls:
    """The modules that are called while it is open, from the outermost on."""

    def __enter__(self) -> list[nn.Module]:
        self.before, modules, depth = nn.Module.__call__, [], 0
        before = self.before

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 1:
                modules.append(module)
            depth += 1
            try:
                return before(module, *args, **kwargs)
            finally:
                depth -= 1

        nn.Module.__call__ = call  # type: ignore[method-assign]
        return modules

    def __exit__(self, *_: object) -> None:
        nn.Module.__call__ = self.before  # type: ignore[method-assign]


def check(model: nn.Sequential, expected: str, input: Tensor | None = None) -> None:
    """The results of nn.Sequential's own loop over the same children, by the operations expected."""
    input = sample() if input is None else input
    found = outcome(model, input, model)
    assert_same(found, outcome(lambda x: nn.Sequential.forward(model, x), input, model))
    assert plan(model) == expected
    with Calls() as called:
        output = model(input)
    # The rule in C calls whom the rule in Python names, and makes one node of everybody else.
    alone = [p.child for p in parts(model._modules) if isinstance(p, Alone)]
    assert [id(m) for m in called] == [id(m) for m in alone]
    assert nodes(output) == operations(model)


class Double(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input * 2


class DoubleLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class LowRank(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=F64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=F64)

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.up(self.down(input))


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        return input.to(self.dtype)


class Lookup(nn.Module):
    """A tensor from what is none."""

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        return input["x"]


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(4, 4, dtype=F64, **options)


def fused(activation: Any = None) -> fastmlp.Linear:
    return fastmlp.Linear(4, 4, activation=activation, dtype=F64)


def to_ours(layer: Any, activation: str) -> None:
    layer.__class__ = fastmlp.Linear
    layer.activation = activation


def to_attribute(layer: nn.Module, name: str) -> nn.Module:
    tensor = getattr(layer, name) * 1
    delattr(layer, name)
    setattr(layer, name, tensor)
    return layer


def to_buffer(layer: nn.Module, name: str) -> None:
    tensor = getattr(layer, name).detach()
    delattr(layer, name)
    layer.register_buffer(name, tensor)


ONE = "0+1+2+3+4"

#: What is done to the model of `make`, and what it runs then.
EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "replace a layer": (lambda m: m.__setitem__(0, linear()), ONE),
    "replace by a fused layer": (lambda m: m.__setitem__(0, fused()), ONE),
    "replace by a layer with an activation": (lambda m: m.__setitem__(0, fused("silu")), "0 (1) 2+3+4"),
    "replace an activation": (lambda m: m.__setitem__(1, nn.GELU()), ONE),
    "replace by another module": (lambda m: m.__setitem__(1, nn.LayerNorm(4, dtype=F64)), "0 (1) 2+3+4"),
    "setattr": (lambda m: setattr(m, "1", nn.Sigmoid()), ONE),
    "setattr of another module": (lambda m: setattr(m, "2", Double()), "0+1 (2) (3) 4"),
    "append an activation": (lambda m: m.append(nn.ELU(0.3)), "0+1+2+3+4+5"),
    "append a layer": (lambda m: m.append(linear()), "0+1+2+3+4+5"),
    "append another module": (lambda m: m.append(nn.Softmax(-1)), "0+1+2+3+4 (5)"),
    "extend": (lambda m: m.extend([nn.Mish(), fused("selu")]), "0+1+2+3+4+5+6"),
    "insert": (lambda m: m.insert(2, linear()), "0+1+2+3+4+5"),
    "insert first": (lambda m: m.insert(0, nn.Hardswish()), "(0) 1+2+3+4+5"),
    "delete a layer": (lambda m: m.__delitem__(2), "0+1 (2) 3"),
    "delete an activation": (lambda m: m.__delitem__(1), "0+1+2+3"),
    "delete the first": (lambda m: m.__delitem__(0), "(0) 1+2+3"),
    "delete a slice": (lambda m: m.__delitem__(slice(1, 3)), "0+1+2"),
    "delattr": (lambda m: delattr(m, "1"), "0+2+3+4"),
    "pop": (lambda m: m.pop(-1), "0+1+2+3"),
    "add_module": (lambda m: m.add_module("tail", linear()), "0+1+2+3+4+tail"),
    "register_module": (lambda m: m.register_module("3", nn.Softplus(2.0, 1.0)), ONE),
    "+=": (lambda m: m.__iadd__(nn.Sequential(linear(), nn.ReLU())), "0+1+2+3+4+5+6"),
    "*=": (lambda m: m.__imul__(2), "0+1+2+3+4+5+6+7+8+9"),
    "the children's dictionary": (lambda m: m._modules.update({"1": nn.SiLU()}), ONE),
    "a parameter": (lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(4, 4, dtype=F64))), ONE),
    "a parameter's data": (lambda m: setattr(m[0].weight, "data", torch.randn(4, 4, dtype=F64)), ONE),
    "a parameter in place": (lambda m: m[2].bias.data.add_(1), ONE),
    "a wider layer": (
        lambda m: (m.__setitem__(0, nn.Linear(4, 9).double()), m.__setitem__(2, nn.Linear(9, 4).double())),
        ONE,
    ),
    "load_state_dict": (lambda m: m.load_state_dict(make().state_dict()), ONE),
    "load_state_dict that assigns": (lambda m: m.load_state_dict(make().state_dict(), assign=True), ONE),
    "no bias": (lambda m: setattr(m[2], "bias", None), ONE),
    "no bias, registered": (lambda m: m[2].register_parameter("bias", None), ONE),
    "a frozen layer": (lambda m: m[0].requires_grad_(False), ONE),
    "a frozen weight": (lambda m: m[4].weight.requires_grad_(False), ONE),
    "parametrize": (lambda m: parametrize.register_parametrization(m[0], "weight", Double()), "(0) (1) 2+3+4"),
    "parametrize a bias": (lambda m: parametrize.register_parametrization(m[2], "bias", Double()), "0+1 (2) (3) 4"),
    "weight_norm": (lambda m: parametrizations.weight_norm(m[2]), "0+1 (2) (3) 4"),
    "older weight_norm": (lambda m: nn.utils.weight_norm(m[2]), "0+1 (2) (3) 4"),
    "orthogonal": (lambda m: parametrizations.orthogonal(m[4]), "0+1+2+3 (4)"),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m[0]).eval(), "(0) (1) 2+3+4"),
    "older spectral_norm": (lambda m: nn.utils.spectral_norm(m[0]).eval(), "(0) (1) 2+3+4"),
    "prune": (lambda m: prune.random_unstructured(m[2], "weight", 0.5), "0+1 (2) (3) 4"),
    "prune a bias": (lambda m: prune.l1_unstructured(m[4], "bias", 2), "0+1+2+3 (4)"),
    "forward of an instance": (lambda m: setattr(m[1], "forward", lambda x: x * 3), "0 (1) 2+3+4"),
    "forward of a layer": (lambda m: setattr(m[2], "forward", lambda x: x * 3), "0+1 (2) (3) 4"),
    "class": (lambda m: setattr(m[2], "__class__", DoubleLinear), "0+1 (2) (3) 4"),
    "class of ours": (lambda m: to_ours(m[2], "silu"), "0+1+2 (3) 4"),
    "subclass of a layer": (lambda m: m.__setitem__(0, DoubleLinear(4, 4, dtype=F64)), "(0) (1) 2+3+4"),
    "subclass of an activation": (lambda m: m.__setitem__(1, type("Own", (nn.ReLU,), {})()), "0 (1) 2+3+4"),
    "adapter": (lambda m: m.__setitem__(2, LowRank(m[2])), "0+1 (2) (3) 4"),
    "adapter inside": (lambda m: m.__setitem__(2, nn.Sequential(m[2], Double())), "0+1 (2) (3) 4"),
    "nested": (lambda m: m.__setitem__(2, fastmlp.Sequential(linear(), nn.ReLU(), linear())), "0+1 (2) (3) 4"),
    "nested model of torch": (lambda m: m.__setitem__(2, nn.Sequential(linear(), nn.ReLU(), fused())), "0+1 (2) (3) 4"),
    "nested empty": (lambda m: m.__setitem__(3, fastmlp.Sequential()), "0+1+2 (3) 4"),
    "lazy layer": (lambda m: m.__setitem__(2, nn.LazyLinear(4, dtype=F64)), ONE),
    "identity": (lambda m: m.__setitem__(1, nn.Identity()), ONE),
    "identity before the activation": (lambda m: m.insert(1, nn.Identity()), "0+1+2+3+4+5"),
    "identity after the activation": (lambda m: m.insert(2, nn.Identity()), "0+1+2+3+4+5"),
    "identity first": (lambda m: m.insert(0, nn.Identity()), "(0) 1+2+3+4+5"),
    "identity with a hook": (
        lambda m: m.append(nn.Identity()) and m[5].register_forward_hook(lambda *_: None),
        ONE + " (5)",
    ),
    "two activations": (lambda m: m.insert(2, nn.Sigmoid()), "0+1 (2) 3+4+5"),
    "two activations around identity": (
        lambda m: (m.insert(2, nn.Identity()), m.insert(3, nn.Sigmoid())),
        "0+1+2 (3) 4+5+6",
    ),
    "in-place activation": (lambda m: m.__setitem__(1, nn.ReLU(inplace=True)), ONE),
    "in-place activations": (
        lambda m: (m.__setitem__(1, nn.ELU(0.7, inplace=True)), m.__setitem__(3, nn.LeakyReLU(0.3, inplace=True))),
        ONE,
    ),
    "in-place after a layer that is called": (
        lambda m: (m.__setitem__(1, nn.ReLU(inplace=True)), m[0].register_forward_hook(lambda *_: None)),
        "(0) (1) 2+3+4",
    ),
    "dropout first": (lambda m: m.insert(0, nn.Dropout(0.5)), "(0) 1+2+3+4+5"),
    "dropout before the activation": (lambda m: m.insert(1, nn.Dropout(0.5)), "0+1 (2) 3+4+5"),
    "dropout after the activation": (lambda m: m.insert(2, nn.Dropout(0.5)), "0+1+2+3+4+5"),
    "dropout twice": (lambda m: m.insert(2, nn.Dropout(0.5)) and m.insert(3, nn.Dropout(0.1)), "0+1+2 (3) 4+5+6"),
    "in-place dropout before the activation": (
        lambda m: m.insert(1, nn.Dropout(0.5, inplace=True)),
        "0+1 (2) 3+4+5",
    ),
    "in-place dropout after an activation": (
        lambda m: (m.__setitem__(1, nn.GELU()), m.insert(2, nn.Dropout(0.5, inplace=True))),
        "0+1+2+3+4+5",
    ),
    "dropout last": (lambda m: m.append(nn.Dropout(0.5)), "0+1+2+3+4+5"),
    "dropout, eval": (lambda m: m.insert(2, nn.Dropout(0.5)).eval(), "0+1+2+3+4+5"),
    "dropout first, eval": (lambda m: m.insert(0, nn.Dropout(0.5)).eval(), "(0) 1+2+3+4+5"),
    "dropout before the activation, eval": (lambda m: m.insert(1, nn.Dropout(0.5)).eval(), "0+1+2+3+4+5"),
    "dropout last, eval": (lambda m: m.append(nn.Dropout(0.5)).eval(), "0+1+2+3+4+5"),
    "in-place dropout, eval": (lambda m: m.insert(1, nn.Dropout(0.5, inplace=True)).eval(), "0+1+2+3+4+5"),
    "one dropout in eval": (lambda m: m.insert(2, nn.Dropout(0.5)) and m[2].eval(), "0+1+2+3+4+5"),
    "eval and train again": (lambda m: m.insert(2, nn.Dropout(0.5)).eval().train(), "0+1+2+3+4+5"),
    "dropout of another kind, eval": (lambda m: m.insert(2, nn.AlphaDropout(0.5)).eval(), "0+1 (2) 3+4+5"),
    "tied layers": (lambda m: m.__setitem__(4, m[0]), ONE),
    "tied weights": (lambda m: setattr(m[4], "weight", m[0].weight), ONE),
    "shared activation": (lambda m: m.__setitem__(3, m[1]), ONE),
    "a parameter as an attribute": (lambda m: to_attribute(m[0], "weight"), "(0) (1) 2+3+4"),
    "a bias as an attribute": (lambda m: to_attribute(m[2], "bias"), "0+1 (2) (3) 4"),
    "a weight as a buffer": (lambda m: to_buffer(m[2], "weight"), "0+1 (2) (3) 4"),
    "another dtype": (
        lambda m: (m.insert(2, Cast(torch.float32)), m[3].float(), m.insert(4, Cast(F64))),
        "0+1 (2) 3 (4) (5) 6",
    ),
    "another dtype at once": (lambda m: (m.append(Cast(torch.float32)), m.append(linear().float())), ONE + " (5) 6"),
    "compiled child": (lambda m: m[2].compile(backend="eager"), "0+1 (2) (3) 4"),
    "hook on a Sequential inside": (
        lambda m: m.append(fastmlp.Sequential(linear())) and m[5].register_forward_hook(lambda *_: None),
        ONE + " (5)",
    ),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_seen_at_the_next_call(name: str) -> None:
    edit, expected = EDITS[name]
    model = make()
    check(model, ONE)
    edit(model)
    if name == "lazy layer":
        model(sample())  # which is what makes it a layer
    check(model, expected)


def test_edits_of_mlp() -> None:
    model: Any = fastmlp.MLP(4, [5, 6], 3, "gelu", "sigmoid", dtype=F64)
    check(model, "0+1+2+3+4+5")
    model[1] = nn.LayerNorm(5, dtype=F64)
    model[3].register_forward_hook(lambda *_: None)
    check(model, "0 (1) 2 (3) 4+5")


def test_edits_are_seen_through_the_parent() -> None:
    """A child that is edited where another module holds it too."""
    model = make()
    holder = nn.ModuleList([model[2], model[1]])
    check(model, ONE)
    handle = holder[0].register_forward_hook(lambda *_: None)
    check(model, "0+1 (2) (3) 4")
    handle.remove()
    check(model, ONE)


def count(seen: list[str], name: str) -> Callable[..., None]:
    return lambda *_, **__: seen.append(name)


#: How a hook is put on a module.
HOOKS: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward with keywords": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True),
    "forward, always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "forward pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "full backward": lambda m, hook: m.register_full_backward_hook(hook),
    "full backward pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_children(name: str) -> None:
    for place, expected in enumerate(
        ("(0) (1) 2+3+4", "0 (1) 2+3+4", "0+1 (2) (3) 4", "0+1+2 (3) 4", "0+1+2+3 (4)"),
    ):
        model, seen = make(), list[str]()
        handle = HOOKS[name](model[place], count(seen, name))
        model(sample()).sum().backward()
        assert seen == [name]
        check(model, expected)
        handle.remove()
        check(model, ONE)


def test_hooks_change_what_they_may() -> None:
    model = make()
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[3].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    check(model, "0 (1) (2) (3) 4")


def test_hooks_on_the_container() -> None:
    for name, register in HOOKS.items():
        model, seen = make(), list[str]()
        register(model, count(seen, name))
        output = model(sample())
        assert nodes(output) == 1
        output.sum().backward()
        assert seen == [name]
    model = make()
    model.register_forward_hook(lambda module, args, output: output * 2)
    x = sample()
    assert_same([model(x)], [nn.Sequential.forward(model, x) * 2])


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules(kind: str) -> None:
    model, seen = make(), list[str]()
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(count(seen, kind))
    try:
        check(model, "(0) (1) (2) (3) (4)")
        seen.clear()
        model(sample()).sum().backward()
        assert len(seen) == 1 + len(model)
    finally:
        handle.remove()
    check(model, ONE)


@pytest.mark.parametrize("kind", [nn.Linear, fastmlp.Linear, nn.ReLU, nn.GELU, nn.Identity, nn.Dropout, Sin])
def test_a_forward_that_is_replaced_in_its_class(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastmlp.Sequential(
        linear(), nn.ReLU(), fused(), nn.GELU(), linear(), nn.Identity(), nn.Dropout(0.5), Sin(), linear()
    ).eval()
    everything = "0+1+2+3+4+5+6+7+8"
    check(model, everything)
    before: Any = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda module, input: before(module, input) * 2)
        alone = {f"({name})" for name, child in model.named_children() if type(child) is kind}
        assert alone
        assert alone <= set(plan(model).split())
        check(model, plan(model))
    check(model, everything)


def test_attributes_of_activations_may_change() -> None:
    gelu, leaky, elu, softplus = nn.GELU(), nn.LeakyReLU(), nn.ELU(), nn.Softplus()
    model = fastmlp.Sequential(linear(), gelu, linear(), leaky, linear(), elu, linear(), softplus)
    x, everything = sample(), "0+1+2+3+4+5+6+7"
    changes: list[tuple[nn.Module, str, Any]] = [
        (gelu, "approximate", "tanh"),
        (gelu, "approximate", "none"),
        (leaky, "negative_slope", 0.7),
        (leaky, "negative_slope", -0.3),
        (leaky, "negative_slope", 0),
        (leaky, "negative_slope", True),
        (elu, "alpha", 0.3),
        (elu, "alpha", -0.3),
        (softplus, "beta", 3),
        (softplus, "threshold", -5.0),
        (leaky, "inplace", True),
    ]
    for module, name, value in changes:
        before = model(x)
        setattr(module, name, value)
        check(model, everything, x)
        unchanged = torch.equal(model(x), before)
        assert unchanged == (name == "inplace")


def test_attributes_out_of_range() -> None:
    """PyTorch computes with a negative alpha of CELU, and refuses zero."""
    model: Any = fastmlp.Sequential(linear(), nn.CELU(0.5), linear())
    check(model, "0+1+2")
    for alpha in (-0.5, float("nan")):
        model[1].alpha = alpha
        assert plan(model) == "0 (1) 2"
    assert "its alpha is nan, expected a number above 0" in str(fastmlp.explain(model, sample()))
    model[1].alpha = -0.5
    check(model, "0 (1) 2")
    model[1].alpha = 0.0
    with pytest.raises(RuntimeError, match="alpha cannot be 0 for CELU"):
        model(sample())
    model[1].alpha = 2
    check(model, "0+1+2")


def test_frequencies_may_change() -> None:
    model: Any = fastmlp.Sequential(linear(), Sin(30.0), linear(), Sin(), linear())
    for frequency in (30.0, 1, -0.5, 0.0):
        model[1].frequency = frequency
        check(model, "0+1+2+3+4")
    model[1].frequency = torch.tensor(2.0, dtype=F64)
    check(model, "0 (1) 2+3+4")


def test_attributes_that_only_torch_understands() -> None:
    slopes: list[Any] = [torch.tensor(0.2), np.float32(0.2)]
    for slope in slopes:
        check(fastmlp.Sequential(linear(), nn.LeakyReLU(slope), linear()), "0 (1) 2")
    check(fastmlp.Sequential(linear(), nn.LeakyReLU(np.float64(0.2)), linear()), "0+1+2")
    model: Any = fastmlp.Sequential(linear(), nn.GELU(), nn.Dropout(0.5))
    model[1].approximate = "sigmoid"
    model[2].training = 0
    assert plan(model) == "0 (1) (2)"
    with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
        model(sample())


def test_activation_of_a_fused_layer_may_change() -> None:
    model: Any = fastmlp.Sequential(fused(), nn.Tanh(), fused("gelu"), linear())
    check(model, "0+1+2+3")
    model[0].activation = "selu"
    check(model, "0 (1) 2+3")
    model[0].activation = None
    model[2].activation = nn.ELU(0.2)
    check(model, "0+1+2+3")


@pytest.mark.parametrize("place", range(6))
def test_dropout_at_every_place(place: int) -> None:
    """The children around it are fused, and what it draws is what it draws in nn.Sequential."""
    model = make()
    model.insert(place, nn.Dropout(0.4))
    for _ in range(2):
        model.train()
        # In front of everything it follows no layer; before an activation, that follows none.
        check(model, {0: "(0) 1+2+3+4+5", 1: "0+1 (2) 3+4+5", 3: "0+1+2+3 (4) 5"}.get(place, "0+1+2+3+4+5"))
        model.eval()
        check(model, "(0) 1+2+3+4+5" if place == 0 else "0+1+2+3+4+5")


def test_moves_between_dtypes(dtype: torch.dtype) -> None:
    model = make()
    check(model, ONE)
    x = torch.randn(7, 4, dtype=dtype)
    output = model.to(dtype)(x)
    assert output.dtype == dtype
    assert nodes(output) == 1
    check(model.double(), ONE)
    assert model.to("meta")(x.double().to("meta")).shape == (7, 4)
    assert plan(model) == ONE
    check(model.to_empty(device="cpu").apply(reset), ONE)


def reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.reset_parameters()


def test_dtypes_that_do_not_belong_together_raise() -> None:
    model = make()
    model[2].float()
    assert plan(model) == "0+1 2+3 4"
    with pytest.raises(RuntimeError, match=r"the input of 2 has dtype torch.float64, expected torch.float32, the"):
        model(sample())
    model = make()
    model[2].bias.data = model[2].bias.data.float()
    with pytest.raises(RuntimeError, match=r"2.bias has dtype torch.float32, expected torch.float64, the dtype of i"):
        model(sample())


def test_autocast_brings_dtypes_together() -> None:
    """Runs of weights of two dtypes, which autocast casts to the lower one."""
    model, x = make().float(), torch.randn(7, 4)
    model[2].bfloat16()
    assert plan(model) == "0+1 2+3 4"
    cast = copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu"), Calls() as called:
        assert torch.equal(model(x), cast(x.bfloat16()))
    assert not called


def test_functional_call() -> None:
    model, x = make(), sample()
    swapped = {k: torch.randn_like(v, requires_grad=True) for k, v in model.named_parameters()}
    native = nn.Sequential(*model)
    results = []
    for module in (model, native):
        output = functional_call(module, swapped, (x,))
        assert nodes(output) == (1 if module is model else 0)
        results.append([output, *torch.autograd.grad(output.pow(2).sum(), [x, *swapped.values()])])
    assert_same(*results)
    check(model, ONE)


def test_vmap_over_parameters() -> None:
    models, x = [make() for _ in range(3)], sample()
    parameters, buffers = stack_module_state(models)
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    assert_same([together], [torch.stack([nn.Sequential.forward(m, x) for m in models])])
    check(models[0], ONE)


def test_tensors_that_are_not_plain() -> None:
    """A run takes the composite route where one of its tensors is special."""

    class Marked(Tensor):
        pass

    model, x = make(), sample()
    marked = model(x.detach().as_subclass(Marked))
    assert type(marked) is Marked
    assert nodes(marked) == 0
    assert_same([marked.as_subclass(Tensor)], [model(x)])
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Marked))
    assert type(model(x)) is Marked
    assert_same([model(x).as_subclass(Tensor)], [nn.Sequential.forward(model, x).as_subclass(Tensor)])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        pairs = [torch.autograd.forward_ad.unpack_dual(f(dual)) for f in (make(), nn.Sequential(*make()))]
    assert all(p.tangent is not None for p in pairs)


def test_input_that_is_no_tensor() -> None:
    model = fastmlp.Sequential(Lookup(), *make())
    x = sample()
    output = model({"x": x})
    assert nodes(output) == 1
    assert_same([output], [nn.Sequential.forward(model, {"x": x})])
    model = make()
    for call in (model, lambda input: nn.Sequential.forward(model, input)):
        with pytest.raises(TypeError):
            call({"x": x})


def test_empty_and_none() -> None:
    x = sample()
    assert fastmlp.Sequential()(x) is x
    assert fastmlp.Sequential()("anything") == "anything"
    model: Any = fastmlp.Sequential(linear(), nn.ReLU())
    model.add_module("2", None)
    for call in (model, lambda input: nn.Sequential.forward(model, input)):
        with pytest.raises(TypeError):
            call(x)
    with pytest.raises(TypeError, match="child '2' is None, expected a module"):
        parts(model._modules)


def test_errors_of_children_pass_through() -> None:
    model = make()

    def fail(*_: Any) -> None:
        raise KeyError("from a hook")

    handle = model[2].register_forward_hook(fail)
    with pytest.raises(KeyError, match="from a hook"):
        model(sample())
    handle.remove()
    check(model, ONE)
    del model[2].bias
    for call in (model, lambda input: nn.Sequential.forward(model, input)):
        with pytest.raises(AttributeError, match="bias"):
            call(sample())


def test_children_may_drop_each_other_while_they_run() -> None:
    """The call holds those that it began with."""
    model, x = make(), sample()
    native = copy.deepcopy(model)
    model[1].register_forward_hook(lambda *_: model._modules.clear())
    assert_same([model(x)], [nn.Sequential.forward(native, x)])
    assert model(x) is x


def test_shared_layers_add_up_their_gradients() -> None:
    layer = linear()
    model = fastmlp.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)
    check(model, ONE)
    layer.register_forward_hook(lambda *_: None)
    check(model, "(0) (1) (2) (3) (4)")


def test_copies() -> None:
    model, x = make(), sample()
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is fastmlp.Sequential
        assert list(other.state_dict()) == list(model.state_dict())
        assert torch.equal(other(x), model(x))
        check(other, ONE, x)
    other = copy.deepcopy(model)
    other[1] = nn.Sigmoid()
    check(model, ONE, x)
    assert not torch.equal(other(x), model(x))


def test_state_dict_is_that_of_torch() -> None:
    model, native = make(), nn.Sequential(*make())
    native.load_state_dict(model.state_dict())
    x = sample()
    assert_same([model(x)], [native(x)])
    model.load_state_dict(nn.Sequential(*make()).state_dict())
    check(model, ONE, x)


def test_slices_and_sums() -> None:
    model, x = make(), sample()
    for part, expected in ((model[:2], "0+1"), (model[1:], "(1) 2+3+4"), (model[::2], "0+2+4"), (model[-1:], "4")):
        assert type(part) is fastmlp.Sequential
        check(part, expected, x)
    # nn.Sequential's own operators make an nn.Sequential.
    for whole in (model + make(), model * 2, 2 * model):
        assert_same([whole(x)], [fastmlp.Sequential(*whole)(x)])
        assert len(whole) == 10
    before = model
    model += make()
    model *= 2
    assert model is before
    check(model, "+".join(map(str, range(20))), x)


def test_subclass_with_a_forward_of_its_own() -> None:
    class Residual(fastmlp.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return input + super().forward(input)

    model, x = Residual(*make()), sample()
    output = model(x)
    assert nodes(output) == 1
    assert_same([output], [x + nn.Sequential.forward(model, x)])


def test_named_children() -> None:
    model = fastmlp.Sequential(OrderedDict(first=linear(), act=nn.ReLU(), second=linear()))
    check(model, "first+act+second")
    model.add_module("norm", nn.LayerNorm(4, dtype=F64))
    check(model, "first+act+second (norm)")


def test_replicas() -> None:
    """As nn.DataParallel makes them: tensors in the place of parameters."""
    model, x = make(), sample()
    replica: Any = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        copied = child._replicate_for_data_parallel()
        for key, parameter in child.named_parameters():
            setattr(copied, key, parameter * 1)
        replica._modules[name] = copied
    assert plan(replica) == "(0) (1) (2) (3) (4)"
    assert fastmlp.explain(replica, x).name == "children"
    assert_same(outcome(replica, x, model), outcome(model, x, model))


def test_traced_by_torchscript() -> None:
    model, x = make(), sample()
    traced = torch.jit.trace(model, (sample(),))
    assert_same([traced(x)], [model(x)])
    assert "fastmlp::" not in str(traced.inlined_graph)
    check(model, ONE)


def test_gradients_only_where_they_are_wanted() -> None:
    model, x = make().requires_grad_(False), sample().detach()
    assert model(x).grad_fn is None
    model[4].bias.requires_grad_(True)
    check(model, ONE, x)
    with torch.no_grad():
        assert model(x).grad_fn is None
    with torch.inference_mode():
        assert model(x).is_inference()


def children(draw: random.Random) -> list[nn.Module]:
    """Modules on four features: layers, activations, and everything that ends a run."""

    def with_hook(module: nn.Module) -> nn.Module:
        names = ("forward", "forward_pre", "full_backward", "full_backward_pre")
        getattr(module, f"register_{draw.choice(names)}_hook")(lambda *_: None)
        return module

    def with_forward(module: nn.Module) -> nn.Module:
        module.__dict__["forward"] = torch.cos
        return module

    def compiled(module: nn.Module) -> nn.Module:
        module.__dict__["_compiled_call_impl"] = module._call_impl
        return module

    float32: Any = np.float32(0.3)
    layers: list[Callable[[], nn.Module]] = [linear, lambda: linear(bias=False), fused, lambda: fused("gelu")]
    activations: list[Callable[[], nn.Module]] = [
        nn.ReLU,
        nn.Tanh,
        nn.GELU,
        lambda: nn.GELU("tanh"),
        lambda: nn.LeakyReLU(0.3),
        lambda: nn.ELU(-0.3),
        lambda: nn.CELU(draw.choice([0.5, -0.5])),
        lambda: Sin(draw.choice([1.0, -2.5])),
        lambda: nn.Softplus(2.0, 1.0),
        nn.Mish,
        nn.Hardswish,
        nn.SELU,
        nn.Sigmoid,
        nn.SiLU,
        Sin,
        nn.Identity,
        lambda: nn.Dropout(0.3).eval(),
        lambda: nn.Dropout(draw.choice([0.3, 0, 1.0, 1])),
    ]
    others: list[Callable[[], nn.Module]] = [
        lambda: nn.Dropout(float32),
        lambda: nn.LayerNorm(4, dtype=F64),
        lambda: nn.Softmax(-1),
        Double,
        lambda: DoubleLinear(4, 4, dtype=F64),
        lambda: LowRank(linear()),
        lambda: parametrizations.weight_norm(linear()),
        lambda: parametrizations.weight_norm(fused("tanh")),
        lambda: to_attribute(linear(), "weight"),
        lambda: to_attribute(fused("silu"), "bias"),
        lambda: prune.l1_unstructured(linear(), "weight", 0.5),
        lambda: nn.Sequential(linear(), nn.ReLU(), fused()),
        lambda: fastmlp.Sequential(*children(draw)[:3]),
        lambda: fastmlp.MLP(4, [3], 4, dtype=F64),
        *[lambda change=change: change(linear()) for change in (with_hook, with_forward, compiled)],
        *[lambda change=change: change(draw.choice(activations)()) for change in (with_hook, with_forward, compiled)],
        lambda: nn.AlphaDropout(0.3).eval(),
        lambda: nn.PReLU(dtype=F64),
    ]
    found: list[nn.Module] = []
    for _ in range(draw.randrange(13)):
        kind = draw.choices((layers, activations, others, None), (6, 6, 3, 1))[0]
        found.append(draw.choice(kind)() if kind else draw.choice(found or [linear()]))
    return found


def test_the_rule_in_c_is_the_rule_in_python() -> None:
    """Random lists of children: both split them alike, and nn.Sequential computes the same."""
    draw, seen = random.Random(5), {"runs": 0, "alone": 0, "layers in one run": 0}
    for _ in range(400):
        model = fastmlp.Sequential(*children(draw))
        check(model, plan(model))
        found = parts(model._modules)
        seen["runs"] += sum(isinstance(p, Run) for p in found)
        seen["alone"] += sum(isinstance(p, Alone) for p in found)
        seen["layers in one run"] = max(
            seen["layers in one run"], *(len(p.layers) for p in found if isinstance(p, Run)), 0
        )
    assert seen["runs"] > 400
    assert seen["alone"] > 800
    assert seen["layers in one run"] >= 5


@pytest.mark.parametrize("kind", [kind for kind in reference.MODULES if kind is not nn.Identity])
def test_dropout_in_place_after_an_activation(kind: type[nn.Module]) -> None:
    """Where torch's activation keeps what it was given, its output may be changed; here too."""
    model = fastmlp.Sequential(nn.Linear(4, 5), kind(), nn.Dropout(0.5, inplace=True), nn.Linear(5, 2)).double()
    x = torch.randn(6, 4, dtype=torch.float64)

    def gradients(module: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        return list(torch.autograd.grad(module(x).sum(), list(model.parameters())))

    if kind in (nn.ReLU, nn.Sigmoid, nn.Tanh):
        for module in (nn.Sequential(*model), model):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(module)
    else:
        assert_same(gradients(model), gradients(nn.Sequential(*model)))
