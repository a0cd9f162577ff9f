"""Parts of networks and of losses as source text, for programs that are drawn as text (`scripts.py`)."""

from dataclasses import dataclass, field
from typing import NamedTuple

from tests.attack.cases import Case

INDENT = "    "


def indented(lines: list[str], levels: int = 1) -> list[str]:
    return [INDENT * levels + line if line else line for line in lines]


class Block(NamedTuple):
    """A part of a forward that turns `h` of `w` features into `h` of so many.

    Attributes:
        init: lines of `__init__`; `{n}` is the name of the part, `{w}` and `{v}` are widths.
        forward: lines of `forward`.
        out: the features that `h` has afterwards.
        reason: why a tape may refuse it; empty where it must not.
    """

    init: str
    forward: str
    out: str = "w"
    reason: str = ""


#: Applied to a layer's output `{}`.
APPLIED = (
    *("torch.tanh({})", "torch.tanh({})", "F.relu({})", "F.gelu({})", "F.silu({})", "torch.sigmoid({})", "F.elu({})"),
    *(
        "F.softplus({})",
        "F.leaky_relu({}, 0.1)",
        "torch.sin({})",
        "F.relu({}, inplace=True)",
        "{}.relu_()",
        "F.mish({})",
    ),
    *("{}.tanh_()", "F.hardswish({})", "F.selu({})", "{}.clamp(-1.0, 1.0)", "{}.abs()", "F.hardtanh({})", "{}"),
    *("F.celu({}, 0.5)", "torch.sin(1.5 * {})"),
    *("F.gelu({}, approximate='tanh')", "torch.exp(-{} ** 2)", "F.normalize({}, dim=1)", "torch.softmax({}, -1)"),
)

LINEAR = "self.{n} = nn.Linear({w}, {v})"
SQUARE = "self.{n} = nn.Linear({w}, {w})"

DENSE = Block(LINEAR, "h = ACT", "v")

BLOCKS: dict[str, Block] = {
    "dense without bias": Block("self.{n} = nn.Linear({w}, {v}, bias=False)", "h = ACT", "v"),
    "sequential": Block(
        "self.{n} = nn.Sequential(nn.Linear({w}, {v}), nn.ReLU(), nn.Linear({v}, {v}), nn.Tanh())",
        "h = self.{n}(h)",
        "v",
    ),
    "residual": Block(SQUARE, "h = h + ACT"),
    "in place residual": Block(SQUARE, "skip = ACT\nskip += h\nh = skip"),
    "layer norm": Block("self.{n} = nn.LayerNorm({w})", "h = self.{n}(h)"),
    "layer norm without parameters": Block("", "h = F.layer_norm(h, ({w},))"),
    "RMS norm": Block("self.{n} = nn.RMSNorm({w})", "h = self.{n}(h)"),
    "group norm": Block("self.{n} = nn.GroupNorm(1, {w})", "h = self.{n}(h)"),
    "batch norm": Block("self.{n} = nn.BatchNorm1d({w})", "h = self.{n}(h)"),
    "batch norm of options": Block(
        "self.{n} = nn.BatchNorm1d({w}, momentum=0.3, affine=False)", "h = torch.tanh(self.{n}(h))"
    ),
    "batch norm without statistics": Block(
        "self.{n} = nn.BatchNorm1d({w}, track_running_stats=False)", "h = self.{n}(h)"
    ),
    "dropout": Block("self.{n} = nn.Dropout(0.3)", "h = self.{n}(h)"),
    "functional dropout": Block("self.{n} = 0.2", "h = F.dropout(h, self.{n}, self.training)"),
    "alpha dropout": Block("self.{n} = nn.AlphaDropout(0.2)", "h = self.{n}(h)"),
    "gated": Block(
        "self.{n} = nn.Linear({w}, 2 * {v})", "a, b = self.{n}(h).chunk(2, -1)\nh = a * torch.sigmoid(b)", "v"
    ),
    "glu": Block("self.{n} = nn.Linear({w}, 2 * {v})", "h = F.glu(self.{n}(h), -1)", "v"),
    "concatenated": Block(LINEAR, "h = torch.cat([h, ACT], -1)", "w + v"),
    "scaled": Block("self.{n} = nn.Parameter(torch.ones({w}))", "h = h * self.{n}"),
    "noisy": Block("", "if self.training:\n    h = h + 0.1 * torch.randn_like(h)"),
    "noise of a shape": Block("", "h = h + 0.1 * torch.rand(h.shape, dtype=h.dtype)"),
    "noisy layer": Block(
        SQUARE + "\nself.register_buffer('{n}_noise', torch.zeros({w}))",
        "self.{n}_noise.normal_()\nh = ACT + 0.1 * self.{n}_noise",
    ),
    "attended": Block(SQUARE, "h = h * torch.softmax(self.{n}(h), -1)"),
    "across the batch": Block("", "h = torch.softmax(h @ h.t() / 4, -1) @ h"),
    "tied": Block(LINEAR, "h = torch.tanh(F.linear(torch.tanh(self.{n}(h)), self.{n}.weight.t()))"),
    "tied layers": Block(
        LINEAR + "\nself.{n}_again = nn.Linear({w}, {v})\nself.{n}_again.weight = self.{n}.weight",
        "h = torch.tanh(self.{n}(h)) + self.{n}_again(h)",
        "v",
    ),
    "shared": Block(SQUARE, "h = torch.tanh(self.{n}(torch.tanh(self.{n}(h))))"),
    "list": Block(
        "self.{n} = nn.ModuleList(nn.Linear({w}, {w}) for _ in range(2))",
        "for layer in self.{n}:\n    h = torch.tanh(layer(h))",
    ),
    "views of a parameter": Block(
        "self.{n} = nn.Linear({w}, 2 * {v})", "h = F.linear(h, self.{n}.weight[:{v}], self.{n}.bias[{v}:])", "v"
    ),
    "a parameter in pieces": Block(
        "self.{n} = nn.Parameter(torch.randn({w} * {v} + {v}) * 0.3)",
        "h = torch.addmm(self.{n}[-{v}:], h, self.{n}[:-{v}].view({w}, {v}))",
        "v",
    ),
    "normed weight": Block(
        LINEAR, "h = F.linear(h, self.{n}.weight / self.{n}.weight.norm(dim=1, keepdim=True), self.{n}.bias)", "v"
    ),
    "weight norm": Block("self.{n} = nn.utils.parametrizations.weight_norm(nn.Linear({w}, {v}))", "h = ACT", "v"),
    "spectral norm": Block("self.{n} = nn.utils.parametrizations.spectral_norm(nn.Linear({w}, {v}))", "h = ACT", "v"),
    "einsum": Block(LINEAR, "h = torch.einsum('bi,oi->bo', h, self.{n}.weight)", "v"),
    "bilinear": Block("self.{n} = nn.Bilinear({w}, {w}, {v})", "h = self.{n}(h, h)", "v"),
    "running mean": Block(
        "self.register_buffer('{n}', torch.zeros({w}))",
        "with torch.no_grad():\n    self.{n}.mul_(0.9).add_(h.mean(0), alpha=0.1)\nh = h - self.{n}",
    ),
    "running mean by lerp": Block(
        "self.register_buffer('{n}', torch.zeros({w}))", "self.{n}.lerp_(h.detach().mean(0), 0.1)\nh = h + self.{n}"
    ),
    "copied mean": Block(
        "self.register_buffer('{n}', torch.zeros({w}))", "h = h - self.{n}\nself.{n}.copy_(h.detach().mean(0))"
    ),
    "written in part": Block("", "h = h.clone()\nh[:, 0] = 0.5\nh[:, 1:] *= 2"),
    "chosen": Block("", "h = torch.where(h > 0, h, 0.1 * h)"),
    "masked": Block("", "h = h.masked_fill(h < -0.5, 0.25)"),
    "larger of two": Block(SQUARE, "h = torch.maximum(h, self.{n}(h))"),
    "turned": Block("", "h = h.t().contiguous().flip(0).t()"),
    "rolled": Block("", "h = h + h.roll(1, 1)"),
    "summed up": Block("", "h = h.cumsum(1) / {w}"),
    "sorted": Block("", "h = h.sort(1).values"),
    "convolution": Block(
        "self.{n} = nn.Conv1d(1, 2, 3, padding=1)", "h = self.{n}(h.unsqueeze(1)).flatten(1)", "2 * w"
    ),
    "cell": Block("self.{n} = nn.GRUCell({w}, {v})", "h = self.{n}(h)", "v"),
    "detached": Block(SQUARE, "h = h + self.{n}(h.detach())"),
    "under no_grad": Block(SQUARE, "with torch.no_grad():\n    skip = self.{n}(h)\nh = h * torch.sigmoid(skip)"),
    "constants": Block(
        "", "h = h * torch.tensor([0.5, 1.5], dtype=h.dtype).mean() + torch.linspace(0, 1, {w}, dtype=h.dtype)"
    ),
    "flagged": Block("self.{n} = True", "h = torch.tanh(h) if self.{n} else h"),
    "by mode": Block("", "h = h * 2 if self.training else h"),
    "by rows": Block("", "h = torch.tanh(h) if h.shape[0] > 4 else h"),
    "a function of its own": Block("", "h = Cube.apply(h)"),
    "hypernetwork": Block(
        "self.{n} = nn.Linear({w}, {w} * 2)",
        "h = torch.bmm(self.{n}(h).view(-1, 2, {w}), h.unsqueeze(-1)).squeeze(-1)",
        "2",
    ),
}

#: Parts that have something that changes between calls.
FREQUENT = ("dropout", "functional dropout", "batch norm", "batch norm of options", "layer norm", "flagged")

#: What a tape may say that it cannot follow.
ODD_BLOCKS: dict[str, Block] = {
    "checkpoint": Block(
        SQUARE, "h = torch.utils.checkpoint.checkpoint(self.{n}, h, use_reentrant=False)", reason="checkpoint"
    ),
    "reassigned buffer": Block(
        "self.register_buffer('{n}', torch.zeros({w}))",
        "self.{n} = 0.9 * self.{n} + 0.1 * h.detach().mean(0)\nh = h - self.{n}",
        reason="a buffer made anew",
    ),
    "remembered tensor": Block(
        "self.{n} = None",
        "previous = self.{n}\nself.{n} = h.detach()\n"
        "h = h if previous is None or previous.shape != h.shape else h + 0.1 * previous",
        reason="a tensor kept from call to call",
    ),
    "cached tensor": Block(
        "self.{n} = None",
        "if self.{n} is None:\n    self.{n} = torch.randn({w}, dtype=h.dtype)\nh = h + self.{n}",
        reason="lazy state",
    ),
    "momentum None": Block("self.{n} = nn.BatchNorm1d({w}, momentum=None)", "h = self.{n}(h)", reason="reads a number"),
    "reads a number": Block("", "h = h / h.detach().abs().max().item()", reason="reads a number"),
    "decides by numbers": Block("", "h = h if h.detach().sum() > 0 else -h", reason="reads a number"),
    "shape of the data": Block("", "h = h + h[h > 0].sum()", reason="a shape that depends on data"),
    "nonzero": Block("", "h = h + 0.01 * torch.nonzero(h.detach() > 0).sum()", reason="a shape that depends on data"),
    "numpy": Block("", "h = h + float(h.detach().numpy().sum())", reason="reads a number"),
    "numpy round trip": Block("", "h = h + torch.from_numpy(h.detach().numpy() * 0.5)", reason="reads a number"),
    "tolist": Block("", "h = h * len([a for a in h.detach()[0].tolist() if a > 0])", reason="reads a number"),
    "random number": Block("", "h = h * random.random()", reason="a number of Python's own"),
    "random branch": Block("", "h = torch.tanh(h) if random.random() < 0.5 else h", reason="a branch of Python's own"),
    "counted for nothing": Block("self.count = 0", "self.count += 1", reason="a counter"),
    "counted": Block("self.count = 0", "self.count += 1\nh = h / self.count", reason="a counter"),
    "counted branch": Block("self.count = 0", "self.count += 1\nh = h if self.count % 4 else -h", reason="a counter"),
    "counted later": Block("self.count = 0", "self.count += 1\nh = h if self.count < 8 else -h", reason="a counter"),
    "printed": Block("", "repr(h.detach())", reason="reads a number"),
    "data attribute": Block("", "h.data.mul_(0.5)", reason="data"),
    "vmap": Block(SQUARE, "h = torch.func.vmap(lambda row: torch.tanh(self.{n}(row)))(h)", reason="torch.func"),
    "seeded": Block("", "torch.manual_seed(3)\nh = h + 0.1 * torch.randn_like(h)", reason="a generator set"),
    "inference inside": Block(
        "", "with torch.inference_mode():\n    mean = h.mean()\nh = h + mean.clone()", reason="inference"
    ),
}


@dataclass
class NetText:
    """A module's class while it is drawn.

    Attributes:
        name: of the class.
        features: that it takes; 0 for tokens.
        heads: how many outputs of `classes` features there are.
        kinds: names of parts, by their kind.
        reasons: why a tape may refuse it.
    """

    name: str
    features: int
    classes: int
    heads: int = 1
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    layers: list[tuple[str, int, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, case: Case, kind: str, block: Block, width: int) -> int:
        name, v = f"{'abcdefgh'[len(self.kinds)]}{len(self.init)}", case.choice([2, 4, 8, 16, 17])
        act = case.choice(APPLIED).format(f"self.{name}(h)")
        for lines, text in ((self.init, block.init), (self.forward, block.forward)):
            text = text.replace("ACT", act).replace("{n}", name).replace("{w}", str(width)).replace("{v}", str(v))
            lines += text.splitlines()
        self.kinds.setdefault(kind, []).append(name)
        if block.reason:
            self.reasons.append(block.reason)
        out = {"w": width, "v": v, "w + v": width + v, "2 * w": 2 * width, "2": 2}[block.out]
        if block.init in (LINEAR, SQUARE):
            self.layers.append((name, width, v if block.init == LINEAR else width))
        return out

    def lines(self) -> list[str]:
        return [
            f"class {self.name}(nn.Module):",
            *indented(["def __init__(self):", *indented(["super().__init__()", *self.init])]),
            "",
            *indented([f"def forward(self, {'x' if self.features else 'tokens'}):", *indented(self.forward)]),
        ]


def network(case: Case, name: str, features: int, classes: int, heads: int = 1, odd: str = "") -> NetText:
    """Draws a network.

    Args:
        case: that draws.
        name: of the class.
        features: of the input, or 0 for three tokens in a row, of eleven that there are.
        classes: features of each output.
        heads: how many outputs there are.
        odd: the name of an odd block that must be among its parts.
    """
    net = NetText(name, features, classes, heads)
    width = features
    if not features:
        width = embedded(case, net)
    else:
        net.forward.append("h = x")
    kinds = [case.choice(["dense", "dense", *FREQUENT, *BLOCKS]) for _ in range(case.choice([1, 2, 2, 3, 4]))]
    if odd:
        kinds.insert(case.random.randrange(len(kinds) + 1), odd)
    for kind in ["dense", *kinds]:
        width = net.add(case, kind, DENSE if kind == "dense" else (BLOCKS | ODD_BLOCKS)[kind], width)
    for head in range(heads):
        net.init.append(f"self.out{head} = nn.Linear({width}, {classes})")
    outputs = [f"self.out{head}(h)" for head in range(heads)]
    net.forward.append(f"return {', '.join(outputs)}")
    return net


def embedded(case: Case, net: NetText) -> int:
    width: int = case.choice([3, 4, 8])
    kind = case.choice(["mean", "flat", "bag", "padded", "one hot"])
    net.kinds[f"embedding by {kind}"] = ["table"]
    padded = ", padding_idx=0" if kind == "padded" else ""
    table = f"nn.EmbeddingBag(11, {width}, mode='mean')" if kind == "bag" else f"nn.Embedding(11, {width}{padded})"
    if kind == "one hot":
        net.init.append(f"self.table = nn.Parameter(torch.randn(11, {width}))")
        net.forward.append("h = (tokens.unsqueeze(-1) == torch.arange(11)).to(self.table.dtype).sum(1) @ self.table")
    else:
        net.init.append(f"self.table = {table}")
        net.forward.append({"bag": "h = self.table(tokens)"}.get(kind, "h = self.table(tokens).mean(1)"))
    if kind == "flat":
        net.forward[-1] = "h = self.table(tokens).flatten(1)"
        return 3 * width
    return width


#: Of `out` and `y`, both of shape (rows, classes).
LOSSES: tuple[str, ...] = (
    *("F.mse_loss(out, y)", "F.mse_loss(out, y)", "nn.MSELoss()(out, y)", "F.l1_loss(out, y)", "F.huber_loss(out, y)"),
    *("F.smooth_l1_loss(out, y, beta=0.5)", "((out - y) ** 2).mean()", "(out - y).abs().clamp(max=1.5).sum(1).mean()"),
    *("torch.log(torch.cosh(out - y)).mean()", "F.binary_cross_entropy_with_logits(out, torch.sigmoid(y))"),
    *("torch.maximum(out - y, 0.5 * (y - out)).mean()", "torch.logsumexp(out - y, 1).mean()"),
    *(
        "F.kl_div(F.log_softmax(out, 1), F.softmax(y, 1), reduction='batchmean')",
        "(1 - F.cosine_similarity(out, y)).mean()",
    ),
    *(
        "torch.min((out - y) ** 2, (out - y).abs()).sum() / out.shape[0]",
        "(out - y).norm()",
        "(out.max(1).values - y.amin(1)).pow(2).mean()",
    ),
    *(
        "(out.sort(1).values - y.sort(1).values).pow(2).mean()",
        "(out - y).std() + (out.mean(0) - y.mean(0)).abs().sum()",
    ),
    *(
        "F.soft_margin_loss(out, torch.sign(y))",
        "F.poisson_nll_loss(out, y.exp())",
        "-(out * y).sum(1).topk(2).values.sum()",
    ),
    *("F.mse_loss(out, y, reduction='none').mean(1).sum()", "F.triplet_margin_loss(out, y, y.flip(0))"),
    *("torch.clamp(out - y, -0.5, 0.5).pow(2).mean() + torch.einsum('bi,bi->', out, out) * 0.01",),
    *(
        "torch.logaddexp(out, y).mean()",
        "(torch.cdist(out, y) ** 2).mean()",
        "(out - y).var(0).sum() + (out - y).mean() ** 2",
    ),
    *(
        "F.binary_cross_entropy(torch.sigmoid(out), torch.sigmoid(y))",
        "sum(F.mse_loss(a, b) for a, b in zip(out.unbind(1), y.unbind(1)))",
    ),
)

#: Of `out` and classes `y` of shape (rows,).
CLASS_LOSSES: tuple[str, ...] = (
    *("F.cross_entropy(out, y)", "F.cross_entropy(out, y)", "F.cross_entropy(out, y, label_smoothing=0.1)"),
    *("nn.CrossEntropyLoss()(out, y)", "F.nll_loss(F.log_softmax(out, 1), y)", "F.multi_margin_loss(out, y)"),
    *("-F.log_softmax(out, 1).gather(1, y[:, None]).mean()", "F.cross_entropy(out, y, reduction='none').sum() / 4"),
    *(
        "(torch.logsumexp(out, 1) - out.gather(1, y.unsqueeze(1)).squeeze(1)).mean()",
        "F.cross_entropy(out, y, ignore_index=1)",
    ),
    *(
        "-out.log_softmax(1)[torch.arange(out.shape[0]), y].mean()",
        "F.mse_loss(out, torch.eye(out.shape[1], dtype=out.dtype)[y])",
    ),
    *("-torch.distributions.Categorical(logits=out, validate_args=False).log_prob(y).mean()",),
    *("-torch.min(out.softmax(1).gather(1, y[:, None]), out.softmax(1).clamp(0.2, 0.8).gather(1, y[:, None])).mean()",),
)

#: Losses that read numbers on their way.
ODD_LOSSES: tuple[str, ...] = (
    "F.gaussian_nll_loss(out, y, torch.ones_like(y))",
    "-torch.distributions.Normal(out, 1.0).log_prob(y).mean()",
    "F.mse_loss(out, y) * (2 if (out.detach() - y).abs().max() > 1 else 1)",
    "(out[out.detach() > 0] ** 2).sum() + F.mse_loss(out, y)",
)

#: What is added to a loss.
ADDED: tuple[str, ...] = (
    "loss = loss + 1e-3 * sum(p.pow(2).sum() for p in net.parameters())",
    "loss += 1e-2 * torch.stack([p.norm() for p in net.parameters()]).sum()",
    "loss = loss + 0.01 * out.logsumexp(1).mean()",
    "loss = loss - 0.01 * torch.special.entr(out.softmax(1)).sum(1).mean()",
    "loss = (loss - 0.1).abs() + 0.1",
    "loss = loss + 0.0 * out.detach().sum()",
)
