"""`freeze` of models that are graphs of layers: what they compute, the same bits in any batch, and what is refused."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmlp
from fastmlp import FrozenMLP, freeze
from fastmlp.config import get_isa, set_isa
from tests.support.graphs import (
    GRAPHS,
    Actor,
    Critic,
    Gaussian,
    NeRF,
    ResNet,
    ResNetBlock,
    Twins,
    as_tuple,
    assert_near,
)
from tests.support.rounding import distance
from tests.support.small import norm

X = torch.zeros(2, 17)
DTYPES = (torch.float32, torch.float64)
#: Numbers of rows that are one piece, several, and more than the largest.
BATCHES = (1, 2, 3, 7, 16, 37, 127, 128, 129, 300)


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    model = GRAPHS[name][0]().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            with torch.no_grad():
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
    return model.eval()


def inputs_of(name: str, rows: tuple[int, ...] = (37,), dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(*rows, features, generator=generator, dtype=dtype) for features in GRAPHS[name][1])


def frozen_of(model: nn.Module, name: str, **more: Any) -> FrozenMLP:
    many = len(GRAPHS[name][1]) > 1
    dtype = next(model.parameters()).dtype
    return freeze(model, inputs=inputs_of(name, (2,), dtype) if many else None, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str, dtype: torch.dtype) -> None:
    model, inputs = model_of(name, dtype), inputs_of(name, dtype=dtype)
    frozen = frozen_of(model, name)
    assert_near(model, frozen(*inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRAPHS)
def test_rows_have_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    frozen, inputs = frozen_of(model, name), inputs_of(name, (300,), dtype)
    alone = [as_tuple(frozen(*[x[i : i + 1] for x in inputs])) for i in range(300)]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    for rows in BATCHES:
        for begin in (0, 300 - rows):
            found = as_tuple(frozen(*[x[begin : begin + rows] for x in inputs]))
            for ours, bits in zip(found, expected, strict=True):
                assert torch.equal(ours, bits[begin : begin + rows])


@pytest.mark.parametrize("name", GRAPHS)
def test_bits_do_not_depend_on_neighbours_threads_or_memory(name: str) -> None:
    """Rows beside NaN and infinity, strided inputs, arrays, and several threads."""
    model = model_of(name)
    frozen, inputs = frozen_of(model, name), inputs_of(name, (300,))
    expected = as_tuple(frozen(*inputs))
    spoiled = [x.clone() for x in inputs]
    for x in spoiled:
        x[1::2] = float("nan")
        x[3::4] = float("inf")
    for ours, bits in zip(as_tuple(frozen(*spoiled)), expected, strict=True):
        assert torch.equal(ours[::2], bits[::2])
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    turned = [x.t().contiguous().t() for x in inputs]
    for others in (strided, turned):
        assert all(map(torch.equal, as_tuple(frozen(*others)), expected))
    arrays = as_tuple(frozen(*[x.numpy() for x in inputs]))
    assert all(isinstance(array, np.ndarray) for array in arrays)
    assert all(torch.equal(torch.from_numpy(a), bits) for a, bits in zip(arrays, expected, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert all(map(torch.equal, as_tuple(frozen(*inputs)), expected))
    finally:
        torch.set_num_threads(threads)


def test_every_set_of_instructions_keeps_its_bits(isa: str) -> None:
    """And the graph is packed again for another set."""
    before = get_isa()
    for name in ("layer norm", "gaussian", "highway"):
        frozen, inputs = frozen_of(model_of(name), name), inputs_of(name, (45,))
        whole = as_tuple(frozen(*inputs))
        assert_near(model_of(name), frozen(*inputs), inputs)
        for i in range(45):
            row = as_tuple(frozen(*[x[i : i + 1] for x in inputs]))
            assert all(torch.equal(one, all[i : i + 1]) for one, all in zip(row, whole, strict=True))
    assert get_isa() == before
    set_isa(before)


@pytest.mark.parametrize("name", ["actor", "nerf", "twins", "gaussian", "layer norm"])
def test_inputs_of_any_number_of_dimensions(name: str) -> None:
    model = model_of(name)
    frozen = frozen_of(model, name)
    for rows in ((), (6,), (2, 3), (2, 1, 4), (0,), (2, 0)):
        (x,) = inputs_of(name, rows)
        assert_near(model, frozen(x), (x,))


@pytest.mark.parametrize("name", ["rtdl", "critic", "highway"])
def test_matrices_only(name: str) -> None:
    frozen = frozen_of(model_of(name), name)
    with pytest.raises(RuntimeError, match="expected two dimensions"):
        frozen(*inputs_of(name, (2, 3)))


def test_out() -> None:
    model = model_of("actor")
    frozen, (x,) = freeze(model), inputs_of("actor")
    mean, log_std = frozen(x)
    outs = torch.empty(37, 6), torch.empty(37, 6)
    versions = [out._version for out in outs]
    assert frozen(x, out=outs) is outs
    assert torch.equal(outs[0], mean)
    assert torch.equal(outs[1], log_std)
    assert [out._version for out in outs] == [version + 1 for version in versions]
    arrays = np.empty((37, 6), np.float32), np.empty((37, 6), np.float32)
    assert frozen(x.numpy(), arrays) is arrays
    assert np.array_equal(arrays[1], log_std.numpy())
    single = freeze(model_of("nerf"))
    (y,) = inputs_of("nerf")
    out = torch.empty(37, 4)
    assert single(y, out=out) is out
    assert torch.equal(single(input=y), out)


def test_bfloat16_weights() -> None:
    model = model_of("actor")
    frozen, (x,) = freeze(model, dtype=torch.bfloat16), inputs_of("actor", (45,))
    found = frozen(x)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    # Each rounds to bfloat16 in places where the other does not. Products err at most twice as much as torch's.
    with torch.no_grad():
        expected, rounded = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
    for ours, exact, theirs in zip(found, expected, rounded, strict=True):
        assert 0 < distance(ours, exact) <= 2 * distance(theirs, exact)
    for i in range(45):
        row = frozen(x[i : i + 1])
        assert all(torch.equal(one, all[i : i + 1]) for one, all in zip(row, found, strict=True))
    assert repr(frozen) == "FrozenMLP(17 -> (6, 6), graph of 3 networks, torch.float32, weights torch.bfloat16)"


def test_text_and_sizes() -> None:
    frozen = frozen_of(model_of("critic"), "critic")
    assert repr(frozen) == "FrozenMLP((17, 6) -> 1, graph of 1 network, torch.float32)"
    assert frozen.in_features == (17, 6)
    assert frozen.out_features == 1
    model = model_of("rtdl")
    assert freeze(model).in_features == 9
    assert freeze(model).nbytes >= 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", GRAPHS)
def test_copies_and_pickles_hold_the_weights_alone(name: str) -> None:
    model = model_of(name)
    frozen, inputs = frozen_of(model, name), inputs_of(name)
    expected = as_tuple(frozen(*inputs))
    others = [copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for other in others:
        assert repr(other) == repr(frozen)
        assert all(map(torch.equal, as_tuple(other(*inputs)), expected))
        with pytest.raises(RuntimeError, match="there is no model"):
            other.refresh()
    assert not torch.equal(as_tuple(frozen(*inputs))[0], expected[0])


@pytest.mark.parametrize("name", GRAPHS)
def test_it_follows_every_tensor(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    frozen = frozen_of(model, name)
    frozen(*inputs)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point():
            continue
        before = as_tuple(frozen(*inputs))
        with torch.no_grad():
            tensor.mul_(1.5).add_(0.25)
        after = as_tuple(frozen(*inputs))
        assert not all(map(torch.equal, before, after))
        assert_near(model, frozen(*inputs), inputs)


def test_it_follows_modules() -> None:
    """A graph that becomes another one, a chain, and a graph again; and what is refused is refused from then on."""
    model = model_of("rtdl")
    assert isinstance(model, ResNet)
    frozen, (x,) = freeze(model), inputs_of("rtdl")
    model.head = nn.Linear(17, 5)
    assert_near(model, frozen(x), (x,))
    model.norm.__dict__["eps"] = 0.5
    assert_near(model, frozen(x), (x,))
    blocks, model.blocks = model.blocks, nn.ModuleList()
    norm, model.norm = model.norm, nn.Identity()
    assert repr(frozen) == "FrozenMLP(9 -> 17 relu -> 5, torch.float32)"
    assert_near(model, frozen(x), (x,))
    model.blocks, model.norm = blocks, norm
    assert "graph of" in repr(frozen)
    assert_near(model, frozen(x), (x,))
    model.train()
    with pytest.raises(TypeError, match=r"BatchNorm1d\) cannot be frozen: it is in training mode"):
        frozen(x)
    model.eval()
    assert_near(model, frozen(x), (x,))
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hook"):
        frozen(x)
    handle.remove()
    assert_near(model, frozen(x), (x,))
    model.double()
    with pytest.raises(RuntimeError, match=r"dtype torch.float32, expected torch.float64"):
        frozen(x)
    assert_near(model, frozen(x.double()), (x.double(),))


def test_it_follows_layer_norms() -> None:
    model = model_of("gaussian")
    assert isinstance(model, Gaussian)
    frozen, (x,) = freeze(model), inputs_of("gaussian")
    model.trunk[1].__dict__["eps"] = 0.3
    assert_near(model, frozen(x), (x,))
    model.scale = nn.Parameter(torch.full((5,), 3.0))
    assert_near(model, frozen(x), (x,))
    model.trunk[1] = nn.LayerNorm(19, elementwise_affine=False)
    assert_near(model, frozen(x), (x,))
    model.scale = nn.Parameter(torch.full((1, 5), 2.0))
    assert_near(model, frozen(x), (x,))


def test_concurrent_calls() -> None:
    """Several threads get the results that one gets; each piece has a tape of its own."""
    model = model_of("gaussian")
    frozen, (x,) = freeze(model), inputs_of("gaussian", (300,))
    expected = frozen(x)
    wrong: list[int] = []

    def call(rows: int) -> None:
        for _ in range(50):
            found = frozen(x[:rows])
            if not all(torch.equal(one, all[:rows]) for one, all in zip(found, expected, strict=True)):
                wrong.append(rows)

    threads = [threading.Thread(target=call, args=(rows,)) for rows in (300, 299, 37, 1, 128, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_stay_as_they_are() -> None:
    """Later calls write elsewhere."""
    frozen, (x,) = freeze(model_of("highway")), inputs_of("highway")
    first = frozen(x)
    kept = [tensor.clone() for tensor in first]
    frozen(x + 1)
    assert all(map(torch.equal, first, kept))
    assert first[3].data_ptr() != x.data_ptr()


class Function(nn.Module):
    """A model whose forward is a function of its layers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def split(model: Any, x: Tensor) -> Tensor:
    a, b, c = model.fc1(x + 0).split(2, -1)
    return torch.cat([c, a, b, a * b], -1)


#: Forwards that are taken, as functions of a model and its input.
TAKEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "in place": lambda m, x: (h := m.fc1(x), F.relu(h, inplace=True), h + m.fc2(h))[2],
    "in place through a view": lambda m, x: (h := m.fc1(x), h[:, 2:].relu_(), h + x)[2],
    "a sum in place": lambda m, x: m.fc2(m.fc1(x).add_(x)),
    "an identity in place": lambda m, x: (h := m.fc1(x), F.dropout(h, 0.5, False).tanh_(), m.fc2(h))[2],
    "twice the same result": lambda m, x: (lambda h: (h, h))(m.fc1(x) + x),
    "a constant": lambda m, x: m.fc1(x) + x + torch.ones(6),
    "zeros": lambda m, x: torch.cat([m.fc1(x), x.new_zeros(x.shape[0], 3)], 1),
    "clamp": lambda m, x: m.fc1(x).clamp(-0.1, 0.1) * x.abs().sqrt(),
    "where": lambda m, x: torch.where(x > 0, m.fc1(x), m.fc2(x)),
    "columns": lambda m, x: m.fc1(x) * x[:, :1] + m.fc2(x)[:, 5:],
    "every other column": lambda m, x: torch.cat([m.fc1(x)[:, ::2], m.norm(x)], 1),
    "split": split,
    "norm of a part": lambda m, x: m.norm(torch.cat([x, m.fc1(x)], 1)[:, 3:9]),
    "unsqueezed": lambda m, x: (m.fc1(x).unsqueeze(1) + x.unsqueeze(1)).squeeze(1),
    "stacked": lambda m, x: m.fc2(torch.stack([m.fc1(x), x], 0)[1] + x),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    torch.manual_seed(1)
    model = Function(TAKEN[name]).eval()
    x = torch.randn(45, 6)
    given = x.clone()
    frozen = freeze(model)
    found = frozen(x)
    assert torch.equal(x, given)
    assert_near(model, found, (x,))
    for i in range(45):
        for one, all in zip(as_tuple(frozen(x[i : i + 1])), as_tuple(found), strict=True):
            assert torch.equal(one, all[i : i + 1])


#: Modules one after another that are no chain, because one network cannot hold them.
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "activation first": lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 3)),
    "two activations": lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Tanh()),
    "activation of its own": lambda: nn.Sequential(fastmlp.Linear(6, 3, activation="relu"), nn.Sigmoid()),
    "norm at the end": lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU(), norm(3)),
    "norm between": lambda: nn.Sequential(
        fastmlp.Linear(6, 3, activation="relu"), norm(3), nn.ReLU(), norm(3), nn.Linear(3, 1)
    ),
    "layer norms": lambda: nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 40), nn.LayerNorm(40), nn.SiLU(), nn.Linear(40, 3), nn.LayerNorm(3), nn.Dropout()
    ),
    "softmax": lambda: nn.Sequential(nn.Linear(6, 9), nn.Softmax(-1), nn.Linear(9, 4), nn.LogSoftmax(-1), nn.ReLU6()),
    "nested": lambda: nn.Sequential(fastmlp.MLP(6, [8], 6), ResNet(6, outputs=6), nn.Sequential(nn.Linear(6, 1))),
    "shared": lambda: (lambda block: nn.Sequential(*[nn.Linear(6, 17), block, nn.Linear(17, 6)], *[nn.ReLU()] * 2))(
        ResNetBlock(17, 5, nn.LayerNorm)
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str) -> None:
    torch.manual_seed(2)
    model = SEQUENCES[name]().eval()
    frozen, x = freeze(model), torch.randn(45, 6)
    assert "graph of" in repr(frozen)
    found = frozen(x)
    assert_near(model, found, (x,))
    for i in range(45):
        assert torch.equal(frozen(x[i : i + 1]), found[i : i + 1])
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), found)


def test_every_module_is_watched() -> None:
    """Also one that has no layer and no parameter, and that the forward calls as its own."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Negated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    model = nn.Sequential(nn.Linear(6, 6), Scaled())
    frozen, x = freeze(model), torch.randn(4, 6)
    before = frozen(x)
    model[1] = Negated()
    assert torch.equal(frozen(x) * -2, before)


@pytest.mark.parametrize("mode", ["inference", "autocast", "default device", "default dtype", "no gradients"])
def test_modes_around_it_change_nothing(mode: str) -> None:
    """When it is frozen, when it follows a change, and when it is called."""
    model, (x,) = model_of("gaussian"), inputs_of("gaussian")
    plain = freeze(model)
    modes: dict[str, Any] = {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "default device": torch.device("meta"),
        "default dtype": torch.no_grad(),
        "no gradients": torch.no_grad(),
    }
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64 if mode == "default dtype" else dtype)
        with modes[mode]:
            frozen = freeze(model)
            found = frozen(x)
            model.get_submodule("trunk.1").__dict__["eps"] = 0.3
            followed = frozen(x[:21])
    finally:
        torch.set_default_dtype(dtype)
    assert not torch.equal(found[0], plain(x)[0])
    assert all(map(torch.equal, followed, plain(x[:21])))
    model.get_submodule("trunk.1").__dict__["eps"] = 1e-5
    assert all(map(torch.equal, found, plain(x)))


def test_arrays_under_a_mode() -> None:
    """Tapes are made of ordinary memory, also within a mode that would give tensors of another kind."""
    frozen, (x,) = freeze(model_of("actor")), inputs_of("actor", (19,))
    expected = freeze(model_of("actor"))(x)
    array = x.numpy()
    with FakeTensorMode():
        found = frozen(array)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, expected, strict=True))


def test_converted_models() -> None:
    model, (x,) = model_of("rtdl"), inputs_of("rtdl")
    expected = freeze(model)(x)
    assert torch.equal(freeze(fastmlp.convert(copy.deepcopy(model), trace=True))(x), expected)
    assert torch.equal(freeze(fastmlp.convert(model))(x), expected)


@pytest.mark.parametrize("width", [1, 2])
def test_narrow_graphs(width: int) -> None:
    for kind in (nn.BatchNorm1d, nn.LayerNorm):
        model = ResNet(width, width, width, width, norm=kind).eval()
        frozen, x = freeze(model), torch.randn(9, width)
        assert_near(model, frozen(x), (x,))
        assert torch.equal(frozen(x[3:4]), frozen(x)[3:4])


def damaged(recipe: Any, change: Callable[[list[Any], list[Any]], Any]) -> Any:
    memories, steps, squeezed = copy.deepcopy(recipe)
    steps = [list(step) for step in steps]
    change(memories, steps)
    return memories, [tuple(step) for step in steps], squeezed


#: What a pickle may say that is no graph, as changes of memories and steps.
DAMAGES: dict[str, tuple[Callable[[list[Any], list[Any]], Any], str]] = {
    "a memory that is not there": (lambda m, s: s[0].__setitem__(2, (99, 0, 17, 17, 1)), "has no memory 99"),
    "a negative memory": (lambda m, s: s[0].__setitem__(2, (-1, 0, 17, 17, 1)), "has no memory -1"),
    "past the end of a row": (lambda m, s: s[0].__setitem__(2, (0, 3, 17, 17, 1)), "reaches outside of memory 0"),
    "before a row": (lambda m, s: s[0].__setitem__(2, (0, -1, 17, 17, 1)), "reaches outside"),
    "a long step": (lambda m, s: s[0].__setitem__(2, (0, 0, 17, 17, 1 << 40)), "reaches outside"),
    "other rows": (lambda m, s: s[0].__setitem__(2, (0, 0, 17, 18, 1)), "reaches outside"),
    "no such network": (lambda m, s: s[0].__setitem__(1, 7), "no such network"),
    "a network of other features": (lambda m, s: s[0].__setitem__(2, (0, 0, 16, 17, 1)), "expected 17 columns"),
    "a result in the input": (lambda m, s: s[0].__setitem__(3, (0, 0, 17, 17, 1)), "writes an input"),
    "nothing is written": (lambda m, s: s.pop(0), "reads what none has written"),
    "a memory of nothing": (lambda m, s: m.append(("arena", 0)), "has 0 elements a row"),
    "an order": (lambda m, s: m.append(("input", 3)), "not in their order"),
    "a kind of memory": (lambda m, s: m.append(("heap", 3)), "cannot be heap"),
    "a kind of step": (lambda m, s: s.append(["jump"]), "cannot be jump"),
    "a constant that is not there": (lambda m, s: m.append(("constant", 3)), "expected more"),
    "a memory that nobody writes": (lambda m, s: m.append(("arena", 3)), "never written"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_recipes(name: str) -> None:
    change, message = DAMAGES[name]
    build, (kind, layers, recipe, *rest) = freeze(model_of("actor")).__reduce__()
    with pytest.raises(ValueError, match=f"^fastmlp: .*{message}"):
        build(kind, layers, damaged(recipe, change), *rest)
    assert build(kind, layers, damaged(recipe, lambda m, s: None), *rest)(X)[0].shape == (2, 6)


#: Forwards that are refused, and what the error says.
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "the mean of the batch": (lambda m, x: m.fc1(x) - x.mean(0), "other rows|depends? on|summed"),
    "the sum of a row": (lambda m, x: m.fc1(x) * x.sum(1, keepdim=True), "summed"),
    "the row before": (lambda m, x: m.fc1(x) + torch.cat([x[:1], x[:-1]]), "row"),
    "the first row": (lambda m, x: m.fc1(x) + x[0], "other rows"),
    "a product of rows": (lambda m, x: m.fc1(x) @ x.t() @ m.fc2(x), "mm|product"),
    "sorted": (lambda m, x: m.fc1(x).sort(0).values + x, "sort"),
    "random": (lambda m, x: m.fc1(x) + torch.rand_like(x), "rand"),
    "dropout": (lambda m, x: m.fc1(x) + F.dropout(x, 0.5, True), "dropout|bernoulli"),
    "shape": (lambda m, x: m.fc1(x) + x * x.shape[0], "number of rows"),
    "a list": (lambda m, x: [m.fc1(x), x + 1], "list"),
    "a dictionary": (lambda m, x: {"a": m.fc1(x), "b": x + 1}, "something else than a tensor"),
    "an integer": (lambda m, x: (m.fc1(x) + x).argmax(1), "returns a tensor .* in torch.int64"),
    "transposed": (lambda m, x: (m.fc1(x) + x).t(), "returns a tensor of shape"),
    "in place on the input": (lambda m, x: m.fc1(x) + x.mul_(2), "in place"),
    "one row": (lambda m, x: (m.fc1(x) + x)[:, :1].squeeze(), "for a single row is not that for several"),
    "no layer": (lambda m, x: m.norm(x) + x, "it has no layer"),
    "features": (lambda m, x: m.fc2(m.fc1(x)[:, :4]) + x, "it gets 4 features, where the layer takes 6"),
    "wide softmax": (lambda m, x: torch.softmax(torch.cat([m.fc1(x), x, x, x], 1), 1) + 1, "softmax"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(TypeError, match=f"^fastmlp: (.|\n)*({message})"):
        freeze(Function(function).eval())


def test_what_examples_settle_is_refused() -> None:
    """A recorded forward raises for other answers; a frozen graph would not see them."""
    for asks in (lambda x: x.dim() == 2, lambda x: len(x) > 1, lambda x: x.shape[0] > 1, lambda x: x.is_cuda):
        model = Function(lambda m, x, asks=asks: m.fc1(x) + x if asks(x) else m.fc1(x) - x).eval()
        with pytest.raises(TypeError, match="asks its arguments for a value, a size or a place"):
            freeze(model, inputs=(torch.zeros(3, 6),))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.noise = nn.Linear(6, 6), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.noise.data.normal_()
        return self.fc(x) + x + self.noise + torch.rand_like(x)


def test_nothing_has_changed() -> None:
    """Neither tensors of the model nor generators, whether a model is refused or frozen."""
    model, random = Noisy(), Function(REFUSED["random"][0]).eval()
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=r"cannot be frozen|cannot record"):
        freeze(model)
    with pytest.raises(TypeError, match="rand_like"):
        freeze(random)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.noise.any()
    for name in GRAPHS:
        other = model_of(name)
        before = copy.deepcopy(other.state_dict())
        versions = [tensor._version for tensor in other.state_dict().values()]
        state = torch.get_rng_state()
        frozen_of(other, name)
        assert torch.equal(torch.get_rng_state(), state)
        assert [tensor._version for tensor in other.state_dict().values()] == versions
        assert all(map(torch.equal, other.state_dict().values(), before.values()))


def test_refused_modules() -> None:
    class Held(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.fc = inner, nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.inner(x)

    for inner, message in [
        (nn.GRU(6, 6), r"inner \(GRU\).* not a module that is frozen"),
        (nn.Dropout(0.5), r"inner \(Dropout\).* training mode"),
        (nn.BatchNorm1d(6), r"inner \(BatchNorm1d\).* training mode"),
        (nn.BatchNorm1d(6, track_running_stats=False).eval(), r"inner \(BatchNorm1d\).* no running statistics"),
        (nn.GroupNorm(2, 6), r"inner \(GroupNorm\).* not a module that is frozen"),
        (nn.Flatten(), r"inner \(Flatten\).* only a chain of layers may begin or end with it"),
        (nn.Unflatten(1, (2, 3)), r"inner \(Unflatten\).* only a chain of layers may begin or end with it"),
    ]:
        with pytest.raises(TypeError, match=message):
            freeze(Held(inner))
    hooked = nn.LayerNorm(6)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"inner \(LayerNorm\).* hooks"):
        freeze(Held(hooked))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"float32 and float64.*{dtype}"):
            freeze(Held(nn.LayerNorm(6)).to(dtype))
    with pytest.raises(TypeError, match=r"how many features its input x has .* freeze\(model, inputs="):
        freeze(Critic().eval())


BAD: dict[str, tuple[type[Exception], str, Callable[[], tuple[Any, ...]]]] = {
    "none": (TypeError, "takes 1 input, got 0", lambda: ()),
    "many": (TypeError, "takes 1 input and out, got 3 arguments", lambda: (X, None, None)),
    "list": (TypeError, "input must be a torch.Tensor or exactly", lambda: ([1.0],)),
    "scalar": (RuntimeError, "input has no dimension", lambda: (torch.zeros(()),)),
    "features": (RuntimeError, r"input has shape \[2, 5\], expected 17", lambda: (torch.zeros(2, 5),)),
    "dtype": (RuntimeError, r"input has dtype torch.float64.*pass input.float\(\)", lambda: (X.double(),)),
    "array": (RuntimeError, r"dtype float64.*input.astype\(np.float32\)", lambda: (np.zeros((2, 17)),)),
    "device": (RuntimeError, "input is on meta, expected cpu", lambda: (X.to("meta"),)),
    "gradient": (RuntimeError, r"input requires grad.*input.detach\(\)", lambda: (X.clone().requires_grad_(),)),
    "out": (TypeError, "out must be a tuple of 2, got Tensor", lambda: (X, torch.zeros(2, 6))),
    "outs": (RuntimeError, "out is a tuple of 1, expected one of 2", lambda: (X, (torch.zeros(2, 6),))),
    "out kind": (TypeError, r"out\[0\] is of type int, expected the kind of input", lambda: (X, (1, 2))),
    "out shape": (
        RuntimeError,
        r"out\[1\] has shape \[2, 5\], expected \[2, 6\]",
        lambda: (X, (torch.zeros(2, 6), torch.zeros(2, 5))),
    ),
    "out twice": (
        RuntimeError,
        r"out\[1\] lies in the memory of out\[0\]",
        lambda: (X, (lambda t: (t, t))(torch.zeros(2, 6))),
    ),
    "out is input": (
        RuntimeError,
        "out lies in the memory of input",
        lambda: (lambda m: (m[:34].view(2, 17), (m[20:32].view(2, 6), torch.zeros(2, 6))))(torch.zeros(64)),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    error, message, arguments = BAD[name]
    frozen = freeze(Actor().eval())
    with pytest.raises(error, match=f"^fastmlp: .*{message}"):
        frozen(*arguments())


def test_errors_of_several_inputs() -> None:
    frozen = frozen_of(model_of("critic"), "critic")
    x, a = torch.zeros(3, 17), torch.zeros(3, 6)
    with pytest.raises(TypeError, match="takes 2 inputs, got 1"):
        frozen(x)
    with pytest.raises(RuntimeError, match=r"input\[1\] has shape \[2, 6\], expected that of input\[0\], \[3, 17\]"):
        frozen(x, a[:2])
    with pytest.raises(TypeError, match=r"input\[1\] is of type numpy.ndarray, expected the kind of input\[0\]"):
        frozen(x, a.numpy())
    with pytest.raises(TypeError, match="takes its inputs by position"):
        frozen(*[x], **{"a": a})
    assert frozen(x, a, torch.empty(3, 1)).shape == (3, 1)


def test_twins_and_nerf_are_what_they_say() -> None:
    """The layers of a trunk are one network, and heads are networks of their own."""
    assert "graph of 2 networks" in repr(freeze(Twins().eval()))
    assert "graph of 5 networks" in repr(freeze(NeRF().eval()))
    assert "graph of 3 networks" in repr(freeze(Actor().eval()))
