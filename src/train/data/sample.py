"""One row as tokens and labels: what every part of the data, and the run, speak of."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True)
class Sample:
    """One row as tokens.

    Attributes:
        input_ids: the tokens of the whole row.
        labels: the same where trained, ``IGNORED`` elsewhere (always so for the first token, which
            has nothing to be predicted from).
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)
