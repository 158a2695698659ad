"""A name is suggested only where it is really near."""

from __future__ import annotations

import pytest

from fusewright.errors import did_you_mean, nearest

KEYS = (
    "lora_r", "local_rank", "lora_dropout", "max_steps", "save_steps", "eval_steps", "gc_steps",
    "base_model", "model_type", "model_config", "sequence_len", "num_epochs", "type", "fp16",
    "lora_target_modules", "lora_target_linear", "tf32", "qat", "output_dir",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lora_rank", "lora_r"),  # not local_rank, which has more letters in common
        ("max_step", "max_steps"),
        ("tpye", "type"),
        ("sequence_length", "sequence_len"),
        ("lora_target_linaer", "lora_target_linear"),
        ("output", "output_dir"),
        ("epochs", "num_epochs"),
        ("dropout", "lora_dropout"),
        ("model", "base_model"),
        ("target_modules", "lora_target_modules"),
    ],
)
def test_what_was_meant(given: str, meant: str) -> None:
    assert nearest(given, KEYS) == meant
    assert did_you_mean(given, KEYS) == f"did you mean {meant}?"


@pytest.mark.parametrize(
    "given", ["banana", "foo", "", "steps", "fp32", "precision", "rank", "quant", "data", "-"]
)
def test_nothing_is_near(given: str) -> None:
    assert nearest(given, KEYS) is None
    assert did_you_mean(given, KEYS) == ""
