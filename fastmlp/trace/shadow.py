"""A copy of a model on which its forward may be executed, so that nothing of the model itself is written.

Private: `recording.py` executes a forward on such a copy, and asks it afterwards what the forward has written.
"""

import pickle
import random
import sys
import threading
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from logging import Logger
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

__all__ = ["Scripted", "Shadow", "is_array", "untouched_generators"]

#: What a model is not searched for deeper than: attributes of objects in attributes of objects.
_DEPTH = 3

#: Values that are the same if they are equal.
_VALUES = (int, float, complex, str, bytes, torch.Size)

#: Attributes that torch.fx puts on the root for constants.
_CONSTANTS = ("_tensor_constant", "_torchbind_obj", "_tree_spec_constant", "_opaque_obj")

#: Instances of classes that were defined in Python.
_HEAP_TYPE = 1 << 9


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


class _Written(NamedTuple):
    """Something that a forward might write: where it is, and a way to see what it holds."""

    path: str
    content: Callable[[], Any]
    before: Any
    restore: Callable[[Any], None] | None


class Shadow:
    """A copy of all modules of a model, with the classes, attributes and methods of the originals.

    Parameters are shared. Buffers are copied, since layers such as `BatchNorm1d` write them; so are the lists,
    dictionaries, sets and arrays that modules hold. Other objects of Python are shared and watched, and so is what
    their classes hold; `globals` adds what functions use of their modules of Python.

    Args:
        model: of which nothing is written.
        training: the mode of all modules of the copy; None for that of each original.
    """

    def __init__(self, model: nn.Module, training: bool | None = None) -> None:
        self._training = training
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # alive, so that their ids are theirs
        self._written: list[_Written] = []
        self._paths: dict[nn.Module, str] = {}
        self._globals: set[tuple[int, str]] = set()
        self._packages: set[str] = set()
        self.root: nn.Module = self._module(model, "")

    @property
    def modules(self) -> dict[nn.Module, str]:
        """The copies of all modules, also of those in plain lists, and where they are."""
        return self._paths

    def intercept(self, call: Callable[..., Any]) -> None:
        """Makes `call(module, *args, **kwargs)` what a call of each module does, in place of forward and hooks."""
        for module in self._paths:
            # torch.nn.Module.__call__ looks for this first, whatever the class is.
            module.__dict__["_compiled_call_impl"] = partial(call, module)

    def changes(self) -> list[str]:
        """Names of what was written since the copy was made; objects that are shared are put back."""
        found = []
        for path, content, before, restore in self._written:
            names = list(_differences(path, before, content()))
            if names and restore is not None:
                restore(before)
            found += names
        return list(dict.fromkeys(found))

    def _watch(self, path: str, content: Callable[[], Any], restore: Callable[[Any], None] | None = None) -> None:
        self._written.append(_Written(path, content, content(), restore))

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
            # The dictionaries of modules hold what is found under the module's own name.
            if name == "_buffers":
                attributes[name] = {key: self._buffer(buffer) for key, buffer in value.items()}
            else:
                attributes[name] = self._copy(value, path if name in ("_modules", "_parameters") else _join(path, name))
        if self._training is not None:
            attributes["training"] = self._training
        attributes["_compiled_call_impl"] = None
        self._paths[made] = path
        self._classes(module)
        self._watch(path, lambda: _attributes(attributes))
        self._watch(path, lambda: dict(attributes.get("_buffers", ())))
        return made

    def _buffer(self, buffer: Any) -> Any:
        if not isinstance(buffer, Tensor):
            return buffer
        if id(buffer) not in self._copies:
            self._known(buffer, buffer.detach().clone())
        return self._copies[id(buffer)]

    def _copy(self, value: Any, path: str, depth: int = 0) -> Any:
        kind = type(value)
        if isinstance(value, Tensor) or kind in _VALUES or isinstance(value, type):
            return self._copies.get(id(value), value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if kind is MethodType:
            # A method of a module, kept as an attribute, belongs to the copy.
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
                made[key] = self._copy(item, _join(path, key) if isinstance(key, str) else f"{path}[{key!r}]", depth)
            self._watch(path, lambda: dict(made))
        elif type(value) in (list, deque):
            made = self._known(value, value.copy())
            for i, item in enumerate(value):
                made[i] = self._copy(item, f"{path}[{i}]", depth)
            self._watch(path, lambda: list(made))
        elif type(value) is set:
            made = self._known(value, {self._copy(item, path, depth) for item in value})
            self._watch(path, lambda: set(made))
        elif (generator := _generator(value)) is not None:
            get, put = generator
            made = self._known(value, value)
            self._watch(path, lambda: pickle.dumps(get()), lambda before: put(pickle.loads(before)))
        elif is_array(value):
            made = self._known(value, value.copy())
            self._watch(path, lambda: made.tobytes())
        elif type(value) is count:
            made = self._known(value, count(*value.__reduce__()[1]))
            self._watch(path, lambda: repr(made))
        else:
            made = value
            self._share(value, path, depth)
        return made

    def _share(self, value: Any, path: str, depth: int) -> None:
        """Watches what is not copied, as far as it can be put back."""
        held = _contents(value)
        if held is not None:
            self._known(value, value)
            self._watch(path, *held)
        elif isinstance(value, FunctionType):
            self._known(value, value)
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                self._watch(_join(path, name), partial(_cell, cell), partial(_refill_cell, cell))
                for item in _cell(cell):
                    self._share_once(item, _join(path, name), depth)
            for item in value.__defaults__ or ():
                self._share_once(item, path, depth)
        elif _is_plain(value) and depth < _DEPTH:
            self._known(value, value)
            self._observe(value, path, depth + 1)

    def _share_once(self, value: Any, path: str, depth: int) -> None:
        # Modules are executed as copies only where other modules hold them.
        if id(value) not in self._copies and not isinstance(value, (nn.Module, Tensor, type)):
            self._share(value, path, depth)

    def globals(self, names: tuple[str, ...], held: dict[str, Any]) -> None:
        """Watches the global variables of these names, which a function is about to use.

        Not those of packages that have none of the model's classes: they keep what they have found out, such as the
        kinds of tensors, which decides nothing.
        """
        package = str(held.get("__name__", "")).split(".")[0]
        if "site-packages" in str(held.get("__file__", "")) and package not in self._packages:
            return
        for name in names:
            if name not in held or (id(held), name) in self._globals:
                continue
            value, path = held[name], f"the global {name}"
            self._globals.add((id(held), name))
            if callable(value) or isinstance(value, ModuleType):
                continue
            self._watch(path, partial(_binding, held, name), partial(_bind, held, name))
            if _contents(value) is not None or type(value) is SimpleNamespace:
                self._share_once(value, path, _DEPTH - 1)
            elif is_array(value):
                self._watch(path, value.tobytes, partial(_refill_array, value, value.copy()))

    def _classes(self, module: nn.Module) -> None:
        """Watches what the classes of a module hold, which its forward may write too."""
        for kind in type(module).__mro__:
            if id(kind) in self._copies or kind.__module__.split(".")[0] in ("torch", "fastmlp", "builtins"):
                continue
            self._known(kind, kind)
            self._packages.add(kind.__module__.split(".")[0])
            self._watch(kind.__name__, partial(_class_attributes, kind), partial(_restore_class, kind))
            for name, item in _class_attributes(kind).items():
                if _contents(item) is not None or _is_plain(item):
                    self._share_once(item, _join(kind.__name__, name), _DEPTH - 1)

    def _observe(self, value: Any, path: str, depth: int) -> None:
        """Watches an object that is shared: a copy of it might do what only one of its kind may."""
        slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
        if slots:
            self._watch(path, partial(_slotted, value, slots), partial(_restore_slots, value, slots))
        attributes = getattr(value, "__dict__", {})
        self._watch(path, lambda: dict(attributes), partial(_update, attributes))
        for name, item in {**_slotted(value, slots), **attributes}.items():
            if id(item) not in self._copies and (_contents(item) is not None or _is_plain(item)):
                self._share_once(item, _join(path, name), depth)


def _contents(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None]] | None:
    """How to read and write what a container holds, if the value is one, of whatever subclass."""
    if isinstance(value, dict):
        return partial(dict.copy, value), partial(_update, value)
    if isinstance(value, set):
        return partial(set.copy, value), partial(_refill_set, value)
    if isinstance(value, (list, deque)):
        return partial(list, value), partial(_refill, value)
    if isinstance(value, (bytearray, array)):
        return lambda: value[:], partial(_overwrite, value)
    return None


def _overwrite(items: Any, before: Any) -> None:
    items[:] = before


def _refill_array(array: Any, values: Any, _: bytes) -> None:
    array[...] = values


def _refill(items: Any, before: list[Any]) -> None:
    items.clear()
    items.extend(before)


def _refill_set(items: set[Any], before: set[Any]) -> None:
    items.clear()
    items.update(before)


def _update(items: dict[Any, Any], before: dict[Any, Any]) -> None:
    items.clear()
    for key, value in before.items():
        items[key] = value


def _cell(cell: Any) -> list[Any]:
    """What a variable of a closure holds; nothing before it is assigned."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _refill_cell(cell: Any, before: list[Any]) -> None:
    del cell.cell_contents
    for value in before:
        cell.cell_contents = value


def _binding(held: dict[str, Any], name: str) -> list[Any]:
    return [held[name]] if name in held else []


def _bind(held: dict[str, Any], name: str, before: list[Any]) -> None:
    held[name] = before[0]


def _class_attributes(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not (name.startswith("__") and name.endswith("__"))}


def _restore_class(kind: type, before: dict[str, Any]) -> None:
    for name, value in _class_attributes(kind).items():
        if name not in before:
            delattr(kind, name)
        elif value is not before[name]:
            setattr(kind, name, before[name])
    for name in before.keys() - _class_attributes(kind).keys():
        setattr(kind, name, before[name])


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _slotted(value: Any, names: list[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names if name != "__dict__" and hasattr(value, name)}


def _restore_slots(value: Any, names: list[str], before: dict[str, Any]) -> None:
    for name in _slotted(value, names).keys() - before.keys():
        delattr(value, name)
    for name, held in before.items():
        object.__setattr__(value, name, held)


def _attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Of a module, without those that recording puts there, and those that are watched by themselves."""
    apart = ("_modules", "_parameters", "_buffers", "_compiled_call_impl")
    return {k: v for k, v in attributes.items() if k not in apart and not k.startswith(_CONSTANTS)}


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class of Python's, with attributes or slots and nothing else."""
    holds = hasattr(value, "__dict__") or any(map(_slots, type(value).__mro__))
    known = (object, SimpleNamespace)
    if isinstance(value, Logger):
        # It keeps what it has found out about its levels, which decides nothing.
        return False
    return holds and all(base in known or base.__flags__ & _HEAP_TYPE for base in type(value).__mro__)


def is_array(value: Any) -> bool:
    """Whether it is an array of numpy, if that was imported."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to read and write the state of a generator of random numbers, if the value is one."""
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, torch.Generator):
        # As bytes: a pickle of a tensor names its memory, which is another one each time.
        return lambda: value.get_state().numpy().tobytes(), partial(_set_state, value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return value.get_state, value.set_state
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, partial(setattr, bits, "state")
    return None


def _set_state(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _differences(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict):
        for key in {**before, **after}:
            if key not in before or key not in after or not _same(before[key], after[key]):
                yield _join(path, key) if isinstance(key, str) else f"{path}[{key!r}]"
    elif isinstance(before, list):
        if len(before) != len(after) or not all(map(_same, before, after)):
            yield path
    elif before != after:
        yield path


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _VALUES) and a == b)


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
        if threading.active_count() > 1:
            # Draws and seeds of this thread are refused as they happen; only numpy's cannot be seen.
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
