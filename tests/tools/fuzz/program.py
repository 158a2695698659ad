"""A random program: the source of a decoder-like model, of its steps and of changes between."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import layers
from .steps import LIFE_PRELUDE, change, live, step, walked
from .writer import DIM, HEAD, VOCAB, Writer

PRELUDE = f"""
import contextlib, copy, torch, torch.nn as nn, torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

DTYPE = {{dtype}}
LOG = []

def rotate_half(x):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)

def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

def repeat_kv(x, n):
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, t, d).reshape(b, h * n, t, d)

class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
    def forward(self, x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)

def tables(x):
    t = torch.arange(x.shape[1], dtype=torch.float32)
    angle = t[:, None] / 100.0 ** (torch.arange(0, {HEAD}, 2, dtype=torch.float32) / {HEAD})
    angle = torch.cat((angle, angle), -1)[None]
    mask = torch.full((x.shape[1], x.shape[1]), -1e4).triu(1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype), mask.to(x.dtype)

def rows(n, batch, length):
    g = torch.Generator().manual_seed(n)
    ids = torch.randint(0, {VOCAB}, (batch, length), generator=g)
    labels = ids.clone()
    labels[0, : length // 2] = -100
    return ids, labels, torch.randn(batch, length, {DIM}, generator=g)

def stack(m):
    return m if hasattr(m, "layers") else m.model

def block(m, n):
    return stack(m).layers[n % len(stack(m).layers)]

def leaf(m, n):
    found = [c for c in block(m, n).modules() if isinstance(c, nn.Linear)] or [stack(m).norm]
    return found[n % len(found)]

def adapt(m, names, settings):
    from peft import LoraConfig, inject_adapter_in_model
    there = [name.rpartition(".")[2] for name, _ in m.named_modules()]
    if not any(name in there for name in names):  # another block's, which this model has not drawn
        return
    inject_adapter_in_model(LoraConfig(target_modules=names, **settings), m)
    g = torch.Generator().manual_seed(len(names))
    for name, p in m.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
"""


@dataclass(frozen=True)
class Program:
    """The source of a model and its use, and how it is to be optimized.

    Attributes:
        seed: what made it.
        source: defines ``build()``, ``STEPS`` (functions of a model and a batch's number, which
            return a dict of results) and ``CHANGES`` (functions of a model).
        options: keyword arguments of ``optimize``.
        after: changes that are made before ``optimize``: how many.
    """

    seed: int
    source: str
    options: dict[str, str]
    after: int


def generate(seed: int) -> Program:
    """The program of a seed; the same on every machine."""
    rng = random.Random(seed)
    dtype = rng.choices(["torch.float32", "torch.bfloat16", "torch.float16"], [6, 3, 1])[0]
    kind = rng.choices(["nested", "flat", "stack"], [5, 2, 3])[0]
    blocks = [_block(rng, f"Block{i}") for i in range(rng.choices([1, 2], [4, 1])[0])]
    linears = sorted({n for _, ls in blocks for n in ls})
    life = random.Random(f"life {seed}")
    parts = [PRELUDE.replace("{dtype}", dtype) + LIFE_PRELUDE]
    parts += ["\n".join(b) for b, _ in blocks]
    parts.append(walked(life, _model(rng, kind, len(blocks))))
    changes = [change(rng, i, linears) for i in range(rng.choice([0, 1, 2, 3]))]
    steps = [step(rng, i, kind) for i in range(len(changes) + 1)]
    changes, steps = live(life, changes, steps)
    parts += changes + steps
    parts.append(f"CHANGES = [{', '.join(f'change{i}' for i in range(len(changes)))}]")
    parts.append(f"STEPS = [{', '.join(f'step{i}' for i in range(len(steps)))}]\n")
    options = {
        "codegen": "eager",
        "memory": rng.choices(["speed", "min"], [3, 1])[0],
        "logits": rng.choices(["lazy", "always"], [3, 1])[0],
    }
    return Program(seed, "\n".join(parts), options, rng.choice([0, 0, 1]) if changes else 0)


def _block(rng: random.Random, name: str) -> tuple[list[str], list[str]]:
    w = Writer(rng)
    methods: list[str] = []
    lines: list[str] = []
    before = w.chance(0.75)
    for i in range(rng.choice([1, 2, 2, 3])):
        kind = w.weighted({layers.attention: 4, layers.mlp: 5, layers.odd: 2})
        methods += w.method(f"part{i}", "x, cos, sin, mask", _part(w, kind, before))
        lines += _use(w, f"self.part{i}")
    out = w.weighted({"x": 8, "(x,)": 1, "(x, x.mean())": 0.5})
    init = [f"        {t}" for t in dict.fromkeys(w.init)]
    body = [f"        {t}" for t in lines]
    source = [
        f"class {name}(nn.Module):",
        "    def __init__(self, index):",
        "        super().__init__()",
        "        self.index = index",
        *init,
        "",
        *(f"    {t}" for t in methods),
        "    def forward(self, x, cos, sin, mask):",
        *body,
        f"        return {out}",
        "",
    ]
    return source, w.linears


def _part(w: Writer, kind: Callable[[Writer, str], str], before: bool) -> Callable[[], str]:
    def write() -> str:
        if before:
            return kind(w, layers.norm(w, "x"))
        return layers.norm(w, kind(w, "x"))

    return write


def _use(w: Writer, method: str) -> list[str]:
    """Call a sublayer: as it is, in a checkpoint, in a mode of its own; then add it to x."""
    call = f"{method}(x, cos, sin, mask)"
    how = w.weighted(
        {"plain": 12, "checkpoint": 1, "reentrant": 0.6, "autocast": 1, "no_grad": 0.7}
    )
    lines = []
    if how == "checkpoint":
        call = f"checkpoint({method}, x, cos, sin, mask, use_reentrant=False)"
    elif how == "reentrant":
        call = f"checkpoint({method}, x, cos, sin, mask, use_reentrant=True)"
    if how in ("autocast", "no_grad"):
        mode = "torch.no_grad()" if how == "no_grad" else "torch.autocast('cpu', torch.bfloat16)"
        lines += [f"with {mode}:", f"    y = {call}"]
    else:
        lines.append(f"y = {call}")
    lines.append(
        w.weighted(
            {
                "x = x + y": 8,
                "x = y + x": 2,
                "x += y": 1.5,
                "x = x.add_(y)": 0.3,
                "x = torch.add(x, y, alpha=0.5)": 1,
                "x = x + 0.7 * y": 1,
                "x = x + F.dropout(y, 0.1, self.training)": 1,
                "x = y.add_(x)": 0.7,
                "x = (x.float() + y.float()).to(x.dtype)": 0.7,
                "x = y": 0.5,
            }
        )
    )
    return lines


def _model(rng: random.Random, kind: str, classes: int) -> str:
    depth = rng.choice([2, 2, 3])
    made = [f"Block{rng.randrange(classes) if i else 0}({i})" for i in range(depth)]
    lines = [
        f"    layers = [{', '.join(made)}]",
    ]
    if rng.random() < 0.08:
        lines.append("    layers[-1] = layers[0]")
    final = rng.choice(["Norm", "nn.LayerNorm", "nn.Identity"])
    around = rng.choices(
        [
            "x = layer(x, cos, sin, mask)",
            "x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)",
        ],
        [9, 1],
    )[0]
    stack = f"""
def run(model, x):
    cos, sin, mask = tables(x)
    for layer in model.layers:
        {around}
        x = x[0] if isinstance(x, tuple) else x
    return model.norm(x)

def make_layers():
{chr(10).join(lines)}
    return nn.ModuleList(layers)

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.norm = make_layers(), {final}({DIM})
    def forward(self, x):
        return run(self, x)
"""
    return stack + (_built("Stack()") if kind == "stack" else _head(rng, kind, final))


def _head(rng: random.Random, kind: str, final: str) -> str:
    inner = (
        f"self.layers, self.norm = make_layers(), {final}({DIM})"
        if kind == "flat"
        else "self.model = Stack()"
    )
    hidden = "run(self, h)" if kind == "flat" else "self.model(h)"
    logits = rng.choice(
        ["self.lm_head(h)"] * 4
        + ["self.lm_head(h) * 0.5", "self.lm_head(h) * self.factor", "30 * torch.tanh(self.lm_head(h) / 30)",
           "F.linear(h, self.embed.weight)", "self.lm_head(self.factor * h)"]
    )  # fmt: skip
    shifted = rng.random() < 0.7
    z, y = ("z[:, :-1]", "labels[:, 1:]") if shifted else ("z", "labels")
    rest = rng.choice(
        ["", "", "", ", reduction='sum'", ", label_smoothing=0.1", ", ignore_index=-100"]
    )
    cast = rng.choice([".float()", ".float()", ""])
    loss = f"F.cross_entropy({z}{cast}.reshape(-1, {VOCAB}), {y}.reshape(-1){rest})"
    more = rng.choice(
        [
            "",
            "",
            "",
            " + 1e-3 * z.float().logsumexp(-1).pow(2).mean()",
            " + 0.01 * h.float().pow(2).mean()",
        ]
    )
    form = rng.choice(["(loss, z)", "(loss, z)", "{'loss': loss, 'logits': z}", "(loss, z, h)"])
    getter = "    def get_output_embeddings(self):\n        return self.lm_head\n"
    return f"""
class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding({VOCAB}, {DIM}), nn.Linear({DIM}, {VOCAB}, bias={rng.random() < 0.2})
        self.factor = nn.Parameter(torch.tensor(0.8))
        {inner}
        {"self.lm_head.weight = self.embed.weight" if rng.random() < 0.2 else ""}
{getter if rng.random() < 0.7 else ""}
    def forward(self, ids, labels=None):
        h = self.embed(ids)
        h = {hidden}
        z = {logits}
        if labels is None:
            return z
        loss = {loss}{more}
        return {form}
""" + _built("LM()")


def _built(expression: str) -> str:
    return f"""
def build():
    torch.manual_seed(0)
    return {expression}.to(DTYPE)
"""
