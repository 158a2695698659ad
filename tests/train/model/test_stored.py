"""Base models stored in few bits: what is asked before they load, and what is checked then."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fusewright.errors import RecipeError
from fusewright.train.model import stored
from fusewright.train.model.stored import STORED, require_usable, require_whole
from fusewright.train.recipe.recipe import Recipe

from ...models.stored_formats import STAND_INS


def _asked(method: str, adapter: str | None = "lora", **keys: Any) -> None:
    recipe = Recipe(base_model="base", datasets=[{"path": "x"}], adapter=adapter, **keys)
    require_usable(recipe, SimpleNamespace(quantization_config={"quant_method": method}))


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for method, extra in (("gptq", "gptq"), ("compressed-tensors", "compressed-tensors")):
        with pytest.raises(RecipeError, match=rf"stored by {method}.*'fusewright\[{extra}\]'"):
            _asked(method)


def test_what_cannot_be_trained_over_says_so():
    with pytest.raises(RecipeError, match="no gradient: set model_quantization_config: Mxfp4Confi"):
        _asked("mxfp4")
    kwargs = {"model_quantization_config_kwargs": {"dequantize": True}}
    _asked("mxfp4", model_quantization_config="Mxfp4Config", **kwargs)
    with pytest.raises(RecipeError, match="cannot be trained themselves: set adapter"):
        _asked("fp8", adapter=None)
    _asked("fp8")
    _asked("a method of tomorrow")


def test_a_recipe_may_require_gptq():
    with pytest.raises(RecipeError, match=r"gptq: the weights of base are not .*, but by fp8"):
        _asked("fp8", gptq=True)
    recipe = Recipe(base_model="base", datasets=[{"path": "x"}], adapter="lora", gptq=True)
    with pytest.raises(RecipeError, match=r"gptq: the weights of base are not stored by GPTQ$"):
        require_usable(recipe, SimpleNamespace())
    with pytest.raises(RecipeError, match=r"needs gptqmodel") if not _has_gptq() else nullcontext():
        _asked("gptq", gptq=True)


def _has_gptq() -> bool:
    return importlib.util.find_spec("gptqmodel") is not None


def test_every_extra_is_there():
    tomllib = pytest.importorskip("tomllib")
    root = stored.__file__.rpartition("/src/")[0] or "."
    with open(f"{root}/pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for method in STORED.values():
        packages = extras[method.extra] if method.extra else []
        assert not method.module or any(
            p.replace("-", "_").startswith(method.module) for p in packages
        )


def _model() -> Any:
    gptq = next(f for f in STAND_INS if f.name == "gptq")
    layer: Any = gptq.make(64, 128, torch.bfloat16)
    layer.bits, layer.group_size = 4, 64
    return nn.ModuleDict({"proj": layer})


def test_tensors_that_cannot_be_right_are_named():
    require_whole(_model())
    model = _model()
    model.proj.scales[1, 3] = torch.nan
    with pytest.raises(RecipeError, match=r"proj\.scales: 1 of its 128 numbers are not finite"):
        require_whole(model)
    model = _model()
    model.proj.qweight = model.proj.qweight[:7]
    with pytest.raises(RecipeError, match=r"proj\.qweight: .* the pack is torn"):
        require_whole(model)
    model = _model()
    model.proj.group_size = 32
    with pytest.raises(RecipeError, match=r"proj\.scales: 2 groups, .* groups of 32 have 4"):
        require_whole(model)
    model = _model()
    model.proj.g_idx[5] = 2
    with pytest.raises(RecipeError, match=r"proj\.g_idx: groups from 0 to 2, where there are 2"):
        require_whole(model)
