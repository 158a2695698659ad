"""Which tokens of a rendered conversation are trained, by their offsets in the text."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import DataError, RecipeError
from ..sample import Tokens, joined
from .probe import Turn
from .template import Chat, Detail, Span

Placed = tuple[int | None, Turn | None]
"""A turn and its message; None for one that is trained whoever wrote it."""


@dataclass(frozen=True)
class Rules:
    """What is trained in a conversation.

    Attributes:
        eos: which of the tokenizer's ends of sequence: those of trained ``turn``s, ``all``, only
            the ``last`` of a conversation, or ``none``.
        eot: the same for other tokens that end a turn.
        eot_tokens: the tokens that end a turn, in addition to the template's.
    """

    roles: frozenset[str] = frozenset({"assistant"})
    eos: str = "turn"
    eot: str = "turn"
    eot_tokens: tuple[str, ...] = ()
    everything: bool = False


class Masker:
    """Matches turns with tokens; raises a RecipeError if one of ``eot_tokens`` is not one token."""

    def __init__(self, tokenizer: Any, rules: Rules) -> None:
        self.rules = rules
        added = tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special}
        self.eos = tokenizer.eos_token_id
        self.eot = {_one_token(tokenizer, token) for token in rules.eot_tokens}
        after = json.loads(tokenizer.backend_tokenizer.to_str()).get("post_processor")
        self.loose = {rules.eos, rules.eot} & {"all", "last"}
        self.trims = '"trim_offsets": true' in json.dumps(after)

    def mask(self, chat: Chat, text: str, turns: list[Placed], encoding: Any) -> Tokens:
        """The tokens of a rendered conversation, and which are trained.

        Raises a DataError if the details of a message do not fit its characters.
        """
        ids: list[int] = encoding.ids
        if self.rules.everything:
            return Tokens(chat.where, ids, [(0, len(ids))])
        begin_of = self._begins(encoding)
        spans: list[Span] = []
        ends: set[int] = set()
        for i, turn in turns:
            trained = i is None or self._trained(chat, i)
            if turn is None or not trained:
                continue
            first, stop = self._tokens(turn, text, ids, encoding, begin_of)
            ended = stop > first and ids[stop - 1] in self.special
            end = stop - 1 if ended else _next_special(ids, stop, self.special)
            if end is not None:
                ends.add(ids[end])
            last = stop - 1 if ended else stop
            if i is None or trained is True:
                spans.append((first, last))
            else:
                begins = {k: begin_of(k) for k in range(first, last)}
                spans += _detailed(chat, i, turn, trained, begins, text)
            if ended and self._policy(ids[last]) in ("turn", "all"):
                spans.append((last, stop))
        if self.loose:
            spans += self._loose_ends(ids)
        return Tokens(chat.where, ids, joined(spans), frozenset(ends))

    def only_answers(self, chat: Chat) -> bool:
        """Whether only the assistant's messages are trained in a conversation."""
        if self.rules.roles != {"assistant"}:
            return False
        pairs = zip(chat.messages, chat.train or (), strict=False)
        return not any(flag and message["role"] != "assistant" for message, flag in pairs)

    def _trained(self, chat: Chat, i: int) -> bool | list[Detail]:
        flag = chat.train[i] if chat.train is not None else None
        return chat.messages[i]["role"] in self.rules.roles if flag is None else flag

    def _policy(self, token: int) -> str:
        return self.rules.eos if token == self.eos else self.rules.eot

    def _loose_ends(self, ids: list[int]) -> Iterable[Span]:
        for policy, tokens in (
            (self.rules.eos, {self.eos}),
            (self.rules.eot, self.eot - {self.eos}),
        ):
            if policy not in ("all", "last"):
                continue
            places = [i for i, t in enumerate(ids) if t in tokens]
            yield from ((i, i + 1) for i in (places if policy == "all" else places[-1:]))

    def _begins(self, encoding: Any) -> Callable[[int], int]:
        """Says where a token begins, in characters; one by one, because few are asked for."""
        chars = encoding.token_to_chars
        if not self.trims:
            return lambda i: int(chars(i)[0])
        return lambda i: int(min(chars(i)[0], chars(i - 1)[1])) if i else 0

    def _first(self, at: int, count: int, encoding: Any, begin_of: Callable[[int], int]) -> int:
        token = None if self.trims else encoding.char_to_token(at)
        if token is None:  # a character that belongs to no token, or perhaps to another one
            return bisect_left(range(count), at, key=begin_of)
        return int(token) if begin_of(token) >= at else int(token) + 1

    def _tokens(
        self, turn: Turn, text: str, ids: list[int], encoding: Any, begin_of: Callable[[int], int]
    ) -> Span:
        """The tokens that begin inside a turn, through the one that ends it."""
        first = self._first(turn.begin, len(ids), encoding, begin_of)
        stop = len(ids)
        if turn.end < len(text):
            stop = self._first(turn.end, len(ids), encoding, begin_of)
        if first >= stop:
            return first, first
        end = stop - 1
        while end > first and ids[end] not in self.special:
            if text[begin_of(end) : encoding.token_to_chars(end)[1]].strip():
                break
            end -= 1
        if (
            ids[end] in self.special
        ):  # the line break after the end of the turn belongs to no message
            return first, end + 1
        if stop < len(ids) and ids[stop] in self.special:  # marks that leave the end out
            stop += 1
        return first, stop


def _one_token(tokenizer: Any, token: str) -> int:
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise RecipeError(
            f"eot_tokens: {token!r} is {len(ids)} tokens for this tokenizer, not one; add it with "
            f"tokens: [{token!r}], or name another"
        )
    return ids[0]


def _next_special(ids: list[int], start: int, special: set[int]) -> int | None:
    return next((i for i in range(start, len(ids)) if ids[i] in special), None)


def _detailed(
    chat: Chat, i: int, turn: Turn, details: list[Detail], begins: Mapping[int, int], text: str
) -> list[Span]:
    """The tokens of a content that begin in a trained range of its characters."""
    content = chat.messages[i]["content"]
    if not isinstance(content, str):
        raise DataError(
            f"{chat.where}: message {i + 1} says which characters are trained, and has images in "
            "its text: train all of it, or nothing"
        )
    bare = content.strip()  # some templates strip it
    place = text.find(bare, *turn.content) if turn.content and bare else -1
    if place < 0:
        raise DataError(
            f"{chat.where}: message {i + 1} says which characters are trained, but its content "
            "cannot be found in what the chat template makes of it"
        )
    place -= len(content) - len(content.lstrip())
    trained = [(d["begin_offset"] + place, d["end_offset"] + place) for d in details if d["train"]]
    return [(k, k + 1) for k, begin in begins.items() if any(a <= begin <= b for a, b in trained)]
