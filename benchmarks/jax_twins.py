"""The programs that JAX's users would write too, as they would: each step one function under `jax.jit`, by optax.

Parameters, data and random numbers are arguments and results. A twin starts from the parameters of a program and has
the same loss, clipping and optimizer. Imported only where JAX is installed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from torch import Tensor, nn

from benchmarks.programs.base import Program
from benchmarks.programs.fields import VISCOSITY
from benchmarks.programs.reinforcement import ACTION, GAMMA, TAU

__all__ = ["TWINS", "Twin", "array"]

Layers = list[tuple[Any, Any]]

#: A loss: of what is trained, what is not, a batch, and random numbers.
Loss = Callable[[Any, Any, Sequence[Any], Any], Any]


@dataclass
class Twin:
    """A training step in JAX.

    Attributes:
        loss: to be minimised.
        trained: parameters, as a tree.
        optimizer: optax's.
        fixed: other parameters, as a tree.
        noise: the shape of the normal random numbers that a step takes, if it takes any.
        follow: returns `fixed` after a step from `fixed` and the new `trained`.
    """

    loss: Loss
    trained: Any
    optimizer: optax.GradientTransformation
    fixed: Any = ()
    noise: tuple[int, ...] | None = None
    follow: Callable[[Any, Any], Any] = lambda fixed, trained: fixed

    def __post_init__(self) -> None:
        # What a step is given it may overwrite, so nothing stands in it twice.
        self.state = (self.trained, self.fixed, self.optimizer.init(self.trained), jax.random.key(0))
        self._step = jax.jit(self._drawn, donate_argnums=0)
        self._step_with = jax.jit(self._given, donate_argnums=0)

    def step(self, *batch: Any) -> Any:
        """Train on a batch with random numbers of JAX's own, and return the loss."""
        self.state, loss = self._step(self.state, batch)
        return loss.block_until_ready()

    def step_with(self, noise: Any, *batch: Any) -> Any:
        """Train on a batch with these random numbers, and return the loss."""
        self.state, loss = self._step_with(self.state, batch, noise)
        return loss.block_until_ready()

    def _drawn(self, state: Any, batch: Sequence[Any]) -> Any:
        *others, key = state
        if self.noise is None:
            return self._given(state, batch, None)
        key, own = jax.random.split(key)
        return self._given((*others, key), batch, jax.random.normal(own, self.noise))

    def _given(self, state: Any, batch: Sequence[Any], noise: Any) -> Any:
        trained, fixed, moments, key = state
        loss, gradients = jax.value_and_grad(self.loss)(trained, fixed, batch, noise)
        updates, moments = self.optimizer.update(gradients, moments, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, self.follow(fixed, trained), moments, key), loss


def array(tensor: Tensor) -> Any:
    """Return an array with the numbers of a tensor."""
    return jnp.array(tensor.detach().numpy())


def _layers(module: nn.Module) -> Layers:
    """Return weight, (in_features, out_features), and bias of each linear layer."""
    return [(array(m.weight.T), array(m.bias)) for m in module.modules() if isinstance(m, nn.Linear)]


def _mlp(layers: Layers, x: Any, activation: Callable[[Any], Any] = jax.nn.relu) -> Any:
    for weight, bias in layers[:-1]:
        x = activation(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def ppo(program: Program, batch: int) -> Twin:
    """Twin of `reinforcement.ppo`."""

    def loss(trained: Any, fixed: Any, batch: Sequence[Any], noise: Any) -> Any:
        states, actions, old_log_probs, advantages, returns = batch
        log_probs = jax.nn.log_softmax(_mlp(trained["policy"], states, jnp.tanh))
        chosen = jnp.take_along_axis(log_probs, actions, 1).squeeze(1)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
        ratio = jnp.exp(chosen - old_log_probs)
        policy_loss = -jnp.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages).mean()
        value_loss = ((_mlp(trained["value"], states, jnp.tanh).squeeze(1) - returns) ** 2).mean()
        return policy_loss + 0.5 * value_loss - 0.01 * entropy

    trained = {name: _layers(program.modules[name]) for name in ("policy", "value")}
    return Twin(loss, trained, optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-4, eps=1e-5)))


def sac_critic(program: Program, batch: int) -> Twin:
    """Twin of `reinforcement.sac_critic`."""

    def loss(trained: Any, fixed: Any, batch: Sequence[Any], noise: Any) -> Any:
        states, actions, rewards, next_states, dones = batch
        mean, log_std = jnp.split(_mlp(fixed["actor"], next_states), 2, axis=-1)
        log_std = log_std.clip(-5, 2)
        next_actions = jnp.tanh(mean + jnp.exp(log_std) * noise)
        log_probs = -0.5 * noise**2 - log_std - 0.9189385332 - jnp.log(1 - next_actions**2 + 1e-6)
        pairs = jnp.concatenate((next_states, next_actions), axis=-1)
        smaller = jnp.minimum(*(_mlp(target, pairs) for target in fixed["targets"]))
        soft = smaller - 0.2 * log_probs.sum(-1, keepdims=True)
        wanted = rewards + GAMMA * (1 - dones) * soft
        pairs = jnp.concatenate((states, actions), axis=-1)
        return sum(((_mlp(critic, pairs) - wanted) ** 2).mean() for critic in trained)

    def follow(fixed: Any, trained: Any) -> Any:
        moved = jax.tree.map(lambda target, source: target + TAU * (source - target), fixed["targets"], trained)
        return {**fixed, "targets": moved}

    modules = program.modules
    fixed = {"actor": _layers(modules["actor"]), "targets": [_layers(modules[f"target{i}"]) for i in (1, 2)]}
    trained = [_layers(modules[name]) for name in ("first", "second")]
    return Twin(loss, trained, optax.adam(1e-3), fixed, (batch, ACTION), follow)


def vae(program: Program, batch: int) -> Twin:
    """Twin of `densities.vae`."""

    def loss(trained: Any, fixed: Any, batch: Sequence[Any], noise: Any) -> Any:
        (images,) = batch
        hidden = jax.nn.relu(_mlp(trained["encoder"], images))
        mean, log_variance = _mlp(trained["to_mean"], hidden), _mlp(trained["to_log_variance"], hidden)
        logits = _mlp(trained["decoder"], mean + noise * jnp.exp(0.5 * log_variance))
        miss = optax.sigmoid_binary_cross_entropy(logits, images).sum()
        divergence = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum()
        return (miss + divergence) / len(images)

    trained = {name: _layers(module) for name, module in program.modules.items()}
    latent = trained["to_mean"][0][1].shape
    return Twin(loss, trained, optax.adam(1e-3), noise=(batch, *latent))


def burgers(program: Program, batch: int) -> Twin:
    """Twin of `fields.burgers`: derivatives of one point, for all points by vmap."""

    def residual(layers: Layers, point: Any) -> Any:
        def u(x: Any, t: Any) -> Any:
            return _mlp(layers, jnp.stack((x, t)), jnp.tanh)[0]

        def u_and_u_x(x: Any, t: Any) -> Any:
            return jax.value_and_grad(u)(x, t)

        x, t = point
        (value, u_x), (_, u_xx) = jax.jvp(partial(u_and_u_x, t=t), (x,), (jnp.ones_like(x),))
        return jax.grad(u, 1)(x, t) + value * u_x - VISCOSITY * u_xx

    def loss(trained: Any, fixed: Any, batch: Sequence[Any], noise: Any) -> Any:
        inside, start = batch
        residuals = jax.vmap(residual, (None, 0))(trained, inside)
        miss = _mlp(trained, start, jnp.tanh) + jnp.sin(jnp.pi * start[:, :1])
        return (residuals**2).mean() + (miss**2).mean()

    return Twin(loss, _layers(program.modules["model"]), optax.adam(1e-3))


#: By the name of the program, what makes its twin from it and the rows of its batches.
TWINS: dict[str, Callable[[Program, int], Twin]] = {
    "ppo b64": ppo,
    "sac critic b256": sac_critic,
    "vae b128": vae,
    "burgers b128": burgers,
    "burgers b1024": burgers,
}
