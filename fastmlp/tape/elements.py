"""Elementwise operations in the words of the library's own kernels: instructions, each for every element of a space.

`decompose.py` says operators of torch in these words. `fuse.py` gathers instructions into runs, each of which is one
node of a tape: one pass over memory, in blocks that stay in a cache.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch

from fastmlp.tape.trace import Memory, Ref, Trace, Value

__all__ = [
    "COMPUTED",
    "ROUNDED",
    "Element",
    "Emitter",
    "Layout",
    "NotElementwise",
    "Numbers",
    "Operand",
    "Rule",
    "layout_of",
    "leave_to_torch",
]

#: What the kernels of tapes compute in.
COMPUTED = (torch.float32, torch.float64)
#: What they compute in float32, and the instructions that round what an operation of torch makes, as torch does.
ROUNDED = {torch.bfloat16: "round_bfloat16", torch.float16: "round_float16"}

#: A value, or a number of Python.
Operand = Ref | float

#: Of memories that hold one number throughout, that number, for each dtype that it is one of.
Numbers = dict[tuple[int, torch.dtype], float]

#: Where a value lies for the elements of a space: memory, dtype, strides in the space's dimensions, offset.
Layout = tuple[int, torch.dtype, tuple[int, ...], int]


class NotElementwise(Exception):
    """An operation that the kernels of runs do not compute."""


@dataclass(slots=True)
class Element:
    """One instruction.

    Attributes:
        name: as `_C.elementwise_operations()` has it; "copy" for an operand as it is.
        operands: are broadcast to the space.
        scalars: what the instruction has besides.
        output: the value that is written, whole.
        space: sizes of the space.
        dtype: in which it is computed.
        how: "store", or how dimensions of the space are reduced: "sum", "max" or "min".
        reduced: these dimensions.
        scale: a sum is multiplied by it.
    """

    name: str
    operands: tuple[Operand, ...]
    scalars: tuple[float, ...]
    output: int
    space: tuple[int, ...]
    dtype: torch.dtype
    how: str = "store"
    reduced: tuple[int, ...] = ()
    scale: float = 1.0


def layout_of(value: Value, space: Sequence[int], reduced: Sequence[int] = ()) -> Layout:
    """Where a value lies for the elements of a space that it is broadcast to, or that is reduced to it.

    Dimensions of one element are left out, so that a view with more or fewer of them lies alike.
    """
    kept = _strides_in(value.sizes, value.strides, tuple(space), tuple(reduced))
    return value.memory, value.dtype, kept, value.offset


@lru_cache(4096)
def _strides_in(
    sizes: tuple[int, ...], strides: tuple[int, ...], space: tuple[int, ...], reduced: tuple[int, ...]
) -> tuple[int, ...]:
    """The strides of layout_of(), which is asked for the same ones many times."""
    own = [0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True)]
    if reduced and len(own) < len(space):
        for dim in reduced:
            own.insert(dim, 0)
    own = [0] * (len(space) - len(own)) + own
    return tuple(stride for stride, size in zip(own, space, strict=True) if size != 1)


def leave_to_torch() -> NoReturn:
    """Says that an operation stays one of torch."""
    raise NotElementwise("fastmlp: capture: the kernels of runs do not compute this operation")


#: Instructions with one number, by that of two operands and the place of the number: their names, and the number.
_WITH_NUMBER: dict[tuple[str, int], tuple[str, Callable[[float], float]]] = {
    ("add", 0): ("add_scalar", float),
    ("add", 1): ("add_scalar", float),
    ("sub", 0): ("rsub_scalar", float),
    ("sub", 1): ("add_scalar", lambda number: -number),
    ("mul", 0): ("mul_scalar", float),
    ("mul", 1): ("mul_scalar", float),
    ("div", 0): ("rdiv_scalar", float),
    ("div", 1): ("div_scalar", float),
    ("maximum", 0): ("clamp_min", float),
    ("maximum", 1): ("clamp_min", float),
    ("minimum", 0): ("clamp_max", float),
    ("minimum", 1): ("clamp_max", float),
    **{(name, 1): (f"{name}_scalar", float) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{
        (name, 0): (f"{turned}_scalar", float)
        for name, turned in (("gt", "lt"), ("ge", "le"), ("lt", "gt"), ("le", "ge"), ("eq", "eq"), ("ne", "ne"))
    },
}


#: Of these, the ones of whose number torch rounds only the result, beside 16 bits.
_UNROUNDED = ("mul_scalar", "div_scalar")

#: Instructions whose result is known where all operands are numbers.
_FOLDED: dict[str, Callable[..., torch.Tensor]] = {
    "copy": torch.clone,
    "neg": torch.neg,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}


class Emitter:
    """Writes down the instructions of one operation.

    Args:
        trace: gets the values that lie between instructions.
        numbers: of memories that hold one number throughout.
        made: the dtype of what the operation makes, or of what it compares.
        place: where the program called the operation.

    Attributes:
        dtype: in which the operation is computed.

    Raises:
        NotElementwise: the kernels do not compute in this dtype; from methods, they do not compute this.
    """

    def __init__(self, trace: Trace, numbers: Numbers, made: torch.dtype, place: str) -> None:
        self.trace = trace
        self.made = made
        self.dtype = torch.float32 if made in ROUNDED else made
        if self.dtype not in COMPUTED:
            leave_to_torch()
        self.elements: list[Element] = []
        self._numbers = numbers
        self._place = place

    def operand(self, argument: object, *, converts: bool = False) -> Operand:
        """An argument of an operation, if instructions can read it.

        Of other dtypes than what is made torch rounds operands first, unless the operation converts them itself.
        """
        if isinstance(argument, (bool, int, float)):
            return float(argument)
        if not isinstance(argument, Ref):
            leave_to_torch()
        value = self.trace.values[argument.value]
        exact = value.dtype in (self.made, torch.bool) or (value.dtype in ROUNDED and self.made == torch.float32)
        converted = value.dtype == torch.int64 or (
            value.dtype in (self.dtype, *ROUNDED) and self.dtype == torch.float32
        )
        if not exact and not (converted and (converts or self.made not in ROUNDED)):
            leave_to_torch()
        # Of more than one element the sizes may count.
        return self._number(argument) if math.prod(value.sizes) == 1 else argument

    def sizes(self, operand: Operand) -> tuple[int, ...]:
        """The sizes of an operand."""
        return self.trace.values[operand.value].sizes if isinstance(operand, Ref) else ()

    def emit(self, name: str, *operands: Operand, scalars: Sequence[float] = (), output: int | None = None) -> Operand:
        """Adds an instruction, and returns what it makes: a new value if none is given."""
        if output is not None:
            operands = tuple(map(self._number, operands))
        numbers = [place for place, operand in enumerate(operands) if not isinstance(operand, Ref)]
        if len(operands) == 2 and len(numbers) == 1 and (name, numbers[0]) in _WITH_NUMBER:
            name, number = _WITH_NUMBER[name, numbers[0]]
            scalars = [number(operand) for operand in operands if not isinstance(operand, Ref)]
            operands = (operands[1 - numbers[0]],)
            if output is not None and name not in _UNROUNDED:
                scalars = [self.as_made(scalar) for scalar in scalars]
            if name in ("mul_scalar", "div_scalar") and scalars == [1.0]:
                name, scalars = "copy", ()
        elif operands and len(numbers) == len(operands):
            operands, name = (self._folded(name, operands, output),), "copy"
        space = torch.broadcast_shapes(*(self.sizes(operand) for operand in operands))
        if output is None:
            output = self._new(space)
        space = self.trace.values[output].sizes
        self.elements.append(Element(name, operands, tuple(map(float, scalars)), output, space, self.dtype))
        return Ref(output)

    def part(self, whole: int, dim: int, start: int, stop: int | None) -> int:
        """A new value: a stretch of a dimension of another one, or an entry of it where there is no `stop`."""
        value = self.trace.values[whole]
        sizes, strides = list(value.sizes), list(value.strides)
        offset = value.offset + start * strides[dim]
        if stop is None:
            del sizes[dim], strides[dim]
        else:
            sizes[dim] = stop - start
        self.trace.values.append(Value(value.memory, value.dtype, tuple(sizes), tuple(strides), offset))
        return len(self.trace.values) - 1

    def new_like(self, value: int) -> int:
        """A new value of the sizes of another one."""
        return self._new(self.trace.values[value].sizes)

    def _folded(self, name: str, operands: Sequence[Operand], output: int | None) -> float:
        """The number that numbers make, which the output then holds."""
        if name not in _FOLDED or output is None:
            leave_to_torch()
        number = float(_FOLDED[name](*(torch.tensor(operand, dtype=self.dtype) for operand in operands)).item())
        number = self.as_made(number)
        value = self.trace.values[output]
        whole = math.prod(value.sizes) * value.dtype.itemsize == self.trace.memories[value.memory].bytes
        if whole and value.dtype == self.made and not self.trace.memories[value.memory].written:
            self._numbers[value.memory, value.dtype] = number
        return number

    def as_made(self, number: float) -> float:
        """A number as torch rounds it beside numbers of 16 bits, where it does."""
        return float(torch.tensor(number).to(self.made).item()) if self.made in ROUNDED else number

    def _number(self, operand: Operand) -> Operand:
        """An operand, or the number that it is throughout."""
        if not isinstance(operand, Ref):
            return operand
        value = self.trace.values[operand.value]
        return self._numbers.get((value.memory, value.dtype), operand)

    def clear(self, output: int) -> None:
        """Adds zeros, into parts of which something else is written then."""
        self.elements.append(Element("copy", (0.0,), (), output, self.trace.values[output].sizes, self.dtype))

    def reduce(
        self, operand: Operand, how: str, dims: Sequence[int] | None, output: int | None = None, scale: float = 1.0
    ) -> Operand:
        """Adds a reduction over dimensions, or over all of them where there are none."""
        if not isinstance(operand, Ref):
            leave_to_torch()
        space = self.sizes(operand)
        reduced = tuple(sorted(dim % len(space) for dim in dims)) if dims and space else tuple(range(len(space)))
        if output is None:
            output = self._new(tuple(size for dim, size in enumerate(space) if dim not in reduced))
        self.elements.append(Element("copy", (operand,), (), output, space, self.dtype, how, reduced, scale))
        return Ref(output)

    def kept(self, reduced: Operand, operand: Operand, dims: Sequence[int]) -> Operand:
        """What a reduction of an operand has made, with the dimensions that it has lost as ones of size 1."""
        if not isinstance(reduced, Ref):
            leave_to_torch()
        value, sizes = self.trace.values[reduced.value], list(self.sizes(operand))
        lost = {dim % len(sizes) for dim in dims}
        strides = iter(value.strides)
        lying = [(1, 0) if dim in lost else (size, next(strides)) for dim, size in enumerate(sizes)]
        self.trace.values.append(
            Value(value.memory, value.dtype, tuple(n for n, _ in lying), tuple(n for _, n in lying), value.offset)
        )
        return Ref(len(self.trace.values) - 1)

    def count(self, operand: Operand, dims: Sequence[int] | None = None) -> int:
        """How many elements a reduction makes one of."""
        sizes = self.sizes(operand)
        return math.prod(sizes[dim] for dim in dims) if dims and sizes else math.prod(sizes)

    def _new(self, sizes: Sequence[int]) -> int:
        self.trace.memories.append(Memory(("new",), math.prod(sizes) * self.dtype.itemsize, None, self._place))
        strides = tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
        self.trace.values.append(Value(len(self.trace.memories) - 1, self.dtype, tuple(sizes), strides, 0))
        return len(self.trace.values) - 1


#: Writes down the instructions of an operation: of its arguments, by name, and of the value that it writes.
Rule = Callable[[Emitter, dict[str, Any], int], None]
