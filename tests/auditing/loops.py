"""Published bugs that only a loop shows: what an optimizer, a schedule or a trainer does."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_constant_schedule,
)

from fusewright.auditing.callback import AuditCallback
from fusewright.auditing.findings import Audit
from fusewright.auditing.watch import watch
from trl import SFTConfig

from . import tiny
from .published import bug
from .tiny import IGNORED


@dataclass
class Run:
    """A run of transformers' Trainer."""

    trainer: Trainer

    def audit(self) -> Audit:
        """What the callback finds."""
        callback = AuditCallback(report=lambda _: None)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(callback)
        self.trainer.train()
        assert callback.audit is not None
        return callback.audit


@dataclass
class Loop:
    """A loop written by hand: two steps of ``optimizer``."""

    model: Any
    optimizer: torch.optim.Optimizer
    checkpointing: bool | None = None

    def audit(self) -> Audit:
        """What the watch finds."""
        with watch(self.model, self.optimizer, checkpointing=self.checkpointing) as watched:
            for seed in (4, 5):
                self.model(**tiny.chat(seed=seed)).loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
        return watched.audit


class Rows(Dataset[dict[str, Tensor]]):
    """Padded rows of a chat with answers of 10 tokens and of 3, in turn; or packs."""

    def __init__(self, packed: bool = False) -> None:
        self.rows = []
        for seed in range(16):
            batch = tiny.pack(seed=seed) if packed else tiny.chat(rows=2, seed=seed)
            row = {k: v[-1] for k, v in batch.items()}  # of a chat, the row that is padded
            if not packed and seed % 2:
                row["labels"][:13] = IGNORED
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def _trainer(
    end: ExitStack, kind: type[Trainer] = Trainer, callbacks: Any = (), packed: bool = False,
    arguments: type[TrainingArguments] = TrainingArguments, **options: Any,
) -> Trainer:  # fmt: skip
    options = {
        "output_dir": end.enter_context(tempfile.TemporaryDirectory()), "max_steps": 4,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "gradient_checkpointing": False, "bf16": False, **options,
    }  # fmt: skip
    model, rows = tiny.model("llama"), Rows(packed)
    return kind(model, arguments(**options), train_dataset=rows, callbacks=[*callbacks])


# --- accumulation --------------------------------------------------------------------------------


@bug("accumulation-scale", "huggingface/transformers#34191", "huggingface/transformers#37766")
def means_of_means(faulty: bool, end: ExitStack) -> Run:
    """With gradient accumulation, each batch was averaged over its own tokens and the batches over
    their number, so that tokens of short answers counted more."""
    trainer = _trainer(end)
    if faulty:
        trainer.model_accepts_loss_kwargs = False
    return Run(trainer)


@bug("accumulation-scale", "huggingface/transformers#35438")
def accumulated_sums(faulty: bool, end: ExitStack) -> Run:
    """The number of tokens of a step was not passed on, and nobody divided by the number of batches
    either: loss and gradients grew with the accumulation."""

    class Forgetful(Trainer):
        def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    return Run(_trainer(end, Forgetful if faulty else Trainer))


# --- the schedule --------------------------------------------------------------------------------


@bug("warmup", "MakazhanAlpamys/Soup#686", "unslothai/unsloth-zoo#790")
def no_warmup(faulty: bool, end: ExitStack) -> Run:
    """Warmup and schedule were accepted and never used: the first step had the full learning
    rate."""

    class Constant(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = get_constant_schedule(optimizer or self.optimizer)
            return self.lr_scheduler

    kind = Constant if faulty else Trainer
    return Run(_trainer(end, kind, warmup_steps=2))


@bug("warmup", "huggingface/transformers#24088", "huggingface/accelerate#662")
def schedule_too_fast(faulty: bool, end: ExitStack) -> Run:
    """The scheduler made a step for each process in every step, so that warmup and decay were over
    too early."""

    class Twice(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["lr_scheduler"].step()

    callbacks = [Twice()] if faulty else []
    return Run(_trainer(end, callbacks=callbacks, warmup_steps=2))


# --- what was asked for --------------------------------------------------------------------------


@bug("checkpointing", "huggingface/trl#1066")
def checkpointing_off(faulty: bool, end: ExitStack) -> Run:
    """A trainer put the model into evaluation mode before the forward of training; checkpoints are
    made in training mode only, and none were."""

    class Evaluating(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model.eval(), *args, **kwargs)

    kind = Evaluating if faulty else Trainer
    return Run(_trainer(end, kind, gradient_checkpointing=True))


@bug("checkpointing", "unslothai/unsloth#2362", "unslothai/unsloth#10666")
def checkpointing_on(faulty: bool, end: ExitStack) -> Loop:
    """Gradient checkpointing was switched off in every place that has a switch, and was on."""
    model = tiny.model("llama")
    if faulty:
        model.gradient_checkpointing_enable()
    return Loop(model, AdamW(model.parameters(), lr=1e-3), checkpointing=False)


@bug("packing", "unslothai/unsloth#7234")
def packing_off(faulty: bool, end: ExitStack) -> Run:
    """Packing was asked for, and switched off without a word for the kind of model at hand."""
    return Run(_trainer(end, packed=not faulty, arguments=SFTConfig, packing=True))


# --- weights -------------------------------------------------------------------------------------


@bug("weights-moved", "adapter-hub/adapters#260")
def optimizer_before_the_adapter(faulty: bool, end: ExitStack) -> Loop:
    """The optimizer was made before the adapters, and has the frozen weights only: nothing is
    trained, and the loss is that of the base model."""
    base = tiny.model("llama")
    optimizer = AdamW(base.parameters(), lr=1e-3)
    model = tiny.lora(base)
    if not faulty:
        optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    return Loop(model, optimizer)


@bug("weights-moved", "pytorch/ao#1124", "meta-pytorch/torchtune#2254")
def steps_that_round_to_nothing(faulty: bool, end: ExitStack) -> Loop:
    """Weights in bf16 took steps smaller than half of the distance to the next number, and stayed
    where they were."""
    model = tiny.model("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    if faulty:
        model = model.bfloat16()
    return Loop(model, AdamW(model.parameters(), lr=3e-7, weight_decay=0.0))
