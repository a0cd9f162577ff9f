"""How the demo trains: the contenders, the comparison step by step, and the race.

Called by the demo's `main`. Four contenders start from the same parameters: PyTorch's loop on PyTorch's network, the
same loop on fastmlp's, and on PyTorch's again `fastmlp.TrainStep` and the loop's lines captured by `fastmlp.capture`.
The comparison is of the first three; the race is of all. What PyTorch's network has learnt is served frozen.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp.demo.bounds import output_bounds, rounding_bounds, update_bounds
from fastmlp.demo.tasks import Batch, Task, cast, shuffled

__all__ = [
    "CAPTURED",
    "FAST",
    "FROZEN",
    "NATIVE",
    "STEPPED",
    "Agreement",
    "Captured",
    "Closeness",
    "Contender",
    "DemoFailure",
    "Race",
    "Stepped",
    "compare",
    "race",
]

#: The names of the contenders, which head the columns of the tables.
NATIVE, FAST, STEPPED, CAPTURED, FROZEN = "PyTorch", "fastmlp", "TrainStep", "captured", "frozen"

#: So many rows are predicted one by one, so many times, to be timed.
PREDICTED, ROUNDS = 100, 15


class DemoFailure(AssertionError):
    """Something that the demo asserts does not hold."""


class Contender:
    """A network in training, with its optimizer and the losses so far."""

    def __init__(self, task: Task, make: Callable[[], nn.Module], dtype: torch.dtype, epochs: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = make().to(dtype)
        self.task = task
        self.dtype = dtype
        self.optimizer = task.optimizer(self.model.parameters())
        # The learning rate ends at 0, so that the last epochs settle.
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.losses: list[float] = []

    def train(self, batches: list[Batch]) -> float:
        """One epoch; returns the seconds that it took."""
        start = perf_counter()
        losses = self.steps(batches)
        seconds = perf_counter() - start
        self.schedule.step()
        sizes = torch.tensor([len(x) for x, _ in batches])  # the last batch may be a small one
        self.losses.append((torch.stack(losses) * sizes).sum().item() / int(sizes.sum()))
        return seconds

    def steps(self, batches: list[Batch]) -> list[Tensor]:
        """The tutorial's four lines for each batch; returns the losses."""
        losses = []
        for x, y in batches:
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return losses

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The loss, and the gradient of each layer: its weight's, and its bias's as a last column."""
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(x), y)
        loss.backward()
        return [loss.detach(), *self.gradients()]

    def gradients(self) -> list[Tensor]:
        """What is in `.grad`, by layer."""
        return join([p.grad for p in self.model.parameters() if p.grad is not None])

    def layers(self) -> list[Tensor]:
        """A copy of the parameters, by layer."""
        return join([p.detach() for p in self.model.parameters()])

    def state(self) -> list[dict[str, Tensor]]:
        """A copy of the optimizer's state, by layer; empty for an optimizer without state."""
        states = [self.optimizer.state.get(p, {}) for p in self.model.parameters()]
        names = [name for name, value in states[0].items() if value.dim()]
        joined = {name: join([state[name] for state in states]) for name in names}
        return [{name: layers[i] for name, layers in joined.items()} for i in range(len(states) // 2)]

    def score(self) -> float:
        """On the held-out data: the share of digits read rightly, or the mean squared error."""
        x, y = cast(self.task.held_out, self.dtype)
        with torch.no_grad():
            output = self.model(x)
        right = output.argmax(1) == y if self.task.classifies else None
        return (self.task.loss(output, y) if right is None else right.double().mean()).item()


class Stepped(Contender):
    """PyTorch's network and optimizer, with `fastmlp.TrainStep` in place of the four lines."""

    def __init__(self, task: Task, dtype: torch.dtype, epochs: int, seed: int) -> None:
        super().__init__(task, task.native, dtype, epochs, seed)
        self.step = fastmlp.TrainStep(self.model, task.loss, self.optimizer)

    def steps(self, batches: list[Batch]) -> list[Tensor]:
        """One call for each batch."""
        return [self.step(x, y) for x, y in batches]

    def start_from(self, other: Contender) -> None:
        """Takes over parameters, learning rate and the optimizer's state."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))  # which would be shared otherwise


class Captured(Contender):
    """PyTorch's network, loss and optimizer, with the four lines as a function that is captured."""

    def __init__(self, task: Task, dtype: torch.dtype, epochs: int, seed: int) -> None:
        super().__init__(task, task.native, dtype, epochs, seed)

        def step(x: Tensor, y: Tensor) -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = self.task.loss(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            return loss.detach()

        self.step = fastmlp.capture(step)

    def steps(self, batches: list[Batch]) -> list[Tensor]:
        """One call for each batch."""
        return [self.step(x, y) for x, y in batches]


def contenders(task: Task, dtype: torch.dtype, epochs: int, seed: int) -> tuple[Contender, Contender, Stepped]:
    """PyTorch's, fastmlp's and TrainStep's, to whose networks the seed must have given the same parameters."""
    native = Contender(task, task.native, dtype, epochs, seed)
    fast = Contender(task, task.fast, dtype, epochs, seed)
    for name, value in native.model.state_dict().items():
        if not torch.equal(value, fast.model.state_dict()[name]):
            raise DemoFailure(f"{task.name}: {name} differs before training, from the same seed {seed}")
    return native, fast, Stepped(task, dtype, epochs, seed)


def join(parameters: Sequence[Tensor]) -> list[Tensor]:
    """From weight, bias, weight, bias ... one matrix a layer, with the bias as its last column."""
    return [torch.cat([w, b[:, None]], 1) for w, b in zip(parameters[::2], parameters[1::2], strict=True)]


# How close it stays to PyTorch.


@dataclass
class Closeness:
    """How close something stayed to PyTorch.

    Args:
        difference: the largest, of two losses or outputs.
        share: of its bound, the largest that a difference reached; 0 where there are no bounds.
    """

    difference: float = 0.0
    share: float = 0.0

    def note(self, differences: Mapping[str, Tensor], bounds: Sequence[Tensor] | None, where: str) -> None:
        """Remembers the first of some differences, and asserts that all of them are within their bounds."""
        first = next(iter(differences.values()))
        self.difference = max(self.difference, first.max().item())
        if bounds is not None:
            self.share = max(self.share, assert_within(differences, bounds, where))


@dataclass
class Agreement:
    """How close everything stayed to PyTorch.

    Args:
        steps: compared.
        loop: of the unchanged loop on fastmlp's network, losses and gradients.
        step: of TrainStep, losses, gradients and the parameters afterwards.
        frozen: of the network frozen, outputs.
    """

    steps: int = 0
    loop: Closeness = field(default_factory=Closeness)
    step: Closeness = field(default_factory=Closeness)
    frozen: Closeness = field(default_factory=Closeness)


def compare(task: Task, dtype: torch.dtype, epochs: int, seed: int, tick: Callable[[], None]) -> Agreement:
    """Trains PyTorch's network and has the others repeat each step from the same parameters and state.

    Args:
        task: what is trained.
        dtype: float64 for differences that are asserted, float32 for differences that are shown.
        epochs: number of passes over the data.
        seed: of parameters and batches.
        tick: called after each epoch.

    Returns:
        The largest differences.

    Raises:
        DemoFailure: if a float64 difference is more than rounding allows.
    """
    native, fast, stepped = contenders(task, dtype, epochs, seed)
    frozen = fastmlp.freeze(native.model)
    asserted = dtype == torch.float64
    x_held_out, _ = cast(task.held_out, dtype)
    found = Agreement()
    for epoch, batches in enumerate(shuffled(task, dtype, epochs, seed), 1):
        for x, y in batches:
            found.steps += 1
            before, state = native.layers(), native.state()
            fast.model.load_state_dict(native.model.state_dict())
            stepped.start_from(native)
            expected = native.loss_and_gradients(x, y)
            differences = named(distances(fast.loss_and_gradients(x, y), expected))
            bounds = rounding_bounds(task.activation, before, x, y) if asserted else None
            found.loop.note(differences, bounds, f"{task.name}, step {found.steps}")

            loss = stepped.step(x, y)
            differences = named(distances([loss, *stepped.gradients()], expected))
            native.optimizer.step()
            for i, difference in enumerate(distances(stepped.layers(), native.layers()), 1):
                differences[f"layer {i} after the step"] = difference
            if bounds is not None:
                (group,) = native.optimizer.param_groups
                updates = zip(before, expected[1:], bounds[1:], state, strict=True)
                bounds += [update_bounds(group, found.steps, *update) for update in updates]
            found.step.note(differences, bounds, f"{task.name}, {STEPPED}, step {found.steps}")
        native.schedule.step()
        frozen.refresh()
        with torch.no_grad():
            outputs = {"output": (frozen(x_held_out) - native.model(x_held_out)).abs()}
        bounds = [output_bounds(task.activation, native.layers(), x_held_out)] if asserted else None
        found.frozen.note(outputs, bounds, f"{task.name}, {FROZEN}, epoch {epoch}")
        tick()
    return found


def distances(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Tensor]:
    """Of each element from its counterpart."""
    return [(a - b).abs() for a, b in zip(actual, expected, strict=True)]


def named(differences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Says of what they are: the loss first, then the layers' gradients."""
    return {f"gradient of layer {i}" if i else "loss": difference for i, difference in enumerate(differences)}


def assert_within(differences: Mapping[str, Tensor], bounds: Sequence[Tensor], where: str) -> float:
    """Asserts that no difference exceeds twice its bound, and returns the largest share reached."""
    largest = 0.0
    for (what, difference), bound in zip(differences.items(), bounds, strict=True):
        # Difference and bound are both 0 at neurons that are 0 for the whole batch. NaN stays NaN, and fails.
        share = torch.where(difference == 0, 0.0, difference / (2 * bound)).flatten()
        worst = int(share.argmax())
        if not share[worst] <= 1:
            raise DemoFailure(
                f"{where}: {what} differs from PyTorch's by {difference.flatten()[worst]:.3g}, "
                f"of which rounding in float64 explains at most {2 * bound.flatten()[worst]:.3g}"
            )
        largest = max(largest, share[worst].item())
    return largest


# How fast it is learnt, and predicted.


@dataclass
class Race:
    """All trainings in float32, each on its own.

    Args:
        contenders: by name, after their training.
        seconds: of each epoch, by name.
        predictions: seconds of a single row's prediction, by name.
    """

    contenders: dict[str, Contender]
    seconds: dict[str, list[float]]
    predictions: dict[str, float] = field(default_factory=dict)

    def epoch(self, name: str) -> float:
        """The median of an epoch's seconds."""
        return median(self.seconds[name])

    def speedup(self, name: str) -> float:
        """PyTorch's time over another's: of an epoch, or of a prediction."""
        if name == FROZEN:
            return self.predictions[NATIVE] / self.predictions[FROZEN]
        return self.epoch(NATIVE) / self.epoch(name)


def race(task: Task, epochs: int, seed: int, tick: Callable[[], None]) -> Race:
    """Trains all, epoch by epoch in turn, so that whatever else the machine does meets all; then they predict."""

    def entrants() -> dict[str, Contender]:
        names, captured = (NATIVE, FAST, STEPPED), Captured(task, torch.float32, epochs, seed)
        return {**dict(zip(names, contenders(task, torch.float32, epochs, seed), strict=True)), CAPTURED: captured}

    for warm_up in entrants().values():
        warm_up.train(next(shuffled(task, torch.float32, epochs, seed)))
    entered = entrants()
    run = Race(entered, {name: [] for name in entered})
    for batches in shuffled(task, torch.float32, epochs, seed):
        for name, contender in run.contenders.items():
            run.seconds[name].append(contender.train(batches))
        tick()
    run.predictions = predict(run.contenders[NATIVE])
    return run


def predict(contender: Contender) -> dict[str, float]:
    """The seconds of a row's prediction, one row a call, by PyTorch's network and by the same network frozen."""
    x, _ = cast(contender.task.held_out, contender.dtype)
    rows = x[:PREDICTED].split(1)
    models: dict[str, Callable[[Tensor], Tensor]] = {
        NATIVE: contender.model,
        FROZEN: fastmlp.freeze(contender.model),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, model in models.items():
                start = perf_counter()
                for row in rows:
                    model(row)
                seconds[name].append((perf_counter() - start) / len(rows))
    return {name: median(found) for name, found in seconds.items()}
