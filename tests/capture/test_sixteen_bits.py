"""Captured programs of bfloat16 and float16, and of several dtypes: they are computed in float32, and round where torch
rounds."""

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmlp
from tests.support.rounding import distance, rounding_bounds

DTYPES = [torch.bfloat16, torch.float16]
CALLS = 4


def other(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 else torch.bfloat16


#: Functions of two matrices of one dtype, of operations that torch rounds once and correctly.
EXACT: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    torch.sub,
    torch.mul,
    lambda h, g: h / (g.abs() + 1),
    lambda h, g: h * 0.3 - 0.1,
    lambda h, g: 0.7 - h / 3,
    lambda h, g: torch.relu(h) + g[:1],
    lambda h, g: torch.maximum(h, g.t().contiguous().t()),
    lambda h, g: torch.where(h > 0.1, h, g),
    lambda h, g: (h >= 0.3) * g,
    lambda h, g: (h == h.amax(1, keepdim=True)).to(h.dtype) + g,
    lambda h, g: h.masked_fill(g <= -0.1, 0.3),
    lambda h, g: h.clamp(-0.7, 0.9) + (h > 0.9).to(g.dtype),
    lambda h, g: (h.float() * g.float() + 0.1).to(h.dtype),
    lambda h, g: h.to(other(h.dtype)).to(h.dtype) * g,
    lambda h, g: h.float().exp().to(h.dtype).to(torch.bool) * g,
    lambda h, g: torch.cat([g[:, 2:], h[:, :2]], 1),
    lambda h, g: h.clone().add_(g).mul_(0.9).neg_(),
    lambda h, g: h.square() - g.abs().sqrt(),
    lambda h, g: torch.full_like(h, 0.3) * torch.ones_like(g) + g,
    lambda h, g: torch.arange(h.shape[1]).to(h.dtype) / 300 + g,
    lambda h, g: (h + torch.full((), 0.1, dtype=h.dtype)) * g.amin(),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_each_operation_rounds_as_torch_does(dtype: torch.dtype, seed: int) -> None:
    """Chains of operations have torch's bits: what is compared, or chosen by, may not differ in the last place."""
    draw = random.Random(seed)
    chain = [(draw.randrange(len(EXACT)), draw.random()) for _ in range(draw.randint(1, 8))]
    shape = draw.choice([(1, 4), (3, 5), (7, 33), (64, 40), (5, 2100)])

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        made = [a, b]
        for index, place in chain:
            made.append(EXACT[index](made[-1], made[int(place * len(made))]))
        return made[-1], made[len(made) // 2] * 1, made[-1].float().amax(0), made[-1] > 0.1

    captured, generator = fastmlp.capture(function), torch.Generator().manual_seed(seed)
    for _ in range(CALLS):
        a, b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        for found, wanted in zip(captured(a, b), function(a, b), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found.double().nan_to_num(0.5), wanted.double().nan_to_num(0.5))


def test_one_pass_of_several_dtypes() -> None:
    """Casts between float32 and 16 bits are part of a run, and products take 16 bits."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.tanh(x @ weight) * x.sum(1, keepdim=True)

    captured = fastmlp.capture(function)
    x, weight = torch.randn(8, 8), torch.randn(8, 8)
    for _ in range(CALLS):
        captured(x, weight)
    report = str(captured.report())
    assert "by torch: none" in report
    assert "product 1" in report


Step = Callable[[Tensor, Tensor], Tensor]


def training(dtype: torch.dtype, autocast: bool) -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 33), nn.ReLU(), nn.Linear(33, 33), nn.GELU(), nn.Linear(33, 3)
    ).to(dtype)

    def step(x: Tensor, y: Tensor) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.mse_loss(torch.sigmoid(model(x)), y)
        loss.backward()
        return loss.detach()

    return model, step


def results(model: nn.Module, step: Step, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients."""
    found = {"loss": step(x, y).clone()}
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        found[name] = weight.grad.clone()
    return found


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "autocast"])
def test_losses_and_gradients(stored: str) -> None:
    """They differ from eager's by no more than rounding explains, and no operation is left to torch."""
    autocast = stored == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, stored)
    plain, eager = training(dtype, autocast)
    model, step = training(dtype, autocast)
    captured, generator = fastmlp.capture(step), torch.Generator().manual_seed(0)
    for _ in range(CALLS):
        x = torch.randn(20, 9, generator=generator).to(dtype)
        y = torch.rand(20, 3, generator=generator).to(dtype)
        found, wanted = results(model, captured, x, y), results(plain, eager, x, y)
        bounds = rounding_bounds(partial(results, plain, eager, x, y), wanted, steps=True)
        for name, bound in bounds.items():
            assert distance(found[name], wanted[name]) <= bound, name
    report = str(captured.report())
    assert captured.replays == CALLS - 2
    assert "by torch: none" in report, report
