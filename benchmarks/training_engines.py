"""The engines of ``training.py``: each trains its way, and takes its turns from a callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import PEERS
from training_job import ALPHA, RANK, TrainingJob, read_samples


def stock(job: TrainingJob, turns: Any) -> None:
    """``transformers.Trainer`` and PEFT, batches padded to their longest row, autocast in bf16."""
    _stock(job, turns)


def _stock(job: TrainingJob, turns: Any, collator: Any = None, **options: Any) -> None:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = adapted(job)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(job), per_device_train_batch_size=job.batch, **options),
        train_dataset=Dataset.from_dict(read_samples(job.samples)),
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),  # fills labels with -100
        callbacks=[turns],
    )
    trainer.train()
    model.save_pretrained(job.output)


def stock_checkpointed(job: TrainingJob, turns: Any) -> None:
    """The same with gradient checkpointing."""
    _stock(job, turns, gradient_checkpointing=True)


def stock_packed(job: TrainingJob, turns: Any) -> None:
    """The same rows a step, as one row without padding: ``DataCollatorWithFlattening``.

    Transformers keeps samples apart by their positions.
    """
    from transformers import DataCollatorWithFlattening

    _stock(job, turns, DataCollatorWithFlattening())


def trl(job: TrainingJob, turns: Any) -> None:
    """``SFTTrainer`` with ``packing=True`` and its other defaults: it checkpoints its blocks."""
    _trl(job, turns)


def trl_without_checkpointing(job: TrainingJob, turns: Any) -> None:
    """The same, with everything kept for backward."""
    _trl(job, turns, gradient_checkpointing=False)


def _trl(job: TrainingJob, turns: Any, **options: Any) -> None:
    from datasets import Dataset

    from trl import SFTConfig, SFTTrainer

    model, tokenizer = adapted(job)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(job),
            per_device_train_batch_size=job.packs,
            max_length=job.sequence_len,
            packing=True,
            **options,
        ),
        train_dataset=Dataset.from_dict(read_samples(job.samples)),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    trainer.train()
    model.save_pretrained(job.output)


def fusewright(job: TrainingJob, turns: Any) -> None:
    """A run of a recipe, as ``fusewright train`` does it; the turns are all that is added."""
    from rich.console import Console

    from fusewright.train.recipe.load import load_recipe
    from fusewright.train.run import TrainingRun

    class InTurn(TrainingRun):
        """The run, taking its steps in turn."""

        def _train(self, trainer: Any, interrupts: Any) -> None:
            trainer.add_callback(turns)
            super()._train(trainer, interrupts)

    InTurn(load_recipe(recipe(job)), Console(quiet=True)).run()


def recipe(job: TrainingJob) -> dict[str, Any]:
    """The job as a recipe."""
    return {
        "base_model": job.base,
        "bf16": job.dtype == "bfloat16",
        "adapter": "lora",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_target_linear": True,
        "datasets": [{"path": job.rows, "type": "chat_template"}],
        "sequence_len": job.sequence_len,
        "sample_packing": True,
        "micro_batch_size": job.packs,
        "num_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_steps": job.warmup,
        "weight_decay": 0.0,
        "memory": job.memory,
        "output_dir": job.output,
        "seed": 42,
    }


ENGINES: dict[str, Callable[[TrainingJob, Any], None]] = {
    "stock": stock,
    "stock+gc": stock_checkpointed,
    "stock-packed": stock_packed,
    "trl": trl,
    "trl-nogc": trl_without_checkpointing,
    "fusewright": fusewright,
}


def known(name: str) -> bool:
    """Whether ``name`` is an engine, ``fusewright:MEMORY``, or a peer."""
    base, colon, memory = name.partition(":")
    return base in (ENGINES | PEERS) and (not colon or (base == "fusewright" and bool(memory)))


def adapted(job: TrainingJob) -> tuple[Any, Any]:
    """The model with new adapters, as PEFT makes them, and the tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=getattr(torch, job.dtype))
    model.config.use_cache = False
    set_seed(42)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(job.base)


def arguments(job: TrainingJob) -> dict[str, Any]:
    """The arguments of a Trainer that are the same for all."""
    import torch

    return {
        "output_dir": str(Path(job.output) / "trainer"),
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": job.warmup,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "bf16": job.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": 42,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
