"""The checkpoints of a run, and the files of each."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerState

from ...errors import RecipeError
from ..processes.world import World
from . import files
from . import files as checkpoint
from .files import CheckpointWriteError, write_error_reason
from .load import readable
from .ownership import LOCK
from .resume import Saved
from .rng_state import RngState
from .save_model import save
from .sharded import named_state, write_list, write_shards
from .snapshot import snapshot, to_host, why_no_room


def write_checkpoint(
    trainer: Any, part: Path, saved: Saved, unfinished: RngState | None, later: bool = False
) -> Callable[[], None] | None:
    """Write all that a run needs to resume from here, in the form that ``Trainer`` reads.

    Of several processes, each writes its random state and its shards, and rank 0 the rest.
    ``saved`` is what the Trainer does not keep; ``unfinished`` the random state to save in place of
    the present one, which has moved on.

    Returns:
        With ``later``, what is still to be called, in any thread: it writes copies of the weights
        and of the optimizer's state. Else None.
    """
    state, main = trainer.state, trainer.world.main
    trainer.store_flos()  # a collective, as the next ones: before what a full disk can stop
    rest = None
    if trainer.sharding.writes_shards:
        _write_shards(trainer, part)
    else:
        write = _whole(trainer, part, later)
        if later:
            rest = write
        else:
            write()
    if not trainer.args.save_only_model:
        if main:
            torch.save(trainer.sharding.schedule_state(), part / "scheduler.pt")
            trainer._save_scaler(str(part))
        if unfinished is None:
            trainer._save_rng_state(str(part))
        else:
            with unfinished.applied():
                trainer._save_rng_state(str(part))
    if not main:
        return rest
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()
    state.save_to_json(str(part / "trainer_state.json"))
    saved.write(part)
    return rest


def _whole(trainer: Any, part: Path, copied: bool) -> Callable[[], None]:
    """Bring weights and the optimizer's state together on rank 0; returns what writes them.

    ``copied``: it writes them as they are now, whatever is trained meanwhile.
    """
    model, context, whole = trainer.model, trainer.context, trainer.sharding.whole_state()
    optimizer = None if trainer.args.save_only_model else trainer.sharding.optimizer_state()
    tokenizer = context.tokenizer
    if copied:
        model, whole = snapshot(model)
        optimizer, tokenizer = to_host(optimizer), trainer.checkpoints.tokenizer

    def write() -> None:
        if trainer.world.main:
            save(model, tokenizer, part, whole, context.recipe)
            if optimizer is not None:
                torch.save(optimizer, part / "optimizer.pt")

    return write


def _write_shards(trainer: Any, part: Path) -> None:
    """Let each process write its shares; a full disk fails that for all of them."""
    optimizer = None
    if not trainer.args.save_only_model:
        optimizer = named_state(*trainer.sharding.optimizer_and_names())
    listing = write_shards(part, trainer.world, trainer.model, optimizer)
    if trainer.world.main:
        write_list(part, trainer.model, trainer.context.tokenizer, listing)


def best_checkpoint(trainer: Any, folder: Path, resumed: Path | None) -> str | None:
    """The best checkpoint that exists, or is about to; None: none was validated.

    The Trainer knows the best validation. Where there are more of those than checkpoints, it may
    have no checkpoint, and an early one would pass for the best. Checkpoints before ``resumed``,
    from which the run has resumed, are in the same folder as that one.
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


class Checkpoints:
    """The checkpoints of a run: written completely, the best one known, old ones removed.

    With ``async_save``, one is copied to host memory, and written by a thread while the next steps
    run; ``settle`` takes note of it between steps, and another one waits for it.

    Attributes:
        write_error: why a checkpoint could not be written, which ended the run; or None.
        saved_at: the step of the last checkpoint.
        resumed_from: the checkpoint that the run has resumed from, or None.
    """

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.write_error: str | None = None
        self.saved_at: int | None = None
        self.resumed_from: Path | None = None
        self._in_flight: tuple[int, Future[None]] | None = None

    @functools.cached_property
    def _copies(self) -> bool:
        """Whether copies are written later; host memory decides that at the first checkpoint."""
        trainer = self.trainer
        if not trainer.context.recipe.async_save:
            return False
        why_not = why_no_room(trainer.model, trainer.sharding.optimizer)
        if why_not is not None:
            trainer.context.say(f"  async_save: checkpoints are written at once: {why_not}")
        return why_not is None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """A copy for the thread: a tokenizer in Rust refuses two users ("Already borrowed")."""
        return copy.deepcopy(self.trainer.context.tokenizer)

    def resume_from(self, folder: Path) -> None:
        """Note the checkpoint that is resumed from; RecipeError if its trainer state is damaged."""
        self.resumed_from = folder
        self.state_of(folder)

    def resume_at_end(self, folder: Path) -> None:
        """Restore the state of a checkpoint after which nothing is left to train."""
        self.trainer.state = self.state_of(folder)
        self.resumed_from = folder
        self.note_best()
        self.saved_at = self.trainer.state.global_step

    @staticmethod
    def state_of(folder: Path) -> TrainerState:
        """The trainer's state in a checkpoint."""
        with readable(folder):
            state: TrainerState = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        return state

    def note_best(self) -> None:
        """Let rank 0 look for the best checkpoint; folders may have moved, or show up late."""
        trainer = self.trainer

        def look() -> str | None:
            return best_checkpoint(trainer, self.folder, self.resumed_from)

        trainer.state.best_model_checkpoint = trainer.world.share(look)

    def save_now(self) -> None:
        """Write a checkpoint of the last whole step, unless there is one, or was no step."""
        self.settle(wait=True)
        if self.trainer.state.global_step not in (0, self.saved_at) and self.write_error is None:
            self.save()
            self.settle(wait=True)

    def save(self) -> None:
        """Write the checkpoint, or begin to; or end the run because the disk is full."""
        self.settle(wait=True)
        if self.write_error is not None:
            return
        trainer, step = self.trainer, self.trainer.state.global_step
        with self._noting_full_disk():
            self.note_best()
            if self._copies:
                self._begin(step)
                return
            write_collectively(trainer.world, self.folder, step, self._write)
            if trainer.world.main:
                self._rotate(step, trainer.state.best_model_checkpoint)
            self._saved(step)

    def settle(self, wait: bool = False) -> None:
        """Take note of a checkpoint that a thread has written; ``wait`` for one in flight."""
        if self._in_flight is None:
            return
        step, written = self._in_flight
        if wait or written.done():
            with self._noting_full_disk():
                written.exception()  # a signal may interrupt the wait, and it is still in flight
                self._in_flight = None
                written.result()
                self._saved(step)

    def _begin(self, step: int) -> None:
        best = self.trainer.state.best_model_checkpoint
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(files.writing(self.folder, step))
            rest = self._write(part, later=True)
            unfinished = stack.pop_all()

        def finish() -> None:
            with unfinished:
                if rest is not None:
                    rest()
            self._rotate(step, best)

        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight = step, writer.submit(finish)
        writer.shutdown(wait=False)

    def _write(self, part: Path, later: bool = False) -> Callable[[], None] | None:
        trainer = self.trainer
        with trainer.objective.writing(part):
            return write_checkpoint(trainer, part, trainer.saved(), trainer.unfinished(), later)

    def _rotate(self, step: int, best: str | None) -> None:
        new = checkpoint.place(self.folder, step)
        remaining = {new, Path(best)} if best else {new}
        limit = self.trainer.context.recipe.save_total_limit
        checkpoint.rotate(self.folder, limit, remaining)

    def _saved(self, step: int) -> None:
        self.saved_at = step
        trainer = self.trainer
        if trainer.world.main:
            trainer.progress.saved(step)
        if trainer.world.main and trainer.args.push_to_hub:
            new = str(checkpoint.place(self.folder, step))
            trainer.push_or_say(lambda: trainer._push_from_checkpoint(new))

    @contextlib.contextmanager
    def _noting_full_disk(self) -> Iterator[None]:
        try:
            yield
        except checkpoint.CheckpointWriteError as error:
            self.write_error = str(error)
            self.trainer.control.should_training_stop = True


# A checkpoint that several processes write: complete, or absent, for all of them.


_LATE = 20.0
"""Seconds after which what another machine has written must be visible."""


def write_collectively(
    world: World, folder: Path, step: int, write: Callable[[Path], object]
) -> None:
    """Make a checkpoint of what ``write`` puts into a folder; all processes call this.

    Rank 0 makes the hidden folder, all processes write into it, and rank 0 gives it its name once
    all of them have. So ``folder``, the run's, must be the same on all machines. The collectives of
    ``write`` come before anything that a full disk can make fail on one process alone.

    Raises:
        CheckpointWriteError: the disk of one of them is full, or cannot be written to. It is
            raised in all processes, and nothing is left.
    """
    if not world.several:
        with files.writing(folder, step) as part:
            write(part)
    elif world.main:
        _lead(world, folder, step, write)
    else:
        part_name = world.share(str)  # of rank 0
        if part_name:
            _write(world, Path(part_name), write)
        failed = world.share(str)
        if failed:
            raise CheckpointWriteError(failed)


def require_shared(world: World, folder: Path) -> None:
    """Raise RecipeError unless the run's folder is the same on all machines; a collective.

    Rank 0 has the lock in it.
    """
    if not world.several:
        return
    apart = world.rank != world.local_rank and not _appears(folder / LOCK)
    hosts = sorted({host for host in world.gather(socket.gethostname() if apart else "") if host})
    if hosts:
        raise RecipeError(
            f"output_dir: {folder} is not the same folder on {', '.join(hosts)} as on the machine "
            "of rank 0; name one that all machines share, where every process finds the checkpoints"
        )


def _appears(path: Path) -> bool:
    """Whether a file exists, or soon does: a network file system may show it late."""
    end = time.monotonic() + _LATE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # asks the server
    return True


def _lead(world: World, folder: Path, step: int, write: Callable[[Path], object]) -> None:
    failed, announced = "", False
    try:
        with files.writing(folder, step) as part:
            world.share(lambda: str(part))
            announced = True
            _write(world, part, write)
    except CheckpointWriteError as error:
        failed = str(error)
    if not announced:
        world.share(lambda: "")
    world.share(lambda: failed)
    if failed:
        raise CheckpointWriteError(failed)


def _write(world: World, part: Path, write: Callable[[Path], object]) -> None:
    """Write, and learn whether all processes could."""
    reason = None
    try:
        write(part)
    except Exception as error:
        reason = write_error_reason(error)
        if reason is None:
            raise
    world.wait_for_main()  # whose files may take longer than a collective may
    reasons = [reason for reason in world.gather(reason) if reason is not None]
    if reasons and world.main:
        raise CheckpointWriteError(reasons[0])
