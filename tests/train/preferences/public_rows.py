"""Rows with the fields of public datasets of preferences, for recipes that name those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.preference_rows import assistant, user

COUNT = 64
"""Rows of a dataset."""


def question(i: int) -> str:
    """What the row asks."""
    return f"What is {i} plus {i + 1}?"


def right(i: int) -> str:
    """The better answer."""
    return f"It is {2 * i + 1}, as you can count."


def wrong(i: int) -> str:
    """The worse answer."""
    return f"I think that it is {3 * i + 2}."


def _system(i: int) -> str:
    return "You are an assistant that counts." if i % 2 else ""


def _turns(i: int) -> dict[str, Any]:
    """Messages, and two messages that answer them; every fourth has an earlier question."""
    asked = [user(question(i))]
    if i % 4 == 0:
        asked = [user("Hello."), assistant("Hello! How can I help?"), *asked]
    if i % 3 == 0:
        asked = [{"role": "system", "content": "You count."}, *asked]
    return {"conversation": asked, "chosen": assistant(right(i)), "rejected": assistant(wrong(i))}


def _conversations(i: int) -> dict[str, Any]:
    """A prompt, and two conversations that begin with it."""
    return {
        "prompt": question(i),
        "chosen": [user(question(i)), assistant(right(i))],
        "rejected": [user(question(i)), assistant(wrong(i))],
    }


def _ultrafeedback(i: int) -> dict[str, Any]:
    more = {f"{name}-{what}": value for name, rating in (("chosen", 5.0), ("rejected", 3.75))
            for what, value in (("rating", rating), ("model", "a-model"))}  # fmt: skip
    return {"source": "sharegpt", **_conversations(i), **more}


def _ultrafeedback_flat(i: int) -> dict[str, Any]:
    return {
        "source": "evol_instruct", "instruction": question(i), "chosen_response": right(i),
        "rejected_response": wrong(i), "chosen_avg_rating": 5.0, "rejected_avg_rating": 3.5,
        "chosen_model": "a-model",
    }  # fmt: skip


def _labelled(i: int) -> dict[str, Any]:
    good = i % 2 == 0
    return {
        "prompt": question(i), "completion": right(i) if good else wrong(i), "label": good,
        "model": "a-model", "average_rating": 5.0 if good else 3.0, "source": "sharegpt",
        "annotations": {"honesty": {"Rating": "5", "Rationale": "It is."}},
    }  # fmt: skip


def _orca(i: int) -> dict[str, Any]:
    return {
        "system": _system(i), "question": question(i), "chosen": right(i), "rejected": wrong(i),
    }  # fmt: skip


def _orca_rated(i: int) -> dict[str, Any]:
    return {
        # Gemma's template knows no system messages
        "system": "", "input": question(i), "chosen": right(i), "rejected": wrong(i),
        "generations": [right(i), wrong(i)], "order": ["chosen", "rejected"], "rating": [9.0, 4.0],
        "labelling_model": "a-model", "labelling_prompt": [user("Which is better?")],
        "raw_labelling_response": "9 4", "rationale": "It counts.", "status": "unchanged",
        "original_chosen": right(i), "original_rejected": wrong(i), "chosen_score": 9.0,
        "in_gsm8k_train": False,
    }  # fmt: skip


def _school_math(i: int) -> dict[str, Any]:
    sum_ = 2 * i + 1
    return {
        "question": question(i), "answer": f"{i} and {i + 1} is <<{i}+{i + 1}={sum_}>>{sum_}.\n"
        f"#### {sum_}",
    }  # fmt: skip


def _steps(i: int) -> dict[str, Any]:
    count = 2 + i % 3
    steps = [f"Step {n}: {i} plus {n} is {i + n + (n == count)}." for n in range(1, count + 1)]
    return {
        "prompt": question(i), "completions": steps, "labels": [True] * (count - 1) + [i % 2 == 0]
    }  # fmt: skip


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "fozziethebeat/alpaca_messages_2k_dpo_test": _turns,
    "olivermolenschot/alpaca_messages_dpo_test": _turns,
    "argilla/ultrafeedback-binarized-preferences-cleaned": _ultrafeedback,
    "argilla/ultrafeedback-binarized-preferences": _ultrafeedback_flat,
    "argilla/ultrafeedback-binarized-preferences-cleaned-kto": _labelled,
    "argilla/distilabel-intel-orca-dpo-pairs": _orca_rated,
    "allenai/Dolci-Think-DPO-7B": _conversations,
    "Intel/orca_dpo_pairs": _orca,
    "openai/gsm8k": _school_math,
    "trl-lib/math_shepherd": _steps,
}
"""A row of each dataset, by its number."""


def save(name: str, folder: Path) -> None:
    """Save rows in the place of the dataset of this name.

    Args:
        name: one of ``ROWS``.
        folder: where to.
    """
    folder.mkdir(parents=True)
    lines = [json.dumps(ROWS[name](i)) + "\n" for i in range(COUNT)]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
