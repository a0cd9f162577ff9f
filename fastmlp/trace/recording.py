"""Records the forward of a model as a graph of torch.fx, or says why it cannot be recorded.

Called by `fastmlp.trace`, which fuses the graph. torch.fx executes the forward once, with proxies in place of its
arguments, and takes that execution for the program. So whatever the forward reads, writes or decides besides arithmetic
on them is looked for here. The forward is executed on a `Shadow` of the model. Functions of torch that are called with
tensors of the model, or with no tensor at all, are recorded instead of computed. Optional arguments are recorded as
their defaults, unless the forward does the same with any value. What the forward asks of its arguments for Python is
answered by `settling.py` where examples were given. `comparison.py` then compares the graph with the forward itself.
"""

import inspect
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Scope, TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves

from fastmlp.hooks import has_hooks
from fastmlp.runs import FUSABLE
from fastmlp.trace.guards import Guard, Guarded
from fastmlp.trace.observing import Watch
from fastmlp.trace.outside import LIBRARIES, RECORDING, is_library
from fastmlp.trace.proxies import IN_PLACE, Attribute, Proxy
from fastmlp.trace.settling import Values, length, settled
from fastmlp.trace.shadow import Scripted, Shadow, untouched_generators
from fastmlp.trace.written import is_array

__all__ = ["Tracer"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Functions that make tensors without being given any. They are recorded, so that each call makes new tensors.
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in _words(
        "arange as_tensor asarray bartlett_window blackman_window empty empty_strided eye full hamming_window "
        "hann_window kaiser_window linspace logspace normal ones rand randint randn randperm range scalar_tensor "
        "tensor tril_indices triu_indices zeros"
    )
)

#: Attributes of tensors that may be read while a forward is recorded, because they do not depend on elements. The first
#: of them may be changed later, by `Tensor.to` and the like, so that a guard has to compare them.
_CHANGEABLE = _words("dtype device layout requires_grad is_cuda is_cpu is_meta is_leaf")
_GOTTEN = _CHANGEABLE | _words(
    "shape ndim grad_fn itemsize nbytes _version names name is_sparse is_nested is_quantized is_mkldnn is_sparse_csr "
    "is_xpu is_mps is_xla"
)
#: Methods and functions that may be called for the same reason.
_FACTS = _words(
    "size dim numel nelement stride is_contiguous is_floating_point is_complex is_signed element_size get_device "
    "storage_offset ndimension is_inference data_ptr is_same_size __len__ __hash__ __repr__ __format__ __dir__ "
    "__deepcopy__ __reduce_ex__"
)

#: Methods and functions that make Python values of the elements of a tensor.
_READS = _words(
    "item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ equal allclose "
    "is_nonzero"
)


def _isinstance(value: Any, kinds: Any) -> bool:
    """What `isinstance` is for the functions that are recorded: the arguments of a forward are tensors."""
    if type(value) is not Proxy:
        return isinstance(value, kinds)
    if _has_default(value.node):
        value.tracer.refuse(  # type: ignore[attr-defined]
            f"it asks for the type of its argument {value.node.name}, which has a default"
        )
    return isinstance(_TENSOR, kinds)


def _is_tensor(value: Any) -> bool:
    return _isinstance(value, Tensor)


_TENSOR = torch.empty(0)

#: The files in which torch seeds its generators.
_SEEDING = (f"{LIBRARIES[0]}random.py", f"{LIBRARIES[0]}cuda/random.py")

#: Names that occur in the code of a function which asks for the type of a value.
_TYPE_NAMES = frozenset(("isinstance", "issubclass", "is_tensor", "type", "__class__", "hasattr", "callable"))


@contextmanager
def _watched_for(names: frozenset[str], refuse: Callable[[str], NoReturn]) -> Iterator[list[bool]]:
    """Whether a function outside of torch's and our own files is called that uses one of the names.

    Draws from generators of Python, and seeds of torch's, raise a TraceError.
    """
    found: list[bool] = []

    def look(frame: FrameType, event: str, called: Any) -> None:
        code = frame.f_code
        if event == "call":
            if not names.isdisjoint(code.co_names) and not is_library(code.co_filename):
                found.append(True)
            if code.co_filename in _SEEDING and code.co_name not in ("get_rng_state", "initial_seed"):
                refuse(f"it seeds or moves a generator of random numbers ({code.co_name})")
        elif event == "c_call":
            owner = getattr(called, "__self__", None)
            if isinstance(owner, random.Random):
                refuse(f"it draws random numbers ({called.__qualname__}) that would be the same at every call")

    if sys.getprofile() is not None:
        # Somebody else profiles this thread, and that profiler cannot always be put back, so types may be asked for.
        yield [True]
        return
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)


class _Functions(TorchFunctionMode):
    """Hands the functions of torch that a forward calls to the tracer."""

    def __init__(self, tracer: "Tracer") -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self._tracer.called(func, args, kwargs or {})


class Tracer(fx.Tracer):
    """Records a forward down to the modules of torch.nn.

    Attributes:
        inputs: examples of arguments of the forward, which are recorded as given even if they have defaults.
        training: the mode to record, None for the modes that modules are in.
        constants: after recording, tensors that the graph reads under names which the model does not have.
        names: after recording, the parameters of the forward that are arguments of the graph and have no default.
        keywords: the last of these, which are given by keyword.
    """

    def __init__(self, inputs: tuple[Any, ...] = (), training: bool | None = None) -> None:
        super().__init__()
        self.inputs, self.training = inputs, training
        self.constants: dict[str, Any] = {}
        self.names: list[str] = []
        self.keywords: list[str] = []
        self.asks_types = False
        self.refused: TraceError | None = None
        self.attributes: list[Attribute] = []
        self._values: Values | None = None
        self._facts: dict[tuple[str, str], Any] = {}
        self._places: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """As `torch.fx.Tracer.trace`, for a module; also what pickles of recorded modules call."""
        graph = self.record(root)
        root.__dict__.update(self.constants)
        return graph

    def record(self, model: nn.Module) -> fx.Graph:
        """The graph of the forward of a module, which is not changed.

        Raises:
            TraceError: and others, for a forward that cannot be recorded.
        """
        with RECORDING, untouched_generators():
            plain = self._execute(model, frozenset())
            defaults = {str(node.target): node.args[0] for node in plain.nodes if _has_default(node)}
            # An argument that has a default stays an argument of the recording if the forward does the same with any
            # value as with the default.
            free = frozenset(name for name in defaults if self._is_free(model, plain, defaults, frozenset([name])))
            if len(free) > 1 and not self._is_free(model, plain, defaults, free):
                free = frozenset()
            graph = self._execute(model, free) if defaults else plain
        guards = [Guard.default(name, value) for name, value in defaults.items() if name not in free]
        if self.inputs and len(self.inputs) != len(self.names):
            raise TraceError(
                f"its arguments are {', '.join(self.names) or 'none'}, and inputs has {len(self.inputs)} examples"
            )
        tensors = [isinstance(value, Tensor) for value in self.inputs] or [True] * len(self.names)
        for name, is_tensor in zip(self.names, tensors, strict=True):
            guards.append(Guard.tensor(name) if self.asks_types and is_tensor else Guard.given(name))
        guards += [Guard.fact(path, name, value) for (path, name), value in self._facts.items()]
        graph.set_codegen(Guarded(guards))
        return graph

    def _is_free(self, model: nn.Module, plain: fx.Graph, defaults: dict[str, Any], names: frozenset[str]) -> bool:
        try:
            found = self._execute(model, names)
        except Exception:
            # The forward decides something by the argument, or passes it to a function that takes only values.
            return False
        return agree(found, plain, {name: defaults[name] for name in names})

    def _execute(self, model: nn.Module, free: frozenset[str]) -> fx.Graph:
        """Executes the forward once; arguments with defaults that are not free have these."""
        self._modes = _modes()
        shadow = Shadow(model, self.training)
        self.root = shadow.root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.scope, self.module_stack = Scope("", None), OrderedDict()
        self.num_calls, self.node_name_to_scope = {}, {}
        self.root_module_name = model._get_name()
        self.submodule_paths = {module: name for name, module in shadow.root.named_modules()}
        self._facts, self._shadow, self.asks_types, self.refused = {}, shadow, False, None
        self.attributes = []
        self.tensor_attrs, self._places = {}, {}
        for module, path in self.submodule_paths.items():
            tensors = {**module.__dict__, **module._parameters, **module._buffers}
            for name, value in tensors.items():
                if isinstance(value, Tensor):
                    self._places.setdefault(id(value), f"{path}.{name}".strip("."))
                    if name in module.__dict__:
                        self.tensor_attrs[value] = f"{path}.{name}".strip(".")
        shadow.intercept(self._called)
        forward = shadow.root.forward
        with _symbolic_trace._new_patcher() as self._patcher:
            _symbolic_trace._patch_wrapped_functions(self._patcher)
            self._wrap(forward)
            self._patcher.patch(torch.__dict__, "is_tensor", _is_tensor)
            for module_of_python in self._autowrap_search:
                _symbolic_trace._autowrap_check(self._patcher, module_of_python.__dict__, self._autowrap_function_ids)
            args, kwargs = self._arguments(forward, free)
            examples = dict(zip(self.names, self.inputs, strict=False))
            self._values = Values(examples, shadow.root, _READS) if examples else None
            with _Functions(self), Watch(self.refuse), _watched_for(_TYPE_NAMES, self.refuse) as found:
                output = forward(*args, **kwargs)
            if self.refused is not None:
                # The forward has caught the refusal, and has gone on in a way in which no call of it goes on.
                raise self.refused
            self.asks_types = self.asks_types or bool(found)
            self.create_node("output", "output", (self.create_arg(output),), {})
        unused = [attribute.attr for attribute in self.attributes if not attribute.is_used]
        if unused:
            raise TraceError(
                f"it asks for {unused[0]} of a value that is computed from its arguments in a way that cannot be "
                "recorded, such as hasattr, or a comparison by `is`"
            )
        changed = shadow.changes()
        if changed:
            raise TraceError(f"it changes {', '.join(changed)}, which would happen only once")
        self.constants = {k: v for k, v in shadow.root.__dict__.items() if k not in model.__dict__}
        self.submodule_paths = None
        return self.graph

    def refuse(self, reason: str) -> NoReturn:
        """Raises, also where the forward catches what is raised."""
        self.refused = self.refused or TraceError(reason)
        raise self.refused

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What `bool` of a value does, which without an example is not known while a forward is recorded."""
        value = self.settle(obj, "symbolically traced variables cannot be used as inputs to control flow")
        return bool(value)

    def settle(self, obj: fx.Proxy, refusal: str) -> Any:
        """What a value is with the examples, and from then on has to be; raises with this reason if that is open."""
        if self._values is None:
            self.refuse(refusal)
        try:
            value = self._values.answer(obj.node)
        except TraceError as error:
            self.refuse(f"{refusal}: {error}")
        if not _is_written(value):
            self.refuse(refusal)
        self.create_proxy("call_function", settled, (obj, value), {})
        return value

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """What `iter` of a value does."""
        try:
            return super().iter(obj)
        except TraceError as error:
            parts: Any = obj
            return iter([parts[i] for i in range(self.settle(length(obj), str(error)))])

    def _arguments(self, forward: Callable[..., Any], free: frozenset[str]) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        self.names, self.keywords = [], []
        left = len(self.inputs)
        value: Any
        for name, parameter in inspect.signature(forward).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                for i in range(left if self.inputs else int(not args)):
                    self.names.append(f"{name}_{i}")
                    args.append(self.create_proxy("placeholder", f"{name}_{i}", (), {}))
                left = 0
            elif parameter.kind is not parameter.VAR_KEYWORD:
                optional = parameter.default is not parameter.empty and left <= 0
                default = (parameter.default,) if optional else ()
                for value in default:
                    if not _is_written(value):
                        raise TraceError(f"its argument {name} has a default, {value!r}, that no code can name")
                kind = parameter.annotation if isinstance(parameter.annotation, type) else None
                value = self.create_proxy("placeholder", name, default, {}, type_expr=_shown(kind))
                if not optional:
                    self.names.append(name)
                    self.keywords += [name] if parameter.kind is parameter.KEYWORD_ONLY else []
                elif name not in free:
                    value = parameter.default
                left -= 1
                if parameter.kind is parameter.KEYWORD_ONLY:
                    kwargs[name] = value
                else:
                    args.append(value)
        return args, kwargs

    def _wrap(self, forward: Callable[..., Any]) -> None:
        # The file of the forward may hold functions such as math.sqrt under names of its own, to be exchanged too.
        names = getattr(inspect.unwrap(forward), "__globals__", {})
        if self._patcher.visit_once(names):
            if names.get("isinstance", isinstance) is isinstance:
                self._patcher.patch(names, "isinstance", _isinstance)
            for name, value in list(names.items()):
                if value is torch.is_tensor:
                    self._patcher.patch(names, name, _is_tensor)
        _symbolic_trace._autowrap_check(self._patcher, names, self._autowrap_function_ids)

    def _called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the call of any module of the shadow does."""
        paths = self.submodule_paths
        if paths is None or module not in paths:
            self.refuse(
                f"it calls {self._shadow.modules[module]}, which is no child of its module: what is in a plain list or "
                "dictionary has to be in a torch.nn.ModuleList or ModuleDict"
            )
        self._wrap(module.forward)
        return self.call_module(module, module.forward, args, kwargs)

    def called(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the call of a function or method of torch does while a forward is recorded."""
        name = getattr(function, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        proxied = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        attribute = getattr(getattr(function, "__self__", None), "__name__", "") if name == "__get__" else ""
        if not proxied and (attribute in _GOTTEN or name in _FACTS):
            self._remember(attribute or name, tensors)
            return function(*args, **kwargs)
        if not tensors and not proxied and (function not in _FACTORIES or any(map(is_array, leaves))):
            return function(*args, **kwargs)
        if not proxied and name in _READS:
            self.refuse(f"it reads the elements of {self._names(tensors)} ({name}), which may change later")
        target = next(iter(args), None)
        if name in ("__set__", "__delete__") or (_changes(name) and not isinstance(target, fx.Proxy)):
            what = self._names([target]) if isinstance(target, Tensor) else "a tensor"
            self.refuse(f"it changes {what} in place ({name.strip('_') or name})")
        out = [leaf for leaf in tree_leaves(kwargs.get("out")) if isinstance(leaf, Tensor)]
        if out:
            self.refuse(f"it changes {self._names(out)} in place (out=)")
        if attribute:
            return self.create_proxy("call_function", getattr, (target, attribute), {})
        if is_tensor_method_or_property(function):
            return self.create_proxy("call_method", name, args, kwargs)
        return self.create_proxy("call_function", function, args, kwargs, name=self.graph._target_to_str(name))

    def _names(self, tensors: Iterable[Tensor]) -> str:
        return ", ".join(f"self.{self._places[id(t)]}" if id(t) in self._places else "a tensor" for t in tensors)

    def _remember(self, name: str, tensors: Iterable[Tensor]) -> None:
        """A fact about a tensor of the model that may be another one when the graph is executed."""
        for tensor in tensors:
            if name in _CHANGEABLE and id(tensor) in self._places:
                self._facts[self._places[id(tensor)], name] = getattr(tensor, name)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is called as it is. One with hooks is, so that they run at every call."""
        if isinstance(m, Scripted) or has_hooks(m):
            return True
        return type(m) in FUSABLE or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Of a node."""
        return Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A node; none for what runs in a context that the graph would not remember."""
        if _modes() != self._modes:
            self.refuse("gradients or autocast are switched in its forward, which is not recorded")
        return super().create_node(kind, *args, **kwargs)


def _modes() -> tuple[bool, ...]:
    """Of the thread, besides those of modules: what a forward may read or switch."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def agree(open: fx.Graph, plain: fx.Graph, values: dict[str, Any]) -> bool:
    """Whether a graph with arguments is, with these values for them, another graph."""
    theirs = [node for node in plain.nodes if node.op != "placeholder"]
    known: dict[fx.Node, Any] = {}
    placeholders = {str(node.target): node for node in plain.nodes if node.op == "placeholder"}
    at = 0
    for node in open.nodes:
        if node.op == "placeholder":
            name = str(node.target)
            known[node] = values[name] if name in values else placeholders[name]
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        inputs = [known[input] for input in node.all_input_nodes]
        if node.op == "call_function" and inputs and not any(isinstance(input, fx.Node) for input in inputs):
            # This is arithmetic on the values alone, of which the other graph holds only the result.
            known[node] = node.target(*arguments[0], **arguments[1])
            continue
        if at == len(theirs) or (node.op, node.target) != (theirs[at].op, theirs[at].target):
            return False
        if repr(arguments) != repr((theirs[at].args, theirs[at].kwargs)):
            return False
        known[node] = theirs[at]
        at += 1
    return at == len(theirs)


def _has_default(node: fx.Node) -> bool:
    return node.op == "placeholder" and bool(node.args)


def _changes(name: str) -> bool:
    return name == "__setitem__" or name.strip("_") in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _is_written(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list) and all(map(_is_written, value))
    return value is None or type(value) in (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def _shown(kind: type | None) -> type | None:
    """An annotation, if the code that torch.fx writes can name it."""
    return kind if kind is not None and kind.__module__ in ("builtins", "torch") else None
