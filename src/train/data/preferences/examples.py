"""Prepared rows of preferences for trainers, by TRL's names for their parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ...recipe.preferences import RowKind
from ..sample import IGNORED, Sample
from .limits import GOOD

Example = dict[str, Any]
"""The parts of a row, by name."""


class Examples(Sequence[Example]):
    """Samples as examples, which are made as they are read.

    ``pairs`` have ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; ``labelled`` rows have
    ``prompt_ids``, ``completion_ids`` and ``label``; ``prompts`` have ``prompt``, ``prompt_ids``
    and the other fields of the rows; ``steps`` have ``input_ids`` and ``labels``. With ``whole``,
    the answers of pairs begin with the prompt, as reward models read them, and there are no
    ``prompt_ids``.

    With ``pictures``, pairs and labelled rows also have ``pictures``: those of the prompt, as
    ``Sample.extra``. TRL would open what is named ``images``.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        rows: RowKind,
        whole: bool = False,
        pictures: bool = False,
    ) -> None:
        self.samples, self.rows, self.whole, self.pictures = samples, rows, whole, pictures

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self.samples[index], self.rows, self.whole, self.pictures)
        sample = self.samples[index]
        if self.rows == "steps":
            return {"input_ids": sample.input_ids, "labels": sample.labels}
        if self.rows == "prompts":
            extra = json.loads(sample.extra)
            columns = {name: extra["columns"].get(name) for name in self.columns}
            return {**columns, "prompt": extra["prompt"], "prompt_ids": sample.input_ids}
        example = self._answers(sample)
        return {**example, "pictures": sample.extra} if self.pictures else example

    @cached_property
    def columns(self) -> list[str]:
        """The other fields that any row has."""
        if self.rows != "prompts":
            return []
        extras = (json.loads(sample.extra)["columns"] for sample in self.samples)
        return list(dict.fromkeys(name for columns in extras for name in columns))

    def _answers(self, sample: Sample) -> Example:
        ids, labels = sample.input_ids, sample.labels
        begin = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
        prompt, answers, judged = ids[:begin], ids[begin:], labels[begin:]
        if self.rows == "labelled":
            good = judged[0] == GOOD
            return {"prompt_ids": prompt, "completion_ids": answers, "label": good}
        count = sum(label == GOOD for label in judged)
        chosen, rejected = answers[:count], answers[count:]
        if self.whole:
            return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
