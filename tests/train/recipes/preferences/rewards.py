"""Rows and a reward that a recipe names: grade school math, with rewards by chance."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

_DRAW = random.Random(0)


def rand_reward_func(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    return [_DRAW.uniform(0, 1) for _ in completions]


def oai_gsm8k_transform(
    cfg: Any, *args: Any, **kwargs: Any
) -> tuple[Callable[..., dict[str, Any]], Any]:
    def change(row: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row["question"]}],
            "answer": row["answer"].split("####")[-1].strip(),
        }

    return change, {"remove_columns": ["question"]}
