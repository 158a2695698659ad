"""From conversations to tokens, with exact masks.

A token is trained when the assistant has to write it: its answer and the token that ends its turn.
Nothing before the answer (the system text, the question, the header of the turn) and nothing after
the end of the turn (templates put a line break there) is.

Each conversation is rendered once and tokenized once, together with many others; tokens are matched
with turns by their offsets in the text, never by tokenizing a part of it again. Turns come from the
template's own ``{% generation %}`` marks (``template``), or are found by ``Turns``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from ....errors import DataError, RecipeError
from ..images.expansion import Expanded, Expander
from ..images.features import written
from ..sample import Tokens, without
from .lost_features import THOUGHTS, Features
from .mask import Masker, Placed, Rules
from .probe import Analysis, Turn
from .template import Chat, Messages, Span, Template, texts_of


@dataclass
class ChatEncoder:
    """Renders, tokenizes and masks conversations.

    Args:
        source: the chat template; None for the tokenizer's own.
        variables: what the template may read besides the messages and the special tokens.
        day: the date for a template that asks for it; None: today's.
        expander: places images; None: there may be none.

    Raises:
        RecipeError: there is no chat template, the tokenizer has no offsets, or one of
            ``eot_tokens`` is not one token.
    """

    tokenizer: Any
    source: Any = None
    rules: Rules = field(default_factory=Rules)
    variables: Mapping[str, Any] = field(default_factory=dict)
    day: str | None = None
    thinking: str = THOUGHTS[0]
    expander: Expander | None = None

    def __post_init__(self) -> None:
        source = self.source or getattr(self.tokenizer, "chat_template", None)
        if not source:
            raise RecipeError(
                "the tokenizer of base_model has no chat template; name one with chat_template, "
                "for example chat_template: chatml"
            )
        if not self.tokenizer.is_fast:
            raise RecipeError(
                "the tokenizer of base_model is not a fast one: its tokens cannot be mapped to "
                "characters"
            )
        texts = source if isinstance(source, dict) else {"default": source}
        if "default" not in texts:
            raise RecipeError(
                "the tokenizer has several chat templates but no default; name one with "
                "chat_template"
            )
        added = self.tokenizer.added_tokens_decoder
        names = [str(token) for token in added.values() if token.special]
        self.templates = {
            name: Template(text, {**self.tokenizer.special_tokens_map, **self.variables}, self.day)
            for name, text in texts.items()
        }
        self.turns = {name: Turns(t, names) for name, t in self.templates.items()}
        self.features = {name: Features(t, self.thinking) for name, t in self.templates.items()}
        self.marks = ("", "")
        if self.expander is not None:
            self.marks = self.templates["default"].around_image(self.expander.token)
        self.special = one_of(names)
        self.masker = Masker(self.tokenizer, self.rules)

    def encode(self, chats: Sequence[Chat]) -> list[Tokens]:
        """Encode conversations.

        Raises:
            DataError: the template refuses a conversation, leaves a part of it out, or hides where
                an answer begins.
        """
        texts, turns = [], []
        for _, group in groupby(chats, lambda chat: json.dumps(chat.tools)):
            more, places_of = self._rendered(list(group))
            texts += more
            turns += places_of
        shown = [self._expanded(chat, text) for chat, text in zip(chats, texts, strict=True)]
        full = [text if e is None else e.text for e, text in zip(shown, texts, strict=True)]
        samples = []
        for k, encoding in enumerate(tokenize(self.tokenizer, full)):
            chat, expanded, places = chats[k], shown[k], turns[k]
            if expanded is not None:
                places = [(i, turn and _moved(turn, expanded)) for i, turn in places]
            tokens = self._flagged(chat, self.masker.mask(chat, full[k], places, encoding))
            images = [] if expanded is None else standing_for(expanded, encoding, self.marks)
            if self.expander is not None:
                self.expander.require_text(tokens.ids, images, chat.where)
            if images:
                extra = written(texts[k], chat.pictures, chat.where)
                spans = without(tokens.spans, images)
                tokens = replace(
                    tokens, spans=spans, extra=extra, whole=True, images=len(chat.pictures)
                )
            samples.append(tokens)
        return samples

    def _expanded(self, chat: Chat, text: str) -> Expanded | None:
        """The text with its placeholders of images replaced; None: it has no images."""
        if self.expander is None or not chat.pictures:
            return None
        return self.expander.expand(text, chat.pictures, chat.where)

    def question(self, chat: Chat) -> list[int]:
        """The tokens of a conversation, up to where the assistant's next answer begins.

        Raises a DataError if the template refuses the conversation.
        """
        name = "tool_use" if chat.tools and "tool_use" in self.templates else "default"
        self.features[name].require(chat)
        text = self.templates[name].render(chat.messages, chat.tools, True, chat.where)
        ids: list[int] = tokenize(self.tokenizer, [text])[0].ids
        return ids

    def has_special(self, chat: Chat) -> bool:
        """Whether anyone but the assistant writes special tokens."""
        if self.special is None:
            return False
        others = (m for m in chat.messages if m["role"] != "assistant")
        return any(self.special.search(text) for message in others for text in texts_of(message))

    def _flagged(self, chat: Chat, tokens: Tokens) -> Tokens:
        return replace(tokens, specials=True) if self.has_special(chat) else tokens

    def _rendered(self, chats: list[Chat]) -> tuple[list[str], list[list[Placed]]]:
        tools = chats[0].tools
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        template = self.templates[name]
        for chat in chats:
            self.features[name].require(chat)
        texts, marks = template.render_all(
            [c.messages for c in chats], tools, [c.where for c in chats]
        )
        if self.rules.everything:
            return texts, [[] for _ in chats]
        find = self.turns[name].find
        turns: list[list[Placed]] = []
        for i, (chat, text) in enumerate(zip(chats, texts, strict=True)):
            if marks is not None and self.masker.only_answers(chat):
                turns.append(_assigned(chat, marks[i]))
            else:
                turns.append(list(enumerate(find(chat.messages, tools, text, chat.where))))
        return texts, turns


def one_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern for one of ``tokens``; None: there are none."""
    return re.compile("|".join(map(re.escape, filter(None, tokens)))) if any(tokens) else None


def tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    """The encodings (``ids``, ``offsets``) of texts that already contain their special tokens."""
    if not texts:
        return []
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    encodings: list[Any] = batch.encodings
    return encodings


def _moved(turn: Turn, expanded: Expanded) -> Turn:
    """A turn's place in the expanded text."""
    content = turn.content and (expanded.place(turn.content[0]), expanded.place(turn.content[1]))
    return Turn(expanded.place(turn.begin), expanded.place(turn.end), content)


def standing_for(
    expanded: Expanded, encoding: Any, marks: tuple[str, str] = ("", "")
) -> list[Span]:
    """The tokens that stand for images, and those that have a character in common with one.

    ``marks`` are what the chat template writes for an image before and behind.
    """
    before, behind = marks
    text = expanded.text

    def token(places: Iterable[int]) -> int:
        """That of the first of the characters that is part of one."""
        return next(int(t) for at in places if (t := encoding.char_to_token(at)) is not None)

    spans = []
    for begin, end in expanded.spans:
        begin -= len(before) * text.endswith(before, 0, begin)
        end += len(behind) * text.startswith(behind, end)
        spans.append((token(range(begin, end)), token(range(end - 1, begin - 1, -1)) + 1))
    return spans


def _assigned(chat: Chat, marks: list[Span]) -> list[Placed]:
    """Give the spans that the template marks to the assistant's messages."""
    answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    flags = [chat.train[i] for i in answers] if chat.train is not None else []
    if all(flag in (None, True) for flag in flags):  # whose is whose does not matter
        return [(None, Turn(*mark, None)) for mark in marks]
    if len(marks) != len(answers):
        raise DataError(
            f"{chat.where}: the chat template marks {len(marks)} answers and the conversation has "
            f"{len(answers)}, so training flags of messages cannot be applied"
        )
    return [(i, Turn(*mark, mark)) for i, mark in zip(answers, marks, strict=True)]


# --- turns in a rendered conversation ------------------------------------------------------------

# Rendering each part of each conversation would be quadratic in the number of turns. So a sequence
# of roles is analysed once (``probe``), with placeholders as contents, for the literal text between
# the contents, and where turns begin and end in it. A row is rendered once: literals and contents
# joined must give exactly that, which proves the places. Where they do not (tool calls, contents
# that the template changes), the row itself is analysed.


_MOST = 4096
"""Sequences of roles that are remembered."""


@dataclass(frozen=True)
class _Skeleton:
    """A sequence of roles, rendered: ``literals[k]`` is the text before the k-th content.

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
    """Finds turns; ``template`` is without marks, ``special`` the texts of the special tokens."""

    def __init__(self, template: Template, special: Sequence[str]) -> None:
        self.template = template
        self.analysis = Analysis(template, special)
        self._skeletons: dict[tuple[Any, ...], _Skeleton | None] = {}
        self._trim = (False, False)

    def find(self, messages: Messages, tools: Any, text: str, where: str) -> list[Turn | None]:
        """The turn of every message; ``where`` is file and line, for the error.

        It is None for a message that leaves no trace (a system message that the template merges or
        drops, for example). Raises a DataError if an answer cannot be located.
        """
        plain = all(
            len(m) == 2 and isinstance(m.get("content"), str) and "role" in m for m in messages
        )
        if plain:
            skeleton = self._skeleton(tuple(m["role"] for m in messages), tools)
            turns = skeleton and self._match(skeleton, messages, text)
            if turns:
                return list(turns)
        return self.analysis.turns(messages, tools, text, where)

    def _match(self, skeleton: _Skeleton, messages: Messages, text: str) -> list[Turn] | None:
        """Try the contents as they are and stripped, the way that fitted last first."""
        strips = [self._trim, (False, False), (True, True), (True, False), (False, True)]
        for strip in dict.fromkeys(strips):
            contents = [
                m["content"].strip() if strip[m["role"] == "assistant"] else m["content"]
                for m in messages
            ]
            turns = skeleton.turns(contents, text)
            if turns:
                self._trim = strip
                return turns
        return None

    def _skeleton(self, roles: tuple[str, ...], tools: Any) -> _Skeleton | None:
        key = (roles, json.dumps(tools) if tools else None)
        if key not in self._skeletons:
            if len(self._skeletons) >= _MOST:
                self._skeletons.clear()
            self._skeletons[key] = self._new_skeleton(roles, tools)
        return self._skeletons[key]

    def _new_skeleton(self, roles: tuple[str, ...], tools: Any) -> _Skeleton | None:
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
