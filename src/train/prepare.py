"""The rows of a recipe as sequences to train and to validate on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from ..errors import DataError
from .chat import Sample, encode
from .data import Chat, read_chats, split
from .packing import Pack, count, pack
from .recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """Rows ready to train on.

    Attributes:
        train: the sequences.
        validation: the same by the name of the dataset.
        counts: of rows, samples, sequences, tokens, and of what was left out.
        fingerprint: changes when the samples do.
    """

    train: list[Pack]
    validation: dict[str, list[Pack]]
    counts: dict[str, int]
    fingerprint: str


def prepare(recipe: Recipe, tokenizer: Any, console: Console) -> Prepared:
    """Read, render, tokenize, mask, split and pack.

    Raises:
        DataError: a dataset cannot be used.
    """
    parts = split(read_chats(recipe.datasets), recipe.val_set_size, recipe.seed)
    counts = {"rows": sum(map(len, parts)), "too_long": 0, "nothing_to_train": 0}
    kept = [
        _kept(part, encode(part, tokenizer, recipe.train_on_inputs), recipe, counts)
        for part in parts
    ]
    if not kept[0]:
        raise DataError("no row is left to train on: all are too long or have nothing to train")
    made = [pack(s, recipe.sequence_len) if recipe.packs() else [[x] for x in s] for s in kept]
    for name, samples, packs in zip(("train", "validation"), kept, made, strict=True):
        counts[f"{name}_samples"], counts[f"{name}_sequences"] = len(samples), len(packs)
        counts[f"{name}_tokens"], counts[f"{name}_trained_tokens"] = count(packs)
    content = json.dumps([[asdict(s) for s in part] for part in kept]).encode()
    validation = {"validation": made[1]} if made[1] else {}
    return Prepared(made[0], validation, counts, hashlib.sha256(content).hexdigest())


def _kept(
    chats: Sequence[Chat], samples: list[Sample], recipe: Recipe, counts: dict[str, int]
) -> list[Sample]:
    """The samples that can be trained on, by the recipe's rule for long ones."""
    limit, kept = recipe.sequence_len, []
    for chat, sample in zip(chats, samples, strict=True):
        if len(sample.input_ids) > limit:
            if recipe.excess_length_strategy == "raise":
                raise DataError(
                    f"{chat.where}: {len(sample.input_ids)} tokens, and sequence_len is {limit}"
                )
            counts["too_long"] += 1
            if recipe.excess_length_strategy == "drop":
                continue
            sample = Sample(sample.input_ids[:limit], sample.labels[:limit])
        if sample.trained:
            kept.append(sample)
        else:
            counts["nothing_to_train"] += 1
    return kept
