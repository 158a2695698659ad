"""From conversations to token ids and labels, with exact masks.

A token is trained when the assistant has to write it: its answer and the token that ends its turn.
Nothing before the answer (the system text, the question, the header of the turn) and nothing after
the end of the turn (templates put a line break there) is.

Where an answer begins and ends is taken from the template's own ``{% generation %}`` marks, or
else found by rendering: an answer is what ``messages[:i+1]`` has and ``messages[:i]`` with the
generation prompt has not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, RecipeError
from .data import Chat

IGNORED = -100
"""The label of a token that is not trained."""

Span = tuple[int, int]
"""Begin and end of a piece of text, in characters."""


@dataclass(frozen=True)
class Sample:
    """One row as tokens.

    Attributes:
        input_ids: the tokens of the whole conversation.
        labels: the same where trained, ``IGNORED`` elsewhere (always so for the first token, which
            has nothing to be predicted from).
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)


def encode(chats: Sequence[Chat], tokenizer: Any, train_on_inputs: bool = False) -> list[Sample]:
    """Render, tokenize and mask conversations.

    Args:
        chats: the conversations.
        tokenizer: a fast tokenizer with a chat template.
        train_on_inputs: train every token.

    Raises:
        RecipeError: the tokenizer has no chat template, or cannot tell where its tokens came from.
        DataError: the template refuses a conversation, or hides where an answer begins.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError("the tokenizer of base_model has no chat template")
    if not tokenizer.is_fast:
        raise RecipeError(
            "the tokenizer of base_model is not a fast one: its tokens cannot be traced to the text"
        )
    if not chats:
        return []
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None
    texts, spans = [], []
    for chat in chats:
        text, answers = _marked(chat, tokenizer) if marked else _rendered(chat, tokenizer)
        texts.append(text)
        spans.append([(0, len(text))] if train_on_inputs else answers)
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    samples = []
    for text, answers, ids, offsets in zip(
        texts, spans, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        train = [False] * len(ids)
        for span in answers:
            for i in _tokens(span, text, ids, offsets, special):
                train[i] = True
        if train_on_inputs:
            train = [True] * len(ids)
        labels = [t if on else IGNORED for t, on in zip(ids, train, strict=True)]
        samples.append(Sample(ids, [IGNORED, *labels[1:]]))
    return samples


def _render(tokenizer: Any, messages: list[dict[str, str]], where: str, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from None
    return text


def _rendered(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    """The text, and the answers in it, from what each message adds."""
    text = _render(tokenizer, chat.messages, chat.where, prompt=False)
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, chat.messages[:i], chat.where, prompt=True) if i else ""
        through = (
            text
            if i + 1 == len(chat.messages)
            else _render(tokenizer, chat.messages[: i + 1], chat.where, prompt=False)
        )
        if not (through.startswith(before) and text.startswith(through)):
            raise DataError(
                f"{chat.where}: the chat template changes earlier turns, so the answer in message "
                f"{i + 1} cannot be told apart; mark it with {{% generation %}} in the template"
            )
        spans.append((len(before), len(through)))
    return text, spans


def _marked(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    """The text, and the answers in it, from the template's generation marks."""
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template
    try:
        texts, spans = render(
            conversations=[chat.messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise DataError(
            f"{chat.where}: the chat template refuses this conversation: {error}"
        ) from None
    return texts[0], [(begin, end) for begin, end in spans[0]]


def _tokens(span: Span, text: str, ids: list[int], offsets: list[Span], special: set[int]) -> range:
    """The tokens of one answer, with the token that ends the turn and without what follows it.

    A token that begins before the answer is not part of it, even if it reaches into it.
    """
    inside = [i for i, (begin, _) in enumerate(offsets) if span[0] <= begin < span[1]]
    if not inside:
        return range(0)
    first, last = inside[0], inside[-1]
    end = last
    while end > first and ids[end] not in special and not text[slice(*offsets[end])].strip():
        end -= 1
    if ids[end] in special:  # the line break after the end of the turn is nobody's to write
        return range(first, end + 1)
    if last + 1 < len(ids) and ids[last + 1] in special:  # marks that leave the end out
        last += 1
    return range(first, last + 1)
