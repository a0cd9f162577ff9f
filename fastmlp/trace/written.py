"""Watches objects of Python that a forward might write: remembers what they hold, compares, and puts it back.

`shadow.py` watches what a model holds, and `outside.py` what the model's functions reach besides it.
"""

import pickle
import random
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import MemberDescriptorType, SimpleNamespace
from typing import Any, NamedTuple

import torch

__all__ = ["ITEMS", "VALUES", "Written", "is_array", "joined"]

#: How many levels of objects in attributes of objects are searched.
_DEPTH = 3

#: Longer containers are not searched, and arrays of more bytes are not compared.
ITEMS, _BYTES = 1000, 1 << 20

#: Classes whose values are the same if they are equal; of others the object must be the same.
VALUES = (int, float, complex, str, bytes, torch.Size)

#: The flag of classes that were defined in Python (Py_TPFLAGS_HEAPTYPE).
_HEAP_TYPE = 1 << 9

#: Modules of Python whose objects are not watched, because they change when they are asked something: a logger
#: remembers which levels are enabled.
_BOOKKEEPING = ("logging", "threading", "weakref")


class _Entry(NamedTuple):
    """Something that a forward might write: where it is, and a way to see what it holds."""

    path: str
    content: Callable[[], Any]
    before: Any
    restore: Callable[[Any], None] | None


class Written:
    """A list of such things."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._observed: dict[int, Any] = {}  # alive, so that their ids are theirs

    def watch(self, path: str, content: Callable[[], Any], restore: Callable[[Any], None] | None = None) -> None:
        """Remembers what something holds now.

        Args:
            path: what it is called.
            content: gives what it holds, as a dictionary, a list, or a value that can be compared.
            restore: puts back what it held; None for what nobody else sees.
        """
        self._entries.append(_Entry(path, content, content(), restore))

    def changes(self) -> list[str]:
        """Names of what was written since; what is shared is put back."""
        found = []
        for path, content, before, restore in self._entries:
            names = list(_differences(path, before, content()))
            if names and restore is not None:
                restore(before)
            found += names
        return list(dict.fromkeys(found))

    def observe(self, value: Any, path: str, depth: int = 0) -> None:
        """Watches an object that is shared, if it is of a kind that can be, and what it holds.

        A copy of it might do what only one of its kind may.
        """
        if id(value) in self._observed or depth > _DEPTH:
            return
        self._observed[id(value)] = value
        inner: dict[str, Any] = {}
        if (generator := _generator(value)) is not None:
            get, put = generator
            self.watch(path, lambda: pickle.dumps(get()), lambda before: put(pickle.loads(before)))
        elif is_array(value):
            if value.nbytes <= _BYTES:
                kept = value.copy()
                self.watch(path, value.tobytes, lambda _: value.__setitem__(..., kept))
        elif isinstance(value, dict):
            self.watch(path, lambda: dict(value), partial(_update, value))
            inner = {joined(path, k) if isinstance(k, str) else f"{path}[{k!r}]": v for k, v in _few(value.items())}
        elif isinstance(value, (list, deque)):
            self.watch(path, lambda: list(value), partial(_refill, value))
            inner = {f"{path}[{i}]": item for i, item in enumerate(_few(value))}
        elif isinstance(value, tuple):
            inner = {f"{path}[{i}]": item for i, item in enumerate(_few(value))}
        elif isinstance(value, set):
            self.watch(path, lambda: set(value), partial(_update, value))
        elif isinstance(value, array):
            self.watch(path, value.tolist, lambda before: value.__setitem__(slice(None), array(value.typecode, before)))
        elif isinstance(value, bytearray):
            self.watch(path, lambda: bytes(value), partial(_refill, value))
        elif _is_plain(value):
            self.watch(path, lambda: _attributes(value), partial(_set_attributes, value))
            inner = {joined(path, name): item for name, item in _attributes(value).items()}
        for name, item in inner.items():
            self.observe(item, name, depth + 1)


def _few(items: Any) -> list[Any]:
    return list(items) if len(items) <= ITEMS else []


def _refill(items: Any, before: Any) -> None:
    items.clear()
    items.extend(before)


def _update(items: Any, before: Any) -> None:
    items.clear()
    items.update(before)


def _attributes(value: Any) -> dict[str, Any]:
    """Those in the dictionary of an object, and in its slots."""
    members = [pair for kind in type(value).__mro__ for pair in vars(kind).items()]
    slots = [name for name, member in members if type(member) is MemberDescriptorType and name != "__dict__"]
    return {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _set_attributes(value: Any, before: dict[str, Any]) -> None:
    for name in _attributes(value).keys() - before.keys():
        object.__delattr__(value, name)
    for name, item in before.items():
        object.__setattr__(value, name, item)


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class of Python's, with attributes and nothing else."""
    kind = type(value)
    if kind.__module__.partition(".")[0] in _BOOKKEEPING or isinstance(value, type):
        return False
    return kind is SimpleNamespace or all(base is object or base.__flags__ & _HEAP_TYPE for base in kind.__mro__)


def is_array(value: Any) -> bool:
    """Whether it is an array of numpy, if that was imported."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to read and write the state of a generator of random numbers, if the value is one."""
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, torch.Generator):
        # The state is taken as bytes, because a pickle of the tensor would name its memory, which differs each time.
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


def joined(path: str, name: str) -> str:
    """The name of something in something."""
    return f"{path}.{name}" if path else name


def _differences(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict):
        for key in {**before, **after}:
            if key not in before or key not in after or not _same(before[key], after[key]):
                yield joined(path, key) if isinstance(key, str) else f"{path}[{key!r}]"
    elif isinstance(before, list):
        if len(before) != len(after) or not all(map(_same, before, after)):
            yield path
    elif before != after:
        yield path


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, VALUES) and a == b)
