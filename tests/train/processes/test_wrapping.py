"""The configuration that DeepSpeed gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewright.errors import RecipeError
from fusewright.train.processes.wrapping import deepspeed_config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


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
    found = deepspeed_config(asked, dtype, adapters)
    assert [name for name in ("bf16", "fp16") if found[name]["enabled"]] == enabled
    assert found["train_batch_size"] == "auto"


@pytest.mark.parametrize("adapters", [False, True])
def test_a_dtype_that_it_names_is_the_recipes(adapters: bool) -> None:
    named = {"bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 0}}
    found = deepspeed_config(named, BF16, adapters)
    assert found["bf16"] == {"enabled": not adapters}
    assert found["fp16"] == {"enabled": False, "loss_scale": 0}
    with pytest.raises(
        RecipeError, match=r"bf16\.enabled is true, but the recipe trains in float32"
    ):
        deepspeed_config(named, FP32, adapters)
    off = {"bf16": {"enabled": False}}
    with pytest.raises(RecipeError, match="auto for it, or set bf16: false"):
        deepspeed_config(off, BF16, adapters)
