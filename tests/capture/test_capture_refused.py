"""What a tape cannot follow: each raises with the program's line and a remedy, or runs as it is where that was asked.

Each program marks the line that its error must name by a comment, `# here`.
"""

import collections
import copy
import gc
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import fastmlp
from fastmlp.tape.trace import Memory, Operation, Ref, Trace, Value, difference

PREFIX = "fastmlp: capture: "


class Program(NamedTuple):
    """A function, and the arguments of its calls."""

    function: Callable[..., Any]
    calls: Iterable[tuple[Any, ...]]


class Refused(NamedTuple):
    """A program, made anew at each use; what its error says; and what it says to write instead."""

    make: Callable[[], Program]
    reason: str
    remedy: str


REFUSED: dict[str, Refused] = {}


def refused(reason: str, remedy: str) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
    def note(make: Callable[[], Program]) -> Callable[[], Program]:
        name = getattr(make, "__name__", "")
        assert name not in REFUSED
        REFUSED[name] = Refused(make, reason, remedy)
        return make

    return note


def inputs(calls: int = 4) -> list[tuple[Tensor]]:
    """Batches of [3, 4]."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 4, generator=generator),) for _ in range(calls)]


def marked_line(function: Callable[..., Any]) -> int | None:
    """The number of the line with the mark."""
    lines, first = inspect.getsourcelines(function)
    found = [first + i for i, line in enumerate(lines) if "# here" in line]
    return found[0] if found else None


def plain(result: Any) -> list[Any]:
    """What is in a result, as it is now."""
    result = list(result) if isinstance(result, Iterator) else result
    return [item.detach().clone() if isinstance(item, Tensor) else item for item in tree_flatten(result)[0]]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


# Elements of tensors that Python reads.


@refused("an element of a tensor is read by Python", "use torch.where for a choice, and return what is to be looked at")
def item() -> Program:
    def step(x: Tensor) -> Any:
        total = x.sum()
        return x * total.item()  # here

    return Program(step, inputs())


@refused("an element of a tensor is read by Python", "use torch.where for a choice")
def branch_on_a_tensor() -> Program:
    def step(x: Tensor) -> Any:
        if x.sum() > 0:  # here
            return x
        return -x

    return Program(step, inputs())


@refused("an element of a tensor is read by Python", "return what is to be looked at")
def float_of_a_tensor() -> Program:
    def step(x: Tensor) -> Any:
        return float(x[0, 0])  # here

    return Program(step, inputs())


@refused("an element of a tensor is read by Python", "return what is to be looked at")
def index_by_a_tensor() -> Program:
    def step(x: Tensor) -> Any:
        return [1, 2, 3, 4][x[0].argmax()]  # here

    return Program(step, inputs())


@refused("aten.equal.default returns bool to Python", "use torch.where for a choice")
def compare_tensors() -> Program:
    def step(x: Tensor) -> Any:
        return torch.equal(x, x.abs())  # here

    return Program(step, inputs())


@refused("Tensor.numpy() leaves the tensors of a tape for NumPy's arrays", "return the tensor")
def numpy() -> Program:
    def step(x: Tensor) -> Any:
        return (x * 2).numpy().mean()  # here

    return Program(step, inputs())


@refused("Tensor.__array__() leaves the tensors of a tape for NumPy's arrays", "return the tensor")
def array() -> Program:
    def step(x: Tensor) -> Any:
        return np.asarray(x * 2)  # here

    return Program(step, inputs())


@refused("Tensor.tolist() leaves the tensors of a tape for lists", "return the tensor")
def tolist() -> Program:
    def step(x: Tensor) -> Any:
        return (x * 2).tolist()  # here

    return Program(step, inputs())


@refused("Tensor.__repr__() leaves the tensors of a tape for text", "print what the function returns instead")
def shown() -> Program:
    def step(x: Tensor) -> Any:
        return repr(x.sum())  # here

    return Program(step, inputs())


@refused("Tensor.__format__() leaves the tensors of a tape for text", "print what the function returns instead")
def formatted() -> Program:
    def step(x: Tensor) -> Any:
        return f"{x.sum():.3f}"  # here

    return Program(step, inputs())


@refused("Tensor.data_ptr() leaves the tensors of a tape for addresses", "outside of the function")
def address() -> Program:
    def step(x: Tensor) -> Any:
        return x.data_ptr() != 0  # here

    return Program(step, inputs())


@refused("Tensor.untyped_storage() leaves the tensors of a tape for storages", "outside of the function")
def untyped_storage() -> Program:
    def step(x: Tensor) -> Any:
        return x.untyped_storage().nbytes()  # here

    return Program(step, inputs())


@refused("leaves the tensors of a tape for storages", "outside of the function")
def storage() -> Program:
    def step(x: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, that such storages are no longer to be used
            return x.storage().nbytes()  # here

    return Program(step, inputs())


@refused("Tensor.__dlpack__() leaves the tensors of a tape for DLPack", "outside of the function")
def dlpack() -> Program:
    def step(x: Tensor) -> Any:
        return torch.utils.dlpack.from_dlpack((x * 2).__dlpack__())  # here

    return Program(step, inputs())


@refused("Tensor.__deepcopy__() leaves the tensors of a tape for copies of objects", "use clone()")
def deepcopy() -> Program:
    def step(x: Tensor) -> Any:
        return copy.deepcopy(x)  # here

    return Program(step, inputs())


@refused("Tensor.__reduce_ex__() leaves the tensors of a tape for files", "outside of the function")
def saved() -> Program:
    def step(x: Tensor) -> Any:
        y = x * 2
        y.label = "kept with the tensor"  # type: ignore[attr-defined]
        return pickle.loads(pickle.dumps(y))  # here

    return Program(step, inputs())


@refused("Tensor.apply_() leaves the tensors of a tape for functions of Python", "operations of torch")
def apply() -> Program:
    def step(x: Tensor) -> Any:
        return x.clone().apply_(lambda value: value + 1)  # here

    return Program(step, inputs())


@refused("Tensor.map_() leaves the tensors of a tape for functions of Python", "operations of torch")
def mapped() -> Program:
    def step(x: Tensor) -> Any:
        return x.clone().map_(x, lambda a, b: a + b)  # here

    return Program(step, inputs())


@refused("Tensor.share_memory_() leaves the tensors of a tape for other processes", "outside of the function")
def shared_memory() -> Program:
    def step(x: Tensor) -> Any:
        return x.clone().share_memory_()  # here

    return Program(step, inputs())


# Shapes that depend on data, and memory that changes hands.


@refused("aten.nonzero.default returns as many elements as the data say", "use torch.where, or multiply by the mask")
def nonzero() -> Program:
    def step(x: Tensor) -> Any:
        return x.nonzero()  # here

    return Program(step, inputs())


@refused("returns as many elements as the data say", "use torch.where, or multiply by the mask")
def mask() -> Program:
    def step(x: Tensor) -> Any:
        return x[x > 0].sum()  # here

    return Program(step, inputs())


@refused("aten.masked_select.default returns as many elements", "use torch.where, or multiply by the mask")
def masked_select() -> Program:
    def step(x: Tensor) -> Any:
        return torch.masked_select(x, x > 0).sum()  # here

    return Program(step, inputs())


@refused("aten.resize_.default puts other memory into a tensor", "make a new tensor")
def resize() -> Program:
    def step(x: Tensor) -> Any:
        return x.clone().resize_(2, 4)  # here

    return Program(step, inputs())


@refused("puts other memory into a tensor", "make a new tensor")
def set_memory() -> Program:
    def step(x: Tensor) -> Any:
        return torch.empty(0).set_(x)  # type: ignore[call-overload]  # here

    return Program(step, inputs())


@refused("a tensor of the outside gets another shape in place", "make a view of it instead")
def transposed_argument() -> Program:
    def step(x: Tensor) -> Any:
        return x.t_() * 2  # here

    return Program(step, inputs())


@refused("a view begins before the tensor that the function was given", "pass the whole tensor")
def view_of_what_lies_before() -> Program:
    def step(x: Tensor) -> Any:
        return torch.as_strided(x, (4,), (1,), 0) * 2  # here

    return Program(step, [(x[1:],) for (x,) in inputs()])


@refused("a view ends after the tensor that the function was given", "pass the whole tensor")
def view_of_what_lies_behind() -> Program:
    def step(x: Tensor) -> Any:
        return torch.as_strided(x, (x.numel() + 1,), (1,)) * 2  # here

    return Program(step, [(x[:-1],) for (x,) in inputs()])


def setting_grad(make: Callable[[Tensor, nn.Parameter], Tensor]) -> Callable[[], Program]:
    """A program that sets `.grad` to what it makes of an argument and another parameter."""

    def program() -> Program:
        weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def step(x: Tensor) -> Any:
            other.grad = None
            (other * x.sum()).sum().backward()
            weight.grad = make(x, other)  # here
            return x * 2

        return Program(step, inputs())

    program.__name__ = f"grad_set_to_{make.__name__}"
    return program


def a_view_of_an_argument(x: Tensor, other: nn.Parameter) -> Tensor:
    return x.view(-1)[:2]


def a_constant(x: Tensor, other: nn.Parameter) -> Tensor:
    return torch.tensor([1.0, 2.0])


def a_detached_parameter(x: Tensor, other: nn.Parameter) -> Tensor:
    return other.detach()


for _make in (a_view_of_an_argument, a_constant, a_detached_parameter):
    refused(".grad is set to a view, a constant of Python, or", "set it to a new tensor (clone())")(setting_grad(_make))


@refused("the .grad of a tensor that the function makes is set", "compute it by torch.autograd.grad")
def grad_of_an_inner_leaf() -> Program:
    def step(x: Tensor) -> Any:
        leaf = x.clone().requires_grad_()
        leaf.grad = x * 2  # here
        return leaf.detach() * 2

    return Program(step, inputs())


@refused("out= gets another shape than it had", "give it a tensor of the shape of the result")
def result_of_another_shape() -> Program:
    def step(x: Tensor) -> Any:
        made = x * 2
        torch.sum(x, 0, out=made)  # here
        return made

    return Program(step, inputs())


@refused("tensor.data = ... within the captured function", "do it outside, or write with copy_()")
def data_set() -> Program:
    weight = torch.ones(4)

    def step(x: Tensor) -> Any:
        weight.data = x[0]  # here
        return weight * 2

    return Program(step, inputs())


# What a tensor is.


@refused("a tensor of shape (4, 4) cannot be on a tape: it is sparse, quantized or nested", "use a dense tensor")
def sparse() -> Program:
    def step(x: Tensor) -> Any:
        return torch.eye(4).to_sparse() @ x.t()  # here

    return Program(step, inputs())


class Named(Tensor):
    pass


@refused("cannot be on a tape: it is of type Named", "call as_subclass(torch.Tensor)")
def subclass() -> Program:
    named = torch.ones(4).as_subclass(Named)

    def step(x: Tensor) -> Any:
        return (x * named).sum().as_subclass(Tensor)  # here

    return Program(step, inputs())


@refused("cannot be on a tape: it is on meta", "use tensors of the CPU, or of a GPU of CUDA")
def on_another_device() -> Program:
    weight = torch.ones(3, 4, device="meta")

    def step(x: Tensor) -> Any:
        torch.add(weight, torch.ones(()))  # here
        return x * 2

    return Program(step, inputs())


@refused("cannot be on a tape: it is a lazy conjugate", "call resolve_conj()")
def conjugate() -> Program:
    def step(x: Tensor) -> Any:
        return torch.complex(x, x).conj() * 2  # here

    return Program(step, inputs())


@refused("was computed outside of the captured function, and requires a gradient", "pass it with detach()")
def history_from_outside() -> Program:
    weight = nn.Parameter(torch.ones(4))
    scaled = weight * 2

    def step(x: Tensor) -> Any:
        return x * scaled  # here

    return Program(step, inputs())


@refused("was computed outside and requires a gradient", "pass argument.detach(), or compute it inside")
def argument_with_history() -> Program:
    weight = nn.Parameter(torch.ones(4))

    def step(x: Tensor) -> Any:
        return x * 2

    return Program(step, [(x * weight,) for (x,) in inputs()])


@refused("an argument is ndarray", "pass torch.from_numpy(argument)")
def argument_of_numpy() -> Program:
    def step(x: Any) -> Any:
        return torch.from_numpy(x) * 2

    return Program(step, [(x.numpy(),) for (x,) in inputs()])


@refused("a tensor is made from an array of NumPy, whose numbers may change", "pass a tensor as an argument")
def tensor_of_an_array() -> Program:
    array = np.ones(4, dtype=np.float32)

    def step(x: Tensor) -> Any:
        return x * torch.tensor(array)  # here

    return Program(step, inputs())


@refused("a tensor is made from an array of NumPy, whose numbers may change", "pass a tensor as an argument")
def memory_of_an_array() -> Program:
    array = np.ones((), dtype=np.float32)

    def step(x: Tensor) -> Any:
        return x * torch.as_tensor(array)  # here

    return Program(step, inputs())


@refused("a tensor is made from a long list, whose numbers may change", "pass a tensor as an argument")
def tensor_of_a_long_list() -> Program:
    numbers = [1.0] * 40

    def step(x: Tensor) -> Any:
        return x.sum() * torch.tensor(numbers)  # here

    return Program(step, inputs())


@refused("a tensor that the function did not get as an argument is a new one at each call", "pass it as an argument")
def tensor_of_the_call_before() -> Program:
    last = collections.deque([torch.ones(3, 4)])

    def step(x: Tensor) -> Any:
        y = x * last.pop()  # here
        last.append(x + 1)
        return y

    return Program(step, inputs())


# What would happen only once.


@refused("tensor.requires_grad = ... within the captured function", "do it outside")
def requires_grad_set() -> Program:
    weight = torch.ones(4)

    def step(x: Tensor) -> Any:
        weight.requires_grad = True  # here
        return (x * weight).detach()

    return Program(step, inputs())


@refused("Tensor.requires_grad_() changes a tensor that was there before", "do it outside of the function")
def requires_grad_of_an_argument() -> Program:
    def step(x: Tensor) -> Any:
        x.requires_grad_()  # here
        (slope,) = torch.autograd.grad((x**3).sum(), x)
        return slope

    return Program(step, inputs())


@refused("Tensor.register_hook() changes a tensor that was there before", "do it outside of the function")
def hook_of_a_tensor() -> Program:
    weight = nn.Parameter(torch.ones(4))

    def step(x: Tensor) -> Any:
        handle = weight.register_hook(lambda gradient: gradient * 2)  # here
        (slope,) = torch.autograd.grad((x * weight).sum(), weight)
        handle.remove()
        return slope

    return Program(step, inputs())


@refused("Tensor.register_post_accumulate_grad_hook() changes a tensor", "do it outside of the function")
def hook_after_accumulation() -> Program:
    weight = nn.Parameter(torch.ones(4))

    def step(x: Tensor) -> Any:
        weight.register_post_accumulate_grad_hook(lambda leaf: None).remove()  # here
        return x * 2

    return Program(step, inputs())


@refused("Tensor.retain_grad() changes a tensor that was there before", "do it outside of the function")
def retain_grad_of_an_argument() -> Program:
    weight = nn.Parameter(torch.ones(4))

    def step(x: Tensor) -> Any:
        weight.retain_grad()  # here
        return x * 2

    return Program(step, inputs())


@refused("Generator.manual_seed() is called within the captured function", "seed outside of the function")
def seeded() -> Program:
    def step(x: Tensor) -> Any:
        torch.manual_seed(0)  # here
        return x + torch.rand(4)

    return Program(step, inputs())


@refused("Generator.seed() is called within the captured function", "seed outside of the function")
def seeded_anew() -> Program:
    generator = torch.Generator()

    def step(x: Tensor) -> Any:
        generator.seed()  # here
        return x * 2

    return Program(step, inputs())


@refused("Generator.set_state() is called within the captured function", "seed outside of the function")
def state_of_a_generator() -> Program:
    generator = torch.Generator()
    state = generator.get_state()

    def step(x: Tensor) -> Any:
        generator.set_state(state)  # here
        return x + torch.rand(4, generator=generator)

    return Program(step, inputs())


@refused("optimizer.step(closure) calls the closure as often as it likes", "call step() without one")
def closure() -> Program:
    model = line()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def step(x: Tensor) -> Any:
        def loss() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return optimizer.step(loss)  # here

    return Program(step, inputs())


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


@refused("StepLR.step() counts in Python, which a replay does not", "call it outside of the captured function")
def scheduler() -> Program:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def step(x: Tensor) -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()  # here
        return loss

    return Program(step, inputs())


@refused("GradScaler.unscale_() counts in Python, which a replay does not", "call it outside of the captured function")
def scaler() -> Program:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(x: Tensor) -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (loss * 8.0).backward()
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)  # here
        optimizer.step()
        scaler.update()
        return loss

    return Program(step, inputs())


@refused("the gradient of before the call is used after zero_grad()", "use it before")
def gradient_from_before() -> Program:
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)

    def step(x: Tensor) -> Any:
        before = weight.grad
        weight.grad = None
        (x * weight).sum().backward()
        return before + 2  # type: ignore[operator]  # here

    return Program(step, inputs())


# Code of Python that computes.


@refused("cond runs code of Python", "use other operations of torch, such as torch.where for a choice")
def control_flow() -> Program:
    def step(x: Tensor) -> Any:
        return torch.ops.higher_order.cond(x.sum() > 0, lambda x: (x * 2,), lambda x: (x * 3,), (x,))  # here

    return Program(step, inputs())


@refused("prims.sin.default is computed by code of Python", "use torch's own function instead")
def reference() -> Program:
    def step(x: Tensor) -> Any:
        return torch.ops.prims.sin(x)  # here

    return Program(step, inputs())


# Two calls that differ.


@refused("in the call before. A number that changes from call to call has to be an argument", "that is a tensor")
def changing_number() -> Program:
    numbers = iter([1.0, 2.0, 3.0, 4.0, 5.0])

    def step(x: Tensor) -> Any:
        return x * next(numbers)  # here

    return Program(step, inputs())


@refused(
    "a tensor that is made of numbers of Python is 3.0, and was 2.0 in the call before",
    "pass it as an argument that is a tensor",
)
def changing_constant() -> Program:
    numbers = iter([1.0, 2.0, 3.0, 4.0, 5.0])

    def step(x: Tensor) -> Any:
        return x * torch.tensor(next(numbers))  # here

    return Program(step, inputs())


@refused("takes another branch, or does another number of steps", "give what it depends on to the function")
def changing_branch() -> Program:
    turns = iter([True, False, True, False])

    def step(x: Tensor) -> Any:
        if next(turns):
            return x.exp()
        return x.cos()  # here

    return Program(step, inputs())


@refused("aten.mul.Tensor in {here} came only in this call", "give what it depends on to the function as an argument")
def more_steps() -> Program:
    turns = iter([1, 2, 3, 4])

    def step(x: Tensor) -> Any:
        for _ in range(next(turns)):
            x = x * 2  # here
        return x

    return Program(step, inputs())


@refused("aten.mul.Tensor in {here} came not this time", "give what it depends on to the function as an argument")
def fewer_steps() -> Program:
    turns = iter([4, 3, 2, 1])

    def step(x: Tensor) -> Any:
        for _ in range(next(turns)):
            x = x * 2  # here
        return x

    return Program(step, inputs())


@refused("its argument self is another tensor than in the call before", "give what it depends on to the function")
def other_tensor() -> Program:
    turns = iter([True, False, True, False])

    def step(x: Tensor) -> Any:
        y = x * 2
        return (x if next(turns) else y).exp()  # here

    return Program(step, inputs())


@refused("its argument alpha is 3, and was 1 in the call before", "has to be an argument of the captured function")
def number_that_was_left_out() -> Program:
    """Torch does not tell of arguments that have their default values."""
    numbers = iter([2, 1, 3, 1])

    def step(x: Tensor) -> Any:
        return torch.add(x, x, alpha=next(numbers))  # here

    return Program(step, inputs())


@refused("a tensor comes from elsewhere, or has another size", "pass it as an argument")
def tensor_from_elsewhere() -> Program:
    others = iter([torch.ones(4), None, torch.ones(4), None])
    mine = torch.ones(4)

    def step(x: Tensor, y: Tensor) -> Any:
        other = next(others)
        return x * (y if other is None else other)  # here

    return Program(step, [(x, mine) for (x,) in inputs()])


@refused("SGD.step() in {here}: it is another optimizer than in the call before", "give what it depends on")
def other_optimizer() -> Program:
    weight = nn.Parameter(torch.ones(4))
    optimizers = iter([torch.optim.SGD([weight], lr=0.1 * i) for i in range(1, 5)])

    def step(x: Tensor) -> Any:
        weight.grad = None
        loss = (x * weight).square().sum()
        loss.backward()
        next(optimizers).step()  # here
        return loss

    return Program(step, inputs())


@refused("a change of .grad in {here}: it is another tensor's than in the call before", "give what it depends on")
def gradient_of_another() -> Program:
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    turns = iter([0, 1, 0, 1])

    def step(x: Tensor) -> Any:
        a, b = weights
        y = x[0] + (a * b * 0).detach()
        z = y * 2
        weights[0].grad = y if next(turns) else z  # here
        return y

    return Program(step, inputs())


@refused("a tensor has another shape or dtype, or other strides, than in the call before", "give what it depends on")
def other_shapes() -> Program:
    weight = torch.ones(1, 4)

    def step(x: Tensor) -> Any:
        return weight.exp().sum() * x  # here

    def calls() -> Iterator[tuple[Tensor]]:
        for each in inputs():
            weight.data = weight.data.t()
            yield each

    return Program(step, calls())


@refused("a number that torch looks at is another one than in the call before", "call this part outside")
def count_that_changes() -> Program:
    def step(count: Tensor) -> Any:
        binomial = torch.distributions.Binomial(count, torch.full((2,), 0.5), validate_args=False)
        return binomial.enumerate_support()  # here

    return Program(step, [(torch.full((2,), float(i)),) for i in range(1, 5)])


@refused("an element of a tensor is read by Python", "use torch.where for a choice")
def drawn_until_it_fits() -> Program:
    def step(x: Tensor) -> Any:
        return torch.distributions.VonMises(x[0], torch.ones(4)).sample()  # here

    return Program(step, inputs())


@refused("it returned other tensors than in the call before", "give what it depends on")
def other_result() -> Program:
    turns = iter([True, False, True, False])

    def step(x: Tensor) -> Any:  # here
        y, z = x * 2, x * 3
        return y if next(turns) else z

    return Program(step, inputs())


@refused("it returned", "return tensors, and numbers that stay as they are")
def changing_result() -> Program:
    numbers = iter([1, 2, 3, 4])

    def step(x: Tensor) -> Any:  # here
        return x * 2, next(numbers)

    return Program(step, inputs())


@refused("changes within the captured function, and a replay does not run Python", "change it outside of the function")
def counter() -> Program:
    count = {"calls": 0}

    def step(x: Tensor) -> Any:  # here
        count["calls"] += 1
        return x * 2

    return Program(step, inputs())


def growing(container: Any, add: Callable[[Any], Any]) -> Callable[[], Program]:
    """A program in which a container grows at each call."""

    def make() -> Program:
        grown = copy.copy(container)

        def step(x: Tensor) -> Any:  # here
            add(grown)
            return x * 2

        return Program(step, inputs())

    make.__name__ = f"growing_{type(container).__name__}"
    return make


for container, add in (
    (collections.deque(), lambda grown: grown.append(1)),
    (set(), lambda grown: grown.add(len(grown))),
    ([0] * 100, lambda grown: grown.append(1)),
    (dict.fromkeys(range(100)), lambda grown: grown.update({len(grown): 1})),
    (bytearray(), lambda grown: grown.append(1)),
):
    refused("grown changes within the captured function", "change it outside of the function")(growing(container, add))


@refused("it returned", "can be gone through once")
def results_one_by_one() -> Program:
    def step(x: Tensor) -> Any:  # here
        yield x * 2

    return Program(step, inputs())


@refused("it returned", "return a list or a tuple")
def mapped_results() -> Program:
    def step(x: Tensor) -> Any:  # here
        return map(torch.neg, (x * 2, x))

    return Program(step, inputs())


@refused("Linear.training changes within the captured function", "change it outside of the function")
def toggled() -> Program:
    model = line()

    def step(x: Tensor) -> Any:  # here
        model.train(not model.training)
        return model(x).detach()

    return Program(step, inputs())


@refused("the last 64 calls were recorded and none could be replayed", "give numbers that change as tensors")
def argument_that_changes_each_time() -> Program:
    def step(x: Tensor, factor: float) -> Any:
        return x * factor

    return Program(step, [(x, float(i)) for i, (x,) in enumerate(inputs(70))])


# Modes of torch around the call.


class Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def consume(calls: Iterable[Any]) -> None:
    for _ in calls:
        pass


def check_text(text: str, case: Refused, program: Program) -> None:
    line = marked_line(program.function)
    place = f"{__file__}:{line}"
    assert text.startswith(f"{PREFIX}{program.function.__qualname__}: ")
    if line is not None:
        assert place in text
    assert case.reason.replace("{here}", place) in text
    assert case.remedy
    assert case.remedy in text


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    case = REFUSED[name]
    program = case.make()
    captured = fastmlp.capture(program.function, fuse=False)
    with pytest.raises(fastmlp.CaptureError) as error:
        consume(starmap(captured, program.calls))
    check_text(str(error.value), case, program)
    assert captured.replays == 0


@pytest.mark.parametrize("name", REFUSED)
def test_otherwise_eager(name: str) -> None:
    """One warning, which names the same, and the results of the program as it is."""
    case = REFUSED[name]
    eager, twin = case.make(), case.make()
    captured = fastmlp.capture(twin.function, fuse=False, otherwise="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for args, twin_args in zip(eager.calls, twin.calls, strict=True):
            torch.manual_seed(1)
            expected = plain(eager.function(*args))
            torch.manual_seed(1)
            found = plain(captured(*twin_args))
            assert len(found) == len(expected)
            assert all(map(equal, found, expected))
    told = [w for w in caught if str(w.message).startswith(PREFIX)]
    assert [(w.category, w.filename) for w in told] == [(RuntimeWarning, __file__)]
    text = str(told[0].message)
    assert text.endswith("It runs as it is, not captured")
    check_text(text, case, twin)
    assert captured.replays == 0


def test_within_a_mode_of_torch() -> None:
    def step(x: Tensor) -> Tensor:
        return x * 2

    (x,) = inputs(1)[0]
    with Quiet(), pytest.raises(fastmlp.CaptureError, match="within a mode or transform of torch") as error:
        fastmlp.capture(step)(x)
    assert str(error.value).endswith("call the function itself there")
    captured = fastmlp.capture(step, otherwise="eager")
    with pytest.warns(RuntimeWarning, match="within a mode or transform of torch") as told, Quiet():
        results = [captured(x) for _ in range(3)]
    assert len(told) == 1
    assert [torch.equal(result, x * 2) for result in results] == [True] * 3
    for _ in range(3):
        captured(x)
    assert captured.replays == 1  # outside of the mode it is captured


def test_eager_calls_are_not_kept() -> None:
    """Each signature that is refused is remembered, the last ones only."""
    captured = fastmlp.capture(lambda x: x.sum().item(), otherwise="eager")
    tensors = [torch.ones(i) for i in range(1, 100)]
    references = [weakref.ref(tensor) for tensor in tensors]
    with pytest.warns(RuntimeWarning, match="is read by Python") as told:
        assert [captured(tensor) for tensor in tensors] == list(range(1, 100))
    assert len(told) == 1
    del tensors
    gc.collect()
    assert sum(reference() is not None for reference in references) < 40


def test_results_of_operations_are_compared() -> None:
    """Whatever torch may decide by itself, such as to return a view: two traces that only differ in that."""

    def trace(*outputs: int) -> Trace:
        value = Value(0, torch.float32, (3,), (1,), 0)
        operation = Operation(torch.ops.aten.mul.Tensor, (Ref(0), 2.0), {}, list(outputs), f"{__file__}:1")
        return Trace([Memory(("argument", 0), 12, None, "")], [value, value], [operation], end="")

    assert difference(trace(1), trace(1)) is None
    told = difference(trace(1), trace(0))
    assert told is not None
    assert told.startswith(f"aten.mul.Tensor in {__file__}:1: it has other results than in the call before: give what")


@pytest.mark.usefixtures("validated")
def test_checks_of_torch_itself_are_recorded() -> None:
    """They read numbers too, and only raise: as when a distribution is given arguments that are none."""
    normal = fastmlp.capture(lambda x, y: torch.distributions.Normal(x, y.abs()).log_prob(x + y))
    for x, y in zip(inputs(), inputs()[::-1], strict=True):
        assert torch.equal(normal(*x, *y), torch.distributions.Normal(*x, y[0].abs()).log_prob(x[0] + y[0]))
    assert normal.replays == 2
    with pytest.raises(ValueError, match=r"a check of torch's, called in .*, came out otherwise than when"):
        normal(*inputs()[0], torch.zeros(3, 4))
