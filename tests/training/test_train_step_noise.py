"""`TrainStep` of models with `Dropout` and `BatchNorm1d`, in training mode and outside of it."""

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from tests.support.axes import ISAS
from tests.support.graphs import assert_near
from tests.support.rounding import Results
from tests.support.steps import F64, explain, refused, sgd, unchanged
from tests.support.training import (
    OPTIMIZERS,
    Loop,
    Maker,
    Step,
    assert_equal_to_rounding,
    draw_optimizer,
    everything,
    optimizer_of,
)

pytestmark = pytest.mark.usefixtures("as_before")

STEPS = 50


class Tabular(nn.Module):
    """As users write it: a norm, an activation called as a function and a dropout behind each layer."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 9), nn.BatchNorm1d(9, momentum=momentum)
        self.second, self.drop, self.head = nn.Linear(9, 5), nn.Dropout(0.2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.head(torch.tanh(self.second(x)))


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers))


#: Six features become three.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "behind activations": chain(
        nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 3)
    ),
    "of a kept pre-activation": chain(
        nn.Linear(6, 9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, 5), nn.SiLU(), nn.Dropout(0.3), nn.Linear(5, 3)
    ),
    "at both ends": chain(nn.Dropout(0.2), nn.Linear(6, 9), nn.ELU(), nn.Linear(9, 3), nn.Dropout(0.4)),
    "an end that keeps its pre-activation": chain(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3), nn.GELU(), nn.Dropout()),
    "before activations": chain(
        nn.Linear(6, 9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 3)
    ),
    "twice": chain(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.1), nn.Dropout(0.2), nn.Tanh(), nn.ReLU(), nn.Linear(9, 3)),
    "of all and of nothing": chain(
        nn.Linear(6, 9), nn.Dropout(1.0), nn.Linear(9, 5), nn.Dropout(0.0), nn.Tanh(), nn.Linear(5, 3)
    ),
    "norms before activations": chain(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3)
    ),
    "norms behind activations": chain(
        nn.Linear(6, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 5), nn.GELU(), nn.BatchNorm1d(5), nn.Linear(5, 3)
    ),
    "norms at both ends": chain(
        nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3), nn.BatchNorm1d(3)
    ),
    "norms and dropout": chain(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.SiLU(), nn.Dropout(0.3), nn.BatchNorm1d(9), nn.Dropout(0.3),
        nn.Linear(9, 3),
    ),
    "wide": chain(
        nn.Dropout(0.2), nn.Linear(6, 150), nn.ReLU(), nn.Dropout(0.5), nn.Linear(150, 120), nn.GELU(), nn.Dropout(0.3),
        nn.Linear(120, 3), nn.Dropout(0.1),
    ),
    "wide and norms": chain(
        nn.Linear(6, 150), nn.BatchNorm1d(150), nn.ReLU(), nn.Dropout(0.5), nn.Linear(150, 120), nn.GELU(),
        nn.BatchNorm1d(120), nn.Linear(120, 3),
    ),
    "options of norms": chain(
        nn.Linear(6, 9), nn.BatchNorm1d(9, affine=False, momentum=None), nn.Linear(9, 7), nn.ReLU(),
        nn.BatchNorm1d(7, track_running_stats=False, eps=1e-2), nn.Linear(7, 5),
        nn.BatchNorm1d(5, momentum=0.7, affine=False, track_running_stats=False), nn.Tanh(), nn.Linear(5, 3),
    ),
    "a function's": Tabular,
    "a function's, with averages over all batches": lambda: Tabular(None),
}  # fmt: skip


def batches(rows: int = 8, count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 6, dtype=F64, generator=made), torch.randn(rows, 3, dtype=F64, generator=made))
        for _ in range(count)
    ]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def trained(make: Maker, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Results:
    """Everything that steps leave, with where the generator stands after each of them, and outputs in eval mode."""
    step = make(model, nn.MSELoss(), optimizer, **options)
    losses, places = [], []
    for input, target in batches():
        losses.append(step(input, target))
        places.append(torch.rand(1, dtype=F64))
    found = {"losses": torch.stack(losses), "generator": torch.stack(places), **everything(model, optimizer)}
    found |= statistics(model)
    model.eval()
    with torch.no_grad():
        found["outputs in eval mode"] = model(batches()[0][0])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loop(name: str) -> None:
    def scenario(make: Maker) -> Results:
        model = MODELS[name]().to(F64)
        return trained(make, model, torch.optim.Adam(model.parameters(), lr=1e-3))

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("module", [torch.optim, fastmlp.optim], ids=["torch", "fastmlp"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_loop_with_each_optimizer(name: str, module: Any) -> None:
    arguments = draw_optimizer(random.Random(3), name)

    def scenario(make: Maker) -> Results:
        model = MODELS["norms and dropout"]().to(F64)
        return trained(make, model, optimizer_of(module, name, arguments, model.parameters()))

    assert_equal_to_rounding(scenario, ISAS)


OPTIONS: list[dict[str, Any]] = [{"max_norm": 0.5}, {"clip_value": 0.05}, {"accumulate": 3}, {"keep_grads": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_loop_with_options(options: Mapping[str, Any]) -> None:
    def scenario(make: Maker) -> Results:
        model = MODELS["norms and dropout"]().to(F64)
        return trained(make, model, sgd(model.parameters()), **options)

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("name", ["behind activations", "wide", "norms and dropout", "a function's"])
def test_switching_between_modes(name: str) -> None:
    """Steps in both modes take turns, as where some of a model is frozen."""

    def scenario(make: Maker) -> Results:
        model = MODELS[name]().to(F64)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        step = make(model, nn.MSELoss(), optimizer)
        losses = []
        for i, (input, target) in enumerate(batches()):
            model.train(i % 3 != 1)
            for norm in model.modules():
                if isinstance(norm, nn.BatchNorm1d) and i % 3 == 2:
                    norm.eval()
                if isinstance(norm, nn.Dropout) and i > 20:
                    norm.p = 0.6
            losses.append(step(input, target))
        return {"losses": torch.stack(losses), **everything(model, optimizer), **statistics(model)}

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("rows", [2, 7, 64, 301, 2100])
@pytest.mark.parametrize("name", ["behind activations", "of a kept pre-activation", "wide and norms", "at both ends"])
def test_rows(name: str, rows: int) -> None:
    def scenario(make: Maker) -> Results:
        model = MODELS[name]().to(F64)
        optimizer = sgd(model.parameters())
        step = make(model, nn.MSELoss(), optimizer)
        losses = [step(*pair) for pair in batches(rows, 3)]
        return {"losses": torch.stack(losses), **everything(model, optimizer), **statistics(model)}

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("frozen", ["0", "3", "4", "0 1 3"])
def test_parameters_without_gradients(frozen: str) -> None:
    def scenario(make: Maker) -> Results:
        model = MODELS["norms before activations"]().to(F64)
        assert isinstance(model, nn.Sequential)
        for i in frozen.split():
            model[int(i)].requires_grad_(False)
        return trained(make, model, sgd(model.parameters()))

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_masks(p: float, dtype: torch.dtype) -> None:
    """A gradient is zero just where the loop's is, and of the same bits where sums have one term."""
    model = nn.Sequential(nn.Linear(1, 700, bias=False), nn.Dropout(p)).to(dtype)
    other = copy.deepcopy(model)
    steps: list[Step] = [
        fastmlp.TrainStep(model, nn.L1Loss(reduction="sum"), sgd(model.parameters())),
        Loop(other, nn.L1Loss(reduction="sum"), sgd(other.parameters())),
    ]
    input, target = torch.randn(1, 1, dtype=dtype), torch.full((1, 700), 1e3, dtype=dtype)
    states = []
    for step in steps:
        torch.manual_seed(5)
        torch.rand(3)
        for _ in range(3):
            step(input, target)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_torch_draws_the_same_bytes(dtype: torch.dtype) -> None:
    """As csrc/cpu/register.cpp relies on where torch draws otherwise than our kernels, and so draws itself."""
    drawn = []
    for kind in (torch.uint8, dtype):
        torch.manual_seed(5)
        drawn += [torch.empty(700, dtype=kind).bernoulli_(0.3).double(), torch.get_rng_state()]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])


def test_infinite_elements_that_are_dropped() -> None:
    """Become NaN, because infinity is multiplied by zero."""
    layer = nn.Linear(1, 4)
    model = nn.Sequential(layer, nn.Dropout(0.5))
    nn.init.constant_(layer.weight, torch.inf)
    step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    assert step(torch.ones(1, 1), torch.zeros(1, 4)).isnan()


def test_bits_do_not_depend_on_threads() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = MODELS["wide and norms"]()
        optimizer = sgd(model.parameters())
        step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
        for input, target in batches(3000, 2):
            step(input.float(), target.float())
        results.append([*everything(model, optimizer).values(), *statistics(model).values()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_float32_follows_the_loop() -> None:
    """The same masks, so that losses stay together."""

    def train(make: Maker) -> Results:
        torch.manual_seed(0)
        model = MODELS["norms and dropout"]().float()
        torch.manual_seed(0)
        step = make(model, nn.MSELoss(), sgd(model.parameters()))
        return {"losses": torch.stack([step(x.float(), y.float()).detach() for x, y in batches()])}

    assert_equal_to_rounding(train, ISAS)


def test_epochs() -> None:
    """Batches of one call draw as those of many."""
    states = []
    for rows in (16, 8):
        torch.manual_seed(0)
        model = MODELS["norms and dropout"]().to(F64)
        step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
        (input, target), *_ = batches(16)
        if rows == 16:
            for part in zip(input.split(8), target.split(8), strict=True):
                step(*part)
        else:
            step._run_all(input, target, torch.arange(16), 8)
        states.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))


def test_frozen_networks_see_the_statistics_move() -> None:
    model = MODELS["norms behind activations"]().eval()
    frozen = fastmlp.freeze(model)
    input, target = (x.float() for x in batches()[0])
    frozen(input)
    model.train()
    fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters(), lr=0.0, momentum=0.0))(input, target)
    model.eval()
    assert_near(model, frozen(input), (input,))


def test_making_a_step_draws_nothing_and_moves_nothing() -> None:
    model = Tabular()
    state, before = torch.get_rng_state(), statistics(model)
    fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# What is refused.


def a_norm(**attributes: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(F64)
    for name, value in attributes.items():
        setattr(model[1], name, value)
    return model


def one_buffer_twice() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[3].running_mean = model[1].running_mean
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in place": (chain(nn.Linear(6, 3), nn.Dropout(0.5, inplace=True)), r"1 \(Dropout\) .*in place"),
    "alpha dropout": (chain(nn.Linear(6, 3), nn.AlphaDropout(0.5)), r"1 \(AlphaDropout\)"),
    "features of a norm": (chain(nn.Linear(6, 3), nn.BatchNorm1d(4)), r"1\.weight has shape \(4,\), expected \(3,\)"),
    "features behind a norm": (chain(nn.BatchNorm1d(6), nn.Linear(5, 3)), r"1\.weight has shape \(3, 5\), expected 6"),
    "dtype of statistics": (lambda: a_norm(running_var=torch.ones(5)), r"1\.running_var has dtype torch\.float32"),
    "shape of statistics": (
        lambda: a_norm(running_var=torch.ones(4, dtype=F64)), r"1\.running_var has shape \(4,\), expected \(5,\)"),
    "one statistic": (lambda: a_norm(running_var=None), r"1 \(BatchNorm1d\) .*one of running_mean and running_var"),
    "statistics with gaps": (lambda: a_norm(running_var=torch.ones(10, dtype=F64)[::2]), "contiguous"),
    "momentum": (lambda: a_norm(momentum="0.1"), r"1 \(BatchNorm1d\) .*momentum is '0\.1'"),
    "eps": (lambda: a_norm(eps=torch.ones(())), r"1 \(BatchNorm1d\) .*eps is"),
    "a count of floats": (lambda: a_norm(num_batches_tracked=torch.zeros(())), "num_batches_tracked has dtype"),
    "one buffer twice": (one_buffer_twice, r"3\.running_mean is 1\.running_mean once more"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """By name; and by a step that was made before the model became like that."""
    model, text = REFUSED[case][0](), REFUSED[case][1]
    refused(model, nn.MSELoss(), sgd(model.parameters()), text)
    if case in ("features of a norm", "features behind a norm", "alpha dropout", "one buffer twice", "in place"):
        return
    other = a_norm()
    optimizer = sgd(other.parameters())
    step = fastmlp.TrainStep(other, nn.MSELoss(), optimizer)
    other.get_submodule("1").__dict__.update(model.get_submodule("1").__dict__)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    state = statistics(other)
    unchanged(step, other, optimizer, *batches()[0], text)
    assert all(torch.equal(buffer, state[name]) for name, buffer in other.named_buffers())


def test_a_probability_that_is_none() -> None:
    drop: Any = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(6, 3), drop).to(F64)
    optimizer = sgd(model.parameters())
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    for p in (1.5, -0.5, "0.5"):
        drop.p = p
        unchanged(step, model, optimizer, *batches()[0], r"1 \(Dropout\) .*its p is")


@pytest.mark.parametrize(
    ("input", "text"),
    [
        (torch.ones(1, 6), "input has one row"),
        (torch.ones(0, 6), "input has no rows"),
        (torch.ones(2, 4, 6), r"input has shape \[2, 4, 6\], expected \(N, 6\)"),
        (torch.ones(6), r"input has shape \[6\], expected \(N, 6\)"),
    ],
    ids=["one row", "no rows", "three dimensions", "one dimension"],
)
def test_inputs_of_norms(input: Tensor, text: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    optimizer = sgd(model.parameters())
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    state, generator = statistics(model), torch.get_rng_state()
    unchanged(step, model, optimizer, input, torch.zeros(*input.shape[:-1], 3), text)
    assert all(torch.equal(buffer, state[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), generator)


def test_one_row_in_eval_mode() -> None:
    model = a_norm().eval()
    step = fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    (input, target), *_ = batches(1)
    with torch.no_grad():
        expected = nn.functional.mse_loss(model(input), target)
    assert float(step(input, target)) == pytest.approx(float(expected), rel=1e-12)


def test_classes_out_of_range_draw_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    optimizer = sgd(model.parameters())
    step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    input, state = torch.randn(2, 6), statistics(model)
    generator = torch.get_rng_state()
    unchanged(step, model, optimizer, input, torch.tensor([0, 3]), "target holds class 3")
    assert all(torch.equal(buffer, state[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_input_with_gaps_that_is_dropped_from() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    optimizer = sgd(model.parameters())
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    unchanged(step, model, optimizer, torch.randn(6, 8).t(), torch.zeros(8, 3), r"give input\.contiguous\(\)")
    step(torch.randn(6, 8).t().contiguous(), torch.zeros(8, 3))


def test_an_input_with_gaps_that_is_normalised() -> None:
    def scenario(make: Maker) -> Results:
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).to(F64)
        step = make(model, nn.MSELoss(), sgd(model.parameters()))
        input = torch.randn(6, 8, dtype=F64).t()
        loss = step(input, torch.zeros(8, 3, dtype=F64))
        return {"loss": loss, **statistics(model)}

    assert_equal_to_rounding(scenario, ISAS)


def test_empty_batches_of_dropout() -> None:
    model = MODELS["at both ends"]().to(F64)
    step = fastmlp.TrainStep(model, nn.MSELoss(reduction="sum"), sgd(model.parameters()))
    state = torch.get_rng_state()
    assert float(step(torch.empty(0, 6, dtype=F64), torch.empty(0, 3, dtype=F64))) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_finds_nothing() -> None:
    for make in MODELS.values():
        model = make()
        assert explain(model, nn.MSELoss(), sgd(model.parameters())) == ()
