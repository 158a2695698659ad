"""Masks by offsets alone: turns and tokens that are made up."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from fusewright.errors import DataError
from fusewright.train.data.chat.mask import Masker, Rules
from fusewright.train.data.chat.probe import Turn
from fusewright.train.data.chat.template import Chat

EOT, EOS, WORD = 5, 7, 20
ANSWER = [{"role": "assistant", "content": "abc"}]


class _Tokenizer:
    """Two special tokens; the end of a turn comes before the end of a sequence."""

    eos_token_id = EOS
    added_tokens_decoder = {i: SimpleNamespace(special=True) for i in (EOT, EOS)}  # noqa: RUF012

    def __init__(self, trims: bool = False) -> None:
        made = json.dumps({"post_processor": {"trim_offsets": trims}})
        self.backend_tokenizer = SimpleNamespace(to_str=lambda: made)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [EOT]}


class _Encoding:
    """Tokens by the characters that they hold."""

    def __init__(self, *tokens: tuple[int, int, int]) -> None:
        self.ids = [i for i, _, _ in tokens]
        self.places = [(begin, end) for _, begin, end in tokens]

    def token_to_chars(self, i: int) -> tuple[int, int]:
        return self.places[i]

    def char_to_token(self, at: int) -> int | None:
        return next((i for i, (a, b) in enumerate(self.places) if a <= at < b), None)


def _spans(
    turn: Turn, *tokens: tuple[int, int, int], trims: bool = False, train: Any = None, **rules: Any
) -> list[tuple[int, int]]:
    """What is trained of one answer."""
    masker = Masker(_Tokenizer(trims), Rules(eot_tokens=("<|eot|>",), **rules))
    text = "abcdefgh"[: tokens[-1][2]]
    chat = Chat("file, line 1", ANSWER, train=None if train is None else [train])
    return masker.mask(chat, text, [(0, turn)], _Encoding(*tokens)).spans


def _ended(end: int) -> tuple[tuple[int, int, int], ...]:
    return (WORD, 0, 2), (WORD, 2, 3), (end, 3, 4), (WORD, 4, 5)


@pytest.mark.parametrize(
    ("eos", "eot", "end", "spans"),
    [
        ("none", "turn", EOT, [(0, 3)]),
        ("turn", "none", EOT, [(0, 2)]),
        ("none", "turn", EOS, [(0, 2)]),
        ("turn", "none", EOS, [(0, 3)]),
    ],
)
def test_each_end_has_a_rule_of_its_own(
    eos: str, eot: str, end: int, spans: list[tuple[int, int]]
) -> None:
    assert _spans(Turn(0, 4, (0, 3)), *_ended(end), eos=eos, eot=eot) == spans


def test_a_turn_without_a_token_trains_nothing_that_follows() -> None:
    assert _spans(Turn(3, 3, None), *_ended(EOT)) == []


def test_a_turn_up_to_the_end_of_the_text() -> None:
    tokens = (WORD, 0, 2), (WORD, 2, 3), (EOT, 3, 4)
    assert _spans(Turn(2, 4, (2, 3)), *tokens) == [(1, 3)]
    assert _spans(Turn(0, 3, (0, 3)), *tokens) == [(0, 3)]  # a mark that leaves the end out


def test_a_token_that_begins_before_the_turn_is_not_part_of_it() -> None:
    for trims in (False, True):
        assert _spans(Turn(1, 4, (1, 3)), *_ended(EOT), trims=trims) == [(1, 3)]
        assert _spans(Turn(0, 4, (0, 3)), *_ended(EOT), trims=trims) == [(0, 3)]
        # both bytes of one character lie before it
        halves = (WORD, 0, 3), (WORD, 3, 4), (WORD, 3, 4), (WORD, 4, 5), (EOT, 5, 6)
        assert _spans(Turn(4, 6, (4, 5)), *halves, trims=trims) == [(3, 5)]
        assert _spans(Turn(3, 6, (3, 5)), *halves, trims=trims) == [(1, 5)]


def test_spaces_that_no_token_claims_belong_to_the_next() -> None:
    gap = (WORD, 0, 2), (WORD, 3, 5), (EOT, 5, 6)
    assert _spans(Turn(2, 6, (3, 5)), *gap, trims=True) == [(1, 3)]
    assert _spans(Turn(3, 6, (3, 5)), *gap, trims=True) == [(2, 3)]
    assert _spans(Turn(3, 6, (3, 5)), *gap) == [(1, 3)]


def test_characters_that_are_trained() -> None:
    tokens = (WORD, 0, 1), (WORD, 1, 2), (WORD, 2, 3), (EOT, 3, 4)

    def spans(*ranges: tuple[int, int, bool], content: tuple[int, int] | None = (0, 3)) -> Any:
        keys = ("begin_offset", "end_offset", "train")
        train = [dict(zip(keys, r, strict=True)) for r in ranges]
        return _spans(Turn(0, 4, content), *tokens, train=train)

    assert spans((0, 0, True)) == [(0, 1), (3, 4)]
    assert spans((1, 2, True)) == [(1, 4)]
    assert spans((0, 1, True), (2, 2, False)) == [(0, 2), (3, 4)]
    for content in (None, (1, 3)):
        with pytest.raises(DataError, match="line 1: message 1 says which characters are trained"):
            spans((0, 0, True), content=content)
