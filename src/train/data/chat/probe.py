"""Finds the turns of one conversation by rendering parts of it.

The turn of the assistant is what it has to write: what ``messages[:i+1]`` has and ``messages[:i]``
with the generation prompt has not. Templates that render earlier turns differently (they drop
thoughts, or end the last turn with another token) need more: a mark in every message, rendered
once, tells how far each reaches, and the token that ends turns is looked for behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import DataError
from .template import Messages, Span, Template, texts_of

_MARK = re.compile("\ue010(\\d+)\ue011")
_USER = {"role": "user", "content": "\ue000"}
_ANSWER = {"role": "assistant", "content": "\ue001"}


@dataclass(frozen=True)
class Turn:
    """The place of one message in the rendered text, in characters.

    Attributes:
        begin: where its author takes over: for the assistant behind the generation prompt, for
            others where the content begins.
        end: where the next turn's header begins, or the text ends.
        content: the content alone, or None when it is not known.
    """

    begin: int
    end: int
    content: Span | None


@dataclass(frozen=True)
class _Habits:
    """What a template writes around an answer.

    Attributes:
        prompts: the common parts of a generation prompt and the header of a rendered answer,
            longest first: it may differ between the last answer and earlier ones.
        stops: special tokens that directly follow an answer.
    """

    prompts: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


class Analysis:
    """Analyses conversations; ``special`` are the texts of the tokenizer's special tokens."""

    def __init__(self, template: Template, special: Sequence[str]) -> None:
        self.template = template
        self.special = sorted((s for s in special if s), key=len, reverse=True)
        self._known: _Habits | None = None
        self._last: tuple[str, list[int | None] | None] = ("", None)

    def turns(self, messages: Messages, tools: Any, text: str, where: str) -> list[Turn | None]:
        """The turn of every message; None for one that leaves no trace.

        ``where`` is file and line, for the DataError that an answer cannot be located.
        """
        turns: list[Turn | None] = []
        at = 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                begin, end = self.answer(messages, i, tools, text, where)
                turns.append(Turn(begin, end, _found(message, text, begin, end)))
                at = end
                continue
            content = _found(message, text, at, len(text))
            if content is None:
                turns.append(None)
                continue
            at = content[1]
            turns.append(Turn(content[0], self.through_special(text, at), content))
        return turns

    def answer(
        self, messages: Messages, i: int, tools: Any, text: str, where: str
    ) -> tuple[int, int]:
        """The range of the assistant's message ``i``; raises a DataError if it is not found."""
        begin = self._begin(messages, i, tools, text, where)
        last = i + 1 == len(messages)
        through = text if last else self.template.render(messages[: i + 1], tools, where=where)
        if begin is not None and begin <= len(through) and text.startswith(through):
            return begin, len(through)
        marked = self._marked(messages, i, tools, text, begin, through)
        if marked is None:
            raise DataError(
                f"{where}: the chat template changes earlier turns, so the answer in message "
                f"{i + 1} cannot be located; mark it with {{% generation %}} in the template"
            )
        return marked

    def through_special(self, text: str, at: int) -> int:
        """The end of the special token at ``at``, or ``at`` when there is none."""
        return at + len(self._special_at(text, at))

    def _begin(self, messages: Messages, i: int, tools: Any, text: str, where: str) -> int | None:
        """Behind the generation prompt, or behind the part of it that the text shares."""
        if i == 0:
            places = [(text.find(p), p) for p in self._habits().prompts]
            return next((at + len(p) for at, p in places if at >= 0), 0)
        before = self.template.render(messages[:i], tools, prompt=True, where=where)
        if text.startswith(before):
            return len(before)
        plain = self.template.render(messages[:i], tools, where=where)
        base = before[: self._shared(before, plain)]
        for prompt in self._habits().prompts:
            if text.startswith(base + prompt):
                return len(base + prompt)
        return None

    def _marked(
        self, messages: Messages, i: int, tools: Any, text: str, begin: int | None, through: str
    ) -> tuple[int, int] | None:
        """The turn, by marks; what ends ``through``, where it is the last turn, may end it here."""
        if self._last[0] != text:  # the same for all answers of a conversation
            self._last = (text, self._marks(messages, tools, text))
        marks = self._last[1]
        inside = begin if marks is None or marks[i] is None else marks[i]
        if marks is None or inside is None:
            return None
        before = max((m for m in marks[:i] if m is not None), default=0)
        if begin is None:
            begin = self._behind(messages, i, tools, text, marks)
        if begin is None:
            for prompt in self._habits().prompts:
                at = text.find(prompt, before, inside)
                if at >= 0:
                    begin = at + len(prompt)
                    break
        limit = min((m for m in marks[i + 1 :] if m is not None), default=len(text))
        end_token = next((s for s in self.special if through.rstrip().endswith(s)), "")
        stop_tokens = {end_token, *self._habits().stops} - {""}
        stops = [(text.find(s, inside, limit), s) for s in stop_tokens]
        stop = min(((at, s) for at, s in stops if at >= 0), default=None)
        if begin is None or stop is None:
            return None
        return begin, stop[0] + len(stop[1])

    def _behind(
        self, messages: Messages, i: int, tools: Any, text: str, marks: list[int | None]
    ) -> int | None:
        """The end of what a generation prompt adds to the message before, if the text has it."""
        mark = marks[i - 1] if i else None
        if mark is None:
            return None
        question = [*messages[: i - 1], _with_mark(messages[i - 1], "\ue010\ue011")]
        tail = self.template.render(question, tools, prompt=True).rpartition("\ue010\ue011")[2]
        return mark + len(tail) if tail and text.startswith(tail, mark) else None

    def _marks(self, messages: Messages, tools: Any, text: str) -> list[int | None] | None:
        """A place inside each message's turn; None if marks change what the template does."""
        marked = [_with_mark(m, f"\ue010{i}\ue011") for i, m in enumerate(messages)]
        try:
            rendered = self.template.render(marked, tools)
        except DataError:
            return None
        if _MARK.sub("", rendered) != text:
            return None
        marks: list[int | None] = [None] * len(messages)
        gone = 0
        for sign in _MARK.finditer(rendered):
            i = int(sign[1])
            if marks[i] is None:  # a name may come again, with the result of its call
                marks[i] = sign.start() - gone
            gone += len(sign[0])
        return marks

    def _habits(self) -> _Habits:
        if self._known is None:
            try:
                self._known = self._learned()
            except DataError:
                self._known = _Habits()
        return self._known

    def _learned(self) -> _Habits:
        plain = self.template.render([_USER])
        before = self.template.render([_USER], prompt=True)
        base = self._shared(before, plain)
        prompts: set[str] = set()
        stops: set[str] = set()
        for messages in ([_USER, _ANSWER], [_USER, _ANSWER, _USER]):
            text = self.template.render(messages)
            prompts.add(before[base : self._shared(before, text)])
            at = text.find(_ANSWER["content"]) + 1
            while at and at < len(text) and text[at].isspace():
                at += 1
            if at:
                stops.add(self._special_at(text, at))
        ordered = sorted(prompts - {""}, key=len, reverse=True)
        return _Habits(tuple(ordered), tuple(stops - {""}))

    def _shared(self, a: str, b: str) -> int:
        """The length of the common prefix, without a part of a special token."""
        pairs = enumerate(zip(a, b, strict=False))
        end = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
        for token in self.special:
            at = a.find(token, max(0, end - len(token) + 1), end + len(token))
            if 0 <= at < end < at + len(token):
                return at
        return end

    def _special_at(self, text: str, at: int) -> str:
        return next((s for s in self.special if text.startswith(s, at)), "")


def _found(message: dict[str, Any], text: str, begin: int, end: int) -> Span | None:
    """The place of a message's content, from its first text to its last; None: it is not there."""
    first, at = None, begin
    for part in texts_of(message):
        place = text.find(part, at, end)
        if place < 0:
            return None
        first = place if first is None else first
        at = place + len(part)
    return None if first is None else (first, at)


def _with_mark(message: dict[str, Any], sign: str) -> dict[str, Any]:
    """The message with a sign at the end of its text, and in the name of its last call.

    An empty content stays empty, and space at the end stays there, because templates look at both.
    """
    marked = dict(message)
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str):
        marked["content"] = _signed(content, sign)
    elif content:
        texts = [k for k, part in enumerate(content) if (part.get("text") or "").strip()]
        marked["content"] = [
            {**part, "text": _signed(part["text"], sign)} if k in texts[-1:] else part
            for k, part in enumerate(content)
        ]
    if calls and isinstance(calls[-1].get("function", calls[-1]).get("name"), str):
        last = calls[-1]
        function = {**last.get("function", last)}
        function["name"] += sign
        last = {**last, "function": function} if "function" in last else function
        marked["tool_calls"] = [*calls[:-1], last]
    return marked


def _signed(text: str, sign: str) -> str:
    bare = text.rstrip()
    return bare + sign + text[len(bare) :] if bare else text
