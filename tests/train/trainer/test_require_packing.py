"""Which models may be packed for: those in which samples do not see each other once optimized."""

from __future__ import annotations

import contextlib
import types
from types import SimpleNamespace
from typing import Any

import pytest

from fusewright.errors import PackingError, RecipeError
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


@pytest.mark.long
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
@pytest.mark.parametrize("name", ["minimax", "recurrent_gemma", "rwkv"])
def test_what_is_unknown_packs_if_it_is_optimized(name: str) -> None:
    model = _model(name)
    _require(model, optimize=True)
    assert all("forward" not in m.__dict__ for m in model.modules())
    with pytest.raises(PackingError, match="set optimize: true"):
        _require(model, optimize=False)


def test_what_mixes_rows_is_named() -> None:
    """Also where it is a function that the instance has."""
    model = _model("rwkv")

    def mixed(self: Any, hidden: Any, state: Any = None) -> Any:
        result, state = type(self).forward(self, hidden, state=state)
        return result + hidden.flatten(0, 1).cumsum(0).view_as(hidden), state

    mixer = model.rwkv.blocks[1].feed_forward
    mixer.forward = types.MethodType(mixed, mixer)
    name = r"rwkv\.blocks\.1\.feed_forward \(RwkvFeedForward\)"
    with pytest.raises(
        RecipeError, match=rf"{name}, which cannot be told where samples begin; set it to false"
    ):
        _require(model, optimize=True)


@pytest.mark.parametrize("size", [1e-7, 1e-2], ids=["rounding", "leak"])
def test_roundings_are_no_leak(size: float) -> None:
    """Experts get other rows with every pack, and how many rows there are decides how sums round.

    ``detach``: there is no gradient by which the larger difference could be found, either.
    """
    model = build("llama", seed=1)

    def scaled(module: Any, args: Any, output: Any) -> Any:
        return output * (1 + size * args[0][:, :1].detach().sign())

    model.model.layers[0].mlp.register_forward_hook(scaled)
    named = pytest.raises(RecipeError, match=r"layers\.0\.mlp \(LlamaMLP\)")
    with named if size > 1e-3 else contextlib.nullcontext():
        _require(model, optimize=True)
