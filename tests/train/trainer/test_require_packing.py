"""Which models may be packed for: those in which samples do not see each other once optimized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.train.trainer.ready import require_packing
from tests.models.architectures import build

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _model(name: str) -> Any:
    model: Any = build(name)
    model.config.use_cache = False
    return model.eval()


def _require(model: Any, optimize: bool) -> None:
    recipe: Any = SimpleNamespace(optimize=optimize)
    require_packing(model, recipe)


def test_a_recurrent_model_packs_if_it_is_optimized() -> None:
    model = _model("mamba2")
    _require(model, optimize=True)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(
        RecipeError,
        match=r"Mamba2ForCausalLM lets the samples of a pack see each other, in "
        r"backbone\.layers\.0\.mixer \(Mamba2Mixer\), .* set optimize: true",
    ):
        _require(model, optimize=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        ("minimax", r"model\.layers\.1\.self_attn \(MiniMaxLightningAttention\)"),
        ("recurrent_gemma", r"model\.layers\.0\.temporal_block"),
        ("rwkv", r"rwkv\.blocks\.0\.attention\.time_shift"),
    ],
)
def test_what_takes_no_segments_is_named(name: str, mixer: str) -> None:
    with pytest.raises(RecipeError, match=rf"{mixer}.*takes no segments; set it to false"):
        _require(_model(name), optimize=True)
