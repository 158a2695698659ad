"""Where in a rendered conversation each turn stands, for templates without generation marks.

The turn of the assistant is what it has to write: what ``messages[:i+1]`` has and ``messages[:i]``
with the generation prompt has not. Rendering that for every message of every row would be quadratic
in the number of turns. So each sequence of roles is analysed once, with placeholders as contents:
that gives the literal text between the contents, and where turns begin and end in it. A row is then
rendered once. Literals and contents joined must give exactly that rendering, which proves the
places; where they do not (tool calls, contents that the template changes), the row itself is
analysed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from .template import Messages, Span, Template

_MOST = 4096
"""Sequences of roles that are remembered."""


@dataclass(frozen=True)
class Turn:
    """The place of one message in the rendered text, in characters.

    Attributes:
        begin: where its author takes over: for the assistant behind the generation prompt, for
            others where the content begins.
        end: where the next turn's header begins, or the text ends.
        content: the content alone, or None when it cannot be told.
    """

    begin: int
    end: int
    content: Span | None


@dataclass(frozen=True)
class _Skeleton:
    """A sequence of roles, rendered: ``literals[k]`` stands before the k-th content in the text.

    Attributes:
        order: the message whose content is the k-th in the text.
        literals: one more than contents.
        leads: by message, how far before its content the turn begins.
        tails: by message, how far behind its content the turn ends.
    """

    order: list[int]
    literals: list[str]
    leads: list[int]
    tails: list[int]

    def turns(self, contents: Sequence[str], text: str) -> list[Turn] | None:
        """The turns, if these contents between the literals are ``text``; else None."""
        pieces = [self.literals[0]]
        for k, message in enumerate(self.order):
            pieces += [contents[message], self.literals[k + 1]]
        if "".join(pieces) != text:
            return None
        turns: list[Any] = [None] * len(self.order)
        at = 0
        for k, message in enumerate(self.order):
            begin = at + len(self.literals[k])
            at = begin + len(contents[message])
            turns[message] = Turn(
                begin - self.leads[message], at + self.tails[message], (begin, at)
            )
        return turns


class Turns:
    """Finds turns.

    Args:
        template: the chat template, without marks.
        special: the texts of the tokenizer's special tokens.
    """

    def __init__(self, template: Template, special: Sequence[str]) -> None:
        self.template = template
        self.special = sorted((s for s in special if s), key=len, reverse=True)
        self._skeletons: dict[tuple[Any, ...], _Skeleton | None] = {}
        self._trim = (False, False)
        self._prompt: str | None = None

    def find(self, messages: Messages, tools: Any, text: str, where: str) -> list[Turn | None]:
        """The turn of every message.

        Args:
            messages: the conversation.
            tools: its tools, or None.
            text: the conversation as the template renders it.
            where: file and line, for the error.

        Returns:
            One turn per message; None for one that leaves no trace (a system message that the
            template merges or drops, for example).

        Raises:
            DataError: an answer cannot be told apart.
        """
        plain = all(
            len(m) == 2 and isinstance(m.get("content"), str) and "role" in m for m in messages
        )
        if plain:
            skeleton = self._skeleton(tuple(m["role"] for m in messages), tools)
            found = skeleton and self._match(skeleton, messages, text)
            if found:
                return list(found)
        return self._analyse(messages, tools, text, where)

    def _match(self, skeleton: _Skeleton, messages: Messages, text: str) -> list[Turn] | None:
        """Try the contents as they are and stripped, the way that fitted last first."""
        ways = [self._trim, (False, False), (True, True), (True, False), (False, True)]
        for way in dict.fromkeys(ways):
            contents = [
                m["content"].strip() if way[m["role"] == "assistant"] else m["content"]
                for m in messages
            ]
            found = skeleton.turns(contents, text)
            if found:
                self._trim = way
                return found
        return None

    # --- once per sequence of roles --------------------------------------------------------------

    def _skeleton(self, roles: tuple[str, ...], tools: Any) -> _Skeleton | None:
        key = (roles, json.dumps(tools) if tools else None)
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST:
                self._skeletons.clear()
            self._skeletons[key] = self._made(roles, tools)
        return self._skeletons[key]

    def _made(self, roles: tuple[str, ...], tools: Any) -> _Skeleton | None:
        probes = [f"\ue000{i}\ue001" for i in range(len(roles))]
        messages = [{"role": r, "content": p} for r, p in zip(roles, probes, strict=True)]
        try:
            text = self.template.render(messages, tools)
            if any(text.count(p) != 1 for p in probes):
                return None
            places = [text.index(p) for p in probes]
            turns = [
                self._assistant(messages, i, tools, text, "")
                if role == "assistant"
                else self._other(messages, i, tools, text)
                for i, role in enumerate(roles)
            ]
        except DataError:
            return None
        order = sorted(range(len(roles)), key=places.__getitem__)
        literals, at = [], 0
        for message in order:
            literals.append(text[at : places[message]])
            at = places[message] + len(probes[message])
        literals.append(text[at:])
        leads = [p - t[0] for p, t in zip(places, turns, strict=True)]
        tails = [t[1] - p - len(x) for p, t, x in zip(places, turns, probes, strict=True)]
        for k, message in enumerate(order):
            inside = 0 <= leads[message] <= len(literals[k])
            if not inside or not 0 <= tails[message] <= len(literals[k + 1]):
                return None
        return _Skeleton(order, literals, leads, tails)

    # --- a conversation itself -------------------------------------------------------------------

    def _analyse(self, messages: Messages, tools: Any, text: str, where: str) -> list[Turn | None]:
        turns: list[Turn | None] = []
        at = 0
        for i, message in enumerate(messages):
            content = message.get("content")
            stripped = content.strip() if isinstance(content, str) else ""
            if message["role"] == "assistant":
                begin, end = self._assistant(messages, i, tools, text, where)
                place = text.find(stripped, begin, end) if stripped else -1
                span = (place, place + len(stripped)) if place >= 0 else None
                turns.append(Turn(begin, end, span))
                at = end
                continue
            place = text.find(stripped, at) if stripped else -1
            if place < 0:
                turns.append(None)
                continue
            at = place + len(stripped)
            turns.append(Turn(place, self._through_special(text, at), (place, at)))
        return turns

    def _assistant(
        self, messages: Messages, i: int, tools: Any, text: str, where: str
    ) -> tuple[int, int]:
        """Where the turn of the assistant's message ``i`` begins and ends in ``text``."""
        begin = self._begin(messages, i, tools, text, where)
        if i + 1 == len(messages):
            return begin, len(text)
        through = self.template.render(messages[: i + 1], tools, where=where)
        if text.startswith(through) and len(through) >= begin:
            return begin, len(through)
        end = self._end(messages, i, text, begin, through)
        if end is None:
            raise self._hidden(i, where)
        return begin, end

    def _begin(self, messages: Messages, i: int, tools: Any, text: str, where: str) -> int:
        """Behind the generation prompt, or behind the part of it that the text shares."""
        if i == 0:
            prompt = self._shared_prompt()
            at = text.find(prompt) if prompt else -1
            return at + len(prompt) if at >= 0 else 0
        before = self.template.render(messages[:i], tools, prompt=True, where=where)
        if text.startswith(before):
            return len(before)
        plain = self.template.render(messages[:i], tools, where=where)
        shared = plain + self._shared_prompt()
        if before.startswith(plain) and text.startswith(shared):
            return len(shared)
        raise self._hidden(i, where)

    def _shared_prompt(self) -> str:
        """What the generation prompt and the header of a rendered answer have in common."""
        if self._prompt is None:
            ask = [{"role": "user", "content": "\ue000"}]
            answer = {"role": "assistant", "content": "\ue001"}
            try:
                plain = self.template.render(ask)
                before = self.template.render(ask, prompt=True)
                text = self.template.render([*ask, answer])
            except DataError:
                return ""
            if not (before.startswith(plain) and text.startswith(plain)):
                return ""
            self._prompt = before[len(plain) : _shared(before, text)]
        return self._prompt

    def _end(self, messages: Messages, i: int, text: str, begin: int, through: str) -> int | None:
        """The end of a turn that the template renders differently when it is the last one.

        What follows the content when the turn is the last, and what follows it here, share the end
        of the turn; a turn without content ends with the special token that ends it there.
        """
        content = messages[i].get("content")
        content = content.strip() if isinstance(content, str) else ""
        last = through.rfind(content) if content else -1
        if last >= 0:
            tail = through[last + len(content) :]
            place = text.find(content, begin)
            while place >= 0:  # a short answer may also stand in the template's own words
                behind = place + len(content)
                shared = _shared(tail, text[behind : behind + len(tail)])
                end = behind + shared if shared else self._through_special(text, behind)
                if end > behind:
                    return end
                place = text.find(content, place + 1)
            return None
        stop = max(self.special, key=lambda s: through.rfind(s), default="")
        at = text.find(stop, begin) if stop and stop in through else -1
        following = [m.get("content") for m in messages[i + 1 :]]
        if at < 0 or any(isinstance(c, str) and c and c in text[begin:at] for c in following):
            return None
        return at + len(stop)

    def _other(self, messages: Messages, i: int, tools: Any, text: str) -> tuple[int, int]:
        """The content of somebody else, with the token that ends the turn."""
        place = text.index(messages[i]["content"])
        behind = place + len(messages[i]["content"])
        return place, self._through_special(text, behind)

    def _through_special(self, text: str, at: int) -> int:
        """Behind the special token at ``at``, or ``at`` when there is none."""
        found = next((s for s in self.special if text.startswith(s, at)), "")
        return at + len(found)

    def _hidden(self, i: int, where: str) -> DataError:
        return DataError(
            f"{where}: the chat template changes earlier turns, so the answer in message {i + 1} "
            "cannot be told apart; mark it with {% generation %} in the template"
        )


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at the beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
