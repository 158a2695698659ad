"""The files of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState

from . import files as checkpoint
from .resume import Saved
from .rng_state import RngState
from .save_model import save


def write_checkpoint(trainer: Any, part: Path, saved: Saved, unfinished: RngState | None) -> None:
    """Write all that a run needs to resume from here, in the form that ``Trainer`` reads.

    Args:
        trainer: a ``FineTuner``.
        part: the folder that becomes the checkpoint.
        saved: what the Trainer does not keep.
        unfinished: the random state to save in place of the present one, which has moved on.
    """
    state = trainer.state
    save(trainer.model, trainer.context.tokenizer, part)
    if not trainer.args.save_only_model:
        trainer._save_optimizer_and_scheduler(str(part))
        trainer._save_scaler(str(part))
        if unfinished is None:
            trainer._save_rng_state(str(part))
        else:
            with unfinished.applied():
                trainer._save_rng_state(str(part))
    trainer.store_flos()
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()
    state.save_to_json(str(part / "trainer_state.json"))
    saved.write(part)


def best_checkpoint(state: Any, folder: Path) -> str | None:
    """Where the best checkpoint is, if that is there or about to be; else what was known.

    Args:
        state: the Trainer's.
        folder: of the run.
    """
    if state.best_global_step:
        best = checkpoint.place(folder, state.best_global_step)
        if best.exists() or state.best_global_step == state.global_step:
            return str(best)
    known: str | None = state.best_model_checkpoint
    return known
