"""Leaving out samples that are equal to an earlier one."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from .limits import Part


class Duplicates:
    """Remembers samples by a hash of their tokens and labels: 16 bytes each."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def without(self, part: Part) -> Part:
        """The samples that are new, with ``duplicates`` counted."""
        ends = np.cumsum(part.lengths, dtype=np.int64)
        new = np.zeros(len(part.lengths), bool)
        for i, (end, length) in enumerate(zip(ends.tolist(), part.lengths.tolist(), strict=True)):
            begin = end - length
            key = hashlib.blake2b(part.ids[begin:end].tobytes(), digest_size=16)
            key.update(part.labels[begin:end].tobytes())
            key.update(part.extra[i].encode() if part.extra else b"")
            new[i] = key.digest() not in self._seen
            self._seen.add(key.digest())
        counts = part.counts.copy()
        counts["duplicates"] = int((~new).sum())
        tokens = np.repeat(new, part.lengths)
        return replace(
            part,
            ids=part.ids[tokens],
            labels=part.labels[tokens],
            lengths=part.lengths[new],
            extra=[text for text, kept in zip(part.extra, new, strict=False) if kept],
            counts=counts,
        )
