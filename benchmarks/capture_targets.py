"""Targets of `fastmlp.capture`: claims on programs, and what is not the speed of one."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastmlp
from benchmarks.contenders import YARDSTICK
from benchmarks.contenders.training import (
    Captured,
    CapturedUnfused,
    CompiledBackward,
    CompiledMost,
    CompiledStep,
    JaxTrainer,
)
from benchmarks.machine import describe
from benchmarks.programs import PROGRAMS, SMALL, Program
from benchmarks.targets import Claim, Outcome, Value, over
from benchmarks.timing import Row
from fastmlp.benchmark.timing import Effort, race

#: Of a run in which captured programs are compared with eager ones.
STEPS = 50

#: The program whose recording is timed, and the operations that the time is given for.
RECORDED, OPERATIONS = "burgers b128", 300

#: Programs whose arithmetic takes about as long as Python and the dispatcher.
MIDDLE = ("sac critic b256", "burgers b1024", "dlrm b256", "siren b4096", "tabular b1024")

#: Programs that have a twin in JAX, for its jit of the whole step.
TWINS = ("ppo b64", "sac critic b256", "vae b128", "burgers b128", "burgers b1024")

#: Steps of the tutorial that `TrainStep` takes too.
TUTORIAL = ("tutorial sgd b32", "tutorial adam b32")

#: Calls over which nothing may grow, and bytes that are no growth: pages that the allocator takes once.
MANY, PAGES = 100_000, 1 << 18

_COMPILED = (CompiledStep.name, CompiledMost.name, CompiledBackward.name)
_EAGER, _OVER_EAGER, _JAX = f"x {YARDSTICK}", over(YARDSTICK), f"x {JaxTrainer.name}"


class Mean(Claim):
    """A target that is the geometric mean of a value over all of some workloads."""

    def outcome(self, rows: Mapping[str, Row]) -> Outcome:
        goal, where = f">= {self.goal:.2f} {self.unit}", f"{len(self.workloads)} programs"
        values = [self.value(rows[name]) for name in self.workloads if name in rows]
        found = [value for value in values if value is not None]
        if len(found) < len(self.workloads):
            measured = f"not measured: {len(found)} of {len(self.workloads)} have a figure"
            return Outcome(self.id, self.what, goal, measured, None, where)
        mean = geometric_mean(found)
        return Outcome(self.id, self.what, goal, f"{mean:.2f}", mean >= self.goal, where)


def _captured(id: str, what: str, goal: float, unit: str, value: Value, names: Sequence[str] = SMALL) -> Claim:
    return Claim(id, f"captured, {what}", goal, unit, value, tuple(names), Captured.name)


def _mean(id: str, what: str, goal: float, unit: str, value: Value, names: Sequence[str] = SMALL) -> Claim:
    return Mean(id, f"captured, {what}, geometric mean", goal, unit, value, tuple(names), Captured.name)


CAPTURE_CLAIMS: tuple[Claim, ...] = (
    _captured("C2", "small steps, each", 4.0, _EAGER, _OVER_EAGER),
    _mean("C2", "small steps", 8.0, _EAGER, _OVER_EAGER),
    _captured("C2", "no program slower", 1.0, _EAGER, _OVER_EAGER, tuple(PROGRAMS)),
    Claim("C2", "fuse=False, no program slower", 1.0, _EAGER, _OVER_EAGER, tuple(PROGRAMS), CapturedUnfused.name),
    _captured("C3", "middle steps, each", 1.3, _EAGER, _OVER_EAGER, MIDDLE),
    _mean("C3", "middle steps", 1.8, _EAGER, _OVER_EAGER, MIDDLE),
    _captured("C4", "steps with a twin in JAX, each", 1.1, _JAX, over(JaxTrainer.name), TWINS),
    _mean("C4", "steps with a twin in JAX", 1.5, _JAX, over(JaxTrainer.name), TWINS),
    _captured("C5", "small steps, each", 1.5, "x best torch.compile", over(*_COMPILED)),
)


def measures(effort: Effort) -> dict[str, Callable[[], Iterator[Outcome]]]:
    """Return what measures the targets that are not claims, by their ids."""
    return {
        "C1": same_bits,
        "C6": partial(beside_train_step, effort),
        "C7": partial(overhead, effort),
        "C8": memory,
        "C10": partial(recording, effort),
    }


def same_bits() -> Iterator[Outcome]:
    """Compare losses, states and generators of captured programs with eager ones, C1."""
    different = [name for name in PROGRAMS if not _same(name)]
    measured = f"{len(PROGRAMS) - len(different)} of {len(PROGRAMS)} programs"
    goal = f"all bits after {STEPS} steps"
    yield Outcome("C1", "captured with fuse=False", goal, measured, not different, ", ".join(different))


def _same(name: str) -> bool:
    """Whether a captured program does what its eager twin does, in replays from the fourth call on at the latest."""
    program, twin = PROGRAMS[name](seed=0), PROGRAMS[name](seed=0)
    captured = fastmlp.capture(program.step, fuse=False)
    found, expected = _end(program, captured), _end(twin, twin.step)
    same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    return same and captured.replays >= STEPS - 3


def _end(program: Program, step: Callable[..., Any]) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        losses = [step(*program.inputs(i)) for i in range(STEPS)]
        return {"losses": torch.stack(losses), "generator": torch.get_rng_state(), **program.state()}


def beside_train_step(effort: Effort) -> Iterator[Outcome]:
    """Compare captured steps of the tutorial with `TrainStep`, which knows such steps beforehand, C6."""
    describe(1)
    for name in TUTORIAL:
        ratio = _beside_train_step(PROGRAMS[name](seed=0), PROGRAMS[name](seed=0), effort)
        yield Outcome("C6", "captured, beside TrainStep", "<= 1.30 x its time", f"{ratio:.2f}", ratio <= 1.3, name)


def _beside_train_step(program: Program, twin: Program, effort: Effort) -> float:
    batch = program.inputs(0)
    captured = fastmlp.capture(program.step)
    known = fastmlp.TrainStep(twin.modules["model"], nn.MSELoss(), twin.optimizers["optimizer"])
    samples = race({"captured": lambda: captured(*batch), "known": lambda: known(*batch)}, effort)
    # The ratio of each round, in which both shared the machine.
    return median(a / b for a, b in zip(samples["captured"], samples["known"], strict=True))


def overhead(effort: Effort) -> Iterator[Outcome]:
    """Time a call without operations, C7, with the arguments and parameters of PPO."""
    describe(1)
    program = PROGRAMS["ppo b64"](seed=0)
    parameters, inputs = list(program.parameters().values()), program.inputs(0)

    def look(*batch: Tensor) -> None:
        for tensor in (*batch, *parameters):
            tensor.view(-1)  # a view, which leaves nothing to do in a replay

    step = fastmlp.capture(look)
    samples = race({"captured": lambda: step(*inputs)}, effort)["captured"]
    words = "C7", "a captured call without operations", "<= 3 us"
    seconds = median(samples)
    where = f"{len(inputs)} arguments, {len(parameters)} parameters"
    yield Outcome(*words, f"{seconds * 1e6:.2f} us", seconds <= 3e-6, where)


def recording(effort: Effort) -> Iterator[Outcome]:
    """Time both recorded calls and making the tape, C10, beyond what two eager calls take, scaled to 300 operations."""
    describe(1)
    program = PROGRAMS[RECORDED](seed=0)
    batch = program.inputs(0)
    step = fastmlp.capture(program.step)
    _twice(step, batch)
    (tape,) = step.report().tapes
    recorded = sum(tape.operations.values()) + tape.views + tape.constants

    def record() -> None:
        step.reset()
        _twice(step, batch)

    samples = race({"eager": lambda: _twice(program.step, batch), "recorded": record}, effort)
    # The difference of each round, in which both shared the machine.
    spent = median(b - a for a, b in zip(samples["eager"], samples["recorded"], strict=True))
    seconds = spent * OPERATIONS / recorded
    words = "C10", f"recording and lowering, ms for {OPERATIONS} operations", "<= 50 ms"
    yield Outcome(*words, f"{seconds * 1e3:.1f} ms", seconds <= 50e-3, f"{RECORDED}, {recorded} operations")


def _twice(call: Callable[..., Any], batch: Sequence[Tensor]) -> None:
    """Call twice, as often as a step is recorded."""
    for _ in range(2):
        call(*batch)


def memory() -> Iterator[Outcome]:
    """Measure memory, C8: what PyTorch's allocator gives out, and what a process of its own grows by."""
    describe(1)
    shares = {name: _arena(name) / _peak_of_eager(name) for name in PROGRAMS}
    worst = max(shares, key=lambda name: shares[name])
    met = sum(share <= 1 for share in shares.values())
    measured = f"{shares[worst]:.2f}, {met} of {len(shares)} met"
    words = "C8", "the arena of a captured step, over eager's peak in a step"
    yield Outcome(*words, "<= 1.00", measured, met == len(shares), worst)
    name = "tutorial sgd b32"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        grown = pool.submit(_grown, name).result()
    words = "C8", f"growth over {MANY:,} calls"
    yield Outcome(*words, f"<= {PAGES >> 10} KiB", f"{grown / 1024:.0f} KiB", grown <= PAGES, name)


def _peak_of_eager(name: str) -> int:
    """Return the most bytes that PyTorch's allocator gave out within a step, beyond those before it."""
    program = PROGRAMS[name](seed=0)
    for i in range(2):
        program.step(*program.inputs(i))
    batch = program.inputs(2)
    return _allocated(lambda: program.step(*batch))


def _arena(name: str) -> int:
    """Return the bytes that a captured step has for all that is neither a result nor a gradient."""
    program = PROGRAMS[name](seed=0)
    captured = fastmlp.capture(program.step)
    for i in range(4):
        captured(*program.inputs(i))
    return max(tape.arena_bytes for tape in captured.report().tapes)


def _allocated(call: Callable[[], Any]) -> int:
    """Return the most bytes that PyTorch's allocator of the CPU gave out in a call."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def _grown(name: str) -> int:
    """Return by how many bytes the process grows over many captured calls."""
    from benchmarks.costs import resident

    torch.set_num_threads(1)
    program = PROGRAMS[name](seed=0)
    step, batch = fastmlp.capture(program.step), program.inputs(0)
    for _ in range(MANY // 100):
        step(*batch)
    gc.collect()
    before = resident("VmRSS")
    for _ in range(MANY):
        step(*batch)
    gc.collect()
    return resident("VmRSS") - before
