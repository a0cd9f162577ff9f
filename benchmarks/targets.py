"""What speed is aimed at, and whether it is met.

A target asks for a rate or for a ratio. No processor does more than its peak, so a ratio is met as well
by who reaches `CEILING` of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from benchmarks.contenders import OURS, OWN, YARDSTICK
from benchmarks.contenders.pytorch import FastmlpOptim, Frozen, TrainStep
from benchmarks.timing import Row
from benchmarks.workloads import Tier, Workload, select

#: The share of the peak that no target goes beyond.
CEILING = 0.95

#: What a claim looks at; None if a contender that it takes was absent.
Value = Callable[[Row], float | None]


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
    """A target that is a value of one of our rows on each of some workloads.

    Attributes:
        id: of the target.
        what: the workloads in words.
        goal: what the value is to be at least.
        unit: of the value.
        value: of the row.
        workloads: by name.
        contender: which of ours it is about.
    """

    id: str
    what: str
    goal: float
    unit: str
    value: Value
    workloads: tuple[str, ...]
    contender: str = OURS

    def outcome(self, rows: Mapping[str, Row]) -> Outcome:
        """Judge the worst of the workloads.

        Args:
            rows: the contender's, by workload.
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


def over(*others: str) -> Value:
    """Return the function that compares a row with the best of some contenders, or of all but ours if none is named."""

    def value(row: Row) -> float | None:
        peers = others or [other for other in row.ratios if other not in OWN]
        return min((row.ratios[peer] for peer in peers if peer in row.ratios), default=None)

    return value


def _products(dtype: str, *sizes: int) -> tuple[str, ...]:
    return tuple(f"{layout} {n}x{n}x{n} {dtype}" for layout, n in combinations(("NT", "NN", "TN"), sizes))


def _layers(*sizes: str) -> tuple[str, ...]:
    return tuple(f"{size} infer" for size in sizes)


def _nets(names: str, batches: Sequence[int], *tasks: str) -> tuple[str, ...]:
    return tuple(f"{net} b{batch} {task}" for net in names.split() for batch in batches for task in tasks)


def _small(task: str, *batches: int) -> tuple[str, ...]:
    return _nets("tutorial policy narrow", batches, task)


def _frozen(nets: str, batches: Sequence[int], goal: float, unit: str, value: Value) -> Claim:
    what = f"frozen {', '.join(nets.split())}, batch {', '.join(map(str, batches))}"
    return Claim("P5", what, goal, unit, value, _nets(nets, batches, "infer"), Frozen.name)


def _stepped(nets: str, batch: int, goal: float, unit: str, value: Value) -> Claim:
    what = f"TrainStep, {', '.join(nets.split())}, batch {batch}, SGD and Adam"
    return Claim("P8", what, goal, unit, value, _nets(nets, [batch], "step sgd", "step adam"), TrainStep.name)


_LARGE = (512, 1024, 2048)
_SQUARE = ("256x256x256", "512x512x512", "1024x1024x1024", "2048x2048x2048")
_AWKWARD = ("100x1000x3", "33x257x129", "7x13x17", "65536x3x64", "65536x64x64")
_NARROW, _WIDE = "narrow b65536", "wide b1024"
_FUSED = ("onednn", "openvino", "onnxruntime")
_EAGER, _OVER_EAGER = f"x {YARDSTICK}", over(YARDSTICK)
_ORT, _OVER_ORT = "x onnxruntime", over("onnxruntime")
_JAX, _OVER_JAX = "x jax", over("jax")
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
        "P3", "layer, inference, 256 to 2048", 1.0, f"x best of {', '.join(_FUSED)}", over(*_FUSED), _layers(*_SQUARE)
    ),
    Claim("P4", "awkward layers, inference", 1.0, "x best peer", over(), _layers(*_AWKWARD)),
    _frozen("tutorial policy narrow", [1], 2.5, _ORT, _OVER_ORT),
    _frozen("mnist dlrm", [1], 1.5, _ORT, _OVER_ORT),
    _frozen("wide", [1], 1.25, _ORT, _OVER_ORT),
    _frozen("tutorial", [32], 1.5, _ORT, _OVER_ORT),
    _frozen("policy", [32], 1.3, _ORT, _OVER_ORT),
    _frozen("mnist dlrm wide narrow", [32], 0.88, PEAK, _share),
    _frozen("mnist dlrm wide", [256, 4096], 0.92, PEAK, _share),
    _frozen("policy", [256, 4096], 0.85, PEAK, _share),
    _frozen("narrow", [256, 4096, 65536], 0.85, PEAK, _share),
    _frozen("tutorial", [256, 4096], 2.0, "x best peer", over()),
    _frozen("tutorial", [65536], 5.0, _EAGER, _OVER_EAGER),
    _frozen("tutorial", [65536], 1.9, _JAX, _OVER_JAX),
    Claim("P6", "small networks, inference, batch 1", 4.0, _EAGER, _OVER_EAGER, _small("infer", 1)),
    Claim("P6", "small networks, inference, batch 32", 3.0, _EAGER, _OVER_EAGER, _small("infer", 32)),
    Claim("P7", "small networks, step with SGD", 1.35, _EAGER, _OVER_EAGER, _small("step sgd", 32, 128)),
    Claim("P7", "small networks, step with Adam", 1.2, _EAGER, _OVER_EAGER, _small("step adam", 32, 128)),
    Claim(
        "P7",
        "small networks, step with our SGD",
        1.9,
        _EAGER,
        _OVER_EAGER,
        _small("step sgd", 32, 128),
        FastmlpOptim.name,
    ),
    Claim(
        "P7",
        "small networks, step with our Adam",
        2.7,
        _EAGER,
        _OVER_EAGER,
        _small("step adam", 32, 128),
        FastmlpOptim.name,
    ),
    _stepped("tutorial", 32, 6.0, _JAX, _OVER_JAX),
    _stepped("tutorial", 32, 50.0, _EAGER, _OVER_EAGER),
    _stepped("policy", 128, 1.5, _JAX, _OVER_JAX),
    _stepped("policy", 128, 5.0, _EAGER, _OVER_EAGER),
    _stepped("mnist", 128, 1.15, _JAX, _OVER_JAX),
    _stepped("dlrm wide", 1024, 1.1, _JAX, _OVER_JAX),
    _stepped("dlrm wide", 1024, 1.2, _EAGER, _OVER_EAGER),
    Claim("P9", "narrow network, inference", 1.9, _EAGER, _OVER_EAGER, (f"{_NARROW} infer",)),
    Claim("P9", "narrow network, inference", 1.15, "x openvino", over("openvino"), (f"{_NARROW} infer",)),
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


def judge(rows: Sequence[Row], ids: Sequence[str], claims: Sequence[Claim] = CLAIMS) -> Iterator[Outcome]:
    """Yield the outcomes of the claims with these ids."""
    for claim in claims:
        if claim.id in ids:
            yield claim.outcome({row.workload: row for row in rows if row.contender == claim.contender})
