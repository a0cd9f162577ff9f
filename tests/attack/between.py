"""What happens between two calls of a captured function, as source text."""

from collections.abc import Callable
from typing import NamedTuple

from tests.attack.cases import Case
from tests.attack.scripts import CALLS, Draft


class Change(NamedTuple):
    """Something that happens before a call.

    Attributes:
        draw: puts its lines there, and says whether they fit the program.
        reason: why a tape may refuse what comes after; empty where it has to follow.
    """

    draw: Callable[[Draft, int], bool]
    reason: str = ""


def draw(draft: Draft) -> None:
    """Draws what happens between the calls: nothing, or up to four changes."""
    case = draft.case
    if case.chance(0.25):
        return
    wanted = case.choice([1, 1, 2, 3, 4])
    for _ in range(4 * wanted):
        name = case.choice(list(CHANGES))
        change = CHANGES[name]
        if (change.reason and (draft.fuse or case.chance(0.5))) or wanted == 0:
            continue
        if change.draw(draft, case.random.randrange(1, CALLS - 4)):
            wanted -= 1
            case.act(f"between: {name}")
            draft.reasons += [change.reason] if change.reason else []


def later(case: Case, call: int) -> int:
    return case.random.randrange(call + 1, CALLS)


def lines(*texts: str, needs: str = "train") -> Callable[[Draft, int], bool]:
    """One of some texts. `{l}` is a linear layer, `{w}` and `{v}` its widths; `{o}` an optimizer."""

    def put(draft: Draft, call: int) -> bool:
        if (needs == "train" and not draft.optimizers) or (needs == "net" and not draft.nets):
            return False
        text = draft.case.choice(texts)
        layer = a_layer(draft)
        if "{l}" in text and layer is None:
            return False
        name, w, v = layer or ("", 0, 0)
        kept = {"{l}": name, "{w}": str(w), "{v}": str(v), "{o}": draft.case.choice([*draft.optimizers, "optimizer"])}
        kept["{D}"] = draft.dtype
        first, _, second = text.partition("\n--\n")
        for mark, value in kept.items():
            first, second = first.replace(mark, value), second.replace(mark, value)
        draft.change(call, *first.splitlines())
        if second and draft.case.chance(0.7):
            draft.change(later(draft.case, call), *second.splitlines())
        return True

    return put


def a_layer(draft: Draft) -> tuple[str, int, int] | None:
    layers = [(f"{name}.{layer}", w, v) for name, net in draft.nets.items() for layer, w, v in net.layers]
    return draft.case.choice(layers) if layers else None


def schedule(draft: Draft, call: int) -> bool:
    """A scheduler that steps after each call."""
    kinds = list(SCHEDULERS)
    grows = any("add_param_group" in line for change in draft.changes.values() for line in change)
    if not draft.optimizers or grows or any("scheduler" in line for line in [*draft.after, *draft.body]):
        return False
    kind = draft.case.choice(kinds)
    name = draft.case.choice(list(draft.optimizers))
    draft.setup.append(f"scheduler = torch.optim.lr_scheduler.{kind}({name}, {SCHEDULERS[kind]})")
    draft.after.append("scheduler.step()")
    return True


SCHEDULERS = {
    "StepLR": "3, gamma=0.5",
    "ExponentialLR": "0.9",
    "CosineAnnealingLR": "T_max=20",
    "LambdaLR": "lambda epoch: 1 / (1 + epoch)",
    "LinearLR": "total_iters=5",
    "OneCycleLR": "max_lr=0.05, total_steps=40, cycle_momentum=False",
    "CosineAnnealingWarmRestarts": "T_0=4",
}


def short_batch(draft: Draft, call: int) -> bool:
    if draft.parameters in ("", "a, b") or any("copy_" in line for line in draft.before):
        return False
    accumulates = any("chunk(2)" in line and "zip" in line for line in draft.body)
    count = draft.case.choice([4, 5] if accumulates else [2, 3, 5])
    draft.short[call] = count
    if draft.case.chance(0.5):
        draft.short[min(call + draft.case.choice([1, 2, 5]), CALLS - 1)] = count
    return True


def another_number(draft: Draft, call: int) -> bool:
    if not draft.scale:
        return False
    if draft.form in ("function", "rebound"):
        draft.globals.add("scale")
    draft.change(call, draft.scale.format("0.25"))
    if draft.case.chance(0.5):
        draft.change(later(draft.case, call), draft.scale.format("1.0"))
    return True


def hyperparameter(draft: Draft, call: int) -> bool:
    """Of a dropout or a norm."""
    found = []
    for name, net in draft.nets.items():
        for part in net.kinds.get("dropout", []) + net.kinds.get("alpha dropout", []):
            found.append(f"{name}.{part}.p = {draft.case.choice(['0.0', '0.5', '0.1'])}")
        for part in net.kinds.get("batch norm", []) + net.kinds.get("batch norm of options", []):
            found += [f"{name}.{part}.momentum = 0.5", f"{name}.{part}.eps = 1e-2", f"{name}.{part}.eval()"]
        for part in net.kinds.get("layer norm", []):
            found.append(f"{name}.{part}.eps = 1e-2")
    if not found:
        return False
    draft.change(call, draft.case.choice(found))
    return True


def attribute(draft: Draft, call: int) -> bool:
    """A number or a flag that a module of the user's own reads."""
    found = []
    for name, net in draft.nets.items():
        found += [f"{name}.{part} = 0.5" for part in net.kinds.get("functional dropout", [])]
        found += [f"{name}.{part} = not {name}.{part}" for part in net.kinds.get("flagged", [])]
    if not found:
        return False
    draft.change(call, draft.case.choice(found))
    return True


def another_object(draft: Draft, call: int) -> bool:
    """A name that the function reads stands for something else."""
    name = draft.case.choice([*draft.nets, ""])
    if not name or (draft.form == "method" and name == "net"):
        return False
    copied = "copy.deepcopy(net)" if name == "target" else f"copy.deepcopy({name})"
    draft.globals.add(name)
    draft.change(call, f"{name} = {copied}")
    return True


def generator(draft: Draft, call: int) -> bool:
    if not any(line.startswith("generator = ") for line in draft.setup):
        return False
    draft.change(call, draft.case.choice(["generator.manual_seed(7)", "generator.set_state(data.get_state())"]))
    return True


def side_thread(draft: Draft, call: int) -> bool:
    """A captured program of its own in another thread, while this one is called."""
    if draft.side_thread:
        return False
    draft.side_thread = True
    draft.setup += SIDE.replace("DTYPE", draft.dtype).splitlines()
    for at in sorted({1, call, min(call + 3, CALLS - 1)}):
        draft.change(at, "thread = threading.Thread(target=work)", "thread.start()")
    draft.before.insert(0, "thread = None")
    draft.after[:0] = [
        "if thread is not None:",
        "    thread.join()",
        "thread = None",
        "if errors:",
        "    raise errors[0]",
    ]
    return True


SIDE = """
side = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
side_optimizer = torch.optim.Adam(side.parameters(), lr=0.01)
side_data = torch.randn(8, 4, generator=data)
errors = []

@captured
def side_step(z):
    side_optimizer.zero_grad()
    loss = side(z).pow(2).mean()
    loss.backward()
    side_optimizer.step()
    return loss.detach()

def work():
    try:
        for _ in range(5):
            side_step(side_data)
    except Exception as error:
        errors.append(error)
""".strip()


def elsewhere(draft: Draft, call: int) -> bool:
    """One call comes from another thread, in which modes are those of a new thread."""
    if draft.around:
        return False
    draft.elsewhere.add(call)
    return True


def reset(draft: Draft, call: int) -> bool:
    draft.change(call, f"{draft.step}.reset()")
    return True


def results_written(draft: Draft, call: int) -> bool:
    """What a call gave is its caller's, who writes to it."""
    if not draft.outputs_are_its_own:
        return False
    draft.after += [
        "with torch.no_grad():",
        "    handed = result[0] if isinstance(result, tuple) else result",
        f"    if call == {call}:",
        "        handed.mul_(3)",
    ]
    return True


STATE = "{k: v * 0.75 if v.is_floating_point() else v for k, v in net.state_dict().items()}"

CHANGES: dict[str, Change] = {
    "load_state_dict": Change(lines(f"net.load_state_dict({STATE})", needs="net")),
    "load_state_dict, assigned": Change(lines(f"net.load_state_dict({STATE}, assign=True)", needs="net")),
    "requires_grad_": Change(
        lines(
            "{l}.weight.requires_grad_(False)\n--\n{l}.weight.requires_grad_(True)",
            "{l}.requires_grad_(False)\n--\n{l}.requires_grad_()",
            "{l}.weight.requires_grad = not {l}.weight.requires_grad\n--\n{l}.weight.requires_grad = True",
        )
    ),
    "train and eval": Change(lines("net.eval()\n--\nnet.train()", "net.train(not net.training)", needs="net")),
    "scheduler": Change(schedule),
    "a group's numbers": Change(
        lines(
            "{o}.param_groups[0]['lr'] *= 0.5",
            "{o}.param_groups[0]['lr'] = 0.003\n--\n{o}.param_groups[0]['lr'] = 0.02",
            "{o}.param_groups[0]['weight_decay'] = 0.1\n--\n{o}.param_groups[0]['weight_decay'] = 0.0",
            "if 'betas' in {o}.param_groups[0]:\n    {o}.param_groups[0]['betas'] = (0.7, 0.9)",
            "if 'eps' in {o}.param_groups[0]:\n    {o}.param_groups[0]['eps'] = 1e-5",
            "{o}.param_groups[0]['foreach'] = False",
            "if {o}.param_groups[0].get('momentum'):\n    {o}.param_groups[0]['momentum'] = 0.5",
        )
    ),
    "data": Change(
        lines(
            "{l}.weight.data = {l}.weight.data * 0.5",
            "{l}.weight.data = {l}.weight.data.t().contiguous().t()",
            "{l}.bias.data = torch.ones(2 * {v}, dtype={D})[::2]",
            "with torch.no_grad():\n    {l}.weight.set_({l}.weight.detach().clone() * 0.5)",
        )
    ),
    "a new parameter": Change(lines("{l}.weight = nn.Parameter({l}.weight.detach() * 0.5)", needs="net")),
    "a new module": Change(lines("{l} = nn.Linear({w}, {v}).to({D})", needs="net")),
    "gradients": Change(
        lines(
            "net.zero_grad()",
            "net.zero_grad(set_to_none=False)",
            "{o}.zero_grad()",
            "{l}.weight.grad = torch.ones_like({l}.weight)",
            "{l}.weight.grad = None",
            "if {l}.weight.grad is not None:\n    {l}.weight.grad.mul_(2)",
            "for p in net.parameters():\n    p.grad = torch.zeros_like(p)",
        )
    ),
    "short batch": Change(short_batch),
    "hyperparameter": Change(hyperparameter),
    "attribute": Change(attribute, "a number of Python's own"),
    "another object": Change(another_object, "another object"),
    "generator": Change(generator),
    "another number": Change(another_number, "a number of Python's own"),
    "hook": Change(
        lines(
            "handle = {l}.register_forward_hook(lambda module, given, out: out * 0.5)\n--\nhandle.remove()",
            "handle = {l}.register_forward_pre_hook(lambda module, given: (given[0] * 0.5,))\n--\nhandle.remove()",
            "def halve(module, given, got):\n    return None if given[0] is None else (given[0] * 0.5,)\n"
            "handle = {l}.register_full_backward_hook(halve)\n--\nhandle.remove()",
            "handle = {l}.weight.register_hook(lambda g: g * 0.5)\n--\nhandle.remove()",
            "def halve(p):\n    p.grad.mul_(0.5)\n"
            "handle = {l}.weight.register_post_accumulate_grad_hook(halve)\n--\nhandle.remove()",
        ),
        "hook",
    ),
    "hook of an optimizer": Change(
        lines(
            "def shrink(*ignored):\n    net.out0.weight.data.mul_(0.99)\n"
            "hooked = {o}.register_step_pre_hook(shrink)\n--\nhooked.remove()",
            "def shrink(*ignored):\n    net.out0.bias.data.mul_(0.9)\n"
            "hooked = {o}.register_step_post_hook(shrink)\n--\nhooked.remove()",
        ),
        "hook",
    ),
    "parameters written": Change(
        lines(
            "with torch.no_grad():\n    {l}.weight.mul_(0.9)",
            "with torch.no_grad():\n    {l}.bias.fill_(0.1)",
            "{l}.weight.data[0] = 0.2",
            "{l}.reset_parameters()",
            "nn.init.orthogonal_({l}.weight)",
            "for b in net.buffers():\n    b.zero_()",
            needs="net",
        )
    ),
    "optimizer's state written": Change(
        lines(
            "for state in {o}.state.values():\n    for t in state.values():\n"
            "        if isinstance(t, torch.Tensor) and t.dim():\n            t.mul_(0.5)",
            "{o}.state.clear()",
            "{o}.load_state_dict(copy.deepcopy({o}.state_dict()))",
            "{o}.load_state_dict(pickle.loads(pickle.dumps({o}.state_dict())))",
        )
    ),
    "copies": Change(
        lines(
            "clone = copy.deepcopy(net)",
            "clone = pickle.loads(pickle.dumps(net.state_dict()))",
            "clone = copy.copy(net)",
            needs="net",
        )
    ),
    "looks": Change(
        lines(
            "net.requires_grad_(True)",
            "net.to('cpu')",
            "seen = str(net)",
            "total = sum(p.detach().sum() for p in net.parameters())",
            needs="net",
        )
    ),
    "side thread": Change(side_thread),
    "called in another thread": Change(elsewhere),
    "reset": Change(reset),
    "results written": Change(results_written),
    "seed": Change(lines("torch.manual_seed(5)", "torch.rand(3)", needs="")),
}
