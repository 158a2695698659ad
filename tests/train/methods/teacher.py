"""Small recipes of distillation, with rows of a teacher that knows the answers."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from ..conftest import make_tokenizer, write_rows
from .recipes import WORDS

TYPE = "axolotl.integrations.kd.chat_template"


def taught_rows(number: int = 40, form: str = "vllm", most: int = 4) -> list[dict[str, Any]]:
    """Chats whose teacher gives most of the probability to the right token.

    Args:
        number: how many.
        form: ``"vllm"`` for tokens with log-probabilities, ``"columns"`` for two lists.
        most: tokens that the teacher names, at most.
    """
    draw, tokenizer, rows = random.Random(0), make_tokenizer(), []
    for i in range(number):
        answer = " ".join([draw.choice(WORDS)] * (1 + i % 3))
        entries = []
        for token in [*tokenizer(answer, add_special_tokens=False).input_ids, 2]:
            others = [t for t in draw.sample(range(3, 258), most) if t != token]
            named = [token, *others[: draw.randint(1, most - 1)]]
            weights = [6.0, *(draw.random() for _ in named[1:])]
            values = [math.log(0.99 * w / sum(weights)) for w in weights]
            entries.append(list(zip(named, values, strict=True)))
        row: dict[str, Any] = {
            "messages": [
                {"role": "user", "content": f"Say {answer}"},
                {"role": "assistant", "content": answer},
            ]
        }
        if form == "vllm":
            row["logprobs"] = [
                [{"token": f"token_id:{t}", "logprob": value} for t, value in entry]
                for entry in entries
            ]
        else:
            row["logprobs"] = [[value for _, value in entry] for entry in entries]
            row["target_token_ids"] = [[t for t, _ in entry] for entry in entries]
        rows.append(row)
    return rows


def taught_recipe(base: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """Four steps of distillation with LoRA on the tiny model."""
    path = write_rows(folder / "taught.jsonl", taught_rows())
    recipe = {
        "base_model": str(base), "bf16": False, "optimize": False, "audit": False,
        "kd_trainer": True,
        "kd_alpha": 0.9, "kd_ce_alpha": 0.1, "kd_temperature": 2.0,
        "chat_template": "chatml", "adapter": "lora", "lora_r": 4, "lora_target_linear": True,
        "datasets": [{"path": str(path), "type": TYPE}], "val_set_size": 6,
        "sequence_len": 64, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 4, "learning_rate": 1e-2, "lr_scheduler": "constant", "logging_steps": 1,
        "codegen": "eager", "output_dir": str(folder / "out"),
    }  # fmt: skip
    return {**recipe, **keys}
