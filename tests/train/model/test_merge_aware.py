"""Merged weights are rounded in training as an export rounds them, and what is saved is plain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from rich.console import Console
from torch import Tensor, nn

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.model import rounding
from fusewright.train.model.merge_aware import (
    Rounding,
    RoundingStart,
    exported_layers,
    merged_weight,
    round_in_training,
    rounding_class,
    roundtrip,
)
from fusewright.train.recipe.export_formats import FORMATS, format_named
from tests.explained import explain

from ..conftest import checked, learnt, make_model
from ..results import assert_same, curves, stop_at

QUIET = Console(quiet=True)
FEW = [f.name for f in FORMATS.values() if f.rounds]


def needs_library(name: str) -> None:
    pytest.importorskip("gguf" if FORMATS[name].writer == "gguf" else "compressed_tensors")


def adapted(name: str, settings: dict[str, Any], **changes: Any) -> tuple[Any, Any, list[str]]:
    """The tiny model with a trained adapter that rounds, the same without, and what is rounded."""
    recipe = checked("x", export_format=name, adapter="lora", lora_target_linear=True)
    base = make_model(**changes)
    paths = exported_layers(base, recipe)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    model = learnt(get_peft_model(base, LoraConfig(**chosen)))
    plain = copy.deepcopy(model)
    round_in_training(model, recipe, paths)
    return model, plain, paths


def as_exported(plain: Any, name: str, paths: list[str]) -> Any:
    """The merged model with each weight written and read back by the library."""
    merged, format = copy.deepcopy(plain).merge_and_unload(), format_named(name)
    layers = {path: merged.get_submodule(path) for path in paths}
    ends = [merged.get_input_embeddings(), merged.get_output_embeddings()]
    layers |= {f"end {i}": end for i, end in enumerate(ends) if format.with_ends}
    weights = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    groups = rounding.sharing({p: tuple(w.shape) for p, w in weights.items()})
    for path, layer in layers.items():
        largest = None
        if rounding.shares_scale(format):
            largest = torch.stack([weights[p].abs().max() for p in groups[path]]).max()
        layer.weight.data.copy_(rounding.roundtrip(format, weights[path], largest))
    return merged


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **grads}


@pytest.mark.parametrize("name", FEW)
def test_the_quick_rounding_is_the_librarys(name: str) -> None:
    needs_library(name)
    format = FORMATS[name]
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in ((9, 128), (131, 640)):
            weight = torch.randn(shape) * torch.exp(3 * torch.randn(shape[0], 1)) / 20
            weight[1], weight[2, :32], weight[3] = 0, 0, weight[3] * 1e-30
            weight[4] = (weight[4] * 50).round() / 16  # halfway between two values
            weight[5] *= 1e4 / weight[5].abs().max()
            weight = weight.to(dtype)
            shared = [weight.abs().max() * 2] if rounding.shares_scale(format) else []
            for largest in (None, *shared):
                theirs = rounding.roundtrip(format, weight, largest)
                ours = roundtrip(format, weight, largest)
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs), (dtype, shape)


SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True},
    "biases": {"bias": "all", "lora_bias": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("name", ["int4-g32", "nvfp4", "q8_0"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_training_sees_the_exported_model(name: str, settings: str) -> None:
    needs_library(name)
    changes = {"attention_bias": True, "mlp_bias": True} if settings == "biases" else {}
    model, plain, paths = adapted(name, SETTINGS[settings], **changes)
    exported = as_exported(plain, name, paths)
    ids = torch.randint(3, 262, (2, 9))
    for module in (model.train(), exported.train()):
        assert torch.equal(module(input_ids=ids).logits, exported(input_ids=ids).logits)


@pytest.mark.parametrize("settings", ["LoRA", "DoRA"])
def test_rounding_is_the_identity_backward(settings: str) -> None:
    needs_library("int4-g32")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32))
    chosen = LoraConfig(r=4, target_modules=["0"], use_dora=settings == "DoRA")
    model = learnt(get_peft_model(base, chosen))
    layer = model.get_base_model()[0]
    plain = copy.deepcopy(layer)
    layer.rounding = Rounding(FORMATS["int4-g32"], torch.float32, [])
    layer.__class__ = rounding_class(type(layer))  # type: ignore[arg-type]  # 2026-11-30: a class
    x = torch.randn(3, 5, 64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    dy = torch.randn(3, 5, 32)
    layer(x).backward(dy)
    # the same as a value: the merged weight, to which what rounding adds is a constant
    merged = merged_weight(plain, torch.float32)
    error = roundtrip(FORMATS["int4-g32"], merged) - merged
    (plain(z) + z @ error.t()).backward(dy)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
    theirs = dict(plain.named_parameters())
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert len(grads) == 2 + (settings == "DoRA")
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[name].grad, rtol=1e-3, atol=1e-3, msg=name)


def test_whole_weights_and_steps_without_rounding() -> None:
    needs_library("int4-g32")
    recipe = checked("x", export_format="int4-g32", export_format_after_n_steps=2)
    model = make_model()
    plain = copy.deepcopy(model)
    round_in_training(model, recipe, exported_layers(model, recipe))
    ids = torch.randint(3, 262, (2, 9))
    start = RoundingStart(model, recipe)

    def at(global_step: int) -> dict[str, Tensor]:
        start.on_step_begin(None, type("State", (), {"global_step": global_step}), None)
        return step(model, ids)

    theirs = step(plain, ids)
    for name, value in at(1).items():
        assert torch.equal(value, theirs[name]), name
    rounded = at(2)
    assert rounded.keys() == theirs.keys()
    exported = as_exported_whole(plain)
    assert torch.equal(rounded["loss"], step(exported, ids)["loss"])
    assert model.state_dict().keys() == plain.state_dict().keys()


def as_exported_whole(plain: Any) -> Any:
    model = copy.deepcopy(plain)
    for layer in rounding.rounded_layers(model, FORMATS["int4-g32"]).values():
        layer.weight.data.copy_(rounding.roundtrip(FORMATS["int4-g32"], layer.weight.data))
    return model


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}])
def test_what_surrounds_a_rounded_layer_is_rewritten(
    settings: dict[str, Any], fresh_dynamo: None
) -> None:
    needs_library("int4-g32")
    model, _, _ = adapted("int4-g32", settings)
    eager = copy.deepcopy(model.train())
    optimize(model, codegen="eager")
    ids = torch.randint(3, 262, (2, 9))
    torch.manual_seed(1)
    ours = step(model, ids)
    torch.manual_seed(1)
    for name, value in step(eager, ids).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
    report = explain(model)
    assert {"rms_norm", "linear_cross_entropy"} <= report.by_rule().keys()
    assert any("rounded as an export rounds it" in b.reason for b in report.bypasses)


@pytest.mark.long
def test_a_base_in_4_bits_is_merged_as_it_is() -> None:
    pytest.importorskip("bitsandbytes")
    needs_library("int4-g32")
    from transformers import BitsAndBytesConfig

    from fusewright.train.model.quantize import dequantize_linears, quantize

    recipe = checked("x", export_format="int4-g32", adapter="qlora", load_in_4bit=True,
                     lora_target_linear=True)  # fmt: skip
    base, dense = make_model(), make_model()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for one in (base, dense):
        quantize(one, config, torch.device("cpu"))
    dequantize_linears(dense, torch.float32)
    paths = exported_layers(base, recipe)
    assert len(paths) == 14
    chosen = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model, plain = learnt(get_peft_model(base, chosen)), get_peft_model(dense, chosen)
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    round_in_training(model, recipe, paths)
    exported = as_exported(plain, "int4-g32", paths)
    ids = torch.randint(3, 262, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, exported(input_ids=ids).logits)
    assert all("lora_" in name for name in step(model, ids) if name != "loss")


def test_what_cannot_be_merged_is_refused() -> None:
    needs_library("int4-g32")
    from peft import LoHaConfig

    recipe = checked("x", export_format="int4-g32", adapter="lora", lora_target_linear=True)
    base = make_model()
    paths = exported_layers(base, recipe)
    model = get_peft_model(base, LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RecipeError, match="q_proj has an adapter other than LoRA"):
        round_in_training(model, recipe, paths)


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_library("nvfp4")
    keys = {**recipe, "export_format": "nvfp4", "export_format_after_n_steps": 2, "max_steps": 5,
            "gradient_accumulation_steps": 2}  # fmt: skip
    whole = train(keys, console=QUIET, output_dir=str(tmp_path / "whole"))
    assert whole.status == "finished"
    with monkeypatch.context() as patched:
        stop_at(patched, 3, "on_step_end")
        assert train(keys, console=QUIET).status == "interrupted"
    resumed = train(keys, console=QUIET, resume_from_checkpoint=True)
    assert resumed.status == "finished"
    assert resumed.adapter_check is not None
    assert resumed.adapter_check["exact"]
    assert resumed.adapter_check["optimized_difference"] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert curves(resumed) == curves(whole)
    plain = train({k: v for k, v in keys.items() if not k.startswith("export_format")},
                  console=QUIET, output_dir=str(tmp_path / "plain"))  # fmt: skip
    assert curves(plain) != curves(whole)
