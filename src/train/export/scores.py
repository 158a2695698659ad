"""What a model computes on rows of tokens: losses, logits, its next tokens; and comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import IGNORED
from ..data.sample import Sample

Logits = Callable[[list[int]], Tensor]
"""From tokens to logits, (tokens, vocabulary)."""

_TOKENS, _NEW, _PROMPTS = 4096, 24, 5
_KEPT_BYTES = 2**28


@dataclass
class HeldOut:
    """Tokens to judge models on.

    Attributes:
        what: which they are, in words.
        samples: with labels where a loss is computed.
        all: how many there were to choose from.
        prompts: beginnings of samples, or questions, to be continued.
    """

    what: str
    samples: list[Sample]
    prompts: list[list[int]]
    all: int = 0

    @classmethod
    def of(cls, what: str, samples: Sequence[Sample], questions: Sequence[list[int]]) -> HeldOut:
        """As many samples as have about 4,000 tokens, spread evenly over all of them."""
        usable = [s for s in samples if s.trained]
        step, count, chosen = max(1, sum(len(s.input_ids) for s in usable) // _TOKENS), 0, []
        for sample in usable[::step]:
            if count >= _TOKENS:
                break
            chosen.append(sample)
            count += len(sample.input_ids)
        starts = [next(i for i, t in enumerate(s.labels) if t != IGNORED) for s in chosen]
        begun = [s.input_ids[:n][-512:] for s, n in zip(chosen, starts, strict=True) if n > 1]
        return cls(what, chosen, (begun or list(questions))[:_PROMPTS], len(usable))

    def spread(self, losses: Tensor) -> float:
        """The standard error of a mean loss, for that of all samples: rows differ as wholes."""
        each = torch.stack(
            [
                part.double().sum() - losses.double().mean() * len(part)
                for part in losses.split([s.trained for s in self.samples])
            ]
        )
        chosen = len(self.samples) / max(self.all, 1)
        return float(each.norm() / len(losses)) * math.sqrt(1 - chosen)

    @property
    def count(self) -> int:
        """The number of tokens that a loss is computed of."""
        return sum(s.trained for s in self.samples)


@dataclass
class Scores:
    """What a model computed.

    Attributes:
        losses: (N,) of each trained token, in nats.
        logits: (n, vocabulary) at the first of these tokens, as many as fit into 256 MB; and where
            there are no samples, at those of the prompts.
        answers: the tokens that the model continues each prompt with, greedily.
    """

    losses: Tensor
    logits: Tensor
    answers: list[list[int]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean per token."""
        return float(self.losses.double().mean())


@torch.no_grad()
def scores(logits_of: Logits, rows: HeldOut) -> Scores:
    """Compute losses and logits, row by row."""
    losses, kept, size = [], [], 0
    samples = rows.samples or [Sample(p, [IGNORED, *p[1:]]) for p in rows.prompts]
    for sample in samples:
        logits = logits_of(sample.input_ids)[:-1].float()
        labels = torch.tensor(sample.labels[1:], device=logits.device)
        logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
        losses.append(F.cross_entropy(logits, labels, reduction="none").cpu())
        if size < _KEPT_BYTES:
            kept.append(logits.cpu())
            size += kept[-1].nbytes
    return Scores(torch.cat(losses), torch.cat(kept))


def forward(model: Any) -> Logits:
    """The logits of a model of transformers for one row."""

    def logits(ids: list[int]) -> Tensor:
        result: Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        return result

    return logits


@torch.no_grad()
def answers(model: Any, rows: HeldOut) -> list[list[int]]:
    """The next 24 tokens of each prompt, the most likely one each time."""
    found = []
    for prompt in rows.prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None,
            top_p=None, top_k=None, max_new_tokens=_NEW, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


@dataclass(frozen=True)
class Distance:
    """How far the logits of one model are from another's, at the same tokens.

    Attributes:
        kl: mean divergence from the first model's distribution, in nats.
        largest: largest difference of two logits.
        same: share of tokens with the same most likely next one.
        tokens: number of tokens.
    """

    kl: float
    largest: float
    same: float
    tokens: int


def distance(one: Scores, other: Scores) -> Distance:
    """Compare ``other`` with ``one``, at the tokens of the smaller vocabulary."""
    width = min(one.logits.shape[-1], other.logits.shape[-1])
    kl, largest, same = 0.0, 0.0, 0
    for a, b in zip(one.logits.split(64), other.logits.split(64), strict=True):
        a, b = a[:, :width].double(), b[:, :width].double()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        largest = max(largest, float((a - b).abs().max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    count = len(one.logits)
    return Distance(max(kl / count, 0.0), largest, same / count, count)


def cost(one: Scores, other: Scores) -> tuple[float, float]:
    """By how much the loss of ``other`` is higher than that of ``one``, and its standard error."""
    differences = other.losses.double() - one.losses.double()
    error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else 0.0
    return float(differences.mean()), error
