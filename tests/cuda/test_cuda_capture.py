"""`fastmlp.capture` on a GPU, by `make gpu-test`: nothing of this can run without one.

What is done around a CUDA graph is tested without a GPU in tests/capture/test_graphs.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

CALLS = 12
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, capturable=True),
    "AdamW with a tensor for lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, device="cuda"), capturable=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, capturable=True),
}


class Program:
    def __init__(self, optimizer_of: Callable[[Any], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 2)]
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = optimizer_of(self.model.parameters())

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        output = self.model(x + 0.01 * torch.randn_like(x))
        loss = F.mse_loss(output, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach(), output.detach()


def batch(i: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(rows, 4, generator=generator).cuda(), torch.randn(rows, 2, generator=generator).cuda()


def run(program: Program, step: Any, change: Callable[[Program, int], None]) -> list[Tensor]:
    torch.manual_seed(1)
    found = []
    for i in range(CALLS):
        change(program, i)
        found += step(*batch(i))
        found += [value.clone() for value in program.model.state_dict().values()]
        found += [p.grad.clone() for p in program.model.parameters() if p.grad is not None]
    return [*found, torch.cuda.get_rng_state()]


def nothing(program: Program, i: int) -> None:
    pass


def evaluate(program: Program, i: int) -> None:
    if i == 5:
        program.model.eval()


def lower_rate(program: Program, i: int) -> None:
    if i == 5:
        rate = program.optimizer.param_groups[0]["lr"]
        if isinstance(rate, Tensor):
            rate.mul_(0.1)
        else:
            program.optimizer.param_groups[0]["lr"] = 0.1 * rate


@pytest.mark.parametrize("change", [nothing, evaluate, lower_rate])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_loop_has_the_bits_of_the_eager_one(name: str, change: Callable[[Program, int], None]) -> None:
    eager, twin = Program(OPTIMIZERS[name]), Program(OPTIMIZERS[name])
    step = fastmlp.capture(twin.step, fuse=False)
    expected, found = run(eager, eager.step, change), run(twin, step, change)
    assert [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if not torch.equal(a, b)] == []
    assert step.replays >= CALLS - 5


def test_inference() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).cuda().eval()
    call = fastmlp.capture(model)
    with torch.no_grad():
        kept = [(call(batch(i)[0]), model(batch(i)[0])) for i in range(6)]
    assert all(torch.equal(found, expected) for found, expected in kept)
    assert call.replays == 4


def test_a_generator_of_its_own() -> None:
    mine, other = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    captured = fastmlp.capture(lambda x: x + torch.rand(8, device="cuda", generator=mine))
    for i in range(8):
        x = torch.full((8,), float(i), device="cuda")
        assert torch.equal(captured(x), x + torch.rand(8, device="cuda", generator=other))
    assert captured.replays == 6


def test_what_reads_the_gpu_is_refused() -> None:
    call = fastmlp.capture(lambda x: x.sum().item())
    with pytest.raises(fastmlp.CaptureError, match="an element of a tensor is read by Python"):
        call(batch(0)[0])


def test_an_optimizer_that_counts_on_the_cpu_is_refused() -> None:
    program = Program(lambda p: torch.optim.Adam(p, lr=0.01))
    step = fastmlp.capture(program.step)
    with pytest.raises(fastmlp.CaptureError, match="make it with capturable=True"):
        step(*batch(0))
