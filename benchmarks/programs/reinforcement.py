"""Reinforcement learning: updates on transitions that were stored before."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.programs.base import BATCHES, Program, average, copies, every, mlp

STATE, ACTION, ACTIONS = 17, 6, 4
GAMMA, TAU = 0.99, 0.005


def ppo(batch: int, **options: Any) -> Program:
    """Proximal policy optimization: a minibatch with clipped ratios and values, an entropy bonus, and clipping."""
    policy, value = mlp(8, 64, 64, ACTIONS, activation=nn.Tanh), mlp(8, 64, 64, 1, activation=nn.Tanh)
    parameters = every(policy, value)
    optimizer = torch.optim.Adam(parameters, lr=3e-4, eps=1e-5, **options)

    def step(states: Tensor, actions: Tensor, old_log_probs: Tensor, advantages: Tensor, returns: Tensor) -> Tensor:
        optimizer.zero_grad()
        log_probs = F.log_softmax(policy(states), dim=-1)
        chosen = log_probs.gather(1, actions).squeeze(1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratio = torch.exp(chosen - old_log_probs)
        clipped = ratio.clamp(0.8, 1.2)
        policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
        value_loss = F.mse_loss(value(states).squeeze(1), returns)
        loss = policy_loss + 0.5 * value_loss - 0.01 * entropy
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        return loss.detach()

    rows = BATCHES * batch
    states, actions = torch.randn(rows, 8), torch.randint(ACTIONS, (rows, 1))
    with torch.no_grad():
        old = F.log_softmax(policy(states), dim=-1).gather(1, actions).squeeze(1)
    advantages = states[:, 0] * (actions[:, 0] - 1.5) + 0.1 * torch.randn(rows)
    data = (states, actions, old, advantages, states[:, 1] - states[:, 2])
    return Program(step, data, {"policy": policy, "value": value}, {"optimizer": optimizer})


def dqn(batch: int, **options: Any) -> Program:
    """Deep Q-learning with a target network that follows by Polyak's average, gradients clipped by value."""
    network = mlp(8, 128, 128, ACTIONS)
    (target,) = copies(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, **options)

    def step(states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, dones: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            best = target(next_states).max(dim=1).values
            wanted = rewards + GAMMA * (1 - dones) * best
        loss = F.smooth_l1_loss(network(states).gather(1, actions).squeeze(1), wanted)
        loss.backward()
        nn.utils.clip_grad_value_(network.parameters(), 1.0)
        optimizer.step()
        average([target], [network], TAU)
        return loss.detach()

    rows = BATCHES * batch
    states, actions = torch.randn(rows, 8), torch.randint(ACTIONS, (rows, 1))
    rewards = states[:, 0] * (actions[:, 0] - 1.5)
    data = (states, actions, rewards, states + 0.1 * torch.randn(rows, 8), (torch.rand(rows) < 0.1).float())
    return Program(step, data, {"network": network, "target": target}, {"optimizer": optimizer})


def draw_action(actor: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return actions of a squashed Gaussian policy and the logarithms of their probabilities, both (batch, n)."""
    mean, log_std = actor(states).chunk(2, dim=-1)
    log_std = log_std.clamp(-5, 2)
    noise = torch.randn_like(mean)
    action = torch.tanh(mean + log_std.exp() * noise)
    log_prob = -0.5 * noise.square() - log_std - 0.9189385332 - torch.log(1 - action.square() + 1e-6)
    return action, log_prob.sum(-1, keepdim=True)


def sac_critic(batch: int, **options: Any) -> Program:
    """Soft actor-critic: both critics towards the smaller of two target critics, which follow them."""
    first, second = mlp(STATE + ACTION, 256, 256, 1), mlp(STATE + ACTION, 256, 256, 1)
    actor = mlp(STATE, 256, 256, 2 * ACTION)
    targets = copies(first, second)
    optimizer = torch.optim.Adam(every(first, second), lr=1e-3, **options)

    def step(states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, dones: Tensor) -> Tensor:
        with torch.no_grad():
            next_actions, log_probs = draw_action(actor, next_states)
            pairs = torch.cat((next_states, next_actions), dim=-1)
            soft = torch.min(targets[0](pairs), targets[1](pairs)) - 0.2 * log_probs
            wanted = rewards + GAMMA * (1 - dones) * soft
        pairs = torch.cat((states, actions), dim=-1)
        loss = F.mse_loss(first(pairs), wanted) + F.mse_loss(second(pairs), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average(targets, (first, second), TAU)
        return loss.detach()

    modules = {"first": first, "second": second, "actor": actor, "target1": targets[0], "target2": targets[1]}
    return Program(step, transitions(batch), modules, {"optimizer": optimizer}, random=True)


def sac_actor(batch: int, **options: Any) -> Program:
    """Soft actor-critic: the actor, and the temperature by an optimizer of its own."""
    actor = mlp(STATE, 256, 256, 2 * ACTION)
    first, second = copies(mlp(STATE + ACTION, 256, 256, 1), mlp(STATE + ACTION, 256, 256, 1))
    log_alpha = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, **options)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=3e-4, **options)

    def step(states: Tensor) -> Tensor:
        actions, log_probs = draw_action(actor, states)
        pairs = torch.cat((states, actions), dim=-1)
        alpha = log_alpha.exp().detach()
        loss = (alpha * log_probs - torch.min(first(pairs), second(pairs))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alpha_loss = -(log_alpha.exp() * (log_probs.detach() - ACTION)).mean()
        alpha_optimizer.zero_grad()
        alpha_loss.backward()
        alpha_optimizer.step()
        return loss.detach()

    modules = {"actor": actor, "first": first, "second": second}
    optimizers = {"optimizer": optimizer, "alpha_optimizer": alpha_optimizer}
    return Program(step, transitions(batch)[:1], modules, optimizers, random=True)


def td3_critic(batch: int, **options: Any) -> Program:
    """TD3: both critics towards the smaller target, at the target actor's action with clipped noise."""
    first, second = mlp(STATE + ACTION, 256, 256, 1), mlp(STATE + ACTION, 256, 256, 1)
    actor, *targets = copies(nn.Sequential(mlp(STATE, 256, 256, ACTION), nn.Tanh()), first, second)
    optimizer = torch.optim.Adam(every(first, second), lr=1e-3, **options)

    def step(states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, dones: Tensor) -> Tensor:
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(actions)).clamp(-0.5, 0.5)
            next_actions = (actor(next_states) + noise).clamp(-1, 1)
            pairs = torch.cat((next_states, next_actions), dim=1)
            wanted = rewards + GAMMA * (1 - dones) * torch.min(targets[0](pairs), targets[1](pairs))
        pairs = torch.cat((states, actions), dim=1)
        loss = F.mse_loss(first(pairs), wanted) + F.mse_loss(second(pairs), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    modules = {"first": first, "second": second, "actor": actor, "target1": targets[0], "target2": targets[1]}
    return Program(step, transitions(batch), modules, {"optimizer": optimizer}, random=True)


def td3_actor(batch: int, **options: Any) -> Program:
    """TD3: the actor up the first critic, and all targets a part of the way to their sources."""
    actor = nn.Sequential(mlp(STATE, 256, 256, ACTION), nn.Tanh())
    first, second = copies(mlp(STATE + ACTION, 256, 256, 1), mlp(STATE + ACTION, 256, 256, 1))
    targets = copies(actor, first, second)
    optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, **options)

    def step(states: Tensor) -> Tensor:
        loss = -first(torch.cat((states, actor(states)), dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average(targets, (actor, first, second), TAU)
        return loss.detach()

    modules = {"actor": actor, "first": first, "second": second}
    modules |= {f"target{i}": target for i, target in enumerate(targets)}
    return Program(step, transitions(batch)[:1], modules, {"optimizer": optimizer})


def transitions(batch: int) -> tuple[Tensor, ...]:
    """Draw states, actions, rewards, next states and ends of continuous control."""
    rows = BATCHES * batch
    states, actions = torch.randn(rows, STATE), 2 * torch.rand(rows, ACTION) - 1
    rewards = (states[:, :ACTION] * actions).sum(1, keepdim=True)
    next_states = states + 0.1 * torch.randn(rows, STATE)
    return states, actions, rewards, next_states, (torch.rand(rows, 1) < 0.05).float()
