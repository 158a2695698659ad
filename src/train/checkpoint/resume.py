"""Resuming: which checkpoint, whether it fits, and what it keeps besides the weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from ...errors import RecipeError
from ..json_text import parse_json
from ..model.files import damaged, in_shards, shards_problem
from ..recipe.keys.base import resumable
from ..recipe.recipe import Recipe
from ..recipe.secret_values import hide
from . import files as checkpoint

_FILE = "fusewright.json"
_CHECKED = (".json", ".safetensors", ".pt", ".pth", ".bin")
_FORMAT = 1

_OF_A_STEP = ("gradient_accumulation_steps", "batch_size")
"""Keys that are compared together with the number of processes."""
_OF_A_STREAM = ("dataloader_num_workers",)
"""Keys that do change it where rows are streamed: each worker reads a share of them."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint keeps besides what the Trainer does.

    Attributes:
        recipe: every key of the run that made it.
        data: the fingerprint of its prepared rows.
        step: how many optimizer steps were done.
        meter: the counts of ``ThroughputMeter``.
        pending_loss: the loss that is summed up and not logged yet.
        last_logged: the step at which it was logged last.
        carried: figures of the run from before it trained.
        choices: which forms of computations its machine chose (``kernels/choice.py``).
        planned: how many steps the run was to have, as the Trainer's own file says; None: it
            does not.
    """

    recipe: dict[str, Any]
    data: str
    step: int
    meter: dict[str, list[Any]]
    pending_loss: float
    last_logged: int
    carried: dict[str, Any]
    processes: int = 1
    choices: list[dict[str, Any]] = field(default_factory=list)
    planned: int | None = None

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        content = {**asdict(self), "recipe": hide(self.recipe)}
        del content["planned"]  # which has an owner
        text = json.dumps({"format": _FORMAT, **content}, indent=1)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """Read it from a checkpoint; RecipeError if that is of other origin, or lacks files."""
        try:
            content = parse_json((folder / _FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(
                f"{folder} cannot be resumed from: it has no {_FILE}, so this version did not "
                "write it; for its weights alone set lora_model_dir (or base_model)"
            ) from None
        except (OSError, ValueError):
            raise RecipeError(another(folder, f"its {_FILE} is damaged")) from None
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise RecipeError(f"{folder} cannot be resumed from: another version wrote its {_FILE}")
        _require_files(folder)
        try:
            saved = cls(**content)
            counted = type(saved.processes) is int and saved.processes > 0
            whole = counted and isinstance(saved.step, int) and isinstance(saved.recipe, dict)
        except TypeError:  # other fields
            whole = False
        if not whole:
            raise RecipeError(another(folder, f"its {_FILE} is damaged"))
        return replace(saved, planned=_planned(folder))

    @property
    def has_fixed_length(self) -> bool:
        """Whether its schedule cannot be made longer: what is saved of it holds its length."""
        return self.recipe.get("lr_scheduler") == "one_cycle"

    def longer_keys(self, recipe: Recipe) -> set[str]:
        """The keys by which ``recipe`` trains longer than the run did, and may."""
        key, before, now = self._lengths(recipe)
        return {key} if now > before and not self.has_fixed_length else set()

    def is_longer_than(self, recipe: Recipe) -> bool:
        """Whether ``recipe`` asks for less training than the run did."""
        _, before, now = self._lengths(recipe)
        return now < before

    def _lengths(self, recipe: Recipe) -> tuple[str, float, float]:
        """The key that decides how long ``recipe`` trains, its value in the run, and in ``recipe``.

        Both are 0 where one of them is no number.
        """
        key = "max_steps" if recipe.max_steps is not None else "num_epochs"
        before, now = self.recipe.get(key), getattr(recipe, key)
        if key == "max_steps" and before is None:  # the run was as long as its rows
            before = self.planned
        if isinstance(before, int | float) and isinstance(now, int | float):
            return key, before, now
        return key, 0, 0

    def is_more_patient(self, recipe: Recipe) -> bool:
        """Whether early stopping waits longer in ``recipe`` than it did in the run, or for ever."""
        before, now = self.recipe.get("early_stopping_patience"), recipe.early_stopping_patience
        return isinstance(before, int) and (now is None or now > before)


def _planned(folder: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        state = parse_json((folder / "trainer_state.json").read_text(encoding="utf-8"))
        steps = state.get("max_steps") if isinstance(state, dict) else None
        return steps if isinstance(steps, int) else None
    return None


def _require_files(folder: Path) -> None:
    """Raise RecipeError unless a checkpoint has all that a run needs to resume from it."""
    shards = in_shards(folder)
    optimizer = () if shards else ("optimizer.pt",)
    for name in (*optimizer, "scheduler.pt", "trainer_state.json"):
        if not (folder / name).exists():
            raise RecipeError(
                f"{folder} cannot be resumed from: it has no {name} (save_only_model: true "
                "leaves that out)"
            )
    parts = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _CHECKED)
    problem = damaged(parts) or (shards_problem(folder) if shards else None)
    if problem is not None:
        raise RecipeError(another(folder, problem))


@dataclass(frozen=True)
class Resumed:
    """What a run resumes from: a checkpoint's folder, and what it keeps besides the weights."""

    folder: Path
    saved: Saved


def another(folder: Path, why: str) -> str:
    """The message about a damaged checkpoint."""
    return (
        f"{folder} cannot be resumed from: {why}; name an earlier checkpoint in "
        "resume_from_checkpoint, or start from the beginning"
    )


def find(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from; None: the run starts from the beginning.

    Raises:
        RecipeError: the recipe names one that is not there.
    """
    folder, requested = Path(recipe.output_dir), recipe.resume_from_checkpoint
    if requested is True and recipe.overwrite_output_dir:
        raise RecipeError(
            "resume_from_checkpoint: true resumes the run in output_dir, and "
            "overwrite_output_dir replaces it; set only one"
        )
    if isinstance(requested, str):
        return _named(Path(requested))
    if not (requested or recipe.auto_resume_from_checkpoints) or recipe.overwrite_output_dir:
        return None
    existing = checkpoint.checkpoints(folder)
    if existing:
        return existing[-1]
    if requested:
        why = (
            ": the run there has ended without one (save_steps makes them); to train its weights "
            "further in a new run, name it in lora_model_dir (or base_model)"
        )
        raise RecipeError(
            f"resume_from_checkpoint: there is no checkpoint in {folder}"
            f"{why if (folder / 'run.json').exists() else ''}"
        )
    return None


def _named(path: Path) -> Path:
    """The checkpoint ``path``, or the last one in it, if it is a run's folder."""
    if checkpoint.step_of(path) is not None and path.is_dir():
        return path
    inside = checkpoint.checkpoints(path) if path.is_dir() else []
    if inside:
        return inside[-1]
    raise RecipeError(f"resume_from_checkpoint: there is no checkpoint {path}")


def load(path: Path, recipe: Recipe, processes: int | None = 1) -> Saved:
    """Read what a checkpoint keeps, and check that its run was the same as this one.

    Raises:
        RecipeError: it cannot be resumed from, or other keys decided what it trained.
    """
    saved = Saved.read(path)
    require_same_run(path, saved, recipe, processes)
    return saved


def require_same_run(path: Path, saved: Saved, recipe: Recipe, processes: int | None) -> None:
    """Raise RecipeError unless ``recipe`` trains what the run of a checkpoint did.

    It may train longer. The number of ``processes`` (None: not known yet) may differ if the number
    of forward passes per step makes up for it.
    """
    if processes is not None:
        _require_same_batch(saved, path, recipe, processes)
    # without secrets, which may change, and which the message must not show
    then, now = hide(saved.recipe), hide(recipe.recorded())
    longer = saved.longer_keys(recipe)
    differing = [
        line
        for key in sorted(set(then) | set(now))
        if key not in longer
        and not _may_differ(key, recipe.streams())
        and not (key in _OF_A_STEP and (saved.processes, processes) != (1, 1))
        for line in _differences(then.get(key), now.get(key), key)
    ]
    if differing:
        line, end = ("\n  ", "\nSet them back;") if differing[1:] else (" ", "; set it back,")
        if saved.is_longer_than(recipe):
            them = "them" if differing[1:] else "it"
            end = f"\n{_no_shorter(saved)}\nSet {them} back,"
        raise RecipeError(
            f"{path} was made by another recipe:{line}{line.join(differing)}{end} or start a new "
            "run from its weights, with lora_model_dir (or base_model)"
        )


def _no_shorter(saved: Saved) -> str:
    """Why a run cannot be made shorter, and how to end it all the same."""
    planned = "" if saved.planned is None else f" for {saved.planned:,} steps"
    longer = "" if saved.has_fixed_length else ", and it can be made longer"
    return (
        f"The run was planned{planned}, and is not planned anew for fewer. It can be stopped "
        f"earlier (Ctrl-C saves it){longer}."
    )


def _require_same_batch(saved: Saved, path: Path, recipe: Recipe, processes: int) -> None:
    """Raise RecipeError unless a step has as many forward passes as in the run of a checkpoint."""
    then = Recipe.model_construct(**saved.recipe).accumulation() * saved.processes
    if (saved.processes, processes) == (1, 1) or then == recipe.accumulation() * processes:
        return  # what differs with one process is said key by key
    fitting = then // processes
    remedy = (
        f"set gradient_accumulation_steps: {fitting}"
        if fitting * processes == then
        else f"use a number of processes that divides {then}"
    )
    raise RecipeError(
        f"{path} was made by {saved.processes} process{'es' * (saved.processes > 1)} with {then} "
        f"forward passes per step in all, and here are {processes} with "
        f"{recipe.accumulation()} each; {remedy}"
    )


@contextlib.contextmanager
def without_code(path: Path | None) -> Iterator[None]:
    """Name the file where a pickle of a checkpoint holds more than tensors and numbers.

    Only such are read: anything else in a pickle may be code, and would be run.

    Raises:
        RecipeError: a pickle holds more, or is damaged.
    """
    try:
        yield
    except UnpicklingError as error:
        if path is None:
            raise
        raise RecipeError(_unreadable(path)) from error


def _unreadable(path: Path) -> str:
    import torch
    from transformers import trainer_pt_utils

    numpy: Any = trainer_pt_utils.safe_globals  # what the random state is kept in
    for file in sorted(path.glob("*.pt*")):
        try:
            with numpy():
                torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # of many kinds, by what the file is
            return f"{path} cannot be resumed from: {file.name} is damaged, or holds foreign code"
    return f"{path} cannot be resumed from: one of its files is damaged, or holds foreign code"


def require_same_data(resumed: Resumed, fingerprint: str) -> None:
    """Raise RecipeError unless a checkpoint's run had the rows that this one has."""
    if resumed.saved.data != fingerprint:
        raise RecipeError(
            f"{resumed.folder} was trained on other rows: the datasets, their template or the "
            "split have changed since (or the version of tokenizers or transformers); restore "
            "them, or start a new run"
        )


def _differences(then: Any, now: Any, key: str) -> Iterator[str]:
    """What differs, by the innermost keys."""
    if then == now:
        return
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(set(then) | set(now)):
            yield from _differences(then.get(name), now.get(name), f"{key}.{name}")
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (before, after) in enumerate(zip(then, now, strict=True)):
            yield from _differences(before, after, f"{key}.{i}")
    else:
        yield f"{key} was {json.dumps(then)} and is {json.dumps(now)}"


def _may_differ(key: str, streams: bool) -> bool:
    return resumable(Recipe, key) and not (streams and key in _OF_A_STREAM)
