"""From rows of preferences to tokens.

Conversations are rendered and tokenized as those of supervised training are, whole and once for
each answer: what comes before the answer is the prompt, and the answer ends with the token that
ends its turn. Texts are tokenized part by part, and end with the end-of-text token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ....errors import DataError, RecipeError
from ...recipe.preferences import preference_settings, rows_of
from ...recipe.recipe import Dataset, Recipe
from ..chat.date import today
from ..chat.encoder import ChatEncoder, tokenize
from ..chat.mask import Rules
from ..chat.template import Chat, Messages
from ..formats.conversation import Conversation
from ..formats.fields import IMAGE_FIELDS
from ..formats.registry import Row, chat_encoder, require_ends, settings_of, template_of
from ..formats.segments import SegmentEncoder
from ..images.picture import TEXT_ONLY, NoImages
from ..images.reading import ImageReader
from ..readers.limits import Limits, Part
from ..sample import IGNORED, Tokens
from .limits import TokenizedAnswer, TokenizedRow, keep_answers
from .readers import (
    FormReader,
    JudgedSteps,
    OwnTypeReader,
    Preference,
    SpelledOutReader,
    StepReader,
    reader_of,
)


class PreferenceEncoder:
    """Turns the rows of one dataset of preferences into tokens.

    Args:
        recipe: the keys for all datasets, with a preference method or a reward model.
        tokenizer: a fast tokenizer; it can be pickled together with this.
        day: the date for a chat template that asks for it; None: today's.
        images: finds and places the images of prompts, or says why there may be none.

    Raises:
        RecipeError: there is no such type or template, or the tokenizer lacks what it needs.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        tokenizer: Any,
        day: str | None = None,
        images: ImageReader | NoImages = TEXT_ONLY,
    ) -> None:
        settings = preference_settings(recipe)
        assert settings is not None  # the recipe of a preference method
        if settings.no_images:
            images = NoImages(settings.no_images)
        self.why_no_images = images.why if isinstance(images, NoImages) else ""
        day = day or today()
        recipe = _with_prompt_variables(recipe)
        source = template_of(dataset, recipe, tokenizer)
        text = source if isinstance(source, str) else str(source or "")
        conversation = Conversation(dataset, text, recipe.default_system_message, images.gallery)
        self.reader = reader_of(dataset, recipe, settings.rows, conversation, settings.num_labels)
        self.tokenizer = tokenizer
        self.chats: ChatEncoder | None = None
        texts_only = isinstance(self.reader, FormReader | SpelledOutReader | StepReader)
        if source is not None and not texts_only:
            self.chats = chat_encoder(
                dataset, recipe, tokenizer, source, _rules(dataset, recipe), day,
                images.expander,
            )  # fmt: skip
        self.segments = SegmentEncoder(tokenizer, False, recipe.sequence_len)
        self.watched = frozenset(self.chats.masker.eot if self.chats else ())
        # a reward model writes nothing, so that it need not learn to stop
        self.answered = settings.rows in ("pairs", "labelled") and settings.method != "reward"
        self.longest_prompt, self.longest_answer = recipe.max_prompt_len, None
        if settings.rows == "steps":
            self.longest_answer = dataset.max_completion_length
        self.settings = {
            **settings_of(recipe, source, self.chats, day, images),
            "rows": settings.rows,
            "classes": settings.num_labels,
            "longest_prompt": self.longest_prompt,
            "function": isinstance(self.reader, OwnTypeReader),
        }
        """What the tokens depend on besides the dataset's own keys and the tokenizer."""

    def part(self, rows: Sequence[Row], limits: Limits) -> Part:
        """Encode rows and keep what can be trained on; raises a DataError, with file and line."""
        return keep_answers(self.encode(rows), limits, self.longest_prompt, self.longest_answer)

    def check_ends(self, path: str, ends: set[int], trained: set[int]) -> None:
        """Check that answers end with the token that ends them; see ``require_ends``."""
        if self.answered:
            require_ends(path, self.tokenizer, self.chats, ends, trained)

    def read(self, rows: Sequence[Row]) -> list[Preference | JudgedSteps]:
        """The fields of rows, not tokenized; raises a DataError, with file and line."""
        if self.why_no_images and not isinstance(self.reader, OwnTypeReader):  # it may drop them
            for where, row in rows:
                if isinstance(row, dict) and any(row.get(name) for name in IMAGE_FIELDS):
                    raise DataError(f"{where}: the row has an image, and {self.why_no_images}")
        return [self.reader.read(row, where) for where, row in rows]

    def encode(self, rows: Sequence[Row]) -> list[TokenizedRow]:
        """Read and tokenize rows; raises a DataError, with file and line, for a wrong one."""
        read = self.read(rows)
        chats = [c for r in read for c in _chats(r)]
        encoded = iter(self._required_chats(chats).encode(chats) if chats else ())
        pieces = iter(e.ids for e in tokenize(self.tokenizer, [t for r in read for t in _texts(r)]))
        return [self._row(row, encoded, pieces) for row in read]

    def _row(
        self,
        row: Preference | JudgedSteps,
        encoded: Iterator[Tokens],
        pieces: Iterator[list[int]],
    ) -> TokenizedRow:
        """The tokens of a row, taken in order from what has been tokenized."""
        if isinstance(row, JudgedSteps):
            return self._steps(row, pieces)
        if row.empty:
            return TokenizedRow(row.where, [], empty=True)
        if isinstance(row.prompt, str):
            return self._text(row, pieces)
        if not row.answers:
            chat = Chat(row.where, row.prompt, row.tools)
            chats = self._required_chats([chat])
            return TokenizedRow(
                row.where, chats.question(chat), specials=chats.has_special(chat),
                extra=_extra_json(row),
            )  # fmt: skip
        return _joined(row, [next(encoded) for _ in row.answers])

    def _required_chats(self, chats: Sequence[Chat]) -> ChatEncoder:
        if self.chats is None:
            raise RecipeError(
                f"{chats[0].where} has messages, and the tokenizer of base_model has no chat "
                "template; name one with chat_template, for example chat_template: chatml"
            )
        return self.chats

    def _text(self, row: Preference, pieces: Iterator[list[int]]) -> TokenizedRow:
        assert isinstance(row.prompt, str)
        prompt = [*self.segments.bos, *next(pieces)]
        special = self.segments.special
        marked = special is not None and special.search(row.prompt) is not None
        answers = []
        for answer in row.answers:
            ids = list(next(pieces))
            if not ids or ids[-1] != self._eos():
                ids.append(self._eos())
            answers.append(TokenizedAnswer(ids, answer.good))
        return TokenizedRow(
            row.where, prompt, tuple(answers),
            ends=frozenset({self._eos()} if answers else ()), equal=row.equal,
            # the chat formats write their own special tokens
            specials=marked and not isinstance(self.reader, FormReader | SpelledOutReader),
            extra="" if answers else _extra_json(row),
        )  # fmt: skip

    def _eos(self) -> int:
        if self.segments.eos is None:
            raise RecipeError(
                "the tokenizer of base_model has no end-of-text token; name one with "
                "special_tokens: {eos_token: ...}"
            )
        end: int = self.segments.eos
        return end

    def _steps(self, row: JudgedSteps, pieces: Iterator[list[int]]) -> TokenizedRow:
        prompt = [*self.segments.bos, *next(pieces)]
        ids: list[int] = []
        labels: list[int] = []
        for label in row.labels:
            step = next(pieces)
            ids += step
            labels += [IGNORED] * len(step)
            if step and label is not None:
                labels[-1] = label
        empty = not row.prompt.strip() or any(not step.strip() for step in row.steps)
        answer = TokenizedAnswer(ids, True)
        return TokenizedRow(row.where, prompt, (answer,), labels=tuple(labels), empty=empty)


def _rules(dataset: Dataset, recipe: Recipe) -> Rules:
    eos, eot = dataset.train_on_eos, dataset.train_on_eot or dataset.train_on_eos
    return Rules(
        eos="none" if eos == "none" else "turn",
        eot="none" if eot == "none" else "turn",
        eot_tokens=tuple(dataset.eot_tokens or recipe.eot_tokens or ()),
    )


def _chats(row: Preference | JudgedSteps) -> Iterator[Chat]:
    if isinstance(row, JudgedSteps) or row.empty or isinstance(row.prompt, str):
        return
    for answer in row.answers:
        content: Messages = [m for m in answer.content if isinstance(m, dict)]
        train = [False] * len(row.prompt) + [True] * len(content)
        yield Chat(row.where, [*row.prompt, *content], row.tools, train, row.pictures)


def _texts(row: Preference | JudgedSteps) -> Iterator[str]:
    if isinstance(row, JudgedSteps):
        yield from (row.prompt, *row.steps)
    elif isinstance(row.prompt, str) and not row.empty:
        yield row.prompt
        yield from (a.content for a in row.answers if isinstance(a.content, str))


def _joined(row: Preference, encoded: Sequence[Tokens]) -> TokenizedRow:
    """The prompt is what precedes all answers: a template may write a turn by what follows it."""
    if any(not tokens.spans for tokens in encoded):
        raise DataError(
            f"{row.where}: the chat template leaves the answer out: compare what it writes with "
            "preprocess --debug, or name another with chat_template"
        )
    count = min(tokens.spans[0][0] for tokens in encoded)
    for tokens in encoded[1:]:
        pairs = enumerate(zip(encoded[0].ids[:count], tokens.ids, strict=False))
        count = next((i for i, (a, b) in pairs if a != b), count)
    answers = (
        TokenizedAnswer(tokens.ids[count : tokens.spans[-1][1]], answer.good)
        for tokens, answer in zip(encoded, row.answers, strict=True)
    )
    return TokenizedRow(
        row.where, encoded[0].ids[:count], tuple(answers),
        ends=frozenset().union(*(tokens.ends for tokens in encoded)), equal=row.equal,
        specials=any(tokens.specials for tokens in encoded),
        extra=encoded[0].extra, whole=encoded[0].whole, images=encoded[0].images,
    )  # fmt: skip


def _extra_json(row: Preference) -> str:
    return json.dumps({"prompt": row.prompt, "columns": dict(row.columns)})


def _with_prompt_variables(recipe: Recipe) -> Recipe:
    variables = recipe.trl.chat_template_kwargs if recipe.trl is not None else None
    if rows_of(recipe) != "prompts" or variables is None:
        return recipe
    return recipe.model_copy(update={"chat_template_kwargs": variables})
