"""The parts of the library that are attacked."""

from tests.attack import frozen
from tests.attack.cases import Play, Result, play

SURFACES: dict[str, Play] = {
    "frozen": frozen.play,
}


def run(surface: str, seed: int) -> Result:
    """Plays a case of a surface."""
    return play(surface, SURFACES[surface], seed)
