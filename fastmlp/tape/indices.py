"""Operators of torch that read or write elements by their numbers, or find such numbers, as nodes of our kernels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmlp.tape.elements import COMPUTED, NotElementwise, Numbers, leave_to_torch
from fastmlp.tape.trace import Node, Operation, Ref, Trace, Value, arguments_of

__all__ = ["index_node_of"]

_MEAN, _SUM = 1, 2  # torch's numbers for the reductions of losses


@dataclass(slots=True)
class _Call:
    """An operation that becomes a node. Where the kernels cannot take it, methods say so by `leave_to_torch`.

    Attributes:
        given: its arguments, by their names in the schema.
        made: what it returns.
        numbers: of memories that hold one number throughout.
    """

    trace: Trace
    given: dict[str, Any]
    made: list[Ref | None]
    place: str
    numbers: Numbers

    def value(self, ref: Ref | None) -> Value:
        if ref is None:
            leave_to_torch()
        return self.trace.values[ref.value]

    def rows_of_last_dim(self, name: str) -> int:
        """How many dimensions the rows of an argument are, if the operation's dimension is the one behind them."""
        dims, dim = len(self.value(self.given[name]).sizes), self.given["dim"]
        if dim is None or not dims or dim % dims != dims - 1:
            leave_to_torch()
        return dims - 1

    def numbers_in(self, ref: Ref | None, dims: int) -> Ref:
        """A matrix of numbers that the kernels compute with, which all of the operation's are like."""
        if self.value(ref).dtype not in COMPUTED:
            leave_to_torch()
        return self._matrix(ref, dims)

    def indices_in(self, ref: Ref | None, dims: int | None = None) -> Ref:
        """A matrix of indices, or a column of all where no number of dimensions is given."""
        value = self.value(ref)
        if value.dtype != torch.int64:
            leave_to_torch()
        return self._matrix(ref, len(value.sizes) if dims is None else dims)

    def _matrix(self, ref: Ref | None, dims: int) -> Ref:
        """A value as a matrix, the rows of which are its first so many dimensions."""
        value = self.value(ref)
        rows = _joined(value.sizes[:dims], value.strides[:dims])
        columns = _joined(value.sizes[dims:], value.strides[dims:])
        if rows[0] * columns[0] == 0:
            leave_to_torch()
        sizes, strides = zip(rows, columns, strict=True)
        self.trace.values.append(replace(value, sizes=sizes, strides=strides))
        return Ref(len(self.trace.values) - 1)

    def scalar(self, ref: Ref | None) -> Ref:
        """A value of one element without dimensions."""
        if ref is None or self.value(ref).sizes:
            leave_to_torch()
        return ref

    def holds_zeros(self, ref: Ref) -> bool:
        value = self.value(ref)
        number = self.numbers.get((value.memory, value.dtype))
        return number == 0 and math.copysign(1, number) == 1


def _joined(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """The size and the stride of dimensions as one, if their elements are at equal distances."""
    size, stride = 1, 1
    for n, step in zip(reversed(sizes), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            stride = step
        elif step != stride * size:
            leave_to_torch()
        size *= n
    return size, stride


def _gather(call: _Call) -> Node:
    x, index, (output,) = call.given["self"], call.given["index"], call.made
    dims = call.rows_of_last_dim("self")
    # Torch's operators on one dimension go other ways, with other errors.
    if dims == 0 or call.value(x).sizes[:-1] != call.value(index).sizes[:-1]:
        leave_to_torch()
    made = call.numbers_in(output, dims)
    args = call.numbers_in(x, dims), call.indices_in(index, dims), made
    return Node("add_gather", args, [made.value], call.place, raises=True)


def _scatter(adds: bool) -> Callable[[_Call], Node]:
    def rule(call: _Call) -> Node:
        x, index, source, (output,) = *(call.given[name] for name in ("self", "index", "src")), call.made
        dims = call.rows_of_last_dim("self")
        picked = call.value(index).sizes
        if dims == 0 or call.value(x).sizes[:-1] != picked[:-1] or call.value(source).sizes != picked:
            leave_to_torch()
        made = call.numbers_in(output, dims)
        before = None if call.holds_zeros(x) else call.numbers_in(x, dims)
        args = before, call.indices_in(index, dims), call.numbers_in(source, dims), made, adds
        return Node("add_scatter", args, [made.value], call.place, raises=True)

    return rule


def _max(call: _Call) -> Node:
    dims = call.rows_of_last_dim("self")
    *values, indices = call.made
    largest = call.numbers_in(values[0], len(call.value(values[0]).sizes)) if values else None
    places = call.indices_in(indices)
    writes = [places.value] if largest is None else [largest.value, places.value]
    args = call.numbers_in(call.given["self"], dims), largest, places
    return Node("add_row_max", args, writes, call.place, optional=True)


def _take_rows(table: str, indices: str, name: str) -> Callable[[_Call], Node]:
    """Rows of a table, by the names of both arguments, and the operator's."""

    def rule(call: _Call) -> Node:
        x, index, (output,) = call.given[table], call.given[indices], call.made
        dims = len(call.value(index).sizes)
        if call.given.get("dim", 0) != 0 or len(call.value(output).sizes) != dims + len(call.value(x).sizes) - 1:
            leave_to_torch()
        rows, made = call.numbers_in(x, 1), call.numbers_in(output, dims)
        if len(call.value(x).sizes) < 2 or call.value(rows).strides[1] != 1:
            leave_to_torch()
        return Node("add_take_rows", (rows, call.indices_in(index), made, name), [made.value], call.place, raises=True)

    return rule


def _embedding_backward(call: _Call) -> Node:
    grad, index, (output,) = call.given["grad_output"], call.given["indices"], call.made
    if call.given["scale_grad_by_freq"]:
        leave_to_torch()
    made = call.numbers_in(output, 1)
    source = call.numbers_in(grad, len(call.value(index).sizes))
    args = source, call.indices_in(index), call.given["padding_idx"], made
    return Node("add_embedding_backward", args, [made.value], call.place)


def _is_of_rows(call: _Call) -> bool:
    """Whether a loss of classes is one number, of a class for each row, which all weigh the same."""
    reduced = call.given["reduction"] in (_MEAN, _SUM) and call.given["weight"] is None
    return reduced and len(call.value(call.given["self"]).sizes) == 2


def _nll_loss(call: _Call) -> Node:
    loss, total = call.made
    if not _is_of_rows(call):
        leave_to_torch()
    kind = call.given["ignore_index"], call.given["reduction"] == _MEAN
    x, target = call.numbers_in(call.given["self"], 1), call.indices_in(call.given["target"])
    written = call.scalar(loss), call.scalar(total)
    return Node("add_nll_loss", (x, target, *kind, *written), [ref.value for ref in written], call.place, raises=True)


def _nll_loss_backward(call: _Call) -> Node:
    (output,) = call.made
    if not _is_of_rows(call):
        leave_to_torch()
    kind = call.given["ignore_index"], call.given["reduction"] == _MEAN
    made, target = call.numbers_in(output, 1), call.indices_in(call.given["target"])
    grad, total = call.scalar(call.given["grad_output"]), call.scalar(call.given["total_weight"])
    args = grad, target, total, *kind, made
    return Node("add_nll_loss_backward", args, [made.value], call.place, raises=True)


_RULES: dict[str, Callable[[_Call], Node]] = {
    "aten::gather.": _gather,
    "aten::scatter_add.": _scatter(adds=True),
    "aten::scatter.src": _scatter(adds=False),
    "aten::max.dim": _max,
    "aten::argmax.": _max,
    "aten::embedding.": _take_rows("weight", "indices", "embedding"),
    "aten::index_select.": _take_rows("self", "index", "index_select"),
    "aten::embedding_dense_backward.": _embedding_backward,
    "aten::nll_loss_forward.": _nll_loss,
    "aten::nll_loss_backward.": _nll_loss_backward,
}


def index_node_of(trace: Trace, event: Operation, numbers: Numbers) -> Node | None:
    """The node that does what an operation does, if there is one.

    Args:
        trace: gets the values that the node's arguments are.
        event: the operation.
        numbers: of memories that hold one number throughout.
    """
    schema = event.func._schema
    rule = _RULES.get(f"{schema.name}.{schema.overload_name}")
    if rule is None:
        return None
    made = [None if output is None else Ref(output) for output in event.outputs]
    mark = len(trace.values)
    try:
        return rule(_Call(trace, arguments_of(event), made, event.place, numbers))
    except NotElementwise:
        del trace.values[mark:]
        return None
