"""Many threads that call while others change what is called: each result belongs to a state that the model was in."""

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastmlp
from tests.attack import drawn, nets, oracle
from tests.attack.cases import Case
from tests.support.axes import ISAS
from tests.support.bounds import Bounded


def play(case: Case) -> None:
    dtype = drawn.dtype(case, (torch.float32, torch.float64))
    sizes = nets.widths(case, positive=True)
    leaves = nets.leaves(case, sizes, dtype)
    form = case.choice(["frozen", "frozen", "frozen", "module", "converted", "shared step"])
    model = nets.build(case, leaves, ("nn", "fast", "nested", "attributes"))
    xs = [drawn.randn(case, case.choice([1, 2, 7, 33]), sizes[0], dtype=dtype) for _ in range(2)]
    if form == "frozen":
        while_frozen(case, model, xs)
    elif form == "shared step":
        while_training(case, model, xs)
    else:
        while_called(case, model, xs, form)


def states_of(models: Sequence[nn.Module], x: Tensor) -> list[tuple[Bounded, Tensor]]:
    with torch.no_grad():
        return [(oracle.frozen_bounds(nets.flat(m), x), oracle.eval_forward(nets.flat(m), x, x.dtype)) for m in models]


def belongs(case: Case, found: Tensor, states: Sequence[tuple[Bounded, Tensor]]) -> None:
    """To one of the states."""
    told = []
    for expected, native in states:
        try:
            return oracle.compare(case, found, expected, native, "output")
        except AssertionError as error:
            told.append(str(error))
    case.require(False, f"the output is of none of {len(states)} states: {told[0]}")


def together(case: Case, calls: Sequence[Callable[[], Any]], times: int) -> list[list[Any]]:
    """What the calls give in threads of their own, each so many times; errors are raised."""
    gate = threading.Barrier(len(calls))
    results: list[list[Any]] = [[] for _ in calls]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        gate.wait()
        try:
            for _ in range(times):
                results[index].append(calls[index]())
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return results


def swaps_of(case: Case, model: nn.Module) -> tuple[str, Callable[[bool], None], nn.Module]:
    """Something that takes a model to another state at once, and back; and a model in the other state."""
    places = [(m, name) for m in model.modules() for name, child in m._modules.items() if isinstance(child, nn.Linear)]
    kind = case.choice(["parameter", "module", "module", "data"] if places else ["parameter", "data"])
    other = copy.deepcopy(model)
    if kind == "module":
        parent, name = case.choice(places)
        index = list(model.modules()).index(parent)
        now = parent._modules[name]
        assert isinstance(now, nn.Linear)

        def fresh(second: bool) -> nn.Linear:
            layer = nn.Linear(now.in_features, now.out_features, now.bias is not None, dtype=now.weight.dtype)
            layer.weight = nn.Parameter(now.weight.detach() * (-0.5 if second else 1))
            layer.bias = now.bias
            return layer

        list(other.modules())[index]._modules[name] = fresh(True)

        def swap(second: bool) -> None:
            setattr(parent, name, fresh(second))

        return kind, swap, other
    layer = case.choice([leaf for leaf in nets.flat(model) if isinstance(leaf, nn.Linear)])
    index = nets.flat(model).index(layer)
    both = layer.weight.detach().clone(), layer.weight.detach() * -0.5
    twin = nets.flat(other)[index]
    assert isinstance(twin, nn.Linear)
    twin.weight = nn.Parameter(both[1])

    def put(second: bool) -> None:
        if kind == "parameter":
            layer.weight = nn.Parameter(both[second])
        else:
            layer.weight.data = both[second].clone()

    return kind, put, other


def swapping(swap: Callable[[bool], None]) -> Callable[[], None]:
    turn = [False]

    def call() -> None:
        turn[0] = not turn[0]
        swap(turn[0])

    return call


def while_frozen(case: Case, model: nn.Module, xs: list[Tensor]) -> None:
    """Calls, copies and looks, while a module, a parameter or the instruction set becomes another."""
    start = copy.deepcopy(model)
    kind, swap, other = swaps_of(case, model)
    frozen = fastmlp.freeze(model)
    readers: list[Callable[[], Any]] = [lambda x=x: frozen(x) for x in xs]  # type: ignore[misc]
    more = {
        "copy": lambda: copy.deepcopy(frozen)(xs[0]),
        "pickle": lambda: pickle.loads(pickle.dumps(frozen))(xs[0]),
        "refresh": frozen.refresh,
        "repr": lambda: (repr(frozen), frozen.nbytes, frozen.in_features),
        "freeze": lambda: fastmlp.freeze(model)(xs[0]),
        "set_isa": lambda: fastmlp.set_isa(ISAS[threading.get_native_id() % len(ISAS)]),
    }
    name = case.choice(list(more))
    case.act(f"frozen, {kind}, {name}")
    found = together(case, [*readers, swapping(swap), more[name]], case.choice([5, 10, 20]))
    for x, results in zip(xs, found, strict=False):
        states = states_of([start, other], x)
        for result in results:
            belongs(case, result, states)
    for result in found[3]:
        if isinstance(result, Tensor):
            belongs(case, result, states_of([start, other], xs[0]))
    swap(False)
    belongs(case, frozen(xs[0]), states_of([start], xs[0]))


def while_called(case: Case, model: nn.Module, xs: list[Tensor], form: str) -> None:
    """The model itself, while another thread converts and reverts it, or exchanges a part."""
    start = copy.deepcopy(model)
    states = [start]
    change: Callable[[], Any]
    if form == "converted":
        turn = [False]

        def change() -> None:
            turn[0] = not turn[0]
            (fastmlp.convert if turn[0] else fastmlp.revert)(model)

        case.act("model, convert and revert")
    else:
        fastmlp.convert(model)
        kind, swap, other = swaps_of(case, model)
        states.append(other)
        change = swapping(swap)
        case.act(f"model, {kind}")

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    def both(x: Tensor) -> Tensor:
        y = model(x)
        y.sum().backward()
        return y.detach()

    readers = [lambda x=xs[0]: call(x), lambda x=xs[1]: call(x) if form != "converted" else both(x)]
    found = together(case, [*readers, change], case.choice([5, 10, 20]))
    for x, results in zip(xs, found, strict=False):
        known = states_of(states, x)
        for result in results:
            belongs(case, result, known)


def while_training(case: Case, model: nn.Module, xs: list[Tensor]) -> None:
    """Two trainings side by side that share nothing but the library, each as if it were alone."""
    models = [copy.deepcopy(model) for _ in range(4)]
    case.act("steps side by side")

    def trained(model: nn.Module, x: Tensor) -> Callable[[], Any]:
        optimizer = fastmlp.optim.SGD(model.parameters(), lr=0.01)
        step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
        target = torch.zeros(x.shape[0], model(x).shape[-1], dtype=x.dtype)
        return lambda: step(x, target)

    calls = [trained(m, x) for m, x in zip(models[:2], xs, strict=True)]
    alone = [trained(m, x) for m, x in zip(models[2:], xs, strict=True)]
    found = together(case, calls, 10)
    for results, call in zip(found, alone, strict=True):
        for result in results:
            case.require(oracle.bytes_of(result) == oracle.bytes_of(call()), "a loss has other bits than alone")
            case.agreed()
    for here, there in zip(models[:2], models[2:], strict=True):
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            case.require(oracle.bytes_of(p) == oracle.bytes_of(q), "a parameter has other bits than alone")
