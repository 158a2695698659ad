"""What the optimizer has changed: every trained tensor, by how much, and nothing else.

Of a tensor, a checksum of its bits is kept, and of a trained one some of its elements: no copy of
the weights. Of a sharded tensor it is this process's share; nothing here is a collective.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..sharding import in_zero3, local_share
from .findings import AuditFinding

_SAMPLED = 4096
"""Elements of a trained tensor that are kept, to say by how much it moved."""

_SHOWN = 8
"""Most tensors that a finding names."""

WATCHED = 8
"""Optimizer steps after which a tensor that has not moved is looked at no more, but at the end."""


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory that make up ``tensor`` in this process: parts, or a share of it."""
    share = getattr(tensor, "ds_tensor", None) if in_zero3(tensor) else local_share(tensor)
    if not isinstance(share, Tensor) or share.is_meta:
        return
    if is_traceable_wrapper_subclass(share):
        names, _ = share.__tensor_flatten__()
        for name in names:
            yield from plain_parts(getattr(share, name))
    elif share.numel() and share.untyped_storage().size():
        yield share.detach()


@torch.no_grad()
def checksums(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """A sum over the bits of each tensor: equal for equal bits, and no other if few bits differ."""
    sums: list[list[Tensor]] = [[_sum_of_bits(part) for part in plain_parts(t)] for t in tensors]
    flat = [s for parts in sums for s in parts]
    numbers: dict[int, int] = {}
    for device in {s.device for s in flat}:  # one wait for each device, not for each tensor
        there = [s for s in flat if s.device == device]
        numbers |= dict(zip(map(id, there), torch.stack(there).tolist(), strict=True))
    return [tuple(numbers[id(s)] for s in parts) for parts in sums]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8) if flat.is_contiguous() else flat.contiguous().view(torch.uint8)
    whole = octets.numel() // 8 * 8
    rest = octets[whole:].to(torch.int64).sum()
    return octets[:whole].view(torch.int64).sum() + rest if whole else rest


def sampled(tensor: Tensor, most: int) -> Tensor | None:
    """A copy of up to ``most`` elements of this process's share, evenly spaced; None: no share."""
    parts = list(plain_parts(tensor))
    if len(parts) != 1:
        return None
    flat = parts[0].reshape(-1)
    return flat[:: -(-flat.numel() // most)].clone()


@dataclass
class _Trained:
    """A trained tensor: what it was, and what its gradients and learning rates were."""

    parameter: Tensor
    checksum: tuple[int, ...]
    elements: Tensor | None
    optimized: bool
    moved: bool = False
    change: float | None = None  # relative to its norm, once it has moved
    gradient: float = 0.0  # the largest element of the gradients that were looked at
    rate: float = 0.0  # the largest learning rate

    def rounds_away(self) -> bool:
        """Whether updates can be too small for the dtype of the weights, as of bf16 masters.

        An Adam-like update is about the learning rate, one of SGD the gradient times that.
        Rounding is to the next of two numbers, half of their spacing away.
        """
        if self.elements is None or not self.elements.is_floating_point():
            return False
        least = float(self.elements.abs().min())
        spacing = torch.finfo(self.elements.dtype).eps * least
        return self.rate * min(1.0, self.gradient) < spacing / 4


class Movement:
    """The weights of a model before training, and what has become of them.

    Reads all weights once. A tensor is trained if it requires a gradient at any step.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        named = dict(model.named_parameters())
        held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        ids = set(map(id, held))
        own = set(map(id, named.values()))
        self.strangers = sum(id(p) not in own for p in held)
        self.held = len(held)
        sums = dict(zip(named, checksums(list(named.values())), strict=True))
        self._trained = {
            name: _Trained(p, sums[name], sampled(p, _SAMPLED), id(p) in ids)
            for name, p in named.items()
            if p.requires_grad
        }
        self._frozen = {n: (p, sums[n]) for n, p in named.items() if not p.requires_grad}
        self.steps = 0

    @property
    def trained(self) -> int:
        """The number of trained tensors."""
        return len(self._trained)

    @property
    def pending(self) -> Mapping[str, _Trained]:
        """The trained tensors that have not moved yet."""
        return {n: t for n, t in self._trained.items() if not t.moved}

    @torch.no_grad()
    def before_step(self, rates: Mapping[int, float], fallback: float) -> None:
        """Note gradients and learning rates; ``rates`` by the identity of a parameter."""
        for name in [n for n, (p, _) in self._frozen.items() if p.requires_grad]:
            del self._frozen[name]  # a schedule has unfrozen it: nothing is said about it
        if self.steps >= WATCHED:
            return
        pending = self.pending.values()
        for t in pending:
            t.rate = max(t.rate, rates.get(id(t.parameter), fallback))
        parts = [(t, p) for t in pending if t.parameter.grad is not None
                 for p in plain_parts(t.parameter.grad)]  # fmt: skip
        largest = torch._foreach_norm([part for _, part in parts], torch.inf) if parts else ()
        for (t, _), most in zip(parts, largest, strict=True):
            t.gradient = max(t.gradient, float(most))

    def after_step(self) -> None:
        """See what has moved, in the first steps."""
        self.steps += 1
        if self.steps <= WATCHED:
            self._look()

    def _look(self) -> None:
        pending = list(self.pending.values())
        for t, now in zip(pending, checksums([t.parameter for t in pending]), strict=True):
            if now != t.checksum:
                t.moved, t.change = True, _relative_change(t.elements, t.parameter)

    def changed_frozen(self) -> list[str]:
        """The tensors that were frozen at every step and are not as they were."""
        now = checksums([p for p, _ in self._frozen.values()])
        pairs = zip(self._frozen.items(), now, strict=True)
        return [name for (name, (_, before)), after in pairs if before != after]

    def findings(self, at_end: bool, has_gradients: bool, exempt: str = "") -> list[AuditFinding]:
        """The answers to ``weights-moved``, and at the end to ``trainable-set``.

        Args:
            at_end: whether training is over.
            has_gradients: whether ``.grad`` had the gradients when ``before_step`` was called.
            exempt: why frozen weights may move; empty: they may not.
        """
        if at_end:
            self._look()
        found = []
        changed = [] if exempt else self.changed_frozen()
        if at_end:
            found.append(_trainable_set(changed, len(self._frozen), exempt))
        found.append(self._weights_moved(changed, has_gradients, exempt, at_end))
        return found

    def _weights_moved(
        self, changed: list[str], has_gradients: bool, exempt: str, at_end: bool
    ) -> AuditFinding:
        pending, moved = self.pending, [t for t in self._trained.values() if t.moved]
        stuck = [n for n, t in pending.items() if t.gradient > 0 and t.rate > 0]
        rounded = [n for n in stuck if pending[n].rounds_away() and pending[n].optimized]
        stuck = [n for n in stuck if n not in rounded]
        idle = [n for n, t in pending.items() if t.gradient == 0]
        figures: dict[str, Any] = {
            "trained": len(self._trained), "moved": len(moved), "frozen": len(self._frozen),
            "steps": self.steps,
        }  # fmt: skip
        by = sorted(t.change for t in moved if t.change is not None)
        if by:
            figures |= {"least": by[0], "median": statistics.median(by), "most": by[-1]}
        for name, tensors in (("rounded_away", rounded), ("no_gradient", idle)):
            if tensors:
                figures[name] = len(tensors)
        if self.strangers:
            figures["not_of_the_model"] = self.strangers
        if not self._trained:
            return AuditFinding(
                "weights-moved", "fail", "no tensor of the model requires a gradient",
                advice="add the adapter, or set requires_grad", figures=figures,
            )  # fmt: skip
        if changed:
            return AuditFinding(
                "weights-moved", "fail", f"{_count(changed)} frozen and changed all the same",
                tuple(changed[:_SHOWN]), "only the optimizer may write weights, and it should not "
                "have these", figures,
            )  # fmt: skip
        if at_end and not has_gradients and not moved and any(t.rate for t in pending.values()):
            stuck = list(pending)
        if stuck:
            return self._stuck(stuck, figures)
        if pending and not has_gradients and len(pending) > len(rounded):
            return AuditFinding(
                "weights-moved",
                "skipped",
                f"{_count(list(pending))} not moved, and "
                "whether they have gradients cannot be seen",
                tuple(list(pending)[:_SHOWN]),
                figures=figures,
            )
        if not moved:
            rates = max((t.rate for t in pending.values()), default=0.0)
            why = "no tensor has a gradient" if rates else "the learning rate was 0"
            if rounded:
                why = f"the updates of {len(rounded)} tensors are too small for their dtype to hold"
            over = at_end and self.steps > 1
            return AuditFinding(
                "weights-moved",
                "fail" if over else "skipped",
                f"{why} in {self.steps} step{'s' * (self.steps != 1)}",
                advice="step the scheduler after the optimizer" if not rates else "",
                figures=figures,
            )
        reason = f"{len(moved)} of {len(self._trained)} trained tensors moved"
        reason += f", by {figures['median']:.1e} of their norm (median)" if by else ""
        if idle:
            reason += f"; {_count(idle)} without a gradient so far"
        if rounded:
            reason += f"; the updates of {len(rounded)} are too small for their dtype to hold"
        frozen = exempt or (
            f"{len(self._frozen)} frozen ones are bit for bit as before"
            if self._frozen
            else "none is frozen"
        )
        return AuditFinding(
            "weights-moved",
            "pass",
            f"{reason}; {frozen}",
            tuple([*idle, *rounded][:_SHOWN]),
            figures=figures,
        )

    def _stuck(self, stuck: list[str], figures: dict[str, Any]) -> AuditFinding:
        left_out = [n for n in stuck if not self._trained[n].optimized]
        reason = f"{_count(stuck)} not moved, of {len(self._trained)} trained"
        advice = "look at who calls optimizer.step, and with which learning rate"
        if left_out:
            reason += f"; the optimizer does not have {len(left_out)} of them"
            advice = "give the optimizer all trained parameters"
        if self.strangers:
            reason += f", and {self.strangers} of its {self.held} tensors are not the model's"
            advice = "make the optimizer after the adapter is added and the model is wrapped"
        return AuditFinding("weights-moved", "fail", reason, tuple(stuck[:_SHOWN]), advice, figures)


def _trainable_set(changed: list[str], frozen: int, exempt: str) -> AuditFinding:
    if exempt:
        return AuditFinding("trainable-set", "skipped", exempt)
    if changed:
        return AuditFinding(
            "trainable-set",
            "fail",
            f"{_count(changed)} changed over the run and was not to be trained",
            tuple(changed[:_SHOWN]),
        )
    return AuditFinding(
        "trainable-set",
        "pass",
        f"of {frozen} frozen tensors, none has moved" if frozen else "no tensor is frozen",
        figures={"frozen": frozen},
    )


def _relative_change(before: Tensor | None, parameter: Tensor) -> float | None:
    """The norm of the change over the norm before, of the sampled elements; None: unknown."""
    now = sampled(parameter, _SAMPLED)
    if before is None or now is None or now.shape != before.shape:
        return None
    old = before.double()
    change = (now.to(old.device).double() - old).norm()
    norm = old.norm()
    return float(change / norm) if norm > 0 else float(change)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s have' if len(names) != 1 else ' has'}"
