"""What a drawn training function does with gradients: zeroes, clips, steps and averages, as source text."""

from tests.attack.scripts import Draft, split
from tests.support.training import FUSED, OPTIMIZERS, draw_optimizer


def optimizer(draft: Draft, name: str, of: str) -> None:
    """Draws one and its options."""
    case = draft.case
    kinds = OPTIMIZERS if draft.fuse else [*OPTIMIZERS, *OPTIMIZERS, *OPTIONS]
    kind = case.choice(list(kinds))
    if kind in OPTIONS:
        options = {key: case.choice(values) for key, values in OPTIONS[kind].items() if case.chance(0.6)}
        if case.chance(0.3) and kind != "Muon":
            options["foreach"] = case.choice(["True", "False"])
    else:
        options = {key: repr(value) for key, value in draw_optimizer(case.random, kind).items()}
        more = case.choice(["", "", "foreach", "foreach", "fused"])
        # With `foreach`, torch's Nesterov momentum writes to gradients, and ours does not.
        if more == "foreach" and not (draft.fuse and options.get("nesterov") == "True"):
            options["foreach"] = case.choice(["True", "False"])
        elif more == "fused" and kind in FUSED and not draft.fuse:
            options["fused"] = "True"
        elif case.chance(0.3):
            options["lr"] = f"torch.tensor({options['lr']}, dtype={draft.dtype})"
            options["foreach"] = "False"
    rest = f"[p for n, p in {of}.named_parameters() if not n.startswith('out0')]"
    parameters = f"{of}.parameters()"
    if kind == "Muon":
        parameters = f"[p for p in {of}.parameters() if p.dim() == 2]"
    elif case.chance(0.15):
        parameters = f"[{{'params': {of}.out0.parameters(), 'lr': 0.02}}, {{'params': {rest}}}]"
    elif case.chance(0.1):
        parameters = rest
        draft.change(case.choice([2, 5, 9]), f"{name}.add_param_group({{'params': list({of}.out0.parameters())}})")
        case.act("between: a new group")
    given = "".join(f", {key}={value}" for key, value in options.items())
    draft.setup.append(f"{name} = torch.optim.{kind}({parameters}{given})")
    draft.optimizers[name] = kind
    case.act(f"optimizer: {kind}")


#: Options of the optimizers that `draw_optimizer` does not know; each is given or not.
OPTIONS: dict[str, dict[str, list[str]]] = {
    "Adafactor": {
        "lr": ["0.05"],
        "beta2_decay": ["-0.5"],
        "d": ["1.5"],
        "weight_decay": ["0.1"],
        "maximize": ["False"],
    },
    "Adadelta": {"lr": ["0.5"], "rho": ["0.8"], "weight_decay": ["0.01"], "maximize": ["True", "False"]},
    "Adagrad": {"lr": ["0.05"], "lr_decay": ["0.01"], "initial_accumulator_value": ["0.1"], "weight_decay": ["0.01"]},
    "Adamax": {"lr": ["0.01"], "betas": ["(0.8, 0.95)"], "weight_decay": ["0.01"], "maximize": ["False"]},
    "ASGD": {"lr": ["0.05"], "lambd": ["0.001"], "alpha": ["0.6"], "t0": ["5"], "weight_decay": ["0.01"]},
    "Muon": {"lr": ["0.01"], "momentum": ["0.9"], "nesterov": ["True", "False"], "weight_decay": ["0.05"]},
    "NAdam": {"lr": ["0.01"], "momentum_decay": ["0.01"], "decoupled_weight_decay": ["True"], "weight_decay": ["0.01"]},
    "RAdam": {"lr": ["0.01"], "betas": ["(0.5, 0.9)"], "decoupled_weight_decay": ["True"], "weight_decay": ["0.01"]},
    "Rprop": {"lr": ["0.01"], "etas": ["(0.4, 1.3)"], "step_sizes": ["(1e-4, 1.0)"], "maximize": ["False"]},
}


def zeroed(draft: Draft, outside: bool, two: bool) -> list[str]:
    case = draft.case
    if outside:
        return []
    way = case.choice(["", "", "set_to_none=False", "net", "loop", "outside", "never"])
    second = ["second.zero_grad()"] if two else []
    if way == "outside":
        draft.before.append(case.choice(["optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"]))
        return second
    if way == "never":
        case.act("accumulates without end")
        return second
    if way == "net":
        return [case.choice(["net.zero_grad()", "net.zero_grad(set_to_none=False)"]), *second]
    if way == "loop":
        return ["for p in net.parameters():", "    p.grad = None", *second]
    return [f"optimizer.zero_grad({way})", *second]


def clipped(draft: Draft) -> list[str]:
    case = draft.case
    if not case.chance(0.35):
        return []
    case.act("clips")
    if case.chance(0.05):
        draft.reasons.append("reads a number")
        return ["nn.utils.clip_grad_norm_(net.parameters(), 0.5, error_if_nonfinite=True)"]
    return split([case.choice(CLIPS)])


CLIPS = (
    *(
        "nn.utils.clip_grad_norm_(net.parameters(), 0.5)",
        "nn.utils.clip_grad_norm_(net.parameters(), 1.0, norm_type=1)",
    ),
    *(
        "nn.utils.clip_grad_norm_(net.parameters(), 0.1, norm_type=float('inf'))",
        "nn.utils.clip_grad_value_(net.parameters(), 0.05)",
    ),
    *(
        "nn.utils.clip_grad_norm_(net.parameters(), 0.5, foreach=False)",
        "nn.utils.clip_grad_value_(net.parameters(), 0.05, foreach=False)",
    ),
    "for p in net.parameters():\n    if p.grad is not None:\n        p.grad.clamp_(-0.1, 0.1)",
    "for p in net.parameters():\n    if p.grad is not None:\n        p.grad = p.grad * 0.5",
    "for p in net.parameters():\n    if p.grad is not None:\n        p.grad.add_(torch.randn_like(p), alpha=0.01)",
)


def update_by_hand(draft: Draft, two: bool) -> list[str]:
    case = draft.case
    case.act("updates by hand")
    loss = "list(net.parameters()) + list(other.parameters())" if two else "list(net.parameters())"
    lines = [f"parameters = {loss}", "grads = torch.autograd.grad(loss, parameters, allow_unused=True)"]
    kind = case.choice(list(HAND))
    if kind == "momentum":
        draft.setup.append("velocity = [torch.zeros_like(p) for p in net.parameters()]")
    return [*lines, *HAND[kind].strip().splitlines()]


HAND = {
    "sub": """
with torch.no_grad():
    for p, g in zip(parameters, grads):
        if g is not None:
            p -= 0.05 * g
""",
    "data": """
for p, g in zip(parameters, grads):
    if g is not None:
        p.data.add_(g, alpha=-0.05)
""",
    "data set": """
for p, g in zip(parameters, grads):
    if g is not None:
        p.data.copy_(p.data - 0.05 * g.sign())
""",
    "momentum": """
with torch.no_grad():
    for p, g, v in zip(parameters, grads, velocity):
        if g is not None:
            v.mul_(0.9).add_(g)
            p.sub_(v, alpha=0.05)
""",
    "foreach": """
with torch.no_grad():
    both = [(p, g) for p, g in zip(parameters, grads) if g is not None]
    torch._foreach_add_([p for p, g in both], [g for p, g in both], alpha=-0.05)
""",
    "grad": """
for p, g in zip(parameters, grads):
    p.grad = g
with torch.no_grad():
    for p in parameters:
        if p.grad is not None:
            p.add_(p.grad, alpha=-0.05)
""",
}


def averaged(draft: Draft) -> None:
    """Polyak averages."""
    case = draft.case
    if not case.chance(0.2):
        return
    case.act("averages")
    if "target" not in draft.nets:
        draft.setup.append("target = copy.deepcopy(net).requires_grad_(False)")
        draft.nets["target"] = draft.nets["net"]
    if case.chance(0.1):
        draft.setup.append("average = torch.optim.swa_utils.AveragedModel(net)")
        draft.body.append("average.update_parameters(net)")
        draft.reasons.append("reads a number")
        return
    draft.body += case.choice(AVERAGES).strip().splitlines()


AVERAGES = (
    """
with torch.no_grad():
    for p, q in zip(net.parameters(), target.parameters()):
        q.lerp_(p, 0.05)
""",
    """
with torch.no_grad():
    for p, q in zip(net.parameters(), target.parameters()):
        q.mul_(0.9).add_(p, alpha=0.1)
""",
    """
for p, q in zip(net.parameters(), target.parameters()):
    q.data.copy_(0.9 * q.data + 0.1 * p.data)
""",
    """
with torch.no_grad():
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), 0.05)
""",
    """
with torch.no_grad():
    for p, q in zip(net.buffers(), target.buffers()):
        q.copy_(p)
""",
)
