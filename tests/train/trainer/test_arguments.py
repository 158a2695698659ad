"""What the trainer is told for the keys of a recipe: intervals, schedules, optimizers, trackers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import GreedyLR

from fusewright.errors import RecipeError
from fusewright.optim.flat import FlatOptimizer
from fusewright.train.data import Sample
from fusewright.train.data.order import Order
from fusewright.train.preflight import require_startable
from fusewright.train.processes.signals import Interrupts
from fusewright.train.recipe.keys.optimization import SCHEDULERS
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.requirements import tracking
from fusewright.train.trainer.arguments import Steps, steps, training_arguments
from fusewright.train.trainer.batches import training_batch
from fusewright.train.trainer.build import make_trainer
from fusewright.train.trainer.context import Context
from fusewright.train.trainer.engine import EngineMixin
from fusewright.train.trainer.schedule import custom_schedule, follow

from ..conftest import make_model, make_tokenizer

QUIET = Console(quiet=True)


def asked(tmp_path: Path, **keys: Any) -> Recipe:
    given = {
        "base_model": "somewhere",
        "datasets": [{"path": "rows.jsonl"}],
        "output_dir": str(tmp_path / "out"),
    }
    return Recipe.model_validate({**given, **keys})


@pytest.mark.parametrize(
    ("keys", "total", "per_epoch"),
    [
        ({}, 20, 20),
        ({"micro_batch_size": 3}, 7, 7),
        ({"micro_batch_size": 3, "dataloader_drop_last": True}, 6, 6),
        ({"gradient_accumulation_steps": 3, "num_epochs": 2.5}, 18, 7),
        ({"micro_batch_size": 2, "batch_size": 8}, 3, 3),
        ({"max_steps": 4, "num_epochs": 9}, 4, 20),
    ],
)
def test_how_many_steps(tmp_path: Path, keys: dict[str, Any], total: int, per_epoch: int) -> None:
    assert steps(asked(tmp_path, **keys), 20) == Steps(total, per_epoch)


def test_the_steps_of_a_stream_are_all_epochs_together(tmp_path: Path) -> None:
    assert steps(asked(tmp_path, max_steps=200, num_epochs=4), None) == Steps(200, 50)


def test_one_process_trains_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer would make the batch larger, and copies of the model that are not optimized."""
    own = TrainingArguments.__post_init__

    def with_gpus(self: Any) -> None:
        own(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_gpus)
    made = training_arguments(asked(tmp_path, micro_batch_size=3), Steps(40, 20))
    assert (made.n_gpu, made.train_batch_size) == (1, 3)


def test_steps_that_cannot_be_counted(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="max_steps: streamed data has no end"):
        steps(asked(tmp_path), None)
    with pytest.raises(RecipeError, match="micro_batch_size: 3 sequences do not fill a batch of 4"):
        steps(asked(tmp_path, micro_batch_size=4, dataloader_drop_last=True), 3)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"save_strategy": "no", "eval_strategy": "no"}),
        ({"save_steps": 7}, {"save_strategy": "steps", "save_steps": 7}),
        ({"save_steps": 0.3}, {"save_strategy": "steps", "save_steps": 12}),
        ({"saves_per_epoch": 1}, {"save_strategy": "steps", "save_steps": 20}),
        ({"saves_per_epoch": 3}, {"save_strategy": "steps", "save_steps": 7}),
        ({"save_strategy": "epoch"}, {"save_strategy": "steps", "save_steps": 20}),
        (
            {"val_set_size": 0.1, "evals_per_epoch": 4},
            {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": None},
        ),
        ({"val_set_size": 0.1, "eval_steps": 0.5}, {"eval_steps": 20}),
        (
            {"val_set_size": 0.1, "eval_strategy": "epoch", "eval_delay": 1},
            {"eval_steps": 20, "eval_delay": 20},
        ),
        (
            {"val_set_size": 9, "eval_steps": 5, "save_strategy": "best"},
            {"save_strategy": "best", "metric_for_best_model": "eval_loss"},
        ),
        (
            {"val_set_size": 9, "eval_steps": 5, "early_stopping_patience": 2},
            {"metric_for_best_model": "eval_loss", "greater_is_better": False},
        ),
        ({"logging_steps": 0.1}, {"logging_steps": 4}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 4}),
        ({"warmup_ratio": 0.03}, {"warmup_steps": 2}),  # 1.2: as transformers rounds it
        ({"optim_args": {"a": 1, "b": 0.5}}, {"optim_args": "a=1,b=0.5"}),
        ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
         {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}}),
        ({"neftune_noise_alpha": 5}, {"neftune_noise_alpha": 5}),
        ({"hub_model_id": "me/it", "hub_strategy": "end"},
         {"push_to_hub": True, "hub_model_id": "me/it", "hub_strategy": "end"}),
        ({"bf16": True}, {"bf16": False, "fp16": False}),  # the weights are, without autocast
        ({"tf32": True}, {"tf32": None}),  # of no effect on a CPU
    ],
    ids=str,
)  # fmt: skip
def test_arguments(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    made = training_arguments(asked(tmp_path, **keys), Steps(40, 20))
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.save_total_limit is None
    assert made.report_to == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"save_steps": 2.5}, "save_steps: 2.5 is neither a number of steps nor a fraction"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end: needs validation"),
        ({"save_strategy": "best"}, "save_strategy: needs validation"),
        ({"early_stopping_patience": 1}, "early_stopping_patience: needs validation"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "lr_scheduler: needs validation"),
        ({"val_set_size": 2, "eval_strategy": "steps"}, "needs eval_steps or evals_per_epoch"),
        (
            {"val_set_size": 2, "eval_steps": 4, "save_steps": 5, "load_best_model_at_end": True},
            "the trainer refuses these settings",
        ),
    ],
    ids=str,
)
def test_keys_that_do_not_go_together(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        training_arguments(asked(tmp_path, **keys), Steps(40, 20))


# --- schedules ------------------------------------------------------------------------------------


def rates(recipe: Recipe, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = custom_schedule(recipe, optimizer, warmup, total)
    assert schedule is not None
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_a_cosine_with_a_floor(tmp_path: Path) -> None:
    found = rates(asked(tmp_path, cosine_min_lr_ratio=0.1), 2, 10)
    assert found[:3] == [0.0, 0.5, 1.0]
    assert found[6] == pytest.approx(0.55)  # half the way from 1 to 0.1
    early = rates(asked(tmp_path, cosine_min_lr_ratio=0.1, cosine_constant_lr_ratio=0.5), 2, 10)
    assert early[5:] == pytest.approx([0.1] * 5)
    bent = rates(asked(tmp_path, lr_quadratic_warmup=True), 4, 10)
    assert bent[:5] == [0.0, 1 / 16, 1 / 4, 9 / 16, 1.0]


def test_one_cycle(tmp_path: Path) -> None:
    found = rates(asked(tmp_path, lr_scheduler="one_cycle", lr_div_factor=10), 0, 10)
    assert found[0] == pytest.approx(0.1)
    assert 0.95 < max(found) <= 1.0  # its top is between two steps
    assert found.index(max(found)) == 3
    assert found[-1] < 0.1


def test_what_transformers_has_a_name_for(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert custom_schedule(asked(tmp_path), optimizer, 0, 10) is None


def _scheduled(name: str, kwargs: dict[str, Any], total: int, done: int) -> tuple[Any, Any]:
    """An optimizer and its schedule, of so many steps and after so many."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule: Any = get_scheduler(name, optimizer, 2, total, scheduler_specific_kwargs=kwargs)
    for _ in range(done):
        optimizer.step()
        schedule.step(*[1.0] * isinstance(schedule, (ReduceLROnPlateau, GreedyLR)))
    return optimizer, schedule


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("name", sorted({*get_args(SCHEDULERS)} - {"one_cycle", "rex"}))
def test_a_longer_schedule_has_its_own_rates(name: str, is_wrapped: bool) -> None:
    """From a checkpoint of a shorter one; those that the losses decide have no length."""
    kwargs = {"cosine_with_min_lr": {"min_lr_rate": 0.1},
              "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
              "warmup_stable_decay": {"num_decay_steps": 4}}.get(name, {})  # fmt: skip
    (short, saved), (optimizer, schedule) = (
        _scheduled(name, kwargs, n, d) for n, d in ((8, 5), (16, 0))
    )
    optimizer.load_state_dict(short.state_dict())
    schedule.load_state_dict(saved.state_dict())
    follow(AcceleratedScheduler(schedule, optimizer) if is_wrapped else schedule)
    whole, _ = _scheduled(name, kwargs, 16, 5)
    assert optimizer.param_groups[0]["lr"] == whole.param_groups[0]["lr"]


# --- the order of the sequences -------------------------------------------------------------------


def test_an_order_depends_on_seed_and_epoch_only() -> None:
    lengths = [(i * 7) % 50 + 1 for i in range(103)]
    for kind in ("shuffled", "in order", "by length"):
        order = Order(lengths, 1, kind, 4)  # type: ignore[arg-type]
        first = list(order)
        torch.rand(3)
        assert list(order) == first
        assert sorted(first) == list(range(103))
        order.set_epoch(1)
        assert (list(order) == first) == (kind == "in order")
    batches = [[lengths[i] for i in first[j : j + 4]] for j in range(0, 103, 4)]
    assert max(max(b) - min(b) for b in batches) <= 4
    assert lengths[first[0]] == max(lengths)


def test_filling_up_to_the_whole_length(tmp_path: Path) -> None:
    packs = [[Sample([1, 5, 9], [-100, 5, 9])]]
    keys = {"sequence_len": 200, "sample_packing": True}
    some = training_batch(packs, asked(tmp_path, **keys), 0)
    full = training_batch(packs, asked(tmp_path, **keys, pad_to_sequence_len=True), 0)
    assert (some["input_ids"].shape, full["input_ids"].shape) == ((1, 64), (1, 200))
    assert (full["tokens"], full["trained"]) == (3, 2)


@pytest.mark.parametrize("packing", [True, False])
def test_a_sequence_that_is_left_alone_is_no_batch_of_one(tmp_path: Path, packing: bool) -> None:
    packs = [[Sample([1, 5, 9, 2], [-100, 5, 9, 2])]]
    keys: dict[str, Any] = {"sample_packing": packing, "micro_batch_size": 2}
    alone = training_batch(packs, asked(tmp_path, **keys, optimize=False), 0)
    twice = training_batch(packs, asked(tmp_path, **keys), 0)
    assert (len(alone["input_ids"]), len(twice["input_ids"])) == (1, 2)
    assert (twice["labels"][1] == -100).all()  # or its tokens would count twice
    assert (twice.pop("tokens"), twice.pop("trained")) == (4, 3)
    assert (alone.pop("tokens"), alone.pop("trained")) == (4, 3)
    found = []
    for batch in (alone, twice):
        model = make_model().double()
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    two = training_batch(packs * 2, asked(tmp_path, **keys), 0)
    assert (two["labels"][0] == two["labels"][1]).all()


# --- optimizers -----------------------------------------------------------------------------------


def trainer(tmp_path: Path, **keys: Any) -> EngineMixin:
    from peft import LoraConfig, get_peft_model

    modules = ["embed_tokens"] if "embedding_lr" in str(keys) else None
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=modules)
    model = get_peft_model(make_model(), config)
    packs = [[Sample([1, 5 + i, 9, 2], [1, 5 + i, 9, 2])] for i in range(8)]
    recipe = asked(tmp_path, learning_rate=0.5, weight_decay=0.1, **keys)
    return make_trainer(Context(recipe, make_tokenizer(), QUIET, Interrupts()), model, packs)


def groups(made: Any, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in made.param_groups
        for p in group["params"]
    }


def test_loraplus(tmp_path: Path) -> None:
    setup = trainer(tmp_path, loraplus_lr_ratio=4)
    made = setup.create_optimizer()
    assert isinstance(made, FlatOptimizer)
    found = groups(made, setup.model)
    assert {rate for name, (rate, _) in found.items() if "lora_B" in name} == {2.0}
    assert {rate for name, (rate, _) in found.items() if "lora_A" in name} == {0.5}


@pytest.mark.parametrize("keys", [{"embedding_lr": 0.05}, {"embedding_lr_scale": 0.1}])
def test_another_rate_for_embeddings(tmp_path: Path, keys: dict[str, Any]) -> None:
    setup = trainer(tmp_path, **keys)
    found = groups(setup.create_optimizer(), setup.model)
    assert {rate for name, (rate, _) in found.items() if "embed_tokens" in name} == {0.05}
    assert {rate for name, (rate, _) in found.items() if "lora" in name} == {0.5}
    assert {decay for _, decay in found.values()} == {0.1}


@pytest.mark.parametrize(
    "optimizer",
    ["adamw_torch", "adafactor", "adagrad", "rmsprop", "adamw_bnb_8bit", "lion_32bit", "ademamix"],
)
def test_optimizers_of_transformers_step(tmp_path: Path, optimizer: str) -> None:
    setup = trainer(tmp_path, optimizer=optimizer, max_steps=2)
    before = {n: p.detach().clone() for n, p in setup.model.named_parameters() if p.requires_grad}
    setup.train()
    after = dict(setup.model.named_parameters())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_not_installed_is_said_at_once(tmp_path: Path) -> None:
    for keys, said in (
        ({"wandb_project": "x"}, "wandb_project: wandb needs the package wandb, .* pip install"),
        ({"optimizer": "galore_adamw"}, "optimizer: galore_adamw needs the package galore-torch"),
        ({"use_trackio": True}, "trackio needs the package trackio"),
    ):
        with pytest.raises(RecipeError, match=said):
            require_startable(asked(tmp_path, **keys))
    require_startable(asked(tmp_path, wandb_project="x", wandb_mode="disabled"))


def test_trackers_are_told_by_the_environment_and_only_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_WATCH", raising=False)
    recipe = asked(tmp_path, wandb_project="x", wandb_watch=False, mlflow_experiment_name=None)
    with tracking(recipe):
        assert os.environ["WANDB_PROJECT"] == "x"
        assert os.environ["WANDB_WATCH"] == "false"
        assert "MLFLOW_EXPERIMENT_NAME" not in os.environ
    assert os.environ["WANDB_PROJECT"] == "mine"
    assert "WANDB_WATCH" not in os.environ
    with tracking(asked(tmp_path, wandb_entity="me")):  # not asked to log there
        assert "WANDB_ENTITY" not in os.environ
