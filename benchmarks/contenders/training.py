"""Ways to run the steps of `benchmarks.programs`."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastmlp
from benchmarks.contenders.base import Participant, Refused
from benchmarks.programs import BATCHES, PROGRAMS, SMALL, Program
from benchmarks.workloads import Tier, Training
from fastmlp.benchmark.peers import start_jax

#: Of all contenders' programs, and of what their first calls draw.
SEED = 0

#: Programs for which torch.compile takes part in a quick run, too.
COMPILED_QUICKLY = ("ppo b64", "vae b128")


class Trainer(Participant):
    """One way to run a program's step on its batches, one after the other and from the first again.

    Attributes:
        options: of the program's optimizers.
        draws: whether random numbers are those that eager would draw.
    """

    options: ClassVar[dict[str, bool]] = {}
    draws: ClassVar[bool] = True

    def __init__(self, training: Training) -> None:
        self.training = training
        self.program = PROGRAMS[training.name](SEED, **self.options)
        self.step = self.prepare(self.program)
        self._batches = cycle([self.batch(i) for i in range(BATCHES)])

    @classmethod
    def takes(cls, training: Training) -> bool:
        """Whether it runs a program."""
        return True

    def prepare(self, program: Program) -> Callable[..., Any]:
        """Return what does the program's step."""
        return program.step

    def batch(self, i: int) -> tuple[Any, ...]:
        """Return the i-th batch as the contender's users hold it."""
        return self.program.inputs(i)

    @property
    def call(self) -> Callable[[], Any]:
        step, batches = self.step, self._batches
        return lambda: step(*next(batches))

    def losses(self, calls: int, seed: int = SEED) -> Iterator[Tensor]:
        """Do the first calls and yield their losses.

        Args:
            calls: their number.
            seed: of the random numbers that they draw.

        Raises:
            Refused: if the contender cannot run the program.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(calls):
                yield torch.as_tensor(self._attempt())

    def _attempt(self) -> Any:
        return self.call()


class EagerTrainer(Trainer):
    """The program as it is written."""

    name = "eager"


class EagerFused(Trainer):
    """The same with `fused=True` for all optimizers that have it."""

    name = "eager_fused"
    options: ClassVar[dict[str, bool]] = {"fused": True}


class Captured(Trainer):
    """`fastmlp.capture` of the step."""

    name = "capture"
    ours = True
    fuse: ClassVar[bool] = True

    def prepare(self, program: Program) -> Callable[..., Any]:
        return fastmlp.capture(program.step, fuse=self.fuse)

    def _attempt(self) -> Any:
        try:
            return self.call()
        except fastmlp.CaptureError as error:
            raise Refused(str(error)) from error


class CapturedUnfused(Captured):
    """The same with ATen's own kernels and the optimizers' own steps."""

    name = "capture_unfused"
    fuse: ClassVar[bool] = False


class CompiledStep(Trainer):
    """`torch.compile` of the whole step, in its default mode."""

    name = "compile_step"
    draws = False
    settings: ClassVar[dict[str, Any]] = {}
    backward_too: ClassVar[bool] = False

    @classmethod
    def takes(cls, training: Training) -> bool:
        """In a quick run only some programs, because one takes half a minute to compile."""
        return training.tier > Tier.QUICK or training.name in COMPILED_QUICKLY

    def prepare(self, program: Program) -> Callable[..., Any]:
        with self._compiler():
            return torch.compile(program.step, dynamic=False, **self.settings)

    def _attempt(self) -> Any:
        with self._compiler():
            try:
                return self.call()
            except RuntimeError as error:
                raise Refused(str(error).strip().splitlines()[0]) from error

    @contextmanager
    def _compiler(self) -> Iterator[None]:
        with warnings.catch_warnings(), torch._dynamo.config.patch(compiled_autograd=self.backward_too):
            # The compiler calls what PyTorch itself has deprecated, and warns of what it leaves to eager.
            warnings.simplefilter("ignore")
            yield


class CompiledMost(CompiledStep):
    """The same in the mode that tries the most."""

    name = "compile_max"
    settings: ClassVar[dict[str, Any]] = {"mode": "max-autotune"}

    @classmethod
    def takes(cls, training: Training) -> bool:
        """In a full run the small programs, on which a target compares with all modes."""
        return training.tier is Tier.FULL and training.name in SMALL


class CompiledBackward(CompiledStep):
    """The same with compiled autograd, which makes `backward` a part of what is compiled."""

    name = "compile_autograd"
    backward_too = True

    @classmethod
    def takes(cls, training: Training) -> bool:
        """In a full run the small programs, on which a target compares with all modes."""
        return training.tier is Tier.FULL and training.name in SMALL


class JaxTrainer(Trainer):
    """The same step written in JAX with optax, as one function under `jax.jit`."""

    name = "jax"
    packages = ("jax", "optax")
    draws = False

    @classmethod
    def takes(cls, training: Training) -> bool:
        """Those that are written in JAX."""
        from benchmarks.jax_twins import TWINS

        return training.name in TWINS

    def prepare(self, program: Program) -> Callable[..., Any]:
        from benchmarks.jax_twins import TWINS

        start_jax()
        self.twin = TWINS[self.training.name](program, PROGRAMS[self.training.name].batch)
        return self.twin.step

    def batch(self, i: int) -> tuple[Any, ...]:
        from benchmarks.jax_twins import array

        return tuple(map(array, super().batch(i)))
