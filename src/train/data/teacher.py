"""The teacher's most likely tokens of a row: stored with the row, and laid out for a batch."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .sample import IGNORED, Sample

if TYPE_CHECKING:
    from torch import Tensor

IDS, LOGPROBS = "teacher_ids", "teacher_logprobs"
"""The names of the teacher's tensors in a batch."""


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The tokens that a teacher names for each trained token of a row, the most likely ones first.

    Attributes:
        ids: (N, K), int32; 0 where a token has fewer than K.
        logprobs: their log-probabilities at temperature 1, up to a constant for each trained token;
            (N, K), float32; -inf where a token has fewer than K.
    """

    ids: np.ndarray[Any, Any]
    logprobs: np.ndarray[Any, Any]

    @classmethod
    def of(cls, entries: Sequence[tuple[Sequence[int], Sequence[float]]]) -> TopTokens:
        """Build it from the tokens and log-probabilities of each trained token."""
        width = max(len(ids) for ids, _ in entries) if entries else 0
        top = cls(
            np.zeros((len(entries), width), np.int32),
            np.full((len(entries), width), -np.inf, np.float32),
        )
        for i, (ids, logprobs) in enumerate(entries):
            top.ids[i, : len(ids)], top.logprobs[i, : len(ids)] = ids, logprobs
        return top

    def text(self) -> str:
        """Serialize it for ``Sample.extra``."""
        parts = (base64.b64encode(a.tobytes()).decode("ascii") for a in (self.ids, self.logprobs))
        return json.dumps([self.ids.shape[1], *parts])

    @classmethod
    def read(cls, text: str) -> TopTokens:
        """Read what ``text`` wrote."""
        width, *parts = json.loads(text)
        ids, logprobs = map(base64.b64decode, parts)
        return cls(
            np.frombuffer(ids, np.int32).reshape(-1, width),
            np.frombuffer(logprobs, np.float32).reshape(-1, width),
        )


def with_teacher(batch: dict[str, Any], packs: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """A batch with the teacher's log-probabilities of its trained tokens.

    Beyond the rows of ``packs``, ``input_ids`` (B, T) may have further rows, without labels.

    Returns:
        The batch with ``IDS``, int64, and ``LOGPROBS`` (both B, T, K), each token's where its label
        is. The log-probabilities are the bits of float32 as int32: DeepSpeed rounds every float of
        a batch to the model's dtype.
    """
    import torch

    taught = [
        (row, places, TopTokens.read(sample.extra))
        for row, samples in enumerate(packs)
        for sample, places in zip(samples, _trained(samples), strict=True)
        if sample.extra
    ]
    shape = *batch["input_ids"].shape, max((top.ids.shape[1] for *_, top in taught), default=1)
    ids, logprobs = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
    for row, places, top in taught:
        width = top.ids.shape[1]  # a truncated sample has fewer places
        ids[row, places, :width] = top.ids[: len(places)]
        logprobs[row, places, :width] = top.logprobs[: len(places)]
    return {
        **batch, IDS: torch.from_numpy(ids), LOGPROBS: torch.from_numpy(logprobs.view(np.int32)),
    }  # fmt: skip


def take_teacher(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Take the teacher's tensors out of a batch: ids (B, T, K), and log-probabilities in fp32."""
    import torch

    return batch.pop(IDS), batch.pop(LOGPROBS).view(torch.float32)


def _trained(samples: Sequence[Sample]) -> list[list[int]]:
    places, begin = [], 0
    for sample in samples:
        places.append([begin + i for i, label in enumerate(sample.labels) if label != IGNORED])
        begin += len(sample.labels)
    return places
