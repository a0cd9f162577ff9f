"""Frozen networks from files, and within modules and `torch.compile`.

frozen.py makes them and is called by everybody else; exports.py writes the files that `load_frozen` reads. Within a
compiled graph a frozen network is the operator `fastmlp::frozen`, which is given the network by a key, because
operators take no objects.
"""

import math
import os
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from fastmlp import activations, frozen
from fastmlp._errors import described
from fastmlp._load import _C
from fastmlp.frozen import FrozenMLP
from fastmlp.frozen_checks import Checks
from fastmlp.frozen_file import Chain, read

__all__ = ["FrozenModule", "load_frozen"]

# So that torch.load, which runs by default nothing but what is known to be harmless, reads pickles of frozen networks:
# these make networks and activations of what they are given, and check it.
torch.serialization.add_safe_globals([FrozenMLP, frozen._rebuild, frozen._rebuild_graph, activations._rebuild])


def load_frozen(path: str | os.PathLike[str]) -> FrozenMLP:
    """A frozen network from a file that `FrozenMLP.save` wrote.

    The file may come from a stranger: it holds no code, and everything that it says is checked before it is used. The
    network is on the CPU, has no model to follow, and is packed for the instruction set that is chosen now. With the
    same instruction set it gives the same bits as the network that was saved. Needs the package safetensors
    (`pip install 'fastmlp[serve]'`).

    Args:
        path: of the file.

    Raises:
        ValueError: for a file that is damaged, that another program wrote, or a later version of fastmlp.
        OSError: for a file that cannot be read.
        ImportError: without safetensors.

    Example:
        >>> import tempfile
        >>> from fastmlp import freeze
        >>> frozen = freeze(nn.Linear(2, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     frozen.save(f"{folder}/layer.safetensors")
        ...     loaded = load_frozen(f"{folder}/layer.safetensors")
        >>> torch.equal(loaded(torch.ones(3, 2)), frozen(torch.ones(3, 2)))
        True
    """
    saved, loaded = read(path), FrozenMLP()
    try:
        if isinstance(saved, Chain):
            ends = saved.float32_ends, saved.matrices_only, saved.flattens
            frozen._load(loaded, None, *saved.layers, *ends, saved.head, saved.reshapings)
        else:
            both = saved.float32_ends, saved.matrices_only
            frozen._load_graph(loaded, None, saved.networks, saved.recipe, saved.constants, *both)
    except (ValueError, TypeError, RuntimeError) as error:
        Checks(os.fspath(path)).fail(str(error).removeprefix("fastmlp: "))
    return loaded


class FrozenModule(nn.Module):
    """A frozen network as a module: for models that it is a part of, and for `torch.compile`.

    It has no parameters, so that `state_dict()` and optimizers know nothing of it, and `to()` and `train()` change
    nothing: input and output have the dtype of the network. A pickle or a copy holds the weights. In code that
    `torch.compile` or `torch.export` traces it is one operator, so graphs do not break there; a program that was
    exported finds the network as long as it exists in the same process. It has no gradients.

    Args:
        network: what `freeze` or `load_frozen` returned.

    Shape:
        As the network: for a chain of layers input (*, in_features), output (*, out_features).

    Raises:
        TypeError: if the network is something else.

    Example:
        >>> from fastmlp import freeze
        >>> class Policy(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = FrozenModule(freeze(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))))
        ...     def forward(self, x):
        ...         return self.body(x).argmax(-1)
        >>> Policy()
        Policy(
          (body): FrozenModule(4 -> 8 tanh -> 2, torch.float32)
        )
        >>> Policy()(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(self, network: FrozenMLP) -> None:
        if not isinstance(network, FrozenMLP):
            raise TypeError(
                f"fastmlp: network must be a fastmlp.FrozenMLP, got {described(network)}; fastmlp.freeze makes one of "
                "a model"
            )
        super().__init__()
        self.network = network
        self._key = _registered(network)

    def forward(self, *inputs: Tensor) -> Any:
        """What the network returns."""
        if not torch.compiler.is_compiling():
            return self.network(*inputs)
        outputs = torch.ops.fastmlp.frozen(inputs, self._key)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def extra_repr(self) -> str:
        """What the network is."""
        return repr(self.network).removeprefix(f"{type(self.network).__name__}(").removesuffix(")")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._key = _registered(self.network)


class _Form(NamedTuple):
    """What the shapes of a network's outputs follow from.

    Attributes:
        widths: features of each output.
        squeezed: of each output, whether it has no dimension of features.
        flattens: whether all dimensions of the input but the first are one.
        reshapings: calls that give the output another shape.
    """

    widths: Sequence[int]
    squeezed: Sequence[bool]
    flattens: bool
    reshapings: Sequence[tuple[str, Sequence[int]]]

    def rows(self, first: Tensor) -> Sequence[int]:
        """The dimensions of rows, of the first input."""
        return first.shape[:1] if self.flattens else first.shape[:-1]


#: The networks that operators may be asked for.
_NETWORKS: WeakValueDictionary[str, FrozenMLP] = WeakValueDictionary()
#: Read when they were registered, because what asks for shapes runs within modes in which models cannot be read.
_FORMS: WeakKeyDictionary[FrozenMLP, _Form] = WeakKeyDictionary()


def _registered(network: FrozenMLP) -> str:
    """A key that no other network has in any process, because what compilers make may be kept and used in others."""
    graph = _C.unload_frozen_graph(network)
    if graph is not None:
        memories, _, squeezed = graph[1]
        form = _Form([size for kind, size in memories if kind == "output"], squeezed, False, ())
    else:
        sizes, _, _, _, _, flattens, _, reshapings, *_ = _C.describe_frozen(network)
        form = _Form(sizes[-1:], [False], flattens, reshapings)
    key = uuid.uuid4().hex
    _NETWORKS[key], _FORMS[network] = network, form
    return key


def _network_of(key: str) -> FrozenMLP:
    found = _NETWORKS.get(key)
    if found is None:
        raise RuntimeError(
            "fastmlp: the frozen network of a compiled or exported program does not exist any more; compile or export "
            "the model again in this process, and keep it as long as the program"
        )
    return found


@torch.library.custom_op("fastmlp::frozen", mutates_args=())
def _frozen(inputs: Sequence[Tensor], key: str) -> list[Tensor]:
    network = _network_of(key)
    outputs = network(*(each.detach() for each in inputs))
    found, form = list(outputs) if isinstance(outputs, tuple) else [outputs], _FORMS[network]
    rows = math.prod(form.rows(inputs[0]))
    if [each.numel() for each in found] != [rows * width for width in form.widths]:
        raise RuntimeError(
            "fastmlp: the model of a frozen network has got layers of other sizes since the network became a "
            "FrozenModule; make a new FrozenModule, and compile it"
        )
    return found


@_frozen.register_fake
def _(inputs: Sequence[Tensor], key: str) -> list[Tensor]:
    first, form = inputs[0], _FORMS[_network_of(key)]
    rows = form.rows(first)
    outputs = [
        first.new_empty(rows if squeezed else (*rows, width))
        for width, squeezed in zip(form.widths, form.squeezed, strict=True)
    ]
    for name, numbers in form.reshapings:
        # Of unflatten the first number is the dimension, and of view all are sizes.
        arguments = (numbers[0], numbers[1:]) if name == "unflatten" else (numbers,) if name == "view" else numbers
        outputs = [getattr(output, name)(*arguments).contiguous() for output in outputs]
    return outputs


def _refuse_gradients(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "fastmlp: a frozen network has no gradients; compute its output under torch.no_grad(), or train the model that "
        "it was made of"
    )


_frozen.register_autograd(_refuse_gradients)
