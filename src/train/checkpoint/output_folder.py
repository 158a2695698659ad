"""The folder of the results: whether it may be written to, and clearing it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from ...errors import RecipeError
from ..output_files import why_not_ours_to_write
from .files import checkpoints, clean, discard, step_of
from .ownership import PART, few, foreign_files, link_in, results
from .resume import Saved

State = Literal["stopped", "finished", "stopped early"]


def check_output(
    folder: Path, overwrite: bool, resumed: bool = False, longer: bool = False
) -> None:
    """Check that results may go into ``folder``; changes nothing.

    ``overwrite``: an earlier run may be replaced. ``resumed``: the run resumes from a checkpoint
    there, and may have left more than that; if it has finished, only a ``longer`` one does.

    Raises:
        RecipeError: it is a file, the system's, holds what no run has written, or holds a run that
            is not to be overwritten.
    """
    require_run_folder(folder)
    _require_writable(folder)
    result = next(results(folder), None)
    if result is None or overwrite:
        return
    state = state_of(folder)
    if resumed and (longer or state == "stopped"):
        return
    there = f"output_dir: {folder} already holds a run ({result.name})"
    if last := checkpoints(folder)[-1:]:
        there += f" that {_STATES[state]}; {_way_on(last[0], state)}"
    raise RecipeError(
        f"{there}; to begin anew, choose another folder, or pass --overwrite "
        "(overwrite_output_dir: true)"
    )


_STATES: dict[State, str] = {
    "stopped": "was stopped",
    "finished": "has finished",
    "stopped early": "ended by early stopping",
}


def _way_on(last: Path, state: State) -> str:
    """How a run goes on from its ``last`` checkpoint, or why it cannot."""
    try:
        saved = Saved.read(last)
    except RecipeError as error:
        return str(error)
    if state == "finished" and saved.has_fixed_length:
        return f"it cannot be trained further with lr_scheduler: {saved.recipe['lr_scheduler']}"
    more = {
        "stopped": "",
        "finished": ", with more max_steps or num_epochs",
        "stopped early": ", with a higher early_stopping_patience",
    }[state]
    return f"resume_from_checkpoint: true (--resume_from_checkpoint) goes on from {last.name}{more}"


def require_run_folder(folder: Path) -> None:
    """Raise RecipeError unless ``folder`` does not exist, is empty, or is a run's."""
    problem = why_not_ours_to_write(folder)
    if problem is not None:
        raise RecipeError(f"output_dir: {problem}")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output_dir: {folder} is not a folder; name another one")
    try:
        others, link = foreign_files(folder), link_in(folder)
    except OSError as error:
        raise RecipeError(f"output_dir: {folder} cannot be read: {error.strerror}") from None
    if others:
        raise RecipeError(
            f"output_dir: {folder} holds {few(others)}, which no run has written; choose a new "
            f"folder, {folder / 'run'} for example"
        )
    if link is not None:
        raise RecipeError(
            f"output_dir: {link} is a link, so that the run would write elsewhere; remove it"
        )


def _require_writable(folder: Path) -> None:
    """Try to make ``folder`` and a file in it, which is removed again."""
    new_folders = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"output_dir: {folder} cannot be written to: {reason}") from None
    finally:
        for path in new_folders:
            with contextlib.suppress(OSError):
                path.rmdir()


def state_of(folder: Path) -> State:
    """How the run in ``folder`` ended, unless a longer one has begun since: then as stopped."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        last = max((step_of(path) or 0 for path in checkpoints(folder)), default=0)
        if run["status"] != "finished" or last > run["steps"]:
            return "stopped"
        # a run that finished ends before its last step by early stopping alone
        early = run["steps"] < run.get("steps_planned", 0)
        return "stopped early" if early else "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return "stopped"


def clear_output(folder: Path, resumed: bool = False) -> None:
    """Make ``folder``, and remove what an earlier run left in it (nothing else).

    If the run resumes from a checkpoint there, only what a killed process left half done goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    shutil.rmtree(folder / PART, ignore_errors=True)
    for path in [] if resumed else list(results(folder)):
        if path.is_dir():
            discard(path)
        else:
            path.unlink()
