"""Which models may be packed for: those whose structure keeps samples apart once optimized."""

from __future__ import annotations

import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fusewright.errors import PackingError, RecipeError
from fusewright.train.trainer.ready import require_packing
from tests.models.architectures import build


def _require(model: Any, optimize: bool = True) -> None:
    """Check a model, and fail if one of its modules is called."""
    for m in model.modules():
        m.register_forward_pre_hook(lambda module, args: pytest.fail(f"{module} was called"))
    recipe: Any = SimpleNamespace(optimize=optimize)
    require_packing(model, recipe)


def test_a_recurrent_model_packs_if_it_is_optimized() -> None:
    _require(build("mamba2"))
    with pytest.raises(
        PackingError,
        match=r"^sample_packing: the samples of a pack would see each other: "
        r"backbone\.layers\.0\.mixer \(Mamba2Mixer\) keeps samples apart in an optimized model "
        r"only; set optimize: true, or sample_packing: false$",
    ):
        _require(build("mamba2"), optimize=False)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("name", ["minimax", "recurrent_gemma", "rwkv"])
def test_mixers_that_take_no_segments_are_refused(name: str, optimize: bool) -> None:
    with pytest.raises(RecipeError, match=r"layers|blocks.*; set sample_packing: false$") as caught:
        _require(build(name), optimize)
    assert not isinstance(caught.value, PackingError)


def test_attention_packs_in_eager_mode() -> None:
    _require(build("llama"), optimize=False)


def test_a_model_on_the_meta_device_is_judged_as_well() -> None:
    with torch.device("meta"):
        model = type(build("qwen3_next"))(build("qwen3_next").config)
    _require(model)


class _Shift(nn.Module):
    """A mixer of another kind, which takes a cache as all mixers do."""

    def forward(self, x: Any, cache: Any = None, **more: Any) -> Any:
        return x.cumsum(1), None


def test_a_mixer_that_replaces_attention_is_refused() -> None:
    model: Any = build("llama")
    model.model.layers[1].self_attn = _Shift()
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.self_attn \(_Shift\) mixes"):
        _require(model)


def test_a_forward_of_an_instance_is_judged_by_its_own_code() -> None:
    def mixed(self: Any, hidden_states: Any, cache: Any = None, **more: Any) -> Any:
        return hidden_states.cumsum(1), None

    model: Any = build("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = types.MethodType(mixed, attention)
    with pytest.raises(RecipeError, match=r"self_attn \(LlamaAttention\) mixes positions"):
        _require(model)
