"""What results must be: PyTorch's own in float64, with bounds from `tests/support/bounds.py`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, reference
from fastmlp.activations import IDENTITY, resolve
from tests.attack.cases import Case, Disagreement
from tests.support.bounds import Bounded, activated, gamma, product, rounding, stored

#: Norms, dropouts and what else is no layer and no activation.
VANISHING = (nn.Dropout, nn.AlphaDropout, nn.Identity)


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double()


def affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Factor and summand of each feature in eval mode, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def eval_forward(leaves: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the leaves compute in eval mode, by PyTorch's functions in a dtype."""
    x = x.detach().to(dtype)
    for leaf in leaves:
        if isinstance(leaf, nn.Linear):
            bias = None if leaf.bias is None else leaf.bias.detach().to(dtype)
            x = F.linear(x, leaf.weight.detach().to(dtype), bias)
            if isinstance(leaf, fastmlp.Linear):
                x = reference.activate(x, leaf.activation.name, leaf.activation.parameters)
        elif isinstance(leaf, nn.BatchNorm1d):
            scale, shift = [None if p is None else p.detach().to(dtype) for p in (leaf.weight, leaf.bias)]
            assert leaf.running_mean is not None
            assert leaf.running_var is not None
            mean, var = leaf.running_mean.to(dtype), leaf.running_var.to(dtype)
            x = F.batch_norm(x, mean, var, scale, shift, False, 0.0, leaf.eps)
        elif not isinstance(leaf, VANISHING):
            act = resolve(leaf)
            x = reference.activate(x, act.name, act.parameters)
    return x


def layers_of(
    leaves: Sequence[nn.Module],
) -> list[tuple[list[nn.BatchNorm1d], nn.Linear, list[nn.BatchNorm1d], Activation]]:
    """Norms before, layer, norms after it, activation."""
    found: list[tuple[list[nn.BatchNorm1d], nn.Linear, list[nn.BatchNorm1d], Activation]] = []
    waiting: list[nn.BatchNorm1d] = []
    for leaf in leaves:
        if isinstance(leaf, nn.Linear):
            found.append((waiting, leaf, [], leaf.activation if isinstance(leaf, fastmlp.Linear) else IDENTITY))
            waiting = []
        elif isinstance(leaf, nn.BatchNorm1d):
            if found and found[-1][3] == IDENTITY and not waiting:
                found[-1][2].append(leaf)
            else:
                waiting.append(leaf)
        elif not isinstance(leaf, VANISHING):
            found[-1] = (*found[-1][:3], resolve(leaf))
    return found


def frozen_bounds(leaves: Sequence[nn.Module], x: Tensor, low: torch.dtype | None = None) -> Bounded:
    """The output of a frozen network for (rows, features); `low` is `freeze(..., dtype=low)`."""
    dtype = low or x.dtype
    chain = layers_of(leaves)
    output = Bounded.exact(x)
    if low is not None:
        output = stored(output, low)
    for i, (before, layer, after, act) in enumerate(chain):
        weight = layer.weight.detach().double()
        bias = torch.zeros(weight.shape[0], dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
        size, changed = bias.abs(), False
        for norm in reversed(before):
            scale, shift = affine(norm)
            bias, size = bias + weight @ shift, size + weight.abs() @ shift.abs()
            weight, changed = weight * scale, True
        for norm in after:
            scale, shift = affine(norm)
            bias, size = bias * scale + shift, size * scale.abs() + shift.abs()
            weight, changed = weight * scale[:, None], True
        exact = weight if low is None or changed else weight.to(low).double()
        error = rounding(weight, dtype) if changed else torch.zeros_like(weight)
        z = product(output, Bounded(exact.t(), error.t()), dtype, bias)
        if changed:
            # What is folded is rounded, the bias too; PyTorch rounds the norm's own operations.
            z = Bounded(z.value, z.error + gamma(8, dtype) * (size + output.value.abs() @ weight.abs().t()))
        output = activated(z, act, dtype)
        if i + 1 < len(chain):
            output = stored(output, dtype)
    return output


def compare(case: Case, found: Tensor, expected: Bounded, native: Tensor, what: str, nan_is_open: bool = False) -> None:
    """A result against its bounds; where PyTorch's own result is not finite, ours has the same there.

    Args:
        case: whose outcome is counted.
        found: the result.
        expected: its value and bound.
        native: what PyTorch computes in the same dtype.
        what: for messages.
        nan_is_open: whether NaN is right where PyTorch has a number and bounds know none.
    """
    if found.shape != native.shape:
        raise Disagreement(f"{what}: shape {tuple(found.shape)} for {tuple(native.shape)}")
    if found.dtype != native.dtype:
        raise Disagreement(f"{what}: dtype {found.dtype} for {native.dtype}")
    ours, theirs = found.detach().flatten(), native.detach().flatten()
    value, error = expected.value.flatten(), expected.error.flatten()
    regular = value.isfinite() & error.isfinite()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | (ours.isfinite() & theirs.isfinite())
    edge = regular & (value.abs() + error > torch.finfo(found.dtype).max * 0.99)
    wrong = ~same & ~edge & ~(regular & ours.isfinite()) & ~(ours.isnan() & ~regular & nan_is_open)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise Disagreement(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} entries, the first at {at}: {ours[at].item():.9g} "
            f"where PyTorch has {theirs[at].item():.9g}"
        )
    allowed = error * (2 if found.dtype == torch.float64 else 1)
    allowed = allowed + rounding(value, found.dtype) * (1 + torch.finfo(found.dtype).eps)
    outside = regular & ~edge & ~((ours.double() - value).abs() <= allowed)
    if not outside.any():
        return case.agreed()
    theirs_outside = regular & ~edge & ~((theirs.double() - value).abs() <= allowed)
    if found.dtype.itemsize > 2 and not (outside & ~theirs_outside).any():
        case.outcomes["beyond the bounds, as PyTorch is"] += 1
        return None
    excess = torch.where(
        outside & ~theirs_outside if found.dtype.itemsize > 2 else outside,
        (ours.double() - value).abs() - allowed,
        -torch.inf,
    )
    excess = torch.where(excess.isnan(), torch.inf, excess)
    at = int(excess.argmax())
    raise Disagreement(
        f"{what}: {int(outside.sum())} of {outside.numel()} entries are outside, the worst at {at}: "
        f"{ours[at].item():.9g} for {value[at].item():.9g}, allowed {allowed[at].item():.3g}, "
        f"PyTorch has {theirs[at].item():.9g}"
    )


def bytes_of(x: Tensor) -> bytes:
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


def twin_of(x: Tensor) -> Tensor:
    """A copy whose elements lie as they do, with what is between them."""
    if x.is_sparse:
        return x.detach().clone()
    memory = x.detach().untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.shape, x.stride())


def rows_of(x: Tensor) -> Tensor:
    """All dimensions but the last in one."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def nan_is_open(acts: Sequence[Activation]) -> bool:
    """Whether PyTorch says of a derivative at NaN that it is 1, in its scalar code, and NaN in its vector code."""
    return any(act.name in ("elu", "celu", "selu", "hardswish") for act in acts)


def snapshot(*modules: nn.Module) -> dict[str, object]:
    """What calls that only look must leave alone: tensors, versions, modes, hooks, flags, and the generator."""
    found: dict[str, object] = {"generator": torch.get_rng_state().numpy().tobytes()}
    for i, module in enumerate(modules):
        for name, part in module.named_modules():
            hooks = {key: len(value) for key, value in part.__dict__.items() if key.endswith("_hooks")}
            found[f"{i}.{name}"] = (type(part), part.training, tuple(part._modules), hooks, sorted(part.__dict__))
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            grad = tensor.grad
            found[f"{i}.{name}"] = (
                *(id(tensor), tensor._version, tensor.requires_grad, tensor.stride(), tensor.data_ptr()),
                bytes_of(tensor),
                None
                if grad is None
                else (id(grad), grad._version, grad.detach().double().nan_to_num(7.5).sum().item()),
            )
    return found


def unchanged(case: Case, before: dict[str, object], what: str, *modules: nn.Module) -> None:
    after = snapshot(*modules)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    case.require(not changed, f"{what} has changed {', '.join(changed)}")
