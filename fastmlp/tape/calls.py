"""How a replay calls operators of torch: which of them stands for a recorded one, and where it writes.

An operation that returns new tensors is called by its variant that writes into given ones, where the CPU has a kernel
for that. Random numbers are drawn in place. Everything else is called as it was.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmlp._load import _C
from fastmlp.tape.trace import Operation, Ref
from fastmlp.tape.variants import out_variant, writes_into_given

if TYPE_CHECKING:
    from fastmlp.tape.lower import Lowered

__all__ = ["PRIMS", "Calls"]

#: Copies: what they return is their first argument, perhaps of another dtype.
_COPIES = frozenset({"aten::clone", "aten::_to_copy", "aten::contiguous"})
#: Operations that draw new tensors: the operation that draws in place, and its arguments.
_DRAWN = {
    "aten::rand": ("aten::uniform_", (0.0, 1.0)),
    "aten::rand_like": ("aten::uniform_", (0.0, 1.0)),
    "aten::randn": ("aten::normal_", (0.0, 1.0)),
    "aten::randn_like": ("aten::normal_", (0.0, 1.0)),
}
#: Operators that torch computes by another one: the other one's name, its overload that writes into a given tensor, and
#: its arguments. With more arguments, such as alpha, they are called as they were.
_AS_OTHERS: dict[str, tuple[str, str, Callable[..., tuple[Any, ...]]]] = {
    "aten::sum.": ("aten::sum", "IntList_out", lambda x: (x, [], False)),
    "aten::mean.": ("aten::mean", "out", lambda x: (x, [], False)),
    "aten::relu.": ("aten::clamp_min", "out", lambda x: (x, 0)),
    "aten::add.Scalar": ("aten::add", "out", lambda x, y: (x, y)),
    "aten::sub.Scalar": ("aten::sub", "out", lambda x, y: (x, y)),
    "aten::mul.Scalar": ("aten::mul", "out", lambda x, y: (x, y)),
    "aten::div.Scalar": ("aten::div", "out", lambda x, y: (x, y)),
    "aten::rsub.Scalar": ("aten::sub", "out", lambda x, y: (y, x)),
    "aten::rsub.Tensor": ("aten::sub", "out", lambda x, y: (y, x)),
    "aten::stack.": ("aten::stack", "out", lambda tensors, dim=0: (tensors, dim)),
}
#: Elementwise operators that torch computes in Python, where one of its tensors of zeros has no memory.
PRIMS = {f"prims::{name}": (f"aten::{name}", "out") for name in ("add", "sub", "mul", "div")}
#: Operators on lists that torch's kernels for the CPU apply to one tensor after the other: the operator of one tensor,
#: its overload, and what stands behind the tensor.
_ONE_BY_ONE: dict[str, tuple[str, str, Callable[..., tuple[Any, ...]]]] = {
    "aten::_foreach_norm.Scalar": ("aten::linalg_vector_norm", "out", lambda order=2.0: (order, [], False)),
    "aten::_foreach_mul_.Tensor": ("aten::mul_", "Tensor", lambda factor: (factor,)),
    "aten::_foreach_mul_.Scalar": ("aten::mul_", "Tensor", lambda factor: (factor,)),
    "aten::_foreach_clamp_min_.Scalar": ("aten::clamp_min_", "", lambda least: (least,)),
    "aten::_foreach_clamp_max_.Scalar": ("aten::clamp_max_", "", lambda most: (most,)),
    "aten::_foreach_zero_.": ("aten::zero_", "", lambda: ()),
}
#: Losses whose variant with `out` would take it for the losses of single elements too. They are computed in two steps,
#: as torch's kernels do: elements, then their mean (1) or sum (2).
_LOSSES = frozenset({"aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss"})


class Calls:
    """Adds calls to the tape that `lower.py` makes."""

    def __init__(self, to: "Lowered") -> None:
        self._to = to

    def add(
        self, name: str, overload: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[int], place: str
    ) -> None:
        """A call of an operator. `results`: the tape's numbers of the new tensors that it returns."""
        schema = torch._C._get_schema(name, overload)
        args = tuple(_as_tensor(argument, entry) for argument, entry in zip(args, schema.arguments, strict=False))
        self._to.tape.add_call(name, overload, args, kwargs, results, place)

    def operation(self, event: Operation, new: bool) -> None:
        """The call of a recorded operation. `new`: whether it makes new memory."""
        schema = event.func._schema
        name, overload = schema.name, schema.overload_name
        args, kwargs = self._to.bound(event.args), self._to.bound(event.kwargs)
        if f"{name}.{overload}" in _ONE_BY_ONE and not kwargs:
            self._one_by_one(event, *_ONE_BY_ONE[f"{name}.{overload}"])
            return
        if not new or schema.is_mutable:
            results = self._new_results(event) if new else []
            self.add(name, overload, args, kwargs, results, event.place)
            return
        outputs = [output for output in event.outputs if output is not None]
        targets = [self._to.tape.tensor(self._to.number(output)) for output in outputs]
        if name in _DRAWN and overload in ("", "generator"):
            drawn, numbers = _DRAWN[name]
            self.add(drawn, "", (targets[0], *numbers), _generator(kwargs), [], event.place)
        elif name in _LOSSES:
            self._loss(event, args, self._to.bound(Ref(outputs[0])))
        elif name in _COPIES:
            self.add("aten::copy_", "", (targets[0], args[0]), {}, [], event.place)
        elif name in PRIMS:
            self.add(*PRIMS[name], args, {"out": targets[0]}, [], event.place)
        elif other := _as_other(event):
            self.add(other[0], other[1], other[2](*args), dict(kwargs, out=targets[0]), [], event.place)
        elif writes_into_given(event, self._to.trace.values):
            overload, names = out_variant(event.func) or ("", [])
            schema = torch._C._get_schema(name, overload)
            known = {argument.name for argument in schema.arguments}
            kept = {key: value for key, value in kwargs.items() if key in known}
            kept |= dict(zip(names, targets, strict=True))
            self.add(name, overload, args, kept, [], event.place)
        else:
            self.add(name, overload, args, kwargs, self._new_results(event), event.place)

    def _one_by_one(self, event: Operation, name: str, overload: str, rest: Callable[..., tuple[Any, ...]]) -> None:
        first, *others = self._to.bound(event.args)
        outputs = [self._to.bound(Ref(output)) for output in event.outputs if output is not None]
        for tensor, output in zip(first, outputs or first, strict=True):
            kwargs = {"out": output} if outputs and output is not tensor else {}
            self.add(name, overload, (tensor, *rest(*others)), kwargs, [], event.place)

    def _loss(self, event: Operation, args: tuple[Any, ...], target: Tensor) -> None:
        name, place = event.func._schema.name, event.place
        reduction = args[2] if len(args) > 2 else 1
        rest = args[3:]
        if reduction == 0:
            self.add(name, "out", (*args[:2], 0, *rest), {"out": target}, [], place)
            return
        # The order in which torch adds them follows from how they lie.
        elements = self._to.scratch(event.func(*(argument.to("meta") for argument in args[:2]), 0, *rest))
        self.add(name, "out", (*args[:2], 0, *rest), {"out": elements}, [], place)
        self._to.advance()
        self._to.use(*self._to.trace.refs(event))
        reduced = ("aten::mean", "out") if reduction == 1 else ("aten::sum", "IntList_out")
        self.add(*reduced, (elements, [], False), {"out": target}, [], place)

    def writes_given(self, event: Operation) -> bool:
        """Whether a replay of the operation writes into the tensor that it is given for its result."""
        name = event.func._schema.name
        other = name in PRIMS or _as_other(event) is not None
        return other or (name not in _LOSSES | _COPIES and writes_into_given(event, self._to.trace.values))

    def _new_results(self, event: Operation) -> list[int]:
        return [-1 if output is None else self._to.number(output) for output in event.outputs]


def _as_other(event: Operation) -> tuple[str, str, Callable[..., tuple[Any, ...]]] | None:
    """The operator by which torch computes this one."""
    other = _AS_OTHERS.get(f"{event.func._schema.name}.{event.func._schema.overload_name}")
    return None if other is None or len(event.args) > other[2].__code__.co_argcount else other


def _generator(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"generator": kwargs["generator"]} if "generator" in kwargs else {}


def _as_tensor(argument: Any, entry: Any) -> Any:
    """A number where an operator takes a tensor, as the dispatcher would have it."""
    number = isinstance(argument, (bool, int, float, complex)) and str(entry.type) in ("Tensor", "Optional[Tensor]")
    return _C.wrapped_number(argument) if number else argument
