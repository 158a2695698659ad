"""Rows of chats with a teacher's log-probabilities, for distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ....errors import DataError
from ...recipe.recipe import Dataset, Recipe
from ..images.picture import TEXT_ONLY, NoImages
from ..images.reading import ImageReader
from ..sample import Tokens
from ..teacher import TopTokens
from .fields import kind
from .registry import Encoder, Row

Entry = tuple[list[int], list[float]]
"""The teacher's tokens at one position, and their log-probabilities."""

_FIELDS = ("logprobs", "llm_text_generation_vllm_logprobs")

_ROUNDING = 1e-3
"""How far above 0 rounding may put a log-probability."""

_FORMS = (
    'a list of {"token": "token_id:NUMBER", "logprob": NUMBER} for each token, as vLLM writes it '
    "with return_tokens_as_token_ids"
)


def encoder_of(
    dataset: Dataset, recipe: Recipe, tokenizer: Any, longest: int, day: str,
    images: ImageReader | NoImages = TEXT_ONLY,
) -> Encoder:  # fmt: skip
    """The encoder for rows of supervised training, or of distillation, which is of text alone."""
    if recipe.kd_trainer:
        text = NoImages("kd_trainer distils text only: leave such rows out")
        return TaughtEncoder(dataset, recipe, tokenizer, longest, day, text)
    return Encoder(dataset, recipe, tokenizer, longest, day, images)


class TaughtEncoder(Encoder):
    """Turns chats with a teacher's log-probabilities into tokens; see ``Encoder``."""

    def __init__(self, dataset: Dataset, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.teacher = Teacher(
            dataset.logprobs_field, dataset.temperature or 1.0, len(self.tokenizer)
        )

    def encode(self, rows: Sequence[Row]) -> list[Tokens]:
        """Read, render, tokenize and mask rows; raises a DataError, with file and line."""
        samples = super().encode(rows)
        return [
            replace(tokens, extra=self.teacher.read(row, tokens).text())
            for (_, row), tokens in zip(rows, samples, strict=True)
        ]


class Teacher:
    """Reads a teacher's log-probabilities from rows.

    Args:
        field: their field; None: where Axolotl, or its example's rows, have it.
        temperature: of the log-probabilities.
    """

    def __init__(self, field: str | None, temperature: float, size: int) -> None:
        self.field, self.temperature, self.size = field, temperature, size

    def read(self, row: Any, tokens: Tokens) -> TopTokens:
        """The teacher's tokens for the trained tokens of a row.

        The row's list has an entry for each trained token, in their order; or one for each token of
        the row, the first of which may be missing, as nothing comes before it. Raises a DataError,
        with file and line, if the list is not right.
        """
        field = self.field or next((name for name in _FIELDS if name in row), _FIELDS[0])
        where = f"{tokens.where}: the field {field!r}"
        if field not in row:
            has = ", ".join(map(repr, row)) or "no fields"
            raise DataError(
                f"{where} is missing (the row has {has}); name the field with the teacher's "
                "log-probabilities with logprobs_field"
            )
        listed = row[field]
        if not isinstance(listed, list | tuple):
            raise DataError(f"{where} must be {_FORMS}, not {kind(listed)}")
        if not listed:
            raise DataError(f"{where} is an empty list: leave the row out, or ask the teacher anew")
        token_ids = row.get("target_token_ids")
        if token_ids is not None and (
            not isinstance(token_ids, list | tuple) or len(token_ids) != len(listed)
        ):
            raise DataError(
                f"{where} has {len(listed)} entries, and 'target_token_ids' must be a list with as "
                "many: write both for the same tokens"
            )
        trained = [p for a, b in tokens.spans for p in range(max(a, 1), b)]
        entries_of_trained = []
        for at in self._places(len(listed), trained, len(tokens.ids), where):
            ids = None if token_ids is None else token_ids[at]
            entry = self._pairs(listed[at], ids, f"{where}, entry {at + 1}")
            entries_of_trained.append((entry[0], [self.temperature * value for value in entry[1]]))
        return TopTokens.of(entries_of_trained)

    def _places(self, count: int, trained: list[int], length: int, where: str) -> Sequence[int]:
        """Which entries are those of the trained tokens."""
        if count == len(trained):
            return range(count)
        if count in (length, length - 1):  # vLLM has nothing for the first token of a prompt
            return [p - length + count for p in trained]
        raise DataError(
            f"{where} has {count} entries, and the row has {len(trained)} trained tokens of "
            f"{length}: there must be one for each trained token, or one for each token; check "
            "that the teacher has this tokenizer, chat_template and train_on_eos"
        )

    def _pairs(self, entry: Any, named: Any, where: str) -> Entry:
        if not isinstance(entry, list | tuple | dict):
            raise DataError(f"{where} must be a list of tokens with log-probabilities, not "
                            f"{kind(entry)}: {_FORMS}")  # fmt: skip
        if not entry:
            raise DataError(f"{where} is empty, and its token is trained: leave the row out")
        if named is not None:
            ids, values = named, list(entry)
            if not isinstance(ids, list | tuple) or len(ids) != len(values):
                raise DataError(
                    f"{where} has {len(values)} log-probabilities, and 'target_token_ids' must "
                    "have as many tokens there"
                )
        elif isinstance(entry, dict):  # as vLLM's prompt_logprobs; Arrow fills in what is missing
            pairs = [(token, value) for token, value in entry.items() if value is not None]
            ids = [token for token, _ in pairs]
            values = [value.get("logprob") if isinstance(value, dict) else value
                      for _, value in pairs]  # fmt: skip
        else:
            good = all(isinstance(pair, dict) for pair in entry)
            if not good or any(not {"token", "logprob"} <= set(pair) for pair in entry):
                raise DataError(f"{where} must be {_FORMS}")
            ids = [str(pair["token"]).removeprefix("token_id:") for pair in entry]
            values = [pair["logprob"] for pair in entry]
        return self._checked(list(ids), values, where)

    def _checked(self, ids: list[Any], values: list[Any], where: str) -> Entry:
        tokens = [self._token(token, where) for token in ids]
        if len(set(tokens)) != len(tokens):
            raise DataError(f"{where} names a token twice: leave out what is there again")
        for token, value in zip(tokens, values, strict=True):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value > _ROUNDING:
                raise DataError(
                    f"{where}: the log-probability of token {token} is {value!r}, which must be a "
                    "finite number of at most 0: leave out tokens without one"
                )
        return tokens, [float(value) for value in values]

    def _token(self, token: Any, where: str) -> int:
        digits = isinstance(token, str) and token.isdecimal() and token.isascii()
        if not digits and (not isinstance(token, int) or isinstance(token, bool)):
            raise DataError(f"{where}: {token!r} is not the number of a token: write {_FORMS}")
        if not 0 <= int(token) < self.size:
            raise DataError(
                f"{where}: token {token}, and the tokenizer has those from 0 to {self.size - 1}: "
                "the teacher must have the tokenizer of base_model"
            )
        return int(token)
