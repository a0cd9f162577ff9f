"""Finds what the functions of a model reach besides the model: global variables, classes, closures, defaults, caches.

`fastmlp.trace` records and compares a forward inside of an `Outside`, because a forward that writes there would do so
only once, and what it leaves there while it is recorded, such as a proxy in a cache, would spoil the model.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper, partial, wraps
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_leaves

from fastmlp.trace.written import ITEMS, Written

__all__ = ["LIBRARIES", "RECORDING", "Outside", "is_library"]

#: The folders of functions that are not the model's own: torch's, and ours.
LIBRARIES = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent.parent}/")
_STANDARD = f"{Path(inspect.__file__).parent}/"

#: Packages whose functions and classes are not looked at, because what they keep is their own business.
_PACKAGES = frozenset(sys.stdlib_module_names - {"__main__"} | {"builtins", "fastmlp", "numpy", "torch"})

#: Attributes that every module has. They need no look here, because a `Shadow` copies them.
_OF_MODULES = frozenset(vars(nn.Module()))

#: Held while something is recorded, because torch.fx exchanges functions such as math.sqrt meanwhile, for all threads,
#: and so does `Outside`.
RECORDING = threading.RLock()


def is_library(file: str) -> bool:
    """Whether a function of that file is torch's, Python's or our own."""
    standard = file.startswith(_STANDARD) and "site-packages" not in file
    return standard or file.startswith((*LIBRARIES, "<"))


class Outside(Written):
    """A context in which a forward may be executed, so that nothing outside of the model is written.

    Functions with a cache of `functools` are called without it there. What was written is put back, and refused.

    Args:
        model: whose functions are looked at, and those that they name.

    Raises:
        TraceError: at the end, naming what was written.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._reached: dict[int, Any] = {}  # alive, so that their ids are theirs
        self._modules: set[tuple[int, frozenset[str]]] = set()
        self._exchanged: list[tuple[Callable[[Any], None], Any]] = []
        self._own = {_package(type(module).__module__) for module in model.modules()}

    def __enter__(self) -> Self:
        RECORDING.acquire()
        try:
            for module in list(self._model.modules()):
                self._class(type(module))
                for name, value in list(vars(module).items()):
                    if name not in _OF_MODULES:
                        self._reach(value, name, frozenset())
        except BaseException:
            self._put_back()
            RECORDING.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._put_back()
            changed = self.changes()
        finally:
            RECORDING.release()
        if changed:
            raise TraceError(f"it changes {', '.join(changed)}, which would happen only once") from error

    def _put_back(self) -> None:
        for put, cached in self._exchanged:
            put(cached)

    def _is_apart(self, module: str, file: str | None) -> bool:
        """Whether a module of Python is of a package that has none of the model's classes: what it keeps is its own."""
        installed = file is not None and "-packages/" in file
        return _package(module) in _PACKAGES or (installed and _package(module) not in self._own)

    def _is_new(self, value: Any) -> bool:
        return id(value) not in self._reached and self._reached.update({id(value): value}) is None

    def _namespace(
        self,
        path: str,
        content: Callable[[], dict[str, Any]],
        put: Callable[[str, Any], None],
        remove: Callable[[str], None],
        names: frozenset[str],
    ) -> None:
        """Watches variables, and all that is reached by them."""

        def restore(before: dict[str, Any]) -> None:
            now = content()
            for name in now.keys() - before.keys():
                remove(name)
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    put(name, value)

        self.watch(path, content, restore)
        for name, value in content().items():
            own = f"{path}.{name}"
            self._reach(value, own, names)
            if isinstance(value, _lru_cache_wrapper):
                self._exchanged.append((partial(put, name), value))
                put(name, _uncached(value, own))

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not self._is_apart(base.__module__, _file(base.__module__)) and self._is_new(base):
                content = partial(_ordinary, base)
                self._namespace(base.__qualname__, content, partial(setattr, base), partial(delattr, base), frozenset())

    def _function(self, function: FunctionType) -> None:
        variables, path = function.__globals__, function.__qualname__
        apart = self._is_apart(variables.get("__name__", ""), variables.get("__file__"))
        if apart or not self._is_new(function):
            return
        names = frozenset(_names(function.__code__))
        self._variables(function.__module__ or path, variables, names)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

        def put(name: str, value: Any) -> None:
            cells[name].cell_contents = value

        def remove(name: str) -> None:
            del cells[name].cell_contents

        self._namespace(path, partial(_contents, cells), put, remove, names)
        own = vars(function)
        self._namespace(path, partial(dict, own), own.__setitem__, own.__delitem__, names)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._reach(value, f"a default of {path}", names)

    def _variables(self, path: str, variables: dict[str, Any], names: frozenset[str]) -> None:
        def content() -> dict[str, Any]:
            return {name: variables[name] for name in sorted(names) if name in variables}

        self._namespace(path, content, variables.__setitem__, variables.__delitem__, names)

    def _reach(self, value: Any, path: str, names: frozenset[str]) -> None:
        """Looks at something that a function may use, and at what that one reaches."""
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, ModuleType):
            apart = self._is_apart(value.__name__, _file(value.__name__))
            if not apart and (id(value), names) not in self._modules:
                self._modules.add((id(value), names))
                self._variables(value.__name__, vars(value), names)
        elif isinstance(value, (nn.Module, Tensor)) or not self._is_new(value):
            return
        elif isinstance(value, _lru_cache_wrapper):
            self.watch(path, value.cache_info, lambda _: value.cache_clear())
            self._reach(value.__wrapped__, path, names)
        elif parts := _parts(value):
            self.observe(value, path)
            for part in parts:
                self._reach(part, path, names)
        else:
            self._class(type(value))
            self.observe(value, path)


def _parts(value: Any) -> list[Any]:
    """What something holds that functions may be among."""
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(value.values())[:ITEMS]
    return list(value)[:ITEMS] if isinstance(value, (list, tuple)) else []


def _ordinary(kind: type) -> dict[str, Any]:
    """The attributes of a class that are its author's."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("__") or name == "__call__"}


def _contents(cells: dict[str, CellType]) -> dict[str, Any]:
    """The variables of a closure that have a value."""
    found = {}
    for name, cell in cells.items():
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _package(module: str) -> str:
    return module.partition(".")[0]


def _file(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _names(code: CodeType) -> Iterator[str]:
    """All names that a function, and the functions in it, may look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _uncached(cached: Any, path: str) -> Callable[..., Any]:
    """A function with a cache as it is called while this thread records; other threads call it as it is."""
    recording = threading.get_ident()

    @wraps(cached, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != recording:
            return cached(*args, **kwargs)
        result = cached.__wrapped__(*args, **kwargs)
        if any(isinstance(leaf, (Tensor, fx.Proxy)) for leaf in tree_leaves(result)):
            raise TraceError(f"it calls {path}, a function with a cache (functools), in which a tensor would be kept")
        return result

    call.cache_info, call.cache_clear = cached.cache_info, cached.cache_clear  # type: ignore[attr-defined]
    return call
