"""Networks for serving: `freeze` packs the weights once, and a call is one call into C++.

stages.py reads the model, csrc/python/frozen.cpp is what is called. This file fills the frozen network with what was
read, and pickles it.
"""

import ctypes
from collections.abc import Sequence
from math import prod
from typing import Any, Self, TypeAlias
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from fastmlp._errors import described
from fastmlp._load import _C
from fastmlp.activations import IDENTITY, Activation, activations_of
from fastmlp.exports import Exports
from fastmlp.recipe import Recipe
from fastmlp.stages import GraphPlan, Plan, Tensors, check_alike, layers_of_stages, seen

__all__ = ["FrozenMLP", "freeze"]


def freeze(model: nn.Module, *, dtype: torch.dtype | None = None, inputs: tuple[Any, ...] | None = None) -> "FrozenMLP":
    """A network that computes what the model does in eval mode, for serving, with little overhead.

    It takes what is one chain of layers: a `fastmlp.Sequential`, `MLP` or `Linear`, a `torch.nn.Sequential` or
    `Linear`, nested ones, and any module that `convert(model, trace=True)` would record as one chain. `BatchNorm1d` is
    folded into the layer before or after it, computed in float64; `Dropout`, `AlphaDropout` and `Identity` vanish. The
    chain may begin with a `torch.nn.Flatten()` or a call that does the same: `x.flatten(1)`, `torch.flatten(x, 1)`,
    `x.view(x.size(0), -1)`, `x.view(-1, in_features)`, and these with `reshape`. It may end with a `torch.nn.Softmax`
    or `LogSoftmax` along the features, and after that with another shape of the same elements: a `torch.nn.Flatten` or
    `Unflatten`, or calls of `squeeze`, `unsqueeze`, `flatten`, `unflatten`, `view` and `reshape` with numbers. Each of
    these may be a module or a call of a function or method.

    And it takes what is a graph of layers in float32 or float64 on the CPU, with any number of inputs and one tensor or
    a tuple of tensors as its result. Between chains there may be residual additions and other elementwise operations,
    also with parameters and buffers, that `capture` has instructions for; `torch.cat`, `split`, `chunk` and slices of
    features; `LayerNorm` of the last dimension; a `BatchNorm1d` that cannot be folded; `softmax` and
    `log_softmax` of up to 15 features. What makes an element of one row depend on another row, sums along rows, random
    numbers, and forwards that ask their arguments for more than their sizes are computed with, as by `if x.dim() == 2`,
    are refused.

    The model stays as it is. The frozen network follows it as long as it exists; see `FrozenMLP`.

    Args:
        model: what to freeze. Its parameters are of one dtype, float32, float64, bfloat16 or float16, which is also
            the dtype of input and output, and on one device: the CPU, or a GPU if the build has CUDA kernels.
        dtype: None, or torch.bfloat16 for a network with weights in bfloat16 whose input and output are float32. The
            weights and the input of each layer are rounded to bfloat16 (to nearest, ties to even), and sums, biases
            and activations are computed in float32; the output is not rounded. On the CPU only: the kernels of a GPU
            round what they store to the dtype of the weights. In a graph, what lies between its layers is computed in
            float32.
        inputs: of a graph, examples of its inputs, from which only the sizes of their last dimensions are taken. None
            where these follow from its layers, as they do unless inputs meet in a `torch.cat`, or are chunked.

    Raises:
        TypeError: naming the module and the reason, if the model cannot be frozen: if it is neither one chain of
            layers, each with at most one activation, nor such a graph, or has hooks, or is in training mode with a
            `BatchNorm1d` or `Dropout`, or is what `torch.compile` returned.
        ValueError: for another dtype, or torch.bfloat16 for a model that is not on the CPU.
        RuntimeError: for parameters of other dtypes, of several, or on devices without kernels, and of shapes that do
            not fit together.

    Example:
        >>> frozen = freeze(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)))
        >>> frozen
        FrozenMLP(10 -> 50 relu -> 1, torch.float32)
        >>> frozen(torch.zeros(3, 10)).shape
        torch.Size([3, 1])
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc, self.norm = nn.Linear(10, 10), nn.LayerNorm(10)
        ...     def forward(self, x):
        ...         return x + torch.relu(self.fc(self.norm(x)))
        >>> freeze(Residual())
        FrozenMLP(10 -> 10, graph of 1 network, torch.float32)
    """
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"fastmlp: dtype must be None or torch.bfloat16, got {dtype!r}")
    frozen = FrozenMLP()
    frozen._dtype, frozen._inputs = dtype, inputs
    frozen._follow(model)
    frozen._model = ref(model)
    return frozen


class FrozenMLP(Exports):
    """A network that was frozen by `freeze`; it has no parameters and no gradients.

    `frozen(input, out=None)` takes a tensor of any strides, on the device that the model is on, or on the CPU a
    `numpy.ndarray`, which is read where it is, and returns one of the same kind. Any number of threads may call it at
    once.

    - Shapes are those of the model: input (*, in_features), output (*, out_features); with a `BatchNorm1d` exactly two
      dimensions. Where the model begins by flattening: input (N, ...) with in_features elements in all dimensions after
      the first together, output (N, out_features). It may be strided as it likes, even where the model calls
      `view`. Where the model ends by giving its output another shape, so does the frozen network. With a softmax along
      dimension 1 the input of the layers has two dimensions. `out` is of the output's shape and dtype, contiguous, and
      does not overlap the input; it is returned.
    - A graph of several inputs is called as `frozen(x, y)`, or `frozen(x, y, out=out)`; all inputs have the same
      dimensions but for the last. One of several results returns a tuple, and takes one as `out`. Exactly two
      dimensions are expected where the forward counts dimensions from the first.
    - Each row of the output has the same bits whatever the batch that it came in, however it lies in memory, and
      however many threads compute it. They do depend on the instruction set, which is the one that `set_isa` chose
      last: the weights are packed again for another one. Of a GPU none of that is promised.
    - A graph runs on tapes of 1, 2, 4, ... 128 rows, which are made when they are first needed and kept; a batch goes
      through them in pieces. Each thread that calls at the same time makes tapes of its own.
    - An input that requires grad is refused while gradients are recorded, as by `Tensor.numpy`: pass
      `input.detach()`, or call under `torch.no_grad()`.
    - Autocast has no effect. In transforms of `torch.func`, under dispatch modes, and with subclasses of
      tensors, it raises: call the model. `torch.compile` breaks its graph at the call, but not at one of a
      `FrozenModule`.
    - As long as the model exists, each call looks whether it is as it was, and reads it again before it computes where
      it is not; so do `repr`, copies, pickles and the properties. It sees: parameters and buffers that were replaced,
      written to (by their counters of versions), or given other memory, another view of it or another dtype through
      `.data`; modules that were replaced, added or removed, and their classes; attributes of activations, `eps`, the
      `p` of a `Dropout`, and the modes of `BatchNorm1d` and `Dropout`; hooks, and forwards of instances and classes
      that were replaced. What `freeze` refuses is refused from the next call on, for as long as it lasts.
    - It does not see what leaves no trace in the model, and goes on with what it has read until `refresh()` is called:
      writes through `.data`, `detach().numpy()`, `untyped_storage()`, DLPack, and whatever else shares the memory
      without PyTorch's counting; a step of a `torch.optim` optimizer with `fused=True`; writes of other processes to
      shared memory; writes to tensors that were made in inference mode; and all that a recorded forward reads besides
      the parameters and modules of its chain, such as attributes and global variables: it is recorded once.
    - Several threads may call it while another one changes the model: a call then computes with what the model was at
      one moment of the call. Only writes into the memory of a tensor may be met halfway, as by the model itself.
    - On a GPU it holds a copy of the parameters, biases rounded to the dtype of the weights, which goes to the same
      kernels as the model's. They run on the current stream and wait for nothing; the copy is written on the stream of
      the call that reads the model, and again into the same memory after a change, so that a captured CUDA graph stays
      valid as long as the frozen network exists and its layers keep their shapes. A call on another stream must wait
      for that one, as with any tensor of PyTorch's. A model that moves to another device takes its frozen network
      along, at the next call.
    - It holds no reference to the model that keeps it alive or hinders anything, and outlives it with the weights that
      it has. A copy or a pickle holds the weights and not the model, as bytes that other processes can be sent, and is
      packed for the instruction set where it is read.

    Raises:
        TypeError: if the input is neither a tensor nor a `numpy.ndarray`, `out` is not of its kind, or the model has
            become one that cannot be frozen.
        RuntimeError: for wrong shapes, dtypes and devices, and for an `out` that cannot be written; before anything is
            written.

    Example:
        >>> import numpy as np
        >>> frozen = freeze(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
        >>> frozen(np.zeros((4, 2), np.float32)).shape
        (4, 1)
        >>> out = torch.empty(1)
        >>> frozen(torch.ones(2), out=out) is out
        True
    """

    _model: "ReferenceType[nn.Module] | None" = None
    _dtype: torch.dtype | None = None
    _inputs: tuple[Any, ...] | None = None

    @property
    def in_features(self) -> int | tuple[int, ...]:
        """Size of the last dimension of the input; of all dimensions but the first together, if they are flattened.

        Of a graph with several inputs a tuple.
        """
        graph = _C.describe_frozen_graph(self)
        return _C.describe_frozen(self)[0][0] if graph is None else _one_or_all(graph[0])

    @property
    def out_features(self) -> int | tuple[int, ...]:
        """Size of the last dimension of the output, before it is given another shape.

        Of a graph with several outputs a tuple.
        """
        graph = _C.describe_frozen_graph(self)
        return _C.describe_frozen(self)[0][-1] if graph is None else _one_or_all(graph[1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the frozen weights and biases take.

        On the CPU panels are filled up with zeros; and bfloat16 and float16 take four bytes where the processor has no
        instructions for their products.
        """
        graph = _C.describe_frozen_graph(self)
        return _C.describe_frozen(self)[-1] if graph is None else graph[-1]

    def __repr__(self) -> str:
        # Debuggers and logs ask for a repr at any time, so an error that a call would raise becomes part of the text.
        try:
            graph = _C.describe_frozen_graph(self)
            if graph is not None:
                return self._graph_repr(*graph)
            sizes, kinds, scalars, dtype, float32_ends, flattens, head, reshapings, device, _ = _C.describe_frozen(self)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(self).__name__}({error})"
        steps = [
            f" -> {size}" if act == IDENTITY else f" -> {size} {act!r}"
            for size, act in zip(sizes[1:], activations_of(kinds, scalars), strict=True)
        ]
        ends = _ends(dtype, float32_ends)
        first = f"{'flatten -> ' if flattens else ''}{sizes[0]}"
        steps += [f" -> {head}"] if head != "none" else []
        steps += [f" -> {name}({', '.join(map(str, numbers))})" for name, numbers in reshapings]
        place = "" if _is_packed(torch.device(device)) else f", {device}"
        return f"{type(self).__name__}({first}{''.join(steps)}, {ends}{place})"

    def _graph_repr(
        self, inputs: list[int], outputs: list[int], networks: int, dtype: str, float32_ends: bool, _: int
    ) -> str:
        count = "1 network" if networks == 1 else f"{networks} networks"
        ends = f"{_one_or_all(inputs)} -> {_one_or_all(outputs)}"
        return f"{type(self).__name__}({ends}, graph of {count}, {_ends(dtype, float32_ends)})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Tensors are pickled as bytes, because torch.multiprocessing would send file descriptors of their memory, which
        # is gone when another process asks for it. Activations are pickled by name, because another version may number
        # kinds otherwise.
        graph = _C.unload_frozen_graph(self)
        if graph is not None:
            networks, recipe, constants, *more = graph
            layers = [(*_raw_layers(w, b), activations_of(kinds, scalars)) for w, b, kinds, scalars in networks]
            return _rebuild_graph, (type(self), layers, recipe, [_raw(constant) for constant in constants], *more)
        weights, biases, kinds, scalars, *rest = _C.unload_frozen(self)
        raw = _raw_layers(weights, biases)
        return _rebuild, (type(self), str(weights[0].device), *raw, activations_of(kinds, scalars), *rest)

    def __copy__(self) -> Self:
        copied = type(self)()
        graph = _C.unload_frozen_graph(self)
        if graph is not None:
            _C.load_frozen_graph(copied, None, *graph)
            return copied
        weights, biases, kinds, scalars, float32_ends, only, flattens, head, reshapings = _C.unload_frozen(self)
        activations = activations_of(kinds, scalars)
        _load(copied, None, weights, biases, activations, float32_ends, only, flattens, head, reshapings)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def refresh(self) -> None:
        """Reads the model again: its modules, modes, and weights.

        Calls do that by themselves after every change that they see.

        Raises:
            RuntimeError: if the model does not exist any more, or this network never had one.
            TypeError: as `freeze`.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> frozen = freeze(model)
            >>> model.weight.data.zero_(), model.bias.data.fill_(3)
            (tensor([[0., 0.]]), tensor([3.]))
            >>> frozen.refresh()
            >>> frozen(torch.ones(2))
            tensor([3.])
        """
        model = self._model() if self._model is not None else None
        if model is None:
            raise RuntimeError("fastmlp: there is no model to refresh from: it does not exist any more, or never did")
        self._follow(model)

    def _follow(self, model: nn.Module) -> None:
        watch, tensors = seen(model, self._inputs)
        self._read(watch, tensors)

    def _reload(self, watch: _C.Watch | None) -> None:
        """Reads the model after a change; called by csrc/python/frozen.cpp.

        Args:
            watch: a new one for the modules that were there before, if they still are.
        """
        model = self._model() if self._model is not None else None
        if model is None:  # it was deleted a moment ago, and what was read of it stays
            return
        tensors = None if watch is None else watch.read()
        if watch is None or tensors is None or not watch.plan.fits(tensors):
            self._follow(model)
        else:
            self._read(watch, tensors)

    def _read(self, watch: _C.Watch, tensors: Tensors) -> None:
        """Fills the network with the tensors that the watch has recorded."""
        plan: Plan | GraphPlan = watch.plan
        chains = plan.networks if isinstance(plan, GraphPlan) else [plan.stages]
        with torch.no_grad():
            networks = [layers_of_stages(stages, tensors) for stages in chains]
            own = networks[0][0].dtype
            for stages, layers in zip(chains, networks, strict=True):
                check_alike(stages[0], layers[0], chains[0][0], networks[0][0])
            dtype = self._dtype or own
            if isinstance(plan, GraphPlan):
                plan.sizes = plan.sizes_of(tensors)
                _load_graph(
                    self,
                    watch,
                    [
                        (
                            [layer.weight.to(dtype) for layer in layers],
                            [layer.bias for layer in layers],
                            [stage.activation for stage in stages],
                        )
                        for stages, layers in zip(chains, networks, strict=True)
                    ],
                    plan.recipe,
                    plan.values(tensors, networks[0][0]),
                    self._dtype is not None,
                    plan.matrices_only,
                )
                return
            (stages,), (layers,) = chains, networks
            _load(
                self,
                watch,
                [layer.weight.to(dtype) for layer in layers],
                [layer.bias for layer in layers],
                [stage.activation for stage in stages],
                self._dtype is not None,
                plan.matrices_only,
                plan.ends.flattens,
                plan.ends.head,
                plan.ends.reshapings,
            )


def _load(
    frozen: FrozenMLP,
    watch: _C.Watch | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[Activation],
    float32_ends: bool,
    matrices_only: bool,
    flattens: bool,
    head: str = "none",
    reshapings: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """Puts a network in place, and the watch of the model that it was read from, in one step."""
    if not weights:
        raise ValueError("fastmlp: a frozen network needs at least one layer, got none")
    kinds, scalars = _numbers_of(activations)
    device = weights[0].device
    packed = _is_packed(device)
    biases = _biases_for(weights, biases, packed)
    if packed:
        _C.load_frozen(
            frozen, watch, weights, biases, kinds, scalars, float32_ends, matrices_only, flattens, head, reshapings
        )
    elif float32_ends:
        raise ValueError(
            f"fastmlp: dtype=torch.bfloat16 is for networks on the CPU, and this one is on {device}; freeze the "
            "model in bfloat16 (model.bfloat16()), input and output included"
        )
    else:
        _C.load_frozen_on_device(
            frozen, watch, weights, biases, kinds, scalars, matrices_only, flattens, head, reshapings
        )


def _biases_for(weights: Sequence[Tensor], biases: Sequence[Tensor | None], packed: bool) -> list[Tensor | None]:
    """Biases in the dtype in which they are added."""
    dtype = weights[0].dtype
    # The kernels of the CPU add biases to sums, which for dtypes of 16 bits are float32.
    of_biases = torch.float32 if packed and dtype.itemsize == 2 else dtype
    return [None if bias is None else bias.to(of_biases) for bias in biases]


#: Of a network the weights, the biases, and the activations.
_Layers: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[Activation]]


def _load_graph(
    frozen: FrozenMLP,
    watch: _C.Watch | None,
    networks: Sequence[_Layers],
    recipe: Recipe,
    constants: Sequence[Tensor],
    float32_ends: bool,
    matrices_only: bool,
) -> None:
    """Puts a graph in place, and the watch of the model that it was read from, in one step."""
    given = [(weights, _biases_for(weights, biases, True), *_numbers_of(acts)) for weights, biases, acts in networks]
    _C.load_frozen_graph(frozen, watch, given, recipe, constants, float32_ends, matrices_only)


def _numbers_of(activations: Sequence[Activation]) -> tuple[list[int], list[float]]:
    """Activations as kinds and scalars."""
    return [act.kind for act in activations], [x for act in activations for x in act.scalars]


def _one_or_all(sizes: Sequence[int]) -> int | tuple[int, ...]:
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def _ends(dtype: str, float32_ends: bool) -> str:
    return f"torch.float32, weights {dtype}" if float32_ends else dtype


# How frozen networks are pickled.

#: A tensor in a pickle: the name of its dtype, its shape, and the bytes of its elements in order.
_Raw: TypeAlias = tuple[str, tuple[int, ...], bytes]


def _raw(tensor: Tensor) -> _Raw:
    own = tensor.cpu().contiguous()
    return str(own.dtype).removeprefix("torch."), tuple(own.shape), ctypes.string_at(own.data_ptr(), own.nbytes)


def _raw_layers(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[list[_Raw], list[_Raw | None]]:
    return [_raw(weight) for weight in weights], [None if bias is None else _raw(bias) for bias in biases]


def _tensor_of(raw: _Raw) -> Tensor:
    name, shape, data = raw
    if name not in _C.dtypes():
        raise ValueError(f"fastmlp: the pickle of a frozen network is damaged: there is no dtype {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    # The sizes are checked before memory is allocated, because a damaged pickle may ask for any amount.
    if any(size < 0 for size in shape) or prod(shape) * dtype.itemsize != len(data):
        raise ValueError(
            f"fastmlp: the pickle of a frozen network is damaged: a tensor of shape {list(shape)} in {name} has "
            f"{len(data)} bytes"
        )
    # The bytes are copied, because torch warns of memory that must not be written. It refuses an empty buffer.
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _check_kind(kind: Any) -> None:
    """Because torch.load calls what rebuilds for any pickle, and it may be given any class and function there."""
    if not (isinstance(kind, type) and issubclass(kind, FrozenMLP)):
        raise TypeError(f"fastmlp: the pickle of a frozen network is damaged: it is to become a {described(kind)}")


def _rebuild(
    kind: type[FrozenMLP],
    device: str,
    weights: list[_Raw],
    biases: list[_Raw | None],
    activations: list[Activation],
    float32_ends: bool,
    matrices_only: bool,
    flattens: bool = False,
    head: str = "none",
    reshapings: Sequence[tuple[str, Sequence[int]]] = (),
) -> FrozenMLP:
    _check_kind(kind)
    obstacle = _C.device_obstacle(str(torch.device(device)))
    if obstacle is not None:
        raise RuntimeError(f"fastmlp: the pickle of a frozen network is for {device}, and {obstacle}")
    frozen = kind()
    own = [_tensor_of(raw).to(device) for raw in weights]
    own_biases = [None if raw is None else _tensor_of(raw).to(device) for raw in biases]
    _load(frozen, None, own, own_biases, activations, float32_ends, matrices_only, flattens, head, reshapings)
    return frozen


def _rebuild_graph(
    kind: type[FrozenMLP],
    layers: list[tuple[list[_Raw], list[_Raw | None], list[Activation]]],
    recipe: Recipe,
    constants: list[_Raw],
    float32_ends: bool,
    matrices_only: bool,
) -> FrozenMLP:
    _check_kind(kind)
    frozen = kind()
    networks: list[_Layers] = [
        ([_tensor_of(raw) for raw in weights], [None if raw is None else _tensor_of(raw) for raw in biases], acts)
        for weights, biases, acts in layers
    ]
    _load_graph(frozen, None, networks, recipe, [_tensor_of(raw) for raw in constants], float32_ends, matrices_only)
    return frozen


def _restore(
    weights: list[Tensor],
    biases: list[Tensor | None],
    activations: list[Activation],
    float32_ends: bool,
    matrices_only: bool,
) -> FrozenMLP:
    """What pickles made before pickles held bytes call: they hold tensors."""
    frozen = FrozenMLP()
    _load(frozen, None, weights, biases, activations, float32_ends, matrices_only, False)
    return frozen


def _is_packed(device: torch.device) -> bool:
    """Whether weights are packed for the device; others have kernels that take them as they are."""
    return device.type in _C.packing_devices()
