"""Images of new sizes: a step is the same, bit for bit, whatever sizes a model has seen before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

import fusewright

from .families import FAMILIES
from .training import Rows, checkpoint, small, write_rows


def _optimized(family: str) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint(family), dtype=torch.float32
    )
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return fusewright.optimize(model.train(), codegen="eager")


def _gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_does_not_depend_on_earlier_sizes(family: str, tmp_path: Path) -> None:
    rows = Rows.of(small(family, write_rows(tmp_path, 9, kinds="12"), tmp_path / "out"))
    seasoned = _optimized(family)
    batches = [rows.batch(seasoned, [[sample]], packing=False) for sample in rows.samples]
    for batch in batches:
        _gradients(seasoned, batch)
    for batch in batches[:2]:  # one image, and two
        expected = _gradients(_optimized(family), batch)
        found = _gradients(seasoned, batch)
        different = [n for n, t in expected.items() if not torch.equal(t, found[n])]
        assert not different, different
