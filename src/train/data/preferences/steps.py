"""Rows of the type ``stepwise_supervised``: an answer in steps, each with a label."""

from __future__ import annotations

from typing import Any

from ....errors import DataError
from ...recipe.recipe import Dataset
from ..formats.fields import fields_of, kind
from .rows import JudgedSteps, part_of, text_of_part


class StepReader:
    """Reads a prompt, the steps of an answer to it, and the label of each.

    Args:
        dataset: what separates steps, and which of them are trained.
        classes: how many labels there are, from 0.
    """

    def __init__(self, dataset: Dataset, classes: int) -> None:
        separator = dataset.step_separator
        self.separator = "\n" if separator is None else separator
        self.last_only, self.classes = bool(dataset.train_on_last_step_only), classes

    def read(self, row: Any, where: str) -> JudgedSteps:
        """The steps of a row, each with the separator behind it."""
        row = fields_of(row, where, "completions")
        prompt = text_of_part(row, "prompt", where, "write messages as one text")
        steps, labels = part_of(row, "completions", where), part_of(row, "labels", where)
        for name, value in (("completions", steps), ("labels", labels)):
            if not isinstance(value, list) or not value:
                said = "an empty list" if value == [] else kind(value)
                raise DataError(
                    f"{where}: the field {name!r} must be a list with an item for each step, not "
                    f"{said}; split an answer into its steps, or leave the row out"
                )
        if len(steps) != len(labels):
            raise DataError(
                f"{where}: there are {len(steps)} 'completions' and {len(labels)} 'labels'; each "
                "step needs one label: add those that are missing, or leave the row out"
            )
        for i, step in enumerate(steps, start=1):
            if not isinstance(step, str):
                raise DataError(
                    f"{where}: step {i} in 'completions' must be text, not {kind(step)}"
                )
        classes = [self._class(label, i, where) for i, label in enumerate(labels, start=1)]
        known = [
            None if self.last_only and i < len(classes) - 1 else c for i, c in enumerate(classes)
        ]
        return JudgedSteps(where, prompt, tuple(s + self.separator for s in steps), tuple(known))

    def _class(self, label: Any, i: int, where: str) -> int:
        if isinstance(label, int) and 0 <= int(label) < self.classes:
            return int(label)
        wanted = "true or false" if self.classes == 2 else f"a number from 0 to {self.classes - 1}"
        said = repr(label) if isinstance(label, int | float) else kind(label)
        raise DataError(
            f"{where}: label {i} in 'labels' must be {wanted}, not {said}; convert ratings first"
        )
