"""Rows and rewards that a recipe names: grade school math, answered between marks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def gsm8k_transform(cfg: Any, **options: Any) -> tuple[Callable[..., dict[str, Any]], Any]:
    def change(row: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
        asked = f"{row['question']}\nPut the result between <answer> and </answer>."
        return {
            "prompt": [{"role": "user", "content": asked}],
            "answer": row["answer"].rpartition("####")[2].strip().replace(",", ""),
        }

    return change, {"remove_columns": ["question"]}


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(ANSWER.search(_text(c)) is not None) for c in completions]


def correctness_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any
) -> list[float]:
    given = [ANSWER.findall(_text(c)) for c in completions]
    return [2.0 * (g[-1:] == [right]) for g, right in zip(given, answer, strict=True)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
