"""What a function reads of Python besides its arguments, so that a change of it is noticed before a replay.

A recorder tells which modules were called, which functions of the program ran, and which optimizers stepped. Of these,
`Seen.watch` makes a `_C.Surroundings`: flags and numbers of modules, their parameters, children and hooks; numbers,
modules and tensors among the variables and attributes that the functions name; membership of optimizers. What can
change without a new object, such as elements of long lists, is not looked at: `fastmlp.capture` says so.
"""

import dis
import gc
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sized
from enum import Enum
from functools import lru_cache, partial
from numbers import Number
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastmlp._load import _C
from fastmlp.hooks import GLOBAL_HOOKS, HOOKS
from fastmlp.trace.outside import is_library

__all__ = ["Seen", "Watched", "is_program"]

_IGNORED, _SAME, _EQUAL = range(3)
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
#: What is another thing only if it is another object.
_CONSTANT = (
    nn.Module,
    torch.optim.Optimizer,
    torch.Generator,
    torch.dtype,
    torch.device,
    torch.Size,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    partial,
    type,
    Enum,
    Number,
    range,
    slice,
    frozenset,
)
_PARTS = ("_parameters", "_buffers", "_modules")
#: Attributes of torch's modules that no forward reads.
_INERT = frozenset(
    {
        "in_features",
        "out_features",
        "num_features",
        "num_embeddings",
        "embedding_dim",
        "call_super_init",
        "dump_patches",
    }
)
#: Longer containers are not looked into.
_ITEMS = 64
#: Containers of which at least the number of entries is watched. Asking for it runs no code of Python.
_SIZED = (list, tuple, dict, set, bytearray, deque, array)
#: How Python names the file of what was typed, or came by a pipe or from a notebook.
_TYPED = ("<stdin", "<string", "<input", "<ipython", "<console", "<python-input")
#: How far objects are followed from the function.
_DEPTH = 4


@lru_cache(1024)
def is_program(file: str) -> bool:
    """Whether a function of that file is of the user's program."""
    return file.startswith(_TYPED) or not is_library(file)


class Watched:
    """A `_C.Surroundings`, and what each of its entries is called in the program.

    Attributes:
        watch: what replays ask.
        alive: all objects that `watch` only borrows.
        values: the identities of those that variables, attributes and entries hold.
    """

    def __init__(self) -> None:
        self.watch = _C.Surroundings()
        self.alive: list[Any] = []
        self.values: set[int] = set()
        self._names: list[str] = []
        self._done: set[tuple[Any, ...]] = set()

    def changed(self) -> str | None:
        """The name of the first thing that is not what it was, or None."""
        index = self.watch.changed()
        return None if index < 0 else self._names[index]

    def _is_new(self, *key: Any) -> bool:
        new = key not in self._done
        self._done.add(key)
        return new

    def _keep(self, holder: Any, *values: Any) -> None:
        self.alive += [holder, *values]
        self.values.update(map(id, values))

    def mapping(self, holder: dict[Any, Any], modes: list[int], name: str) -> None:
        """Watches the values of a dictionary, and that there are no others."""
        if self._is_new("dict", id(holder)):
            self._keep(holder, *holder.values())
            self.watch.add_dict(holder, modes)
            self._names.append(name)

    def item(self, holder: dict[Any, Any], key: Any, mode: int, name: str) -> None:
        """Watches one entry of a dictionary."""
        if self._is_new("item", id(holder), key):
            self._keep(holder, key, holder.get(key))
            self.watch.add_item(holder, key, mode)
            self._names.append(name)

    def hooks(self, tensor: Tensor, name: str) -> None:
        """Watches which hooks autograd runs for a tensor."""
        if self._is_new("hooks", id(tensor)):
            self.alive.append(tensor)
            self.watch.add_hooks(tensor)
            self._names.append(name)
            for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks):
                if hooks:
                    self.mapping(hooks, [_SAME] * len(hooks), name)

    def sequence(self, holder: list[Any] | tuple[Any, ...], modes: list[int], name: str) -> None:
        """Watches the items of a list."""
        if self._is_new("sequence", id(holder)):
            self._keep(holder, *holder)
            self.watch.add_sequence(holder, modes)
            self._names.append(name)

    def size(self, holder: Sized, name: str) -> None:
        """Watches how many entries a container has."""
        if self._is_new("size", id(holder)):
            self.alive.append(holder)
            self.watch.add_size(holder)
            self._names.append(name)

    def attribute(self, owner: Any, name: str, mode: int, words: str) -> None:
        """Watches an attribute that is in no dictionary."""
        if self._is_new("attribute", id(owner), name):
            self._keep(owner, name, getattr(owner, name))
            self.watch.add_attribute(owner, name, mode)
            self._names.append(words)

    def cell(self, cell: Any, mode: int, name: str) -> None:
        """Watches a variable of a closure."""
        if self._is_new("cell", id(cell)):
            self._keep(cell, cell.cell_contents)
            self.watch.add_cell(cell, mode)
            self._names.append(name)


class Seen:
    """What was seen during one recording, or several."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._functions: dict[int, FunctionType] = {}
        self._codes: dict[CodeType, dict[str, Any]] = {}
        self._objects: dict[int, Any] = {}

    def module(self, module: nn.Module) -> None:
        """A module was called."""
        if id(module) not in self._modules:
            for each in module.modules():
                self._modules[id(each)] = each

    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer stepped."""
        self._optimizers[id(optimizer)] = optimizer

    def argument(self, value: Any) -> None:
        """An object that the function got, which is told apart by identity."""
        self._objects[id(value)] = value

    def frame(self, frame: FrameType) -> None:
        """A function of the program was called."""
        code = frame.f_code
        self._codes[code] = frame.f_globals
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if owner is not None and not isinstance(owner, (nn.Module, Tensor)):
                self._objects[id(owner)] = owner

    def function(self, function: Callable[..., Any]) -> None:
        """The captured function itself."""
        if isinstance(function, MethodType):
            self._objects[id(function.__self__)] = function.__self__
            self.function(function.__func__)
        elif isinstance(function, partial):
            self.function(function.func)
            self._objects[id(function.keywords)] = function.keywords
            for value in (*function.args, *function.keywords.values()):
                self._objects[id(value)] = value
        elif isinstance(function, nn.Module):
            self.module(function)
        elif isinstance(function, FunctionType):
            self._functions[id(function)] = function
            self._codes[function.__code__] = function.__globals__
        elif hasattr(function, "__dict__"):
            self._objects[id(function)] = function

    def both(self, other: "Seen") -> "Seen":
        """What is in this one and in another one: an object that is made anew at each call is only in one."""
        common = Seen()
        for name in vars(self):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(common, name, {key: value for key, value in mine.items() if key in theirs})
        return common

    def leaves(self) -> list[Tensor]:
        """Parameters of modules and optimizers."""
        found = {id(p): p for module in self._modules.values() for p in module._parameters.values() if p is not None}
        for optimizer in self._optimizers.values():
            found |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
        return list(found.values())

    def watch(self, held: Iterable[Tensor], within: bool, steps: bool = False) -> Watched:
        """Watches all of it, as it is now.

        Args:
            held: tensors that the recording uses where it found them.
            within: whether this is to find out what the function itself changes. Then numbers of optimizers are watched
                too, which a step reads anew each time, and not whether lists and objects are still the same ones.
            steps: whether numbers and states of optimizers are watched because steps are not computed anew.
        """
        watched = Watched()
        _Walk(self, watched, list(held), within, steps).all()
        return watched


class _Walk:
    """Goes through what was seen and adds it to a `Watched`."""

    def __init__(self, seen: Seen, watched: Watched, held: list[Tensor], within: bool, steps: bool) -> None:
        self._seen = seen
        self._watched = watched
        self._tensors = held
        self._held = {id(tensor) for tensor in held}
        self._within = within
        self._steps = steps
        self._names = {name for code in seen._codes for name in _names(code)}
        self._walked: set[tuple[int, int]] = set()

    def all(self) -> None:
        """Adds everything."""
        seen = self._seen
        for tensor in self._tensors:
            self._watched.hooks(tensor, f"a hook of a tensor of shape {tuple(tensor.shape)}")
        for hooks in GLOBAL_HOOKS:
            self._watched.mapping(hooks, [_SAME] * len(hooks), "a hook of all modules")
        for module in list(seen._modules.values()):
            self._module(module)
        for optimizer in list(seen._optimizers.values()):
            self._optimizer(optimizer)
        for function in list(seen._functions.values()):
            self._function(function, 0)
        for code, variables in list(seen._codes.items()):
            self._globals(code, variables, 0)
        for owner in list(seen._objects.values()):
            if type(owner) is dict:
                self._dictionary(owner, "an argument of the partial function", 0)
            else:
                self._object(owner, type(owner).__name__, 0)

    def _mode(self, value: Any, name: str, depth: int) -> int:
        """How a variable is compared, after what it holds has been added.

        Numbers are compared by value, and all else by identity: an object takes its place with another one in it. The
        function itself may make new lists and objects, with the same in them, at each call.
        """
        self._value(value, name, depth)
        if isinstance(value, _PLAIN):
            return _EQUAL
        if isinstance(value, Tensor):
            # Within the call none may take the place of another, because replays would not put it there.
            return _SAME if id(value) in self._held or self._within else _IGNORED
        return _SAME if isinstance(value, _CONSTANT) or not self._within else _IGNORED

    def _module(self, module: nn.Module) -> None:
        own = vars(module)
        name = type(module).__name__
        for part in (*_PARTS, *HOOKS):
            if isinstance(own.get(part), dict):
                self._watched.mapping(own[part], [_SAME] * len(own[part]), f"{part[1:]} of {name}")
        standard = _is_standard(type(module))
        for key, value in list(own.items()):
            if key in _INERT or key in _PARTS or key in HOOKS:
                continue
            if key == "training" or standard or key in self._names:
                self._variable(own, key, value, f"{name}.{key}", 1)
        self._watched.item(own, "forward", _SAME, f"{name}.forward")
        self._class_of(module, own, name, 1)

    def _variable(self, holder: dict[Any, Any], key: Any, value: Any, name: str, depth: int) -> None:
        mode = self._mode(value, name, depth)
        if mode != _IGNORED:
            self._watched.item(holder, key, mode, name)

    def _optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        name = type(optimizer).__name__
        groups = optimizer.param_groups
        self._watched.item(vars(optimizer), "param_groups", _SAME, f"param_groups of {name}")
        self._watched.sequence(groups, [_SAME] * len(groups), f"param_groups of {name}")
        for group in groups:
            self._watched.item(group, "params", _SAME, f"the parameters of {name}")
            self._watched.sequence(group["params"], [_SAME] * len(group["params"]), f"the parameters of {name}")
            if self._within or self._steps:
                for key, value in list(group.items()):
                    if isinstance(value, (*_PLAIN, tuple)):
                        self._watched.item(group, key, _EQUAL, f"{key} in a group of {name}")
        if self._steps:
            for state in (optimizer.state, *optimizer.state.values()):
                self._watched.mapping(state, [_SAME] * len(state), f"the state of {name}")

    def _function(self, function: FunctionType, depth: int) -> None:
        if not is_program(function.__code__.co_filename):
            return
        self._globals(function.__code__, function.__globals__, depth)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            mode = self._mode(value, name, depth + 1)
            if mode != _IGNORED:
                self._watched.cell(cell, mode, name)
        for key in ("__defaults__", "__kwdefaults__"):
            name = f"a default of {function.__name__}"
            self._value(getattr(function, key), name, depth + 1)
            self._watched.attribute(function, key, _SAME, name)

    def _globals(self, code: CodeType, variables: dict[str, Any], depth: int) -> None:
        package = variables.get("__package__")
        for name in _variables(code):
            if name in variables:
                self._variable(variables, name, variables[name], name, depth + 1)
        for name in _names(code):
            # What is imported within the function is named, too.
            for full in (name, f"{package}.{name}"):
                if isinstance(module := sys.modules.get(full), ModuleType):
                    self._value(module, name, depth + 1)

    def _value(self, value: Any, name: str, depth: int) -> None:
        """Goes on to what a value holds."""
        if depth > _DEPTH or isinstance(value, (*_PLAIN, Tensor)) or (id(value), depth) in self._walked:
            return
        self._walked.add((id(value), depth))
        if isinstance(value, nn.Module):
            for module in value.modules():
                if id(module) not in self._seen._modules:
                    self._module(module)
        elif isinstance(value, torch.optim.Optimizer):
            self._optimizer(value)
        elif isinstance(value, FunctionType):
            self._function(value, depth)
        elif isinstance(value, MethodType):
            self._each((value.__func__, value.__self__), name, depth)
        elif isinstance(value, partial):
            self._each((value.func, value.args, value.keywords), name, depth)
        elif isinstance(value, dict) and len(value) <= _ITEMS:
            self._dictionary(value, name, depth)
        elif isinstance(value, (list, tuple)) and len(value) <= _ITEMS:
            self._sequence(value, name, depth)
        elif isinstance(value, _SIZED):
            self._watched.size(value, name)
        elif isinstance(value, type):
            self._class(value, value.__name__, depth)
        else:
            self._object(value, name, depth)

    def _each(self, values: Iterable[Any], name: str, depth: int) -> None:
        for value in values:
            self._value(value, name, depth)

    def _dictionary(self, value: dict[Any, Any], name: str, depth: int) -> None:
        modes = [self._mode(item, f"{name}[{key!r}]", depth + 1) for key, item in list(value.items())]
        if self._within:
            # The function itself may add entries.
            for key, mode in zip(value, modes, strict=True):
                if mode != _IGNORED:
                    self._watched.item(value, key, mode, f"{name}[{key!r}]")
        else:
            self._watched.mapping(value, modes, name)

    def _sequence(self, value: Any, name: str, depth: int) -> None:
        modes = [self._mode(item, name, depth + 1) for item in list(value)]
        # Its length too: within the call a list must not grow, because replays would not append to it.
        self._watched.sequence(value, modes, name)

    def _object(self, owner: Any, name: str, depth: int) -> None:
        """An object of a class of the program, or a module of Python: the attributes that its functions name."""
        if _is_library(owner) if isinstance(owner, ModuleType) else _is_standard(type(owner)):
            return
        for slot in _slots(type(owner)):
            self._slot(owner, slot, f"{name}.{slot}", depth + 1)
        own = getattr(owner, "__dict__", None)
        if not isinstance(own, dict):
            return
        for key in list(own):
            if key in self._names:
                self._variable(own, key, own[key], f"{name}.{key}", depth + 1)
        self._class_of(owner, own, name, depth)

    def _slot(self, owner: Any, slot: str, name: str, depth: int) -> None:
        if slot not in self._names or not hasattr(owner, slot):
            return
        value = getattr(owner, slot)
        mode = self._mode(value, name, depth)
        if mode != _IGNORED:
            self._watched.attribute(owner, slot, mode, name)

    def _class_of(self, owner: Any, own: dict[str, Any], name: str, depth: int) -> None:
        """What an object has from its class, and that it has none of its own instead."""
        for kind in type(owner).__mro__:
            if not _is_standard(kind):
                for key in self._attributes(kind):
                    self._watched.item(own, key, _SAME if key not in own else _IGNORED, f"{name}.{key}")
                self._class(kind, kind.__name__, depth)

    def _class(self, kind: type, name: str, depth: int) -> None:
        """The attributes of a class of the program that its functions name, methods aside."""
        if _is_standard(kind) or issubclass(kind, Enum):
            return
        # What vars() gives only shows the dictionary.
        (own,) = gc.get_referents(vars(kind))
        for key in self._attributes(kind):
            self._variable(own, key, own[key], f"{name}.{key}", depth + 1)

    def _attributes(self, kind: type) -> list[str]:
        methods = (FunctionType, property, staticmethod, classmethod)
        return [key for key, value in vars(kind).items() if key in self._names and not isinstance(value, methods)]


def _is_standard(kind: type) -> bool:
    """Whether a class is of a package whose attributes no program changes."""
    return kind.__module__.partition(".")[0] in ("builtins", "fastmlp", "numpy", "torch")


def _is_library(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or is_library(file)


def _slots(kind: type) -> Iterable[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from ((slots,) if isinstance(slots, str) else slots)


@lru_cache(4096)
def _variables(code: CodeType) -> tuple[str, ...]:
    """The names of all variables of its file that a function, and the functions in it, look up."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    own = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return tuple(dict.fromkeys([*own, *(name for one in inner for name in _variables(one))]))


def _names(code: CodeType) -> Iterable[str]:
    """All names that a function, and the functions in it, look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and "getattr" in code.co_names:
            yield constant
