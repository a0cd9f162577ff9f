"""What TrainStep leaves behind besides numbers: whose memory gradients are in, version counters, the state's form."""

import copy
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmlp
from tests.support.axes import ISAS
from tests.support.memory import JUNK
from tests.support.optimizers import ARGUMENTS
from tests.support.rounding import Results
from tests.support.steps import F64, batch, gradients_left_behind, network, sgd
from tests.support.training import Loop, Maker, Optimizer, assert_equal_to_rounding, everything


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return found


def test_gradients_are_those_of_the_loop() -> None:
    model = network()
    step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    step(*batch())
    for p, grad in zip(model.parameters(), gradients(model), strict=True):
        assert (grad.shape, grad.dtype, grad.stride()) == (p.shape, p.dtype, p.stride())
        assert type(grad) is Tensor
        assert not grad.requires_grad
        assert grad.is_leaf


#: Ways to hold on to a gradient.
HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda grad: grad,
    "a view": lambda grad: grad.view(-1),
    "detached": lambda grad: grad.detach(),
    "a part": lambda grad: grad[:1],
    "its storage": lambda grad: grad.untyped_storage(),
    "an array": lambda grad: grad.numpy(),
    "an array by dlpack": lambda grad: np.from_dlpack(grad),
}


def bits(held: Any) -> list[Any]:
    return list(held) if isinstance(held, torch.UntypedStorage) else held.tolist()


@pytest.mark.parametrize("how", HOLDS)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.01}, {"clip_value": 1e-3}, {"accumulate": 2}], ids=str)
def test_a_gradient_that_somebody_holds_is_not_overwritten(how: str, options: dict[str, Any]) -> None:
    model = network()
    step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()), **options)
    for _ in range(options.get("accumulate", 1)):
        step(*batch())
    held = [HOLDS[how](grad) for grad in gradients(model)]
    before = [bits(x) for x in held]
    for _ in range(3):
        step(*batch())
        assert [bits(x) for x in held] == before


def test_gradients_that_the_user_set_are_not_overwritten() -> None:
    model = network()
    step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    mine = [torch.full_like(p, 3) for p in model.parameters()]
    for p, grad in zip(model.parameters(), mine, strict=True):
        p.grad = grad
    step(*batch())
    assert all(bool((grad == 3).all()) for grad in mine)
    assert all(p.grad is not grad for p, grad in zip(model.parameters(), mine, strict=True))


def test_losses_are_not_overwritten() -> None:
    model = network()
    step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    first = step(*batch())
    value = first.item()
    second = step(*batch())
    assert first.item() == value != second.item()
    assert first.data_ptr() != second.data_ptr()


def test_gradients_that_are_not_kept() -> None:
    model, other = network(), nn.Parameter(torch.zeros(2))
    gradients_left_behind(model, sgd([other]))
    optimizer = torch.optim.AdamW(model.parameters())
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer, keep_grads=False)
    step(*batch())
    assert [p.grad for p in model.parameters()] == [None] * 6
    assert len(optimizer.state) == 6


def versions(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    found = {name: p._version for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": x._version for key, x in optimizer.state[p].items()}
    return found


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "fastmlp"])
@pytest.mark.parametrize(("kind", "arguments"), ARGUMENTS.items(), ids=str)
def test_version_counters_grow(kind: str, arguments: dict[str, Any], ours: bool) -> None:
    model = network()
    optimizer = getattr(fastmlp.optim if ours else torch.optim, kind)(model.parameters(), **arguments)
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    step(*batch())
    before = versions(model, optimizer)
    step(*batch())
    after = versions(model, optimizer)
    assert [name for name, version in after.items() if version <= before[name]] == []


@pytest.mark.parametrize("what", ["parameter", "state"])
def test_autograd_notices_a_step(what: str) -> None:
    """A graph that has saved what a step has changed since then does not run backward."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    step(*batch())
    weight = model[2].weight
    saved = weight if what == "parameter" else optimizer.state[weight]["exp_avg_sq"]
    output = (torch.ones(5, 9, dtype=F64, requires_grad=True) * saved).sum()
    step(*batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_parameters_and_state_stay_where_they_are() -> None:
    """The same tensors, of whom others may have views."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    step(*batch())
    tensors = [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
    before = [(id(x), x.data_ptr(), x.detach().clone()) for x in tensors]
    step(*batch())
    after = [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
    assert [(id(x), x.data_ptr()) for x in after] == [pair[:2] for pair in before]
    assert [i for i, x in enumerate(after) if torch.equal(x, before[i][2])] == []


def test_state_is_made_as_torch_makes_it() -> None:
    """Also its order, and of parameters with gradients only."""
    states = []
    for make in (Loop, fastmlp.TrainStep):
        model = network(torch.float32)
        model[2].weight.data = model[2].weight.data.t().contiguous().t()
        model[4].bias.requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
        make(model, nn.MSELoss(), optimizer)(*batch(torch.float32))
        state = optimizer.state_dict()["state"]
        states.append(
            {i: [(key, x.dtype, x.shape, x.stride(), type(x)) for key, x in kept.items()] for i, kept in state.items()}
        )
    assert states[0] == states[1]
    assert list(states[0]) == list(states[1])


def test_nothing_is_changed_before_the_last_call() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer, accumulate=2)
    before = [(p.detach().clone(), p._version) for p in model.parameters()]
    step(*batch())
    assert len(optimizer.state) == 0
    assert all(torch.equal(p, value) for p, (value, _) in zip(model.parameters(), before, strict=True))
    assert [p._version for p in model.parameters()] == [version for _, version in before]
    step(*batch())
    assert len(optimizer.state) == 6


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss()], ids=repr)
def test_the_same_bits_for_any_number_of_threads(loss_fn: nn.Module, kind: str, isa: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 30))
        optimizer = getattr(fastmlp.optim, kind)(model.parameters(), lr=0.01)
        step = fastmlp.TrainStep(model, loss_fn, optimizer, max_norm=1.0)
        x, y = torch.randn(3000, 20), torch.rand(3000, 30)
        losses = [step(x, y.argmax(1) if isinstance(loss_fn, nn.CrossEntropyLoss) else y) for _ in range(2)]
        results.append([*losses, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_copies_of_a_step(way: Callable[[Any], Any]) -> None:
    """Either a step of copies that goes on, or an error that names TrainStep."""
    model = network()
    step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    step(*batch())
    try:
        copied = way(step)
    except TypeError as error:
        assert "TrainStep" in str(error)  # noqa: PT017
        return
    made = pickle.loads(copied) if isinstance(copied, bytes) else copied
    x, y = batch()
    before = [p.detach().clone() for p in model.parameters()]
    loss = made(x, y)
    if way is not copy.copy:
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
        assert torch.equal(step(x, y), loss)


@pytest.mark.parametrize("version", ["options in a tuple", "public names"])
def test_states_of_earlier_versions(version: str) -> None:
    """As their pickles hold them, in the middle of a window of two calls."""
    results = []
    for earlier in (False, True):
        torch.manual_seed(0)
        model, loss_fn = network(), nn.MSELoss()
        optimizer = sgd(model.parameters())
        step = fastmlp.TrainStep(model, loss_fn, optimizer, clip_value=0.01, accumulate=2)
        losses = [step(*batch())]
        if earlier:
            options: dict[str, Any] = {"max_norm": None, "clip_value": 0.01, "accumulate": 2, "keep_grads": True}
            if version == "options in a tuple":
                options = {"_options": tuple(options.values())}
            state = {"model": model, "loss_fn": loss_fn, "optimizer": optimizer, **options, "_waiting": 1, "own": 5}
            step = fastmlp.TrainStep.__new__(fastmlp.TrainStep)
            step.__setstate__(state)
            assert vars(step)["own"] == 5
            assert (step.model, step.loss_fn, step.optimizer) == (model, loss_fn, optimizer)
            assert (step.max_norm, step.clip_value, step.accumulate, step.keep_grads) == (None, 0.01, 2, True)
        assert step.waiting == 1
        losses += [step(*batch()) for _ in range(3)]
        results.append([*losses, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_that_are_not_kept_are_nobodys() -> None:
    """Also those of parameters that the optimizer does not have, and those of parameters frozen since."""
    model = network()
    first, *others = model.parameters()
    optimizer = sgd([first])
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer, keep_grads=False)
    others[0].grad = torch.ones_like(others[0])
    others[1].grad = torch.ones_like(others[1])
    others[1].requires_grad_(False)
    step(*batch())
    assert [p.grad for p in model.parameters()] == [None] * (1 + len(others))


# Memory that nobody has written yet.


def test_new_memory_holds_junk() -> None:
    """Of torch's operators, and of the extension's own allocations, small and large."""
    for n in (1, 1000, 10_000_000):
        assert torch.empty(n, dtype=torch.int32)[-1].item() == JUNK
    x = torch.zeros(1, 0)
    output, _ = fastmlp._C.forward(fastmlp._C.Stack([False], [0], [0.0, 0.0]), x, [torch.zeros(0, 0)])
    assert output.numel() == 0
    assert torch.empty(3).isnan().all()


def stored(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise."""
    if layout == "transposed":
        return x.t().contiguous().t() if x.dim() == 2 else x.clone()
    if layout == "odd strides":
        # What a dimension of one element has for its stride means nothing.
        return x.clone().as_strided(x.shape, [7 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])
    return x.repeat_interleave(2, -1)[..., ::2]  # with gaps


def relaid(widths: tuple[int, ...], layout: str) -> nn.Sequential:
    layers = [nn.Linear(k, n, dtype=F64) for k, n in itertools.pairwise(widths)]
    for layer in layers:
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(stored(p.detach(), layout)))
            assert torch.equal(getattr(layer, name), p)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("widths", [(3, 2), (1, 3), (3, 1), (1, 1), (5, 4, 1, 3)], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "odd strides", "gaps"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"accumulate": 2}, {"keep_grads": False}], ids=str)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_parameters_in_any_layout(kind: str, options: dict[str, Any], layout: str, widths: tuple[int, ...]) -> None:
    def scenario(make: Maker) -> Results:
        model = relaid(widths, layout)
        arguments: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {"amsgrad": True}
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **arguments)
        step = make(model, nn.MSELoss(), optimizer, **options)
        found = [step(torch.randn(4, widths[0], dtype=F64), torch.randn(4, widths[-1], dtype=F64)) for _ in range(4)]
        return {"losses": torch.stack(found)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract:UserWarning")
@pytest.mark.parametrize("layout", ["transposed", "odd strides", "gaps"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}], ids=str)
def test_gradients_in_any_layout_are_added_to(options: dict[str, Any], layout: str) -> None:
    """The loop may have left them so, before a window of accumulation or within it."""

    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = sgd(model.parameters())
        step, found = make(model, nn.MSELoss(), optimizer, accumulate=3, **options), []
        for call in range(6):
            if call % 3 < 2:
                for p in model.parameters():
                    p.grad = stored(torch.ones_like(p) if p.grad is None else p.grad, layout)
            found.append(step(*batch()))
        return {"losses": torch.stack(found)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


def test_state_of_one_column_in_odd_strides() -> None:
    """It lies as its parameter does, whatever the strides of single elements: nothing is left to PyTorch's step."""
    p = nn.Parameter(torch.ones(3, 1))
    optimizer = fastmlp.optim.SGD([p], lr=0.5, momentum=0.5)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(3, 1).as_strided((3, 1), (1, 7))
    p.grad = torch.ones(3, 1).as_strided((3, 1), (1, 5))
    assert fastmlp._C.step_optimizer(optimizer, fastmlp.optim.RULES["SGD"][0], False) == []
    assert p.tolist() == [[0.5]] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that fills memory")
def test_the_memory_of_kernels_holds_junk_too() -> None:
    """What kernels keep between them comes from malloc, which fills it here: all passes give what they gave."""
    script = textwrap.dedent("""
        import ctypes, sys, pytest
        libc = ctypes.CDLL(None)
        libc.aligned_alloc.restype = ctypes.c_void_p
        for bytes in (64, 4096, 1 << 24):
            block = libc.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(bytes))
            assert ctypes.string_at(block, bytes) == b"\\x7f" * bytes
        sys.exit(pytest.main(sys.argv[1:]))
    """)
    names = ("training/test_train_step_gradients", "training/test_train_step_losses", "frozen/test_frozen_bits")
    files = [f"tests/{name}.py" for name in names]
    chosen = "any_layout or same_bits or empty_batches or test_batches"
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=128",
        "FASTMLP_TEST_ISAS": ISAS[-1],
    }
    done = subprocess.run(
        [sys.executable, "-c", script, "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
