"""Training programs as Python source: drawn line by line, so that a case that goes wrong can be read, pasted and run.

A program is a script. It makes networks, optimizers and data, decorates a function with `captured`, and has a
generator `calls`, which calls that function and does something else between calls now and then. A `Draft` collects
its lines: `functions.py` draws the function, `blocks.py` networks and losses, `between.py` what happens between calls.
"""

from dataclasses import dataclass, field

from tests.attack.blocks import NetText, indented
from tests.attack.cases import Case

#: How often a program calls its function.
CALLS = 20

#: The line by which a program that is pasted has what it needs; the attack puts another one in its place.
HEADER = "captured = functools.partial(fastmlp.capture, fuse={fuse}, otherwise={otherwise!r})"

CUBE = """
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x ** 3 / 3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x ** 2
""".strip().splitlines()

ELSEWHERE = """
def elsewhere(call):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
""".strip().splitlines()


def split(texts: list[str]) -> list[str]:
    return [line for text in texts for line in text.splitlines()]


@dataclass
class Draft:
    """A program while it is drawn.

    Attributes:
        case: that draws.
        fuse: as `fastmlp.capture` has it; `otherwise` too.
        dtype: "torch.float32" or "torch.float64".
        form: "function", "rebound", "method" or "closure": how the function that is captured is written.
        nets: by the names of the variables.
        optimizers: the kinds, by the names of the variables.
        setup: lines that run once.
        body: lines of the function.
        before: lines before each call.
        changes: lines before certain calls.
        after: lines after each call.
        reasons: why a tape may refuse the program; where there is none, it has to follow.
        scale: how the number `scale` is set from outside, if the function reads it.
        rows: of a batch.
        short: calls whose batch is another one, and its rows.
        outputs_are_its_own: whether what the function returns shares no memory with anything else.
        trains: whether gradients are kept.
        side_thread: whether another captured function runs at the same time now and then.
        elsewhere: calls that come from another thread.
    """

    case: Case
    fuse: bool
    dtype: str
    form: str
    nets: dict[str, NetText] = field(default_factory=dict)
    optimizers: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    parameters: str = "x, y"
    unpack: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    returned: str = ""
    arguments: str = "x, y"
    before: list[str] = field(default_factory=list)
    changes: dict[int, list[str]] = field(default_factory=dict)
    around: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    globals: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)
    scale: str = ""
    rows: int = 8
    short: dict[int, int] = field(default_factory=dict)
    outputs_are_its_own: bool = False
    trains: bool = True
    side_thread: bool = False
    elsewhere: set[int] = field(default_factory=set)
    otherwise: str | None = None

    def change(self, call: int, *lines: str) -> None:
        self.changes.setdefault(call, []).extend(lines)

    @property
    def step(self) -> str:
        return "trainer.step" if self.form == "method" else "step"

    def source(self) -> str:
        """The whole script."""
        lines = [
            "import concurrent.futures, copy, functools, pickle, random, threading",
            "",
            "import torch",
            "import torch.nn.functional as F",
            "import torch.utils.checkpoint",
            "from torch import nn",
            "",
            "import fastmlp",
            "",
            HEADER.format(fuse=self.fuse, otherwise=self.otherwise),
            f"torch.manual_seed({self.case.seed})",
            "data = torch.Generator().manual_seed(1)",
        ]
        if any("Cube" in line for net in self.nets.values() for line in net.forward):
            lines += ["", *CUBE, ""]
        for net in dict.fromkeys(net.name for net in self.nets.values()):
            lines += ["", *next(n for n in self.nets.values() if n.name == net).lines(), ""]
        if self.elsewhere:
            lines += ["", *ELSEWHERE, ""]
        lines += ["", *self.setup, "", *self.function(), "", "", "def calls():"]
        if self.globals:
            lines += indented([f"global {', '.join(sorted(self.globals))}"])
        lines += indented([f"for call in range({CALLS}):", *indented(self.loop())])
        lines += ["", "", 'if __name__ == "__main__":', *indented(["for result in calls():", "    print(result)"]), ""]
        return "\n".join(lines)

    def loop(self) -> list[str]:
        lines = [f"rows = {self.rows}"]
        lines += [f"rows = {count} if call == {call} else rows" for call, count in self.short.items()]
        lines += self.before
        for at, change in sorted(self.changes.items()):
            lines += [f"if call == {at}:", *indented(change)]
        call = f"{self.step}({self.arguments})"
        called = [f"result = {call}"]
        if self.elsewhere:
            listed = ", ".join(map(str, sorted(self.elsewhere)))
            called = [f"result = elsewhere(lambda: {call}) if call in ({listed},) else {call}"]
        for context in self.around:
            called = [f"with {context}:", *indented(called)]
        return [*lines, *called, *self.after, "yield result"]

    def function(self) -> list[str]:
        body = [*self.unpack, *self.body, *([f"return {self.returned}"] if self.returned else [])]
        if self.form == "function":
            return ["@captured", f"def step({self.parameters}):", *indented(body)]
        if self.form == "rebound":
            return [f"def update({self.parameters}):", *indented(body), "", "", "step = captured(update)"]
        if self.form == "method":
            body = [line.replace("scale", "self.scale") if self.scale else line for line in body]
            init = [*(["self.net = net"] if self.nets else []), "self.scale = 1.0"]
            own = ["net = self.net"] if self.nets else []
            method = ["@captured", f"def step(self, {self.parameters}):", *indented([*own, *body])]
            init = ["def __init__(self):", *indented(init)]
            return ["class Trainer:", *indented([*init, "", *method]), "", "", "trainer = Trainer()"]
        rescale = ["def rescale(value):", *indented(["nonlocal scale", "scale = value"])]
        step = ["@captured", f"def step({self.parameters}):", *indented(body)]
        made = ["scale = 1.0", "", *step, "", *rescale, "", "return step, rescale"]
        return ["def make():", *indented(made), "", "", "step, rescale = make()"]
