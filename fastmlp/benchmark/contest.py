"""The contenders for one model: inference and training steps, each compared with the model as it is, then timed."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from statistics import median, quantiles
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp.benchmark import peers
from fastmlp.benchmark.timing import Effort, race, spread

__all__ = ["INFERENCE", "TRAINING", "YARDSTICK", "Contest", "Refusal", "Row", "WrongResult"]

INFERENCE, TRAINING = "inference", "training step"
#: The contender that all others are compared with.
YARDSTICK = "as it is"
#: Whose wrong result is an error; that of a peer is a reason to leave it out.
OURS = ("convert", "trace", "frozen", "fastmlp.optim", "TrainStep", "capture")
#: How many times the error may be that rounding alone makes, as moving parameters and inputs shows.
MOST_ERROR = 16.0
#: How often rounding is imitated: parameters and input are moved at random by a unit in the last place.
MOVES = 4
#: Training steps whose losses are compared.
STEPS = 3

#: A call that is timed.
Call: TypeAlias = Callable[[], Any]
#: What builds a contender: a call, and what turns its result into tensors. It raises `Refused` if it cannot be built.
Built: TypeAlias = tuple[Call, Callable[[Any], list[Tensor]]]


class WrongResult(Exception):
    """A contender of ours that does not compute the network has no speed."""


class Refused(Exception):
    """A contender cannot run a model. The text says why."""


@dataclass(frozen=True)
class Row:
    """One contender on one task and batch.

    Attributes:
        task: `INFERENCE` or `TRAINING`.
        batch: rows of the input.
        contender: its name.
        microseconds: median time of a call.
        low: first quartile of the same.
        high: third quartile of the same.
        speedup: median over the rounds of the yardstick's time divided by this contender's.
        spread: how far apart the quartiles of the time are, as a part of the median.
    """

    task: str
    batch: int
    contender: str
    microseconds: float
    low: float
    high: float
    speedup: float
    spread: float


@dataclass(frozen=True)
class Refusal:
    """One contender that cannot run a task, and why."""

    task: str
    batch: int
    contender: str
    reason: str


@dataclass(frozen=True)
class Contest:
    """What is measured.

    Attributes:
        model: of any class; it stays as it is.
        inputs: the forward's arguments.
        target: what the loss compares the output with.
        loss_fn: the loss.
        optimizer: a class of `torch.optim`.
        peers: whether other libraries take part.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    target: Tensor
    loss_fn: Any
    optimizer: type[torch.optim.Optimizer]
    peers: bool

    @property
    def batch(self) -> int:
        """Rows of the input."""
        return self.inputs[0].shape[0] if self.inputs[0].dim() > 1 else 1

    def measured(self, effort: Effort) -> Iterator[Row | Refusal]:
        """Yields a row or a refusal for each contender, inference first.

        Raises:
            WrongResult: if a result of fastmlp is further from that of the model than rounding explains.
        """
        for task, builders in ((INFERENCE, self._inference()), (TRAINING, self._training())):
            calls: dict[str, Call] = {}
            try:
                truth = self._truth(task)
            except Refused as refused:
                yield Refusal(task, self.batch, "all", str(refused))
                continue
            for name, builder in builders.items():
                try:
                    calls[name] = self._checked(task, name, builder, *truth)
                except Refused as refused:
                    yield Refusal(task, self.batch, name, str(refused))
            samples = race(calls, effort)
            for name, times in samples.items():
                low, _, high = quantiles(times, n=4, method="inclusive")
                ratios = [theirs / own for theirs, own in zip(samples[YARDSTICK], times, strict=True)]
                figures = (1e6 * median(times), 1e6 * low, 1e6 * high, median(ratios), spread(times))
                yield Row(task, self.batch, name, *figures)

    def _checked(
        self, task: str, name: str, builder: Callable[[], Built], expected: list[Tensor], allowed: float
    ) -> Call:
        """The call of a contender whose result is right."""
        steps = 1 if task == INFERENCE else STEPS
        torch.manual_seed(0)
        call, tensors = builder()
        torch.manual_seed(0)
        found = [tensor.double() for _ in range(steps) for tensor in tensors(call())]
        error = distance(found, expected)
        if not error <= allowed:
            text = f"its result is {error:.1e} from that of the model as it is, and rounding explains {allowed:.1e}"
            if name in OURS:
                raise WrongResult(f"{name} at batch {self.batch}, {task}: {text}")
            raise Refused(text)
        return call

    def _truth(self, task: str) -> tuple[list[Tensor], float]:
        """The results of the model as it is, and how far from them others may be."""
        run = self._outputs if task == INFERENCE else self._losses
        expected = run(False)
        moved = [distance(run(True, seed), expected) for seed in range(MOVES)]
        least = torch.finfo(self.inputs[0].dtype).eps if self.inputs[0].is_floating_point() else 1e-7
        return expected, MOST_ERROR * max(*moved, least)

    def _outputs(self, moves: bool, seed: int = 0) -> list[Tensor]:
        model, inputs = self._moved(moves, seed)
        torch.manual_seed(0)
        with torch.no_grad():
            return [tensor.double() for tensor in _tensors(model.eval()(*inputs))]

    def _losses(self, moves: bool, seed: int = 0) -> list[Tensor]:
        model, inputs = self._moved(moves, seed)
        model.train()
        step = self._loop(model, self._optimizer(model, torch.optim), inputs)
        torch.manual_seed(0)
        return [step().detach().double() for _ in range(STEPS)]

    def _moved(self, moves: bool, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A copy of model and inputs, moved by as much as rounding does if `moves`."""
        model, inputs = copy.deepcopy((self.model, self.inputs))
        if moves:
            torch.manual_seed(1 + seed)
            with torch.no_grad():
                for tensor in (*model.parameters(), *inputs):
                    if tensor.is_floating_point():
                        tensor.mul_(1 + torch.finfo(tensor.dtype).eps * (2 * torch.rand_like(tensor) - 1).sign())
        return model, inputs

    # Inference.

    def _inference(self) -> dict[str, Callable[[], Built]]:
        found: dict[str, Callable[[], Built]] = {
            YARDSTICK: lambda: self._called(copy.deepcopy(self.model)),
            "convert": lambda: self._called(fastmlp.convert(copy.deepcopy(self.model))),
            "trace": self._traced,
            "frozen": self._frozen,
        }
        if self.peers:
            found |= {"onnxruntime": self._onnx_runtime, "openvino": self._openvino, "jax": self._jax_forward}
        return found

    def _called(self, model: nn.Module) -> Built:
        model.eval()

        def call() -> Any:
            with torch.no_grad():
                return model(*self.inputs)

        return call, _tensors

    def _traced(self) -> Built:
        report = fastmlp.fusion_report(fastmlp.convert(copy.deepcopy(self.model)))
        if len(report) == 1 and not report[0].reason:
            raise Refused("convert takes the model whole, and there is nothing left to record")
        try:
            return self._called(fastmlp.convert(copy.deepcopy(self.model).eval(), trace=True, inputs=self.inputs))
        except RuntimeError as error:
            raise Refused(_text(error)) from error

    def _frozen(self) -> Built:
        model = copy.deepcopy(self.model).eval()
        try:
            frozen = fastmlp.freeze(model, inputs=self.inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise Refused(_text(error)) from error

        def call(kept: nn.Module = model) -> Any:  # it follows the model, which therefore lives on
            return frozen(*self.inputs)

        return partial(frozen, *self.inputs) if len(self.inputs) == 1 else call, _tensors

    @cached_property
    def _onnx(self) -> bytes | str:
        """The model in the ONNX format, made once because that takes seconds; or why it cannot be had."""
        try:
            return peers.exported(copy.deepcopy(self.model).eval(), self.inputs)
        except Exception as error:  # whatever a model of any class makes the exporter raise
            return f"torch.onnx.export does not take the model: {type(error).__name__}"

    def _exported(self, package: str) -> tuple[bytes, list[Any]]:
        needed = [name for name in ("onnx", "onnxscript", package) if find_spec(name) is None]
        if needed:
            raise Refused(f"{', '.join(needed)} not installed")
        self._plain_floats((torch.float32, torch.float64))
        if isinstance(self._onnx, str):
            raise Refused(self._onnx)
        return self._onnx, [np.ascontiguousarray(tensor.numpy()) for tensor in self.inputs]

    def _onnx_runtime(self) -> Built:
        return peers.onnx_runtime(*self._exported("onnxruntime")), _arrays

    def _openvino(self) -> Built:
        return peers.openvino(*self._exported("openvino")), _arrays

    def _plain_floats(self, dtypes: tuple[torch.dtype, ...]) -> None:
        own = {tensor.dtype for tensor in (*self.model.parameters(), *self.inputs)}
        if not own <= set(dtypes):
            raise Refused(f"it takes part with {' or '.join(map(str, dtypes))} alone")

    def _chain(self) -> tuple[Any, list[Callable[[Any], Any] | None]]:
        """The model's layers in JAX."""
        if (obstacle := peers.jax_obstacle()) is not None:
            raise Refused(obstacle)
        self._plain_floats((torch.float32,))
        peers.start_jax()
        import jax

        known: dict[type[nn.Module], Callable[[Any], Any]] = {
            nn.ReLU: jax.nn.relu,
            nn.Tanh: jax.numpy.tanh,
            nn.Sigmoid: jax.nn.sigmoid,
            nn.SiLU: jax.nn.silu,
        }
        layers: list[tuple[Any, Any]] = []
        activations: list[Callable[[Any], Any] | None] = []
        modules = list(self.model) if type(self.model) is nn.Sequential else [self.model]
        for module in modules:
            if type(module) is nn.Linear:
                bias = None if module.bias is None else peers.to_jax(module.bias)
                layers.append((peers.to_jax(module.weight.T), bias))
                activations.append(None)
            elif type(module) in known and activations and activations[-1] is None:
                activations[-1] = known[type(module)]
            else:
                names = ", ".join(kind.__name__ for kind in known)
                raise Refused(f"it is written here for a torch.nn.Sequential of Linear and {names} alone")
        return layers, activations

    def _jax_forward(self) -> Built:
        layers, activations = self._chain()
        import jax

        run = jax.jit(lambda layers, input: peers.forward(layers, activations, input))
        input = peers.to_jax(self.inputs[0])
        return lambda: jax.block_until_ready(run(layers, input)), _of_jax

    # Training.

    def _training(self) -> dict[str, Callable[[], Built]]:
        ours: Any = fastmlp.optim
        found: dict[str, Callable[[], Built]] = {
            YARDSTICK: lambda: self._looped(self._trained(), torch.optim),
            "convert": lambda: self._looped(fastmlp.convert(self._trained()), torch.optim),
            "fastmlp.optim": lambda: self._looped(fastmlp.convert(self._trained()), ours),
            "TrainStep": self._train_step,
            "capture": self._captured,
        }
        return found | ({"jax": self._jax_step} if self.peers else {})

    def _trained(self) -> nn.Module:
        """A copy to be trained."""
        return copy.deepcopy(self.model).train()

    def _optimizer(self, model: nn.Module, module: Any) -> torch.optim.Optimizer:
        kind = getattr(module, self.optimizer.__name__, None)
        if kind is None:
            raise Refused(f"fastmlp.optim has no {self.optimizer.__name__}")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise Refused("the model has no parameter that requires a gradient, and there is nothing to train")
        made: torch.optim.Optimizer = kind(parameters, lr=1e-3)
        return made

    def _loop(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...]) -> Call:
        """A step as anybody writes it."""

        def step() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = self.loss_fn(model(*inputs), self.target)
            loss.backward()
            optimizer.step()
            return loss

        return step

    def _looped(self, model: nn.Module, module: Any) -> Built:
        return self._loop(model, self._optimizer(model, module), self.inputs), _tensors

    def _train_step(self) -> Built:
        if len(self.inputs) != 1:
            raise Refused("a TrainStep has one input")
        model = self._trained()
        try:
            step = fastmlp.TrainStep(model, self.loss_fn, self._optimizer(model, torch.optim))
        except TypeError as error:
            raise Refused(_text(error)) from error
        return partial(step, self.inputs[0], self.target), _tensors

    def _captured(self) -> Built:
        model = self._trained()
        optimizer = self._optimizer(model, torch.optim)

        @fastmlp.capture
        def step(inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = self.loss_fn(model(*inputs), target)
            loss.backward()
            optimizer.step()
            return loss

        def call() -> Tensor:
            try:
                return step(self.inputs, self.target)
            except fastmlp.CaptureError as error:
                raise Refused(_text(error)) from error

        return call, _tensors

    def _jax_step(self) -> Built:
        if self.optimizer not in (torch.optim.SGD, torch.optim.Adam) or type(self.loss_fn) is not nn.MSELoss:
            raise Refused("it is written here for MSELoss with SGD or Adam alone")
        layers, activations = self._chain()
        import jax

        def loss(layers: Any, input: Any, target: Any) -> Any:
            return ((peers.forward(layers, activations, input) - target) ** 2).mean()

        adam = self.optimizer is torch.optim.Adam
        run = peers.adam_step(loss, 1e-3, 0.9, 0.999, 1e-8) if adam else peers.sgd_step(loss, 1e-3)
        input, target = peers.to_jax(self.inputs[0]), peers.to_jax(self.target)
        state = peers.first_state(layers, adam)

        def call() -> Any:
            nonlocal state
            state, found = run(state, input, target)
            return jax.block_until_ready(found)

        return call, _of_jax


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance of a tensor, by the norm; infinite for other shapes.

    Example:
        >>> distance([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 1.0])])
        0.7071067690849304
    """
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    # Two that are zero are the same.
    pairs = [((f - e).norm(), e.norm()) for f, e in zip(found, expected, strict=True)]
    return max((float(off / norm) if off else 0.0 for off, norm in pairs), default=0.0)


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result.detach()]
    inner = result.values() if isinstance(result, dict) else result if isinstance(result, (tuple, list)) else ()
    return [tensor for one in inner for tensor in _tensors(one)]


def _arrays(result: Any) -> list[Tensor]:
    return [torch.from_numpy(np.array(array)) for array in result]


def _of_jax(result: Any) -> list[Tensor]:
    return [peers.from_jax(result)]


def _text(error: BaseException) -> str:
    return str(error).removeprefix("fastmlp: ")
