"""Random sublayers of a decoder block: norms, rotary embeddings, attention, MLPs, and odd ones.

Each function writes lines and returns the name of its result. Some are what models have in all the
spellings that are known; others look like it and are not.
"""

from __future__ import annotations

from .writer import DIM, HEAD, HEADS, WIDE, Writer


def norm(w: Writer, x: str, size: int = DIM) -> str:
    """A norm of ``x`` over its last dimension, or what looks like one."""
    kind = w.weighted({_rms: 10, _layer: 3, _module: 4, _almost: 2, _none: 1})
    return kind(w, x, size)


def _rms(w: Writer, x: str, size: int) -> str:
    eps = w.pick("1e-6", "1e-5", "self.eps")
    if eps == "self.eps":
        w.init.append("self.eps = 1e-6")
    h = w.let(w.pick(f"{x}.float()", f"{x}.to(torch.float32)", x, f"{x}.type(torch.float32)"), "h")
    square = w.pick(f"{h}.pow(2)", f"{h} ** 2", f"{h} * {h}", f"torch.square({h})")
    mean = w.pick(
        f"({square}).mean(-1, keepdim=True)", f"torch.mean({square}, dim=-1, keepdim=True)"
    )
    n = w.let(
        w.pick(
            f"{h} * torch.rsqrt({mean} + {eps})",
            f"torch.rsqrt({mean} + {eps}) * {h}",
            f"{h} / torch.sqrt({mean} + {eps})",
            f"{h} * ({mean} + {eps}).rsqrt()",
            f"{h} * ({mean} + {eps}) ** -0.5",
        ),
        "n",
    )
    back = w.pick(f".to({x}.dtype)", f".type_as({x})", "")
    weight = w.parameter(f"{size}")
    return w.let(
        w.weighted(
            {
                f"{weight} * {n}{back}": 5,
                f"({n} * {weight}){back}": 3,
                f"({n} * (1.0 + {weight}.float())){back}": 3,
                f"({n} * (1 + {weight})){back}": 1,
                f"{n}{back}": 1,
                f"({n}{back}).mul({weight})": 1,
                f"F.rms_norm({x}, ({size},), {weight}, 1e-6)": 2,
            }
        ),
        "y",
    )


def _layer(w: Writer, x: str, size: int) -> str:
    weight, bias = w.parameter(f"{size}"), w.parameter(f"{size}", -0.5)
    if w.chance(0.5):
        return w.let(
            w.pick(
                f"F.layer_norm({x}, ({size},), {weight}, {bias}, 1e-5)",
                f"F.layer_norm({x}, ({size},), {weight}, None)",
                f"F.layer_norm({x}, ({size},))",
            ),
            "y",
        )
    h = w.let(w.pick(f"{x}.float()", x), "h")
    mean = w.let(f"{h}.mean(-1, keepdim=True)", "m")
    var = w.pick(
        f"({h} - {mean}).pow(2).mean(-1, keepdim=True)",
        f"{h}.var(-1, keepdim=True, unbiased=False)",
        f"{h}.var(-1, keepdim=True)",
    )
    n = w.let(f"({h} - {mean}) * torch.rsqrt({var} + 1e-5)", "n")
    return w.let(
        w.pick(f"{weight} * {n}.to({x}.dtype) + {bias}", f"({n} * {weight}).to({x}.dtype)"), "y"
    )


def _module(w: Writer, x: str, size: int) -> str:
    layer = w.member(
        "norm",
        w.pick(
            f"nn.RMSNorm({size}, eps=1e-6)",
            f"nn.LayerNorm({size})",
            f"nn.LayerNorm({size}, elementwise_affine=False)",
            f"Norm({size})",
            f"Norm({size})",
        ),
    )
    return w.let(f"{layer}({x})", "y")


def _almost(w: Writer, x: str, size: int) -> str:
    """What looks like a norm: another dimension, another power, the eps elsewhere, no root."""
    weight = w.parameter(f"{size}")
    form = w.pick(
        "{w} * ({x} * torch.rsqrt({x}.pow(2).mean(1, keepdim=True) + 1e-3))",
        "{w} * ({x} * torch.rsqrt({x}.abs().mean(-1, keepdim=True) + 1e-3))",
        "{w} * ({x} / ({x}.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3))",
        "{w} * ({x} * torch.rsqrt({x}.pow(2).sum(-1, keepdim=True) + 1e-3))",
        "{w} * ({x} * (({x} ** 2).mean(-1, keepdim=True) + 1e-3) ** -0.25)",
        "{w}.view(1, 1, -1) * ({x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-3))",
        "{w}.sum() * ({x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-3))",
        "F.normalize({x}, dim=-1) * {w}",
        "{w} * ({x} * torch.rsqrt({x}.detach().pow(2).mean(-1, keepdim=True) + 1e-3))",
    )
    return w.let(form.format(w=weight, x=x), "y")


def _none(w: Writer, x: str, size: int) -> str:
    return x


def rope(w: Writer, q: str, k: str) -> tuple[str, str]:
    """Rotate q and k (B, H, T, D), rightly or nearly so."""
    form = w.weighted(
        {
            "{x} * {c} + rotate_half({x}) * {s}": 8,
            "({x} * {c}) + (rotate_half({x}) * {s})": 2,
            "{x} * {c} - rotate_half({x}) * {s}": 1,
            "{x} * {s} + rotate_half({x}) * {c}": 1,
            "{x} * {c} + rotate_pairs({x}) * {s}": 1,
            "torch.cat([{x}[..., 4:] * -{s}[..., 4:], {x}[..., :4] * {s}[..., :4]], -1) + {x} * {c}": 1,
            "({x}.float() * {c}.float() + rotate_half({x}.float()) * {s}.float()).to({x}.dtype)": 1,
        }
    )
    c, s = "cos.unsqueeze(1)", "sin.unsqueeze(1)"
    if w.chance(0.15):  # a part of the head only
        half = HEAD // 2
        return tuple(  # type: ignore[return-value]
            w.let(
                f"torch.cat([{x}[..., :{half}] * cos.unsqueeze(1)[..., :{half}] + "
                f"rotate_half({x}[..., :{half}]) * sin.unsqueeze(1)[..., :{half}], {x}[..., "
                f"{half}:]], -1)"
            )
            for x in (q, k)
        )
    rotated = w.let(form.format(x=q, c=c, s=s))
    if w.chance(0.1):
        return rotated, k
    return rotated, w.let(form.format(x=k, c=c, s=s))


def attention(w: Writer, x: str) -> str:
    """Self-attention."""
    groups = w.pick(1, HEADS, HEADS)
    width = groups * HEAD
    if w.chance(0.2):
        fused = w.let(w.applied(x, DIM, DIM + 2 * width))
        q, k, v = (w.new("t") for _ in "qkv")
        w.line(f"{q}, {k}, {v} = {fused}.split([{DIM}, {width}, {width}], dim=-1)")
    else:
        q, k, v = (w.let(w.applied(x, DIM, n)) for n in (DIM, width, width))
    if w.chance(0.1):
        w.line(w.pick(f"{q} *= 0.5", f"{q}.mul_(0.5)", f"{v}[..., 0] = 0", f"{k}.clamp_(max=2.0)"))
    q, k, v = (w.let(f"{t}.view(*{x}.shape[:-1], -1, {HEAD}).transpose(1, 2)") for t in (q, k, v))
    if w.chance(0.2):
        q, k = norm(w, q, HEAD), norm(w, k, HEAD)
    if w.chance(0.7):
        q, k = rope(w, q, k)
    repeated = groups != HEADS
    if repeated and w.chance(0.7):
        k, v = (
            w.let(
                w.pick(
                    f"repeat_kv({t}, {HEADS // groups})",
                    f"{t}.repeat_interleave({HEADS // groups}, 1)",
                )
            )
            for t in (k, v)
        )
        repeated = False
    gqa = ", enable_gqa=True" if repeated else ""
    if repeated or w.chance(0.6):
        how = w.pick(
            "is_causal=True",
            "attn_mask=mask",
            "attn_mask=mask",
            f"is_causal=True, scale={HEAD**-0.5}",
        )
        if w.chance(0.1):
            how += ", dropout_p=0.2 if self.training else 0.0"
        o = w.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, {how}{gqa})")
    else:
        a = w.let(f"{q} @ {k}.transpose(-1, -2) * {HEAD**-0.5}")
        a = w.let(w.pick(f"{a} + mask", f"{a}.masked_fill(mask < 0, -1e4)", a))
        a = w.let(
            w.pick(f"F.softmax({a}, dim=-1, dtype=torch.float32).to({q}.dtype)", f"{a}.softmax(-1)")
        )
        if w.chance(0.3):
            a = w.let(f"F.dropout({a}, 0.1, training=self.training)")
        o = w.let(f"{a} @ {v}")
    o = w.let(f"{o}.transpose(1, 2).reshape(*{x}.shape[:-1], {DIM})")
    return w.let(w.applied(o, DIM, DIM))


_ACTS = {
    "F.silu({g})": 6,
    "{g}.sigmoid() * {g}": 1,
    "F.gelu({g})": 2,
    "F.gelu({g}, approximate='tanh')": 2,
    "F.relu({g})": 2,
    "F.relu({g}) ** 2": 1,
    "torch.sigmoid({g})": 1,
    "torch.tanh({g})": 1,
    "F.mish({g})": 0.5,
    "F.silu({g}, inplace=True)": 0.6,
    "F.relu({g}, True)": 0.6,
    "F.relu_({g})": 0.4,
    "{g}.sigmoid_()": 0.3,
    "self.act({g})": 1,
}


def mlp(w: Writer, x: str) -> str:
    """A gated MLP, or a plain one."""
    act = w.weighted(_ACTS)
    if "self.act" in act:
        w.init.append(
            "self.act = "
            f"{w.pick('nn.SiLU()', 'nn.SiLU(inplace=True)', 'nn.GELU()', 'nn.ReLU(inplace=True)')}"
        )
    source = x if w.chance(0.93) else f"{x}.detach()"
    if w.chance(0.2):
        fused = w.let(w.applied(source, DIM, 2 * WIDE))
        gate, up = w.new("g"), w.new("u")
        w.line(
            w.pick(
                f"{gate}, {up} = {fused}.chunk(2, dim=-1)",
                f"{gate}, {up} = {fused}[..., :{WIDE}], {fused}[..., {WIDE}:]",
                f"{up}, {gate} = torch.chunk({fused}, 2, -1)",
            )
        )
    else:
        gate, up = w.let(w.applied(source, DIM, WIDE), "g"), w.let(w.applied(x, DIM, WIDE), "u")
    activated = act.format(g=gate)
    form = w.weighted(
        {
            f"{activated} * {up}": 6,
            f"{up} * ({activated})": 2,
            activated: 1,
            f"({activated}).mul_({up})": 0.3,
        }
    )
    h = w.let(form, "h")
    later = w.weighted(
        {"": 20, f"{gate}.mul_(2)": 0.7, f"{up} += 1": 0.3, f"{h} *= 0.5": 0.7, f"{h}.neg_()": 0.5}
    )
    if later:
        w.line(later)
    if w.chance(0.1):
        h = w.let(f"F.dropout({h}, 0.2, self.training)")
    out = w.let(w.applied(h, WIDE, DIM))
    if w.chance(0.08):
        out = w.let(f"{out} + {w.applied(gate, WIDE, DIM)}")
    return out


def odd(w: Writer, x: str) -> str:
    """What few models have: statistics, counters, experts, convolutions, random draws."""
    kind = w.pick(
        "batch_norm", "counter", "running", "experts", "conv", "noise", "index", "unused", "aliases"
    )
    if kind == "batch_norm":
        w.init += [
            f"self.register_buffer('bm', torch.zeros({DIM}))",
            f"self.register_buffer('bv', torch.ones({DIM}))",
        ]
        training = w.pick("training=self.training", "None, None, self.training")
        return w.let(
            f"F.batch_norm({x}.flatten(0, 1), self.bm, self.bv, {training}).view({x}.shape)"
        )
    if kind == "counter":
        start = w.pick("self.register_buffer('calls', torch.zeros(()))", "self.calls = 0")
        if not any("calls" in line for line in w.init):  # a block's second one counts on
            w.init.append(start)
        w.line("self.calls += 1")
        return w.let(f"{x} * (1 + 0.01 * self.calls)")
    if kind == "running":
        w.init.append(f"self.register_buffer('mean', torch.zeros({DIM}))")
        w.line(w.pick("self.mean.lerp_({x}.detach().float().mean((0, 1)).to(self.mean.dtype), 0.1)",
                      "self.mean.copy_({x}.detach().mean((0, 1)))").format(x=x))  # fmt: skip
        return w.let(f"{x} - self.mean")
    if kind == "experts":
        router = w.let(f"{w.applied(x, DIM, 2)}.softmax(-1)")
        return w.let(
            f"{router}[..., :1] * {w.applied(x, DIM, DIM)} + {router}[..., 1:] * "
            f"{w.applied(x, DIM, DIM)}"
        )
    if kind == "conv":
        conv = w.member("conv", f"nn.Conv1d({DIM}, {DIM}, 3, padding=2, groups={DIM})")
        return w.let(f"{conv}({x}.transpose(1, 2))[..., :{x}.shape[1]].transpose(1, 2)")
    if kind == "noise":
        return w.let(
            f"{x} + 0.01 * "
            + w.pick(f"torch.randn({x}.shape).to({x}.dtype)", f"torch.rand({DIM}).to({x}.dtype)")
        )
    if kind == "index":
        return w.let(f"{x} * (1 + 0.1 * self.index)")
    if kind == "unused":
        w.line(
            w.pick(
                f"F.dropout({x}, 0.5)", "torch.rand(3)", f"torch.bernoulli({x}.detach().sigmoid())"
            )
        )
        return w.let(w.applied(x, DIM, DIM))
    a = w.let(
        w.pick(
            f"{x}.to({x}.dtype)",
            f"{x}.contiguous()",
            f"{x}.view({x}.shape)",
            f"{x}[:]",
            f"{x}.float()",
        )
    )
    y = w.let(w.applied(x, DIM, DIM))
    w.line(w.pick(f"{y}.view(-1)[0] = 0", f"{y}.transpose(0, 1).mul_(0.5)", f"{y}[0].zero_()"))
    return w.let(f"{y} + {a}.to({y}.dtype)")
