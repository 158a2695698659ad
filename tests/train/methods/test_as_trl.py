"""Each method against TRL's own trainer on the same batches: losses and figures of ten steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fusewright.train import train
from fusewright.train.data import prepare
from fusewright.train.data.order import Order
from fusewright.train.model.tokenizer import load_tokenizer
from fusewright.train.recipe.load import load_recipe
from fusewright.train.trainer.ready import ready_model

from .recipes import METHODS, method_recipe

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")

FIGURES = (
    "loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/chosen", "margin", "accuracy",
)  # fmt: skip


def by_trl(given: dict[str, Any]) -> list[dict[str, float]]:
    """Train a recipe by TRL's trainer as it is, on the tokens and in the order of the recipe."""
    from fusewright.train.methods.task import task_of

    recipe = load_recipe(given)
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer)
    task: Any = task_of(recipe)
    kind: Any = next(c for c in task.method.trainer.__mro__ if c.__module__.startswith("trl."))

    class Plain(kind):  # type: ignore[misc]  # 2026-11-27: which trainer, the recipe says
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return Order([0] * len(self.train_dataset), recipe.seed, "shuffled", 2)

    counted = task.method.collate(tokenizer.pad_token_id, None)
    examples = task.sequences(prepared)
    args: Any = task.arguments(examples, None)
    args.eval_strategy, args.save_strategy = "no", "no"
    model = ready_model(recipe, tokenizer, print)
    trainer = Plain(
        model=model, args=args, train_dataset=task._dataset(examples),
        data_collator=counted.collate, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.long("dpo-True", "orpo-True", "reward-True")
@pytest.mark.parametrize(
    ("method", "optimize"),
    [
        *((method, False) for method in (*METHODS, "reward")),
        *((method, True) for method in ("dpo", "orpo", "reward")),
        *(pytest.param(m, True, marks=pytest.mark.slow) for m in ("ipo", "cpo", "simpo", "kto")),
    ],
)
def test_ten_steps_are_those_of_trl(
    method: str, optimize: bool, base: Path, tmp_path: Path
) -> None:
    keys = {"max_steps": 10, "val_set_size": 0, "learning_rate": 1e-3, "lora_dropout": 0.0}
    logs = by_trl(method_recipe(method, base, tmp_path, **keys))
    result = train(
        method_recipe(method, base, tmp_path, **keys, optimize=optimize),
        console=Console(quiet=True),
    )
    found = [entry for entry in result.history if "loss" in entry]
    assert len(found) == len(logs) == 10
    tolerance = 1e-3 if optimize else 1e-5
    for own, other in zip(found, logs, strict=True):
        for name in FIGURES:
            if name in other:
                assert own[name] == pytest.approx(other[name], rel=tolerance, abs=1e-5), name
