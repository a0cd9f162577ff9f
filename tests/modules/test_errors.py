"""Every error names the argument, what was given and what was expected, on every route."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import _C, functional, reference
from fastmlp.ops import stack_of

# Without their types, since wrong types are what is tested.
linear: Any = functional.linear
mlp: Any = functional.mlp
activation: Any = fastmlp.Activation
explain: Any = fastmlp.explain
set_isa: Any = fastmlp.set_isa
wrong_module: Any = nn.Conv2d(1, 1, 1)
width: Any = 3
hidden: Any = None

x, w, b = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)

ARGUMENTS: dict[str, tuple[tuple[Any, Any, Any], str]] = {
    "features": (
        (torch.zeros(3, 7), w, b),
        r"input has shape \[3, 7\], expected 4 in the last dimension, since weight has shape \[5, 4\]",
    ),
    "scalar": ((torch.tensor(1.0), w, b), "input has no dimension, expected at least one"),
    "weight_dim": ((x, torch.zeros(1, 5, 4), b), r"weight has shape \[1, 5, 4\], expected two dimensions"),
    "bias_size": ((x, w, torch.zeros(6)), r"bias has shape \[6\], expected \[5\], the out_features of weight"),
    "bias_dim": ((x, w, torch.zeros(5, 1)), r"bias has shape \[5, 1\], expected \[5\]"),
    "weight_dtype": (
        (x, w.double(), b),
        r"weight has dtype torch.float64, expected torch.float32, the dtype of input; pass weight.float\(\)$",
    ),
    "bias_dtype": (
        (x, w, b.double()),
        r"bias has dtype torch.float64, expected torch.float32, the dtype of input; pass bias.float\(\)$",
    ),
    "half_weight": ((x, w.half(), b), "weight has dtype torch.float16, expected torch.float32, the dtype of input"),
    "input_dtype": (
        (x.double(), w, b),
        r"input has dtype torch.float64, expected torch.float32, the dtype of weight; pass input.float\(\)$",
    ),
    "device": (
        (x, w.to("meta"), b),
        "weight is on meta, where tensors have no values, expected cpu, the device of input; pass a tensor with values",
    ),
    "vector": (
        (x, torch.zeros(7), None),
        r"input has shape \[3, 4\], expected 7 in the last dimension, since weight has shape \[7\]",
    ),
    "vector_bias": ((x, torch.zeros(4), b), r"bias has shape \[5\], expected \[\], a single number"),
    "vector_dtype": ((x.double(), w[0], None), "input has dtype torch.float64, expected torch.float32, the dtype of"),
    "input_device": ((x.to("meta"), w, b), "input is on meta, where .*, expected cpu, the device of weight"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_linear(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
        functional.linear(*arguments, "relu")


@pytest.mark.parametrize("case", ARGUMENTS)
def test_same_text_when_gradients_are_wanted(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    if not arguments[1].is_floating_point():
        return
    with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
        functional.linear(arguments[0], arguments[1].clone().requires_grad_(), arguments[2], "relu")


@pytest.mark.parametrize("case", ["features", "weight_dim", "bias_size", "bias_dim", "weight_dtype", "input_dtype"])
def test_same_text_on_the_composite_route(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
        functional.linear(*arguments, "relu")


@pytest.mark.parametrize("case", ["features", "weight_dim", "bias_size", "weight_dtype", "input_dtype"])
def test_same_text_from_the_operators_and_on_meta(case: str) -> None:
    arguments, message = ARGUMENTS[case]
    for device in ("cpu", "meta"):
        moved = [t.to(device) for t in arguments]
        with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
            torch.ops.fastmlp.infer(moved[0], moved[1:], [True], [1], [0.0, 0.0])


def test_layers_are_counted() -> None:
    with pytest.raises(RuntimeError, match=r"weights\[1\] has shape \[2, 9\], expected 5 in the last dimension"):
        functional.mlp(x, [w, torch.zeros(2, 9)], [b, None], ["relu", None])
    with pytest.raises(RuntimeError, match=r"biases\[1\] has shape \[3\], expected \[2\]"):
        functional.mlp(x, [w, torch.zeros(2, 5)], [b, torch.zeros(3)], ["relu", None])
    with pytest.raises(ValueError, match="one entry for each layer, got 2, 1 and 2"):
        functional.mlp(x, [w, w], [b], ["relu", None])
    with pytest.raises(ValueError, match="a network needs at least one layer, got none"):
        functional.mlp(x, [], [], [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear([1.0], w), r"input must be a torch.Tensor, got list; pass torch.as_tensor\(input, dtype=torch"),
        (lambda: linear(None, w), "input must be a torch.Tensor, got None$"),
        (lambda: linear(x, 3), "weight must be a torch.Tensor, got int 3"),
        (lambda: linear(x, w, 3.0), "bias must be a torch.Tensor, got float 3.0"),
        (lambda: mlp(x, [w, None], [b, b], ["relu", None]), r"weights\[1\] must be a torch.Tensor"),
        (lambda: linear(x, w, b, 7), "activation must be None, a name, .* got int 7"),
        (lambda: activation("relu", slope=1), "activation 'relu' takes no parameters, got 'slope'"),
        (lambda: activation("elu", alpha="1"), "alpha of activation 'elu' must be a number, got str '1'"),
        (lambda: activation(["relu"]), "name must be one of identity, relu, .* got list"),
        (lambda: mlp(x, None, [b], ["relu"]), "weights must be a list with one entry for each layer, got None"),
        (lambda: mlp(x, [w], b, "relu"), "activations must be a list with one entry for each layer, got str 'relu'"),
        (lambda: mlp(x, [w], iter([b]), [None]), "biases must be a list .* got list_iterator"),
        (lambda: mlp(x, [w, w], [b, b], ["relu", 7]), r"activations\[1\] must be None, a name, .* got int 7"),
        (lambda: explain(fastmlp.Linear(2, 2), [1.0]), "input must be a torch.Tensor, got list"),
        (lambda: explain(wrong_module, ()), "input must be a torch.Tensor, got tuple"),
        (lambda: explain(wrong_module, x, inputs=(x,)), "inputs was given, which is of the question about a whole"),
        (lambda: explain(wrong_module, inputs=x), "inputs must be a tuple of the forward's arguments, got Tensor"),
        (lambda: explain(fastmlp.capture(abs), x), "target is a captured function, .* and input was given, Tensor"),
        (lambda: explain(x, x), "target is a tensor, .*, and input was given too, Tensor"),
        (lambda: explain(3), "target must be a torch.nn.Module, a tensor or a captured function, got int 3"),
        (lambda: set_isa(None), "isa must be one of portable.*, got None"),
        (lambda: fastmlp.MLP(4, width, 2), "hidden_features must be a sequence of sizes, .* got int 3"),
        (lambda: fastmlp.MLP(4, hidden, 2), "hidden_features must be a sequence of sizes, .* got None"),
        (lambda: fastmlp.MLP(4, [2, width / 2], 2), r"hidden_features\[1\] must be an integer, got float 1.5"),
        (
            lambda: fastmlp.MLP(4, [3], 2, output_activation=linear),
            "output_activation must be None, .* function linear",
        ),
    ],
)
def test_types(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^fastmlp: {message}"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fastmlp.Linear(2, 2, activation="swish"),
            r"activation must be one of identity, relu, .* got 'swish'; did you mean 'silu'\?",
        ),
        (lambda: fastmlp.Linear(2, 2, activation="ReLU"), r"got 'ReLU'; did you mean 'relu'\?"),
        (lambda: fastmlp.Linear(2, 2, activation="LeakyReLU"), r"got 'LeakyReLU'; did you mean 'leaky_relu'\?"),
        (lambda: fastmlp.Linear(2, 2, activation="sigmod"), r"got 'sigmod'; did you mean 'sigmoid'\?"),
        (lambda: fastmlp.Linear(2, 2, activation="softmax"), "got 'softmax'$"),
        (lambda: fastmlp.MLP(2, [3], 2, output_activation="x"), "output_activation must be one of identity"),
        (lambda: fastmlp.MLP(2, [-3], 2), r"hidden_features\[0\] must be at least 0 and below 2.63, got int -3"),
        (lambda: activation("elu", alpha=10**400), "alpha of activation 'elu' must fit a float, got int of 1329 bits"),
        (lambda: activation("celu", alpha=0), "alpha of activation 'celu' must be above 0, got int 0"),
        (lambda: activation("celu", alpha=-1.5), "alpha of activation 'celu' must be above 0, got float -1.5"),
        (lambda: fastmlp.Linear(2, 2, activation=nn.CELU(float("nan"))), "alpha of activation 'celu' must be above 0"),
        (lambda: fastmlp.reference.activate(x, "swish", {}), "name must be one of identity, relu, .* got 'swish'"),
        (lambda: fastmlp.Linear(2, 2, activation=nn.Softmax(1)), "activation Softmax has no fused form"),
        (lambda: fastmlp.Linear(2, 2, activation=nn.Softmax), "activation Softmax has no fused form"),
        (lambda: fastmlp.MLP(2, [3], 2, nn.PReLU), "activation PReLU has no fused form"),
    ],
)
def test_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^fastmlp: .*{message}"):
        call()


ROUTES: dict[str, Callable[[], Any]] = {
    "direct": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "composite": torch.autograd.forward_ad.dual_level,
}


def two_layers(prefix: str = "") -> fastmlp.Sequential:
    names = ("norm", "enc", "act", "dec") if prefix == "norm" else ("enc", "act", "dec")
    made = {"norm": nn.LayerNorm(4), "enc": nn.Linear(4, 5), "act": nn.ReLU(), "dec": fastmlp.Linear(5, 2)}
    return fastmlp.Sequential(OrderedDict((name, made[name]) for name in names))


def mistakes() -> dict[str, tuple[nn.Module, Tensor, str]]:
    """A module, an input that does not belong to it, and what the error says, in the names of the module."""
    mixed, other_bias, moved = two_layers(), two_layers(), two_layers()
    complex_layers = fastmlp.Sequential(
        OrderedDict(enc=nn.Linear(4, 5, dtype=torch.complex64), dec=nn.Linear(5, 2, dtype=torch.complex64))
    )
    mixed.dec.double()
    other_bias[0].bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    moved.to("meta")
    after_norm = two_layers("norm")
    after_norm.enc.double()
    after_norm.dec.double()
    narrow = fastmlp.MLP(4, [5], 2)
    narrow[2] = nn.Linear(6, 2)
    numbers = "expected torch.float32, the dtype of"
    return {
        "layer": (
            fastmlp.Linear(4, 5),
            x.double(),
            rf"input has dtype torch.float64, {numbers} weight; pass input.float\(\), or call model.double\(\)$",
        ),
        "children": (
            two_layers(),
            x.double(),
            rf"input has dtype torch.float64, {numbers} enc.weight; pass input.float\(\), or call model.double\(\)$",
        ),
        "keys": (
            fastmlp.MLP(4, [5], 2),
            x.half(),
            rf"input has dtype torch.float16, {numbers} 0.weight; pass input.fl",
        ),
        "converted": (
            fastmlp.convert(nn.Sequential(nn.Linear(4, 5), nn.ReLU())),
            x.bfloat16(),
            rf"input has dtype torch.bfloat16, {numbers} 0.weight; pass input.float\(\), or call model.bfloat16\(\)$",
        ),
        "integers": (
            two_layers(),
            x.long(),
            rf"input has dtype torch.int64, {numbers} enc.weight; pass input.float\(\)$",
        ),
        "truths": (fastmlp.Linear(4, 5), x.bool(), rf"input has dtype torch.bool, {numbers} weight; pass input.float"),
        "complex": (
            complex_layers,
            x,
            r"input has dtype torch.float32, expected torch.complex64, the dtype of enc.weight; "
            r"pass input.to\(torch.complex64\), or call model.float\(\)$",
        ),
        "bias": (
            other_bias,
            x,
            rf"enc.bias has dtype torch.float64, {numbers} input; call model.float\(\)$",
        ),
        "later": (
            mixed,
            x,
            r"the input of dec has dtype torch.float32, expected torch.float64, the dtype of dec.weight; "
            r"call model.double\(\), so that all layers have one dtype$",
        ),
        "after_another": (
            after_norm,
            x,
            "the input of enc has dtype torch.float32, expected torch.float64, the dtype of enc.weight; call model.do",
        ),
        "meta": (
            moved,
            x,
            "enc.weight is on meta, where tensors have no values, expected cpu, the device of input; "
            r'call model.to_empty\(device="cpu"\) and load its state_dict$',
        ),
        "meta_input": (
            two_layers(),
            x.to("meta"),
            "input is on meta, where tensors have no values, expected cpu, the device of enc.weight; pass a tensor ",
        ),
        "features": (
            two_layers(),
            torch.zeros(3, 7),
            r"input has shape \[3, 7\], expected 4 in the last dimension, since enc.weight has shape \[5, 4\]$",
        ),
        "widths": (narrow, x, r"2.weight has shape \[2, 6\], expected 5 in the last dimension"),
        "scalar": (two_layers(), torch.tensor(1.0), "input has no dimension, expected at least one"),
        "slope": (
            fastmlp.Linear(4, 5, activation=nn.LeakyReLU(1e300)),
            x,
            "negative_slope of activation leaky_relu is 1e.300, expected a number that torch.float32 can hold",
        ),
    }


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", mistakes())
def test_modules_call_parameters_by_their_names(case: str, route: str) -> None:
    module, input, message = mistakes()[case]
    with ROUTES[route](), pytest.raises(RuntimeError, match=f"^fastmlp: {message}"):
        module(input)


@pytest.mark.parametrize("case", ["layer", "children", "features", "widths"])
def test_names_in_what_explain_raises(case: str) -> None:
    module, input, message = mistakes()[case]
    with pytest.raises(RuntimeError, match=f"^fastmlp: {message}"):
        fastmlp.explain(module, input)


def test_names_under_autocast() -> None:
    """Autocast leaves float64 as it is."""
    message = "input has dtype torch.float64, expected torch.bfloat16, the dtype of enc.weight"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=f"^fastmlp: {message}"):
        two_layers()(x.double())


@pytest.mark.parametrize("value", [np.zeros((3, 4)), [[0.0] * 4], 3.0], ids=["array", "list", "number"])
@pytest.mark.parametrize(
    "module", [two_layers(), fastmlp.Linear(4, 5), fastmlp.MLP(4, [], 2)], ids=["named", "own", "mlp"]
)
def test_input_that_is_no_tensor(module: nn.Module, value: Any) -> None:
    got = f"{type(value).__name__}.*; pass torch.as_tensor\\(input, dtype=torch.float32\\)$"
    with pytest.raises(TypeError, match=f"^fastmlp: input must be a torch.Tensor, got {got}"):
        module(value)
    module(torch.as_tensor(value, dtype=torch.float32).expand(3, 4))


def test_names_of_children_that_are_used_twice() -> None:
    shared = nn.Linear(4, 4)
    model = fastmlp.Sequential(shared, nn.ReLU(), shared, nn.Linear(5, 2))
    with pytest.raises(RuntimeError, match=r"^fastmlp: 3.weight has shape \[2, 5\], expected 4 in the last dimension"):
        model(x)


@pytest.mark.parametrize("parameter", ["leaky_relu.negative_slope", "elu.alpha", "softplus.beta", "softplus.threshold"])
def test_parameters_that_float32_cannot_hold(dtype: torch.dtype, parameter: str) -> None:
    """Torch refuses what overflows where it computes; ours took it for infinity."""
    name, key = parameter.split(".")
    for value in (1e39, -1e300):
        act = fastmlp.Activation(name, **{key: value})
        arguments = x.to(dtype), w.to(dtype)
        if dtype == torch.float64:
            expected = reference.linear(*arguments, None, name, act.parameters)
            torch.testing.assert_close(linear(*arguments, None, act), expected, equal_nan=True)
            continue
        with pytest.raises(RuntimeError, match="value cannot be converted"):
            reference.linear(*arguments, None, name, act.parameters)
        message = f"{key} of activation {name} is .*, expected a number that torch.float32 can hold"
        with pytest.raises(RuntimeError, match=f"^fastmlp: {message}"):
            linear(*arguments, None, act)
    for value in (3e38, float("inf"), float("nan")):
        linear(x.to(dtype), w.to(dtype), None, fastmlp.Activation(name, **{key: value}))


def test_alpha_of_celu_that_float32_cannot_hold() -> None:
    """Its own test, since it has to be positive, and torch takes its inverse."""
    act = fastmlp.Activation("celu", alpha=1e39)
    with pytest.raises(RuntimeError, match="value cannot be converted"):
        reference.linear(x, w, None, act.name, act.parameters)
    with pytest.raises(RuntimeError, match=r"^fastmlp: alpha of activation celu is .*, expected a number that torch"):
        linear(x, w, None, act)


def test_operators_refuse_an_alpha_that_is_not_positive() -> None:
    kind = list(fastmlp.activations.DEFAULTS).index("celu")
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^fastmlp: alpha of activation celu is .*, expected a number above 0"):
            torch.ops.fastmlp.infer(x, [w], [False], [kind], [alpha, 0.0])


FUNCTIONS: dict[Any, str] = {
    torch.celu: "celu",
    torch.relu: "relu",
    nn.functional.relu: "relu",
    nn.functional.gelu: "gelu",
    nn.functional.leaky_relu: "leaky_relu",
    torch.special.expit: "sigmoid",
    torch.sin: "sin",
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=FUNCTIONS.values())
def test_functions_of_torch_are_activations(function: Any) -> None:
    layer = fastmlp.Linear(4, 5, activation=function)
    assert layer.activation == fastmlp.Activation(FUNCTIONS[function])
    input = torch.randn(3, 4)
    expected = function(nn.functional.linear(input, layer.weight, layer.bias))
    torch.testing.assert_close(layer(input), expected)
    torch.testing.assert_close(linear(input, layer.weight, layer.bias, function), expected)


def test_activations_that_do_more_than_their_class() -> None:
    """A layer would drop hooks, replaced forwards and unknown forms without a word."""
    hooked, replaced, unknown = nn.ReLU(), nn.ReLU(), nn.GELU("erf")
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    replaced.forward = torch.abs  # type: ignore[method-assign]
    for act, message in (
        (hooked, "activation ReLU has hooks or a forward of its own"),
        (replaced, "activation ReLU has hooks or a forward of its own"),
        (unknown, "approximate of activation GELU must be 'none' or 'tanh', got 'erf'"),
    ):
        with pytest.raises(ValueError, match=f"^fastmlp: {message}"):
            fastmlp.Linear(4, 5, activation=act)


#: Of every kind, for every argument. Sparse and nested tensors are torch's to accept or refuse.
ZOO: dict[str, Any] = {
    "None": None,
    "str": "abc",
    "int": 3,
    "negative": -7,
    "huge": 10**400,
    "float": 1.5,
    "nan": float("nan"),
    "bool": True,
    "list": [1, 2],
    "empty list": [],
    "list of None": [None],
    "list of str": ["x"],
    "list of negative": [-3],
    "list of huge": [10**30],
    "dict": {"a": 1},
    "tuple": (),
    "iterator": iter([1]),
    "number": torch.tensor(1.0),
    "vector": torch.zeros(7),
    "matrix": torch.zeros(2, 9),
    "cube": torch.zeros(2, 3, 9),
    "empty": torch.zeros(0),
    "double": x.double(),
    "half": x.half(),
    "int64": x.long(),
    "truth": x.bool(),
    "complex": x.to(torch.complex64),
    "meta": x.to("meta"),
    "array": np.zeros((3, 4)),
    "module": nn.Conv1d(1, 1, 1),
    "class": nn.Softmax,
    "function": lambda z: z,
    "object": object(),
    "dtype": torch.float32,
}

one_layer: dict[str, Any] = {"input": x, "weight": w, "bias": b, "activation": "relu"}
network: dict[str, Any] = {"input": x, "weights": [w], "biases": [b], "activations": ["relu"]}
widths: dict[str, Any] = {"in_features": 4, "hidden_features": [3], "out_features": 2}


def replacing(call: Callable[..., Any], given: dict[str, Any], argument: str) -> Callable[[Any], Any]:
    return lambda value: call(**{**given, argument: value})


def replacing_first(call: Callable[..., Any], given: dict[str, Any], argument: str) -> Callable[[Any], Any]:
    return lambda value: call(**{**given, argument: [value]})


CALLS: dict[str, Callable[[Any], Any]] = {
    **{f"linear {a}": replacing(linear, one_layer, a) for a in one_layer},
    **{f"mlp {a}": replacing(mlp, network, a) for a in network},
    **{f"mlp {a}[0]": replacing_first(mlp, network, a) for a in network if a != "input"},
    **{f"MLP {a}": replacing(fastmlp.MLP, widths, a) for a in (*widths, "activation", "output_activation")},
    "Linear activation": lambda v: fastmlp.Linear(4, 5, activation=v),
    "Activation name": lambda v: activation(v),
    "Activation alpha": lambda v: activation("elu", alpha=v),
    "layer input": lambda v: fastmlp.Linear(4, 5, activation="relu")(v),
    "layer activation": lambda v: setattr(fastmlp.Linear(4, 5), "activation", v),
    "Sequential input": lambda v: fastmlp.Sequential(nn.Linear(4, 3), nn.ReLU())(v),
    "MLP input": lambda v: fastmlp.MLP(**widths)(v),
    "explain target": lambda v: explain(v, x),
    "explain input": lambda v: explain(fastmlp.MLP(**widths), v),
    "set_isa name": lambda v: set_isa(v),
    "reference name": lambda v: reference.activate(x, v, {}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", ZOO)
def test_any_wrong_argument_is_refused_by_name(call: str, value: str) -> None:
    """Or it is not wrong. No signature dump, no KeyError, nothing about the insides of torch."""
    message = ""
    try:
        CALLS[call](ZOO[value])
    except (TypeError, ValueError, RuntimeError) as error:
        message = str(error)
    argument = call.split()[1].removesuffix("[0]")
    # One layer has a weight and a bias; a weight's shape may show in the input.
    words = {
        "name": ("name", "isa"),
        "weights": ("weight", "input"),
        "weight": ("weight", "input"),
        "biases": ("bias",),
    }
    assert not message or message.startswith("fastmlp: ")
    assert not message or any(word in message for word in words.get(argument, (argument, "input")))


def test_names_in_traced_models() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, input: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(input)))

    message = "input has dtype torch.float64, expected torch.float32, the dtype of fc1.weight; pass input.float"
    with pytest.raises(RuntimeError, match=f"^fastmlp: {message}"):
        fastmlp.convert(Net(), trace=True)(x.double())


def test_what_only_torch_computes() -> None:
    """Integers and sparse layouts are torch's to accept or refuse."""
    integers = torch.arange(12).view(3, 4)
    assert torch.equal(functional.linear(integers, integers), nn.functional.linear(integers, integers))
    dense = torch.eye(4)
    torch.testing.assert_close(functional.linear(dense.to_sparse(), w), w.t())
    with pytest.raises(RuntimeError):
        torch.ops.fastmlp.infer(x.to_sparse(), [w, b], [True], [1], [0.0, 0.0])


def test_operators_check_their_lists() -> None:
    ops = torch.ops.fastmlp
    with pytest.raises(ValueError, match="activation 99 of layer 0 does not exist"):
        ops.infer(x, [w], [False], [99], [0.0, 0.0])
    with pytest.raises(ValueError, match="two scalars for each of 1 layers, got 1"):
        ops.infer(x, [w], [False], [1], [0.0])
    with pytest.raises(ValueError, match="one activation for each of 1 layers, got 2"):
        ops.infer(x, [w], [False], [1, 1], [0.0, 0.0])
    with pytest.raises(RuntimeError, match=r"expected 2 parameters .* got 1"):
        ops.infer(x, [w], [True], [1], [0.0, 0.0])


def test_backward_checks_its_arguments() -> None:
    stack = stack_of((True,), (fastmlp.Activation("relu"),))
    y, needs = torch.zeros(3, 5), [True] * 3
    for arguments, message in (
        ((torch.zeros(3, 6), x, [y], [w, b], needs), r"grad has shape \[3, 6\]"),
        ((y.double(), x, [y], [w, b], needs), "grad has dtype torch.float64, expected torch.float32, the dtype of"),
        ((y, x, [], [w, b], needs), "saved has 0 tensors, expected 1"),
        ((y, x, [torch.zeros(2, 5)], [w, b], needs), r"saved\[0\] has shape \[2, 5\]"),
        ((y, x, [y], [w, b], [True]), "needs has 1 entries, expected 3"),
    ):
        with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
            _C.backward(stack.native, *arguments)


def test_nothing_is_computed_after_an_error() -> None:
    """Parameters, inputs and their version counters are as before."""
    layer = fastmlp.Linear(4, 5, activation="tanh")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    versions = [p._version for p in layer.parameters()]
    with pytest.raises(RuntimeError, match="expected 4 in the last dimension"):
        layer(torch.zeros(2, 3))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert versions == [p._version for p in layer.parameters()]


def test_memory_that_cannot_be_had_raises() -> None:
    huge = torch.zeros(1, 1).expand(1 << 40, 1)
    with pytest.raises(RuntimeError, match=r"allocate|memory"):
        functional.linear(huge, torch.zeros(1 << 12, 1))
