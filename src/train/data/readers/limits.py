"""Rows that are too long, too short, or have nothing to train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ....errors import DataError
from ..sample import IGNORED, Tokens

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Limits:
    """Which samples are kept.

    Attributes:
        excess: what happens to longer ones: ``drop``, ``truncate`` or ``raise``.
        watched: tokens to record in ``Part.trained``.
        blank: tokens that are whitespace alone.
    """

    longest: int
    shortest: int = 2
    excess: str = "drop"
    watched: frozenset[int] = frozenset()
    blank: frozenset[int] = frozenset()


@dataclass
class Part:
    """Samples, one after the other, and counts of what was left out.

    Attributes:
        ids: their tokens; int32 (T,).
        labels: their labels; int32 (T,).
        lengths: tokens of each; int32 (N,).
        counts: ``rows``, ``too_long`` (also those that were ``truncated``), ``too_short``,
            ``nothing_to_train``, ``only_ends``, ``special_tokens_in_text``, ``images``.
        ends: tokens that end a trained turn of these rows.
        trained: those of ``ends`` and of the watched tokens that are trained at least once.
        first: file and line of the first row of some of the counts.
    """

    ids: Array
    labels: Array
    lengths: Array
    counts: Counter[str] = field(default_factory=Counter)
    ends: set[int] = field(default_factory=set)
    trained: set[int] = field(default_factory=set)
    extra: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)


def warnings(counts: Mapping[str, int], first: Mapping[str, str] | None = None) -> list[str]:
    """Messages about rows that are odd though trained, or left out; ``first`` is as in ``Part``."""
    lines = []
    for key, (one, several) in _ODD.items():
        number, where = counts.get(key, 0), (first or {}).get(key)
        if number:
            at = f" ({where if number == 1 else f'the first is {where}'})" if where else ""
            lines.append(f"warning: {one if number == 1 else f'{number:,} {several}'}{at}")
    lost, rows = counts.get("too_long", 0) - counts.get("truncated", 0), counts.get("rows", 0)
    if lost > rows * _MANY:
        lines.append(
            f"warning: {lost:,} of {rows:,} rows are left out for their length (sequence_len, "
            "excess_length_strategy; of preferences, max_prompt_len)"
        )
    good, bad = (counts.get(key, 0) for key in ("desirable", "undesirable"))
    if bool(good) != bool(bad):
        kind = "desirable" if good else "undesirable"
        lines.append(f"warning: all {good + bad:,} answers are {kind}: KTO compares both kinds")
    return lines


def require_contrast(counts: Mapping[str, int], first: Mapping[str, str]) -> None:
    """Raise a DataError if all pairs are equal, or KTO has only one kind of answers.

    ``first`` is empty for older caches.
    """
    equal = counts.get("equal_answers", 0)
    if "equal_answers" in first and not counts.get("different_answers"):
        raise DataError(
            f"{first['equal_answers']}: the chosen and the rejected answer are the same here, and "
            f"in all {equal:,} rows: nothing can be learnt from them; see which fields have the "
            "answers (field_chosen, field_rejected), and whether sequence_len or max_prompt_len "
            "cuts the difference off"
        )
    good, bad = (counts.get(key, 0) for key in ("desirable", "undesirable"))
    if bool(good) != bool(bad):
        kind, other = ("desirable", "false") if good else ("undesirable", "true")
        at = f"{first[kind]}: " if kind in first else ""
        raise DataError(
            f"{at}this answer and all others of {good + bad:,} are {kind}, and KTO learns from "
            f"both kinds: add rows whose label is {other}"
        )


def nothing_left(counts: Mapping[str, int], limits: Limits) -> str:
    """Why no row of a dataset is left, and what to do."""
    longer = "raise sequence_len, or set excess_length_strategy: truncate"
    if limits.excess == "truncate":  # which has cut all others
        longer = (
            "raise sequence_len: what is trained comes behind the cut (rows with images are not "
            "cut: lower image_max_pixels)"
        )
    reasons = [
        (f"{counts[key]:,} {words}", todo)
        for key, words, todo in (
            ("too_long", f"are longer than {limits.longest} tokens (sequence_len)", longer),
            ("too_short", f"are shorter than {limits.shortest} tokens (min_sample_len)",
             "lower min_sample_len"),
            ("nothing_to_train", "have nothing to train",
             "see with preprocess --debug which tokens the keys of the dataset leave out"),
            ("empty", "have an empty prompt or answer",
             "name the fields that have the texts (field_messages, field_chosen, field_rejected)"),
        )
        if counts.get(key)
    ]  # fmt: skip
    why, todo = ", ".join(r for r, _ in reasons), "; ".join(t for _, t in reasons)
    return f"no row is left to train on: of {counts['rows']:,}, {why}; {todo}"


_MANY = 0.1
"""Of the rows: where more are too long, it is said apart, and not in the line of counts alone."""

_SPECIAL = (
    "special tokens in user, tool or prompt text, where they can end or begin a turn; preprocess "
    "--debug shows them"
)
_EQUAL = "the same text as chosen and as rejected answer, from which nothing is learnt"
_EMPTY = "an empty prompt or answer and"
_ENDS = (
    "only the token that ends an answer to train, or whitespace and that: the answers have no "
    "text, and the model learns to say nothing"
)
_ODD = {
    "special_tokens_in_text": (f"1 row has {_SPECIAL}", f"rows have {_SPECIAL}"),
    "only_ends": (f"1 row has {_ENDS}", f"rows have {_ENDS}"),
    "equal_answers": (f"1 row has {_EQUAL}", f"rows have {_EQUAL}"),
    "empty": (f"1 row has {_EMPTY} is left out", f"rows have {_EMPTY} are left out"),
}
"""The message for one such row, and for several."""


def keep(rows: Sequence[Tokens], limits: Limits) -> Part:
    """Make samples of rows; raises a DataError if one is too long, and ``excess`` is ``raise``."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    selected: list[tuple[Tokens, int]] = []
    for row in rows:
        _count("special_tokens_in_text", row.specials, row, counts, first)
        length = len(row.ids)
        if length > limits.longest:
            counts["too_long"] += 1
            if limits.excess == "raise":
                raise DataError(
                    f"{row.where}: {length} tokens, and sequence_len is {limits.longest}"
                )
            if limits.excess == "drop" or row.whole:
                continue
            length = limits.longest
        if length < limits.shortest:
            counts["too_short"] += 1
        elif any(max(a, 1) < min(b, length) for a, b in row.spans):  # the first is never trained
            counts["truncated"] += length < len(row.ids)
            counts["images"] += row.images
            silent = length == len(row.ids) and says_nothing(row, limits.blank)
            _count("only_ends", silent, row, counts, first)
            selected.append((row, length))
        else:
            counts["nothing_to_train"] += 1
    return replace(_laid_out(selected, counts, limits.watched), first=first)


def _count(
    key: str, applies: bool, row: Tokens, counts: Counter[str], first: dict[str, str]
) -> None:
    if applies:
        counts[key] += 1
        first.setdefault(key, row.where)


def says_nothing(row: Tokens, blank: frozenset[int]) -> bool:
    """Whether the answers of a row have no text: what is trained ends a turn, or is blank."""
    if not row.spans or not row.spans[0][0]:  # nothing is trained, or a text without a question
        return False
    trained = (row.ids[i] for a, b in row.spans for i in range(a, b))
    return all(token in row.ends or token in blank for token in trained)


def blank_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens that are whitespace alone, in the spellings of vocabularies."""
    vocabulary = tokenizer.get_vocab().items()
    return frozenset(i for token, i in vocabulary if token in _BYTES or not token.strip(_BLANK))


_BLANK = " \t\n\r\u00a0\u2581\u0120\u010a\u0109\u010d"
"""Whitespace, SentencePiece's mark of a space, and byte-level BPE's space, newline, tab, return."""

_BYTES = ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>")
"""The same as SentencePiece spells bytes that are in no token."""


def _laid_out(
    pairs: Sequence[tuple[Tokens, int]], counts: Counter[str], watched: frozenset[int]
) -> Part:
    lengths = np.fromiter((length for _, length in pairs), np.int32, len(pairs))
    ids = np.empty(int(lengths.sum(dtype=np.int64)), np.int32)
    labels = np.full_like(ids, IGNORED)
    begin = 0
    ends: set[int] = set()
    for row, length in pairs:
        ids[begin : begin + length] = row.ids[:length]
        for first, end in row.spans:
            first, end = begin + max(first, 1), begin + min(end, length)
            labels[first:end] = ids[first:end]
        ends |= row.ends if length == len(row.ids) else frozenset()  # else it may be cut off
        begin += length
    trained = {token for token in ends | watched if bool((labels == token).any())}
    extra = [row.extra for row, _ in pairs] if any(row.extra for row, _ in pairs) else []
    return Part(ids, labels, lengths, counts, ends, trained, extra)
