"""What a recorder asks about an operator at each of its calls, found out once, because schemas are slow to read."""

from dataclasses import dataclass
from typing import Any

import torch

from fastmlp.tape.calls import PRIMS

__all__ = ["Operator", "operator_of"]

aten = torch.ops.aten

#: Operations that return something else than tensors, but nothing of their elements.
_HARMLESS = frozenset({"aten::is_same_size", "aten::sym_size", "aten::sym_numel", "aten::sym_stride"})
_MOVES_MEMORY = frozenset({"aten::resize_", "aten::resize_as_", "aten::set_", "aten::as_strided_"})


@dataclass(slots=True)
class Operator:
    """Facts of an operator.

    Attributes:
        func: the operator.
        refusal: why a tape cannot call it, whatever its arguments are.
        by_data: whether the data decide the shape of what it returns, at least for some arguments.
        is_note: whether it only tells a profiler something.
        is_harmless: whether what it returns to Python does not depend on data.
        reshapes: whether it gives a tensor another shape in place.
    """

    func: Any
    refusal: str | None
    by_data: bool = False
    is_note: bool = False
    is_harmless: bool = False
    reshapes: bool = False

    def refuses(self, args: tuple[Any, ...]) -> str | None:
        """Why a tape cannot call it with these arguments."""
        if self.by_data and (
            self.func is not aten.index.Tensor
            or any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        ):
            return (
                f"{self.func} returns as many elements as the data say: use torch.where, or multiply by the mask, "
                "which keep the shape"
            )
        return self.refusal


#: By the identity of operators, which are kept alive. It is quicker than their hashes.
_KNOWN: dict[int, Operator] = {}


def operator_of(func: Any) -> Operator:
    """The facts of what a dispatch mode is called with."""
    known = _KNOWN.get(id(func))
    if known is None:
        known = _KNOWN[id(func)] = _found_out(func)
    return known


def _found_out(func: Any) -> Operator:
    if not isinstance(func, torch._ops.OpOverload):
        return Operator(
            func,
            f"{func} runs code of Python: use other operations of torch, such as torch.where for a choice",
            is_note=getattr(func, "namespace", "") == "profiler",
        )
    name = func._schema.name
    refusal = None
    if func.namespace == "prims" and name not in PRIMS:
        refusal = f"{func} is computed by code of Python: use torch's own function instead, such as torch.sin"
    elif name in _MOVES_MEMORY:
        refusal = f"{func} puts other memory into a tensor: make a new tensor"
    return Operator(
        func,
        refusal,
        by_data=torch.Tag.dynamic_output_shape in func.tags,
        is_note=func.namespace == "profiler",
        is_harmless=name in _HARMLESS,
        reshapes=torch.Tag.inplace_view in func.tags,
    )
