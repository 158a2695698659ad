"""Small recipes of each method, with rows that something can be learnt from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ..conftest import write_rows

WORDS = ("red", "green", "blue", "one", "two", "three")

PAIRED = ("dpo", "ipo", "orpo", "cpo", "simpo")
METHODS = (*PAIRED, "kto")
MODELS = ("reward", "process_reward")
"""Models of rewards, which have a key of their own."""


def rows_of(method: str, number: int = 40) -> list[dict[str, Any]]:
    """Rows in which the better answer is what the question says."""
    draw, rows = random.Random(0), []
    for i in range(number):
        right, wrong = draw.sample(WORDS, 2)
        asked = {"prompt": f"Say {right}"}
        good, bad = f"{right} " * (1 + i % 3), f"{wrong} " * (1 + (i + 1) % 4)
        if method == "process_reward":
            steps = [f"{wrong} first.", f"{right} then."]
            rows.append({**asked, "completions": steps, "labels": [False, True]})
        elif method == "reward":
            rows.append({**asked, "chosen": f"{wrong} yes", "rejected": f"{wrong} no"})
        elif method == "kto":
            rows.append({**asked, "completion": (bad, good)[i % 2], "label": bool(i % 2)})
        else:
            rows.append({**asked, "chosen": good, "rejected": bad})
    return rows


def method_recipe(method: str, base: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """Four steps of a method with LoRA on the tiny model."""
    path = write_rows(folder / f"{method}.jsonl", rows_of(method))
    recipe = {
        "base_model": str(base), "bf16": False, "optimize": False, "audit": False, "rl": method,
        "chat_template": "chatml", "adapter": "lora", "lora_r": 4, "lora_target_linear": True,
        "datasets": [{"path": str(path), "type": "chat_template"}], "val_set_size": 6,
        "sequence_len": 64, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 4, "learning_rate": 1e-2, "lr_scheduler": "constant", "logging_steps": 1,
        "codegen": "eager", "output_dir": str(folder / "out"),
    }  # fmt: skip
    if method in MODELS:
        del recipe["rl"]
        recipe[f"{method}_model"] = True
    if method == "process_reward":
        recipe["datasets"][0]["type"] = "stepwise_supervised"
    return {**recipe, **keys}
