"""The files of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState

from . import files as checkpoint
from .resume import Saved
from .rng_state import RngState
from .save_model import save
from .sharded import named_state, write_list, write_shards


def write_checkpoint(trainer: Any, part: Path, saved: Saved, unfinished: RngState | None) -> None:
    """Write all that a run needs to resume from here, in the form that ``Trainer`` reads.

    Of several processes, each writes its random state and its shards, and rank 0 the rest.

    Args:
        trainer: a ``FineTuner``.
        part: the folder that becomes the checkpoint.
        saved: what the Trainer does not keep.
        unfinished: the random state to save in place of the present one, which has moved on.
    """
    state, main = trainer.state, trainer.world.main
    trainer.store_flos()  # a collective, as the next ones: before what a full disk can stop
    if trainer.writes_shards:
        _write_shards(trainer, part)
    else:
        _write_whole(trainer, part)
    if not trainer.args.save_only_model:
        if main:
            torch.save(trainer.schedule_state(), part / "scheduler.pt")
            trainer._save_scaler(str(part))
        if unfinished is None:
            trainer._save_rng_state(str(part))
        else:
            with unfinished.applied():
                trainer._save_rng_state(str(part))
    if not main:
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()
    state.save_to_json(str(part / "trainer_state.json"))
    saved.write(part)


def _write_whole(trainer: Any, part: Path) -> None:
    """Bring weights and the optimizer's state together on rank 0, which writes them."""
    whole = trainer.whole_state()
    kept = None if trainer.args.save_only_model else trainer.optimizer_state()
    if trainer.world.main:
        save(trainer.model, trainer.context.tokenizer, part, whole)
        if not trainer.args.save_only_model:
            torch.save(kept, part / "optimizer.pt")


def _write_shards(trainer: Any, part: Path) -> None:
    """Let each process write its shares; a full disk fails that for all of them."""
    kept = None
    if not trainer.args.save_only_model:
        kept = named_state(*trainer.optimizer_and_names())
    written = write_shards(part, trainer.world, trainer.model, kept)
    if trainer.world.main:
        write_list(part, trainer.model, trainer.context.tokenizer, written)


def best_checkpoint(trainer: Any, folder: Path, resumed: Path | None) -> str | None:
    """The best checkpoint that exists, or is about to; None: none was validated.

    The Trainer knows the best validation. Where there are more of those than checkpoints, it may
    have no checkpoint, and an early one would pass for the best.

    Args:
        trainer: a ``FineTuner``; its log has the figures of all validations.
        folder: of the run.
        resumed: the checkpoint that the run has resumed from; those before it are beside it.
    """
    args, state = trainer.args, trainer.state
    if args.metric_for_best_model is None:
        return None
    key = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    since = 0 if resumed is None else int(resumed.name.rpartition("-")[2])
    scores: dict[Path, float] = {}
    for entry in state.log_history:
        step, score = entry["step"], entry.get(key, math.nan)
        earlier = resumed is not None and step <= since
        place = checkpoint.place(resumed.parent if earlier and resumed else folder, step)
        if not math.isnan(score) and (place.exists() or step == state.global_step):
            scores[place] = score
    if not scores:
        return None
    choose = max if args.greater_is_better else min
    return str(choose(scores, key=lambda place: scores[place]))
