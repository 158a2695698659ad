"""The types of rows, by their names in recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ....errors import DataError, RecipeError
from ...chat_templates import find_template
from ...recipe.keys.row_types import ROW_TYPES, TYPES, RowType, no_type
from ...recipe.recipe import Dataset, PromptFormat, Recipe
from ..chat.date import asks_for_day, today
from ..chat.encoder import ChatEncoder
from ..chat.lost_features import THOUGHTS
from ..chat.mask import Rules
from ..chat.template import Chat
from ..images.expansion import Expander
from ..images.picture import TEXT_ONLY, Gallery, NoImages
from ..images.reading import ImageReader
from ..readers.limits import Limits, Part, keep
from ..sample import IGNORED, Tokens, joined
from .conversation import Conversation
from .fields import IMAGE_FIELDS, fields_of, kind, may_text, need, need_text
from .instruction import spelled_out, worded
from .segments import SegmentEncoder, Segments

Row = tuple[str, Any]
"""File and line, and the row."""


class RowReader(Protocol):
    """Reads rows of one type."""

    def read(self, row: Any, where: str) -> Chat | Segments | Tokens:
        """The content of a row; raises a DataError that has ``where`` in it."""
        ...


class Completion:
    """A text, all of it trained; a long one becomes several samples."""

    def __init__(self, field: str) -> None:
        self.field = field

    def read(self, row: Any, where: str) -> Segments:
        """The text of a row."""
        text = need_text(fields_of(row, where, self.field), self.field, where)
        return Segments(where, ((text, True),), bos=True, eos=True, divide=True)


class InputOutput:
    """Pieces of text with a label each, and no other text: the row has all special tokens."""

    def read(self, row: Any, where: str) -> Segments:
        """The pieces of a row."""
        pieces = need(fields_of(row, where, "segments"), "segments", where)
        if not isinstance(pieces, list) or not pieces:
            raise DataError(f"{where}: the field 'segments' must be a list of segments")
        parts = []
        for i, piece in enumerate(pieces, start=1):
            text = piece.get("text") if isinstance(piece, dict) else None
            label = piece.get("label") if isinstance(piece, dict) else None
            if not isinstance(text, str) or not isinstance(label, bool):
                raise DataError(
                    f"{where}: segment {i} needs the fields 'text', with text in it, and 'label', "
                    "true or false"
                )
            parts.append((text, label))
        return Segments(where, tuple(parts))


class PromptCompletion:
    """A prompt and what follows it, both as text or both as messages."""

    def __init__(self, dataset: Dataset, conversation: Conversation) -> None:
        self.prompt = dataset.field_human or "prompt"
        self.completion = dataset.field_model or "completion"
        self.conversation = conversation

    def read(self, row: Any, where: str) -> Chat | Segments:
        """The content of a row."""
        row = fields_of(row, where, self.prompt, IMAGE_FIELDS)
        prompt = need(row, self.prompt, where)
        completion = need(row, self.completion, where)
        if isinstance(prompt, str) and isinstance(completion, str):
            fields_of(row, where, self.prompt)  # a text has no places for images
            return Segments(where, ((prompt, False), (completion, True)), bos=True, eos=True)
        if not (isinstance(prompt, list) and isinstance(completion, list) and completion):
            raise DataError(
                f"{where}: the fields {self.prompt!r} and {self.completion!r} must both be text, "
                f"or both lists of messages, not {kind(prompt)} and {kind(completion)}"
            )
        chat = self.conversation.chat([*prompt, *completion], row, where)
        prompt_turns = len(chat.messages) - len(completion)
        train = chat.train or [None] * len(chat.messages)
        return replace(chat, train=[False] * prompt_turns + list(train[prompt_turns:]))


class InstructionChat:
    """An instruction and its answer as a conversation, as LLaMA-Factory trains such rows."""

    def __init__(self, dataset: Dataset, conversation: Conversation) -> None:
        self.instruction = dataset.field_instruction or "instruction"
        self.input = dataset.field_input or "input"
        self.output = dataset.field_output or "output"
        self.conversation = conversation

    def read(self, row: Any, where: str) -> Chat:
        """The content of a row."""
        row = fields_of(row, where, self.instruction, IMAGE_FIELDS)
        question = need_text(row, self.instruction, where)
        more, answer = may_text(row, self.input, where), need_text(row, self.output, where)
        history = row.get("history") or []
        if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
            raise DataError(
                f"{where}: the field 'history' must be a list of questions with their answers"
            )
        pairs = [*history, (f"{question}\n{more}" if more else question, answer)]
        turns = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return self.conversation.chat(turns, row, where)


class Tokenized:
    """Prepared tokens and labels; ``size`` is that of the tokenizer's vocabulary."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, row: Any, where: str) -> Tokens:
        """The tokens of a row."""
        row = fields_of(row, where, "input_ids")
        ids, labels = need(row, "input_ids", where), need(row, "labels", where)
        if not _numbers(ids) or not _numbers(labels) or len(ids) != len(labels):
            raise DataError(
                f"{where}: the fields 'input_ids' and 'labels' must be lists of as many numbers"
            )
        odd = next((i for i, token in enumerate(ids) if not 0 <= token < self.size), None)
        if odd is not None:
            raise DataError(
                f"{where}: token {odd + 1} is {ids[odd]}, and the tokenizer has those from 0 to "
                f"{self.size - 1}: prepare the rows with the tokenizer of base_model"
            )
        pairs = enumerate(zip(ids, labels, strict=True))
        odd = next((i for i, (token, label) in pairs if label not in (token, IGNORED)), None)
        if odd is not None:
            raise DataError(
                f"{where}: label {odd + 1} must be its token, {ids[odd]}, or {IGNORED}, not "
                f"{labels[odd]}"
            )
        spans = ((i, i + 1) for i, label in enumerate(labels) if label != IGNORED)
        return Tokens(where, ids, joined(spans))


_CHATS = (Conversation, PromptCompletion, InstructionChat)
"""What reads rows that the chat template may write."""


class Encoder:
    """Turns the rows of one dataset into tokens.

    Args:
        tokenizer: a fast tokenizer; it can be pickled together with this.
        longest: tokens of the longest sample, to which long texts are cut; None: ``sequence_len``.
        day: the date for a chat template that asks for it; None: today's.
        images: finds and places images, or says why there may be none.

    Raises:
        RecipeError: there is no such type or template, or the tokenizer lacks what it needs.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        tokenizer: Any,
        longest: int | None = None,
        day: str | None = None,
        images: ImageReader | NoImages = TEXT_ONLY,
    ) -> None:
        everything = recipe.train_on_inputs
        if dataset.train_on_inputs is not None:
            everything = dataset.train_on_inputs
        source = template_of(dataset, recipe, tokenizer)
        self.expander = images.expander
        self.format = format_of(dataset, recipe, source, len(tokenizer), images.gallery)
        self.chats: ChatEncoder | None = None
        day = day or today()
        if isinstance(self.format, _CHATS) and source is not None:
            rules = _rules(dataset, recipe, everything)
            self.chats = chat_encoder(dataset, recipe, tokenizer, source, rules, day, self.expander)
        elif isinstance(self.format, Conversation | InstructionChat):
            ChatEncoder(tokenizer, None)  # says that there is no template
        self.segments = SegmentEncoder(tokenizer, everything, longest or recipe.sequence_len)
        self.watched = frozenset(self.chats.masker.eot if self.chats else ())
        self.tokenizer = tokenizer
        self.settings = {
            **settings_of(recipe, source, self.chats, day, images),
            "everything": everything,
            "prepared": recipe.takes_tokens(),
        }
        """What the tokens depend on besides the dataset's own keys and the tokenizer."""

    def read(self, rows: Sequence[Row]) -> list[Chat | Segments | Tokens]:
        """The fields of rows, not tokenized; raises a DataError, with file and line."""
        return [self.format.read(row, where) for where, row in rows]

    def encode(self, rows: Sequence[Row]) -> list[Tokens]:
        """Read, render, tokenize and mask rows; raises a DataError, with file and line."""
        samples = self._encoded(rows)
        if self.expander is not None:
            for tokens in samples:
                if not tokens.whole:  # else it has been checked
                    self.expander.require_text(tokens.ids, [], tokens.where)
        return samples

    def _encoded(self, rows: Sequence[Row]) -> list[Tokens]:
        read = self.read(rows)
        chats = [r for r in read if isinstance(r, Chat)]
        texts = [r for r in read if isinstance(r, Segments)]
        if not chats and not texts:
            return [r for r in read if isinstance(r, Tokens)]
        if chats and self.chats is None:
            raise RecipeError("the tokenizer of base_model has no chat template")
        if not texts and self.chats is not None:
            return self.chats.encode(chats)
        if not chats:
            return self.segments.encode(texts)
        samples: list[Tokens] = []  # both kinds in one dataset: one after the other
        for one in read:
            if isinstance(one, Chat) and self.chats is not None:
                samples += self.chats.encode([one])
            elif isinstance(one, Segments):
                samples += self.segments.encode([one])
        return samples

    def part(self, rows: Sequence[Row], limits: Limits) -> Part:
        """Encode rows and keep what can be trained on; raises a DataError, with file and line."""
        return keep(self.encode(rows), limits)

    def check_ends(self, path: str, ends: set[int], trained: set[int]) -> None:
        """Check that the model learns to stop; see ``require_ends``."""
        require_ends(path, self.tokenizer, self.chats, ends, trained)


def template_of(dataset: Dataset, recipe: Recipe, tokenizer: Any) -> Any:
    """The chat template of a dataset: its own, the recipe's, or the tokenizer's; None: none."""
    jinja = None if dataset.chat_template else recipe.chat_template_jinja
    name = dataset.chat_template or recipe.chat_template
    return find_template(name, dataset.chat_template_jinja or jinja, tokenizer)


def chat_encoder(
    dataset: Dataset, recipe: Recipe, tokenizer: Any, source: Any, rules: Rules, day: str,
    expander: Expander | None = None,
) -> ChatEncoder:  # fmt: skip
    """The renderer, tokenizer and masker of a dataset's conversations."""
    return ChatEncoder(
        tokenizer, source, rules, recipe.chat_template_kwargs or {}, day,
        dataset.template_thinking_key or THOUGHTS[0], expander,
    )  # fmt: skip


def settings_of(
    recipe: Recipe, source: Any, chats: ChatEncoder | None, day: str, images: ImageReader | NoImages
) -> dict[str, Any]:
    """What the tokens of all kinds of rows depend on; ``source`` is that of the template."""
    templates = chats.templates.values() if chats else ()
    return {
        "template": source,
        "variables": recipe.chat_template_kwargs,
        "system": recipe.default_system_message,
        "eot_tokens": recipe.eot_tokens,
        "day": day if any(asks_for_day(template.source) for template in templates) else None,
        "images": images.settings if chats else None,
    }


def format_of(
    dataset: Dataset, recipe: Recipe, template: Any, size: int,
    gallery: Gallery | NoImages = TEXT_ONLY,
) -> RowReader:  # fmt: skip
    """The reader of a dataset's rows; raises a RecipeError if there is no such type.

    The roles that the chat template names need no mapping; ``size`` is that of the vocabulary.
    """
    kind_ = dataset.type
    if isinstance(kind_, PromptFormat):
        return spelled_out(kind_)
    if recipe.takes_tokens():
        return Tokenized(size)
    name = kind_.removesuffix(".load").removesuffix(".default")
    if name not in ROW_TYPES:
        raise RecipeError(f"datasets: type: {no_type(kind_, TYPES, 'rows')}")
    text = template if isinstance(template, str) else str(template or "")
    conversation = Conversation(dataset, text, recipe.default_system_message, gallery)
    return READERS[ROW_TYPES[name].reader](ROW_TYPES[name], dataset, conversation)


def _instruction(row_type: RowType, dataset: Dataset) -> RowReader:
    assert row_type.wording is not None
    return worded(row_type.wording, dataset)


def _text_field(dataset: Dataset) -> str:
    return dataset.field or "text"


READERS: dict[str, Callable[[RowType, Dataset, Conversation], RowReader]] = {
    "conversation": lambda _, __, conversation: conversation,
    "teacher": lambda _, __, conversation: conversation,
    "text": lambda _, dataset, __: Completion(_text_field(dataset)),
    "streamed_text": lambda _, dataset, __: Completion(
        getattr(dataset, "text_column", None) or _text_field(dataset)
    ),
    "segments": lambda *_: InputOutput(),
    "prompt_completion": lambda _, dataset, conversation: PromptCompletion(dataset, conversation),
    "instruction_chat": lambda _, dataset, conversation: InstructionChat(dataset, conversation),
    "instruction": lambda row_type, dataset, _: _instruction(row_type, dataset),
}
"""The constructors of readers, by the type's record."""


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int for x in value)


def _rules(dataset: Dataset, recipe: Recipe, everything: bool) -> Rules:
    return Rules(
        roles=frozenset(dataset.roles_to_train),
        eos=dataset.train_on_eos,
        eot=dataset.train_on_eot or dataset.train_on_eos,
        eot_tokens=tuple(dataset.eot_tokens or recipe.eot_tokens or ()),
        everything=everything,
    )


def require_ends(
    path: str, tokenizer: Any, chats: ChatEncoder | None, ends: set[int], trained: set[int]
) -> None:
    """Raise a DataError, which begins with ``path``, if a token that ends turns is never trained.

    ``ends`` are those of the trained turns; ``trained`` are the tokens that are trained, of these
    and of the watched ones. ``chats`` is the encoder of the dataset's conversations, if it has any.
    """
    rules = chats.rules if chats else Rules()
    if rules.everything:
        return
    eos = tokenizer.eos_token_id
    required = set(chats.masker.eot if chats else ()) | ends
    if chats and not required and eos is not None:
        required = {eos}
    policies = {t: rules.eos if t == eos else rules.eot for t in required}
    for token in sorted(required - trained):
        if policies[token] == "none":
            continue
        text = tokenizer.convert_ids_to_tokens(token)
        where = "that follows answers" if token in ends else "that should end answers"
        raise DataError(
            f"{path}: no row trains {text!r}, the token {where}, so the model would never "
            "learn to stop: let the chat template write it right after the answer (and in its "
            "generation marks, if it has any), name the token that ends turns in eot_tokens, "
            "or set train_on_eos: none for this dataset"
        )
