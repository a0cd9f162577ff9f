"""The function of a program that is drawn as text: what it is given, what it does and what it returns."""

from collections.abc import Callable

from tests.attack.blocks import ADDED, CLASS_LOSSES, LOSSES, ODD_BLOCKS, ODD_LOSSES, NetText, indented, network
from tests.attack.cases import Case
from tests.attack.scripts import Draft, split
from tests.attack.updates import averaged, clipped, optimizer, update_by_hand, zeroed


def draw(case: Case, fuse: bool) -> Draft:
    """Draws a program, but for what happens between its calls."""
    double = fuse or case.chance(0.25)
    draft = Draft(case, fuse, "torch.float64" if double else "torch.float32", case.choice(FORMS))
    draft.rows = case.choice([4, 6, 8, 8, 16, 33])
    kind = (
        "train" if fuse else case.choice(["train"] * 12 + ["infer"] * 3 + ["gradients", "tensors", "tensors", "sparse"])
    )
    DRAWS[kind](draft)
    case.act(kind)
    return draft


FORMS = ("function", "function", "rebound", "method", "closure")


def modules(draft: Draft, name: str, heads: int = 1, odd: bool = False, like: str = "") -> NetText:
    """Draws a network that takes what another one takes, makes it, and notes the reasons that it brings."""
    case = draft.case
    if like:
        features, classes = draft.nets[like].features, draft.nets[like].classes
    else:
        features, classes = case.choice([0, 3, 5, 5, 8, 17]), case.choice([2, 3, 5])
    which = case.choice(list(ODD_BLOCKS)) if odd else ""
    net = network(case, f"Net{len(draft.nets) or ''}", features, classes, heads, which)
    draft.nets[name] = net
    draft.reasons += net.reasons
    draft.setup.append(f"{name} = {net.name}()" + (".double()" if draft.dtype == "torch.float64" else ""))
    case.note(f"{name}: {', '.join(net.kinds)}")
    return net


#: How the function takes its data, besides as two tensors.
HOW = [
    *(
        "nested",
        "keyword",
        "default",
        "in place",
        "in place",
        "one memory",
        "flag",
        "numbers",
        "many numbers",
        "weighted",
    ),
    *("module", "leaf"),
]


def batches(draft: Draft, net: NetText, classes: bool) -> None:
    """The data: drawn afresh before each call, or written in place, and how the function takes it."""
    case, dtype = draft.case, draft.dtype
    if net.features:
        x = f"torch.randn(rows, {net.features}, generator=data, dtype={dtype})"
        strided = f"torch.randn({net.features}, rows, generator=data, dtype={dtype}).t()"
        cut = f"torch.randn(rows, {net.features + 2}, generator=data, dtype={dtype})[:, 1:-1]"
        x = case.choice([x, x, x, strided, cut])
    else:
        x = "torch.randint(0, 11, (rows, 3), generator=data)"
    y = (
        f"torch.randint(0, {net.classes}, (rows,), generator=data)"
        if classes
        else f"torch.randn(rows, {net.classes}, generator=data, dtype={dtype})"
    )
    how = case.choice(["plain"] * 5 + HOW)
    case.act(f"arguments: {how}")
    if how == "one memory" and net.features and not classes:
        width = net.features + net.classes
        draft.before.append(f"memory = torch.randn(rows, {width}, generator=data, dtype={dtype})")
        draft.before.append(f"x, y = memory[:, :{net.features}], memory[:, {net.features}:]")
        return
    if how == "in place":
        draft.setup += [f"rows = {draft.rows}", f"x = {x}", f"y = {y}"]
        draft.before += [
            f"x.copy_({x.replace('rows', str(draft.rows))})",
            f"y.copy_({y.replace('rows', str(draft.rows))})",
        ]
        if case.chance(0.5):
            draft.parameters = draft.arguments = ""
            draft.unpack.append("x, y = memory")
            draft.setup.append("memory = [x, y]")
        return
    draft.before += [f"x = {x}", f"y = {y}"]
    if how == "nested":
        draft.parameters, draft.arguments = "batch", "{'x': x, 'more': [y, (0.5, None, 'text')]}"
        draft.unpack.append("x, (y, (half, nothing, text)) = batch['x'], batch['more']")
    elif how == "keyword":
        draft.parameters, draft.arguments = "x, *, y, mode='mean'", "x, y=y"
    elif how == "default":
        draft.parameters, draft.arguments = "x, y, *rest, **options", "x, y, 1, name='a'"
    elif how == "flag":
        draft.parameters, draft.arguments = "x, y, flag", "x, y, call % 3 == 1"
    elif how == "numbers":
        draft.parameters, draft.arguments = "x, y, weight=1.0", "x, y, 0.5 if call % 2 else 1.0"
    elif how == "many numbers":
        draft.parameters, draft.arguments = "x, y, weight=1.0", "x, y, 1 - call / 20"
        draft.reasons.append("numbers that are others each time")
    elif how == "weighted":
        draft.parameters, draft.arguments = "x, y, weight", f"x, y, torch.tensor(1 - call / 20, dtype={dtype})"
    elif how == "module":
        draft.parameters, draft.arguments = "x, y, model", "x, y, net"
        draft.reasons.append("a module as an argument")
    elif how == "leaf" and net.features:
        draft.before.append("x.requires_grad_()")
        draft.reasons.append("a gradient of an argument")


# The function.


def train(draft: Draft) -> None:
    """Zeroes, forward, loss, backward, clips, steps, averages: each in one of its forms, or left out."""
    case = draft.case
    odd = case.chance(0.15)
    heads = case.choice([1, 1, 1, 2])
    net = modules(draft, "net", heads, odd)
    two = case.chance(0.25)
    if two:
        modules(draft, "other", like="net")
    classes = case.chance(0.4)
    batches(draft, net, classes)
    by_hand = case.chance(0.15) and not draft.fuse
    if not by_hand:
        optimizer(draft, "optimizer", "net")
        if two:
            optimizer(draft, "second", "other")
    inner = forward(draft, net, classes)
    outside = case.chance(0.12) and not by_hand
    if by_hand:
        draft.body += [*inner, *update_by_hand(draft, two)]
    else:
        backward = case.choice(
            ["loss.backward()"] * 4
            + [
                "torch.autograd.backward([loss, loss.clone()])",
                "loss.backward(torch.full_like(loss, 0.5))",
                "loss.backward(retain_graph=True)\nloss.backward()",
            ]
        )
        inner += backward.splitlines()
        if case.chance(0.12) and draft.rows >= 4:
            inner = ["for x, y in zip(x.chunk(2), y.chunk(2)):", *indented(inner)]
            draft.short, draft.rows = {}, max(draft.rows, 6)
            case.act("accumulates inside")
        draft.body += [*zeroed(draft, outside, two), *inner, *clipped(draft)]
        if outside:
            case.act("steps outside")
            every = case.choice([1, 2, 3])
            draft.before.append(f"if call % {every} == 0:\n    optimizer.zero_grad()")
            draft.after.append(f"if call % {every} == {every - 1}:\n    optimizer.step()")
            draft.before, draft.after = split(draft.before), split(draft.after)
        else:
            draft.body += ["optimizer.step()", *(["second.step()"] if two else [])]
            if case.chance(0.06):
                draft.setup.append("inner = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)")
                draft.body.append("inner.step()")
                draft.reasons.append("a scheduler inside")
    averaged(draft)
    if draft.dtype == "torch.float32" and case.chance(0.05):
        draft.around.append("torch.autocast('cpu', torch.bfloat16)")
        case.act("autocast around")
    draft.returned = case.choice(RETURNED)
    if heads == 2 and case.chance(0.3):
        draft.returned = "{'loss': loss.detach(), 'values': (out, value.detach())}"
    draft.outputs_are_its_own = draft.returned in ("loss", "loss.detach()", "loss, out", "out.softmax(1)")


RETURNED = (
    *(
        "loss",
        "loss",
        "loss.detach()",
        "loss.detach()",
        "",
        "loss, out",
        "{'loss': loss, 'more': [out, (x, None, 'text', 3)]}",
    ),
    *(
        "out, out[0], out.t()",
        "loss, out.detach(), out.detach()",
        "out.softmax(1)",
        "[p.grad for p in net.parameters()]",
    ),
    *(
        "loss, list(net.parameters())[0]",
        "loss, list(net.parameters())[0].detach()[:1]",
        "x, y, x[:1]",
        "loss.detach().clone(), True",
    ),
)


def forward(draft: Draft, net: NetText, classes: bool) -> list[str]:
    """From the inputs to `loss`."""
    case, lines = draft.case, list[str]()
    floats = bool(net.features)
    slope = floats and case.chance(0.12)
    if floats and case.chance(0.12):
        draft.setup.append("generator = torch.Generator().manual_seed(3)")
        lines.append(case.choice(DRAWN))
        case.act("own generator")
    if floats and case.chance(0.06):
        lines.append(case.choice(["x.mul_(0.5)", "x[:, 0] = 0.25", "x.add_(x.detach().mean())"]))
        case.act("input written")
    if "flag" in draft.parameters:
        lines += ["if flag:", *(["    x = x * 0.5"] if floats else ["    x = x.flip(1)"])]
    if slope:
        lines.append("x = x.detach().requires_grad_()")
    call = "out, value = net(x)" if net.heads == 2 else "out = net(x)"
    mode = case.choice(["autocast"] + [""] * 9) if not draft.fuse and draft.dtype == "torch.float32" else ""
    if mode:
        lines += ["with torch.autocast('cpu', torch.bfloat16):", f"    {call}", "out = out.float()"]
        lines += ["value = value.float()"] if net.heads == 2 else []
        case.act("autocast inside")
    else:
        lines.append(call)
    if "target" not in draft.nets and not classes and case.chance(0.12):
        draft.setup.append("target = copy.deepcopy(net).requires_grad_(False)")
        taken = "target(x)[0]" if net.heads == 2 else "target(x)"
        guard = case.choice(["torch.no_grad()", "torch.no_grad()", "torch.inference_mode()"])
        lines += [
            f"with {guard}:",
            f"    goal = {taken}",
            f"y = 0.5 * y + 0.5 * goal{'.clone()' if 'inf' in guard else ''}",
        ]
        draft.nets["target"] = net
        if "inf" in guard:
            draft.reasons.append("inference")
    if not classes and case.chance(0.05):
        lines.append(f"loss = {case.choice(ODD_LOSSES)}")
        draft.reasons.append("reads a number")
    else:
        lines.append(f"loss = {case.choice(CLASS_LOSSES if classes else LOSSES)}")
    if net.heads == 2:
        lines.append("loss = loss + 0.5 * F.mse_loss(value, out.detach())")
    if "other" in draft.nets:
        lines.append("loss = loss + (other(x) - out.detach()).pow(2).mean()")
    lines += [case.choice(ADDED)] if case.chance(0.3) else []
    if "weight" in draft.parameters:
        lines.append("loss = loss * weight")
    if slope:
        case.act("create_graph")
        lines += ["(slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)"]
        lines += ["loss = loss + 0.1 * (slope.pow(2).sum(1) - 1).pow(2).mean()"]
    elif case.chance(0.04):
        case.act("create_graph of parameters")
        lines += ["inside = torch.autograd.grad(loss, list(net.parameters()), create_graph=True, allow_unused=True)"]
        lines += ["loss = loss + 0.01 * sum((g ** 2).sum() for g in inside if g is not None)"]
    if case.chance(0.35):
        draft.scale = {"method": "trainer.scale = {}", "closure": "rescale({})"}.get(draft.form, "scale = {}")
        if draft.form in ("function", "rebound"):
            draft.setup.append("scale = 1.0")
        lines.append("loss = loss * scale")
    return lines


DRAWN = (
    "x = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)",
    "x = x * (torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.8)",
    "x = x * torch.bernoulli(torch.full_like(x, 0.8), generator=generator)",
    "x = x[torch.randperm(x.shape[0], generator=generator)]",
    "x = x + torch.empty_like(x).normal_(0.0, 0.1, generator=generator)",
    "x = x + torch.randint(0, 2, x.shape, generator=generator) * 0.1",
)


def infer(draft: Draft) -> None:
    """A forward under some mode, which the function or its caller sets."""
    case = draft.case
    net = modules(draft, "net", case.choice([1, 2]), case.chance(0.1))
    batches(draft, net, False)
    draft.trains = False
    if case.chance(0.5):
        draft.setup.append("net.eval()")
    call = "out, value = net(x)" if net.heads == 2 else "out = net(x)"
    contexts = ["torch.no_grad()", "torch.no_grad()", "torch.inference_mode()", "torch.set_grad_enabled(False)"]
    if draft.dtype == "torch.float32":
        contexts.append("torch.autocast('cpu', torch.bfloat16), torch.no_grad()")
    context = case.choice(contexts)
    inside = case.chance(0.5)
    case.act(f"{context} {'inside' if inside else 'around'}")
    lines = [call, *(["if flag:", "    out = out * 2"] if "flag" in draft.parameters else [])]
    if inside:
        draft.body += [f"with {context}:", *indented(lines)]
    else:
        draft.body += lines
        draft.around.append(context)
        if case.chance(0.2):
            draft.around[:] = []
            draft.reasons.append("gradients of an output")
    draft.returned = case.choice(
        ["out", "out", "out.softmax(1)", "out, out[0]", "{'out': out, 'x': x}", "out.max(1)", "out.argmax(1), out"]
    )
    draft.outputs_are_its_own = draft.returned in ("out", "out.softmax(1)")
    draft.case.note(draft.returned)


def gradients(draft: Draft) -> None:
    """Derivatives that are returned, of the first and the second order."""
    case = draft.case
    net = modules(draft, "net")
    batches(draft, net, False)
    draft.trains = False
    lines = ["out = net(x)", f"loss = {case.choice(LOSSES)}"]
    if case.chance(0.5):
        lines.append("grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)")
        draft.returned = "grads"
    else:
        lines += ["parameters = list(net.parameters())"]
        lines += ["grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)"]
        lines += ["dot = sum((g * torch.ones_like(g)).sum() for g in grads if g is not None)"]
        draft.returned = "torch.autograd.grad(dot, parameters, allow_unused=True, materialize_grads=True)"
    draft.body += lines


def tensors(draft: Draft) -> None:
    """No network: statements on two tensors that may lie in one memory, and results that may be one tensor."""
    case = draft.case
    draft.trains = False
    draft.parameters = "a, b"
    draft.setup.append(f"kept = torch.randn(4, 4, generator=data, dtype={draft.dtype})")
    draft.setup.append(f"weight = nn.Parameter(torch.randn(4, 4, generator=data, dtype={draft.dtype}))")
    draft.setup.append("part = weight.detach()[:2]")
    statements = [case.choice(STATEMENTS) for _ in range(case.choice([2, 3, 4, 6]))]
    if case.chance(0.05):
        statements.append("a.t_().t_()")
        draft.reasons.append("a shape changed in place")
    draft.body += ["c = a + b", *split(statements)]
    draft.before.append(f"base = torch.randn(6, 4, generator=data, dtype={draft.dtype})")
    draft.arguments = case.choice(ALIASES)
    case.act(f"aliases: {draft.arguments}")
    draft.around.append(case.choice(["torch.no_grad()", "torch.no_grad()", "torch.inference_mode()"]))
    if "inference" in draft.around[0] and case.chance(0.5):
        draft.around[0] = "torch.no_grad()"
    draft.returned = case.choice(
        ["c", "c, a, b", "a", "b[0], b", "a.t(), c", "[a, a, {'b': b.view(-1)}]", "c, c", "None", "kept, weight"]
    )


STATEMENTS = (
    *(
        "a.mul_(0.5)",
        "b.add_(c)",
        "c = c * 2",
        "a[0] = 1.5",
        "b.copy_(a)",
        "c[:, 1:] += 0.25",
        "a += b",
        "c = a.t() @ b",
    ),
    *("kept.add_(a.mean())", "c = kept + c", "weight.mul_(0.99)", "part.add_(0.01)", "c = weight @ c"),
    *(
        "c = torch.cat([a, b]).view(2, 4, 4).sum(0)",
        "a.clamp_(-1, 1)",
        "c = c.clone()",
        "b.zero_().add_(1)",
        "c.sigmoid_()",
    ),
    *(
        "torch.mul(a, 0.5, out=b)",
        "c = torch.where(a > b, a, c)",
        "a.view(-1)[3:7].neg_()",
        "c = c + a.expand(2, 4, 4).sum(0)",
    ),
    *(
        "for i in range(2):\n    a[i] = b[i + 1]",
        "c = a.unfold(0, 2, 2).sum(-1).repeat(2, 1)",
        "c = c.reshape(-1)[::2].view(2, 4).repeat(2, 1)",
    ),
    *(
        "torch.add(a, b, out=kept)",
        "c = a.as_strided((4, 4), (0, 1))",
        "c = c + torch.empty_like(c).fill_(2)",
        "b.index_add_(0, torch.tensor([0, 0, 1]), a[:3])",
    ),
    *(
        "c = a.scatter(1, torch.tensor([[0], [1], [2], [3]]), 0.0)",
        "a.uniform_()",
        "c = torch.randn_like(c)",
        "c = c.to(torch.float32).to(a.dtype)",
    ),
)

#: How the two tensors are given.
ALIASES = (
    *(
        "base[:4], base[2:]",
        "base[:4], base[:4]",
        "base[2:], base[:4]",
        "kept, kept",
        "weight, base[:4]",
        "weight.detach(), weight",
    ),
    *("kept, base[:4]", "base[:4], kept", "weight.t(), kept", "part.repeat(2, 1), weight", "base[:4], base[:4].t()"),
    *("base[:4].clone(), base[2:].clone()", "base[:4].clone(), base[2:].clone()"),
)


def sparse(draft: Draft) -> None:
    """Gradients that are sparse."""
    case = draft.case
    draft.reasons.append("sparse gradients")
    draft.setup.append("table = nn.Embedding(11, 4, sparse=True)" + (".double()" if "64" in draft.dtype else ""))
    kind = case.choice(["SparseAdam", "SparseAdam", "SGD", "Adagrad"])
    draft.setup.append(f"optimizer = torch.optim.{kind}(table.parameters(), lr=0.01)")
    draft.parameters = draft.arguments = "x"
    draft.before.append("x = torch.randint(0, 11, (rows, 3), generator=data)")
    draft.body += ["optimizer.zero_grad()", "loss = table(x).pow(2).sum()", "loss.backward()", "optimizer.step()"]
    draft.returned = "loss"


DRAWS: dict[str, Callable[[Draft], None]] = {
    "train": train,
    "infer": infer,
    "gradients": gradients,
    "tensors": tensors,
    "sparse": sparse,
}
