"""`freeze` of models that end with a softmax or with another shape: values, and the bits of the rows alone."""

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import freeze
from tests.support.bounds import assert_within, of_softmax
from tests.support.derivatives import assert_same
from tests.support.endings import FORMS, GRAPHS, HEADS, OTHERWISE, Called, body

pytestmark = pytest.mark.usefixtures("as_before")

F64 = torch.float64
INF, NAN = float("inf"), float("nan")

#: Around the lanes of vectors, and many.
CLASSES = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 100, 1000)
MODULES: dict[str, type[nn.Module]] = {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax}
both = pytest.mark.parametrize("head", MODULES)


def batch(rows: int, dtype: torch.dtype = F64, features: int = 6) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, features, dtype=F64).to(dtype)


@both
@pytest.mark.parametrize("classes", CLASSES)
def test_values(isa: str, dtype: torch.dtype, classes: int, head: str) -> None:
    layers = body(classes, dtype)
    frozen, of_layers = freeze(nn.Sequential(*layers, MODULES[head](-1))), freeze(layers)
    for rows in (1, 3, 40):
        for scale in (1, 30):
            x = scale * batch(rows, dtype)
            assert_within(frozen(x), of_softmax(head, of_layers(x)), f"{rows} rows, {scale}")
    assert fastmlp._C.last_isa() in (isa, "avx512")


@both
@pytest.mark.parametrize("classes", CLASSES)
def test_bits_are_those_of_the_rows(isa: str, dtype: torch.dtype, classes: int, head: str) -> None:
    frozen = freeze(nn.Sequential(*body(classes, dtype), MODULES[head](-1)))
    x = batch(257, dtype)
    alone = torch.cat([frozen(row[None]) for row in x])
    for rows in (2, 3, 7, 8, 16, 17, 33, 64, 129, 257):
        assert torch.equal(frozen(x[:rows]), alone[:rows]), rows
        assert torch.equal(frozen(x[-rows:]), alone[-rows:]), rows
    assert torch.equal(frozen(x[:256].view(4, 8, 8, 6)), alone[:256].view(4, 8, 8, -1))


@both
def test_threads(head: str) -> None:
    frozen = freeze(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10), MODULES[head](-1)))
    x = batch(2000, torch.float32, 256)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = frozen(x)
        torch.set_num_threads(4)
        assert torch.equal(frozen(x), expected)
    finally:
        torch.set_num_threads(threads)


@both
def test_bfloat16_weights(isa: str, head: str) -> None:
    layers = body(5, torch.float32)
    frozen = freeze(nn.Sequential(*layers, MODULES[head](-1)), dtype=torch.bfloat16)
    of_layers = freeze(layers, dtype=torch.bfloat16)
    for rows in (1, 40):
        x = batch(rows, torch.float32)
        assert frozen(x).dtype == torch.float32
        assert_within(frozen(x), of_softmax(head, of_layers(x)), f"{rows} rows")


@pytest.mark.parametrize("form", HEADS)
def test_equals_the_model(form: str) -> None:
    name, make = HEADS[form]
    model = make(body(5))
    frozen = freeze(model)
    for rows in (0, 1, 2, 50):
        x = batch(rows)
        with torch.no_grad():
            assert_same([frozen(x)], [model(x)])
    assert repr(frozen) == f"FrozenMLP(6 -> 16 relu -> 16 tanh -> 5 -> {name}, torch.float64)"


def test_dimension_1_takes_matrices() -> None:
    flat = nn.Sequential(nn.Flatten(), *body(5), nn.Softmax(1))
    with torch.no_grad():
        assert_same([freeze(flat)(batch(4).view(4, 2, 3))], [flat(batch(4).view(4, 2, 3))])
    frozen = freeze(nn.Sequential(*body(5), nn.Softmax(1)))
    for x in (torch.zeros(6, dtype=F64), torch.zeros(2, 3, 6, dtype=F64)):
        with pytest.raises(RuntimeError, match=r"expected two dimensions, since a BatchNorm1d or a softmax"):
            frozen(x)
        with pytest.raises(RuntimeError, match="expected two dimensions"):
            frozen(x.numpy())


@both
@pytest.mark.parametrize("special", [[NAN], [INF], [-INF], [INF, INF], [INF, NAN], [-INF] * 5, [NAN] * 5], ids=str)
def test_special_values(isa: str, dtype: torch.dtype, head: str, special: list[float]) -> None:
    for classes in (5, 20):
        for first in (0, classes - len(special)):
            layer = nn.Linear(1, classes).to(dtype)
            with torch.no_grad():
                layer.weight[first : first + len(special), 0] = torch.tensor(special)
                layer.bias.zero_()
            model = nn.Sequential(layer, MODULES[head](-1))
            found, expected = freeze(model)(torch.ones(3, 1, dtype=dtype)), model(torch.ones(3, 1, dtype=dtype))
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("form", FORMS)
def test_shapes(form: str) -> None:
    outputs, make = FORMS[form]
    layers = body(outputs)
    model = make(layers)
    frozen = freeze(model)
    assert (frozen.in_features, frozen.out_features) == (6, outputs)
    for rows in (1, 2, 40):
        x = batch(rows)
        with torch.no_grad():
            assert_same([frozen(x)], [model(x)])
        assert np.array_equal(frozen(x.numpy()), frozen(x).numpy())
        assert frozen(x.numpy()).shape == model(x).shape
        out = torch.full_like(frozen(x), NAN)
        assert frozen(x, out=out) is out
        assert torch.equal(out, frozen(x))
        array = np.full(frozen(x).shape, NAN)
        assert frozen(x.numpy(), out=array) is array
        assert np.array_equal(array, out.numpy())
        with pytest.raises(RuntimeError, match="out has shape"):
            frozen(x, out=torch.empty(rows, outputs, 7, dtype=F64))


def test_a_softmax_with_another_shape() -> None:
    model = Called(nn.Sequential(*body(6), nn.Softmax(-1)), lambda x: x.view(-1, 2, 3))
    frozen, x = freeze(model), batch(5)
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])
    assert repr(frozen).endswith("-> 6 -> softmax -> view(-1, 2, 3), torch.float64)")


def drawn_call(random_: random.Random, dims: int) -> tuple[str, tuple[int, ...]]:
    def dim() -> int:
        return random_.randint(-dims - 2, dims + 1)

    sizes = tuple(random_.choice([-1, 1, 2, 3, 0, 6, -2]) for _ in range(random_.randint(1, 3)))
    return random_.choice(
        [
            ("squeeze", ()),
            ("squeeze", (dim(),)),
            ("unsqueeze", (dim(),)),
            ("flatten", (dim(), dim())),
            ("unflatten", (dim(), *sizes)),
            ("view", sizes),
        ]
    )


@pytest.mark.parametrize("seed", range(40))
def test_shapes_are_those_of_torch(seed: int) -> None:
    """Whatever the shapes and the numbers; and where torch raises, so does the frozen network."""
    random_ = random.Random(seed)
    for _ in range(100):
        features = random_.choice([1, 6])
        shape = [*(random_.choice([0, 1, 2, 3]) for _ in range(random_.randint(0, 3))), 2]
        calls = [drawn_call(random_, len(shape)) for _ in range(random_.randint(1, 2))]
        layer = nn.Linear(2, features)
        frozen = freeze(layer)
        parts = fastmlp._C.unload_frozen(frozen)
        weights, biases, kinds, scalars, float32_ends, only, flattens, head, _ = parts
        fastmlp._C.load_frozen(frozen, None, weights, biases, kinds, scalars, float32_ends, only, flattens, head, calls)
        x = torch.zeros(shape)
        expected: torch.Size | None
        try:
            y = torch.empty(*shape[:-1], features)
            for name, numbers in calls:
                arguments: Any = (numbers[0], numbers[1:]) if name == "unflatten" else numbers
                y = getattr(y, name)(*arguments)
            expected = y.shape
        except (RuntimeError, IndexError):
            expected = None
        if expected is None:
            with pytest.raises(RuntimeError, match=r"fastmlp: the model ends with \w+\(.*, which an output of shape"):
                frozen(x)
        else:
            assert frozen(x).shape == expected, (shape, features, calls)


@pytest.mark.parametrize("form", [form for form in OTHERWISE if form not in GRAPHS])
def test_other_endings_are_refused(form: str) -> None:
    make, message = OTHERWISE[form]
    with pytest.raises(TypeError, match=f"{message}(.|\n)*; nor is it a graph of layers: "):
        freeze(make())


@pytest.mark.parametrize("form", GRAPHS)
def test_other_endings_that_are_graphs(form: str) -> None:
    model = OTHERWISE[form][0]().double()
    frozen = freeze(model)
    assert "graph of" in repr(frozen)
    for rows in (1, 2, 40):
        x = batch(rows)
        with torch.no_grad():
            assert_same([frozen(x)], [model(x)])


def test_between_chains_and_graphs() -> None:
    """A chain with an ending becomes a graph, which has no such ending, and a chain again."""
    model: Any = nn.Sequential(*body(6), nn.Softmax(-1), nn.Unflatten(1, (2, 3)))
    frozen, x = freeze(model), batch(3)
    expected, shaped = frozen(x), model[6]
    model[6] = nn.Linear(6, 2, dtype=F64)
    for _ in range(2):
        with torch.no_grad():
            assert_same([frozen(x)], [model(x)])
        assert repr(frozen) == "FrozenMLP(6 -> 2, graph of 2 networks, torch.float64)"
        assert np.array_equal(frozen(x.numpy()), frozen(x).numpy())
        model[6] = shaped
        assert torch.equal(frozen(x), expected)
        assert np.array_equal(frozen(x.numpy()), expected.numpy())
        model[6] = nn.Linear(6, 2, dtype=F64)


def test_follows_the_endings() -> None:
    model: Any = nn.Sequential(*body(6), nn.Softmax(-1), nn.Unflatten(1, (2, 3)))
    frozen, x = freeze(model), batch(3)
    expected = frozen(x)
    model[5].dim = 0
    with pytest.raises(TypeError, match=r"5 \(Softmax\) .* its dim is 0"):
        frozen(x)
    model[5].dim = 1
    assert torch.equal(frozen(x), expected)
    model[6].unflattened_size = (3, 2)
    assert torch.equal(frozen(x), expected.view(3, 3, 2))
    handle = model[5].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"5 \(Softmax\) .* it has hooks"):
        frozen(x)
    handle.remove()
    model[5] = nn.LogSoftmax(-1)
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])
    del model[6], model[5]
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])
        model[4].weight.mul_(2)
        assert_same([frozen(x)], [model(x)])


def test_copies_and_pickles() -> None:
    frozen = freeze(nn.Sequential(*body(6), nn.LogSoftmax(-1), nn.Unflatten(1, (2, 3))))
    x = batch(3)
    for copied in (copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(copied(x), frozen(x))
        assert repr(copied) == repr(frozen)
    assert repr(frozen).endswith("-> 6 -> log_softmax -> unflatten(1, 2, 3), torch.float64)")
    # Networks that were pickled before there were endings have none.
    rebuild, arguments = freeze(body(6)).__reduce__()
    assert repr(rebuild(*arguments[:-2])) == "FrozenMLP(6 -> 16 relu -> 16 tanh -> 6, torch.float64)"


@pytest.mark.parametrize(
    ("head", "calls", "message"),
    [
        ("hardmax", [], "ends with none, softmax or log_softmax, got hardmax"),
        ("none", [("flatten", (1,))], "the call flatten of 1 numbers"),
        ("none", [("transpose", (1, 0))], "the call transpose of 2 numbers"),
    ],
)
def test_damaged_pickles(head: str, calls: list[tuple[str, tuple[int, ...]]], message: str) -> None:
    rebuild, arguments = freeze(body(6)).__reduce__()
    with pytest.raises(ValueError, match=message):
        rebuild(*arguments[:-2], head, calls)
