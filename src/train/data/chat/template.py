"""Renders chat templates, with the spans that they mark as the assistant's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import DataError, RecipeError
from ..images.picture import Picture
from .date import with_day

Messages = list[dict[str, Any]]
"""A conversation: ``role``, ``content`` (text, or parts) and whatever else the template reads."""

Span = tuple[int, int]
"""Begin and end of a piece of text, in characters."""

Detail = Mapping[str, Any]
"""``begin_offset``, ``end_offset`` (both inside) and ``train``, in characters of a content."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
REFUSALS = (TypeError, ValueError, LookupError, AttributeError)
"""What a template raises when a message does not suit it, besides Jinja's own errors."""


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        tools: the functions that the assistant may call, as JSON schemas, or None.
        train: by message: whether it is trained, which of its characters are, or None: by its role.
        pictures: the images of the parts of type ``image``, in order.
    """

    where: str
    messages: Messages
    tools: Any = None
    train: Sequence[bool | list[Detail] | None] | None = None
    pictures: tuple[Picture, ...] = ()


class Template:
    """One chat template, rendered as ``tokenizer.apply_chat_template`` renders it.

    Args:
        variables: what it may read besides the messages, e.g. ``bos_token``.
        day: the date for a template that asks for it; None: today's.

    Raises:
        RecipeError: it is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], day: str | None = None) -> None:
        self.source = source
        self.text = source if day is None else with_day(source, day)
        self.variables = dict(variables)
        self.marked = _MARK.search(source) is not None
        """Whether it marks the assistant's words with ``{% generation %}``."""
        self.in_parts = False
        self._render([], None, "")  # fails before any row is read
        self.in_parts = self._takes_parts()
        """Whether a text that is all of a content is given to it as a part."""

    def _takes_parts(self) -> bool:
        """Whether it writes a text that is a part of a content, and none that is the content."""
        sign = "\ue000"
        for self.in_parts in (False, True):
            try:
                if sign in self.render([{"role": "user", "content": sign}]):
                    return self.in_parts
            except DataError:
                continue
        return False

    def around_image(self, placeholder: str) -> tuple[str, str]:
        """What it writes for an image before and behind the placeholder."""
        text = {"type": "text", "text": "\ue000"}
        try:
            plain, shown = (
                self.render([{"role": "user", "content": parts}]).partition("\ue000")[0]
                for parts in ([text], [{"type": "image"}, text])
            )
        except DataError:
            return "", ""
        pairs = enumerate(zip(plain, shown, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(plain), len(shown)))
        before, found, behind = shown[shared:].partition(placeholder)
        return (before, behind) if found else ("", "")

    def render(
        self, messages: Messages, tools: Any = None, prompt: bool = False, where: str = ""
    ) -> str:
        """The text of a conversation; raises a DataError if the template refuses it.

        ``tools`` are JSON schemas; ``prompt`` appends the header of the assistant's next turn.
        """
        return self._render([messages], tools, where, add_generation_prompt=prompt)[0][0]

    def render_all(
        self, conversations: Sequence[Messages], tools: Any, wheres: Sequence[str]
    ) -> tuple[list[str], list[list[Span]] | None]:
        """The texts of conversations that have the same tools, and the marked spans.

        The spans are those that the template marks as the assistant's; None when it has no marks.
        Raises a DataError that names the first conversation that the template refuses.
        """
        options = {"return_assistant_tokens_mask": True} if self.marked else {}
        try:
            texts, spans = self._render(list(conversations), tools, "", **options)
        except DataError:
            for messages, where in zip(conversations, wheres, strict=True):
                self._render([messages], tools, where, **options)
            raise
        return texts, spans if self.marked else None

    def _render(
        self, conversations: list[Messages], tools: Any, where: str, **options: Any
    ) -> tuple[list[str], list[list[Span]]]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        if self.in_parts:
            conversations = [list(map(in_parts, messages)) for messages in conversations]
        try:
            texts, spans = render(
                conversations=conversations,
                tools=tools,
                chat_template=self.text,
                **options,
                **self.variables,
            )
        except TemplateSyntaxError as error:
            line = error.lineno - self.text.count("\n") + self.source.count("\n")
            raise RecipeError(
                f"chat_template: line {line} of it is not valid Jinja: {error.message}"
            ) from None
        except (TemplateError, *REFUSALS) as error:
            reason = str(error) or type(error).__name__
            at = f"{where}: " if where else ""
            raise DataError(f"{at}the chat template refuses this conversation: {reason}") from None
        return texts, spans


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}] if content else []}


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts in a message's content, without space around them and without empty ones."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [p.get("text") for p in content or ()]
    return [text.strip() for text in parts if isinstance(text, str) and text.strip()]
