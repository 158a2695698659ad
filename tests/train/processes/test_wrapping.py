"""The configuration that DeepSpeed gets, and what the Trainer says of it."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fusewright.errors import RecipeError
from fusewright.train.processes.wrapping import check_deepspeed, deepspeed_config
from fusewright.train.processes.zero import require_one_dtype

ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
THERE = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@THERE
@pytest.mark.parametrize("asked", [{}, {"bf16": {"enabled": "auto"}, "fp16": {}}])
@pytest.mark.parametrize(
    ("dtype", "adapters", "enabled"),
    [
        (FP32, False, []), (BF16, False, ["bf16"]), (FP16, False, ["fp16"]),
        (FP32, True, []), (BF16, True, []), (FP16, True, ["fp16"]),  # the loss is scaled there
    ],
)  # fmt: skip
def test_its_dtype_is_that_of_what_is_trained(
    asked: dict[str, Any], dtype: torch.dtype, adapters: bool, enabled: list[str]
) -> None:
    found = deepspeed_config({**ZERO, **asked}, dtype, adapters)
    assert [name for name in ("bf16", "fp16") if found[name]["enabled"]] == enabled
    assert found["train_batch_size"] == "auto"


@THERE
@pytest.mark.parametrize("adapters", [False, True])
def test_a_dtype_that_it_names_is_the_recipes(adapters: bool) -> None:
    named = {"bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 0}}
    found = deepspeed_config({**ZERO, **named}, BF16, adapters)
    assert found["bf16"] == {"enabled": not adapters}
    assert found["fp16"] == {"enabled": False, "loss_scale": 0}
    with pytest.raises(
        RecipeError, match=r"bf16\.enabled is true, but the recipe trains in float32"
    ):
        deepspeed_config({**ZERO, **named}, FP32, adapters)
    off = {"bf16": {"enabled": False}}
    with pytest.raises(RecipeError, match="auto for it, or set bf16: false"):
        deepspeed_config({**ZERO, **off}, BF16, adapters)


@THERE
@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 2, "reduce_bucket_size": "big"}, r"deepspeed: zero_optimization.reduce_bucket_"),
        ({"stage": 3, "stage3_prefetch": 1}, r"deepspeed: zero_optimization.stage3_prefetch: "),
    ],
)
def test_what_deepspeed_does_not_know_is_named(zero: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        deepspeed_config({"zero_optimization": zero}, FP32)
    deepspeed_config({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, FP32)


@THERE
def test_the_optimizer_is_the_recipes_and_needs_no_compiler() -> None:
    offloaded = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert deepspeed_config(offloaded, FP32)["zero_force_ds_cpu_optimizer"] is False


def test_numbers_that_are_not_the_recipes() -> None:
    own = "- ds bf16.enabled=True vs hf bf16|bf16_full_eval=False"
    other = "- ds train_batch_size=32 vs hf train_batch_size (calculated)=4"
    config = SimpleNamespace(mismatches=[own])
    check_deepspeed(SimpleNamespace(hf_deepspeed_config=config))
    assert config.mismatches == []
    config.mismatches = [own, other]
    with pytest.raises(RecipeError, match=r"deepspeed: train_batch_size=32 in its configuration, "):
        check_deepspeed(SimpleNamespace(hf_deepspeed_config=config))
    check_deepspeed(SimpleNamespace())


def test_all_that_is_trained_has_one_dtype() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(BF16))
    wide = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(dtype=lambda: FP32))
    with pytest.raises(RecipeError, match=r"float32 \(0.bias\) and bfloat16 \(1.bias\): set peft_"):
        require_one_dtype(model, wide)
    narrow = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(dtype=lambda: BF16))
    require_one_dtype(model, narrow)  # which DeepSpeed casts
    require_one_dtype(model, SimpleNamespace())
    model[1].requires_grad_(False)
    require_one_dtype(model, wide)
