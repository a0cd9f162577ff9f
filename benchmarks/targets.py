"""What speed is aimed at, and whether it is met.

A target asks for a rate or for a ratio. No processor does more than its peak, so a ratio is met as well
by who reaches `CEILING` of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from benchmarks.contenders import OURS, YARDSTICK
from benchmarks.timing import Row
from benchmarks.workloads import Tier, Workload, select

#: The share of the peak that no target goes beyond.
CEILING = 0.95


@dataclass(frozen=True)
class Outcome:
    """A target and what was measured of it.

    Attributes:
        id: of the target.
        what: is measured.
        goal: in words.
        measured: in words.
        met: None if it could not be measured.
        where: on which case the measured value was found, the worst of all.
    """

    id: str
    what: str
    goal: str
    measured: str
    met: bool | None
    where: str


@dataclass(frozen=True)
class Claim:
    """A target that is a value of our row on each of some workloads.

    Attributes:
        id: of the target.
        what: the workloads in words.
        goal: what the value is to be at least.
        unit: of the value.
        value: of our row; None if a contender that it takes was absent.
        workloads: by name.
    """

    id: str
    what: str
    goal: float
    unit: str
    value: Callable[[Row], float | None]
    workloads: tuple[str, ...]

    def outcome(self, rows: Mapping[str, Row]) -> Outcome:
        """Judge the worst of the workloads.

        Args:
            rows: ours, by workload.
        """
        goal = f">= {self.goal:.0%} {self.unit}" if self.unit == PEAK else f">= {self.goal:.2f} {self.unit}"
        values = {name: self.value(rows[name]) for name in self.workloads if name in rows}
        found = {name: value for name, value in values.items() if value is not None}
        if not found:
            return Outcome(self.id, self.what, goal, "not measured", None, "")
        met = [name for name, value in found.items() if value >= self.goal or rows[name].share >= CEILING]
        # Of those that miss it, if any, the worst.
        worst = min(found, key=lambda name: (name in met, found[name]))
        measured = f"{found[worst]:.0%}" if self.unit == PEAK else f"{found[worst]:.2f}"
        share = "" if self.unit == PEAK else f" ({rows[worst].share:.0%} of peak)"
        # A workload without a row had a wrong result.
        asked = len(found) + sum(name not in rows for name in self.workloads)
        count = f", {len(met)} of {asked} met" if asked > 1 else ""
        return Outcome(self.id, self.what, goal, f"{measured}{share}{count}", len(met) == asked, worst)


PEAK = "of peak"


def _share(row: Row) -> float:
    return row.share


def _over(*others: str) -> Callable[[Row], float | None]:
    """Return the function that compares a row with the best of some contenders, or of all if none is named."""

    def value(row: Row) -> float | None:
        return min((ratio for other, ratio in row.ratios.items() if not others or other in others), default=None)

    return value


def _products(dtype: str, *sizes: int) -> tuple[str, ...]:
    return tuple(f"{layout} {n}x{n}x{n} {dtype}" for layout, n in combinations(("NT", "NN", "TN"), sizes))


def _layers(*sizes: str) -> tuple[str, ...]:
    return tuple(f"{size} infer" for size in sizes)


def _small(task: str, *batches: int) -> tuple[str, ...]:
    return tuple(f"{net} b{batch} {task}" for net in ("tutorial", "policy", "narrow") for batch in batches)


_LARGE = (512, 1024, 2048)
_SQUARE = ("256x256x256", "512x512x512", "1024x1024x1024", "2048x2048x2048")
_AWKWARD = ("100x1000x3", "33x257x129", "7x13x17", "65536x3x64", "65536x64x64")
_NARROW, _WIDE = "narrow b65536", "wide b1024"
_FUSED = ("onednn", "openvino", "onnxruntime")
_EAGER, _OVER_EAGER = f"x {YARDSTICK}", _over(YARDSTICK)
_PHYSICS = tuple(f"burgers b{batch} physics adam" for batch in (128, 1024))
_BFLOAT16 = tuple(f"{net} b1024 forward_backward bfloat16" for net in ("mnist", "dlrm", "wide"))

CLAIMS = (
    Claim("P1", "float32 products, 512 to 2048", 0.93, PEAK, _share, _products("float32", *_LARGE)),
    Claim("P1", "float32 products, 256", 0.90, PEAK, _share, _products("float32", 256)),
    Claim("P1", "float32 products, 512 to 2048", 1.1, _EAGER, _OVER_EAGER, _products("float32", *_LARGE)),
    Claim("P2", "bfloat16 products, 512 to 2048", 0.92, PEAK, _share, _products("bfloat16", *_LARGE)),
    Claim("P2", "bfloat16 products, 512 to 2048", 1.03, _EAGER, _OVER_EAGER, _products("bfloat16", *_LARGE)),
    Claim("P3", "layer, inference, 256", 1.1, _EAGER, _OVER_EAGER, _layers(_SQUARE[0])),
    Claim("P3", "layer, inference, 512 to 2048", 1.2, _EAGER, _OVER_EAGER, _layers(*_SQUARE[1:])),
    Claim(
        "P3", "layer, inference, 256 to 2048", 1.0, f"x best of {', '.join(_FUSED)}", _over(*_FUSED), _layers(*_SQUARE)
    ),
    Claim("P4", "awkward layers, inference", 1.0, "x best peer", _over(), _layers(*_AWKWARD)),
    Claim("P6", "small networks, inference, batch 1", 4.0, _EAGER, _OVER_EAGER, _small("infer", 1)),
    Claim("P6", "small networks, inference, batch 32", 3.0, _EAGER, _OVER_EAGER, _small("infer", 32)),
    Claim("P7", "small networks, step with SGD", 1.35, _EAGER, _OVER_EAGER, _small("step sgd", 32, 128)),
    Claim("P7", "small networks, step with Adam", 1.2, _EAGER, _OVER_EAGER, _small("step adam", 32, 128)),
    Claim("P9", "narrow network, inference", 1.9, _EAGER, _OVER_EAGER, (f"{_NARROW} infer",)),
    Claim("P9", "narrow network, inference", 1.15, "x openvino", _over("openvino"), (f"{_NARROW} infer",)),
    Claim("P9", "narrow network, both passes", 2.1, _EAGER, _OVER_EAGER, (f"{_NARROW} forward_backward",)),
    Claim("P10", "wide network, both passes", 1.2, _EAGER, _OVER_EAGER, (f"{_WIDE} forward_backward",)),
    Claim("P10", "wide network, both passes", 0.91, PEAK, _share, (f"{_WIDE} forward_backward",)),
    Claim("P11", "bfloat16 networks, both passes", 1.15, _EAGER, _OVER_EAGER, _BFLOAT16),
    Claim("P16", "physics-informed step", 1.0, _EAGER, _OVER_EAGER, _PHYSICS),
)

#: What two threads are timed on: products of P1, and P9 and P10.
PARALLEL = (
    *_products("float32", 1024, 2048),
    *(f"{_NARROW} {task}" for task in ("infer", "forward_backward")),
    f"{_WIDE} forward_backward",
)


def find(names: Sequence[str]) -> list[Workload]:
    """Return the workloads of these names, in their own order.

    Raises:
        KeyError: for a name that no workload has.
    """
    known = {
        workload.name: workload
        for suite in ("products", "layers", "nets", "steps")
        for workload in select(suite, Tier.FULL)
    }
    return [known[name] for name in dict.fromkeys(names)]


def judge(rows: Sequence[Row], ids: Sequence[str]) -> Iterator[Outcome]:
    """Yield the outcomes of the claims with these ids."""
    ours = {row.workload: row for row in rows if row.contender == OURS}
    yield from (claim.outcome(ours) for claim in CLAIMS if claim.id in ids)
