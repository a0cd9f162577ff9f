"""Functions, layers and networks: forward and backward of any layout, dtype, activation and subset of gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, reference
from fastmlp.activations import IDENTITY, module_of
from tests.attack import drawn, oracle
from tests.attack.cases import Case, attempt
from tests.support.bounds import Bounded, network


@dataclass
class Drawn:
    """A network's tensors, as they lie, and what is called."""

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    acts: list[Activation]
    dropouts: list[float]  # in training, behind each layer; 0 for none
    seed: int

    @property
    def drops(self) -> bool:
        return any(self.dropouts)

    @property
    def parameters(self) -> list[Tensor]:
        return [t for pair in zip(self.weights, self.biases, strict=True) for t in pair if t is not None]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.input, *self.parameters]

    def torchs(self) -> Tensor:
        x = self.input
        for weight, bias, act, p in zip(self.weights, self.biases, self.acts, self.dropouts, strict=True):
            x = F.dropout(reference.activate(F.linear(x, weight, bias), act.name, act.parameters), p)
        return x

    def noises(self) -> list[Tensor | None]:
        """What dropout multiplies the output of each layer with, by rows."""
        torch.manual_seed(self.seed)
        noises: list[Tensor | None] = []
        for weight, p in zip(self.weights, self.dropouts, strict=True):
            ones = torch.ones(*self.input.shape[:-1], weight.shape[0], dtype=self.input.dtype)
            noises.append(oracle.rows_of(F.dropout(ones, p)) if p > 0 else None)
        return noises


def play(case: Case) -> None:
    for _ in range(case.choice([1, 2, 3])):
        net = drawn_network(case)
        if case.chance(0.06):
            broken(case, net)
        else:
            compared(case, net)


def drawn_network(case: Case) -> Drawn:
    dtype = drawn.dtype(case)
    count = case.choice([1, 1, 2, 3, 4])
    sizes = [drawn.size(case) for _ in range(count + 1)]
    special = case.chance(0.12)

    def made(*shape: int, scale: float = 1.0) -> Tensor:
        x = drawn.randn(case, *shape, dtype=dtype, scale=scale)
        if special and case.chance(0.4):
            x = drawn.sprinkled(case, x)
        x, how = drawn.lay_to_read(case, x)
        case.note(f"  {how}{' with special numbers' if not x.isfinite().all() else ''}")
        return x.requires_grad_(case.chance(0.6))

    acts = drawn.activations(case, count)
    case.note(f"{dtype} {sizes} {acts}")
    input = made(*drawn.leading(case), sizes[0])
    weights = [made(n, k, scale=max(k, 1) ** -0.5) for k, n in pairwise(sizes)]
    biases = [made(n) if case.chance(0.75) else None for n in sizes[1:]]
    dropouts = [0.0] * count
    if case.chance(0.25):
        dropouts = [case.choice([0.0, 0.1, 0.5, 0.9, 1.0]) for _ in range(count)]
        case.note(f"  dropout {dropouts}")
    return Drawn(input, weights, biases, acts, dropouts, case.random.randrange(1 << 30))


def callers(case: Case, net: Drawn) -> dict[str, Callable[[], Any]]:
    """The ways to call a network."""
    ways: dict[str, Callable[[], Any]] = {
        "Sequential": lambda: sequential(net, fused=False)(net.input),
        "Sequential of fused layers": lambda: sequential(net, fused=True)(net.input),
        "convert": lambda: fastmlp.convert(nn.Sequential(*children(net)))(net.input),
        "convert, trace": lambda: traced(net)(net.input),
    }
    if net.drops:
        return ways
    ways["functional.mlp"] = lambda: fastmlp.functional.mlp(net.input, net.weights, net.biases, net.acts)
    if len(net.weights) == 1:
        act = net.acts[0]
        ways["functional.linear"] = lambda: fastmlp.functional.linear(net.input, net.weights[0], net.biases[0], act)
        ways["Linear"] = lambda: layer(net, 0, act)(net.input)
    return ways


def layer(net: Drawn, i: int, act: Activation | None) -> nn.Linear:
    """A layer whose parameters are these tensors, which need not be leaves or parameters."""
    # On meta nothing is drawn, because dropout is to find the generator where PyTorch's finds it.
    made = nn.Linear(1, 1, device="meta") if act is None else fastmlp.Linear(1, 1, device="meta", activation=act)
    made._parameters["weight"], made._parameters["bias"] = net.weights[i], net.biases[i]  # type: ignore[assignment]
    return made


def children(net: Drawn, fused: bool = False) -> list[nn.Module]:
    found: list[nn.Module] = []
    for i, act in enumerate(net.acts):
        found.append(layer(net, i, act if fused else None))
        if not fused and act != IDENTITY:
            found.append(module_of(act))
        if net.drops:
            found.append(nn.Dropout(net.dropouts[i]))
    return found


def sequential(net: Drawn, fused: bool) -> nn.Module:
    return fastmlp.Sequential(*children(net, fused))


def traced(net: Drawn) -> nn.Module:
    """Recording calls the model, too, which may draw."""
    state = torch.get_rng_state()
    made = fastmlp.convert(nn.Sequential(*children(net)), trace=True)
    torch.set_rng_state(state)
    return made


def compared(case: Case, net: Drawn) -> None:
    way = case.choice(list(ways := callers(case, net)))
    mode = case.choice(["", "", "", "", "no_grad", "inference_mode"])
    case.act(way, mode)
    context = {"": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    kept = [oracle.bytes_of(t) for t in net.tensors]
    with context():
        torch.manual_seed(net.seed)
        native, native_error = attempt(net.torchs)
        after = torch.get_rng_state()
        torch.manual_seed(net.seed)
        found, error = attempt(ways[way])
    if native_error is not None:
        case.require(error is not None, f"PyTorch raises {type(native_error).__name__}: {native_error}")
        return case.both_raise(native_error)
    if error is not None:
        raise error
    assert found is not None
    assert native is not None
    case.require(bool((torch.get_rng_state() == after).all()), "the generator is elsewhere")
    case.require(found.requires_grad == native.requires_grad, f"requires_grad is {found.requires_grad}")
    grad = drawn.randn(case, *native.shape, dtype=native.dtype)
    grad, how = drawn.lay_to_read(case, grad)
    case.note(f"  gradient {how}")
    with torch.no_grad():
        rows = [oracle.rows_of(x) for x in (net.input.detach(), grad)]
        bounds = network(rows[0], net.weights, net.biases, net.acts, rows[1], noises=net.noises())
        plain = oracle.rows_of(native)
    oracle.compare(case, oracle.rows_of(found), bounds.output, plain, "output")
    if native.requires_grad:
        backward(case, net, found, native, grad, bounds.gradients)
    changed = [i for i, t in enumerate(net.tensors) if oracle.bytes_of(t) != kept[i]]
    case.require(not changed, f"tensors {changed} have changed")


def backward(case: Case, net: Drawn, found: Tensor, native: Tensor, grad: Tensor, bounds: list[Bounded]) -> None:
    wanted = [i for i, t in enumerate(net.tensors) if t.requires_grad and case.chance(0.85)]
    if not wanted:
        return
    case.act("backward", str(wanted))
    tensors = [net.tensors[i] for i in wanted]
    theirs = torch.autograd.grad(native, tensors, grad)
    ours = torch.autograd.grad(found, tensors, grad, retain_graph=True)
    again = torch.autograd.grad(found, tensors, grad) if case.chance(0.1) else ours
    for i, mine, other, once in zip(wanted, ours, theirs, again, strict=True):
        case.require(mine.shape == other.shape, f"gradient {i} has shape {tuple(mine.shape)}")
        case.require(oracle.bytes_of(mine) == oracle.bytes_of(once), f"gradient {i} is another the second time")
        shape = bounds[i].value.shape
        oracle.compare(
            case, mine.reshape(shape), bounds[i], other.reshape(shape), f"gradient {i}", oracle.nan_is_open(net.acts)
        )


def broken(case: Case, net: Drawn) -> None:
    """Arguments that do not belong together: where PyTorch raises, so does the library."""
    way = case.choice(list(ways := callers(case, net)))
    kind = case.choice(["width", "dtype", "bias", "a number"])
    if kind == "width":
        net.input = torch.cat(
            [net.input.detach(), net.input.detach()[..., :0], net.input.new_ones(*net.input.shape[:-1], 1)], -1
        )
    elif kind == "dtype":
        net.input = net.input.detach().to(torch.float64 if net.input.dtype != torch.float64 else torch.float32)
    elif kind == "bias":
        net.biases[-1] = torch.ones(net.weights[-1].shape[0] + 2, dtype=net.input.dtype)
    else:
        net.input = torch.tensor(1.0, dtype=net.input.dtype)
    case.act(f"broken {kind}", way)
    _, native_error = attempt(net.torchs)
    found, error = attempt(ways[way])
    if native_error is not None and error is not None:
        return case.both_raise(error)
    if native_error is not None:
        case.require(False, f"PyTorch raises {type(native_error).__name__}: {native_error}, ours gives {found!r:.200}")
    if error is not None:
        raise error
