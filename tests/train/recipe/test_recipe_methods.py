"""What several keys of a recipe mean together."""

from __future__ import annotations

from typing import Any

import pytest

from fusewright.train.recipe.recipe import Recipe


def recipe(**keys: Any) -> Recipe:
    return Recipe(base_model="a/b", **keys)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"flash_attention": True}, None),
        ({"sdp_attention": True}, "sdpa"),
        ({"eager_attention": True}, "eager"),
        ({"flex_attention": True}, "flex_attention"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    ],
)
def test_attention(keys: dict[str, Any], expected: str | None) -> None:
    assert recipe(**keys).attention() == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "auto"),
        ({"bf16": True}, "bfloat16"),
        ({"bf16": "full"}, "bfloat16"),
        ({"bf16": False}, "float32"),
        ({"bf16": False, "bfloat16": True}, "bfloat16"),
        ({"bf16": False, "fp16": True}, "float16"),
        ({"float16": True}, "float16"),
        ({"bf16": "auto", "fp16": False}, "auto"),
        ({"float32": True}, "float32"),
    ],
)
def test_precision(keys: dict[str, Any], expected: str) -> None:
    assert recipe(**keys).precision() == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, []),
        ({"wandb_project": "p"}, ["wandb"]),
        ({"wandb_project": "p", "wandb_mode": "disabled"}, []),
        ({"wandb_project": "p", "use_wandb": False}, []),
        ({"use_wandb": True}, ["wandb"]),
        ({"mlflow_experiment_name": "e"}, ["mlflow"]),
        ({"mlflow_tracking_uri": "u"}, ["mlflow"]),
        ({"comet_project_name": "p"}, ["comet_ml"]),
        ({"use_tensorboard": True}, ["tensorboard"]),
        ({"trackio_project_name": "p"}, ["trackio"]),
        ({"use_tensorboard": True, "wandb_project": "p"}, ["wandb", "tensorboard"]),
    ],
)
def test_reporters(keys: dict[str, Any], expected: list[str]) -> None:
    assert recipe(**keys).reporters() == expected


@pytest.mark.parametrize(
    ("keys", "saving", "evaluation"),
    [
        ({}, "no", "no"),
        ({"save_steps": 5, "eval_steps": 5}, "steps", "no"),
        ({"saves_per_epoch": 1, "evals_per_epoch": 1, "val_set_size": 2}, "steps", "steps"),
        ({"save_strategy": "epoch", "eval_strategy": "epoch", "val_set_size": 2}, "epoch", "epoch"),
        ({"save_strategy": False, "eval_strategy": False, "val_set_size": 2}, "no", "no"),
    ],
)
def test_when(keys: dict[str, Any], saving: str, evaluation: str) -> None:
    assert (recipe(**keys).saving(), recipe(**keys).evaluation()) == (saving, evaluation)


def test_batches_and_packs() -> None:
    assert recipe(gradient_accumulation_steps=3).accumulation() == 3
    assert recipe(batch_size=8, micro_batch_size=2).accumulation() == 4
    assert recipe(sample_packing=True).packs_validation()
    assert not recipe(sample_packing=True, eval_sample_packing=False).packs_validation()
    assert not recipe().packs_validation()
    assert recipe(streaming=True).streams()
    assert recipe(gradient_checkpointing="offload").checkpointing()
