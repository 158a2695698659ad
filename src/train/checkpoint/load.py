"""The Trainer's reading of checkpoints, with errors that say which one, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import TrainerState

from ...errors import RecipeError
from ...memory.oom_retry import is_out_of_memory
from ..model.from_pretrained import first_words
from ..model.shard_files import Shards, in_shards
from .resume import another, without_code
from .sharded import load_weights


@contextlib.contextmanager
def readable(folder: Any) -> Iterator[None]:
    """Turn what goes wrong with a checkpoint's files into a RecipeError.

    Args:
        folder: of the checkpoint; None: nothing is read.
    """
    try:
        with without_code(Path(folder) if folder is not None else None):
            yield
    except RecipeError:
        raise
    except Exception as error:  # torch, safetensors and PEFT raise whatever they meet
        if folder is None or is_out_of_memory(error):
            raise
        raise RecipeError(another(Path(folder), first_words(error))) from error


def trained_weights(folder: Path, model: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint, by the names that they have in the model.

    Args:
        folder: of the checkpoint.
        model: which the checkpoint is of; only its names are read.
    """
    if in_shards(folder):
        return dict(Shards.read(folder).weights())
    if not hasattr(model, "peft_config"):
        files = sorted(folder.glob("model*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    numbers = {name: torch.tensor(i) for i, name in enumerate(names)}
    # PEFT leaves the adapter's name out, and more of some kinds
    numbers = get_peft_model_state_dict(model, state_dict=numbers, save_embedding_layers=False)
    stored = load_peft_weights(str(folder), device="cpu")
    return {names[int(number)]: stored[key] for key, number in numbers.items()}


class ResumableTrainer(Trainer):
    """``Trainer`` that says why it cannot resume from a checkpoint.

    Attributes:
        resumed_from: the checkpoint that it has resumed from, or None.
    """

    resumed_from: Path | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; it reads its state once more, to say where that is damaged."""
        if resume_from_checkpoint:
            self.resumed_from = Path(resume_from_checkpoint)
            with readable(resume_from_checkpoint):
                TrainerState.load_from_json(
                    str(Path(resume_from_checkpoint) / "trainer_state.json")
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        with readable(resume_from_checkpoint):
            if in_shards(Path(resume_from_checkpoint)):
                load_weights(Path(resume_from_checkpoint), self.model)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)
