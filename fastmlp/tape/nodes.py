"""Operators of torch that a kernel of ours computes whole: products, with bias and activation, and draws."""

from collections.abc import Callable

import torch

from fastmlp._load import _C
from fastmlp.tape.elements import Element, layout_of
from fastmlp.tape.trace import Node, Operation, Ref, Trace, Value

__all__ = ["activated", "node_of", "without"]

_FLOATS = (torch.float32, torch.float64)
_Rule = Callable[[Trace, Operation], Node | None]


def _product(trace: Trace, a: Ref, b: Ref, bias: Ref | None, event: Operation) -> Node | None:
    values = trace.values
    (output,) = event.outputs
    if output is None:
        return None
    made = values[output]
    operands = [values[ref.value] for ref in (a, b, bias) if ref is not None]
    gapless = made.strides[1] == 1 or made.sizes[1] == 1
    if made.dtype not in _FLOATS or any(value.dtype != made.dtype for value in operands) or not gapless:
        return None
    if 0 in (*made.sizes, values[a.value].sizes[1]):
        return None
    if bias is not None and values[bias.value].sizes != made.sizes[1:]:
        return None
    return Node("add_product", (a, b, bias, "identity", [], Ref(output), None, None), [output], event.place)


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
    if drawn.dtype not in _FLOATS or not _is_gapless(drawn) or not 0 <= p <= 1 or not _C.draws_as_torch():
        return None
    args = tensor, p, event.kwargs.get("generator")
    return Node("add_bernoulli", args, [tensor.value], event.place, draws=True)


_RULES: dict[str, _Rule] = {
    "aten::mm.": _mm,
    "aten::addmm.": _addmm,
    "aten::bernoulli_.float": _bernoulli,
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
    args = tuple(None if isinstance(arg, Ref) and arg.value in dead else arg for arg in node.args)
    return Node(node.method, args, [value for value in node.writes if value not in dead], node.place)


def activated(trace: Trace, node: Node, element: Element) -> Node | None:
    """A product with an activation behind it, if the element is one of what the product makes."""
    if node.method != "add_product" or node.args[3] != "identity" or not element.name.startswith("value_"):
        return None
    activation = element.name.removeprefix("value_")
    if element.how != "store" or not isinstance(element.operands[0], Ref):
        return None
    values = trace.values
    made, output = values[node.writes[0]], values[element.output]
    given = values[element.operands[0].value]
    same = layout_of(given, element.space) == layout_of(made, made.sizes) and made.dtype == output.dtype
    if not same or output.strides != made.strides or output.sizes != made.sizes:
        return None
    a, b, bias, *_ = node.args
    args = (a, b, bias, activation, list(element.scalars), Ref(element.output), Ref(node.writes[0]), None)
    return Node(node.method, args, [element.output, node.writes[0]], node.place)
