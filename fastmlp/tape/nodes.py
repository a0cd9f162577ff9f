"""Operators of torch that a kernel of ours computes whole: products with bias and ReLU, rows, draws."""

import math
from collections.abc import Callable
from dataclasses import replace

from fastmlp._load import _C
from fastmlp.tape.elements import COMPUTED, ROUNDED, Element, layout_of
from fastmlp.tape.trace import Node, Operation, Ref, Trace, Value

__all__ = ["activated", "node_of", "without"]

_Rule = Callable[[Trace, Operation], Node | None]


def _product(trace: Trace, a: Ref, b: Ref, bias: Ref | None, event: Operation) -> Node | None:
    values = trace.values
    (output,) = event.outputs
    if output is None:
        return None
    made = values[output]
    operands = [values[ref.value] for ref in (a, b, bias) if ref is not None]
    gapless = made.strides[1] == 1 or made.sizes[1] == 1
    if any(value.dtype != made.dtype for value in operands) or not gapless:
        return None
    if made.dtype not in (*COMPUTED, *ROUNDED) or 0 in (*made.sizes, values[a.value].sizes[1]):
        return None
    if bias is not None and values[bias.value].sizes != made.sizes[1:]:
        return None
    return Node(
        "add_product", (a, b, bias, "identity", [], Ref(output), None, None), [output], event.place, optional=True
    )


def _mm(trace: Trace, event: Operation) -> Node | None:
    a, b = event.args
    return _product(trace, a, b, None, event)


def _addmm(trace: Trace, event: Operation) -> Node | None:
    if any(event.kwargs.get(factor, 1) != 1 for factor in ("alpha", "beta")):
        return None
    bias, a, b = event.args
    return _product(trace, a, b, bias, event)


def _bernoulli(trace: Trace, event: Operation) -> Node | None:
    tensor, p = event.args[0], event.args[1] if len(event.args) > 1 else event.kwargs.get("p", 0.5)
    drawn = trace.values[tensor.value]
    if drawn.dtype not in COMPUTED or not _is_gapless(drawn) or not 0 <= p <= 1 or not _C.draws_as_torch():
        return None
    args = tensor, p, event.kwargs.get("generator")
    return Node("add_bernoulli", args, [tensor.value], event.place, draws=True)


def _rows(trace: Trace, ref: Ref | None, columns: int) -> Ref | None:
    """A value as rows of so many columns; of none if there is none."""
    if ref is None:
        return None
    value = trace.values[ref.value]
    count = math.prod(value.sizes) // columns
    trace.values.append(replace(value, sizes=(count, columns), strides=(columns, 1)))
    return Ref(len(trace.values) - 1)


def _line(trace: Trace, ref: Ref | None) -> Ref | None:
    """A value as one dimension."""
    if ref is None:
        return None
    value = trace.values[ref.value]
    trace.values.append(replace(value, sizes=(math.prod(value.sizes),), strides=(1,)))
    return Ref(len(trace.values) - 1)


def _fit(trace: Trace, *given: Ref | None) -> bool:
    """Whether the kernels of rows can read these: of one dtype, without gaps, not empty."""
    values = [trace.values[ref.value] for ref in given if ref is not None]
    same = all(value.dtype == values[0].dtype for value in values) and values[0].dtype in COMPUTED
    return same and all(_is_gapless(value) and math.prod(value.sizes) for value in values)


def _made(event: Operation) -> list[Ref | None]:
    return [None if output is None else Ref(output) for output in event.outputs]


def _layer_norm(trace: Trace, event: Operation) -> Node | None:
    x, sizes, weight, bias, eps = event.args
    made = _made(event)
    if None in made or not _fit(trace, x, weight, bias, *made):
        return None
    columns = math.prod(sizes)
    output, mean, rstd = _rows(trace, made[0], columns), _line(trace, made[1]), _line(trace, made[2])
    args = _rows(trace, x, columns), _line(trace, weight), _line(trace, bias), eps, output, mean, rstd
    return Node("add_layer_norm", args, _values(output, mean, rstd), event.place)


def _layer_norm_backward(trace: Trace, event: Operation) -> Node | None:
    grad, x, sizes, mean, rstd, weight, _, _ = event.args
    made = _made(event)
    if not _fit(trace, grad, x, mean, rstd, weight, *made):
        return None
    columns = math.prod(sizes)
    outputs = _rows(trace, made[0], columns), _line(trace, made[1]), _line(trace, made[2])
    given = _rows(trace, grad, columns), _rows(trace, x, columns), _line(trace, mean), _line(trace, rstd)
    return Node(
        "add_layer_norm_backward",
        (*given, _line(trace, weight), *outputs),
        _values(*outputs),
        event.place,
        optional=True,
    )


def _are_columns(trace: Trace, x: Ref, *given: Ref | None) -> bool:
    """Whether one value is a matrix, and the others are of one number for each of its columns."""
    sizes = trace.values[x.value].sizes
    return len(sizes) == 2 and all(trace.values[ref.value].sizes == sizes[1:] for ref in given if ref is not None)


def _batch_norm(trace: Trace, event: Operation) -> Node | None:
    x, weight, bias, running_mean, running_var, training, momentum, eps = event.args
    output, *statistics = _made(event)
    mean, rstd = statistics if training else (None, None)  # of no elements in eval mode
    columns = weight, bias, running_mean, running_var, mean, rstd
    given = x, output, *columns
    if not _are_columns(trace, x, *columns) or not _fit(trace, *given):
        return None
    moved = _values(running_mean, running_var) if training else []
    memories = [trace.values[value].memory for value in _values(*given)]
    if any(memories.count(trace.values[value].memory) > 1 for value in moved):
        return None  # what is read would be written, and could not be left out where nobody reads it afterwards
    args = x, weight, bias, running_mean, running_var, training, momentum, eps, output, mean, rstd
    return Node("add_batch_norm", args, [*_values(output, mean, rstd), *moved], event.place, optional=True)


def _batch_norm_backward(trace: Trace, event: Operation) -> Node | None:
    grad, x, weight, running_mean, running_var, mean, rstd, training, eps, _ = event.args
    made = _made(event)
    given = (mean, rstd, None) if training else (running_mean, None, running_var)
    columns = weight, *given, *made[1:]
    if not _are_columns(trace, x, *columns) or not _fit(trace, grad, x, made[0], *columns):
        return None
    args = grad, x, *given, eps, weight, *made
    return Node("add_batch_norm_backward", args, _values(*made), event.place, optional=True)


def _values(*given: Ref | None) -> list[int]:
    return [ref.value for ref in given if ref is not None]


def _narrow(trace: Trace, dim: int, *given: Ref | None) -> int | None:
    """How many columns these have, if the kernels of narrow rows take them."""
    sizes = trace.values[given[0].value].sizes if given[0] is not None else ()
    last = bool(sizes) and dim % len(sizes) == len(sizes) - 1
    most = _C.most_softmax_columns if trace.alone else _C.softmax_columns()
    return sizes[-1] if last and _fit(trace, *given) and sizes[-1] <= most else None


def _softmax(log: bool) -> _Rule:
    def rule(trace: Trace, event: Operation) -> Node | None:
        x, dim, converts = event.args
        (made,) = _made(event)
        columns = _narrow(trace, dim, x, made)
        if columns is None or converts:
            return None
        output = _rows(trace, made, columns)
        return Node("add_softmax", (_rows(trace, x, columns), output, log), _values(output), event.place)

    return rule


def _softmax_backward(log: bool) -> _Rule:
    def rule(trace: Trace, event: Operation) -> Node | None:
        grad, output, dim, _ = event.args
        (made,) = _made(event)
        columns = _narrow(trace, dim, grad, output, made)
        if columns is None:
            return None
        result = _rows(trace, made, columns)
        args = _rows(trace, grad, columns), _rows(trace, output, columns), result, log
        return Node("add_softmax_backward", args, _values(result), event.place)

    return rule


_RULES: dict[str, _Rule] = {
    "aten::mm.": _mm,
    "aten::addmm.": _addmm,
    "aten::bernoulli_.float": _bernoulli,
    "aten::native_layer_norm.": _layer_norm,
    "aten::native_layer_norm_backward.": _layer_norm_backward,
    "aten::native_batch_norm.": _batch_norm,
    "aten::native_batch_norm_backward.": _batch_norm_backward,
    "aten::_softmax.": _softmax(log=False),
    "aten::_log_softmax.": _softmax(log=True),
    "aten::_softmax_backward_data.": _softmax_backward(log=False),
    "aten::_log_softmax_backward_data.": _softmax_backward(log=True),
}


def _is_gapless(value: Value) -> bool:
    """Whether the elements lie one after another, row by row."""
    expected = 1
    for size, stride in zip(reversed(value.sizes), reversed(value.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def node_of(trace: Trace, event: Operation) -> Node | None:
    """The node that does what an operation does, if there is one."""
    schema = event.func._schema
    rule = _RULES.get(f"{schema.name}.{schema.overload_name}")
    return None if rule is None else rule(trace, event)


def without(node: Node, dead: set[int]) -> Node:
    """A node without some of what it makes."""
    if node.method == "add_product" and node.writes[0] in dead:
        a, b, bias, *_ = node.args
        return Node(
            node.method, (a, b, bias, "identity", [], Ref(node.writes[1]), None, None), node.writes[1:], node.place
        )
    if not node.optional:
        return node
    args = tuple(None if isinstance(arg, Ref) and arg.value in dead else arg for arg in node.args)
    return replace(node, args=args, writes=[value for value in node.writes if value not in dead])


def activated(trace: Trace, node: Node, element: Element) -> Node | None:
    """A product with a ReLU behind it, if the element is one of what the product makes.

    The kernels of products apply it to sums in registers. Other activations are slower there than in a run, which goes
    through memory without stopping at each row of a tile.
    """
    if node.method != "add_product" or node.args[3] != "identity" or element.name != "value_relu":
        return None
    if element.how != "store" or not isinstance(element.operands[0], Ref):
        return None
    values = trace.values
    made, output = values[node.writes[0]], values[element.output]
    given = values[element.operands[0].value]
    same = layout_of(given, element.space) == layout_of(made, made.sizes) and made.dtype == output.dtype
    if not same or output.strides != made.strides or output.sizes != made.sizes:
        return None
    writes = [element.output]
    if output.memory != made.memory:
        writes.append(node.writes[0])  # else the activation is computed in place
    a, b, bias, *_ = node.args
    before = Ref(writes[1]) if len(writes) > 1 else None
    return replace(node, args=(a, b, bias, "relu", [], Ref(element.output), before, None), writes=writes)
