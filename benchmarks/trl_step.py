"""What TRL's ``SFTTrainer`` computes in a step, for the training loop of ``train_step.py``.

The rows of a batch are what TRL's packing makes of samples: one long row without padding, with
positions that begin anew at each sample. TRL's own collator builds it and ``compute_loss`` does
the rest: its fused output head, its metrics, and Accelerate's autocast where TRL turns it on.
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from workload import Job


class SFTLoss:
    """Called like a model with labels, returns what has a ``loss``."""

    def __init__(self, model: Any, job: Job) -> None:
        from datasets import Dataset
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        from trl import SFTConfig, SFTTrainer

        self._folder = tempfile.TemporaryDirectory(prefix="fusewright-bench-trl-")
        config = SFTConfig(
            output_dir=self._folder.name,
            use_cpu=job.device == "cpu",
            bf16=job.dtype == "bfloat16",  # TRL's default: autocast, whatever the weights are
            fp16=job.dtype == "float16",
            gradient_checkpointing=job.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_length=job.seq,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            remove_unused_columns=False,
        )
        tokenizer = _tokenizer()
        # made by hand, for the trainer may not be given a collator together with packing
        self._collate = DataCollatorForLanguageModeling(
            pad_token_id=tokenizer.pad_token_id, padding_free=True
        )
        columns = {"input_ids": [[0] * job.seq], "labels": [[0] * job.seq]}
        self._trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict(columns),
            data_collator=self._collate,
            processing_class=tokenizer,
        )
        self._model = self._trainer.accelerator.prepare_model(self._trainer.model)
        self._model.train()

    def __call__(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        """The loss of a batch.

        Args:
            input_ids: (batch, seq).
            labels: the same tokens.
        """
        examples = [
            {"input_ids": row, "labels": wanted}
            for row, wanted in zip(input_ids.tolist(), labels.tolist(), strict=True)
        ]
        inputs = self._trainer._prepare_inputs(self._collate(examples))
        with self._trainer.compute_loss_context_manager():
            loss = self._trainer.compute_loss(self._model, inputs)
        return SimpleNamespace(loss=loss)

    def parameters(self) -> Any:
        """The model's."""
        return self._model.parameters()

    def buffers(self) -> Any:
        """The model's."""
        return self._model.buffers()


def _tokenizer() -> Any:
    """A tokenizer that the trainer can ask for its special tokens; no text is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
