"""Rows that are left out for their length, or have answers without text, are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusewright.train.data import prepare
from fusewright.train.data.readers.limits import Limits, blank_tokens, keep, warnings
from fusewright.train.data.sample import Tokens
from fusewright.train.recipe.recipe import Dataset, Recipe

from ..conftest import chat, make_tokenizer, write_rows


@pytest.mark.parametrize("excess", ["drop", "truncate"])
def test_many_rows_that_are_too_long_are_said(excess: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["short"] * 8 + ["a long text " * 40] * 2
    write_rows(path, [chat("How is the weather?", text) for text in texts])
    dataset = Dataset(path=str(path))
    for length, said in ((128, excess == "drop"), (4096, False)):
        recipe = Recipe(
            base_model="x", datasets=[dataset], sequence_len=length, excess_length_strategy=excess
        )
        lines = warnings(prepare(recipe, make_tokenizer()).counts)
        assert any("2 of 10 rows are left out for their length" in line for line in lines) == said


def test_rows_that_a_cut_leaves_without_an_answer_are_left_out_for_their_length() -> None:
    rows = [Tokens("f", list(range(60)), [(50, 60)]) for _ in range(9)]
    part = keep([*rows, Tokens("f", [1, 2, 3], [(1, 3)])], Limits(40, excess="truncate"))
    (line,) = warnings({**part.counts, "rows": 10})
    assert line.startswith("warning: 9 of 10 rows are left out for their length")


@pytest.mark.parametrize(
    ("ids", "spans", "said"),
    [
        ([5, 5, 9, 2], [(2, 4)], True),
        ([5, 5, 2], [(2, 3)], True),
        ([5, 5, 6, 2], [(2, 4)], False),
        ([5, 5, 2], [], False),  # nothing is trained: that is said otherwise
        ([5, 2], [(0, 2)], False),  # the last piece of a text: its first token is never trained
        ([5, 5, 9, *[6] * 40, 2], [(2, 44)], False),  # cut behind the blank
    ],
)
def test_what_has_no_text(ids: list[int], spans: list[tuple[int, int]], said: bool) -> None:
    row, limits = Tokens("f", ids, spans, frozenset({2})), Limits(3 if len(ids) > 9 else 9)
    part = keep([row], replace(limits, excess="truncate", blank=frozenset({9})))
    assert bool(part.counts["only_ends"]) == said


@pytest.mark.parametrize("token", ["\u2581", "\u0120\u010a", "<0x0A>", "\n\t"])
def test_blank_tokens(token: str) -> None:
    vocabulary = {token: 3, "a": 1, "\u0120a": 2, "<0x41>": 4}
    assert blank_tokens(SimpleNamespace(get_vocab=lambda: vocabulary)) == {3}
