"""Limits for rows of preferences that are too long or empty, and their tokens as samples.

A sample is the tokens of the prompt and of the answers, one after the other. The labels say which
part a token is in: ``IGNORED`` in the prompt, ``GOOD`` in the better (or desirable) answer, ``BAD``
in the worse one. In rows of judged steps, the last token of each step has the label of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....errors import DataError
from ..readers.limits import Limits, Part
from ..sample import IGNORED

GOOD, BAD = 1, 0
"""The labels of answers."""


@dataclass(frozen=True)
class TokenizedAnswer:
    """The tokens of an answer, through its end token, and whether it is a good one."""

    ids: list[int]
    good: bool


@dataclass(frozen=True)
class TokenizedRow:
    """A row of preferences as tokens.

    Attributes:
        answers: the answers, the better one first.
        labels: the label of each token of the only answer, where each step of it has one.
        ends: the tokens that end the answers.
        empty: the prompt or an answer is empty.
        specials: the text of the user, or of the prompt, has special tokens in it.
        whole: the prompt must not be cut: some tokens belong to features, which would be left over.
        images: how many the prompt has.
    """

    where: str
    prompt: list[int]
    answers: tuple[TokenizedAnswer, ...] = ()
    labels: tuple[int, ...] | None = None
    ends: frozenset[int] = frozenset()
    empty: bool = False
    equal: bool = False
    specials: bool = False
    extra: str = ""
    whole: bool = False
    images: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest sequence: the prompt with an answer."""
        return len(self.prompt) + max((len(a.ids) for a in self.answers), default=0)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence."""
        return len(self.prompt) + min((len(a.ids) for a in self.answers), default=0)


def keep_answers(
    rows: Sequence[TokenizedRow], limits: Limits, prompt: int | None, answer: int | None = None
) -> Part:
    """Make samples of rows; raises a DataError for a long or empty one if ``excess`` is ``raise``.

    ``limits`` are for a prompt and an answer together; ``prompt`` and ``answer`` are the longest of
    each, in tokens, if any. Longer answers are cut.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    rows_within: list[TokenizedRow] = []
    for whole in rows:
        row = whole if answer is None else _cut_answers(whole, answer)
        if row.empty:
            counts["empty"] += 1
            first.setdefault("empty", row.where)
            if limits.excess == "raise":
                raise DataError(f"{row.where}: the prompt or an answer is empty: leave the row out")
            continue
        fitting = _fitted(row, limits, prompt, counts)
        if fitting is None:
            continue
        counts["too_long"] += fitting is row is not whole  # else it is counted
        if fitting.shortest < limits.shortest:
            counts["too_short"] += 1
        elif any(len(a.ids) == 0 for a in fitting.answers) or not _has_labels(fitting):
            counts["nothing_to_train"] += 1
        else:
            counts["truncated"] += fitting is not whole
            counts["images"] += fitting.images
            for key in _kinds(row, fitting):
                counts[key] += 1
                first.setdefault(key, row.where)
            rows_within.append(fitting)
    return replace(_laid_out(rows_within, counts, limits.watched), first=first)


def _kinds(row: TokenizedRow, fitting: TokenizedRow) -> Iterator[str]:
    """The counts of a row that is kept; ``fitting``: the row within the limits."""
    if row.specials:
        yield "special_tokens_in_text"
    if len(row.answers) == 2:
        yield "equal_answers" if row.equal or _same_tokens(fitting) else "different_answers"
    if len(row.answers) == 1 and row.labels is None:
        yield "desirable" if row.answers[0].good else "undesirable"


def _same_tokens(row: TokenizedRow) -> bool:
    return len(row.answers) == 2 and row.answers[0].ids == row.answers[1].ids


def _has_labels(row: TokenizedRow) -> bool:
    return row.labels is None or any(label != IGNORED for label in row.labels)


def _fitted(
    row: TokenizedRow, limits: Limits, prompt: int | None, counts: Counter[str]
) -> TokenizedRow | None:
    """The row within the limits; None: it is left out."""
    limit = limits.longest if prompt is None else min(prompt, limits.longest)
    if len(row.prompt) <= limit and row.length <= limits.longest:
        return row
    counts["too_long"] += 1
    if limits.excess == "raise":
        if len(row.prompt) > limit and limit != limits.longest:
            problem = f"the prompt has {len(row.prompt)} tokens, and max_prompt_len is {limit}"
        else:
            problem = f"{row.length} tokens, and sequence_len is {limits.longest}"
        raise DataError(f"{row.where}: {problem}")
    if limits.excess == "drop" or not row.answers:  # a prompt that is cut is another question
        return None
    begin = max(0, len(row.prompt) - limit)
    if row.whole and begin:
        return None
    cut = replace(row, prompt=row.prompt[begin:])  # the end of it has the question
    return _cut_answers(cut, limits.longest - len(cut.prompt))


def _cut_answers(row: TokenizedRow, most: int) -> TokenizedRow:
    if all(len(a.ids) <= most for a in row.answers):
        return row
    answers = tuple(replace(a, ids=a.ids[:most]) for a in row.answers)
    labels = row.labels[:most] if row.labels is not None else None
    return replace(row, answers=answers, labels=labels, ends=frozenset())  # they may be cut off


def _laid_out(rows: Sequence[TokenizedRow], counts: Counter[str], watched: frozenset[int]) -> Part:
    ids: list[int] = []
    labels: list[int] = []
    lengths = []
    ends: set[int] = set()
    trained: set[int] = set()
    for row in rows:
        begin = len(ids)
        ids += row.prompt
        labels += [IGNORED] * len(row.prompt)
        for answer in row.answers:
            ids += answer.ids
            judged = [GOOD if answer.good else BAD] * len(answer.ids)
            labels += judged if row.labels is None else row.labels
            trained |= {token for token in row.ends | watched if token in answer.ids}
        ends |= row.ends
        lengths.append(len(ids) - begin)
    extra = [row.extra for row in rows] if any(row.extra for row in rows) else []
    return Part(
        np.array(ids, np.int32), np.array(labels, np.int32), np.array(lengths, np.int32),
        counts, ends, trained, extra,
    )  # fmt: skip
