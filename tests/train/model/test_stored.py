"""Base models stored in few bits: what is asked before they load, and what is checked then."""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge import merge
from fusewright.train.model import stored
from fusewright.train.model.load import load_model
from fusewright.train.model.stored import (
    STORED,
    Packing,
    is_stored,
    require_usable,
    require_whole,
    unpacked_weight,
)
from fusewright.train.preflight import model_obstacles
from fusewright.train.recipe.recipe import Recipe

from ...models.stored_formats import STAND_INS
from ..conftest import checked


def _asked(method: str, adapter: str | None = "lora", **keys: Any) -> None:
    recipe = Recipe(base_model="base", datasets=[{"path": "x"}], adapter=adapter, **keys)
    require_usable(recipe, SimpleNamespace(quantization_config={"quant_method": method}))


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for method, extra in (("gptq", "gptq"), ("compressed-tensors", "compressed-tensors")):
        said = rf'stored by {method}.*"fusewright\[{extra}\]"'
        with pytest.raises(RecipeError, match=said):
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


def test_a_base_that_cannot_be_trained_over_is_found_before_rows_are_read(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "stored")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (folder / "config.json").write_text(json.dumps(config))
    found = list(model_obstacles(checked(folder, adapter="lora")))
    assert any("cannot be trained over: transformers does not load it" in f for f in found), found


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


@pytest.mark.parametrize("outer", ["", "base_model.model."])
def test_layers_that_are_left_as_they_are_are_not_counted_as_packed(outer):
    packing = Packing(4, plain=("re:visual.*", "lm_head"))
    assert not packing.has(f"{outer}visual.blocks.0.base_layer.proj")
    assert not packing.has(f"{outer}lm_head")
    assert packing.has(f"{outer}model.layers.0.base_layer.q_proj")


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
    model.proj.scales = model.proj.scales.to(torch.float8_e4m3fn)
    model.proj.scales[0, 0] = torch.nan
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


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_packed_layer_gives_its_weight_without_rounding(name):
    form = next(f for f in STAND_INS if f.name == name)
    layer: Any = form.make(64, 128, torch.bfloat16)
    bias = layer.bias.clone()
    assert is_stored(layer)
    assert torch.equal(unpacked_weight(layer, torch.bfloat16), form.dequantized(layer))
    assert torch.equal(layer.bias, bias)
    assert not is_stored(nn.Linear(4, 4))


PACKED_BASES: dict[str, dict[str, Any]] = {
    "FP8 by rows": {"format": "float-quantized", "num_bits": 8, "type": "float",
                    "strategy": "channel"},
    "INT4 in groups": {"format": "pack-quantized", "num_bits": 4, "type": "int",
                       "strategy": "group", "group_size": 16},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED_BASES)
def test_a_packed_base_from_load_to_merge(
    name: str, recipe: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """Trained packed and optimized as in eager mode; plain PEFT loads and merges the adapter."""
    pytest.importorskip("compressed_tensors")
    recipe["base_model"] = str(tmp_path / "packed")
    _compress(base, tmp_path / "packed", **PACKED_BASES[name])
    curves = []
    for on in (False, True):
        out = tmp_path / f"{on}"
        result = train(recipe, console=Console(quiet=True), output_dir=str(out), optimize=on)
        curves.append([e["loss"] for e in result.history if "loss" in e])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    sites = (result.optimize or {})["sites"]
    assert sum(s["rule"] == "quant_linear" and s["status"] == "rewritten" for s in sites) == 14
    kept = load_model(checked(tmp_path / "packed", adapter="lora", lora_target_linear=True))
    packed = [n for n, t in kept.state_dict().items() if "proj.weight" in n and not _is_plain(t)]
    assert len(packed) >= 14
    unpacked: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert "CompressedTensorsConfig(dequantize=True)" in (out / "README.md").read_text()
    theirs: Any = PeftModel.from_pretrained(unpacked, str(out)).eval()
    ours: Any = PeftModel.from_pretrained(kept, str(out)).eval()
    ids = torch.arange(20).reshape(1, 20) + 3
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.merge_and_unload()(ids).logits, expected)
        merged: Any = AutoModelForCausalLM.from_pretrained(merge(open_run(out)))
        torch.testing.assert_close(merged.eval()(ids).logits, expected)


def _is_plain(t: torch.Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize > 1


def _compress(base: Path, folder: Path, format: str, **weights: Any) -> None:
    """Store the linear layers of a checkpoint by compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    group = {"targets": ["Linear"], "weights": {**weights, "symmetric": True}, "format": format}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format=format)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            rows = module.weight.detach().unflatten(1, (module.weight_scale.shape[1], -1))
            most = 448 if weights["type"] == "float" else 7
            module.weight_scale.data = rows.abs().amax(-1) / most
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=format)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    compressor.update_config(str(folder))
