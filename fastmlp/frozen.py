"""Networks for serving: weights packed once, and one call of C++ between the caller and the products."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from fastmlp._load import _C
from fastmlp.activations import IDENTITY, Activation, resolve
from fastmlp.chain import Link, links
from fastmlp.modules import Linear

__all__ = ["FrozenMLP", "freeze"]

#: Position of the parent, name in it, module, number of children, names of parameters and of buffers.
_Watched: TypeAlias = tuple[int, str, nn.Module, int, Sequence[str], Sequence[str]]


def freeze(model: nn.Module, *, dtype: torch.dtype | None = None) -> "FrozenMLP":
    """A network that computes what the model does in eval mode, for serving, with little overhead.

    It takes what is one chain of layers: a `fastmlp.Sequential`, `MLP` or `Linear`, a `torch.nn.Sequential` or
    `Linear`, nested ones, and any module that `convert(model, trace=True)` would record as one chain. `BatchNorm1d` is
    folded into the layer before or after it, computed in float64; `Dropout`, `AlphaDropout` and `Identity` vanish.

    The model stays as it is. The frozen network follows it as long as it exists; see `FrozenMLP`.

    Args:
        model: what to freeze. Its parameters are of one dtype, float32, float64, bfloat16 or float16, which is also
            the dtype of input and output, and on one device: the CPU, or a GPU if the build has CUDA kernels.
        dtype: None, or torch.bfloat16 for a network with weights in bfloat16 whose input and output are float32. The
            weights and the input of each layer are rounded to bfloat16 (to nearest, ties to even), and sums, biases
            and activations are computed in float32; the output is not rounded. On the CPU only: the kernels of a GPU
            round what they store to the dtype of the weights.

    Raises:
        TypeError: naming the module and the reason, if the model cannot be frozen: if it is not one chain of layers,
            each with at most one activation, or has hooks, or is in training mode with a `BatchNorm1d` or `Dropout`.
        ValueError: for another dtype, or torch.bfloat16 for a model that is not on the CPU.
        RuntimeError: for parameters of other dtypes, of several, or on devices without kernels.

    Example:
        >>> frozen = freeze(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)))
        >>> frozen
        FrozenMLP(10 -> 50 relu -> 1, torch.float32)
        >>> frozen(torch.zeros(3, 10)).shape
        torch.Size([3, 1])
    """
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype must be None or torch.bfloat16, got {dtype}")
    frozen = FrozenMLP()
    frozen._follow(model, dtype)
    return frozen


class FrozenMLP(_C.Frozen):
    """A network that was frozen by `freeze`; it has no parameters and no gradients.

    `frozen(input, out=None)` takes a tensor of any strides, on the device that the model is on, or on the CPU a
    `numpy.ndarray`, which is read where it is, and returns one of the same kind. Any number of threads may call it at
    once.

    - Shapes are those of the model: input (*, in_features), output (*, out_features); with a `BatchNorm1d` exactly two
      dimensions. `out` is of the output's shape and dtype, contiguous, and does not overlap the input; it is returned.
    - Each row of the output has the same bits whatever the batch that it came in, however it lies in memory, and
      however many threads compute it. They do depend on the instruction set, which is the one that `set_isa` chose
      last: the weights are packed again for another one. Of a GPU none of that is promised.
    - An input that requires grad is refused while gradients are recorded, as by `Tensor.numpy`: pass
      `input.detach()`, or call under `torch.no_grad()`.
    - Autocast has no effect. In transforms of `torch.func`, under dispatch modes, and with subclasses of
      tensors, it raises: call the model. `torch.compile` breaks its graph at the call.
    - As long as the model exists, each call looks whether its parameters and buffers were changed (by version
      counters and data pointers) or replaced, or modules were exchanged, and then reads them again before it computes.
      Modes are only looked at where modules were exchanged. What counts no version is not seen: writes through `.data`
      or `detach().numpy()`, a step of a `torch.optim` optimizer with `fused=True`, writes to tensors made in inference
      mode, to attributes of activations, and to whatever else a forward reads, which is recorded once: call
      `refresh()`.
    - On a GPU it holds a copy of the parameters, biases rounded to the dtype of the weights, which goes to the same
      kernels as the model's. They run on the current stream and wait for nothing; the copy is written on the stream of
      the call that reads the model, and again into the same memory after a change, so that a captured CUDA graph stays
      valid as long as the frozen network exists and its layers keep their shapes. A call on another stream must wait
      for that one, as with any tensor of PyTorch's. A model that moves to another device takes its frozen network
      along, at the next call.
    - It holds no strong reference to the model, and outlives it with the weights that it has. A copy or a pickle holds
      the weights and not the model, and is packed for the instruction set where it is read.

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

    def __init__(self) -> None:
        self._model: ReferenceType[nn.Module] | None = None
        self._dtype: torch.dtype | None = None
        self._stages: list[_Stage] = []
        self._text = ""
        self._sizes = [0, 0]
        self._activations: list[Activation] = []

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return self._sizes[0]

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return self._sizes[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the frozen weights and biases take.

        On the CPU panels are filled up with zeros; and bfloat16 and float16 take four bytes where the processor has no
        instructions for their products.
        """
        return _C.frozen_bytes(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._text})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Activations by name: kinds may be numbered otherwise where this is read.
        weights, biases, _, _, *rest = _C.unload_frozen(self)
        return _restore, (weights, biases, self._activations, *rest)

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
        self._follow(model, self._dtype)

    def _follow(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        chain = links(model)
        stages = _stages_of(chain)
        # Watched before they are read, so that no change falls between.
        _C.watch_frozen(self, _watched(model, chain))
        self._model, self._dtype, self._stages = ref(model), dtype, stages
        self._read()

    def _reload(self, modules: bool) -> None:
        """What C++ calls when the model has changed: its modules, or tensors only."""
        model = self._model() if self._model is not None else None
        if model is not None and modules:
            self._follow(model, self._dtype)
        else:
            self._read()

    def _read(self) -> None:
        with torch.no_grad():
            layers = [stage.layer() for stage in self._stages]
            first = self._stages[0].name or "model"
            for stage, layer in zip(self._stages, layers, strict=True):
                if layer.dtype != layers[0].dtype:
                    expected = f"expected {layers[0].dtype}, that of {first}"
                    raise RuntimeError(f"fastmlp: {stage.name} has dtype {layer.dtype}, {expected}")
                if layer.weight.device != layers[0].weight.device:
                    expected = f"expected {layers[0].weight.device}, where {first} is"
                    raise RuntimeError(f"fastmlp: {stage.name} is on {layer.weight.device}, {expected}")
            dtype = self._dtype or layers[0].dtype
            self._put(
                [layer.weight.to(dtype) for layer in layers],
                [layer.bias for layer in layers],
                [stage.activation for stage in self._stages],
                self._dtype is not None,
                any(stage.before or stage.after for stage in self._stages),
            )

    def _put(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        activations: list[Activation],
        float32_ends: bool,
        matrices_only: bool,
    ) -> None:
        kinds, scalars = [act.kind for act in activations], [x for act in activations for x in act.scalars]
        device, dtype = weights[0].device, weights[0].dtype
        packed = _is_packed(device)
        # The CPU's kernels add biases in the dtype of sums.
        of_biases = torch.float32 if packed and dtype.itemsize == 2 else dtype
        biases = [None if bias is None else bias.to(of_biases) for bias in biases]
        if packed:
            _C.load_frozen(self, weights, biases, kinds, scalars, float32_ends, matrices_only)
        elif float32_ends:
            raise ValueError(
                f"fastmlp: dtype=torch.bfloat16 is for networks on the CPU, and this one is on {device}; freeze the "
                "model in bfloat16 (model.bfloat16()), input and output included"
            )
        else:
            _C.load_frozen_on_device(self, weights, biases, kinds, scalars, matrices_only)
        self._activations = activations
        self._sizes = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
        steps = [
            f" -> {size}" if act == IDENTITY else f" -> {size} {act!r}"
            for size, act in zip(self._sizes[1:], activations, strict=True)
        ]
        ends = f"torch.float32, weights {dtype}" if float32_ends else f"{dtype}"
        self._text = f"{self._sizes[0]}{''.join(steps)}, {ends}{'' if device.type == 'cpu' else f', {device}'}"


def _restore(
    weights: list[Tensor],
    biases: list[Tensor | None],
    activations: list[Activation],
    float32_ends: bool,
    matrices_only: bool,
) -> FrozenMLP:
    frozen = FrozenMLP()
    frozen._put(weights, biases, activations, float32_ends, matrices_only)
    return frozen


def _is_packed(device: torch.device) -> bool:
    """Whether weights are packed for the device; others have kernels that take them as they are."""
    return device.type == "cpu"


# What a chain is frozen as.


class _Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype  # of the weight before anything was folded into it


@dataclass
class _Stage:
    """A layer and what is folded into it. References are weak: the model may go."""

    name: str
    linear: "ReferenceType[nn.Module]"
    activation: Activation
    before: "list[ReferenceType[nn.Module]]"
    after: "list[ReferenceType[nn.Module]]" = field(default_factory=list)

    def layer(self) -> _Layer:
        """Weight and bias as they are now."""
        linear = _alive(self.linear)
        if not {"weight", "bias"} <= linear._parameters.keys():
            raise TypeError(f"fastmlp: the parameters of {self.name} are not where torch.nn.Linear keeps them")
        weight = _tensor(f"{self.name}.weight", linear._parameters["weight"])
        own = linear._parameters["bias"]
        bias = None if own is None else _tensor(f"{self.name}.bias", own, weight.device)
        dtype = weight.dtype
        if str(dtype).removeprefix("torch.") not in _C.dtypes():
            raise RuntimeError(
                f"fastmlp: {self.name}.weight has dtype {dtype}, expected one of {', '.join(_C.dtypes())}"
            )
        for norm in reversed(self.before):
            scale, shift = _affine(_alive(norm), self.name, weight.device)
            weight = weight.double()
            bias = weight @ shift if bias is None else bias.double() + weight @ shift
            weight = weight * scale
        for norm in self.after:
            scale, shift = _affine(_alive(norm), self.name, weight.device)
            weight = weight.double() * scale[:, None]
            bias = shift if bias is None else bias.double() * scale + shift
        return _Layer(weight, bias, dtype)


def _alive(reference: "ReferenceType[nn.Module]") -> nn.Module:
    module = reference()
    if module is None:
        raise RuntimeError("fastmlp: a module of the model that was frozen does not exist any more")
    return module


def _tensor(name: str, tensor: Tensor | None, device: torch.device | None = None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fastmlp: {name} is a {type(tensor).__name__}, expected a tensor")
    obstacle = _C.device_obstacle(str(tensor.device))
    if obstacle is not None:
        raise RuntimeError(f"fastmlp: {name} is on {tensor.device}, and {obstacle}")
    if device is not None and tensor.device != device:
        raise RuntimeError(f"fastmlp: {name} is on {tensor.device}, expected {device}, where the layer's weight is")
    reason = _C.obstacle(tensor, ())
    if reason is not None and tensor.is_floating_point():
        raise RuntimeError(f"fastmlp: {name} cannot be frozen: {reason}")
    return tensor.detach()


def _affine(norm: nn.Module, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand of each feature: (x - mean) / sqrt(var + eps) * weight + bias."""
    name = f"the BatchNorm1d beside {layer}"
    mean = _tensor(f"running_mean of {name}", norm._buffers["running_mean"], device).double()
    var = _tensor(f"running_var of {name}", norm._buffers["running_var"], device).double()
    scale = (var + cast(nn.BatchNorm1d, norm).eps).rsqrt()
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if weight is not None:
        scale = scale * _tensor(f"weight of {name}", weight, device).double()
    shift = -mean * scale
    return scale, shift if bias is None else shift + _tensor(f"bias of {name}", bias, device).double()


def _stages_of(chain: Sequence[Link]) -> list[_Stage]:
    stages: list[_Stage] = []
    norms: list[Link] = []  # for the next layer
    for link in chain:
        module = link.module
        stage = stages[-1] if stages else None
        if isinstance(module, nn.Linear):
            activation = module.activation if isinstance(module, Linear) else IDENTITY
            stages.append(_Stage(link.name, ref(module), activation, [ref(norm.module) for norm in norms]))
            norms = []
        elif isinstance(module, nn.BatchNorm1d):
            if module.training:
                _refuse(link, "it is in training mode; call model.eval() first")
            if module.running_mean is None or module.running_var is None:
                _refuse(link, "it has no running statistics")
            if stage is not None and stage.activation == IDENTITY and not norms:
                stage.after.append(ref(module))
            else:
                norms.append(link)
        elif isinstance(module, (nn.Dropout, nn.AlphaDropout)):
            if module.training and module.p > 0:
                _refuse(link, "it is in training mode; call model.eval() first")
        elif resolve(module) != IDENTITY:
            if stage is None:
                _refuse(link, "no layer precedes it")
            if norms:
                _refuse(norms[0], "there is no layer between it and an activation, nor after it")
            if stage.activation != IDENTITY:
                _refuse(link, "the layer before it has an activation already")
            stage.activation = resolve(module)
    if norms:
        _refuse(norms[0], "an activation precedes it and no layer follows")
    if not stages:
        raise TypeError("fastmlp: model cannot be frozen: it has no layer")
    return stages


def _refuse(link: Link, reason: str) -> NoReturn:
    raise TypeError(f"fastmlp: {link.name or 'model'} ({type(link.module).__name__}) cannot be frozen: {reason}")


def _watched(model: nn.Module, chain: Sequence[Link]) -> list[_Watched]:
    """The modules of a chain and those that hold them, as `_C.watch_frozen` takes them."""
    places: dict[str, int] = {}
    found: list[_Watched] = []

    def add(name: str, module: nn.Module, leaf: bool) -> int:
        if name not in places:
            parent, _, key = name.rpartition(".")
            above = add(parent, model.get_submodule(parent), False) if name else 0
            parameters = ("weight", "bias") if isinstance(module, (nn.Linear, nn.BatchNorm1d)) else ()
            # Training changes the statistics without counting their versions, but counts its batches.
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            buffers = statistics if isinstance(module, nn.BatchNorm1d) else ()
            places[name] = len(found)
            found.append((above, key, module, -1 if leaf else len(module._modules), parameters, buffers))
        return places[name]

    modules = dict(model.named_modules(remove_duplicate=False))
    add("", model, model is chain[0].module)
    for link in chain:
        # Activations that are called as functions are in no model.
        if modules.get(link.name) is link.module:
            add(link.name, link.module, True)
    return found
