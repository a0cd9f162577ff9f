"""The class of recorded modules: a graph module with the attributes and methods of the model, copied and pickled so.

`fastmlp.trace` makes them.
"""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from fastmlp.classes import Quiet, is_importable, new_class

__all__ = ["Traced", "class_for", "load"]

#: Attributes that a recorded module does not take over from the model, because it has its own or must not have them.
_OWN = ("forward", "_compiled_call_impl", "_fastmlp_converted", "_fastmlp_attributes")

#: The classes of recorded modules by the code that they execute, so that equal recordings share a class.
_CLASSES: "WeakValueDictionary[Any, type]" = WeakValueDictionary()


class Traced(fx.GraphModule):
    """A graph module with all that the traced module holds: torch.fx takes only what the graph uses."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> None:
        mixed = _base(type(self))
        # The class that has the model's methods is set last, because a __getattr__ of the model's may look for
        # attributes that are put here first.
        _become(self, Traced, class_name)
        super().__init__(root, graph, class_name)
        constants = self._buffers.keys() - root._buffers.keys()
        self._buffers = {**root._buffers, **{name: self._buffers[name] for name in sorted(constants)}}
        self._non_persistent_buffers_set = root._non_persistent_buffers_set | constants
        self._parameters = dict(root._parameters)
        self._modules = dict(root._modules)
        more = {k: v for k, v in root.__dict__.items() if k not in (*self.__dict__, *self._buffers, *_OWN)}
        self.__dict__.update(more)
        self._fastmlp_attributes = tuple(more)
        _become(self, mixed, class_name)
        self.recompile()

    def recompile(self) -> Any:
        """As that of `torch.fx.GraphModule`, whose instances have classes of their own that hold their code.

        Those with the same code share one, as `torch.func.stack_module_state` wants it.
        """
        base, name = _base(type(self)), type(self).__name__
        _become(self, base, name)
        code = super().recompile()
        names = tuple(sorted((key, id(value)) for key, value in code.globals.items()))
        object.__setattr__(self, "__class__", _CLASSES.setdefault((base, name, code.src, names), type(self)))
        return code

    def _deepcopy_init(self) -> Callable[..., None]:
        return partial(Traced.__init__, class_name=type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        name = type(self).__name__
        if any(
            isinstance(value, torch.Generator) for key, value in vars(self).items() if key.startswith("_opaque_obj")
        ):
            raise pickle.PicklingError(
                f"fastmlp: a recorded {name} that draws from a torch.Generator of its own cannot be pickled, since the "
                "graph names that object; pickle the model, and record it again: convert(model, trace=True)"
            )
        build, (attributes, imports) = super().__reduce__()
        kind = next((k for k in type(self).__mro__ if k.__dict__.get(_MIXED)), None)
        plain = kind.__dict__[_MIXED] if kind is not None else None
        # Attributes of the model that cannot be pickled are left out, because the recorded forward may not read them.
        lost = {name for name in self._fastmlp_attributes if not _is_picklable(attributes.get(name))}
        attributes = {name: value for name, value in attributes.items() if name not in lost}
        return load, (build, (attributes, imports), name, plain if plain and is_importable(plain) else None)


def _is_picklable(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # the value's own class may raise anything
        return False
    return True


#: The name of the class that torch.fx makes for each graph module.
_IMPL = "GraphModuleImpl"

#: The attribute of a class that was made here which holds the class of the model that was recorded.
_MIXED = "_fastmlp_mixed_with"


def _base(kind: type) -> type:
    """The class of which torch.fx has made one for a single graph module."""
    return next(base for base in kind.__mro__ if base.__qualname__.split(".")[-1] != _IMPL)


def _become(module: nn.Module, base: type, name: str) -> None:
    """Gives a module a class of its own."""
    object.__setattr__(module, "__class__", type(name, (base,), {"__qualname__": _IMPL}))


def _mixed(plain: type[nn.Module]) -> type[Traced]:
    """A class of recorded modules with the methods of the model's class."""
    for kind in plain.__subclasses__():
        if kind.__dict__.get(_MIXED) is plain:
            return kind  # type: ignore[return-value]
    names = {_MIXED: plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return new_class(plain.__name__, (Traced, Quiet, plain), names)


def class_for(plain: type[nn.Module]) -> type[Traced]:
    """The class of a recording of a model of this class, with the methods of both if that can be."""
    if issubclass(plain, fx.GraphModule):
        # A recording of a recording has the methods of the model that was recorded first.
        return next((kind for kind in plain.__mro__ if _MIXED in kind.__dict__), Traced)
    mixed = _mixed(plain)
    # Where the model's class has __slots__, its instances lie otherwise in memory, and the recording goes without its
    # methods.
    return mixed if mixed.__basicsize__ == Traced.__basicsize__ else Traced


def load(
    build: Callable[..., fx.GraphModule],
    arguments: tuple[dict[str, Any], str],
    name: str,
    plain: type[nn.Module] | None = None,
) -> fx.GraphModule:
    """What pickles of recorded modules call."""
    root = nn.Module()
    root.__dict__.update(arguments[0])
    kind = Traced if plain is None else class_for(plain)
    return kind(root, build(*arguments).graph, name)
