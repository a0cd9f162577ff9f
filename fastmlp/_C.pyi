"""What csrc/python/bindings.cpp exports. Private: arguments are described where Python calls them."""

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, overload

from numpy.typing import NDArray
from torch import Generator, Tensor, dtype, nn
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
def deriving_devices() -> list[str]: ...
def layers_drop(device: str, scalar_type: dtype, /) -> bool: ...
def packing_devices() -> list[str]: ...
def absent_devices() -> dict[str, str]: ...
def device_obstacle(device: str, /) -> str | None: ...
def register_modules(
    linear: type[nn.Module],
    fused_linear: type[nn.Module],
    dropout: type[nn.Module],
    norm: type[nn.Module],
    sequential: type[nn.Module],
    activations: Mapping[type[nn.Module], tuple[str, tuple[str, ...]]],
    kinds: Mapping[str, int],
    forwards: Mapping[type[nn.Module], Callable[..., object]],
    watchers: tuple[Mapping[int, Callable[..., object]], ...],
    /,
) -> None: ...
def set_composed_forward(function: Callable[..., Tensor], /) -> None: ...
def run_children(children: Mapping[str, nn.Module | tuple[Tensor, Tensor | None] | None], input: Any, /) -> Any: ...
def call_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...
def whole_run(modules: list[nn.Module], /) -> tuple[Any, ...] | None: ...
def run_layer(layer: nn.Module, input: Any, /) -> Tensor | None: ...
def rules() -> list[tuple[list[str], bool]]: ...
def step_optimizer(optimizer: Optimizer, rule: int, partly: bool, /) -> list[Tensor] | None: ...
def drop_grads(optimizer: Optimizer, /) -> None: ...
def is_step_watched(optimizer: Optimizer, /) -> bool: ...
def clip_grad_norm(
    parameters: Tensor | list[Tensor] | tuple[Tensor, ...],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    /,
) -> Tensor | None: ...
def clip_grad_value(parameters: Tensor | list[Tensor] | tuple[Tensor, ...], clip_value: float, /) -> bool: ...
def register_optimizer_hooks(hooks: tuple[Mapping[int, Callable[..., object]], ...], /) -> None: ...
def losses() -> list[tuple[str, tuple[str, float, float, str] | None, str | None, str | None, str | None]]: ...

class TrainStep:
    waiting: int
    def __init__(
        self,
        links: tuple[nn.Module, ...],
        others: dict[nn.Module, tuple[Any, ...]],
        flattens: bool,
        matrices_only: bool,
        head: str,
        reshapings: Sequence[tuple[str, Sequence[int]]],
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
    def run_all(self, inputs: Tensor, targets: Tensor, order: Tensor, rows: int, /) -> Tensor: ...

def has_plain_rows(tensor: Tensor, /) -> bool: ...
def has_hooks(parameter: Tensor, /) -> bool: ...

class Frozen:
    @overload
    def __call__(self, input: Tensor, out: Tensor | None = None) -> Tensor: ...
    @overload
    def __call__(self, input: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]: ...
    # Of a graph with several inputs or outputs.
    @overload
    def __call__(self, *inputs: Any, out: Any = None) -> Any: ...

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
    flattens: bool,
    head: str,
    reshapings: Sequence[tuple[str, Sequence[int]]],
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
    flattens: bool,
    head: str,
    reshapings: Sequence[tuple[str, Sequence[int]]],
    /,
) -> None: ...
def unload_frozen(
    frozen: Frozen, /
) -> tuple[
    list[Tensor],
    list[Tensor | None],
    list[int],
    list[float],
    bool,
    bool,
    bool,
    str,
    list[tuple[str, list[int]]],
]: ...
def load_frozen_graph(
    frozen: Frozen,
    watch: Watch | None,
    networks: Sequence[tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[int], Sequence[float]]],
    recipe: tuple[Sequence[tuple[str, int]], Sequence[tuple[Any, ...]], Sequence[bool]],
    constants: Sequence[Tensor],
    float32_ends: bool,
    matrices_only: bool,
    /,
) -> None: ...
def unload_frozen_graph(
    frozen: Frozen, /
) -> (
    tuple[
        list[tuple[list[Tensor], list[Tensor | None], list[int], list[float]]],
        tuple[list[tuple[str, int]], list[tuple[Any, ...]], list[bool]],
        list[Tensor],
        bool,
        bool,
    ]
    | None
): ...
def describe_frozen_graph(frozen: Frozen, /) -> tuple[list[int], list[int], int, str, bool, int] | None: ...
def describe_frozen(
    frozen: Frozen, /
) -> tuple[list[int], list[int], list[float], str, bool, bool, str, list[tuple[str, list[int]]], str, int]: ...

# Of each activation its name, its parameters' defaults, the parameters that have to be above 0, whether kernels keep
# its output for backward, and whether gradient_from_output computes its gradient.
def activations() -> list[tuple[str, dict[str, float], list[str], bool, bool]]: ...
def instruction_sets() -> list[dict[str, object]]: ...
def dtypes() -> list[str]: ...
def get_isa() -> str: ...
def set_isa(name: str, /) -> None: ...
def last_isa() -> str: ...
def decode_features(leaf1_ecx: int, leaf7_ebx: int, leaf7_1_eax: int, xcr0: int, /) -> list[str]: ...

class Tape:
    def add_memory(self, owner: str, bytes: int, /) -> int: ...
    def add_tensor(
        self, memory: int, like: Tensor, sizes: Sequence[int], strides: Sequence[int], offset: int, /
    ) -> int: ...
    def tensor(self, index: int, /) -> Tensor: ...
    def add_external(
        self,
        memory: int,
        like: Tensor,
        argument: int,
        grad_of: int,
        held: bool,
        written: bool,
        counted: bool,
        starts_with_grad: bool | None,
    ) -> int: ...
    def add_call(
        self,
        name: str,
        overload: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        results: Sequence[int],
        place: str,
        /,
    ) -> None: ...
    def add_elementwise(
        self,
        inputs: Sequence[Tensor],
        instructions: Sequence[tuple[str, Sequence[int], Sequence[float]]],
        outputs: Sequence[tuple[Tensor, int, str, float]],
        place: str,
        /,
    ) -> None: ...
    def add_grad(self, external: int, tensor: int, /) -> None: ...
    def add_check(self, tensor: int, expected: float, error: str, /) -> None: ...
    def add_stop(self, place: str, /) -> None: ...
    def add_product(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        activation: str,
        scalars: Sequence[float],
        output: Tensor,
        pre_activation: Tensor | None,
        row_sums: Tensor | None,
        place: str,
        /,
    ) -> None: ...
    def add_bernoulli(self, tensor: Tensor, p: float, generator: Generator | None, place: str, /) -> None: ...
    def add_layer_norm(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        output: Tensor,
        mean: Tensor,
        rstd: Tensor,
        place: str,
        /,
    ) -> None: ...
    def add_layer_norm_backward(
        self,
        grad: Tensor,
        input: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        grad_input: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        place: str,
        /,
    ) -> None: ...
    def add_batch_norm(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_variance: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        output: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        place: str,
        /,
    ) -> None: ...
    def add_batch_norm_backward(
        self,
        grad: Tensor,
        input: Tensor,
        mean: Tensor,
        rstd: Tensor | None,
        running_variance: Tensor | None,
        eps: float,
        weight: Tensor | None,
        grad_input: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        place: str,
        /,
    ) -> None: ...
    def add_softmax(self, input: Tensor, output: Tensor, log: bool, place: str, /) -> None: ...
    def add_softmax_backward(
        self, grad: Tensor, output: Tensor, grad_input: Tensor, log: bool, place: str, /
    ) -> None: ...
    def add_gather(self, input: Tensor, index: Tensor, output: Tensor, place: str, /) -> None: ...
    def add_scatter(
        self, before: Tensor | None, index: Tensor, source: Tensor, output: Tensor, adds: bool, place: str, /
    ) -> None: ...
    def add_row_max(self, input: Tensor, values: Tensor | None, indices: Tensor | None, place: str, /) -> None: ...
    def add_take_rows(self, table: Tensor, index: Tensor, output: Tensor, operation: str, place: str, /) -> None: ...
    def add_embedding_backward(
        self, source: Tensor, index: Tensor, skipped: int, output: Tensor, place: str, /
    ) -> None: ...
    def add_nll_loss(
        self, input: Tensor, target: Tensor, ignored: int, mean: bool, loss: Tensor, total: Tensor, place: str, /
    ) -> None: ...
    def add_nll_loss_backward(
        self,
        grad: Tensor,
        target: Tensor,
        total: Tensor,
        ignored: int,
        mean: bool,
        grad_input: Tensor,
        place: str,
        /,
    ) -> None: ...
    def finish(
        self, lifetimes: Sequence[tuple[int, int]], results: Sequence[tuple[int, int, bool, bool]], /
    ) -> None: ...
    def measure_each(self, replays: int, /) -> None: ...
    def times(self) -> list[tuple[str, str, int]]: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def own_bytes(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def direct_calls(self) -> int: ...

class Surroundings:
    def add_dict(self, dict: dict[Any, Any], modes: Sequence[int], /) -> None: ...
    def add_item(self, dict: dict[Any, Any], key: Any, mode: int, /) -> None: ...
    def add_sequence(self, list_or_tuple: Sequence[Any], modes: Sequence[int], /) -> None: ...
    def add_cell(self, cell: Any, mode: int, /) -> None: ...
    def add_attribute(self, owner: Any, name: str, mode: int, /) -> None: ...
    def add_hooks(self, tensor: Tensor, /) -> None: ...
    def add_size(self, container: Sized, /) -> None: ...
    def changed(self) -> int: ...

class Signature:
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> None: ...
    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> bool: ...
    @property
    def tensors(self) -> list[Tensor]: ...
    def forget_tensors(self) -> None: ...
    @property
    def objects(self) -> list[Any]: ...
    @property
    def borrowed(self) -> list[Any]: ...
    def pin(self, tensors: Sequence[Tensor], /) -> None: ...

class Recordings:
    alive: dict[int, Any]
    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any], otherwise: Any, /) -> Any: ...
    def add(
        self,
        tape: Tape,
        call: Signature,
        returned: Signature,
        surroundings: Surroundings,
        stops: Sequence[tuple[Optimizer, Any, int]],
        /,
    ) -> int: ...
    def ids(self) -> list[int]: ...
    def __len__(self) -> int: ...
    @property
    def replays(self) -> int: ...

def elementwise_operations() -> dict[str, tuple[int, int]]: ...
def run_elementwise(
    inputs: Sequence[Tensor],
    instructions: Sequence[tuple[str, Sequence[int], Sequence[float]]],
    outputs: Sequence[tuple[Tensor, int, str, float]],
    /,
) -> None: ...
def multiply(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str,
    scalars: Sequence[float],
    output: Tensor,
    pre_activation: Tensor | None,
    row_sums: Tensor | None,
    /,
) -> None: ...
def bernoulli_(tensor: Tensor, p: float, generator: Generator | None, /) -> None: ...

# Of more columns a row is no narrow one: for torch's kernels, which are faster then, and for ours at all.
def softmax_columns() -> int: ...

most_softmax_columns: int

def draws_as_torch() -> bool: ...
def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    /,
) -> None: ...
def layer_norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    /,
) -> None: ...
def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    output: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    /,
) -> None: ...
def batch_norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor | None,
    running_variance: Tensor | None,
    eps: float,
    weight: Tensor | None,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    /,
) -> None: ...
def softmax(input: Tensor, output: Tensor, log: bool, /) -> None: ...
def softmax_backward(grad: Tensor, output: Tensor, grad_input: Tensor, log: bool, /) -> None: ...
def gather(input: Tensor, index: Tensor, output: Tensor, /) -> None: ...
def scatter(before: Tensor | None, index: Tensor, source: Tensor, output: Tensor, adds: bool, /) -> None: ...
def row_max(input: Tensor, values: Tensor | None, indices: Tensor | None, /) -> None: ...
def take_rows(table: Tensor, index: Tensor, output: Tensor, operation: str, /) -> None: ...
def embedding_backward(source: Tensor, index: Tensor, skipped: int, output: Tensor, /) -> None: ...
def nll_loss(input: Tensor, target: Tensor, ignored: int, mean: bool, loss: Tensor, total: Tensor, /) -> None: ...
def nll_loss_backward(
    grad: Tensor, target: Tensor, total: Tensor, ignored: int, mean: bool, grad_input: Tensor, /
) -> None: ...
def wrapped_number(number: complex, /) -> Tensor: ...
def no_mode_is_active() -> bool: ...
