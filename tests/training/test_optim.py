"""fastmlp.optim against the formulas of torch.optim, step by step, for lists of parameters drawn at random."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import optim
from tests.support.axes import DTYPES, ISAS
from tests.support.bounds import gamma
from tests.support.optimizers import checked_step, form
from tests.support.training import OPTIMIZERS, Optimizer, draw_optimizer, optimizer_of

STEPS = 6
#: What only groups of one optimizer have, and what may be on or off.
KEYS = {
    "SGD": ["momentum", "nesterov", "dampening"],
    "Adam": ["amsgrad"],
    "AdamW": ["amsgrad"],
    "RMSprop": ["momentum", "centered"],
}
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (7,),
    (16,),
    (67,),
    (1000,),
    (0,),
    (3, 0),
    (5, 3),
    (33, 17),
    (1, 64),
    (2, 3, 4),
    (4, 3, 5, 2),
]


pytestmark = pytest.mark.usefixtures("as_before")


def gapped(x: Tensor) -> Tensor:
    """With room between the numbers, which no kernel for dense memory may touch."""
    return torch.stack([x, torch.full_like(x, 9)], -1)[..., 0]


def misaligned(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def transposed(x: Tensor) -> Tensor:
    backwards = list(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "transposed": transposed,
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.clone(),
    "misaligned": misaligned,
    "gapped": gapped,
}
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "like the parameter": lambda p, g: torch.empty_like(p).copy_(g),
    "contiguous": lambda p, g: g.clone(),
    "transposed": lambda p, g: transposed(g),
    "expanded": lambda p, g: g.flatten()[:1].view((1,) * g.dim()).expand(g.shape) if g.numel() else g,
    "gapped": lambda p, g: gapped(g),
}


@dataclass(frozen=True)
class Drawn:
    """An optimizer and its parameters, without numbers."""

    seed: int
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...]
    gradients: tuple[str, ...]
    name: str
    arguments: dict[str, Any]
    other: dict[str, Any]  # arguments of a second group

    def __str__(self) -> str:
        return f"{self.seed}-{self.name}"

    def parameters(self) -> list[nn.Parameter]:
        return [
            nn.Parameter(LAYOUTS[layout](torch.randn(shape).to(dtype)))
            for shape, layout, dtype in zip(self.shapes, self.layouts, self.dtypes, strict=True)
        ]

    def optimizer(self, module: Any, parameters: Sequence[nn.Parameter]) -> Optimizer:
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], **self.other}]
        return optimizer_of(module, self.name, self.arguments, groups[: len(parameters)])


def draw(seed: int) -> Drawn:
    random_ = random.Random(seed)
    count = random_.choice([1, 2, 5, 9])
    kinds = DTYPES if seed % 5 == 4 else [DTYPES[seed % 5]]
    dtypes = tuple(random_.choice(kinds) for _ in range(count))
    name = OPTIMIZERS[seed // 5 % len(OPTIMIZERS)]
    arguments, other = draw_optimizer(random_, name), draw_optimizer(random_, name)
    if any(dtype.itemsize == 2 for dtype in dtypes):
        for made in (arguments, other):
            if name != "SGD":  # 1e-8 is zero in float16, and so may be the root that it is added to
                made["eps"] = 1e-3
    return Drawn(
        seed,
        dtypes,
        tuple(random_.choice(SHAPES) for _ in range(count)),
        tuple(random_.choice([*LAYOUTS, "contiguous", "contiguous"]) for _ in range(count)),
        tuple(random_.choice([*GRADIENTS, "like the parameter", "contiguous"]) for _ in range(count)),
        name,
        arguments,
        other,
    )


DRAWN = [draw(seed) for seed in range(280)]


def test_what_is_drawn() -> None:
    assert {dtype for d in DRAWN for dtype in d.dtypes} == set(DTYPES)
    for name in OPTIMIZERS:
        drawn = [d for d in DRAWN if d.name == name]
        assert {shape for d in drawn for shape in d.shapes} == set(SHAPES)
        assert {layout for d in drawn for layout in d.layouts} == set(LAYOUTS)
        assert {gradient for d in drawn for gradient in d.gradients} == set(GRADIENTS)
        assert {(d.dtypes[0], len(set(d.dtypes)) > 1) for d in drawn} >= set(itertools.product(DTYPES, [False]))
        assert any(len(set(d.dtypes)) > 2 for d in drawn)
        for key, dtype in itertools.product(["maximize", "weight_decay", *KEYS[name]], DTYPES):
            assert {bool(d.arguments[key]) for d in drawn if dtype in d.dtypes} == {True, False}, (key, dtype)


def set_gradients(drawn: Drawn, parameters: Sequence[nn.Parameter], random_: random.Random) -> None:
    """Of different sizes, some exactly zero; now and then one has none."""
    for p, layout in zip(parameters, drawn.gradients, strict=True):
        size = random_.choice([1.0, 1.0, 1e-2, 1e-4, 10.0])
        grad = torch.randn(p.shape) * size * (torch.rand(p.shape) > 0.1)
        p.grad = None if random_.random() < 0.1 else GRADIENTS[layout](p.detach(), grad.to(p.dtype))


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_steps(drawn: Drawn) -> None:
    """Ours on every instruction set, and torch's own, which the same bounds hold for."""
    for isa in (None, *ISAS):
        torch.manual_seed(drawn.seed)
        random_ = random.Random(drawn.seed)
        parameters = drawn.parameters()
        optimizer = drawn.optimizer(torch.optim if isa is None else optim, parameters)
        if isa is not None:
            fastmlp.set_isa(isa)
        for _ in range(STEPS):
            set_gradients(drawn, parameters, random_)
            checked_step(optimizer, str(isa))


@pytest.mark.parametrize("drawn", DRAWN[::3], ids=str)
def test_state_dicts_are_those_of_torch(drawn: Drawn) -> None:
    """Keys in their order, types, dtypes and shapes."""
    forms = []
    for module in (torch.optim, optim):
        torch.manual_seed(drawn.seed)
        random_ = random.Random(drawn.seed)
        parameters = drawn.parameters()
        optimizer = drawn.optimizer(module, parameters)
        forms.append([form(optimizer.state_dict())])
        for _ in range(2):
            set_gradients(drawn, parameters, random_)
            optimizer.step()
            forms[-1].append(form(optimizer.state_dict()))
    assert forms[0] == forms[1]


@pytest.mark.parametrize("drawn", DRAWN[1::3], ids=str)
def test_gradients_are_not_changed(drawn: Drawn) -> None:
    """Nor is what lies between numbers; and no state shares memory with them."""
    torch.manual_seed(drawn.seed)
    parameters = drawn.parameters()
    optimizer = drawn.optimizer(optim, parameters)
    set_gradients(drawn, parameters, random.Random(drawn.seed))
    grads = [p.grad for p in parameters if p.grad is not None]
    before = [(list(grad.untyped_storage()), grad._version) for grad in grads]
    optimizer.step()
    assert [(list(grad.untyped_storage()), grad._version) for grad in grads] == before
    assert all(p.grad is grad for p, grad in zip([p for p in parameters if p.grad is not None], grads, strict=True))
    pointers = {grad.untyped_storage().data_ptr() for grad in grads if grad.numel()}
    kept = [x for state in optimizer.state.values() for x in state.values() if x is not None and x.numel()]
    assert not pointers & {x.untyped_storage().data_ptr() for x in kept}
    for p, layout in zip(parameters, drawn.layouts, strict=True):
        if layout == "gapped" and p.numel():
            around = torch.tensor([], dtype=p.dtype).set_(p.untyped_storage())
            assert bool((around[1::2] == 9).all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_of_one_memory(name: str) -> None:
    """As models have them whose parameters are views of one flat buffer."""
    flat = torch.randn(100)
    parameters = [nn.Parameter(flat[:7]), nn.Parameter(flat[7:31].view(4, 6)), nn.Parameter(flat[31:99])]
    optimizer = optimizer_of(optim, name, {"lr": 0.1}, parameters)
    last = flat[99].item()
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        checked_step(optimizer)
    assert flat[99].item() == last
    assert torch.equal(flat[:99], torch.cat([p.detach().flatten() for p in parameters]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_many_parameters(name: str) -> None:
    parameters = [nn.Parameter(torch.randn(1 + i % 19)) for i in range(300)]
    optimizer = optimizer_of(optim, name, {"lr": 0.1}, parameters)
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p) if i % 7 else None
        checked_step(optimizer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_large_parameters(name: str, dtype: torch.dtype, isa: str) -> None:
    """Shared among threads, with the same bits for any number of them where they are computed as they are stored."""
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n).to(dtype)) for n in (20_001, 5, 70_007)]
        extra = {"momentum": 0.9} if name == "SGD" else {"eps": 1e-3}
        optimizer = optimizer_of(optim, name, {"lr": 0.1, "weight_decay": 0.01, **extra}, parameters)

        def step(threads: int = threads, optimizer: Optimizer = optimizer) -> None:
            torch.set_num_threads(threads)
            optimizer.step()
            torch.set_num_threads(1)

        for _ in range(2):
            for p in parameters:
                p.grad = torch.randn(p.shape).to(dtype)
            checked_step(optimizer, step=step)
        results.append([p.detach() for p in parameters])
    if dtype.itemsize > 2:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drawn", [d for d in DRAWN if len(set(d.dtypes)) == 1][:45:3], ids=str)
def test_not_finite_gradients(drawn: Drawn, dtype: torch.dtype) -> None:
    """NaN and infinities of either sign where torch has them."""
    # What overflows in between depends on where sums are rounded to 16 bits, which torch does more often than we.
    largest = torch.finfo(dtype).max if dtype.itemsize > 2 else 1.0
    values = [float("nan"), float("inf"), float("-inf"), 0.0, 1.0, largest, torch.finfo(dtype).tiny]
    results = []
    for isa in (None, *ISAS):
        p = nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float32).to(dtype))
        arguments = drawn.arguments if drawn.name == "SGD" else drawn.arguments | {"eps": 1e-3}
        optimizer = optimizer_of(torch.optim if isa is None else optim, drawn.name, arguments, [p])
        if isa is not None:
            fastmlp.set_isa(isa)
        for step in range(3):
            p.grad = torch.tensor(values).roll(step // 2).to(dtype)
            optimizer.step()
        results.append([p.detach(), *(x for x in optimizer.state[p].values() if x is not None)])
        for found, expected in zip(results[-1], results[0], strict=True):
            assert torch.equal(found.isnan(), expected.isnan()), isa
            assert torch.equal(found.isposinf(), expected.isposinf()), isa
            assert torch.equal(found.isneginf(), expected.isneginf()), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_zero_gradients(name: str, dtype: torch.dtype) -> None:
    """With eps = 0 as well, where 0 / 0 is NaN."""
    for eps in (1e-3, 0.0):
        results = []
        for module in (torch.optim, optim):
            p = nn.Parameter(torch.ones(9, dtype=dtype))
            optimizer = optimizer_of(module, name, {"lr": 0.1, "eps": eps, "weight_decay": 0.0}, [p])
            p.grad = torch.zeros_like(p)
            optimizer.step()
            results.append(p.detach())
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert bool(results[1].isnan().all()) == (eps == 0)
        assert eps == 0 or torch.equal(*results)


def test_long_trainings() -> None:
    """Bias corrections of many steps, from a count that was loaded."""
    for name, steps in itertools.product(["Adam", "AdamW"], [1e2, 1e3, 1e5, 1e7]):
        p = nn.Parameter(torch.randn(50, dtype=torch.float64))
        optimizer = optimizer_of(optim, name, {"lr": 0.1}, [p])
        p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.state[p]["step"].fill_(steps)
        for _ in range(2):
            checked_step(optimizer, f"{name} after {steps}")


@pytest.mark.parametrize("fault", ["lr", "weight_decay", "betas", "eps", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrong_step_is_found_out(fault: str, dtype: torch.dtype) -> None:
    """Each by a thousandth or less."""
    p = nn.Parameter(torch.randn(50, dtype=dtype))
    arguments = {"lr": 0.1, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-3}

    def change(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if fault == "state":
            optimizer.state[p]["exp_avg_sq"] *= 1 + 1e-5
        elif fault == "betas":
            optimizer.param_groups[0]["betas"] = (0.9, 0.99900005)
        else:
            optimizer.param_groups[0][fault] *= 1.001

    optimizer = torch.optim.AdamW([p], **arguments)  # type: ignore[arg-type]
    for _ in range(5):
        p.grad = torch.randn_like(p)
        checked_step(optimizer)
    optimizer.register_step_pre_hook(change)
    with pytest.raises(AssertionError, match="outside"):
        checked_step(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rmsprop_whose_variance_is_zero(dtype: torch.dtype, isa: str) -> None:
    """With alpha = 0 the mean is the gradient itself: the root is that of zero, where torch has that of a rounding."""
    p = nn.Parameter(torch.randn(67).to(dtype))
    optimizer = optim.RMSprop([p], lr=0.01, alpha=0.0, centered=True, eps=0.5)
    for _ in range(3):
        before, p.grad = p.detach().clone(), torch.randn(67).to(dtype)
        optimizer.step()
        change = 0.02 * p.grad.double()
        # The quotient, the rate, the product and the difference are rounded.
        error = (p.detach().double() - (before.double() - change)).abs()
        assert bool((error <= gamma(4, dtype) * (before.double().abs() + change.abs())).all())
