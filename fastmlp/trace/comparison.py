"""Compares a recorded graph with the forward that it was recorded from.

Called by `fastmlp.trace`. Both are executed on the same example, in both modes, and have to execute the same operations
of torch on the same tensors in the same order; so a branch that the recording did not take is seen even where its
values are the same. The example is what the caller gives, or is made from the sizes of the model's layers.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_leaves, tree_map

from fastmlp.trace.observing import Log
from fastmlp.trace.recording import Tracer
from fastmlp.trace.shadow import Shadow, untouched_generators

__all__ = ["compare"]

#: So many examples are tried before the user is asked for one.
_TRIES = 600

#: Attributes of modules that hold the size of the last dimension of their input.
_SIZES = ("in_features", "in1_features", "in2_features", "input_size", "embed_dim", "d_model", "num_features")


def compare(model: nn.Module, tracer: Tracer, graph: fx.Graph, inputs: tuple[Any, ...] | None) -> None:
    """Raises if the graph does something else than the forward.

    Args:
        model: what was recorded; nothing of it is written.
        tracer: that recorded it.
        graph: of the tracer, as it was recorded.
        inputs: arguments to execute both with, or None.

    Raises:
        TraceError: if they differ, or no example can be found.
    """
    with untouched_generators(), torch.no_grad():
        example = _example(model, tracer, graph) if inputs is None else _checked(model, tracer, inputs)
        for training in (False, True):
            _compare(model, tracer, graph, example, training)
        if (same := _same_objects(example)) is not None:
            # A forward may ask whether two arguments are one, as attention does of query and key.
            _compare(model, tracer, graph, same, False)


def _compare(model: nn.Module, tracer: Tracer, graph: fx.Graph, example: tuple[Any, ...], training: bool) -> None:
    shadow = _prepared(model, training)
    expected = _execute(shadow, example, lambda args: _call(shadow, tracer, args))
    changed = shadow.changes()
    if changed:
        raise TraceError(f"it changes {', '.join(changed)}, which a recorded forward would not")
    shadow.root.__dict__.update(tracer.constants)
    found = _execute(shadow, example, lambda args: _interpret(shadow, tracer, graph, args))
    for theirs, ours in itertools.zip_longest(expected, found, fillvalue=("nothing more",)):
        if theirs != ours:
            what = "calls other functions, or with other values,"
            raise TraceError(
                f"recorded, it {what} than when it is called: {_shown(ours, theirs)} in place of "
                f"{_shown(theirs, ours)}. It may ask for the type of a value, read a clock, or draw numbers"
            )


def _shown(entry: tuple[Any, ...], other: tuple[Any, ...]) -> str:
    if entry[:1] == ("output",):
        return f"the output {entry[1:]!r}"
    if entry[:1] == ("error",):
        return f"{entry[1].__name__}: {''.join(entry[2])}"
    if entry[:1] != other[:1]:
        return str(entry[0])
    values = [value for value, theirs in itertools.zip_longest(entry, other) if value != theirs]
    return f"{entry[0]} of {', '.join(map(str, values))}"[:300]


def _prepared(model: nn.Module, training: bool) -> Shadow:
    shadow = Shadow(model, training)
    # Hooks are not run, because recorded forwards call modules that have hooks as they are, so both sides would agree.
    shadow.intercept(lambda module, *args, **kwargs: module.forward(*args, **kwargs))
    return shadow


def _call(shadow: Shadow, tracer: Tracer, args: tuple[Any, ...]) -> Any:
    positional = len(args) - len(tracer.keywords)
    kwargs = dict(zip(tracer.keywords, args[positional:], strict=True))
    return shadow.root.forward(*args[:positional], **kwargs)


def _interpret(shadow: Shadow, tracer: Tracer, graph: fx.Graph, args: tuple[Any, ...]) -> Any:
    given = dict(zip(tracer.names, args, strict=True))
    nodes = {node: given[str(node.target)] for node in graph.nodes if node.op == "placeholder" and node.target in given}
    interpreter = fx.Interpreter(shadow.root, garbage_collect_values=False, graph=graph)
    interpreter.extra_traceback = False
    return interpreter.run(initial_env=nodes, enable_io_processing=False)


def _execute(shadow: Shadow, example: tuple[Any, ...], call: Callable[[tuple[Any, ...]], Any]) -> list[Any]:
    """The operations of a call, and its output, or what it raises. Buffers of torch's modules stay as they were."""
    copies: dict[int, Tensor] = {}
    args = tree_map(lambda value: _copy(value, copies) if isinstance(value, Tensor) else value, example)
    tensors = [t for m in shadow.modules for t in tree_leaves({**m.__dict__, **m._parameters, **m._buffers})]
    buffers = [t for m in shadow.modules if type(m).__module__.startswith("torch.nn.") for t in m._buffers.values()]
    own = [t for t in buffers if t is not None]
    kept = [t.clone() for t in own]
    log = Log(tree_leaves(args), [t for t in tensors if isinstance(t, Tensor)], own)
    try:
        with log:
            output = call(args)
    except TraceError:
        raise
    except Exception as error:
        return [*log.entries, ("error", type(error), str(error).splitlines()[:1])]
    finally:
        # What a BatchNorm1d without momentum computes depends on how many batches it has seen.
        for buffer, before in zip(own, kept, strict=True):
            buffer.copy_(before)
    return [*log.entries, ("output", log.describe(output))]


def _copy(value: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """A copy of an argument, the same one if it is given twice."""
    return copies.setdefault(id(value), value.detach().clone())


# How an example is found.


def _same_objects(example: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The example with one tensor for all arguments of the same form, if there are several."""
    first: dict[Any, Tensor] = {}
    same = tuple(
        first.setdefault((arg.shape, arg.dtype, arg.device), arg) if isinstance(arg, Tensor) else arg for arg in example
    )
    return None if all(a is b for a, b in zip(same, example, strict=True)) else same


def _checked(model: nn.Module, tracer: Tracer, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    shadow = _prepared(model, False)
    last = _execute(shadow, inputs, lambda args: _call(shadow, tracer, args))[-1]
    if last[0] == "error":
        raise TraceError(f"with the inputs that were given it raises {_shown(last, ())}")
    return inputs


def _example(model: nn.Module, tracer: Tracer, graph: fx.Graph) -> tuple[Any, ...]:
    shadow = _prepared(model, False)
    found: tuple[int, tuple[Any, ...]] = (0, ())
    reason: tuple[Any, ...] = ()
    for example in itertools.islice(_examples(shadow.root, tracer, graph), _TRIES):
        *entries, last = _execute(shadow, example, lambda args: _call(shadow, tracer, args))
        if last[0] == "output":
            return example
        # A wrong size lets the search go on, because another shape may be right. A wrong type is wrong in any shape.
        if last[1] is TypeError and len(entries) > found[0]:
            found = (len(entries), example)
        reason = reason or last
    if found[0]:
        return found[1]
    raise TraceError(
        "no example of its arguments was found with which to compare it with its recording; give one: "
        f"convert(model, trace=True, inputs=(...)). The first one that was tried gave {_shown(reason, ())}"
    )


def _examples(root: nn.Module, tracer: Tracer, graph: fx.Graph) -> Iterator[tuple[Any, ...]]:
    first = next((p for p in root.parameters() if p.is_floating_point() or p.is_complex()), torch.empty(0))
    nodes = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    candidates = [list(dict.fromkeys(_shapes(root, nodes[name]))) for name in tracer.names]
    # Each argument's likeliest forms come first in its list, so combinations are tried by the sum of their places.
    places = itertools.product(*(range(min(len(shapes), 24)) for shapes in candidates))
    for chosen in sorted(places, key=sum):
        yield tuple(_tensor(shapes[i], first) for shapes, i in zip(candidates, chosen, strict=True))


def _tensor(form: tuple[bool, tuple[int, ...]], like: Tensor) -> Tensor:
    indices, shape = form
    if indices:
        return torch.zeros(shape, dtype=torch.long, device=like.device)
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count, dtype=torch.float64).view(shape).to(like)


def _shapes(root: nn.Module, placeholder: fx.Node) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Forms that an argument might have: whether it is of indices, and its shape."""
    seen, waiting = {placeholder}, [placeholder]
    while waiting:
        node = waiting.pop(0)
        for user in node.users:
            if user.op == "call_module":
                yield from _shapes_of(root.get_submodule(str(user.target)))
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    for size in dict.fromkeys(size for p in root.parameters() for size in reversed(p.shape)):
        yield from _around(size)
    yield from ((False, shape) for shape in ((2, 1), (), (2, 3, 4), (2, 3, 8, 8), (1,)))
    yield True, (2, 3)


def _shapes_of(module: nn.Module) -> Iterator[tuple[bool, tuple[int, ...]]]:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield from ((True, (2, 3)), (True, (2,)))
    if isinstance(module, nn.LayerNorm):
        yield from ((False, (2, *module.normalized_shape)), (False, (2, 3, *module.normalized_shape)))
    channels = getattr(module, "in_channels", None)
    if isinstance(channels, int):
        dims = next((int(letter) for letter in type(module).__name__ if letter.isdigit()), 2)
        yield from ((False, (2, channels, *[side] * dims)) for side in (9, 32, 28, 64, 224))
    for size in [getattr(module, name) for name in _SIZES if isinstance(getattr(module, name, None), int)]:
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            yield False, (2, size, *[3] * (2 + isinstance(module, nn.BatchNorm3d)))
        yield from _around(size)


def _around(size: int) -> Iterator[tuple[bool, tuple[int, ...]]]:
    yield from ((False, shape) for shape in ((2, size), (2, 3, size), (size,), (2, size, 3)))
