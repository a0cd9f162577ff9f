"""What csrc/python/bindings.cpp exports. Private: arguments are described where Python calls them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

class Stack:
    def __init__(self, has_bias: Sequence[bool], activations: Sequence[int], scalars: Sequence[float]) -> None: ...

def forward(stack: Stack, input: Tensor, parameters: Sequence[Tensor], /) -> tuple[Tensor, list[Tensor]]: ...
def infer(stack: Stack, input: Tensor, parameters: Sequence[Tensor], /) -> Tensor: ...
def backward(
    stack: Stack,
    grad: Tensor,
    input: Tensor,
    saved: Sequence[Tensor],
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    /,
) -> list[Tensor | None]: ...
def forward_into(
    stack: Stack,
    input: Tensor,
    parameters: Sequence[Tensor],
    output: Tensor,
    hidden: Sequence[Tensor],
    /,
) -> None: ...
def backward_into(
    stack: Stack,
    grad: Tensor,
    input: Tensor,
    saved: Sequence[Tensor],
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    /,
) -> None: ...
def check_forward(
    stack: Stack,
    input: Tensor,
    parameters: Sequence[Tensor],
    same_dtype: bool,
    names: tuple[str, Sequence[str]] | None,
    /,
) -> None: ...
def try_run(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...], /) -> Tensor | None: ...
def gradient_from_output(kind: int, grad: Tensor, output: Tensor, /) -> Tensor: ...
def with_graph(stack: Stack, input: Tensor, parameters: Sequence[Tensor], output: Tensor, /) -> Tensor: ...
def set_composed_backward(function: Callable[..., Sequence[Tensor | None]], /) -> None: ...
def obstacle(input: Tensor, parameters: tuple[Tensor, ...], /) -> str | None: ...
def devices() -> list[str]: ...
def training_devices() -> list[str]: ...
def packing_devices() -> list[str]: ...
def absent_devices() -> dict[str, str]: ...
def device_obstacle(device: str, /) -> str | None: ...
def register_modules(
    linear: type[nn.Module],
    fused_linear: type[nn.Module],
    dropout: type[nn.Module],
    sequential: type[nn.Module],
    activations: Mapping[type[nn.Module], tuple[str, tuple[str, ...]]],
    kinds: Mapping[str, int],
    forwards: Mapping[type[nn.Module], Callable[..., object]],
    watchers: tuple[Mapping[int, Callable[..., object]], ...],
    /,
) -> None: ...
def set_composed_forward(function: Callable[..., Tensor], /) -> None: ...
def run_children(children: Mapping[str, nn.Module | None], input: Any, /) -> Any: ...
def call_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...
def run_layer(layer: nn.Module, input: Any, /) -> Tensor | None: ...
def rules() -> list[tuple[list[str], bool]]: ...
def step_optimizer(optimizer: Optimizer, rule: int, partly: bool, /) -> list[Tensor] | None: ...
def drop_grads(optimizer: Optimizer, /) -> None: ...
def is_step_watched(optimizer: Optimizer, /) -> bool: ...
def register_optimizer_hooks(hooks: tuple[Mapping[int, Callable[..., object]], ...], /) -> None: ...
def losses() -> list[tuple[str, tuple[str, float, float, str] | None, str | None, str | None]]: ...

class TrainStep:
    waiting: int
    def __init__(
        self,
        links: tuple[nn.Module, ...],
        holders: dict[nn.Module, tuple[Any, ...]],
        loss: nn.Module,
        kind: int,
        optimizer: Optimizer,
        rule: int,
        call: Callable[..., Any],
        forward: Callable[..., Any],
        step: Callable[..., Any] | None,
        zero_grad: Callable[..., Any],
        max_norm: float | None,
        clip_value: float | None,
        accumulate: int,
        keep_grads: bool,
        /,
    ) -> None: ...
    def run(self, input: Tensor, target: Tensor, /) -> Tensor | None: ...

def has_hooks(parameter: Tensor, /) -> bool: ...

class Frozen:
    @overload
    def __call__(self, input: Tensor, out: Tensor | None = None) -> Tensor: ...
    @overload
    def __call__(self, input: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]: ...

class Watch:
    plan: Any
    def __init__(
        self,
        modules: Sequence[tuple[int, str, nn.Module, int, Sequence[str], Sequence[str], Sequence[str]]],
        /,
    ) -> None: ...
    def read(self) -> list[dict[str, Tensor | None]] | None: ...

def load_frozen(
    frozen: Frozen,
    watch: Watch | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    scalars: Sequence[float],
    float32_ends: bool,
    matrices_only: bool,
    /,
) -> None: ...
def load_frozen_on_device(
    frozen: Frozen,
    watch: Watch | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[int],
    scalars: Sequence[float],
    matrices_only: bool,
    /,
) -> None: ...
def unload_frozen(
    frozen: Frozen, /
) -> tuple[list[Tensor], list[Tensor | None], list[int], list[float], bool, bool]: ...
def describe_frozen(frozen: Frozen, /) -> tuple[list[int], list[int], list[float], str, bool, str, int]: ...

# Of each activation its name, its parameters' defaults, whether kernels keep its output for backward, and whether
# gradient_from_output computes its gradient.
def activations() -> list[tuple[str, dict[str, float], bool, bool]]: ...
def instruction_sets() -> list[dict[str, object]]: ...
def dtypes() -> list[str]: ...
def get_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def last_isa() -> str: ...
def decode_features(leaf1_ecx: int, leaf7_ebx: int, leaf7_1_eax: int, xcr0: int, /) -> list[str]: ...
