"""What a frozen network can be written as: a file of safetensors (frozen_file.py), and a program in C (export_c.py)."""

import os

from fastmlp._load import _C
from fastmlp.activations import activations_of
from fastmlp.export_c import source
from fastmlp.frozen_file import Chain, Graph, Layers, write

__all__ = ["Exports"]


class Exports(_C.Frozen):
    """The methods of `fastmlp.FrozenMLP` that write files."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the network to a file of safetensors, from which `fastmlp.load_frozen` reads it.

        The file holds numbers and a description in JSON. Reading it runs no code of the file, as reading a pickle may.
        It holds the weights and not the model, and is for any processor: weights are packed where it is read. There,
        on a processor with the same instruction set, the network gives the same bits. A file that is there is replaced
        as a whole. Needs the package safetensors (`pip install 'fastmlp[serve]'`).

        Args:
            path: of the file; its name usually ends in `.safetensors`.

        Raises:
            ImportError: without safetensors.
            ValueError: for a network on another device than the CPU, with more than 16,777,216 features in a layer, or
                a graph that keeps more than 4,194,304 numbers of each row.
            OSError: where the file cannot be written.

        Example:
            >>> import tempfile
            >>> from torch import nn
            >>> from fastmlp import freeze, load_frozen
            >>> frozen = freeze(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     frozen.save(f"{folder}/policy.safetensors")
            ...     load_frozen(f"{folder}/policy.safetensors")
            FrozenMLP(10 -> 50 relu -> 1, torch.float32)
        """
        write(path, _state(self, "save"))

    def to_c(self, path: str | os.PathLike[str], name: str = "network") -> None:
        """Writes the network as one self-contained file of C99, for programs without Python.

        It needs no library but that of mathematics (`-lm`) and takes no memory but on the stack; its first lines say
        how many bytes. Compile it with `-O3`, and for the processor that it runs on (`-march=native`): its loops are
        such that compilers make vector instructions of them. It defines

        - `void NAME(const float *input, float *output)`, for one row,
        - `void NAME_batch(const float *input, float *output, size_t rows)`, for rows one after another.

        For float64 they take `double`. A graph with several inputs or outputs takes one pointer for each, inputs
        first, in the order of the model. An input of several dimensions lies as a contiguous tensor does, and outputs
        must not overlap inputs. Any number of threads may call them at once. Results differ from those of the
        frozen network by rounding only.

        Args:
            path: of the file; it is replaced if it is there.
            name: of the function, a name of C.

        Raises:
            ValueError: for a name that C does not allow; for weights in bfloat16 or float16, which C99 has no types
                for; for a layer with no features; for operations that are not written in C; and for a network that
                would take more than 1,048,576 bytes on the stack.
            OSError: where the file cannot be written.

        Example:
            >>> import pathlib, tempfile
            >>> from torch import nn
            >>> from fastmlp import freeze
            >>> frozen = freeze(nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1)))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     frozen.to_c(f"{folder}/policy.c", "policy")
            ...     text = pathlib.Path(folder, "policy.c").read_text()
            >>> print("".join(line for line in text.splitlines(True) if line.startswith("void policy")))
            void policy(const float *input, float *output) {
            void policy_batch(const float *input, float *output, size_t rows) {
            <BLANKLINE>
        """
        text = source(_state(self, "to_c"), name)
        with open(path, "w", encoding="ascii") as file:
            file.write(text)


def _state(frozen: Exports, call: str) -> Chain | Graph:
    """What a frozen network is, at one moment."""
    graph = _C.unload_frozen_graph(frozen)
    if graph is not None:
        networks, recipe, constants, float32_ends, only = graph
        own = [Layers(weights, biases, activations_of(kinds, x)) for weights, biases, kinds, x in networks]
        return Graph(own, recipe, constants, float32_ends, only)
    weights, biases, kinds, scalars, float32_ends, only, flattens, head, reshapings = _C.unload_frozen(frozen)
    device = weights[0].device
    if device.type not in _C.packing_devices():
        raise ValueError(
            f"fastmlp: {call} is for frozen networks on the CPU, and this one is on {device}; freeze a copy of the "
            "model that is there: freeze(copy.deepcopy(model).cpu())"
        )
    layers = Layers(weights, biases, activations_of(kinds, scalars))
    return Chain(layers, float32_ends, only, flattens, head, reshapings)
