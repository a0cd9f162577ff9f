"""fastmlp.optim with what only torch's own step can update, alone and beside parameters that ours can."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastmlp import optim
from tests.support.optimizers import checked_step, form, made, parameters, set_gradients
from tests.support.training import FUSED, OPTIMIZERS


@pytest.fixture(params=OPTIMIZERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class OwnParameter(nn.Parameter):
    """A subclass, whose operations might be anything."""


def sparse_gradient(p: nn.Parameter) -> None:
    weight = p.detach().requires_grad_()
    nn.functional.embedding(torch.tensor([0, 2, 2]), weight, sparse=True).sum().backward()
    p.grad = weight.grad


#: A parameter, how it gets its gradients, and with which optimizers.
SPECIAL: dict[str, tuple[Callable[[], nn.Parameter], Callable[[nn.Parameter], None], tuple[str, ...]]] = {
    "sparse": (lambda: nn.Parameter(torch.randn(4, 3)), sparse_gradient, ("SGD",)),
    "complex": (
        lambda: nn.Parameter(torch.randn(4, 3, dtype=torch.complex64)),
        lambda p: setattr(p, "grad", torch.randn_like(p)),
        OPTIMIZERS,
    ),
    "subclass": (
        lambda: OwnParameter(torch.randn(4, 3)),
        lambda p: setattr(p, "grad", torch.randn(4, 3)),
        OPTIMIZERS,
    ),
    "not dense": (
        lambda: nn.Parameter(torch.randn(4, 6)[:, ::2]),
        lambda p: setattr(p, "grad", torch.randn(4, 3)),
        OPTIMIZERS,
    ),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_among_others(name: str, case: str) -> None:
    """Bit for bit what torch makes of it, while the others are within their bounds; in one group, and in two."""
    build, set_gradient, names = SPECIAL[case]
    if name not in names:
        p = build()
        set_gradient(p)
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            made(name, [p]).step()
        return
    for together in (True, False):
        torch.manual_seed(0)
        special = build()
        others = parameters()
        more = {"weight_decay": 0.0, "momentum": 0.0} if case == "sparse" else {}
        groups = [*others[:2], special, *others[2:]] if together else [{"params": others}, {"params": [special]}]
        optimizer = made(name, groups, **more)
        same = nn.Parameter(special.detach().clone())
        alone = made(name, [same], torch.optim, foreach=False, **more)
        for _ in range(3):
            set_gradient(special)
            same.grad = None if special.grad is None else special.grad.clone()
            alone.step()
            set_gradients(others)
            checked_step(optimizer, leave=[special])
            assert torch.equal(special.detach(), same.detach())
        assert form(dict(optimizer.state[special])) == form(dict(alone.state[same]))


def test_states_in_the_order_of_parameters(name: str) -> None:
    """Also where torch steps for the last one first; and where there is nothing to keep, there is no state."""
    params = [*parameters(), OwnParameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2))]
    optimizer = made(name, params)
    set_gradients(params)
    optimizer.step()
    assert all(p is q for p, q in zip(optimizer.state, params, strict=True))
    plain = optim.SGD(params, lr=0.1)
    plain.step()
    assert not plain.state


def test_torchs_step_of_an_optimizer_with_other_options() -> None:
    class Signs(torch.optim.Optimizer):
        """Neither counts its steps, nor has a momentum."""

        def step(self) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad.sign())

    moved, kept = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    moved.grad, kept.grad = torch.ones(2), torch.ones(2)
    optim._step_of_others(Signs([moved, kept], {}), Signs.step, [moved])
    assert torch.equal(moved.detach(), -torch.ones(2))
    assert torch.equal(kept.detach(), torch.zeros(2))
    assert torch.equal(kept.grad, torch.ones(2))


def test_fused_with_gaps(name: str) -> None:
    """torch's own fused step reads and writes memory with gaps as if it had none: it gives other numbers."""
    if name not in FUSED:
        return
    torch.manual_seed(0)
    memory = torch.randn(4, 6)
    p, between = nn.Parameter(memory[:, ::2]), memory[:, 1::2].clone()
    whole = nn.Parameter(torch.randn(4, 3))
    optimizer = made(name, [p, whole], fused=True)
    for _ in range(3):
        set_gradients([p, whole])
        checked_step(optimizer)
    assert p.data_ptr() == memory.data_ptr()
    assert torch.equal(memory[:, 1::2], between)
    assert optimizer.param_groups[0]["fused"] is True


def test_groups_gain_no_entries(name: str) -> None:
    """While torch moves some parameters; RMSprop has no entry `fused`."""
    special = SPECIAL["not dense"][0]()
    optimizer = made(name, [*parameters(), special])
    before = [list(group) for group in optimizer.param_groups]
    set_gradients([p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    assert [list(group) for group in optimizer.param_groups] == before
    assert len(optimizer.state) == 5


def test_differentiable(name: str) -> None:
    """By torch's own step, through which gradients flow."""
    p = torch.randn(3, requires_grad=True)
    value = p.clone()
    # Without eps RMSprop's first step is the gradient's sign, whose derivative is zero.
    special: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0}, "RMSprop": {"eps": 1.0}}
    more = special.get(name, {})
    optimizer = made(name, [p], differentiable=True, **more)
    optimizer.param_groups[0]["params"] = [value]
    value.grad = torch.ones(3, requires_grad=True)
    grad = value.grad
    optimizer.step()
    assert value.grad_fn is not None
    assert torch.autograd.grad(value.sum(), grad)[0].abs().sum() > 0


def test_capturable(name: str) -> None:
    """On the CPU as torch has it: an error when it steps, of the optimizers that know the argument."""
    outcomes: list[Any] = []
    for module in (torch.optim, optim):
        try:
            params = parameters()
            optimizer = made(name, params, module, capturable=True)
            set_gradients(params)
            optimizer.step()
        except Exception as error:
            outcomes.append((type(error), str(error).replace("__init__", "")))
        else:
            outcomes.append((type(None), ""))
    assert outcomes[0] == outcomes[1]


def test_meta(name: str) -> None:
    """Beside parameters on the CPU."""
    params = parameters()
    meta = nn.Parameter(torch.randn(3, 2, device="meta"))
    optimizer = made(name, [*params, meta])
    for _ in range(2):
        set_gradients(params)
        meta.grad = torch.zeros(3, 2, device="meta")
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert [i for i, p in enumerate(params) if torch.equal(p, before[i])] == []


@pytest.mark.parametrize("case", ["shape", "dtype", "smaller state", "dtype of state", "step without dimension"])
def test_what_does_not_fit(name: str, case: str) -> None:
    """An error where torch has one; otherwise the same shapes and dtypes; never memory that is not theirs."""
    outcomes: list[Any] = []
    for module in (torch.optim, optim):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(8, 4))
        optimizer = made(name, [p], module, foreach=False)
        for _ in range(2):
            p.grad = torch.randn(8, 4)
            optimizer.step()
        key = {"SGD": "momentum_buffer", "RMSprop": "square_avg"}.get(name, "exp_avg_sq")
        if case == "shape":
            p.data = torch.randn(2, 2)
        elif case == "dtype":
            p.data = p.data.double()
        elif case == "smaller state":
            optimizer.state[p][key] = torch.zeros(2, 4)
        elif case == "dtype of state":
            optimizer.state[p][key] = optimizer.state[p][key].double()
        elif name != "SGD":
            optimizer.state[p]["step"] = torch.tensor([2.0])
        try:
            optimizer.step()
        except Exception as error:
            outcomes.append(type(error))
        else:
            outcomes.append(form([p, dict(optimizer.state[p])]))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(name: str, fused: bool) -> None:
    """Fused optimizers undo the scale themselves, and skip a step where a gradient is not finite."""
    params = parameters()
    optimizer = made(name, params, **({"fused": fused} if name in FUSED else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for call in range(4):
        optimizer.zero_grad()
        overflow = call == 1
        loss = torch.stack([(p * p).sum() for p in params]).sum() * (float("inf") if overflow else 1)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in params]
        if overflow:
            scaler.step(optimizer)
        else:
            checked_step(optimizer, step=lambda: scaler.step(optimizer), scale=scale)
        assert [torch.equal(p, value) for p, value in zip(params, before, strict=True)] == [overflow] * len(params)
        scaler.update()
    assert scaler.get_scale() == 4
