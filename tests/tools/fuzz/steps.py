"""What is done with a random model: steps, and changes between them."""

from __future__ import annotations

import random

from .writer import DIM

_CHANGES = {
    "m.train(not m.training)": 2,
    "m.eval()": 1,
    "list(m.parameters())[{n} % len(list(m.parameters()))].requires_grad_(False)": 2,
    "[p.requires_grad_(i % 3 > 0) for i, p in enumerate(m.parameters())]": 1,
    "m.requires_grad_(False); list(m.parameters())[{n} % len(list(m.parameters()))].requires_grad_(True)": 1,
    "[setattr(b, 'scale', 1.5) for b in m.modules() if hasattr(b, 'scale')]": 1,
    "m.to(torch.float32)": 0.5,
    "block(m, {n}).register_forward_hook(lambda mod, i, o: LOG.append('block'))": 1,
    "leaf(m, {n}).register_forward_hook(lambda mod, i, o: LOG.append('leaf'))": 1,
    "leaf(m, {n}).register_forward_hook(lambda mod, i, o: o * 0.5)": 1,
    "leaf(m, {n}).register_full_backward_hook(lambda mod, gi, go: LOG.append('backward'))": 0.7,
    "block(m, {n}).register_forward_pre_hook(lambda mod, a: LOG.append('pre'))": 0.7,
    "list(m.parameters())[{n} % len(list(m.parameters()))].register_hook(lambda g: LOG.append('grad'))": 0.5,
    "[p.data.mul_(0.5) for p in m.parameters()]": 1,
    "adapt(m, {linears}, {settings})": 3,
    "leaf(m, {n}).forward = (lambda mod: lambda x: type(mod).forward(mod, x) * 2)(leaf(m, {n}))": 0.5,
}


def change(rng: random.Random, i: int, linears: list[str]) -> str:
    text = rng.choices(list(_CHANGES), list(_CHANGES.values()))[0]
    names = rng.sample(linears, min(len(linears), rng.choice([1, 3, 5])))
    settings = rng.choice(
        ["", "", ", lora_dropout=0.2", ", use_rslora=True", ", use_dora=True", ", bias='lora_only'"]
    )
    text = text.replace("{n}", str(rng.randrange(50))).replace("{linears}", f"{sorted(names)!r}")
    text = text.replace("{settings}", f"dict(r=3{settings})")
    return f"\ndef change{i}(m):\n    {text}\n"


def step(rng: random.Random, i: int, kind: str) -> str:
    batch, length = rng.choice([1, 2, 3]), rng.choice([5, 7, 12])
    mode = rng.choices(
        [
            "contextlib.nullcontext()",
            "torch.autocast('cpu', torch.bfloat16)",
            "torch.no_grad()",
            "torch.inference_mode()",
        ],
        [14, 2, 2, 0.5],
    )[0]
    if kind == "stack":
        given = rng.choice(["x.to(dtype).requires_grad_()", "x.to(dtype)"])
        use = rng.choice(
            [
                "loss = out.float().pow(2).mean()",
                "loss = (out * torch.linspace(-1, 1, out.shape[-1]).to(out.dtype)).sum()",
            ]
        )
        run = f"given = {given}\n        out = m(given * 1)\n        {use}\n        results.update(out=out, loss=loss)"
    else:
        use = rng.choices(
            [
                "loss = parts[0]",
                "loss = parts[0] + 0.01 * parts[1].float().pow(2).mean()",
                "loss = parts[1].float().log_softmax(-1).mean() * -1",
                "loss = parts[0] + 0.1 * checkpoint(torch.tanh, parts[1], "
                "use_reentrant=False).float().mean()",
            ],
            [8, 2, 1, 1],
        )[0]
        read = rng.choice(
            [
                "results['logits'] = parts[1]",
                "results['top'] = parts[1].detach().float().sum(-1)",
                "pass",
            ]
        )
        run = (
            f"out = m(ids, labels=labels)\n"
            f"        parts = tuple(out.values()) if isinstance(out, dict) else out\n"
            f"        {use}\n        results.update(loss=loss, count=len(parts))\n        {read}"
        )
        if rng.random() < 0.1:
            run = "z = m(ids)\n        loss = F.cross_entropy(z.float().flatten(0, 1), ids.flatten())\n        results.update(loss=loss, logits=z)"
    late = random.Random(f"{rng.getstate()[1][:8]}{i}")  # takes nothing from the others' choices
    if kind != "stack" and late.random() < 0.25:
        run = late_read(late)
    again = "results['loss'].backward()"
    if rng.random() < 0.1:
        again = "results['loss'].backward(retain_graph=True)\n        results['loss'].backward()"
    return f"""
def step{i}(m, n):
    ids, labels, x = rows(n, {batch}, {length})
    dtype = next(m.parameters()).dtype
    results, given = {{}}, None
    with {mode}:
        {run}
    if results["loss"].requires_grad:
        {again}
    if given is not None:
        results["input_grad"] = given.grad
    return results
"""


_BETWEEN = {
    "m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()})": 2,
    "[p.data.mul_(0.5) for p in m.parameters()]": 1,
    "[setattr(p, 'data', p.data * 0.5) for p in m.parameters()]": 1,
}
_WRITTEN = ["z.div_(0.7)", "z[:, :-1].mul_(1.5)", "z[..., 3] = 1.0", "z.detach().mul_(0.5)"]
_FIRST = [
    "F.cross_entropy(z.float().flatten(0, 1), ids.flatten())",
    "F.cross_entropy(z[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction='sum') * 0.01",
    "-z.float().log_softmax(-1).gather(-1, ids[..., None]).mean()",
    "z[..., 2].float().sin().mean()",
]


def late_read(rng: random.Random) -> str:
    """What happens between a call, its losses and the last read of its logits."""
    call = "out = m(ids, labels=labels)\n        parts = tuple(out.values()) if isinstance(out, dict) else out\n        "
    kind = rng.choice(["weights", "writes", "checkpoint", "evaluation"])
    if kind == "writes":
        return (
            f"{call}z = parts[1]\n        first = {rng.choice(_FIRST)}\n"
            f"        {rng.choice(_WRITTEN)}\n        loss = parts[0] + first + {rng.choice(_FIRST)}\n"
            "        results.update(loss=loss)"
        )
    if kind == "checkpoint":
        return (
            "def run_all():\n            out = m(ids, labels=labels)\n"
            "            parts = tuple(out.values()) if isinstance(out, dict) else out\n"
            f"            z = parts[1]\n            return parts[0] + {rng.choice(['0', *_FIRST])}\n"
            "        results.update(loss=checkpoint(run_all, use_reentrant=False))"
        )
    between = rng.choices(list(_BETWEEN), list(_BETWEEN.values()))[0]
    mode = "torch.no_grad()" if kind == "evaluation" else "contextlib.nullcontext()"
    return (
        "before = {k: v.clone() for k, v in m.state_dict().items()}\n"
        f"        with {mode}:\n            out = m(ids, labels=labels)\n"
        "        z = (tuple(out.values()) if isinstance(out, dict) else out)[1]\n"
        f"        {between}\n"
        "        try:\n            results['late, or an error'] = z.detach().float() * 2\n"
        "        except RuntimeError as error:\n"
        "            if \"logits='always'\" not in str(error):\n                raise\n"
        "        m.load_state_dict(before)\n"
        f"        {call}results.update(loss=parts[0])"
    )


# ---- the life of a model: what comes and goes while its graphs are there

LIFE_PRELUDE = f"""
HANDLES = []

def scaled(y):
    return tuple(map(scaled, y)) if isinstance(y, tuple) else y * 0.75

def any_module(m, n):
    found = [c for name, c in m.named_modules() if name and not isinstance(c, nn.ModuleList)]
    return found[n % len(found)]

def shallow(module):
    other = copy.copy(module)
    other._modules, other._parameters = dict(module._modules), dict(module._parameters)
    return other

def replace_block(m, n):
    layers = stack(m).layers
    i = n % len(layers)
    layers[i] = shallow(layers[i])
    for name, child in layers[i]._modules.items():
        if isinstance(child, nn.Linear):
            layers[i]._modules[name] = copy.deepcopy(child)
            layers[i]._modules[name].weight.data.mul_(0.5)
            return

def replace_stack(m):
    if hasattr(m, "model"):
        m.model = shallow(m.model)
        m.model.norm = nn.LayerNorm({DIM}).to(next(m.parameters()).dtype)

def wrap_class(m, n, only_norm):
    kind = type(stack(m).norm if only_norm else block(m, n))
    if kind.__module__.startswith("torch."):
        return
    own = kind.forward
    kind.forward = lambda self, *args: scaled(own(self, *args))

def wrap(module):
    own = module.forward
    module.forward = lambda *args: scaled(own(*args))
"""

_LIFE = {
    "HANDLES.append(any_module(m, {n}).register_forward_hook(lambda mod, a, o: scaled(o)))": 3,
    "HANDLES.append(any_module(m, {n}).register_forward_pre_hook(lambda mod, a: LOG.append(1)))": 2,
    "HANDLES.append(any_module(m, {n}).register_full_backward_hook(lambda mod, gi, go: LOG.append(2)))": 1,
    "[h.remove() for h in HANDLES]": 2,
    "wrap(block(m, {n}))": 1,
    "wrap(leaf(m, {n}))": 1,
    "wrap_class(m, {n}, False)": 1,
    "wrap_class(m, {n}, True)": 1,
    "replace_block(m, {n})": 3,
    "replace_stack(m)": 2,
}

_REFILLED = """
        given, buffer = None, x.to(dtype).clone()
        first = m(buffer)
        buffer.copy_(buffer.flip(0, 1) * 0.5)
        out = m(buffer)
        first, out = (o[0] if isinstance(o, tuple) else o for o in (first, out))
        loss = out.float().pow(2).mean() + first.float().mul(0.3).mean()
        results.update(out=out, loss=loss)"""


def live(rng: random.Random, changes: list[str], steps: list[str]) -> tuple[list[str], list[str]]:
    """Some of these changes and steps in favour of those of a model's life.

    Args:
        rng: one of its own, so that what a seed draws otherwise stays what it was.
        changes: the source of each.
        steps: likewise.
    """
    for i in range(len(changes)):
        text = rng.choices(list(_LIFE), list(_LIFE.values()))[0].format(n=rng.randrange(50))
        if rng.random() < 0.4:
            changes[i] = f"\ndef change{i}(m):\n    {text}\n"
    for i, step in enumerate(steps):
        head, found, rest = step.partition("        given = x.to(dtype)\n")
        if found and rng.random() < 0.5:
            steps[i] = head + _REFILLED.lstrip("\n") + rest[rest.index("\n    if results") :]
    return changes, steps


def walked(rng: random.Random, model: str) -> str:
    """``model``, the source of a head on a stack, of which some go through the blocks themselves."""
    return model.replace("self.model(h)", "run(self.model, h)") if rng.random() < 0.25 else model
