"""`freeze` of models that begin by flattening their input: the model's numbers, and the bits of the rows alone."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import freeze
from tests.support.axes import ISAS
from tests.support.derivatives import assert_same
from tests.support.flattening import FEATURES, FORMS, OTHERWISE, SHAPES, VIEWS, WRONG, body, layouts

pytestmark = pytest.mark.usefixtures("as_before")


def batch(rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, *shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())
def test_equals_the_model(make: Callable[[nn.Sequential], nn.Module]) -> None:
    model = make(body())
    frozen = freeze(model)
    assert (frozen.in_features, frozen.out_features) == (FEATURES, 5)
    for shape in SHAPES:
        for rows in (1, 2, 50):
            x = batch(rows, shape)
            with torch.no_grad():
                assert_same([frozen(x)], [model(x)])
            assert torch.equal(frozen(x), freeze(model)(x))
    assert frozen(batch(0, (4, 6))).shape == (0, 5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_those_of_the_rows(dtype: torch.dtype, isa: str) -> None:
    """Whatever shape the input has, wherever its elements lie, and whatever batch a row comes in."""
    fastmlp.set_isa(isa)
    layers = body(dtype=dtype)
    of_rows, frozen = freeze(layers), freeze(nn.Sequential(nn.Flatten(), *layers))
    for shape in SHAPES[1:]:
        x = batch(7, shape, dtype)
        expected = of_rows(x.flatten(1))
        for name, own in layouts(x).items():
            assert torch.equal(own, x)
            assert torch.equal(frozen(own), expected), (shape, name)
            assert torch.equal(torch.cat([frozen(row[None]) for row in own]), expected), (shape, name)
        expanded = x[:1].expand_as(x)
        assert torch.equal(frozen(expanded), expected[:1].expand_as(expected)), shape
        if dtype != torch.bfloat16:
            array = np.flip(np.flip(x.numpy(), 1).copy(), 1)
            assert np.array_equal(frozen(array), expected.numpy()), shape
            assert np.array_equal(frozen(np.asfortranarray(x.numpy())), expected.numpy()), shape


def test_bfloat16_weights() -> None:
    layers = body(dtype=torch.float32)
    of_rows = freeze(layers, dtype=torch.bfloat16)
    frozen = freeze(nn.Sequential(nn.Flatten(), *layers), dtype=torch.bfloat16)
    for x in layouts(batch(7, (2, 3, 4), torch.float32)).values():
        assert torch.equal(frozen(x), of_rows(x.flatten(1)))


def test_out() -> None:
    frozen = freeze(FORMS["quickstart"](body()))
    for x in layouts(batch(3, (2, 3, 4))).values():
        out = torch.full((3, 5), torch.nan, dtype=torch.float64)
        assert frozen(x, out=out) is out
        assert torch.equal(out, frozen(x))
        array = np.full((3, 5), np.nan)
        assert frozen(x.numpy(), out=array) is array
        assert np.array_equal(array, out.numpy())
        with pytest.raises(RuntimeError, match=r"out has shape \[3, 2, 3, 5\], expected \[3, 5\]"):
            frozen(x, out=torch.empty(3, 2, 3, 5, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="out lies in the memory of input"):
            frozen(x, out=torch.as_strided(x, (3, 5), (5, 1)))


@pytest.mark.parametrize("shape", WRONG, ids=str)
def test_wrong_sizes(shape: tuple[int, ...]) -> None:
    frozen = freeze(FORMS["quickstart"](body()))
    out = torch.full((2, 5), 7.0, dtype=torch.float64)
    given: list[tuple[Any, Any]] = [(torch.zeros(shape, dtype=torch.float64), out), (np.zeros(shape), out.numpy())]
    for x, own in given:
        with pytest.raises(RuntimeError, match=WRONG[shape]):
            frozen(x, out=own)
    assert (out == 7).all()


@pytest.mark.parametrize(("make", "message"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_what_flattens_otherwise_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        freeze(make())


def test_norms_take_what_was_flattened() -> None:
    layers = nn.Sequential(nn.BatchNorm1d(FEATURES), *body(dtype=torch.float64)).double()
    layers(batch(50, (FEATURES,)))
    model = nn.Sequential(nn.Flatten(), *layers).eval()
    frozen = freeze(model)
    x = batch(4, (2, 3, 4))
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])
    with pytest.raises(RuntimeError, match="in all dimensions after the first"):
        frozen(x.flatten())


def test_follows_the_flattening() -> None:
    model: Any = nn.Sequential(nn.Flatten(), *body())
    frozen, x = freeze(model), batch(3, (4, 6))
    expected = frozen(x)
    flatten = model[0]
    flatten.start_dim = 2
    with pytest.raises(TypeError, match=r"0 \(Flatten\) .* it flattens dimensions 2 to -1"):
        frozen(x)
    assert "it flattens dimensions 2 to -1" in repr(frozen)
    flatten.start_dim = 1
    assert torch.equal(frozen(x), expected)
    handle = flatten.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"0 \(Flatten\) .* it has hooks"):
        frozen(x)
    handle.remove()
    assert torch.equal(frozen(x), expected)
    # Without the module the same network takes rows alone, of any leading dimensions.
    model[0] = nn.Identity()
    assert frozen(x.view(1, 3, 24)).shape == (1, 3, 5)
    with pytest.raises(RuntimeError, match="expected 24 in the last dimension"):
        frozen(x)
    model[0] = nn.Flatten()
    with torch.no_grad():
        model[1].weight.mul_(2)
        assert_same([frozen(x)], [model(x)])
    assert not torch.equal(frozen(x), expected)


def test_copies_and_pickles_flatten_too() -> None:
    frozen = freeze(FORMS["quickstart"](body()))
    x = batch(3, (4, 6))
    for copied in (copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(copied(x), frozen(x))
        assert repr(copied) == repr(frozen)
    assert repr(frozen) == "FrozenMLP(flatten -> 24 -> 16 relu -> 16 tanh -> 5, torch.float64)"
    # Networks that were pickled before there was a flattening do not flatten.
    rebuild, arguments = freeze(body()).__reduce__()
    assert repr(rebuild(*arguments[:-1])) == "FrozenMLP(24 -> 16 relu -> 16 tanh -> 5, torch.float64)"


def test_views_of_what_has_none() -> None:
    """Where the model's own `view` raises, the frozen network computes what `reshape` would give."""
    for call in VIEWS:
        model = FORMS[call](body())
        x = layouts(batch(3, (4, 6)))["channels last"]
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            model(x)
        assert torch.equal(freeze(model)(x), freeze(model)(x.contiguous()))
