"""Training steps of many kinds, written as a user of PyTorch writes them: what `fastmlp.capture` is for.

    program = PROGRAMS["ppo b64"](seed=0)
    for i in range(50):
        loss = program.step(*program.inputs(i))

Two programs of one seed are twins: one may be captured or compiled and then compared with the other, by `state()`.
Steps that draw random numbers take them from torch's default generator.
"""

from benchmarks.programs.base import BATCHES, Maker, Program
from benchmarks.programs.densities import flow, vae
from benchmarks.programs.fields import burgers, hamiltonian, neural_ode, siren
from benchmarks.programs.reinforcement import dqn, ppo, sac_actor, sac_critic, td3_actor, td3_critic
from benchmarks.programs.tables import batchnorm, dlrm, residual, tutorial_adam, tutorial_sgd

__all__ = ["BATCHES", "PROGRAMS", "SMALL", "Maker", "Program"]

#: By name, what makes a program from a seed.
PROGRAMS: dict[str, Maker] = {
    "tutorial sgd b32": Maker(tutorial_sgd, 32),
    "tutorial adam b32": Maker(tutorial_adam, 32),
    "ppo b64": Maker(ppo, 64),
    "dqn b128": Maker(dqn, 128),
    "sac critic b256": Maker(sac_critic, 256),
    "sac actor b256": Maker(sac_actor, 256),
    "td3 critic b256": Maker(td3_critic, 256),
    "td3 actor b256": Maker(td3_actor, 256),
    "vae b128": Maker(vae, 128),
    "flow b128": Maker(flow, 128),
    "burgers b128": Maker(burgers, 128),
    "burgers b1024": Maker(burgers, 1024),
    "hamiltonian b128": Maker(hamiltonian, 128),
    "neural ode b64": Maker(neural_ode, 64),
    "siren b4096": Maker(siren, 4096),
    "tabular b128": Maker(residual, 128),
    "tabular b1024": Maker(residual, 1024),
    "batchnorm b128": Maker(batchnorm, 128),
    "batchnorm b1024": Maker(batchnorm, 1024),
    "dlrm b256": Maker(dlrm, 256),
}

#: Those whose time in eager is Python's and the dispatcher's more than that of their arithmetic.
SMALL = (
    "ppo b64",
    "dqn b128",
    "vae b128",
    "burgers b128",
    "hamiltonian b128",
    "flow b128",
    "neural ode b64",
    "tabular b128",
)
