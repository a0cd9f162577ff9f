"""Recording with examples: what Python asks of the arguments is answered by them, and compared at each later call."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmlp import convert
from fastmlp.trace import run_chain
from tests.support.derivatives import assert_same

pytestmark = pytest.mark.usefixtures("as_before")

F64 = torch.float64


class Net(nn.Module):
    """Two layers, before which something is done that depends on the form of the input."""

    def __init__(self, prepare: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8, dtype=F64), nn.Linear(8, 2, dtype=F64)
        self.prepare = prepare

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.prepare(x))))


def _dim(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 1 else x


def _length(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if len(x.shape) == 1 else x


def _rows(x: Tensor) -> Tensor:
    return x.view(len(x), -1)


def _cuda(x: Tensor) -> Tensor:
    return x.cpu() if x.is_cuda else x


def _place(x: Tensor) -> Tensor:
    return x.cpu() if x.device.type == "cuda" else x


def _last(x: Tensor) -> Tensor:
    if x.shape[-1] != 4:
        raise ValueError("four features")
    return x


def _whole_shape(x: Tensor) -> Tensor:
    assert x.size() == (3, 4)
    return x


def _loop(x: Tensor) -> Tensor:
    features = 1
    for size in x.shape[1:]:
        features = features * size
    return x.view(-1, features)


def _number(x: Tensor) -> Tensor:
    return x.view(-1, int(x.shape[-1]))


def _later(x: Tensor) -> Tensor:
    y = x.unsqueeze(0)
    return y.squeeze(0) if y.ndim == 3 else y


def _mean(x: Tensor) -> Tensor:
    return x.sum() if x.numel() == 0 else x


PREPARATIONS: dict[str, Callable[[Any], Tensor]] = {
    "x.dim()": _dim,
    "len(x.shape)": _length,
    "len(x)": _rows,
    "x.is_cuda": _cuda,
    "x.device.type": _place,
    "x.shape[-1]": _last,
    "x.size()": _whole_shape,
    "for size in x.shape": _loop,
    "int(x.shape[-1])": _number,
    "y.ndim": _later,
    "x.numel()": _mean,
}
preparations = pytest.mark.parametrize("prepare", PREPARATIONS.values(), ids=PREPARATIONS.keys())


def example() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4, dtype=F64)


@preparations
def test_equals_the_model(prepare: Callable[[Any], Tensor]) -> None:
    model = Net(prepare)
    traced: Any = convert(model, trace=True, inputs=(example(),))
    (chain,) = (node for node in traced.graph.nodes if node.target is run_chain)
    assert len(chain.args[1]) == 3
    x = example().requires_grad_()
    ours, theirs = traced(x), model(x)
    assert_same([ours], [theirs])
    assert_same(
        torch.autograd.grad(ours.sum(), [x, *traced.parameters()]),
        torch.autograd.grad(theirs.sum(), [x, *model.parameters()]),
    )


@preparations
def test_without_an_example_it_is_refused(prepare: Callable[[Any], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="cannot record the forward of Net"):
        convert(Net(prepare), trace=True)


@pytest.mark.parametrize(
    ("prepare", "x", "was", "now"),
    [
        (_dim, torch.zeros(4, dtype=F64), "False", "True"),
        (_length, torch.zeros(4, dtype=F64), "2", "1"),
        (_rows, torch.zeros(5, 4, dtype=F64), "3", "5"),
        (_last, torch.zeros(3, 5, dtype=F64), "False", "True"),
        (_whole_shape, torch.zeros(2, 4, dtype=F64), "True", "False"),
        (_loop, torch.zeros(3, 2, 2, dtype=F64), "1", "2"),
        (_number, torch.zeros(3, 2, dtype=F64), "4", "2"),
        (_mean, torch.zeros(0, 4, dtype=F64), "False", "True"),
    ],
)
def test_another_answer_raises(prepare: Callable[[Any], Tensor], x: Tensor, was: str, now: str) -> None:
    traced = convert(Net(prepare), trace=True, inputs=(example(),))
    with pytest.raises(RuntimeError, match=rf"was {was} when it was recorded and is {now} now: .*inputs="):
        traced(x)
    traced(example())


def test_more_rows_than_the_example_has() -> None:
    """Only what the forward asks has to stay."""
    for prepare in (_dim, _length, _cuda, _last):
        model = Net(prepare)
        traced = convert(model, trace=True, inputs=(example(),))
        x = torch.randn(20, 4, dtype=F64)
        assert_same([traced(x)], [model(x)])


@preparations
def test_copies_and_pickles(prepare: Callable[[Any], Tensor]) -> None:
    traced = convert(Net(prepare), trace=True, inputs=(example(),))
    x = example()
    again = convert(traced, trace=True, inputs=(x,))
    for copied in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), again):
        assert torch.equal(copied(x), traced(x))
    bad = torch.zeros(5, dtype=F64)
    for copied in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), again):
        with pytest.raises(Exception, match=r"when it was recorded|shape|size|dim"):
            copied(bad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    traced = convert(Net(_dim), trace=True, inputs=(example(),))
    compiled = torch.compile(traced, backend="eager")
    assert_same([compiled(example())], [traced(example())])


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x if bool(x[0, 0] > 0) else -x,
        lambda x: x if x.mean().item() > 0 else -x,
        lambda x: x * int(x[0, 0]),
        lambda x: x * float(x.max()),
        lambda x: x if x.tolist() else -x,
    ],
)
def test_elements_are_not_settled(prepare: Callable[[Any], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="cannot record the forward of Net"):
        convert(Net(prepare), trace=True, inputs=(example(),))


def test_arguments_that_are_no_tensors() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, times: Any = 1) -> Tensor:
            for _ in range(2 if times > 1 else 1):
                x = x * times
            return self.b(torch.relu(self.a(x)))

    model = Scaled(_dim)
    traced = convert(model, trace=True, inputs=(example(), 3))
    assert_same([traced(example(), 5)], [model(example(), 5)])
    with pytest.raises(RuntimeError, match="was True when it was recorded and is False now"):
        traced(example(), 1)
