"""What a frozen graph does with one row: a fused trace of a few rows, described without them.

Called by frozen_graph.py, which has the trace. What such a description cannot say is refused here: an element that
depends on other rows than its own, sums along rows, and whatever a frozen graph has no step for. csrc/capture/
frozen_graph.cpp makes tapes of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from fastmlp._errors import place_of
from fastmlp.chain import Link
from fastmlp.tape.elements import layout_of
from fastmlp.tape.trace import Node, Operation, Ref, Run, Trace, Value

__all__ = ["Constant", "Description", "Graph", "Place", "Recipe", "Refusal", "refuse"]

#: A memory, and elements of each of its rows: offset, how many, the step from row to row, and from element to element.
Place: TypeAlias = tuple[int, int, int, int, int]
#: As `_C.load_frozen_graph` takes it: memories, steps, and which outputs have no dimension of features.
Recipe: TypeAlias = tuple[list[tuple[str, int]], list[tuple[Any, ...]], list[bool]]


class Constant(NamedTuple):
    """Numbers that are the same for all rows.

    Attributes:
        name: of the module that has them.
        key: the parameter or buffer of that module; "scale" or "shift" of a `BatchNorm1d` in eval mode.
        features: how many.
    """

    name: str
    key: str
    features: int


@dataclass
class Graph:
    """What a model computes, but for the elements of its tensors.

    Attributes:
        networks: the modules of each.
        called: all other modules, those that do nothing included.
        tensors: attributes of modules that the forward reads itself: names of the module, and of the tensor.
        constants: in the order of the recipe's memories.
        matrices_only: whether inputs must have two dimensions.
    """

    networks: list[list[Link]]
    called: list[Link]
    tensors: list[tuple[str, str]]
    constants: list[Constant]
    recipe: Recipe
    matrices_only: bool


class Refusal(TypeError):
    """An error that is complete as it is."""


def refuse(model: nn.Module, reason: str) -> NoReturn:
    """Raises the error for a model that is no graph."""
    raise Refusal(f"fastmlp: {place_of('', model)} cannot be frozen: {reason}")


class Description:
    """A fused trace without its rows.

    Args:
        model: for errors.
        dtype: of all tensors.
        constant_of: says what a tensor of the model is, or stands for.
        trace: of one execution, fused.
        rows: the dimensions before the features.
        features: of the inputs.
        made_once: operations that make the same at each call.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        constant_of: Callable[[Tensor | None], Constant | None],
        trace: Trace,
        rows: tuple[int, ...],
        features: Sequence[int],
        made_once: Sequence[Operation],
    ) -> None:
        self.constants: list[Constant] = []
        self._model, self._dtype, self._constant_of = model, dtype, constant_of
        self._trace, self._rows = trace, rows
        self._count = math.prod(rows)
        self._memories: list[tuple[str, int]] = []
        self._numbers: dict[int, int] = {}
        self._once = {trace.values[o].memory: event for event in made_once for o in event.outputs if o is not None}
        for memory in trace.memories:
            if memory.written and memory.source != ("new",):
                refuse(model, "its forward changes an input, a parameter or a buffer in place")
        skipped = set(map(id, made_once))
        self._events = [event for event in trace.events if id(event) not in skipped]
        arguments = {m.source[1]: i for i, m in enumerate(trace.memories) if m.source[0] == "argument"}
        for i, size in enumerate(features):
            self._add(arguments.get(i), "input", size)
        self._squeezed: list[bool] = []
        for value, *_ in trace.results:
            one = trace.values[value]
            squeezed = one.sizes == rows
            if one.dtype != dtype or not (squeezed or one.sizes[:-1] == rows):
                refuse(
                    model,
                    f"its forward returns a tensor of shape {list(one.sizes)} in {one.dtype} for inputs of "
                    f"{list(rows)} rows, expected rows in {dtype}",
                )
            self._squeezed.append(squeezed)
            self._add(one.memory, "output", 1 if squeezed else one.sizes[-1])

    def recipe(self) -> Recipe:
        """The description."""
        made: list[int] = []
        fixed: list[tuple[int, Constant]] = []
        for event in self._events:
            for value in self._trace.refs(event):
                number = self._trace.values[value].memory
                if number in self._numbers or number in made or any(number == other for other, _ in fixed):
                    continue
                memory = self._trace.memories[number]
                constant = self._constant_of(memory.tensor)
                if memory.source == ("new",) and number not in self._once:
                    made.append(number)
                elif constant is not None:
                    fixed.append((number, constant))
                else:
                    self._refuse_event(event, "it reads a tensor that is neither an input nor a part of the model")
        for number in made:
            bytes = self._trace.memories[number].bytes
            self._add(number, "arena", bytes // self._dtype.itemsize // self._count)
        for number, constant in fixed:
            self._add(number, "constant", constant.features)
            self.constants.append(constant)
        steps = [self._step(event) for event in self._events]
        return self._memories, steps, self._squeezed

    def _add(self, number: int | None, kind: str, features: int) -> None:
        if number is not None:
            self._numbers[number] = len(self._memories)
        self._memories.append((kind, features))

    def _refuse_event(self, event: Any, reason: str) -> NoReturn:
        if isinstance(event, Operation):
            name = event.func._schema.name.removeprefix("aten::")
            reason = f"{name} is not among what a frozen graph computes row by row"
        refuse(self._model, f"its forward calls {event.place}: {reason}")

    def _step(self, event: Any) -> tuple[Any, ...]:
        if isinstance(event, Run):
            return self._run(event)
        if isinstance(event, Node) and event.method == "network":
            x, index, y = event.args
            return "network", index, self._matrix(event, x), self._matrix(event, y)
        if isinstance(event, Node) and event.method == "add_softmax":
            x, y, log = event.args
            return "softmax", self._matrix(event, x), self._matrix(event, y), log
        if isinstance(event, Node) and event.method == "add_layer_norm":
            x, weight, bias, eps, y, mean, rstd = event.args
            lines = [None if ref is None else self._line(event, ref) for ref in (weight, bias)]
            columns = [self._column(event, ref) for ref in (mean, rstd)]
            return "layer_norm", self._matrix(event, x), *lines, eps, self._matrix(event, y), *columns
        method = getattr(event, "method", "a check").removeprefix("add_")
        self._refuse_event(event, f"{method} is not among what a frozen graph computes row by row")

    def _run(self, event: Run) -> tuple[Any, ...]:
        wide = event.sizes[len(self._rows) :]
        if (
            event.sizes[: len(self._rows)] != self._rows
            or len(wide) > 1
            or any(o.how != "store" for o in event.outputs)
        ):
            self._refuse_event(
                event, "elements of a row are summed, a row has several dimensions, or what it makes depends on no row"
            )
        features = wide[0] if wide else 1

        def lying(value: int, space: tuple[int, ...]) -> Place:
            one = self._trace.values[value]
            _, dtype, strides, offset = layout_of(one, space)
            return self._place(event, one, dtype, strides if wide else (*strides, 1), features, offset)

        inputs = [lying(value, space) for value, space in event.inputs]
        outputs = [(lying(output.value, output.space), output.register) for output in event.outputs]
        return "elementwise", inputs, event.instructions, outputs

    def _place(
        self, event: Any, value: Value, dtype: torch.dtype, strides: Sequence[int], features: int, offset: int
    ) -> Place:
        *steps, step = strides
        number = self._numbers[value.memory]
        kind, width = self._memories[number]
        row_step = 0 if kind == "constant" else width
        expected = [row_step * math.prod(self._rows[i + 1 :]) for i in range(len(self._rows))]
        if dtype != self._dtype:
            self._refuse_event(event, f"a tensor is of {dtype}, where the model is of {self._dtype}")
        if steps != expected or step < 0 or offset + (features - 1) * step >= width:
            self._refuse_event(
                event, "an element depends on other rows than its own, or rows are not the first dimension"
            )
        return number, offset, features, row_step, step

    def _matrix(self, event: Any, ref: Ref) -> Place:
        value = self._trace.values[ref.value]
        rows, dims = (self._rows if value.sizes[:-1] == self._rows else (self._count,)), len(value.sizes) - 1
        if value.sizes[:-1] != rows:
            self._refuse_event(event, f"a tensor of shape {list(value.sizes)} has other rows than the inputs")
        strides = value.strides
        if len(rows) != len(self._rows):
            # Nodes of rows see all of them as one dimension.
            width = strides[0]
            strides = (*(width * math.prod(self._rows[i + 1 :]) for i in range(len(self._rows))), strides[dims])
        return self._place(event, value, value.dtype, strides, value.sizes[-1], value.offset)

    def _column(self, event: Any, ref: Ref) -> Place:
        value = self._trace.values[ref.value]
        steps = [math.prod(self._rows[i + 1 :]) for i in range(len(self._rows))]
        return self._place(event, value, value.dtype, (*steps, 1), 1, value.offset)

    def _line(self, event: Any, ref: Ref) -> Place:
        value = self._trace.values[ref.value]
        return self._place(event, value, value.dtype, (*(0 for _ in self._rows), 1), value.sizes[-1], value.offset)
