"""What a worker does to the model before it trains, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fusewright.errors import RecipeError
from fusewright.train.data import Sample
from fusewright.train.proof import compare, worker
from fusewright.train.proof.compare import PeakMemory, compared, stride_of
from fusewright.train.proof.worker import (
    NO_ROOM,
    exact_dtype,
    fill_zeros,
    make_exact,
    read_samples,
    without_dropout,
    write_samples,
)
from fusewright.train.recipe.recipe import Recipe

from ..conftest import make_model


def _adapted(**settings: Any) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    return get_peft_model(make_model(), config)


def test_no_adapter_begins_as_zeros() -> None:
    one, other = _adapted(), _adapted()
    zeros = [name for name, p in compared(one) if not p.any()]
    assert zeros
    fill_zeros(one, 42)
    fill_zeros(other, 42)
    pairs = zip(compared(one), compared(other), strict=True)
    for (name, p), (_, q) in pairs:
        assert p.any()
        if name in zeros:
            assert torch.equal(p, q)
            assert 0 < p.std() < 0.02


def test_nothing_random_is_left() -> None:
    model = _adapted(lora_dropout=0.1)
    attention = model.base_model.model.model.layers[0].self_attn
    attention.attention_dropout = 0.2
    attention.router_jitter_noise = 0.3
    assert without_dropout(model) == ["attention_dropout", "dropout", "router_jitter_noise"]
    model.train()
    ids = torch.arange(3, 19)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert without_dropout(model) == []


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32),
     (torch.float32, torch.float64)],
)  # fmt: skip
def test_the_higher_precision(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert exact_dtype(make_model(), dtype) == wide


def test_fp64_goes_through_norms_and_rotary_embeddings() -> None:
    """Both compute in fp32 by themselves; in fp64 the answer is another one, by fp32's rounding."""
    ids = torch.arange(3, 19)[None]
    model = make_model().eval()
    low = model(input_ids=ids).logits
    partly = make_model().eval().double()(input_ids=ids).logits
    wide = make_model().eval()
    make_exact(wide, Recipe.model_construct(), torch.float64)
    logits = wide(input_ids=ids).logits
    assert logits.dtype == torch.float64
    assert 1e-9 < (logits - partly).abs().max() < 1e-4
    assert 1e-9 < (logits - low).abs().max() < 1e-4


def test_no_room_for_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Memory:
        available = 1000

    monkeypatch.setattr(worker.psutil, "virtual_memory", _Memory)
    with pytest.raises(RecipeError, match=NO_ROOM):
        make_exact(make_model(), Recipe.model_construct(), torch.float64)


def test_of_many_weights_some_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10)
    assert stride_of(model) == 1
    monkeypatch.setattr(compare, "MOST", 30)
    assert stride_of(model) == 5  # odd
    assert len(compare.chosen_elements(model.weight, 5)) == 20


def test_samples_are_read_as_written(tmp_path: Path) -> None:
    samples = [Sample([1, 2, 3], [-100, 2, 3]), Sample([4], [-100])]
    write_samples(tmp_path / "samples.json", samples)
    assert read_samples(tmp_path / "samples.json") == samples


def test_the_peak_is_that_since_the_mark() -> None:
    block = torch.ones(60 * 2**18)  # 60 MiB
    del block
    peak = PeakMemory()
    before = peak.peak()["rss_mb"]
    block = torch.ones(100 * 2**18)
    assert peak.peak()["rss_mb"] - before > 30
    del block
