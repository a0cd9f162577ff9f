"""TrainStep against the loop's four lines, with all that watches, changes and breaks a training between its calls."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp.activations import IDENTITY
from tests.attack import after, drawn, nets, oracle, passes, watching
from tests.attack.cases import Case, Disagreement, attempt
from tests.attack.meddling import MEDDLING
from tests.attack.sides import Side, Training, owned
from tests.support.endings import LOSSES_AFTER
from tests.support.training import LOSSES, OPTIMIZERS, draw_loss, draw_optimizer, optimizer_of, targets

DTYPES = (torch.float32, torch.float64)
FORMS = ("nn", "fast", "nested", "functional", "attributes", "fused", "converted")
#: Losses that are taken after one activation or softmax, by the names of what that is called.
FOLLOWING = {name: kind for kind, name in LOSSES_AFTER.items()}


def play(case: Case) -> None:
    training = drawn_training(case)
    try:
        if case.chance(0.1):
            for _ in range(case.choice([1, 1, 2])):
                watching.watch(training)
        if case.chance(0.02):
            watching.watch_everywhere(training)
        if not constructed(training):
            return
        if case.chance(0.12):
            watching.watch(training)
        for _ in range(case.choice([2, 3, 4, 6])):
            if case.chance(0.35):
                meddle(training)
            if not called(training):
                return
    finally:
        for undo in training.undo:
            undo()


def drawn_training(case: Case) -> Training:
    dtype = drawn.dtype(case, DTYPES)
    sizes = nets.widths(case)
    name = case.choice((*LOSSES, *FOLLOWING))
    if name in ("ce", "log_softmax"):
        sizes[-1] = max(sizes[-1], 2)
    odd = case.choice([0, 0, 0, 0.3, 0.6])
    leaves = nets.leaves(case, sizes, dtype, odd=odd)
    if case.chance(0.35):
        leaves = nets.noisy(case, leaves, dtype)
    if name in FOLLOWING:
        leaves = ended(case, leaves, name)
        loss_fn = following(case, name, sizes[-1], dtype)
    else:
        loss_fn = draw_loss(case.random, name, case.random.randrange(8), sizes[-1], dtype)
    model = nets.build(case, leaves, FORMS)
    parameters = list(model.parameters())
    for p in parameters:
        p.requires_grad_(not case.chance(0.08))
    optimizer = drawn_optimizer(case, parameters)
    options: dict[str, Any] = case.choice(
        [{}, {}, {"max_norm": 0.5}, {"max_norm": 1e3}, {"clip_value": 0.01}, {"keep_grads": False}]
    )
    if case.chance(0.3) and options.get("keep_grads", True):
        options = options | {"accumulate": case.choice([2, 3])}
    if case.chance(0.02):
        options = options | {
            case.choice(["max_norm", "clip_value"]): case.choice([-1.0, 0.0, float("nan"), float("inf")])
        }
    training = Training(case, dtype, Side(model, nets.flat(model), optimizer, loss_fn), copy.deepcopy(loss_fn), options)
    if not all(math_like(value) for value in options.values()):
        training.risks.add("option")
    if not any(p.requires_grad for p in parameters):
        training.risks.add("nothing to train")
    case.note(f"{dtype} {loss_fn} reduction={loss_fn.reduction} {options} {' '.join(str(optimizer).split())}")
    case.note(f"requires_grad {[p.requires_grad for p in parameters]}")
    return training


def ended(case: Case, leaves: list[nn.Module], name: str) -> list[nn.Module]:
    """With the end that a loss asks for, or now and then without it."""
    if case.chance(0.04):
        return leaves
    if name == "log_softmax":
        return [*leaves, nn.LogSoftmax(case.choice([1, -1, -1]))]
    while not isinstance(leaves[-1], (nn.Linear, nn.BatchNorm1d, nn.Dropout)):
        leaves = leaves[:-1]
    return [*leaves, nn.Sigmoid(), *([nn.Dropout(0.5).eval()] if case.chance(0.1) else [])]


def following(case: Case, name: str, classes: int, dtype: torch.dtype) -> nn.Module:
    """A loss of probabilities or of their logarithms."""
    reduction = case.choice(["mean", "sum"])
    if name == "sigmoid":
        return nn.BCELoss(reduction=reduction)
    weight = torch.rand(classes, dtype=dtype) + 0.5 if case.chance(0.5) else None
    return nn.NLLLoss(weight, ignore_index=case.choice([-100, 0, 1]), reduction=reduction)


def ends_otherwise(training: Training) -> bool:
    """Whether the loss is one that follows an end which the network does not have, or no longer has."""
    name = next((name for name, kind in FOLLOWING.items() if type(training.plain_loss) is kind), None)
    leaves = [leaf for leaf in training.side.leaves if not (isinstance(leaf, nn.Dropout) and not leaf.training)]
    if name == "log_softmax":
        return not any(isinstance(leaf, nn.LogSoftmax) for leaf in leaves)
    *_, last = passes.dissolved(leaves)
    return name == "sigmoid" and last != passes.SIGMOID


def refusable(training: Training, x: Tensor | None = None, target: Tensor | None = None) -> bool:
    """Whether what the leaves are now, or data for them, is documented to be refused."""
    drops = [leaf for leaf in training.side.leaves if isinstance(leaf, nn.Dropout) and leaf.training and leaf.p > 0]
    if any(leaf.inplace for leaf in drops) or ends_otherwise(training) or doubled(training):
        return True
    if x is None or target is None:
        return False
    if target.shape != shape_of_target(training, x.shape[:-1]):
        return True
    norms = any(isinstance(leaf, nn.BatchNorm1d) for leaf in training.side.leaves)
    before = itertools.takewhile(lambda leaf: not isinstance(leaf, nn.Linear), training.side.leaves)
    gaps = any(leaf in drops for leaf in before) and not x.is_contiguous()
    return gaps or (norms and (x.dim() != 2 or x.shape[0] == 0))


def takes_classes(training: Training) -> bool:
    return isinstance(training.plain_loss, (nn.CrossEntropyLoss, nn.NLLLoss))


def shape_of_target(training: Training, leading: Sequence[int]) -> tuple[int, ...]:
    last = [leaf for leaf in training.side.leaves if isinstance(leaf, nn.Linear)][-1]
    return tuple(leading) if takes_classes(training) else (*leading, last.weight.shape[0])


def math_like(value: Any) -> bool:
    return bool(value is True or value is False or 0 < value < float("inf"))


def drawn_optimizer(case: Case, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    name = case.choice(OPTIMIZERS)
    arguments, other = draw_optimizer(case.random, name), draw_optimizer(case.random, name)
    if case.chance(0.05):
        arguments["lr"] = other["lr"] = torch.tensor(arguments["lr"])
    elif case.chance(0.3):
        arguments |= {"foreach": case.choice([True, False])}
    groups: Any = parameters
    if case.chance(0.3) and len(parameters) > 1:
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], **other}]
    elif case.chance(0.05) and len(parameters) > 1:
        groups = parameters[1:]
        case.note("the optimizer does not have the first parameter")
    elif case.chance(0.03):
        groups = [nn.Parameter(torch.randn(3)) for _ in range(2)]
        case.note("the optimizer has no parameter of the model")
    if case.chance(0.05) and groups is parameters:
        groups = [*parameters, nn.Parameter(torch.randn(3))]
        case.note("the optimizer has a parameter more")
    return optimizer_of(case.choice([torch.optim, fastmlp.optim]), name, arguments, groups)


def constructed(training: Training) -> bool:
    case, side = training.case, training.side
    before = training.snapshot()
    problems, error = attempt(lambda: fastmlp.TrainStep.explain(side.model, side.loss_fn, side.optimizer))
    if error is not None:
        raise Disagreement(f"explain raises {type(error).__name__}: {error}") from error
    step, error = attempt(lambda: fastmlp.TrainStep(side.model, side.loss_fn, side.optimizer, **training.options))
    same(case, before, training.snapshot(), "TrainStep(...)")
    if step is None:
        assert error is not None
        case.refused(error, bool(training.risks) or owns_nothing(training) or refusable(training))
        return False
    case.require(not problems, f"explain sees {problems}, and TrainStep nothing")
    training.step = step
    return True


def owns_nothing(training: Training) -> bool:
    """Whether no parameter that the optimizer has would get a gradient."""
    parameters = [p for p in training.side.parameters if p.requires_grad]
    return not any(owned(training.side.optimizer, parameters))


def doubled(training: Training) -> bool:
    """Whether a layer with an activation of its own is followed by another one."""
    leaves = training.side.leaves
    own = [isinstance(leaf, fastmlp.Linear) and leaf.activation != IDENTITY for leaf in leaves]
    return any(first and not isinstance(leaf, nn.Linear) for first, leaf in zip(own, leaves[1:], strict=False))


def same(case: Case, before: dict[str, object], after: dict[str, object], what: str) -> None:
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    case.require(not changed, f"{what} has changed {', '.join(changed)}")


def meddle(training: Training) -> None:
    case = training.case
    names = [name for name, entry in MEDDLING.items() if entry.fits(training)]
    if training.accumulate > 1:
        names += ["requires_grad", "gradients of another layout", "gradients are held"] * 3
    name = case.choice(names)
    case.act(f"change {name}")
    MEDDLING[name].make(training)
    training.side.leaves = nets.flat(training.side.model)
    if MEDDLING[name].risky:
        training.risks.add(name)


MODES: dict[str, Callable[[], Any]] = {
    "": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def data(training: Training) -> tuple[Tensor, Tensor]:
    case, dtype = training.case, training.dtype
    layers = [leaf for leaf in training.side.leaves if isinstance(leaf, nn.Linear)]
    classes = takes_classes(training)
    norms = any(isinstance(leaf, nn.BatchNorm1d) for leaf in training.side.leaves)
    shape = (drawn.size(case),) if classes or (norms and case.chance(0.85)) else drawn.leading(case)
    if classes and case.chance(0.1):
        shape = ()
    x, how = drawn.lay_to_read(case, drawn.randn(case, *shape, layers[0].weight.shape[1], dtype=dtype))
    target = targets(training.plain_loss, (*shape, layers[-1].weight.shape[0]), dtype)
    if not classes and case.chance(0.06):
        exponent = case.choice([-25, -15, 10, 18, 19, 21, 25] if dtype == torch.float32 else [-150, 100, 152, 160])
        target = target * 10.0**exponent
        how += f", target of size 1e{exponent}"
    if case.chance(0.04):
        x = drawn.sprinkled(case, x)
        how += ", with special numbers"
    if not classes:
        target, where = drawn.lay_to_read(case, target)
        how += f", target {where}"
    if case.chance(0.03):
        # PyTorch broadcasts, warns or raises.
        target = target.unsqueeze(case.choice([0, -1]))
        how += ", target with another dimension"
    case.act("call", how)
    return x, target


def called(training: Training) -> bool:
    """One call of each side; says whether to go on."""
    case = training.case
    x, target = data(training)
    mode = case.choice(["no_grad", "inference_mode", "autocast"]) if case.chance(0.06) else ""
    if mode:
        case.act(f"mode {mode}")
    kept = x.clone(memory_format=torch.contiguous_format), target.clone(memory_format=torch.contiguous_format)
    twin, loop = training.twin()
    generator = torch.get_rng_state()
    bounds, bound_error = attempt(lambda: after.expected(training, loop, x, kept[1]))
    torch.set_rng_state(generator)
    twin.log.clear()
    training.everywhere.clear()
    with MODES[mode]():
        twin_loss, twin_error = attempt(lambda: loop(x, target))
    twins = sorted(twin.log), bool(training.everywhere)
    drawn_by_twin = torch.get_rng_state()
    torch.set_rng_state(generator)
    before = training.snapshot()
    training.side.log.clear()
    training.everywhere.clear()
    with MODES[mode]():
        loss, error = attempt(lambda: training.step(x, target))
    ours = sorted(training.side.log), bool(training.everywhere)
    for given, was in zip((x, target), kept, strict=True):
        case.require(oracle.bytes_of(given) == oracle.bytes_of(was), "the call has written to its arguments")
    if error is not None and twin_error is not None and "output holds" in str(error):
        # The loop sees it after its forward, and so does a step.
        case.require(torch.equal(torch.get_rng_state(), drawn_by_twin), "the generator is not where the loop leaves it")
        return left_alike(case, training, twin, error)
    if error is not None:
        same(case, before, training.snapshot(), f"a call that raises {type(error).__name__}: {error}")
        if twin_error is not None:
            case.both_raise(error)
            return True
        allowed = bool(training.risks) or bool(mode) or owns_nothing(training) or refusable(training, x, target)
        case.refused(error, allowed)
        return not training.risks
    case.require(twin_error is None, f"PyTorch raises {type(twin_error).__name__}: {twin_error}")
    case.require(twins == ours, f"hooks were called so: {ours}, by the loop so: {twins}")
    case.require(torch.equal(torch.get_rng_state(), drawn_by_twin), "the generator is not where the loop leaves it")
    if bounds is None:
        assert bound_error is not None
        raise bound_error
    assert loss is not None
    assert twin_loss is not None
    after.check(case, training, bounds, loss, twin_loss, twin)
    versions(case, before, training, twin)
    training.calls += 1
    return True


def left_alike(case: Case, training: Training, twin: Side, error: Exception) -> bool:
    """What a loop leaves that stops between its forward and its backward."""
    for i, (p, q) in enumerate(zip(training.side.parameters, twin.parameters, strict=True)):
        for what, mine, theirs in (("parameter", p, q), ("gradient", p.grad, q.grad)):
            alike = (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                alike = oracle.bytes_of(mine) == oracle.bytes_of(theirs)
            case.require(alike, f"{what} {i} is not what the loop leaves after {error}")
    case.both_raise(error)
    return True


def versions(case: Case, before: dict[str, object], training: Training, twin: Side) -> None:
    """Whoever looks at version counters sees each change."""
    for i, group in enumerate(training.side.optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            was: Any = before[f"optimizer {i}.{j}"]
            moved = oracle.bytes_of(p) != was[0]
            case.require(not moved or p._version > was[2], f"parameter {i}.{j} moved without a new version")
    # Running statistics themselves move without one in PyTorch too.
    for name, buffer in training.side.model.named_buffers():
        was = before[f"0.{name}"]
        moved = not buffer.is_floating_point() and oracle.bytes_of(buffer) != was[5]
        case.require(not moved or buffer._version > was[1], f"{name} moved without a new version")
