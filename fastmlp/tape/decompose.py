"""Operators of torch as the instructions of `elements.py`: one table, an entry an operator, in part in `losses.py`.

An entry gets an emitter, the recorded arguments by their names in the schema, and the value to write. What it cannot
say raises `NotElementwise`, and the operation stays one of torch.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from fastmlp.tape.elements import (
    ROUNDED,
    Element,
    Emitter,
    NotElementwise,
    Numbers,
    Rule,
    layout_of,
    leave_to_torch,
)
from fastmlp.tape.losses import LOSSES
from fastmlp.tape.trace import Operation, Ref, Trace, refs

__all__ = ["decompose"]


def _plain(name: str, *arguments: str) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        to.emit(name, *(to.operand(given[argument]) for argument in arguments), output=output)

    return rule


def _scaled(name: str, sign: float) -> Rule:
    """Sums with torch's factor `alpha`."""

    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        a, b, alpha = to.operand(given["self"]), to.operand(given["other"]), float(given.get("alpha", 1))
        if alpha == 1:
            to.emit(name, a, b, output=output)
        elif not isinstance(b, Ref):
            to.emit(name, a, to.as_made(alpha) * to.as_made(b), output=output)
        else:
            to.emit("add_scaled", a, b, scalars=(sign * to.as_made(alpha),), output=output)

    return rule


def _rsub(to: Emitter, given: dict[str, Any], output: int) -> None:
    if given.get("alpha", 1) != 1:
        leave_to_torch()
    to.emit("sub", to.operand(given["other"]), to.operand(given["self"]), output=output)


def _div(to: Emitter, given: dict[str, Any], output: int) -> None:
    if given.get("rounding_mode") is not None:
        leave_to_torch()
    to.emit("div", to.operand(given["self"]), to.operand(given["other"]), output=output)


def _activation(name: str, *scalars: str) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        to.emit(f"value_{name}", to.operand(given["self"]), scalars=[given[s] for s in scalars], output=output)

    return rule


def _gradient(name: str, saved: str, *scalars: str) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        if given.get("self_is_result"):
            leave_to_torch()
        grad = to.operand(given["grad_output" if "grad_output" in given else "grad"])
        to.emit(f"gradient_{name}", grad, to.operand(given[saved]), scalars=[given[s] for s in scalars], output=output)

    return rule


def _gelu(to: Emitter, given: dict[str, Any], output: int) -> None:
    name = "gelu" if given["approximate"] == "none" else "gelu_tanh"
    (_gradient(name, "self") if "grad_output" in given else _activation(name))(to, given, output)


def _sin(to: Emitter, given: dict[str, Any], output: int) -> None:
    to.emit("value_sin", to.operand(given["self"]), scalars=(1.0,), output=output)


def _elu(to: Emitter, given: dict[str, Any], output: int) -> None:
    """One of the activations that torch computes by one operator, as alpha scale (e^(input_scale z) - 1) below zero."""
    alpha, scale, rate = (float(given[name]) for name in ("alpha", "scale", "input_scale"))
    form = _form_of_elu(alpha, scale, rate, torch.finfo(to.dtype).eps)
    backward = "grad_output" in given
    if form is None or given.get("is_result"):
        leave_to_torch()
    name, scalars = form
    operands = [to.operand(given[key]) for key in (("grad_output", "self_or_result") if backward else ("self",))]
    to.emit(f"{'gradient' if backward else 'value'}_{name}", *operands, scalars=scalars, output=output)


def _form_of_elu(alpha: float, scale: float, rate: float, eps: float) -> tuple[str, tuple[float, ...]] | None:
    """Name and parameters of the activation."""
    if scale == 1 and rate == 1:
        return "elu", (alpha,)
    # The derivative of torch's celu has the inverse of an alpha that was rounded to float32.
    if scale == 1 and alpha > 0 and math.isclose(rate, 1 / alpha, rel_tol=eps):
        return "celu", (alpha,)
    return None


def _celu(to: Emitter, given: dict[str, Any], output: int) -> None:
    alpha = float(given["alpha"])
    if not alpha > 0:
        leave_to_torch()
    to.emit("value_celu", to.operand(given["self"]), scalars=(alpha,), output=output)


def _threshold_backward(to: Emitter, given: dict[str, Any], output: int) -> None:
    if given["threshold"] != 0:
        leave_to_torch()
    _gradient("relu", "self")(to, given, output)


def _clamp(to: Emitter, given: dict[str, Any], output: int) -> None:
    value, least, most = to.operand(given["self"]), given.get("min"), given.get("max")
    if least is not None and most is not None:
        value = to.emit("maximum", value, to.operand(least))
    elif least is not None:
        to.emit("maximum", value, to.operand(least), output=output)
    if most is not None:
        to.emit("minimum", value, to.operand(most), output=output)


#: Powers by other instructions, one after the other.
_POWERS = {
    0.5: ("sqrt",),
    1.0: ("copy",),
    2.0: ("square",),
    3.0: ("cube",),
    4.0: ("square", "square"),
    -0.5: ("rsqrt",),
    -1.0: ("reciprocal",),
    -2.0: ("square", "reciprocal"),
}


def _pow(to: Emitter, given: dict[str, Any], output: int) -> None:
    value, power = to.operand(given["self"]), given["exponent"]
    if not isinstance(power, (int, float)) or float(power) not in _POWERS:
        leave_to_torch()
    if to.made in ROUNDED and abs(power) > 2:
        leave_to_torch()  # torch rounds between products
    *first, last = _POWERS[float(power)]
    for name in first:
        value = to.emit(name, value)
    to.emit(last, value, output=output)


def _where(to: Emitter, given: dict[str, Any], output: int) -> None:
    condition, a, b = (given[name] for name in ("condition", "self", "other"))
    if to.trace.values[condition.value].dtype != torch.bool:
        leave_to_torch()
    to.emit("where", to.operand(condition), to.operand(a), to.operand(b), output=output)


def _masked_fill(to: Emitter, given: dict[str, Any], output: int) -> None:
    to.emit("where", to.operand(given["mask"]), to.operand(given["value"]), to.operand(given["self"]), output=output)


def _lerp(to: Emitter, given: dict[str, Any], output: int) -> None:
    if not isinstance(given["weight"], (int, float)):
        leave_to_torch()
    to.emit("lerp", to.operand(given["self"]), to.operand(given["end"]), scalars=(given["weight"],), output=output)


def _with_products(name: str) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        operands = [to.operand(given[argument]) for argument in ("self", "tensor1", "tensor2")]
        to.emit(name, *operands, scalars=(float(given.get("value", 1)),), output=output)

    return rule


def _copy(argument: str) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        to.emit("copy", to.operand(given[argument], converts=True), output=output)

    return rule


def _zero(to: Emitter, given: dict[str, Any], output: int) -> None:
    to.emit("copy", 0.0, output=output)


def _cat(to: Emitter, given: dict[str, Any], output: int) -> None:
    whole = to.trace.values[output]
    dim, at = given["dim"] % len(whole.sizes), 0
    for tensor in given["tensors"]:
        part = to.trace.values[tensor.value]
        if part.dtype != whole.dtype or len(part.sizes) != len(whole.sizes):
            leave_to_torch()  # torch leaves empty tensors of one dimension out
        to.emit("copy", to.operand(tensor), output=to.part(output, dim, at, at + part.sizes[dim]))
        at += part.sizes[dim]


def _stack(to: Emitter, given: dict[str, Any], output: int) -> None:
    dim = given["dim"] % len(to.trace.values[output].sizes)
    for i, tensor in enumerate(given["tensors"]):
        if to.trace.values[tensor.value].dtype != to.made:
            leave_to_torch()
        to.emit("copy", to.operand(tensor), output=to.part(output, dim, i, None))


def _slice_backward(to: Emitter, given: dict[str, Any], output: int) -> None:
    dim, step = given["dim"] % len(to.trace.values[output].sizes), given["step"]
    if step != 1:
        leave_to_torch()
    size = to.trace.values[output].sizes[dim]
    start, end = (min(max(n + size if n < 0 else n, 0), size) for n in (given["start"], given["end"]))
    to.clear(output)
    to.emit("copy", to.operand(given["grad_output"]), output=to.part(output, dim, start, max(start, end)))


def _select_backward(to: Emitter, given: dict[str, Any], output: int) -> None:
    sizes = to.trace.values[output].sizes
    dim = given["dim"] % len(sizes)
    to.clear(output)
    part = to.part(output, dim, given["index"] % sizes[dim], None)
    to.emit("copy", to.operand(given["grad_output"]), output=part)


def _sum(how: str, mean: bool = False) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        if given.get("dtype") not in (None, to.made):
            leave_to_torch()
        value, dims = to.operand(given["self"]), given.get("dim")
        if isinstance(value, Ref) and to.trace.values[value.value].dtype != to.made:
            leave_to_torch()
        to.reduce(value, how, dims, output, 1 / to.count(value, dims) if mean else 1.0)

    return rule


def _norm(to: Emitter, given: dict[str, Any], output: int) -> None:
    if float(given["ord"]) != 2 or given.get("dtype") is not None:
        leave_to_torch()
    squares = to.emit("square", to.operand(given["self"]))
    to.emit("sqrt", to.reduce(squares, "sum", given.get("dim"), to.new_like(output)), output=output)


def _spread(root: bool) -> Rule:
    """Variance or standard deviation of all elements."""

    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        value = to.operand(given["self"])
        correction, count = given["correction"], to.count(value)
        rest = count - (1 if correction is None else correction)
        if given.get("dim") or rest <= 0:
            leave_to_torch()
        mean = to.reduce(value, "sum", None, scale=1 / count)
        squares = to.emit("square", to.emit("sub", value, mean))
        if root:
            to.emit("sqrt", to.reduce(squares, "sum", None, scale=1 / rest), output=output)
        else:
            to.reduce(squares, "sum", None, output, 1 / rest)

    return rule


def _logsumexp(to: Emitter, given: dict[str, Any], output: int) -> None:
    """The largest element is taken out before and added afterwards, as in torch, unless it is infinite."""
    value, dims = to.operand(given["self"]), given["dim"]
    if not isinstance(value, Ref) or not to.sizes(value) or to.trace.values[value.value].dtype != to.made:
        leave_to_torch()
    largest = to.reduce(value, "max", dims)
    taken = to.emit("where", to.emit("eq", to.emit("abs", largest), math.inf), 0.0, largest)
    powers = to.emit("exp", to.emit("sub", value, to.kept(taken, value, dims)))
    sums = to.reduce(powers, "sum", dims)
    if given["keepdim"]:
        sums, taken = to.kept(sums, value, dims), to.kept(taken, value, dims)
    to.emit("add", to.emit("log", sums), taken, output=output)


_TWO = ("self", "other")
#: Functions of one operand that instructions are named after.
_ONE = ("neg", "reciprocal", "abs", "sign", "sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "cos", "square")
_RULES: dict[str, Rule] = {
    "add": _scaled("add", 1.0),
    "sub": _scaled("sub", -1.0),
    "rsub": _rsub,
    "mul": _plain("mul", *_TWO),
    "div": _div,
    "maximum": _plain("maximum", *_TWO),
    "minimum": _plain("minimum", *_TWO),
    **{name: _plain(name, *_TWO) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    "logical_and": _plain("and", *_TWO),
    "logical_or": _plain("or", *_TWO),
    "bitwise_and": _plain("and", *_TWO),
    "bitwise_or": _plain("or", *_TWO),
    "logical_not": _plain("not", "self"),
    "bitwise_not": _plain("not", "self"),
    **{name: _plain(name, "self") for name in _ONE},
    "sin": _sin,
    "pow": _pow,
    "clamp": _clamp,
    "hardtanh": lambda to, given, output: _clamp(
        to, {"self": given["self"], "min": given["min_val"], "max": given["max_val"]}, output
    ),
    "clamp_min": lambda to, given, output: _clamp(to, given, output),
    "clamp_max": lambda to, given, output: _clamp(to, given, output),
    "where": _where,
    "masked_fill": _masked_fill,
    "lerp": _lerp,
    "addcmul": _with_products("addcmul"),
    "addcdiv": _with_products("addcdiv"),
    "copy": _copy("src"),
    "clone": _copy("self"),
    "_to_copy": _copy("self"),
    "fill": _copy("value"),
    "zero": _zero,
    **{f"{before}zeros{after}": _zero for before, after in (("", ""), ("new_", ""), ("", "_like"))},
    "full": _copy("fill_value"),
    "full_like": _copy("fill_value"),
    "new_full": _copy("fill_value"),
    "cat": _cat,
    "stack": _stack,
    "slice_backward": _slice_backward,
    "select_backward": _select_backward,
    "sum": _sum("sum"),
    "mean": _sum("sum", mean=True),
    "amax": _sum("max"),
    "amin": _sum("min"),
    "linalg_vector_norm": _norm,
    "norm": _norm,  # as _foreach_norm
    "std": _spread(root=True),
    "var": _spread(root=False),
    "logsumexp": _logsumexp,
    "relu": _activation("relu"),
    "threshold_backward": _threshold_backward,
    "tanh": _activation("tanh"),
    "tanh_backward": _gradient("tanh", "output"),
    "sigmoid": _activation("sigmoid"),
    "sigmoid_backward": _gradient("sigmoid", "output"),
    "gelu": _gelu,
    "gelu_backward": _gelu,
    "silu": _activation("silu"),
    "silu_backward": _gradient("silu", "self"),
    "mish": _activation("mish"),
    "mish_backward": _gradient("mish", "self"),
    "hardswish": _activation("hardswish"),
    "hardswish_backward": _gradient("hardswish", "self"),
    "elu": _elu,
    "elu_backward": _elu,
    "celu": _celu,
    "leaky_relu": _activation("leaky_relu", "negative_slope"),
    "leaky_relu_backward": _gradient("leaky_relu", "self", "negative_slope"),
    "softplus": _activation("softplus", "beta", "threshold"),
    "softplus_backward": _gradient("softplus", "self", "beta", "threshold"),
    **LOSSES,
}
#: Before the names of operators on lists.
_FOREACH = "_foreach_"


def decompose(trace: Trace, event: Operation, numbers: Numbers) -> list[Element] | None:
    """The instructions of an operation, or None if it is none of elements.

    Args:
        trace: gets the values that lie between the instructions.
        event: the operation.
        numbers: of memories that hold one number throughout.
    """
    schema = event.func._schema
    namespace, _, name = schema.name.partition("::")
    if namespace not in ("aten", "prims"):
        return None
    stem = name.removeprefix(_FOREACH)
    rule = _RULES.get(stem) or _RULES.get(stem.removesuffix("_"))
    if rule is None:
        return None
    # The kernels do nothing where there is nothing, and torch knows what it is then.
    if any(not math.prod(trace.values[value].sizes) for value in trace.refs(event)):
        return None
    names = [argument.name for argument in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given = _Given(defaults | dict(zip(names, event.args, strict=False)) | event.kwargs)
    marks = len(trace.memories), len(trace.values)
    elements: list[Element] = []
    try:
        for each, output in _each(given, event, stem != name):
            to = Emitter(trace, numbers, _dtype(trace, each, output), event.place)
            rule(to, each, output)
            elements += to.elements
    except NotElementwise:
        del trace.memories[marks[0] :], trace.values[marks[1] :]
        return None
    # A run goes through memory block by block, so that what it overwrites it may read at the same place only.
    fit = all(not _shifts(trace, element) and not _overlaps(trace, element) for element in elements)
    return elements if fit else None


def _overlaps(trace: Trace, element: Element) -> bool:
    """Whether an element writes to one place several times."""
    value = trace.values[element.output]
    return any(n > 1 and not step for n, step in zip(value.sizes, value.strides, strict=True))


def _shifts(trace: Trace, element: Element) -> bool:
    """Whether an element is read elsewhere in the memory that it is written to."""
    output = layout_of(trace.values[element.output], element.space, element.reduced)
    operands = (layout_of(trace.values[value], element.space) for value in refs(element.operands))
    return any(operand[0] == output[0] and operand != output for operand in operands)


class _Given(dict[str, Any]):
    """Arguments by name. An overload without one that the rule asks for is another operation than the rule is of."""

    def __missing__(self, name: str) -> Any:
        leave_to_torch()


def _each(given: dict[str, Any], event: Operation, listed: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """The arguments of single operations, and what they write."""
    schema = event.func._schema
    if listed:
        lists = {key: value for key, value in given.items() if isinstance(value, (tuple, list))}
        outputs = [ref.value for ref in given["self"]] if schema.is_mutable else event.outputs
        for i, output in enumerate(outputs):
            each = {key: lists[key][i] if key in lists else value for key, value in given.items()}
            if output is None:
                leave_to_torch()
            yield _Given(_renamed(schema.name, each)), output
        return
    if schema.is_mutable:
        if not schema.arguments[0].alias_info or sum(bool(a.alias_info) for a in schema.arguments) != 1:
            leave_to_torch()
        yield given, given[schema.arguments[0].name].value
        return
    if len(event.outputs) != 1 or event.outputs[0] is None:
        leave_to_torch()
    yield given, event.outputs[0]


def _renamed(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an operator on lists by the names that the operator on one tensor has for them."""
    names = {"scalar": "other", "scalars": "other", "tensors1": "end"}
    if "clamp_m" in name:
        names |= dict.fromkeys(("scalar", "scalars", "other"), "min" if "clamp_min" in name else "max")
    return {names.get(key, key): value for key, value in given.items()}


def _dtype(trace: Trace, given: dict[str, Any], output: int) -> torch.dtype:
    """What the operation is computed in: what it makes, or what it compares."""
    made = trace.values[output].dtype
    if made.is_floating_point:
        return made
    read = {trace.values[value].dtype for value in refs(tuple(given.values()))}
    floats = {dtype for dtype in read if dtype.is_floating_point}
    if made != torch.bool or len(floats) > 1 or (not floats and read != {torch.bool}):
        leave_to_torch()
    return floats.pop() if floats else torch.float32
