"""Networks drawn at random, in the forms in which users write them, and their leaves, one after another."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, reference
from fastmlp.activations import IDENTITY, module_of
from tests.attack import drawn
from tests.attack.cases import Case
from tests.support.training import Functional

#: How a network may be written.
FORMS = ("nn", "nn", "fast", "nested", "functional", "attributes", "fused", "converted")


class Attributes(nn.Module):
    """Layers and activations as attributes, called one after another."""

    def __init__(self, leaves: Sequence[nn.Module]) -> None:
        super().__init__()
        self.names = [f"part{i}" for i in range(len(leaves))]
        for name, leaf in zip(self.names, leaves, strict=True):
            self.add_module(name, leaf)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def flat(model: nn.Module) -> list[nn.Module]:
    """The leaves as they are now."""
    if isinstance(model, nn.Sequential):
        return [leaf for child in model for leaf in flat(child)]
    if isinstance(model, Attributes):
        return [leaf for name in model.names for leaf in flat(getattr(model, name))]
    if isinstance(model, Functional):
        found: list[nn.Module] = []
        for layer, act in zip(model.layers, model.activations, strict=True):
            found += [layer] if act == IDENTITY else [layer, module_of(act)]
        return found
    return [model]


def norm(
    case: Case, features: int, dtype: torch.dtype, momentum: float | None = 0.1, tracks: bool = True
) -> nn.BatchNorm1d:
    """One that has seen data."""
    eps, affine = case.choice([1e-5, 1e-3, 0.1]), case.chance(0.7)
    made = nn.BatchNorm1d(features, eps, momentum, affine, tracks, dtype=dtype)
    with torch.no_grad():
        if made.running_mean is not None:
            made.running_mean.copy_(torch.randn(features))
        if made.running_var is not None:
            made.running_var.copy_(torch.rand(features) + 0.3)
        if made.affine:
            made.weight.copy_(torch.randn(features))
            made.bias.copy_(torch.randn(features))
    return made


def linear(case: Case, k: int, n: int, bias: bool, dtype: torch.dtype, odd: float = 0.25) -> nn.Linear:
    """With parameters that may lie oddly."""
    layer = nn.Linear(max(k, 1), max(n, 1), bias, dtype=dtype)
    layer.in_features, layer.out_features = k, n
    weight, how = drawn.lay(case, drawn.randn(case, n, k, dtype=dtype, scale=max(k, 1) ** -0.5), odd)
    layer.weight = nn.Parameter(weight)
    if bias:
        layer.bias = nn.Parameter(drawn.lay(case, drawn.randn(case, n, dtype=dtype), odd)[0])
    case.note(f"  weight {how}{f', bias by {layer.bias.stride()}' if bias else ''}")
    return layer


def widths(case: Case, most: int = 4, positive: bool = False) -> list[int]:
    count = case.choice([1, 2, 2, 3, 3, most])
    return [drawn.size(case, positive or case.chance(0.8)) for _ in range(count + 1)]


def leaves(
    case: Case, sizes: Sequence[int], dtype: torch.dtype, extras: bool = False, odd: float = 0.25
) -> list[nn.Module]:
    """Layers and activations, with `extras` norms and what vanishes in eval mode."""
    found: list[nn.Module] = []
    acts = drawn.activations(case, len(sizes) - 1)
    for (k, n), act in zip(pairwise(sizes), acts, strict=True):
        if extras and case.chance(0.08):
            found.append(case.choice([nn.Dropout(0.5), nn.Identity(), nn.AlphaDropout(0.3)]))
        found.append(linear(case, k, n, case.chance(0.8), dtype, odd))
        if extras and n > 0 and case.chance(0.15):
            found.append(norm(case, n, dtype))
        if act != IDENTITY:
            found.append(module_of(act))
        if extras and case.chance(0.08):
            found.append(case.choice([nn.Dropout(0.5), nn.Dropout(0.0), nn.Identity()]))
    return found


def noisy(case: Case, found: Sequence[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """With dropout and norms between leaves, and at both ends."""
    made: list[nn.Module] = []
    first = next(leaf for leaf in found if isinstance(leaf, nn.Linear))
    features = first.weight.shape[1]
    for leaf in (None, *found):
        if leaf is not None:
            made.append(leaf)
            features = leaf.weight.shape[0] if isinstance(leaf, nn.Linear) else features
        if case.chance(0.15 if leaf is None else 0.25) and features > 0:
            momentum = case.choice([0.1, 0.7, None, 0.0, 1.0])
            made.append(norm(case, features, dtype, momentum, tracks=case.chance(0.8)))
        if case.chance(0.15 if leaf is None else 0.3):
            made.append(nn.Dropout(case.choice([0.5, 0.1, 0.9, 0.0, 1.0]), inplace=case.chance(0.04)))
    for leaf in made:
        leaf.train(not case.chance(0.1))
    return made


def fused(found: Sequence[nn.Module]) -> list[nn.Module]:
    """The same with the activations in `fastmlp.Linear`."""
    made: list[nn.Module] = []
    for leaf in found:
        before = made[-1] if made else None
        if type(leaf) is nn.Linear:
            layer = fastmlp.convert(leaf)
            made.append(layer)
        elif type(leaf) in reference.MODULES and type(before) is fastmlp.Linear and before.activation == IDENTITY:
            before.activation = leaf  # type: ignore[assignment]
        else:
            made.append(leaf)
    return made


def build(case: Case, found: Sequence[nn.Module], forms: Sequence[str] = FORMS) -> nn.Module:
    """A model of these leaves in a form that is drawn."""
    form = case.choice(forms)
    simple = all(type(leaf) is nn.Linear or type(leaf) in reference.MODULES for leaf in found)
    if form == "functional" and (not simple or any(type(leaf) is nn.Identity for leaf in found)):
        form = "attributes"
    model: nn.Module
    if form == "functional":
        layers, acts = paired(found)
        model = Functional(layers, acts)
    elif form == "attributes":
        model = Attributes(found)
    elif form == "nested":
        at = case.random.randrange(len(found) + 1)
        model = nn.Sequential(nn.Sequential(*found[:at]), fastmlp.Sequential(*found[at:]))
    elif form == "fused":
        model = case.choice([nn.Sequential, fastmlp.Sequential])(*fused(found))
    elif form == "fast":
        model = fastmlp.Sequential(*found)
    else:
        model = found[0] if len(found) == 1 and case.chance(0.5) else nn.Sequential(*found)
        if form == "converted":
            model = fastmlp.convert(model)
    case.note(f"{form}: {' '.join(str(model).split())}")
    return model


def paired(found: Sequence[nn.Module]) -> tuple[list[nn.Module], list[Activation]]:
    """Layers, and the activation after each."""
    layers: list[nn.Module] = []
    acts: list[Activation] = []
    for leaf in found:
        if isinstance(leaf, nn.Linear):
            layers.append(leaf)
            acts.append(leaf.activation if isinstance(leaf, fastmlp.Linear) else IDENTITY)
        elif type(leaf) is not nn.Identity:
            acts[-1] = fastmlp.activations.resolve(leaf)
    return layers, acts
