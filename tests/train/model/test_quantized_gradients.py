"""A validation before training leaves the gradients of a quantized model as they are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fusewright.train.model.adapters import add_adapter
from fusewright.train.model.load import load_model
from fusewright.train.recipe.load import load_recipe


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_validation_takes_no_gradients_away(recipe: dict[str, Any], bits: int) -> None:
    # bitsandbytes lays 4 bits out anew for evaluation on some CPUs, for a kernel without backward
    adapter = {4: "qlora", 8: "lora"}[bits]
    checked = load_recipe({**recipe, "adapter": adapter, f"load_in_{bits}bit": True, "bf16": True})
    ids = torch.arange(3, 35).reshape(2, 16)
    gradients: list[dict[str, torch.Tensor | None]] = []
    for validated in (False, True):
        torch.manual_seed(0)
        model = add_adapter(load_model(checked), checked)
        if validated:
            model.eval()
            with torch.no_grad():
                model(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    fresh, after = gradients
    moved = [n for n, g in fresh.items() if g is not None and bool(g.any())]
    assert any("layers.0." in n for n in moved)  # the gradient comes all the way down
    for name in moved:
        again, gradient = after[name], fresh[name]
        assert again is not None, name
        assert gradient is not None
        assert torch.equal(again, gradient), name
