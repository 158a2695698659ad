"""The name of prepared rows: a hash of what they were made from, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..recipe.recipe import Recipe
from .cache import FORMAT, Cache
from .readers.sources import DataSource
from .workers import Work


def fingerprint_of(recipe: Recipe, tokenizer: Any, every: Sequence[tuple[DataSource, Work]]) -> str:
    """A hash of everything that tokens and labels depend on.

    Where a file is does not count, only what is in it. How rows are split, weighed and shuffled
    does not count either: that is done with the rows in the cache.

    Args:
        recipe: the keys that hold for all datasets.
        tokenizer: with its chat template.
        every: each dataset, and what is done to it.

    Raises:
        DataError: a file cannot be read.
    """
    import tokenizers
    import transformers

    about = {
        "format": FORMAT,
        "versions": [tokenizers.__version__, transformers.__version__],
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer),
        "special": tokenizer.special_tokens_map,
        "duplicates": recipe.dataset_exact_deduplication,
        "datasets": [
            {
                "content": source.digest(),
                "keys": source.dataset.model_dump(
                    mode="json", exclude={"path", "builder", "weight", "revision", "name"}
                ),
                "limit": source.limit,
                "encoder": one.encoder.settings,
                "limits": [one.limits.longest, one.limits.shortest, one.limits.excess],
            }
            for source, one in every
        ],
    }
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def with_content(fingerprint: str, root: Path) -> str:
    """A hash that depends on the prepared rows themselves, too.

    Args:
        fingerprint: of the rows.
        root: the folder of caches that they are in.
    """
    about = Cache(root, fingerprint).load() or {}
    text = f"{fingerprint} {json.dumps(about.get('files'), sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
