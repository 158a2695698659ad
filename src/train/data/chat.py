"""From conversations to tokens, with exact masks.

A token is trained when the assistant has to write it: its answer and the token that ends its turn.
Nothing before the answer (the system text, the question, the header of the turn) and nothing after
the end of the turn (templates put a line break there) is.

Each conversation is rendered once and tokenized once, together with many others; tokens are matched
with turns by their offsets in the text, never by tokenizing a part of it again. Where turns are is
told by the template's own ``{% generation %}`` marks (``template``) or found (``turns``).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ...errors import DataError, RecipeError
from .template import Messages, Span, Template
from .turns import Turn, Turns

Detail = Mapping[str, Any]
"""``begin_offset``, ``end_offset`` (both inside) and ``train``, in characters of a content."""


Placed = tuple[int | None, Turn | None]
"""A turn and its message; None for one that is trained whosever it is."""


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        where: file and line, for messages.
        messages: ``{"role": ..., "content": ...}`` in order.
        tools: the functions that the assistant may call, as JSON schemas, or None.
        train: by message: whether it is trained, which of its characters are, or None: as its role.
    """

    where: str
    messages: Messages
    tools: Any = None
    train: Sequence[bool | list[Detail] | None] | None = None


@dataclass(frozen=True)
class Tokens:
    """A row as tokens.

    Attributes:
        where: file and line.
        ids: the tokens.
        spans: what is trained, as (first, behind the last), in order.
        ends: the special tokens that end the trained turns, trained or not.
    """

    where: str
    ids: list[int]
    spans: list[Span]
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Rules:
    """What is trained in a conversation.

    Attributes:
        roles: the roles whose turns are trained.
        eos: which of the tokenizer's ends of sequence: those of trained ``turn``s, ``all``, only
            the ``last`` of a conversation, or ``none``.
        eot: the same for other tokens that end a turn.
        eot_tokens: the tokens that end a turn, besides those that the template puts there.
        everything: train every token.
    """

    roles: frozenset[str] = frozenset({"assistant"})
    eos: str = "turn"
    eot: str = "turn"
    eot_tokens: tuple[str, ...] = ()
    everything: bool = False


@dataclass
class ChatEncoder:
    """Renders, tokenizes and masks conversations.

    Args:
        tokenizer: a fast tokenizer.
        source: the chat template; None for the tokenizer's own.
        rules: what is trained.
        variables: what the template may read besides the messages and the special tokens.

    Raises:
        RecipeError: there is no chat template, the tokenizer cannot tell where its tokens came
            from, or one of ``eot_tokens`` is not one token.
    """

    tokenizer: Any
    source: Any = None
    rules: Rules = field(default_factory=Rules)
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = self.source or getattr(self.tokenizer, "chat_template", None)
        if not source:
            raise RecipeError(
                "the tokenizer of base_model has no chat template; name one with chat_template, "
                "for example chat_template: chatml"
            )
        if not self.tokenizer.is_fast:
            raise RecipeError(
                "the tokenizer of base_model is not a fast one: its tokens cannot be traced to the "
                "text"
            )
        texts = source if isinstance(source, dict) else {"default": source}
        if "default" not in texts:
            raise RecipeError(
                "the tokenizer has several chat templates and no default; name one with "
                "chat_template"
            )
        added = self.tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special}
        names = [str(added[i]) for i in self.special]
        self.templates = {
            name: Template(text, {**self.tokenizer.special_tokens_map, **self.variables})
            for name, text in texts.items()
        }
        self.turns = {name: Turns(t, names) for name, t in self.templates.items()}
        self.eos = self.tokenizer.eos_token_id
        self.eot = {one_token(self.tokenizer, t, "eot_tokens") for t in self.rules.eot_tokens}
        self.trims = '"trim_offsets":true' in post_processor(self.tokenizer)

    def encode(self, chats: Sequence[Chat]) -> list[Tokens]:
        """Encode conversations.

        Raises:
            DataError: the template refuses a conversation, or hides where an answer begins.
        """
        texts, turns = [], []
        for _, group in groupby(chats, lambda chat: json.dumps(chat.tools)):
            more, found = self._rendered(list(group))
            texts += more
            turns += found
        encodings = tokenize(self.tokenizer, texts)
        return [
            self._masked(chat, text, places, encoding)
            for chat, text, places, encoding in zip(chats, texts, turns, encodings, strict=True)
        ]

    def _rendered(self, chats: list[Chat]) -> tuple[list[str], list[list[Placed]]]:
        """The texts and turns of conversations with the same tools."""
        tools = chats[0].tools
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        template = self.templates[name]
        texts, marks = template.render_all(
            [c.messages for c in chats], tools, [c.where for c in chats]
        )
        if self.rules.everything:
            return texts, [[] for _ in chats]
        if marks is not None and self.rules.roles == {"assistant"}:
            return texts, [_assigned(c, m) for c, m in zip(chats, marks, strict=True)]
        find = self.turns[name].find
        pairs = zip(chats, texts, strict=True)
        return texts, [list(enumerate(find(c.messages, tools, text, c.where))) for c, text in pairs]

    def _masked(self, chat: Chat, text: str, turns: list[Placed], encoding: Any) -> Tokens:
        ids: list[int] = encoding.ids
        if self.rules.everything:
            return Tokens(chat.where, ids, [(0, len(ids))])
        begin_of = self._begins(encoding)
        spans: list[Span] = []
        ends: set[int] = set()
        for i, turn in turns:
            wanted = i is None or self._wanted(chat, i)
            if turn is None or not wanted:
                continue
            first, behind = self._tokens(turn, text, ids, encoding, begin_of)
            ended = behind > first and ids[behind - 1] in self.special
            end = behind - 1 if ended else _next_special(ids, behind, self.special)
            if end is not None:
                ends.add(ids[end])
            last = behind - 1 if ended else behind
            if i is None or wanted is True:
                spans.append((first, last))
            else:
                begins = {k: begin_of(k) for k in range(first, last)}
                spans += _detailed(chat, i, turn, wanted, begins, text)
            if ended and self._policy(ids[last]) in ("turn", "all"):
                spans.append((last, behind))
        spans += self._loose_ends(ids)
        return Tokens(chat.where, ids, _joined(spans), frozenset(ends))

    def _wanted(self, chat: Chat, i: int) -> bool | list[Detail]:
        """Whether message ``i`` is trained, or which characters of it."""
        flag = chat.train[i] if chat.train is not None else None
        return chat.messages[i]["role"] in self.rules.roles if flag is None else flag

    def _policy(self, token: int) -> str:
        return self.rules.eos if token == self.eos else self.rules.eot

    def _loose_ends(self, ids: list[int]) -> Iterable[Span]:
        """The ends of turns that are trained whoever's turn it is."""
        for policy, tokens in (
            (self.rules.eos, {self.eos}),
            (self.rules.eot, self.eot - {self.eos}),
        ):
            if policy not in ("all", "last"):
                continue
            places = [i for i, t in enumerate(ids) if t in tokens]
            yield from ((i, i + 1) for i in (places if policy == "all" else places[-1:]))

    def _begins(self, encoding: Any) -> Callable[[int], int]:
        """Says where a token begins, in characters; one by one, for few are asked for.

        Some tokenizers leave spaces out of the offsets; they belong to the token behind them.
        """
        chars = encoding.token_to_chars
        if not self.trims:
            return lambda i: int(chars(i)[0])
        return lambda i: int(min(chars(i)[0], chars(i - 1)[1])) if i else 0

    def _tokens(
        self, turn: Turn, text: str, ids: list[int], encoding: Any, begin_of: Callable[[int], int]
    ) -> Span:
        """The tokens of a turn, with the token that ends it and without what follows that.

        A token that begins before the turn is not part of it, even if it reaches into it.
        """
        every = range(len(ids))
        first = bisect_left(every, turn.begin, key=begin_of)
        behind = bisect_left(every, turn.end, lo=first, key=begin_of)
        if first >= behind:
            return first, first
        end = behind - 1
        while end > first and ids[end] not in self.special:
            if text[begin_of(end) : encoding.token_to_chars(end)[1]].strip():
                break
            end -= 1
        if ids[end] in self.special:  # the line break after the end of the turn is nobody's
            return first, end + 1
        if behind < len(ids) and ids[behind] in self.special:  # marks that leave the end out
            behind += 1
        return first, behind


def tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    """The encodings (``ids``, ``offsets``) of texts that hold their special tokens already."""
    if not texts:
        return []
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    encodings: list[Any] = batch.encodings
    return encodings


def one_token(tokenizer: Any, token: str, key: str) -> int:
    """The id of a token that the recipe names.

    Raises:
        RecipeError: the tokenizer has no such token.
    """
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise RecipeError(
            f"{key}: {token!r} is {len(ids)} tokens for this tokenizer, not one; add it with "
            f"tokens: [{token!r}], or name another"
        )
    return ids[0]


def post_processor(tokenizer: Any) -> str:
    """What the tokenizer does after tokenizing, as JSON without spaces."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(state.get("post_processor"), separators=(",", ":"))


def _assigned(chat: Chat, marks: list[Span]) -> list[Placed]:
    """Give the spans that the template marks to the assistant's messages."""
    answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    flags = [chat.train[i] for i in answers] if chat.train is not None else []
    if all(flag in (None, True) for flag in flags):  # whose is whose does not matter
        return [(None, Turn(*mark, None)) for mark in marks]
    if len(marks) != len(answers):
        raise DataError(
            f"{chat.where}: the chat template marks {len(marks)} answers and the conversation has "
            f"{len(answers)}, so that the messages' own training flags cannot be followed"
        )
    return [(i, Turn(*mark, mark)) for i, mark in zip(answers, marks, strict=True)]


def _next_special(ids: list[int], start: int, special: set[int]) -> int | None:
    return next((i for i in range(start, len(ids)) if ids[i] in special), None)


def _joined(spans: list[Span]) -> list[Span]:
    """Spans in order, overlapping and touching ones as one, empty ones left out."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _detailed(
    chat: Chat, i: int, turn: Turn, details: list[Detail], begins: Mapping[int, int], text: str
) -> list[Span]:
    """The tokens of a content that begin in a trained range of its characters."""
    if turn.content is None:
        raise DataError(
            f"{chat.where}: message {i + 1} says which characters are trained, but its content "
            "cannot be found in what the chat template makes of it"
        )
    content, place = chat.messages[i]["content"], turn.content[0]
    if not text.startswith(content, place):  # the template strips it
        place -= len(content) - len(content.lstrip())
    trained = [(d["begin_offset"] + place, d["end_offset"] + place) for d in details if d["train"]]
    return [(k, k + 1) for k, begin in begins.items() if any(a <= begin <= b for a, b in trained)]
