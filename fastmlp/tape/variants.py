"""Variants of operators that write into given tensors: which one an operator has, and whether it can be relied on."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmlp.tape.trace import Operation, Ref, Value, refs

__all__ = ["out_variant", "writes_into_given"]

#: Arguments that say what a new tensor is like, which a given one knows.
_OPTIONS = frozenset({"dtype", "layout", "device", "pin_memory", "memory_format"})

#: Operators whose variant takes what it is given for scratch memory of another shape, and warns.
_RESIZING = frozenset({"aten::binary_cross_entropy"})
#: What trials have found out, by the operator, its numbers, and how its tensors lie.
_TRIED: dict[tuple[Any, ...], bool] = {}


def out_variant(func: Any) -> tuple[str, list[str]] | None:
    """The overload of an operator that writes into given tensors by a kernel of the CPU, and what it calls these."""
    schema = func._schema
    wanted = [(argument.name, str(argument.type)) for argument in schema.arguments]
    bare = [entry for entry in wanted if entry[0] not in _OPTIONS]
    for overload in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, overload)._schema
        outs = [argument.name for argument in other.arguments if argument.is_out]
        rest = [(argument.name, str(argument.type)) for argument in other.arguments if not argument.is_out]
        if not outs or rest not in (wanted, bare) or len(outs) != len(schema.returns):
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{other.name}.{other.overload_name}", "CPU"):
            return overload, outs
    return None


def writes_into_given(event: Operation, values: Sequence[Value]) -> bool:
    """Whether the operator's variant with `out` computes the same bits and leaves what it is given its shape.

    It is tried once for tensors that lie so: some variants take `out` for scratch memory, or are wrong where it is not
    contiguous.
    """
    func = event.func
    found = out_variant(func)
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    if found is None or None in event.outputs or drawn or func._schema.name in _RESIZING:
        return False
    used = [values[v] for v in (*refs((event.args, event.kwargs)), *(o for o in event.outputs if o is not None))]
    places = tuple((value.dtype, value.sizes, value.strides) for value in used)
    key = (str(func), *(v for v in event.args if isinstance(v, (int, float, str))), places)
    if key not in _TRIED:
        if len(_TRIED) > 4096:
            _TRIED.clear()
        _TRIED[key] = _try(event, values, *found)
    return _TRIED[key]


def _try(event: Operation, values: Sequence[Value], overload: str, names: Sequence[str]) -> bool:
    def numbers(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return _numbers(values[argument.value])
        if isinstance(argument, (tuple, list)):
            return type(argument)(map(numbers, argument))
        return argument

    other = getattr(event.func.overloadpacket, overload)
    known = {argument.name for argument in other._schema.arguments}
    outs = {
        name: _unwritten(values[output])
        for name, output in zip(names, event.outputs, strict=True)
        if output is not None
    }
    lying = [(out.data_ptr(), out.shape, out.stride()) for out in outs.values()]
    kwargs = {key: value for key, value in event.kwargs.items() if key in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = event.func(*map(numbers, event.args), **{k: numbers(v) for k, v in event.kwargs.items()})
            other(*map(numbers, event.args), **{k: numbers(v) for k, v in kwargs.items()}, **outs)
        except (RuntimeError, IndexError, ValueError):
            return False  # the trial's numbers are none for this operator, which is called as it was
    expected = expected if isinstance(expected, (tuple, list)) else (expected,)
    same = all(map(_same_bits, expected, outs.values()))
    return same and lying == [(out.data_ptr(), out.shape, out.stride()) for out in outs.values()]


def _numbers(value: Value) -> Tensor:
    """Fractions between 0 and 1, or zeros where the dtype has none, in a tensor that lies like the value."""
    extent = sum((size - 1) * stride for size, stride in zip(value.sizes, value.strides, strict=True)) + 1
    base = torch.linspace(0.1, 0.9, max(extent, 1), dtype=torch.float64).to(value.dtype)
    return base.as_strided(value.sizes, value.strides)


def _unwritten(value: Value) -> Tensor:
    """A tensor that lies like the value, and holds what no operator makes of the trial's numbers."""
    return _numbers(value).fill_(torch.nan if value.dtype.is_floating_point else 119)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
