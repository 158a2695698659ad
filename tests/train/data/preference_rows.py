"""Recipes for rows of preferences, and what their prepared rows say, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusewright.train.consent import Consent
from fusewright.train.data import PreparedData, Samples, prepare
from fusewright.train.data.preferences.examples import Examples
from fusewright.train.recipe.preferences import rows_of
from fusewright.train.recipe.recipe import Recipe

from ..conftest import make_tokenizer, write_rows

TOKENIZER = make_tokenizer()


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def recipe(folder: Path, rows: list[Any], keys: dict[str, Any], dataset: dict[str, Any]) -> Recipe:
    """A recipe whose dataset is a file with these rows."""
    path = write_rows(folder / "rows.jsonl", rows)
    return Recipe.model_validate(
        {
            "base_model": "x",
            "sequence_len": 512,
            "shuffle_merged_datasets": False,
            "datasets": [{"path": str(path), **dataset}],
            **keys,
        }
    ).allowed(Consent(allow_code=True))


def prepared(
    folder: Path, rows: list[Any], keys: dict[str, Any], tokenizer: Any = TOKENIZER, **dataset: Any
) -> PreparedData:
    """These rows, prepared."""
    return prepare(recipe(folder, rows, keys, dataset), tokenizer)


def examples(
    folder: Path, rows: list[Any], keys: dict[str, Any], tokenizer: Any = TOKENIZER, **dataset: Any
) -> list[dict[str, Any]]:
    """These rows, prepared, as trainers read them."""
    whole = recipe(folder, rows, keys, dataset)
    train = prepare(whole, tokenizer).train
    kind = rows_of(whole)
    assert isinstance(train, Samples)
    assert kind is not None
    order = Examples(train, kind)
    return [order[i] for i in range(len(order))]


def texts(example: dict[str, Any], tokenizer: Any = TOKENIZER) -> dict[str, Any]:
    """The same with text for tokens."""
    return {
        name: tokenizer.decode(value) if name.endswith("_ids") else value
        for name, value in example.items()
    }
