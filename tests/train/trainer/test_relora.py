"""ReLoRA: adapters that are merged during training, and are one adapter in the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.model.adapters import add_adapter
from fusewright.train.model.load import load_model
from fusewright.train.model.relora import Relora, dense
from fusewright.train.recipe.load import load_recipe

from ..conftest import make_model
from ..results import same, weights

QUIET = Console(quiet=True)
KEYS: dict[str, Any] = {
    "relora": True, "jagged_restart_steps": 2, "max_steps": 5, "save_steps": 1,
}  # fmt: skip


def _adapted(recipe: dict[str, Any], **keys: Any) -> tuple[Any, Relora]:
    checked = load_recipe({**recipe, **KEYS, **keys})
    model = add_adapter(load_model(checked), checked)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model, Relora(model, checked, print)


IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def test_a_restart_changes_no_output(recipe: dict[str, Any]) -> None:
    model, relora = _adapted(recipe)
    before = model(IDS).logits
    relora.restart(None)
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)
    relora.finish()
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)
    assert model.peft_config["default"].r == 2 * recipe["lora_r"]


def _rounded(weight: Any, bits: str) -> Any:
    from bitsandbytes import functional

    if bits == "load_in_4bit":
        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        return functional.dequantize_4bit(packed, state)
    packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return functional.int8_vectorwise_dequant(packed, scales)


@pytest.mark.long("load_in_8bit")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@torch.no_grad()
def test_quantized_weights_are_rounded_once(recipe: dict[str, Any], bits: str) -> None:
    """They are made of their first values and all adapters, not of what was rounded before."""
    adapter = "qlora" if bits == "load_in_4bit" else "lora"
    model, relora = _adapted(recipe, adapter=adapter, **{bits: True})
    before = model(IDS).logits
    layer = next(iter(relora.layers.values()))
    expected = dense(layer.get_base_layer()).float()
    for restart in range(2):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.copy_(torch.randn_like(b) * (0.1 + restart))
        expected += 4.0 * b @ a
        relora.restart(None)
        found = dense(layer.get_base_layer())
        torch.testing.assert_close(found, _rounded(expected, bits), atol=1e-6, rtol=0)
    relora.finish()
    for adapted in relora.layers.values():
        adapted.lora_B["default"].weight.zero_()
    plain = load_model(load_recipe({**recipe, "adapter": adapter, bits: True}))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert not torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("method", "ratio", "zeros"), [(None, None, 0.9), ("random", 0.5, 0.5), ("reset", None, 0.999)]
)
def test_the_moments_are_pruned(
    recipe: dict[str, Any], method: str | None, ratio: float | None, zeros: float
) -> None:
    keys = {"relora_prune_method": method, "relora_prune_ratio": ratio}
    model, relora = _adapted(recipe, **{k: v for k, v in keys.items() if v is not None})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    sizes = {id(p): optimizer.state[p]["exp_avg"].abs().max() for p in trained}
    relora.restart(optimizer)
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in trained])
    assert float((moments == 0).float().mean()) == pytest.approx(zeros, abs=0.05)
    if method is None:  # the largest stay
        assert all(optimizer.state[p]["exp_avg"].abs().max() == sizes[id(p)] for p in trained)
    assert all(float(optimizer.state[p]["step"]) == 1 for p in trained)


@pytest.mark.long
def test_the_result_is_one_adapter_of_the_base(recipe: dict[str, Any], tmp_path: Path) -> None:
    keys = {**recipe, **KEYS, "val_set_size": 8}
    result = train(keys, console=QUIET)
    assert not result.problems
    assert result.adapter_check is None or result.adapter_check
    stored = load_file(result.output_dir / "adapter_model.safetensors")
    ranks = {v.shape[0] for n, v in stored.items() if "lora_A" in n}
    assert ranks == {3 * recipe["lora_r"]}
    plain = PeftModel.from_pretrained(make_model(), result.output_dir).eval()
    assert plain.peft_config["default"].r == 3 * recipe["lora_r"]
    without = {"relora": False, "output_dir": str(tmp_path / "b")}
    again = train({**keys, **without}, console=QUIET)
    assert again.val_loss_after != result.val_loss_after


@pytest.mark.long
@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit"])
def test_it_resumes_bit_by_bit(recipe: dict[str, Any], step: int, optimizer: str) -> None:
    keys = {**recipe, **KEYS, "optimizer": optimizer, "lora_dropout": 0.1, "val_set_size": 0}
    whole = train(keys, console=QUIET)
    start = str(whole.output_dir / f"checkpoint-{step}")
    again = train({**keys, "output_dir": f"{whole.output_dir}-{step}",
                   "resume_from_checkpoint": start}, console=QUIET)  # fmt: skip
    assert same(weights(again.output_dir), weights(whole.output_dir))


@pytest.mark.long
def test_it_is_optimized_like_any_adapter(recipe: dict[str, Any], tmp_path: Path) -> None:
    # gradients that are zero but for rounding would else make whole steps after a restart
    keys = {**recipe, **KEYS, "codegen": "eager", "logging_steps": 1, "adam_epsilon": 1e-3}
    plain = train(keys, console=QUIET)
    optimized = train({**keys, "optimize": True, "output_dir": str(tmp_path / "o")}, console=QUIET)
    losses = [[e["loss"] for e in run.history if "loss" in e] for run in (plain, optimized)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert optimized.val_loss_after == pytest.approx(plain.val_loss_after, abs=1e-4)


@pytest.mark.parametrize("key", ["use_rslora", "rank_pattern"])
def test_an_adapter_from_a_folder_that_does_not_add_up_is_refused(
    recipe: dict[str, Any], key: str
) -> None:
    checked = load_recipe({**recipe, **KEYS})
    model = add_adapter(load_model(checked), checked)
    setattr(model.peft_config["default"], key, {"q_proj": 2} if key == "rank_pattern" else True)
    with pytest.raises(RecipeError, match=f"relora: adapters with {key}"):
        Relora(model, checked, print)
