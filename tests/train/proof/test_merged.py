"""The merged model against the adapter: the same but for rounding, or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright.train.data import Sample
from fusewright.train.merge import Adapted
from fusewright.train.proof.merged import compare_merged
from fusewright.train.recipe.recipe import Recipe

from ..conftest import make_adapter, make_tokenizer

SAMPLES = [Sample(list(range(3, 35)), [-100, *range(4, 35)]) for _ in range(2)]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with a base, and an adapter as a worker leaves it."""
    make_tokenizer().save_pretrained(make_adapter(tmp_path))
    return tmp_path


def _recipe(folder: Path, **keys: Any) -> Recipe:
    rows = [{"path": "rows.jsonl", "type": "chat_template"}]
    return Recipe.model_validate(
        {"base_model": str(folder / "base"), "adapter": "lora", "datasets": rows, **keys}
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_a_merged_adapter_is_the_adapter_but_for_rounding(trained: Path, bf16: bool) -> None:
    found = compare_merged(_recipe(trained, bf16=bf16), SAMPLES, 1.0, trained)
    assert found["dtype"] == ("bfloat16" if bf16 else "float32")
    assert found["tokens"] == 64
    assert 0 < found["off"] <= found["allowed"] < (0.1 if bf16 else 1e-5)
    assert found["loss_merged"] == pytest.approx(found["loss_adapter"], rel=0.01)


def test_an_update_that_is_left_out_is_found(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Adapted.merge

    def without_one(self: Adapted, path: str, tensors: Any) -> Any:
        return dict(tensors) if path.endswith("1.mlp.down_proj") else merge(self, path, tensors)

    monkeypatch.setattr(Adapted, "merge", without_one)
    found = compare_merged(_recipe(trained, bf16=False), SAMPLES, 1.0, trained)
    assert found["off"] > 10 * found["allowed"]


def test_what_cannot_be_merged_is_skipped_with_the_reason(trained: Path) -> None:
    config = (trained / "base" / "config.json").read_text()
    quantized = config.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1)
    (trained / "base" / "config.json").write_text(quantized)
    found = compare_merged(_recipe(trained), SAMPLES, 1.0, trained)
    assert "quantized" in found["skipped"]
    assert torch.is_grad_enabled()
