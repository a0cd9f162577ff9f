"""The parts of the library that are attacked."""

from tests.attack import captured, frozen, optimizers, plain, programs, steps, threads
from tests.attack.cases import Play, Result, play

SURFACES: dict[str, Play] = {
    "plain": plain.play,
    "frozen": frozen.play,
    "steps": steps.play,
    "programs": programs.play,
    "optim": optimizers.play,
    "threads": threads.play,
    "capture": captured.play,
}


def run(surface: str, seed: int) -> Result:
    """Plays a case of a surface."""
    return play(surface, SURFACES[surface], seed)
