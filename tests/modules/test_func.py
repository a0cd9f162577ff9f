"""torch.func over the layers, each by value against the specification."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

import fastmlp
from fastmlp import functional, reference
from fastmlp.activations import resolve
from tests.support.derivatives import assert_same

ACTS = [resolve("tanh"), resolve("gelu"), resolve("sin")]
F64 = torch.float64
Net = Callable[..., Tensor]


def ours(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return functional.mlp(x, [w0, w1, w2], [b0, None, b2], ACTS)


def torchs(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return reference.mlp(x, [w0, w1, w2], [b0, None, b2], [(a.name, a.parameters) for a in ACTS])


def tensors(*batch: int) -> list[Tensor]:
    shapes = [(5, 4), (5,), (3, 5), (2, 3), (2,)]
    return [torch.randn(*batch, *shape, dtype=F64) for shape in shapes]


TRANSFORMS: dict[str, Callable[[Net, Tensor, Tensor, list[Tensor], list[Tensor]], Any]] = {
    "vmap input": lambda f, x, xs, p, ps: vmap(f, (0, *[None] * 5))(xs, *p),
    "vmap input dim 1": lambda f, x, xs, p, ps: vmap(f, (1, *[None] * 5), out_dims=1)(xs, *p),
    "vmap one sample": lambda f, x, xs, p, ps: vmap(f, (0, *[None] * 5))(x, *p),
    "vmap parameters": lambda f, x, xs, p, ps: vmap(f, (None, *[0] * 5))(x, *ps),
    "vmap all": lambda f, x, xs, p, ps: vmap(f)(xs, *ps),
    "vmap one weight": lambda f, x, xs, p, ps: vmap(f, (None, 0, None, None, None, None))(x, ps[0], *p[1:]),
    "vmap twice": lambda f, x, xs, p, ps: vmap(vmap(f, (0, *[None] * 5)), (0, *[None] * 5))(xs, *p),
    "ensemble of samples": lambda f, x, xs, p, ps: vmap(vmap(f, (0, *[None] * 5)), (None, *[0] * 5))(x, *ps),
    "vmap in chunks": lambda f, x, xs, p, ps: vmap(f, (0, *[None] * 5), chunk_size=3)(xs, *p),
    "grad": lambda f, x, xs, p, ps: grad(lambda q: f(x, *q).pow(2).sum())(tuple(p)),
    "per-sample grad": lambda f, x, xs, p, ps: vmap(grad(lambda q, t: f(t, *q).pow(2).sum()), (None, 0))(tuple(p), x),
    "ensemble grad": lambda f, x, xs, p, ps: vmap(grad(lambda q, t: f(t, *q).pow(2).sum()))(tuple(ps), xs),
    "jacrev input": lambda f, x, xs, p, ps: jacrev(f)(x, *p),
    "jacfwd input": lambda f, x, xs, p, ps: jacfwd(f)(x, *p),
    "jacrev parameters": lambda f, x, xs, p, ps: jacrev(f, argnums=(1, 2, 3, 4, 5))(x, *p),
    "jacfwd parameters": lambda f, x, xs, p, ps: jacfwd(f, argnums=(1, 2, 3, 4, 5))(x, *p),
    "hessian input": lambda f, x, xs, p, ps: hessian(lambda t: f(t, *p).sum())(x),
    "hessian weight": lambda f, x, xs, p, ps: hessian(lambda w: f(x, w, *p[1:]).sum())(p[0]),
    "hessian per sample": lambda f, x, xs, p, ps: vmap(hessian(lambda t: f(t, *p).sum()))(x),
    "jacrev of jacrev": lambda f, x, xs, p, ps: jacrev(jacrev(lambda b: f(x, p[0], b, *p[2:]).sum()))(p[1]),
    "jacrev of jacfwd": lambda f, x, xs, p, ps: jacrev(jacfwd(lambda b: f(x, p[0], b, *p[2:]).sum()))(p[1]),
    "jacfwd of jacfwd": lambda f, x, xs, p, ps: jacfwd(jacfwd(lambda t: f(t, *p).sum()))(x),
    "jvp": lambda f, x, xs, p, ps: jvp(lambda *q: f(x, *q), tuple(p), tuple(torch.cos(t) for t in p)),
    "vmap of jvp": lambda f, x, xs, p, ps: vmap(lambda t: jvp(lambda u: f(u, *p), (x,), (t,))[1])(xs),
    "vmap of vjp": lambda f, x, xs, p, ps: vmap(vjp(lambda t: f(t, *p), x)[1])(torch.eye(12, dtype=F64).view(12, 6, 2)),
    "linearize": lambda f, x, xs, p, ps: torch.func.linearize(lambda t: f(t, *p), x)[1](torch.ones_like(x)),
    "functionalize": lambda f, x, xs, p, ps: torch.func.functionalize(lambda t: f(t, *p))(x),
    "fourth derivative": lambda f, x, xs, p, ps: grad(grad(grad(grad(lambda s: f(s * x, *p).sum()))))(
        torch.tensor(0.7, dtype=F64)
    ),
    "autograd.functional": lambda f, x, xs, p, ps: torch.autograd.functional.jacobian(
        lambda t: f(t, *p), x, vectorize=True
    ),
    "forward over reverse": lambda f, x, xs, p, ps: torch.autograd.functional.hessian(
        lambda t: f(t, *p).sum(), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}


# torch.func.linearize warns about the constants of its own graph.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str) -> None:
    arguments = torch.randn(6, 4, dtype=F64), torch.randn(7, 6, 4, dtype=F64), tensors(), tensors(7)
    results = [tree_leaves(TRANSFORMS[name](f, *arguments)) for f in (ours, torchs)]
    assert any(bool(t.abs().max() > 0) for t in results[1])
    assert_same(*results)


def modules() -> list[nn.Module]:
    """The same network by modules of ours and of torch, in float64."""
    mlp = fastmlp.MLP(4, [5, 3], 2, "tanh").double()
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)]
    native = nn.Sequential(*layers).double()
    native.load_state_dict(mlp.state_dict())
    return [mlp, native]


def test_functional_call() -> None:
    x = torch.randn(6, 4, dtype=F64)
    results = []
    swapped = {k: torch.randn_like(v) for k, v in modules()[0].state_dict().items()}
    for module in modules():
        loss = grad(lambda p, m=module: functional_call(m, p, (x,)).pow(2).sum())
        results.append([functional_call(module, swapped, (x,)), *tree_leaves(loss(swapped))])
    assert_same(*results)
    assert not torch.equal(results[0][0], modules()[0](x))


def test_per_sample_gradients_of_modules() -> None:
    x = torch.randn(6, 4, dtype=F64)
    results = []
    state = modules()[0].state_dict()
    for module in modules():
        loss = grad(lambda p, t, m=module: functional_call(m, p, (t,)).pow(2).sum())
        results.append(tree_leaves(vmap(loss, (None, 0))(dict(state), x)))
    assert_same(*results)


def test_ensembles_of_modules() -> None:
    models = [fastmlp.Linear(4, 3, activation="elu").double() for _ in range(5)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(6, 4, dtype=F64)
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    assert_same([together], [torch.stack([m(x) for m in models])])
