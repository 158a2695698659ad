"""Prepared rows as datasets for TRL's trainers, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..data import IGNORED
from ..data.images.features import Featurizer
from ..data.preferences.examples import Example, Examples
from ..data.sample import Sample

_CHUNK = 1_000
"""Rows that are turned into columns at a time."""

_TYPES = {list: pa.list_(pa.int32()), bool: pa.bool_(), str: pa.string()}
"""The types of columns."""

FILLS = "fills"
"""Marks an example that only fills the batch of a process."""

FEATURE = "image."
"""Begins the names of features in batches of which TRL passes only tokens to the model."""


def as_dataset(
    examples: Examples,
    change: Callable[[Sequence[Example]], list[Example]] = list,
    size: int = _CHUNK,
) -> Dataset:
    """The examples as a dataset in memory, with their columns.

    ``change`` is called with ``size`` examples at a time, and returns the same number.
    """
    columns: dict[str, list[pa.Array]] = {}
    for start in range(0, len(examples), size):
        rows = change([examples[i] for i in range(start, min(start + size, len(examples)))])
        for name in rows[0]:
            values = [row[name] for row in rows]
            kind = _TYPES[type(values[0])]
            columns.setdefault(name, []).append(pa.array(values, type=kind))
    table = pa.table({name: pa.chunked_array(parts) for name, parts in columns.items()})
    return PreparedDataset(table)


class PreparedDataset(Dataset):  # type: ignore[misc]  # 2026-11-27: datasets has no types
    """Tokenized rows, for which a trainer's preparation does nothing."""

    def map(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The rows as they are; functions that add figures to them are applied."""
        if kwargs.get("cache_file_name") is None:
            return self
        return super().map(function, *args, **kwargs)


def tokens_of(example: Example) -> int:
    """Tokens of an example's prompt and of all its answers."""
    return sum(len(value) for name, value in example.items() if name.endswith("_ids"))


class PromptDataset(Dataset):  # type: ignore[misc]  # 2026-11-27: datasets has no types
    """Prompts with the other fields of their rows, which are read on demand.

    The fields may hold anything that JSON does; as columns they would all need one type each.
    """

    def __init__(self, examples: Examples) -> None:
        super().__init__(pa.table({"row": pa.array(range(len(examples)))}))
        self.examples = examples

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """The rows of a batch."""
        return [self.examples[i] for i in indices]


class FillableExamples(Sequence[Example]):
    """Examples by index; those by an inverted index (``~i``) count for nothing."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if index >= 0:
            return self.examples[index]
        return {**self.examples[~index], FILLS: True}


def blank(batch: dict[str, Any]) -> None:
    """Make a batch count for nothing."""
    batch["trained"] = 0


@dataclass(frozen=True)
class Counted:
    """Batches of ``collate``, with the counts ``tokens`` and ``trained``.

    Attributes:
        tokens: the masks of all tokens.
        trained: the masks of those that the loss is of.
    """

    collate: Callable[[Sequence[Example]], dict[str, Any]]
    tokens: tuple[str, ...] = ("attention_mask",)
    trained: tuple[str, ...] = ("completion_mask",)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch; of an example that only fills it, both counts are 0."""
        batch = self.collate(examples)
        fills = any(FILLS in example for example in examples)
        tokens = sum(int(batch[name].sum()) for name in self.tokens)
        trained = sum(int(batch[name].sum()) for name in self.trained)
        return {**batch, "tokens": 0 if fills else tokens, "trained": 0 if fills else trained}


def image_features(
    featurizer: Featurizer | None, examples: Sequence[Mapping[str, Any]], width: int, times: int
) -> dict[str, Tensor]:
    """The features of the images in prompts, by the names of the model's arguments.

    Those of tokens are (rows, ``width``), with zeros for the answers. A batch has the prompts so
    many ``times``, all of them one after the other.
    """
    if featurizer is None:
        return {}
    prompts = [[Sample(e["prompt_ids"], [], e.get("pictures", ""))] for e in examples]
    once = {"input_ids": torch.empty(len(prompts), width)}
    features = featurizer.features(prompts, once, whole=False)
    return {name: torch.cat([value] * times) for name, value in features.items()}


@dataclass(frozen=True)
class WithImages:
    """Adds the features of images to batches whose other tensors TRL passes to the model."""

    collate: Callable[[Sequence[Example]], dict[str, Any]]
    featurizer: Featurizer | None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch with them; those of tokens for KTO's mismatched answers, too."""
        batch = self.collate(examples)
        rows, width = batch["input_ids"].shape
        features = image_features(self.featurizer, examples, width, rows // len(examples))
        if (others := batch.get("KL_input_ids")) is not None:
            for name in features.keys() & {"token_type_ids", "mm_token_type_ids"}:  # as TRL has it
                features[f"KL_{name}"] = F.pad(features[name], (0, others.shape[1] - width))
        return {**batch, **features}


def features_in(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The features of images whose names in a batch begin with ``FEATURE``, by those after it."""
    names = [name for name in batch if name.startswith(FEATURE)]
    return {name.removeprefix(FEATURE): batch[name] for name in names}


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows as one int64 tensor, (rows, longest), padded with ``value`` on the right."""
    return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)


@dataclass(frozen=True)
class SeparateAnswers:
    """Batches for TRL's trainers of ORPO and CPO, with a tensor for each kind of answer.

    They have ``chosen_input_ids``, ``chosen_attention_mask`` and ``chosen_labels``, and the same
    for ``rejected`` and, without labels, for ``prompt``; and features of images, for both answers,
    by names that begin with ``FEATURE``.
    """

    pad_id: int
    featurizer: Featurizer | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The tensors of a batch."""
        prompts = [example["prompt_ids"] for example in examples]
        batch = dict(self._part("prompt", prompts))
        for name in ("chosen", "rejected"):
            answers = [example[f"{name}_ids"] for example in examples]
            pairs = list(zip(prompts, answers, strict=True))
            batch |= self._part(name, [[*prompt, *answer] for prompt, answer in pairs])
            labels = [[IGNORED] * len(prompt) + list(answer) for prompt, answer in pairs]
            batch[f"{name}_labels"] = padded(labels, IGNORED)
        width = max(batch[f"{name}_labels"].shape[1] for name in ("chosen", "rejected"))
        features = image_features(self.featurizer, examples, width, 2)
        return batch | {f"{FEATURE}{name}": value for name, value in features.items()}

    def _part(self, name: str, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}_input_ids", padded(rows, self.pad_id)
        yield f"{name}_attention_mask", padded([[1] * len(row) for row in rows], 0)


@dataclass(frozen=True)
class JudgedStepBatches:
    """Makes batches of answers whose steps are judged at their last tokens."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``, ``label_mask``; each (rows, longest)."""
        ids = [example["input_ids"] for example in examples]
        labels = padded([example["labels"] for example in examples], IGNORED)
        return {
            "input_ids": padded(ids, self.pad_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": labels,
            "label_mask": labels != IGNORED,
        }


@dataclass(frozen=True)
class MismatchedAnswers:
    """Adds the mismatched pairs of KTO: prompts with the answers to other prompts of their batch.

    Its estimate of the divergence from the reference model is made of such pairs (Ethayarajh et
    al. 2024, section 4): each prompt with the answer before its own, in ``KL_completion_ids``.
    """

    collate: Callable[[Sequence[Example]], dict[str, Any]]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch with those pairs."""
        return self.collate(mismatched(examples))


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """Examples with the answer before their own as ``KL_completion_ids``, unless they have one.

    The first one gets the last one's.
    """
    answers = [example["completion_ids"] for example in examples]
    others = [answers[-1], *answers[:-1]]
    return [{"KL_completion_ids": a, **e} for e, a in zip(examples, others, strict=True)]
