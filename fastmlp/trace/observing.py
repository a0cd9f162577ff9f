"""Observes below torch's dispatcher what a forward does to tensors.

`recording.py` uses `Watch` to refuse what would happen only once. `comparison.py` uses `Log` to list the operations of
an execution, in such a form that two executions which do the same have equal lists.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

__all__ = ["Log", "Watch"]

#: torch.fx keeps lists and dictionaries in its graphs as these classes, and writes code that makes plain ones of them.
_MUTABLE: dict[type, type] = {immutable_list: list, immutable_dict: dict}


def _raise(reason: str) -> NoReturn:
    raise TraceError(reason)


class Watch(TorchDispatchMode):
    """Refuses what changes tensors that were there before, and random numbers.

    Args:
        refuse: what raises for a reason.
    """

    def __init__(self, refuse: Callable[[str], NoReturn] = _raise) -> None:
        super().__init__()
        self._refuse = refuse
        # Storages by their addresses: those that the execution has made, with a number, and others that it has read.
        # They are kept alive, so that no other storage gets the same address.
        self._made: dict[int, tuple[int, Any]] = {}
        self._there: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.begin(func, args, kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._refuse(f"it draws random numbers ({func}) that would be the same at every call")
        output = func(*args, **(kwargs or {}))
        self.keep(output)
        return output

    def begin(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Looks at the arguments of an operation before it is called."""
        if func is torch.ops.aten.lift_fresh.default:
            # torch.tensor has made this tensor of numbers, so it is new.
            self.keep(args)
        for tensor in tree_leaves((args, kwargs)):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in self._made:
                self._there.setdefault(storage._cdata, storage)
        self.check(func, args, kwargs)

    def keep(self, output: Any) -> None:
        """Takes note of the storages of new tensors."""
        for tensor in tree_leaves(output):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in self._there:
                self._made.setdefault(storage._cdata, (len(self._made), storage))

    def may_change(self, storage: Any) -> bool:
        """Whether the execution may write there."""
        return storage is None or storage._cdata in self._made

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises if the operation writes to a tensor that was there before."""
        schema = func._schema
        if not schema.is_mutable:
            return
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(value):
                    if not self.may_change(storage_of(tensor)):
                        self._refuse(
                            f"it changes a tensor that was there before the call, of shape {tuple(tensor.shape)}, in "
                            f"place ({func})"
                        )


class Log(Watch):
    """A list of the operations that were executed.

    Args:
        inputs: tensors of the arguments, which may be changed.
        known: tensors that are the same in every execution that is compared.
        changeable: tensors of these that the execution may write, such as statistics of `BatchNorm1d`.

    Attributes:
        entries: name and arguments of each operation; tensors by what made them, and where they lie in it.
    """

    def __init__(self, inputs: Iterable[Any], known: Iterable[Tensor], changeable: Iterable[Tensor]) -> None:
        super().__init__()
        self.entries: list[tuple[Any, ...]] = []
        self._there = {s._cdata: s for t in known if (s := storage_of(t)) is not None}
        self._known = dict(self._there)
        self._changeable = {s._cdata: s for t in changeable if (s := storage_of(t)) is not None}
        self.keep(list(inputs))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values, form = tree_flatten((args, kwargs))
        self.entries.append((str(func), str(form), *map(self.describe, values)))
        self.begin(func, args, kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        output = _without_moving(func, args, kwargs) if random else func(*args, **kwargs)
        self.keep(output)
        return output

    def may_change(self, storage: Any) -> bool:
        """Whether the execution may write there."""
        return super().may_change(storage) or storage._cdata in self._changeable

    def describe(self, value: Any) -> Any:
        """A value in a form that is equal for what is the same in another execution."""
        if isinstance(value, Tensor):
            return self._describe_tensor(value)
        if isinstance(value, torch.Generator):
            # Python's object for a generator is a new one at each call, but the generator behind it is the same.
            return value._cdata  # type: ignore[attr-defined]
        kind = _MUTABLE.get(type(value), type(value))
        if isinstance(value, (tuple, list)):
            return kind, tuple(map(self.describe, value))
        if isinstance(value, dict):
            return kind, tuple((key, self.describe(item)) for key, item in value.items())
        if is_dataclass(value) and not isinstance(value, type):
            return kind, tuple(self.describe(getattr(value, field.name)) for field in fields(value))
        return kind, repr(value)

    def _describe_tensor(self, tensor: Tensor) -> Any:
        storage = storage_of(tensor)
        form = (type(tensor), tensor.dtype, tensor.device, tuple(tensor.shape))
        if storage is None:
            return form
        place = (*form, tensor.stride(), tensor.storage_offset())
        if storage._cdata in self._made:
            return (*place, self._made[storage._cdata][0])
        if storage._cdata in self._known:
            return (*place, storage._cdata)
        # Python has made this tensor of numbers, so it is the same as another one that has the same numbers.
        return (*form, None if tensor.is_meta or tensor.is_quantized else _bytes(tensor))


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def storage_of(value: Any) -> Any:
    """That of a tensor which has one."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return value.untyped_storage()


def _without_moving(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls an operation that draws random numbers, and leaves the generators as they were."""
    generators = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=_devices()):
        output = func(*args, **kwargs)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return output


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
