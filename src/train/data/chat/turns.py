"""Where in a rendered conversation each turn stands, for templates without generation marks.

To render every part of every conversation would be quadratic in the number of turns. So each
sequence of roles is analysed once (``probe``), with placeholders as contents: that gives the
literal text between the contents, and where turns begin and end in it. A row is then rendered
once. Literals and contents joined must give exactly that rendering, which proves the places; where
they do not (tool calls, contents that the template changes), the row itself is analysed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import DataError
from .probe import Analysis, Turn
from .template import Messages, Template

_MOST = 4096
"""Sequences of roles that are remembered."""


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
        self.analysis = Analysis(template, special)
        self._skeletons: dict[tuple[Any, ...], _Skeleton | None] = {}
        self._trim = (False, False)

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
            DataError: an answer cannot be located.
        """
        plain = all(
            len(m) == 2 and isinstance(m.get("content"), str) and "role" in m for m in messages
        )
        if plain:
            skeleton = self._skeleton(tuple(m["role"] for m in messages), tools)
            found = skeleton and self._match(skeleton, messages, text)
            if found:
                return list(found)
        return self.analysis.turns(messages, tools, text, where)

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
                self.analysis.answer(messages, i, tools, text, "")
                if role == "assistant"
                else (place, self.analysis.through_special(text, place + len(probes[i])))
                for i, (role, place) in enumerate(zip(roles, places, strict=True))
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
