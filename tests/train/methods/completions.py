"""Small recipes that learn from rewards, and completions that nobody draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REWARDS = '''
def letters(completions, answer, **columns):
    """How many letters there are, and a little for the right answer."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(x.isalpha() for x in t) / 8 + (a in t) for t, a in zip(texts, answer)]


def some(prompts, completions):
    return [None if i % 3 == 0 else float(len(p)) for i, p in enumerate(prompts)]


def failing(completions, trainer_state, **columns):
    if trainer_state.global_step < 2:
        return [0.5] * len(completions)
    raise KeyError("no such answer")


def too_few(completions, **columns):
    return [1.0]


def words(completions, **columns):
    return ["good"] * len(completions)


def one_number(completions, **columns):
    return 1.0


def endless(completions, **columns):
    return [float("inf")] * len(completions)


def silent(completions, **columns):
    return [None] * len(completions)


def no_number(completions, **columns):
    return [float("nan")] * len(completions)


def constant(completions, **columns):
    return [0.25] * len(completions)


def by_prompt(prompts, completions, **columns):
    return [float(len(p[0]["content"])) for p in prompts]


def ending(completions, **columns):
    raise SystemExit(0)


async def later(completions, **columns):
    return [float(len(columns["completion_ids"][i])) for i in range(len(completions))]
'''


def rows(number: int = 20) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": f"Say {i}" + "!" * (i % 3)}], "answer": str(i)}
        for i in range(number)
    ]


def grpo_recipe(
    base: Path, folder: Path, rewards: Sequence[str] = ("letters",), **keys: Any
) -> dict[str, Any]:
    """Four steps with LoRA on the tiny model: two prompts each, with four completions of each."""
    data, functions = folder / "prompts.jsonl", folder / "of_mine.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    functions.write_text(REWARDS, encoding="utf-8")
    named = [
        n if ":" in n or n in ("exact_match", "format") else f"{functions}:{n}" for n in rewards
    ]
    trl = {
        "num_generations": 4, "max_completion_length": 6, "reward_funcs": named,
        **keys.pop("trl", {}),
    }  # fmt: skip
    recipe = {
        "base_model": str(base), "bf16": False, "optimize": False, "audit": False,
        "rl": "grpo", "trl": trl,
        "chat_template": "chatml", "adapter": "lora", "lora_r": 4, "lora_target_linear": True,
        "datasets": [{"path": str(data), "type": "chat_template"}], "val_set_size": 4,
        "sequence_len": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": 4, "learning_rate": 1e-2, "lr_scheduler": "constant", "logging_steps": 1,
        "codegen": "eager", "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }  # fmt: skip
    return {**recipe, **keys}


def drawn(prompts: Sequence[Sequence[int]], length: int = 5) -> list[list[int]]:
    """Completions that depend on the prompts and on the place in a group alone.

    They are of one length, so that figures do not depend on which of them are in a batch together.
    """
    return [
        [3 + (sum(ids) * 7 + 31 * (i % 4) + 13 * j * (1 + i % 4)) % 250 for j in range(length)]
        for i, ids in enumerate(prompts)
    ]
