"""The optimizer steps: transformers' Trainer with our batches, our validation and our progress."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..flat import FlatOptimizer
from ..flat_buffers import why_not
from ..memory.meter import Meter as Memory
from ..memory.retry import retrying
from ..pipeline import planner_of
from .chat import IGNORED
from .meter import Meter
from .packing import Pack, collate, count
from .progress import Watch
from .recipe import Recipe
from .signals import Interrupts


class _Trainer(Trainer):
    """``Trainer`` that counts its tokens and validates by token, not by batch."""

    meter: Meter
    validation: list[dict[str, Tensor]]
    watch: Watch

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch:  # gives the terminal back, whatever happens
            return super().train(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's own; adapters are hundreds of small tensors, which are stepped as one."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # these move the parameters
        if made and hasattr(self.model, "peft_config") and not sharded and not why_not(optimizer):
            self.optimizer = FlatOptimizer(optimizer)
        return self.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.meter.add(inputs.pop("tokens"), inputs.pop("trained"))
        planner = planner_of(model)
        step = functools.partial(super().training_step, model, inputs, *args, **kwargs)
        return step() if planner is None else retrying(planner, step, model.parameters())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": validation_loss(self.model, self.validation)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


@torch.no_grad()
def validation_loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean loss of a trained token over all of ``batches``; the model's mode is kept."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in batches:
            here = {k: v.to(model.device) for k, v in batch.items()}
            number = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += float(model(**here).loss) * number
            tokens += number
    finally:
        model.train(training)
    return total / tokens if tokens else float("nan")


def batches(packs: Sequence[Pack], recipe: Recipe, pad_id: int) -> list[dict[str, Tensor]]:
    """Validation batches, in order."""
    size = recipe.micro_batch_size
    groups = [packs[i : i + size] for i in range(0, len(packs), size)]
    return [collate(g, pad_id, recipe.sample_packing, recipe.sequence_len) for g in groups]


def steps_planned(recipe: Recipe, packs: int) -> int:
    """How many optimizer steps the recipe makes of ``packs`` sequences."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    micro = math.ceil(packs / recipe.micro_batch_size)
    per_epoch = math.ceil(micro / recipe.gradient_accumulation_steps)
    return math.ceil(per_epoch * recipe.num_epochs)


def make_trainer(
    model: Any,
    recipe: Recipe,
    packs: list[Pack],
    validation: list[dict[str, Tensor]],
    pad_id: int,
    meter: Meter,
    interrupts: Interrupts,
    console: Console,
) -> Trainer:
    """Set up the trainer; ``trainer.train()`` runs it."""
    total = steps_planned(recipe, len(packs))
    memory = Memory(model.device)
    watch = Watch(meter, interrupts, console, total, lambda: memory.used() / 2**20)
    warmup = recipe.warmup_steps
    if warmup is None:
        warmup = round((recipe.warmup_ratio or 0.0) * total)
    args = TrainingArguments(
        output_dir=str(Path(recipe.output_dir)),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_steps=total,
        optim=recipe.optimizer,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=warmup,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        save_total_limit=recipe.save_total_limit,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
    )
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=packs,
        eval_dataset=packs[:1] if recipe.eval_steps else None,  # asked for; evaluate() is ours
        data_collator=functools.partial(_collate, recipe=recipe, pad_id=pad_id),
        callbacks=[watch],
    )
    trainer.meter, trainer.validation, trainer.watch = meter, validation, watch
    trainer.remove_callback(PrinterCallback)
    return trainer


def _collate(packs: list[Pack], recipe: Recipe, pad_id: int) -> dict[str, Any]:
    tokens, trained = count(packs)
    batch = collate(packs, pad_id, recipe.sample_packing, recipe.sequence_len)
    return {**batch, "tokens": tokens, "trained": trained}
