"""What is wrong with gradients: each trained tensor's against the plain model's, and what it means.

With d(x) for the distance from the reference over the reference's size, gradients are right if

    d(audited) <= 1.5 * d(eager) + unit

where eager is the plain model in the audited one's dtypes, and ``unit`` one unit of rounding (16 in
fp32, where sums in another order differ by more than one): the rule by which the compiler judges
its rewrites and ``verify`` whole runs. A tensor that eager mode itself does not get right to within
a half is not judged: its gradient is nothing but rounding.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.tolerance import budget, unit
from .drift import kind_of
from .findings import AuditFinding

Gradients = Mapping[str, Tensor | None]

UNRESOLVED = 0.5
"""Where eager mode is as far off as that, its dtype does not hold the gradient."""

EXPLAINED = 0.2
"""A factor explains an error of which it leaves less than this share."""


OTHER_ORDER = 16
"""So many units of rounding of fp32 a sum in another order is allowed beyond eager's own error."""


def slack_of(dtype: torch.dtype) -> float:
    """What is allowed beyond eager's own error in ``dtype``."""
    return unit(dtype) * (1 if dtype in (torch.bfloat16, torch.float16) else OTHER_ORDER)


FAR = 30.0
"""No other rounding errors take a gradient as many times further than is allowed."""

NOTICEABLE = 0.02
"""A factor nearer to 1 than this is not called one."""


def layer_of(name: str) -> int:
    """The number of the layer that a parameter is in; -1: in none."""
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[0]) if numbers else -1


@dataclass(frozen=True)
class Agreement:
    """One gradient next to the reference's.

    Attributes:
        size: norm of the reference's.
        off: norm of the difference over that.
        scale: the factor times the reference's that comes nearest.
        rest: what that factor leaves of the difference, over ``size``.
    """

    size: float
    off: float
    scale: float
    rest: float

    @classmethod
    def of(cls, gradient: Tensor, reference: Tensor) -> Agreement:
        """Of two tensors of one shape, in any dtypes."""
        dot = square = theirs = 0.0
        for a, b in zip(_pieces(gradient), _pieces(reference), strict=True):
            dot += float(a @ b)
            square += float(b @ b)
            theirs += float(a @ a)
        if square == 0.0:
            return cls(0.0, theirs**0.5, 0.0, theirs**0.5)
        scale = dot / square
        off = max(0.0, theirs - 2 * dot + square)
        rest = max(0.0, theirs - dot * scale)
        size = square**0.5
        return cls(size, off**0.5 / size, scale, rest**0.5 / size)


def _pieces(t: Tensor) -> Iterator[Tensor]:
    for piece in t.detach().reshape(-1).split(1 << 20):
        yield piece.double()


@dataclass(frozen=True)
class Fault:
    """What is wrong with one tensor's gradient."""

    name: str
    check: str
    agreement: Agreement | None = None
    allowed: float = 0.0

    @property
    def may_be_rounding(self) -> bool:
        """Whether other rounding errors than those of one run could explain it."""
        return self.agreement is not None and self.agreement.off < FAR * self.allowed


def compare(
    gradients: Gradients, reference: Gradients, eager: Sequence[Gradients], dtype: torch.dtype
) -> tuple[list[Fault], dict[str, float]]:
    """The faults of ``gradients``, and figures; ``eager``: runs that round, the more the surer.

    ``reference`` has a name for each tensor that is judged.
    """
    judged = [name for name, g in reference.items() if g is not None]
    measured = [
        {name: Agreement.of(run[name], reference[name]) for name in judged if run[name] is not None}  # type: ignore[arg-type]
        for run in eager
    ]
    by_kind: dict[str, float] = defaultdict(float)
    for run_of in measured:
        for name, each in run_of.items():
            if each.off < UNRESOLVED:
                by_kind[kind_of(name)] = max(by_kind[kind_of(name)], each.off)
    largest = max((float(reference[name].double().norm()) for name in judged), default=0.0)  # type: ignore[union-attr]
    slack = slack_of(dtype)
    faults, compared, worst = [], 0, 0.0
    for name in judged:
        g, exact = gradients.get(name), reference[name]
        assert exact is not None
        rounding = [run_of[name] for run_of in measured if name in run_of]
        nothing = not bool(exact.any())
        unresolved = nothing or any(each.off >= UNRESOLVED for each in rounding)
        if g is None:
            if not nothing:
                faults.append(Fault(name, "gradient-missing"))
            continue
        if not bool(torch.isfinite(g).all()):
            faults.append(Fault(name, "gradient-finite"))
            continue
        if not bool(g.any()):
            if not unresolved:
                faults.append(Fault(name, "gradient-zero"))
            continue
        agreement = Agreement.of(g, exact)
        allowed = budget(by_kind[kind_of(name)], slack)
        compared += 1
        if unresolved:
            noise = max((each.off * each.size for each in rounding), default=0.0)
            here = agreement.off * (agreement.size or 1.0)
            if here > 10 * noise + unit(dtype) * largest:
                faults.append(Fault(name, "gradient-value", agreement, allowed))
            continue
        worst = max(worst, agreement.off / allowed)
        if agreement.off > allowed:
            faults.append(Fault(name, _named(agreement), agreement, allowed))
    return faults, {"compared": compared, "of": len(judged), "worst_over_allowed": worst}


def _named(agreement: Agreement) -> str:
    if agreement.rest <= EXPLAINED * agreement.off and abs(agreement.scale - 1) > NOTICEABLE:
        return "gradient-sign" if agreement.scale < 0 else "gradient-scale"
    return "gradient-value"


def common_factor(faults: Sequence[Fault], compared: int) -> float | None:
    """The factor that all gradients have in common, if nothing else is wrong with them."""
    scales = [f.agreement.scale for f in faults if f.agreement and f.check == "gradient-scale"]
    if not scales or len(scales) < len(faults) or len(scales) < 0.9 * compared:
        return None
    low, high = min(scales), max(scales)
    return sum(scales) / len(scales) if high - low < 0.05 * abs(high) else None


GRADIENT_CHECKS = (
    "gradient-missing", "gradient-zero", "gradient-finite", "gradient-scale", "gradient-sign",
    "gradient-rows", "gradient-value",
)  # fmt: skip


def origins(faults: Sequence[Fault], order: Sequence[str]) -> tuple[list[Fault], list[Fault]]:
    """The faults, the first that backward meets first, and those that may only follow from others.

    Behind a gradient that is missing, scaled or turned around, others differ, too.
    """
    place = {name: at for at, name in enumerate(order)}
    by_place = sorted(faults, key=lambda f: place.get(f.name, len(place)))
    values = ("gradient-value", "gradient-rows")
    first = next((at for at, f in enumerate(by_place) if f.check not in values), len(by_place))
    follow = [f for f in by_place[first:] if f.check in values]
    return [f for f in by_place if f not in follow], follow


def findings(
    faults: Sequence[Fault], figures: Mapping[str, float], order: Sequence[str], where: str = ""
) -> Iterator[AuditFinding]:
    """One finding for each question about single gradients; ``where``: of ``gradient-rows``."""
    number = int(figures["of"])
    first, follow = origins(faults, order)
    for check in GRADIENT_CHECKS:
        here = [fault for fault in first if fault.check == check]
        if here:
            finding = _failed(check, here, number, order, where)
            if check == "gradient-value" and follow:
                more = f"{len(follow)} more differ behind {first[0].name}"
                finding = replace(finding, reason=f"{finding.reason}; {more}")
            yield finding
        elif check == "gradient-value" and follow:
            yield AuditFinding(
                check, "skipped",
                f"{len(follow)} of {number} tensors differ behind {first[0].name}, whose fault may "
                "be the reason: audit again when that is right",
                tuple(f.name for f in follow),
            )  # fmt: skip
        else:
            right = number - len(faults)
            text = f"the other {right} of {number} tensors" if faults else f"{number} tensors"
            text = text if right else f"each of {number} tensors differs in another way"
            yield AuditFinding(check, "pass" if right else "skipped", text, figures=dict(figures))


_WORDS = {
    "gradient-missing": "no gradient",
    "gradient-zero": "a gradient of zeros, where the plain model's is not",
    "gradient-finite": "a gradient with inf or nan",
    "gradient-sign": "a gradient of the opposite sign",
    "gradient-rows": "a gradient that is wrong for some of the rows or positions",
    "gradient-value": "another gradient than the plain model",
}


def _advice(check: str, faults: Sequence[Fault], number: int, order: Sequence[str]) -> str:
    """What to do, where the faulty tensors tell more than the question; else empty."""
    names = {f.name for f in faults}
    if len(names) < number and check in ("gradient-scale", "gradient-missing"):
        # in backward, others come after the first of them, and are right
        first = next((at for at, name in enumerate(order) if name in names), len(order))
        if check == "gradient-scale":
            name = order[first] if first < len(order) else "the first"
            # all that reaches the first matrix of an adapter comes through the second one
            behind = name.replace("lora_B", "lora_A")
            alone = behind != name and behind in order and behind not in names
            after = "" if alone else ", or of what comes after it in forward,"
            return (
                "others do not have it, so that the number of tokens is right: look at the "
                f"backward pass of {name}{after} for a gradient that is added twice or has a factor"
            )
        if not names.issuperset(order[first:]):
            return (
                "gradients behind them are there, so that only a branch is cut: a backward pass "
                "that returns none for a weight, detach, no_grad, or a module that is not called"
            )
    if check == "gradient-scale" and all("lora_" in name for name in names):
        return (
            "compare the adapter's scaling with its configuration (lora_alpha, r, use_rslora); or "
            "the loss is divided by another number of tokens"
        )
    return ""


def _failed(
    check: str, worst: Sequence[Fault], compared: int, order: Sequence[str], where: str
) -> AuditFinding:
    faults = worst  # a wrong backward pass spoils all that comes after it: the first says where
    kinds = sorted({kind_of(f.name) for f in faults})
    layers = sorted({layer_of(f.name) for f in faults} - {-1})
    words = _WORDS.get(check, "")
    if check == "gradient-scale":
        scales = [f.agreement.scale for f in faults if f.agreement]
        low, high = min(scales), max(scales)
        words = f"{low:.3g}x" if high - low < 0.01 * high else f"{low:.3g}x to {high:.3g}x"
        words += " the plain model's gradient"
    have = "has" if len(faults) == 1 else "have"
    reason = f"{len(faults)} of {max(compared, len(faults))} tensors {have} {words}: "
    reason += ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more kinds" if len(kinds) > 4 else "")
    if layers:
        reason += f" (layer{'s' * (len(layers) > 1)} {_ranges(layers)})"
    first = worst[0]
    if first.agreement and check in ("gradient-value", "gradient-rows"):
        reason += f"; {where}" if where and check == "gradient-rows" else ""
        reason += (
            f"; the relative error of the first is {first.agreement.off:.1e}, and rounding allows "
            f"{first.allowed:.1e}"
        )
    figures = {
        f.name: {"off": f.agreement.off, "allowed": f.allowed, "scale": f.agreement.scale}
        for f in worst[:20]
        if f.agreement
    }
    advice = _advice(check, faults, compared, order)
    return AuditFinding(check, "fail", reason, tuple(f.name for f in worst), advice, figures)


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 5``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
