"""Optimizers that transformers does not have, and random weights to begin with."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import fully_shard

from fusewright.train import train
from fusewright.train.inference.load_run import load_run
from fusewright.train.processes import gather
from fusewright.train.processes.world import World
from fusewright.train.recipe.load import load_recipe
from fusewright.train.requirements import attention
from fusewright.train.trainer.optimizer import MuonWithAdamW
from fusewright.train.trainer.schedule import custom_schedule

from ..conftest import make_model
from ..processes.ranks import alone, values
from ..results import same, weights

QUIET = Console(quiet=True)
FULL: dict[str, Any] = {
    "adapter": None, "lora_r": None, "lora_target_linear": None, "learning_rate": 1e-3,
    "val_set_size": 0,
}  # fmt: skip


# --- Muon -----------------------------------------------------------------------------------------


def _muon(model: nn.Module) -> MuonWithAdamW:
    parameters = list(model.parameters())
    matrices = {"params": [p for p in parameters if p.ndim == 2], "lr": 0.02}
    others = {"params": [p for p in parameters if p.ndim != 2], "lr": 0.01}
    return MuonWithAdamW(matrices, [others])


def _step(model: nn.Module, optimizers: list[Any], first: int, last: int) -> None:
    for number in range(first, last):
        torch.manual_seed(number)
        model(torch.randn(3, 12)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.LayerNorm(9), nn.Linear(9, 4))


def test_both_parts_step_as_on_their_own() -> None:
    model, plain = _model(), _model()
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    others = [p for p in plain.parameters() if p.ndim != 2]
    _step(model, [_muon(model)], 0, 3)
    apart = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]
    _step(plain, apart, 0, 3)
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_it_goes_on_from_its_state() -> None:
    model, again = _model(), _model()
    optimizer = _muon(model)
    _step(model, [optimizer], 0, 2)
    again.load_state_dict(model.state_dict())
    resumed = _muon(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in resumed.param_groups:  # as a schedule does
        group["lr"] *= 2
    for group in optimizer.param_groups:
        group["lr"] *= 2
    _step(model, [optimizer], 2, 4)
    _step(again, [resumed], 2, 4)
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def _sharded(world: World, folder: str) -> str:
    model = _model()
    if world.several:
        fully_shard(model)
    optimizer = _muon(model)
    names = gather.names_by_group(model, optimizer)
    _step(model, [optimizer], 0, 2)
    state = optimizer.state_dict()
    if world.several:
        whole = gather.whole_optimizer(model, optimizer, names)
        path = Path(folder, "state.pt")
        if world.main:
            torch.save(whole, path)
        torch.distributed.barrier()
        state = torch.load(path, weights_only=True)
        gather.load_optimizer(model, optimizer, state, names)
    _step(model, [optimizer], 2, 4)
    whole_weights = [p.full_tensor() if world.several else p for p in model.parameters()]  # type: ignore[operator]
    path = Path(folder, f"{world.size}-{world.rank}.pt")
    torch.save([w.detach() for w in whole_weights], path)
    return str(path)


@pytest.mark.long
def test_shards_step_as_whole_matrices(tmp_path: Path) -> None:
    expected = torch.load(_sharded(alone(), str(tmp_path)))
    for path in values(_sharded, str(tmp_path)):
        for found, whole in zip(torch.load(path), expected, strict=True):
            torch.testing.assert_close(found, whole, atol=2e-4, rtol=0)


@pytest.mark.long
def test_a_run_resumes_bit_by_bit(recipe: dict[str, Any]) -> None:
    keys = {**recipe, **FULL, "optimizer": "muon", "weight_decay": 0.1, "save_steps": 2}
    whole = train(keys, console=QUIET)
    before = weights(whole.output_dir)
    start = str(whole.output_dir / "checkpoint-2")
    again = train({**keys, "output_dir": str(whole.output_dir) + "-2",
                   "resume_from_checkpoint": start}, console=QUIET)  # fmt: skip
    assert same(weights(again.output_dir), before)
    groups = torch.load(Path(start) / "optimizer.pt", weights_only=True)["param_groups"]
    assert ["momentum" in group for group in groups] == [True, False, False]
    matrices = sum(p.ndim == 2 for p in make_model().parameters()) - 2  # embeddings and head
    assert len(groups[0]["params"]) == matrices


# --- CAME -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_came_gets_its_arguments(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is a stand-in: its optimizer steps as SGD does."""
    calls: list[dict[str, Any]] = []

    class CAME(torch.optim.SGD):
        def __init__(self, groups: Any, lr: float, **options: Any) -> None:
            calls.append(options)
            super().__init__(groups, lr)

    module = ModuleType("came_pytorch")
    module.CAME = CAME  # type: ignore[attr-defined]
    module.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "came_pytorch", module)
    keys = {**recipe, "optimizer": "came_pytorch", "max_steps": 1, "val_set_size": 0}
    train(keys, console=QUIET)
    more = {
        "adam_beta3": 0.5,
        "adam_epsilon2": 1e-3,
        "adam_eps": 1e-2,
        "overwrite_output_dir": True,
    }
    train({**keys, **more, "optim_args": "clip_threshold=0.5"}, console=QUIET)
    assert calls == [
        {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)},
        {"betas": (0.9, 0.999, 0.5), "eps": (1e-2, 1e-3), "clip_threshold": 0.5},
    ]


# --- schedules ------------------------------------------------------------------------------------


def _rates(recipe: dict[str, Any], steps: int, **keys: Any) -> list[float]:
    checked = load_recipe({**recipe, "lr_scheduler": "cosine", "learning_rate": 0.5, **keys})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = custom_schedule(checked, optimizer, 0, steps)
    assert schedule is not None
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_ends_at_its_least_rate(recipe: dict[str, Any]) -> None:
    rates = _rates(recipe, 8, eta_min=0.125)
    assert rates == pytest.approx(_rates(recipe, 8, cosine_min_lr_ratio=0.25))
    assert rates[-1] == pytest.approx(0.125)


@pytest.mark.long
def test_a_warm_up_below_one_is_a_share_of_the_steps(recipe: dict[str, Any]) -> None:
    keys = {**recipe, "lr_scheduler": "constant_with_warmup", "val_set_size": 0, "max_steps": 8,
            "logging_steps": 1}  # fmt: skip
    rates = [
        [entry["learning_rate"] for entry in train(
            {**keys, **warmup, "overwrite_output_dir": True}, console=QUIET
        ).history if "learning_rate" in entry]
        for warmup in ({"warmup_steps": 0.5}, {"warmup_steps": 4})
    ]  # fmt: skip
    assert rates[0] == rates[1]
    assert rates[0][:3] == pytest.approx([0, 0.0025, 0.005])


# --- what a model begins with ---------------------------------------------------------------------


@pytest.mark.long
def test_random_weights_come_from_the_seed(recipe: dict[str, Any]) -> None:
    keys = {**recipe, **FULL, "reinit_weights": True, "max_steps": 1, "learning_rate": 1e-30}
    first = train(keys, console=QUIET)
    found = weights(first.output_dir)
    base = make_model().state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[name], base[name])
    again = train({**keys, "overwrite_output_dir": True}, console=QUIET)
    assert same(weights(again.output_dir), found)
    other = train({**keys, "overwrite_output_dir": True, "seed": 7}, console=QUIET)
    stored = weights(other.output_dir)
    assert not torch.equal(stored[name], found[name])
    model, _ = load_run(other.output_dir)  # which does not begin anew
    assert torch.equal(model.state_dict()[name], stored[name])


def test_attention_of_the_hub_is_left_out_without_consent(recipe: dict[str, Any]) -> None:
    checked = load_recipe({**recipe, "attn_implementation": "kernels-community/vllm-flash-attn3"})
    name, message = attention(checked)
    assert name is None
    assert message is not None
    assert "is code on the hub, which is run only with --trust-remote-code" in message
    assert "the model's own attention computes the same values" in message
    train({**recipe, "attn_implementation": "owner/kernel", "max_steps": 1}, console=QUIET)
