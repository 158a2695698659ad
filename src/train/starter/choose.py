"""Chooses the keys of the recipe, each with the reason that the file gives for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...errors import FusewrightError, RecipeError, first_line
from ...memory.budget import gigabytes
from ..model.load import load_config, quiet
from ..model.positions import positions
from ..model.precision import dtype_for_training
from ..plan.count.images import row_images
from ..plan.count.layout import layout_of
from ..plan.estimate import SPARE, TrainingJob, smallest_peak
from ..plan.here import CPU, devices_here
from ..plan.plan import make_job
from ..plan.recommend import method_of
from ..recipe.load import check
from ..recipe.recipe import Recipe
from .candidates import LORA, LORA_WHY, STEPS, Candidates, has_bitsandbytes
from .look import AllRows

# --- memory: the answer of ``fusewright plan`` ---------------------------------------------------


@dataclass(frozen=True)
class MemoryVerdict:
    """Whether a recipe fits (None: not known), and the bytes that it needs at least, if known."""

    fits: bool | None
    needs: int | None
    note: str


class Fits(Protocol):
    """Judges a recipe."""

    def __call__(self, recipe: Recipe, memory: int | None) -> MemoryVerdict:
        """Whether ``recipe`` trains in ``memory`` bytes; None: in what this machine has."""
        ...


class PlanJudge:
    """Judges by the plan of a run on one device of this machine."""

    def __init__(self) -> None:
        self._jobs: dict[str, TrainingJob] = {}
        self._failed: dict[str, MemoryVerdict] = {}
        self._devices = devices_here(torch.float32, 1)

    def __call__(self, recipe: Recipe, memory: int | None) -> MemoryVerdict:
        """Whether ``recipe`` trains in ``memory`` bytes; None: in what this machine has.

        A method whose step cannot be planned is tried once: the model may be on the hub, which
        cannot be reached, and its code may raise anything.
        """
        method = method_of(recipe)
        if method not in self._failed:
            try:
                with quiet():
                    return self._planned(recipe, memory)
            except Exception as error:
                self._failed[method] = MemoryVerdict(None, None, f"not checked: {_reason(error)}")
        return self._failed[method]

    def _planned(self, recipe: Recipe, memory: int | None) -> MemoryVerdict:
        room = self._devices.card.memory if memory is None else memory
        job = self._job(recipe)
        tokens = recipe.micro_batch_size * recipe.sequence_len
        needs = smallest_peak(job, layout_of(recipe, 1), room, tokens / job.step.tokens)
        note = (
            f"needs at least {gigabytes(needs)} of {gigabytes(room)}, according to fusewright plan"
        )
        return MemoryVerdict(needs <= SPARE * room, needs, note)

    def _job(self, recipe: Recipe) -> TrainingJob:
        method = method_of(recipe)
        if method == "QLoRA":
            dense = {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": False}
            return self._job(recipe.model_copy(update=dense)).with_bits(4)
        if method not in self._jobs:
            dtype = dtype_for_training(recipe.precision(), recipe.adapter is not None)
            on_cpu = self._devices.card.name == CPU
            self._jobs[method] = make_job(recipe, dtype, on_cpu, row_images(recipe))
        return self._jobs[method]


def positions_of(recipe: Recipe) -> int | None:
    """The tokens that the recipe's model can read; None: not specified, or no model here."""
    with quiet():
        try:
            return positions(load_config(recipe))
        except Exception:  # it is on the hub, or not readable, which planning says
            return None


def _reason(error: Exception) -> str:
    """An error in one line; with its class, unless it is one of ours."""
    line = first_line(error)
    if isinstance(error, FusewrightError) or line == type(error).__name__:
        return line
    return f"{type(error).__name__}: {line}"


def smallest(budget: int | None) -> str:
    """A budget in words, for a message."""
    return "the memory of this machine" if budget is None else gigabytes(budget)


_ROWS_PER_STEP, _STEPS = 16, 50
"""Sequences of an optimizer step; fewer where an epoch would have less than so many steps."""

_BETA = 0.1

_MICRO = (8, 4, 2, 1)

_UNCHECKED = (
    "Chosen with micro_batch_size 1 because that needs little memory: what fits is NOT CHECKED, "
    "for the reason under Memory above. Once that is resolved, fusewright plan says what fits"
)

_PACKING = "puts several rows into one sequence, which saves padding; rows do not see each other"

Values = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """The chosen keys, the reason of each, and whether the recipe fits."""

    values: Values
    why: dict[str, str]
    verdict: MemoryVerdict


@dataclass
class Chooser:
    """Chooses the keys; ``budget`` is ``--memory`` as it was given, and in bytes.

    ``base`` has ``base_model`` and ``datasets``, and why.
    """

    base: Mapping[str, tuple[Any, str]]
    candidates: Candidates
    budget: tuple[str, int] | None
    fits: Fits

    @property
    def _rows(self) -> AllRows:
        return self.candidates.rows

    def choose(self) -> Draft:
        """The first of the candidates that fits, each with the largest batch that does.

        LoRA with the smallest batch where the judge cannot say. Raises a RecipeError if none of
        them fits, or no row is short enough for the model.
        """
        memory = self.budget[1] if self.budget else None
        verdict = None
        for adapter, why, length in self.candidates.in_order():
            for micro in _MICRO:
                draft = self._draft(adapter, why, length, micro)
                if draft is None:
                    continue
                verdict = self.fits(_recipe(draft.values), memory)
                if verdict.fits:
                    return Draft(draft.values, draft.why, verdict)
                if verdict.fits is None:  # and so it is for smaller batches
                    break
        if verdict is not None and verdict.fits is None:
            return self._unchecked(verdict)
        least = "QLoRA" if has_bitsandbytes() else "LoRA"
        need = f" ({verdict.note})" if verdict else ""
        raise RecipeError(
            f"--memory: not even {least}, at the shortest length that keeps any row, fits into "
            f"{smallest(memory)}{need}; choose a smaller --model, or more memory"
        )

    def _unchecked(self, verdict: MemoryVerdict) -> Draft:
        """The draft that needs little memory, as it is not known what fits."""
        why = f"{LORA_WHY}. {_UNCHECKED}"
        draft = self._draft(LORA, why, self.candidates.usable()[0], 1)
        assert draft is not None  # a batch of 1 is never more than a step has
        return Draft(draft.values, draft.why, verdict)

    # --- one candidate ---------------------------------------------------------------------------

    def _draft(self, adapter: Values, why: str, length: int, micro: int) -> Draft | None:
        values = {key: value for key, (value, _) in self.base.items()}
        reasons = {key: reason for key, (_, reason) in self.base.items()}
        total = self.candidates.sequences(length)
        per_step = 1 << (min(_ROWS_PER_STEP, max(1, total // _STEPS)).bit_length() - 1)
        if micro > per_step:
            return None
        packs, pairs = self.candidates.packs(length), self._rows.are_pairs
        val_size, val_why = self._validation_size()
        epochs, epochs_why = self._epochs()
        keys: list[tuple[str, Any, str]] = [
            ("val_set_size", val_size, val_why),
            ("sequence_len", length, self.candidates.why(length)),
            ("sample_packing", packs, self._packing_why(packs)),
            ("micro_batch_size", micro, "sequences per forward pass"),
            (
                "gradient_accumulation_steps",
                max(1, per_step // micro),
                f"times micro_batch_size; {'pairs' if pairs else 'sequences'} per optimizer step: "
                f"{per_step}, in an epoch: about {total:,}",
            ),
            ("num_epochs", epochs, epochs_why),
            ("learning_rate", *_rate(adapter, pairs)),
            ("lr_scheduler", "cosine", "decays to 0 at the end"),
            ("warmup_ratio", 0.05, "warms up over the first 5% of the steps"),
            ("bf16", "auto", _precision_why()),
            ("memory", self.budget[0] if self.budget else "auto", self._memory_why()),
            (
                "output_dir",
                _free_folder(self._rows.each[0].dataset.path),
                "a folder that does not exist yet",
            ),
            ("saves_per_epoch", *_saves(adapter)),
            ("save_total_limit", 2, "older checkpoints are removed"),
        ]
        before = [(key, value, why if key == "adapter" else "") for key, value in adapter.items()]
        if pairs:
            before.append(("rl", "dpo", _DPO_WHY))
            before.append(("rl_beta", _BETA, "how close to the model without the adapter: usual"))
        if not adapter:
            reasons["base_model"] += f"; {why}"
        for key, value, reason in [*before, *keys]:
            values[key], reasons[key] = value, reason
        return Draft(values, reasons, MemoryVerdict(None, None, ""))

    def _packing_why(self, packs: bool) -> str:
        if packs:
            return _PACKING
        if self._rows.are_pairs:
            return "pairs are not packed"
        return f"the rows are few: packed, an epoch would have fewer than {STEPS} steps"

    def _validation_size(self) -> tuple[int | float, str]:
        size, count = self.candidates.validation(), self._rows.count
        if not size:
            return 0, f"{count} rows are too few to hold any out for validation"
        if isinstance(size, int):
            return size, "a tenth of the rows is held out for validation"
        return size, "5% of the rows are held out for validation"

    def _epochs(self) -> tuple[int, str]:
        if not self._rows.complete:
            return 1, "there are many rows: one pass"
        if self._rows.count < 10_000:
            few = f"{self._rows.count:,} rows are few: three passes"
            val_size, _ = self._validation_size()
            return 3, f"{few}. Watch eval_loss: fewer may be enough" if val_size else few
        return (
            (2, "two passes") if self._rows.count < 50_000 else (1, "there are many rows: one pass")
        )

    # --- reasons ---------------------------------------------------------------------------------

    def _memory_why(self) -> str:
        if self.budget:
            return "all that the process may use (--memory); the run plans for it at its first step"
        return "plans for the memory that is free when the run starts"


def _saves(adapter: Values) -> tuple[int, str]:
    """Checkpoints per epoch, and why: those of all weights are large."""
    kept = "Ctrl-C makes one, too; --resume_from_checkpoint true goes on from the last"
    if adapter:
        return 4, f"checkpoints: a run that is killed loses a quarter of an epoch at most. {kept}"
    return 1, f"checkpoints: a run that is killed loses an epoch at most. {kept}"


def _recipe(values: Values) -> Recipe:
    return check(values).recipe


_DPO_WHY = (
    "learns to prefer the chosen answer to the rejected one (DPO; docs/preferences.md has others). "
    "It needs TRL (install the extra rl)"
)


def _rate(adapter: Values, pairs: bool) -> tuple[float, str]:
    if pairs:
        return (2e-5, "usual for DPO with adapters") if adapter else (1e-6, "usual for DPO")
    if adapter:
        return 2e-4, "usual for adapters"
    return 2e-5, "usual for full fine-tuning: a tenth of LoRA's"


def _precision_why() -> str:
    from ..model.precision import computes_in

    here = computes_in("auto")
    has = "is the case here" if here == "bfloat16" else f"is not the case here: {here}"
    return f"bfloat16 where the hardware supports it, which {has}"


def _free_folder(path: str) -> str:
    """A folder with the name of the rows that does not exist yet."""
    stem = Path(path.replace(":", "-")).name.partition(".")[0] or "run"
    name, number = f"outputs/{stem}", 1
    while Path(name).exists():
        number += 1
        name = f"outputs/{stem}-{number}"
    return name
