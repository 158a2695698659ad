"""Keys that change what happens around the steps: each by its effect on a small run."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.processes.signals import Interrupts
from fusewright.train.recipe.load import load_recipe
from fusewright.train.requirements import tracking
from fusewright.train.trainer.arguments import training_arguments
from fusewright.train.trainer.engine import FlowCallback

from ..conftest import make_model

QUIET = Console(quiet=True)


def run(recipe: dict[str, Any], **keys: Any) -> Any:
    return train({**recipe, **keys}, console=QUIET)


def test_no_validation_before_the_first_step(recipe: dict[str, Any]) -> None:
    keys = {"eval_steps": 2, "max_steps": 2}
    with_it = run(recipe, **keys)
    without = run(recipe, **keys, eval_on_start=False, overwrite_output_dir=True)
    assert with_it.val_loss_before is not None
    assert without.val_loss_before is None
    assert without.val_loss_after == with_it.val_loss_after
    assert (without.output_dir / "report.html").is_file()
    assert not without.problems


def test_layers_with_ranks_and_scales_of_their_own(recipe: dict[str, Any]) -> None:
    patterns = {"lora_rank_pattern": {"down_proj": 2, r".*\.1\..*q_proj": 6},
                "lora_alpha_pattern": {"down_proj": 32}}  # fmt: skip
    folder = run(recipe, **patterns, max_steps=1, val_set_size=0).output_dir
    model = PeftModel.from_pretrained(make_model(), folder)
    found: dict[str, tuple[int, float]] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            found[name.partition("model.model.layers.")[2]] = (
                layer.lora_A["default"].weight.shape[0], layer.scaling["default"],
            )  # fmt: skip
    assert found["0.mlp.down_proj"] == (2, 16.0)
    assert found["0.self_attn.q_proj"] == (4, 4.0)
    assert found["1.self_attn.q_proj"] == (6, 16 / 6)


@pytest.mark.parametrize("rank", [0, True, 1.5])
def test_a_rank_is_a_positive_number(rank: Any) -> None:
    with pytest.raises(RecipeError, match=r"lora_rank_pattern\.q_proj: must be"):
        load_recipe({"base_model": "a/b", "datasets": [{"path": "a/b"}],
                     "lora_rank_pattern": {"q_proj": rank}})  # fmt: skip


def test_groups_with_learning_rates_of_their_own(recipe: dict[str, Any]) -> None:
    groups = [{"name": "fixed", "modules": ["lora_A"], "lr": 1e-30}, {"modules": ["B"], "lr": 1e-2}]
    keys = {"val_set_size": 0, "weight_decay": 0.0, "optimizer": "adamw_torch"}
    before = run(recipe, **keys, max_steps=1, learning_rate=1e-30).output_dir
    start = PeftModel.from_pretrained(make_model(), before).state_dict()
    keys |= {"overwrite_output_dir": True, "learning_rate": 1e-30}
    after = run(recipe, **keys, max_steps=2, lr_groups=groups).output_dir
    end = PeftModel.from_pretrained(make_model(), after).state_dict()
    moved = {name for name in start if not torch.allclose(start[name], end[name], atol=1e-6)}
    assert moved
    assert all("lora_B" in name for name in moved)


def test_a_checkpoint_whenever_a_file_appears(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The file is put there before the second step, and looked for at each even one."""
    out = Path(recipe["output_dir"])
    seen: list[int] = []
    own = FlowCallback.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own(self, args, state, control, **kwargs)
        if state.global_step == 1:
            (out / "save.now").touch()
        seen.append(state.global_step)

    asked = {"enabled": True, "check_interval": 2, "trigger_file_path": "save.now"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowCallback, "on_step_begin", on_step_begin)
        run(recipe, dynamic_checkpoint=asked)
    assert seen == [0, 1, 2, 3]
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-2"]
    assert not (out / "save.now").exists()


@pytest.mark.parametrize(
    ("every", "step", "validates", "collected"),
    [(2, 4, False, 1), (2, 3, False, 0), (-1, 3, True, 1), (-1, 3, False, 0), (None, 4, True, 0)],
)
def test_garbage_is_collected(
    every: int | None, step: int, validates: bool, collected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: calls.append(1))
    keys = {"base_model": "a/b", "datasets": [{"path": "a/b"}], "gc_collect_steps": every}
    trainer: Any = SimpleNamespace(on_step_end=lambda: None)
    callback = FlowCallback(trainer, load_recipe(keys), Interrupts())
    control = SimpleNamespace(should_training_stop=False, should_save=False,
                              should_evaluate=validates)  # fmt: skip
    callback.on_step_end(None, SimpleNamespace(global_step=step), control)
    assert len(calls) == collected


@pytest.mark.parametrize("wanted", [True, False])
def test_odd_losses_are_logged_as_they_are_unless_filtered(wanted: bool) -> None:
    """The loss of a step that is skipped, as loss scaling does, in the log of the next one."""
    from transformers import Trainer

    keys = {"base_model": "a/b", "datasets": [{"path": "a/b"}], "max_steps": 2, "bf16": False,
            "output_dir": "unused"}  # fmt: skip
    recipe = load_recipe({**keys, "logging_nan_inf_filter": wanted})
    from fusewright.train.trainer.arguments import steps

    args = training_arguments(recipe, steps(recipe, 4))

    class OneBad(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            return loss * float("inf") if self.state.global_step == 0 else loss

    args.report_to = []
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * 4
    trainer = OneBad(make_model(), args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert (losses[0] != float("inf")) == wanted


def test_swanlab_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    keys = {"base_model": "a/b", "datasets": [{"path": "a/b"}], "swanlab_project": "tests",
            "swanlab_mode": "local", "swanlab_api_key": "s3cr3t",
            "plugins": ["axolotl.integrations.swanlab.SwanLabPlugin"]}  # fmt: skip
    recipe = load_recipe(keys)
    assert recipe.reporters() == ["swanlab"]
    with tracking(recipe):
        found = {name: value for name, value in os.environ.items() if name.startswith("SWANLAB")}
    assert found == {"SWANLAB_PROJECT": "tests", "SWANLAB_MODE": "local",
                     "SWANLAB_API_KEY": "s3cr3t"}  # fmt: skip
    assert load_recipe({**keys, "swanlab_mode": "disabled"}).reporters() == []
    assert load_recipe({**keys, "use_swanlab": False}).reporters() == []


def test_a_few_blocks_train_at_a_time(base: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Within an interval only what was drawn changes; a run that resumes has the same blocks."""
    from transformers import AutoModelForCausalLM

    full = {k: v for k, v in recipe.items() if k != "adapter" and not k.startswith("lora_")}
    keys = {"lisa_n_layers": 1, "lisa_step_interval": 2, "save_steps": 1, "val_set_size": 0,
            "optimizer": "adamw_torch"}  # fmt: skip
    whole = run(full, **keys).output_dir
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict()
              for folder in (base, *(whole / f"checkpoint-{n}" for n in (1, 2, 3, 4)))]  # fmt: skip
    changed = [
        {i for i in (0, 1) for name in old if f"layers.{i}." in name
         and not torch.equal(old[name], new[name])}
        for old, new in itertools.pairwise(states)
    ]  # fmt: skip
    assert all(len(blocks) == 1 for blocks in changed)
    assert changed[0] == changed[1]
    assert changed[2] == changed[3]
    assert not torch.equal(states[0]["lm_head.weight"], states[1]["lm_head.weight"])
    again = {"resume_from_checkpoint": str(whole / "checkpoint-1"), "output_dir": tmp_path / "on"}
    resumed = run(full, **{**keys, **again, "output_dir": str(tmp_path / "on")}).output_dir
    end = AutoModelForCausalLM.from_pretrained(resumed).state_dict()
    assert all(torch.equal(states[-1][name], end[name]) for name in end)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lisa_n_layers": 3}, "the model has only 2 blocks"),
        (
            {"lisa_n_layers": 1, "lisa_layers_attribute": "model.blocks"},
            "no blocks in model.blocks",
        ),
    ],
)
def test_blocks_that_are_not_there(recipe: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    full = {k: v for k, v in recipe.items() if k != "adapter" and not k.startswith("lora_")}
    with pytest.raises(RecipeError, match=said):
        run(full, **keys, lisa_step_interval=2)


def test_restarts_of_the_learning_rate(recipe: dict[str, Any]) -> None:
    keys = {"jagged_restart_steps": 4, "jagged_restart_warmup_steps": 2,
            "jagged_restart_anneal_steps": 1, "max_steps": 10, "lr_scheduler": "linear",
            "learning_rate": 1.0, "val_set_size": 0}  # fmt: skip
    from fusewright.train.trainer.schedule import custom_schedule, try_schedule

    loaded = load_recipe({**recipe, **keys})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = custom_schedule(loaded, optimizer, 0, 10)
    assert schedule is not None
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    linear = [1 - step / 10 for step in range(10)]
    shares = [1, 1, 1, 1, 0.001, 0.5005, 1, 1, 0.001, 0.5005]
    assert rates == pytest.approx([a * b for a, b in zip(linear, shares, strict=True)])
    odd = load_recipe({**recipe, **keys, "lr_scheduler": "one_cycle"})
    from fusewright.train.trainer.arguments import steps

    with pytest.raises(RecipeError, match="needs a schedule that only depends on the step"):
        try_schedule(odd, training_arguments(odd, steps(odd, 4)))


def test_a_run_resumes_with_the_loss_that_it_began_with(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Other keys that begin with ``use_`` may differ."""
    start = run(recipe, save_steps=2, max_steps=2, val_set_size=0).output_dir / "checkpoint-2"
    more = {"resume_from_checkpoint": str(start), "output_dir": str(tmp_path / "on"),
            "max_steps": 2, "save_steps": 2, "val_set_size": 0}  # fmt: skip
    with pytest.raises(RecipeError, match="use_dft"):
        run(recipe, **more, use_dft=True)
    assert run(recipe, **more, use_wandb=False, gc_collect_steps=3).status == "finished"
