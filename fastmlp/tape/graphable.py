"""Whether a recording is one of a GPU, and what of it a CUDA graph cannot repeat."""

import torch

from fastmlp import optim
from fastmlp.tape.trace import Check, GradSet, Operation, OptimizerStep, Trace

__all__ = ["is_of_gpu", "obstacle"]

#: Optimizers without a switch for graphs, whose steps are kernels and numbers alone.
_ALWAYS_CAPTURABLE = (torch.optim.SGD, optim.SGD)


def is_of_gpu(trace: Trace) -> bool:
    """Whether a recording is one of a GPU."""
    return any(memory.device.startswith("cuda") for memory in trace.memories)


def obstacle(trace: Trace) -> str | None:
    """Why a CUDA graph cannot repeat a recording of a GPU; None if it can, or for recordings of the CPU."""
    if not is_of_gpu(trace):
        return None
    device = next(memory.device for memory in trace.memories if memory.source != ("constant",))
    for memory in trace.memories:
        if memory.device != device and memory.source != ("constant",):
            return f"tensors on {device} and {memory.device} are used together, in {memory.place}: use one device"
        if memory.source[0] == "argument" and memory.written:
            return f"an argument is written, in {memory.place}: write to a tensor that is none, or return what is new"
    for event in trace.events:
        if isinstance(event, OptimizerStep) and (why := _step_obstacle(event.optimizer)) is not None:
            return f"{why}, in {event.place}"
        if isinstance(event, Check):
            return f"torch reads a tensor for a check, in {event.place}: switch it off, as by validate_args=False"
        if isinstance(event, Operation):
            devices = {trace.memories[trace.values[value].memory].device for value in trace.refs(event)}
            if len(devices) > 1 and event.func._schema.name in ("aten::_to_copy", "aten::copy_"):
                return f"a tensor of the CPU is copied to {device}, in {event.place}: make it there by torch.full()"
        if isinstance(event, GradSet) and trace.memories[trace.values[event.leaf].memory].source[0] == "argument":
            return f"the .grad of an argument is set, in {event.place}: return torch.autograd.grad()'s result"
    return None


def _step_obstacle(optimizer: torch.optim.Optimizer) -> str | None:
    groups, name = optimizer.param_groups, type(optimizer).__name__
    if type(optimizer) in _ALWAYS_CAPTURABLE or all(group.get("capturable") for group in groups):
        return None
    if all("capturable" in group for group in groups):
        return f"{name} counts its steps on the CPU, which a CUDA graph does not: make it with capturable=True"
    return f"{name} has no form for CUDA graphs: use torch.optim.Adam with capturable=True, or call step() outside"
