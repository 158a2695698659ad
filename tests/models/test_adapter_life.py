"""What users do with adapters between steps: all of it as in eager, with DoRA and with several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from fusewright import optimize, restore
from tests.explained import explain

from .tiny import assert_equal_training_steps, token_ids, training_step
from .zoo import FAMILIES, build

LLAMA = next(f for f in FAMILIES if f.name == "llama")
IDS = token_ids(2, 13, seed=1)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        if "magnitude" in name:
            parameter.data.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def _two(**options: Any) -> Any:
    model: Any = build(LLAMA, lora=True, **options)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    return _random(model)


def _dora(**options: Any) -> Any:
    return _random(build(LLAMA, lora=True, use_dora=True, **options))


MODELS = {"two adapters": _two, "DoRA": _dora}


def _freeze(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "lora_A" in name:
            parameter.requires_grad_(False)


def _rescale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 1.7)


def _train_a_little(model: Any) -> None:
    training_step(model, IDS)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(0.1 * parameter.grad)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a step": _train_a_little,
    "evaluation": lambda m: m.eval(),
    "training again": lambda m: m.train(),
    "one of them": lambda m: m.set_adapter("default"),
    "merged": lambda m: m.merge_adapter(),
    "unmerged": lambda m: m.unmerge_adapter(),
    "all again": lambda m: m.base_model.set_adapter(list(m.peft_config)),
    "another scale": _rescale,
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "enabled": lambda m: m.base_model.enable_adapter_layers(),
    "frozen parts": _freeze,
}


@pytest.mark.long("two adapters-0.0")
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == "DoRA" else []) for n in MODELS]
)
def test_changes_between_steps_are_seen(name: str, dropout: float) -> None:
    model = MODELS[name](lora_dropout=dropout)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    assert_equal_training_steps(model, eager, IDS)
    for change, act in CHANGES.items():
        for m in (model, eager):
            act(m)
        try:
            assert_equal_training_steps(model, eager, IDS)
        except AssertionError as error:
            raise AssertionError(f"after {change}") from error
    sites = [s for s in explain(model).sites if s.rule == "lora_linear"]
    assert "rewritten" in {s.status for s in sites}
    restore(model)
    assert_equal_training_steps(model, eager, IDS)


@pytest.mark.long("DoRA", "two adapters")
@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_saved_and_loaded(name: str, tmp_path: Any) -> None:
    model = MODELS[name]()
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    for m in (model, eager):
        _train_a_little(m)
    model.save_pretrained(tmp_path)
    base = LLAMA.build()
    base.load_state_dict(
        {n.replace(".base_layer", ""): t for n, t in eager.get_base_model().state_dict().items()
         if "lora_" not in n}
    )  # fmt: skip
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    if name == "two adapters":
        loaded.load_adapter(tmp_path / "other", "other", is_trainable=True)
        loaded.base_model.set_adapter(["default", "other"])
    optimize(loaded, codegen="eager")
    assert_equal_training_steps(loaded, eager, IDS)
    merged = (m.merge_and_unload() for m in (restore(model), eager))
    for ours, theirs in zip(*(m.parameters() for m in merged), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
