"""Copies a model, so that its forward can be executed without writing anything of the model itself.

`recording.py` executes a forward on such a copy, and asks the copy afterwards what the forward has written.
"""

import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from fastmlp.trace.written import VALUES, Written, is_array, joined

__all__ = ["Scripted", "Shadow", "untouched_generators"]

#: The beginnings of the names under which torch.fx puts constants on the root.
_CONSTANTS = ("_tensor_constant", "_torchbind_obj", "_tree_spec_constant", "_opaque_obj")


class Scripted(nn.Module):
    """Stands in for a module of torch.jit in a copy: such a module cannot be copied, only called."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self.__dict__["original"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class Shadow(Written):
    """A copy of all modules of a model, with the classes, attributes and methods of the originals.

    Parameters are shared. Buffers are copied, since layers such as `BatchNorm1d` write them; so are the lists,
    dictionaries, sets and arrays that modules hold. Other objects of Python are shared and observed.

    Args:
        model: of which nothing is written.
        training: the mode of all modules of the copy; None for that of each original.
    """

    def __init__(self, model: nn.Module, training: bool | None = None) -> None:
        super().__init__()
        self._training = training
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # alive, so that their ids are theirs
        self._paths: dict[nn.Module, str] = {}
        self.root: nn.Module = self._module(model, "")

    @property
    def modules(self) -> dict[nn.Module, str]:
        """The copies of all modules, also of those in plain lists, and where they are."""
        return self._paths

    def intercept(self, call: Callable[..., Any]) -> None:
        """Makes `call(module, *args, **kwargs)` what a call of each module does, in place of forward and hooks."""
        for module in self._paths:
            # torch.nn.Module.__call__ calls this attribute if there is one, whatever the class of the module.
            module.__dict__["_compiled_call_impl"] = partial(call, module)

    def _known(self, original: Any, made: Any) -> Any:
        self._copies[id(original)] = made
        self._originals.append(original)
        return made

    def _module(self, module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            made: nn.Module = self._known(module, Scripted(module))
            self._paths[made] = path
            return made
        made = self._known(module, object.__new__(type(module)))
        attributes = made.__dict__
        for name, value in list(module.__dict__.items()):
            # What is in these dictionaries is an attribute of the module for its users, so their names are left out.
            if name == "_buffers":
                attributes[name] = {key: self._buffer(buffer) for key, buffer in value.items()}
            else:
                attributes[name] = self._copy(
                    value, path if name in ("_modules", "_parameters") else joined(path, name)
                )
        if self._training is not None:
            attributes["training"] = self._training
        attributes["_compiled_call_impl"] = None
        self._paths[made] = path
        self.watch(path, lambda: _attributes(attributes))
        self.watch(path, lambda: dict(attributes.get("_buffers", ())))
        return made

    def _buffer(self, buffer: Any) -> Any:
        if not isinstance(buffer, Tensor):
            return buffer
        if id(buffer) not in self._copies:
            self._known(buffer, buffer.detach().clone())
        return self._copies[id(buffer)]

    def _copy(self, value: Any, path: str, depth: int = 0) -> Any:
        kind = type(value)
        if isinstance(value, Tensor) or kind in VALUES or isinstance(value, type):
            return self._copies.get(id(value), value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if kind is MethodType:
            # A bound method that is kept as an attribute must be bound to the copy of its module.
            owner = self._copy(value.__self__, path, depth)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if kind is partial:
            return partial(
                self._copy(value.func, path, depth),
                *self._copy(value.args, path, depth),
                **self._copy(value.keywords, path, depth),
            )
        if isinstance(value, tuple):
            items = [self._copy(item, f"{path}[{i}]", depth) for i, item in enumerate(value)]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return kind._make(items) if hasattr(kind, "_make") else kind(items)
        return self._container(value, path, depth)

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if type(value) in (dict, OrderedDict, defaultdict):
            made = self._known(value, value.copy())
            for key, item in value.items():
                made[key] = self._copy(item, joined(path, key) if isinstance(key, str) else f"{path}[{key!r}]", depth)
            self.watch(path, lambda: dict(made))
        elif type(value) in (list, deque):
            made = self._known(value, value.copy())
            for i, item in enumerate(value):
                made[i] = self._copy(item, f"{path}[{i}]", depth)
            self.watch(path, lambda: list(made))
        elif type(value) is set:
            made = self._known(value, {self._copy(item, path, depth) for item in value})
            self.watch(path, lambda: set(made))
        elif is_array(value):
            made = self._known(value, value.copy())
            self.watch(path, lambda: made.tobytes())
        elif type(value) is count:
            made = self._known(value, count(*value.__reduce__()[1]))
            self.watch(path, lambda: repr(made))
        else:
            made = value
            self.observe(value, path, depth)
        return made


def _attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Of a module, without those that recording puts there, and those that are watched by themselves."""
    apart = ("_modules", "_parameters", "_buffers", "_compiled_call_impl")
    return {k: v for k, v in attributes.items() if k not in apart and not k.startswith(_CONSTANTS)}


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Puts the generators of random numbers back, and refuses what has moved one.

    They belong to the process: while other threads run, nobody can say who has moved one.

    Raises:
        TraceError: if one of them has moved, unless something else was raised.
    """
    before = _states()
    failed = True
    try:
        yield
        failed = False
    finally:
        after = _states()
        if threading.active_count() > 1 and sys.getprofile() is None:
            # This thread's draws and seeds are refused as they happen, so only numpy's, which cannot be seen, are
            # compared here. Where somebody else profiles this thread, none of them is seen, so all are compared.
            after = {name: after[name] if name == "numpy.random" else state for name, state in before.items()}
        moved = [name for name, (state, _) in before.items() if _text(after[name][0]) != _text(state)]
        for name in moved:
            state, restore = before[name]
            restore(state)
        if moved and not failed:
            raise TraceError(
                f"it draws random numbers, or seeds a generator, in a way that would happen only once: the state of "
                f"{', '.join(moved)} is another one after it was executed (if no other thread has moved it). Random "
                "numbers of torch's functions, such as torch.randn, can be recorded"
            )


def _states() -> dict[str, tuple[Any, Callable[[Any], None]]]:
    found: dict[str, tuple[Any, Callable[[Any], None]]] = {
        "random": (random.getstate(), random.setstate),
        "torch.default_generator": (torch.get_rng_state(), torch.set_rng_state),
    }
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        found["numpy.random"] = (numpy_random.get_state(), numpy_random.set_state)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            found[f"cuda:{i}"] = (torch.cuda.get_rng_state(i), partial(_set_cuda, i))
    return found


def _set_cuda(device: int, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device)


def _text(state: Any) -> Any:
    """A state as something that can be compared."""
    if isinstance(state, Tensor):
        return state.numpy().tobytes()
    return tuple(part.tobytes() if is_array(part) else part for part in state)
