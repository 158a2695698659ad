"""Picks the keys of the recipe, each with the reason that the file gives for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..recipe.load import check
from ..recipe.recipe import Recipe
from .fits import Fits, MemoryVerdict, smallest
from .look import RowsRead
from .measure import Lengths

_LEAST, _STEP = 128, 128
"""The shortest ``sequence_len``, and what it is a multiple of."""

_PACK = 1024
"""A pack is at least so long, where the model and the memory allow it."""

_TEXT = 2048
"""Texts are cut to this length."""

_ROWS_PER_STEP, _STEPS = 16, 50
"""Sequences of an optimizer step; fewer where an epoch would have less than so many steps."""

_MICRO = (8, 4, 2, 1)

_PACKING = "several rows in one sequence, which saves padding; none sees another"

Values = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """The keys that were chosen.

    Attributes:
        values: the recipe.
        why: key -> the reason.
        verdict: whether it fits.
    """

    values: Values
    why: dict[str, str]
    verdict: MemoryVerdict


@dataclass
class Chooser:
    """Chooses the keys.

    Args:
        base: ``base_model`` and ``datasets``, and why.
        rows: what was read.
        lengths: of the rows.
        longest: the longest text that the model can read, if that is known.
        budget: ``--memory`` as it was given, and in bytes; None: none was given.
        fits: judges.
    """

    base: Mapping[str, tuple[Any, str]]
    rows: RowsRead
    lengths: Lengths
    longest: int | None
    budget: tuple[str, int] | None
    fits: Fits
    _why: dict[str, str] = field(default_factory=dict)

    def choose(self) -> Draft:
        """The first of the candidates that fits: the best adapter, then the largest batch.

        Raises:
            RecipeError: none of them fits.
        """
        memory = self.budget[1] if self.budget else None
        verdict = None
        for adapter, why in self._adapters():
            for length in self._lengths():
                for micro in _MICRO:
                    draft = self._draft(adapter, why, length, micro)
                    if draft is None:
                        continue
                    verdict = self.fits(_recipe(draft.values), memory)
                    if verdict.fits is not False:
                        return Draft(draft.values, draft.why, verdict)
        need = f" ({verdict.note})" if verdict else ""
        raise RecipeError(
            f"--memory: not even weights of 4 bits and the shortest rows fit into "
            f"{smallest(memory)}{need}; choose a smaller --model, or more memory"
        )

    # --- candidates ------------------------------------------------------------------------------

    def _adapters(self) -> Iterator[tuple[Values, str]]:
        lora = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
        quant = importlib.util.find_spec("bitsandbytes") is not None
        if self.rows.shape.kind == "text (completion)":
            yield {}, "no adapter: texts teach knowledge, which all weights learn better"
        yield lora, "lora: small weights beside frozen ones; learns formats and tasks as well"
        if quant:
            why = "qlora: the same beside weights of 4 bits, because 16 bits do not fit"
            yield {**lora, "adapter": "qlora", "load_in_4bit": True}, why

    def _lengths(self) -> list[int]:
        """Sequence lengths to try: what the rows need first, then shorter ones."""
        wanted = _TEXT if self._is_text() else _rounded(self.lengths.at(99))
        if self._packs(wanted):
            wanted = max(wanted, _PACK)
        if self.longest is not None:
            wanted = min(wanted, self.longest)
        found = [wanted]
        while found[-1] > 2 * _LEAST:
            found.append(_rounded(found[-1] // 2))
        return found

    def _is_text(self) -> bool:
        return self.rows.shape.entry().get("type") == "completion"

    def _packs(self, length: int) -> bool:
        return self._is_text() or self.lengths.at(50) <= length // 2 or length < _PACK

    # --- one candidate ---------------------------------------------------------------------------

    def _draft(self, adapter: Values, why: str, length: int, micro: int) -> Draft | None:
        values = {key: value for key, (value, _) in self.base.items()}
        reasons = {key: reason for key, (_, reason) in self.base.items()}
        total = self._sequences(length)
        per_step = 1 << (min(_ROWS_PER_STEP, max(1, total // _STEPS)).bit_length() - 1)
        if micro > per_step:
            return None
        held, held_why = self._held()
        epochs, epochs_why = self._epochs()
        chosen: list[tuple[str, Any, str]] = [
            ("val_set_size", held, held_why),
            ("sequence_len", length, self._length_why(length)),
            ("sample_packing", True, _PACKING),
            ("micro_batch_size", micro, "sequences per forward pass"),
            (
                "gradient_accumulation_steps",
                max(1, per_step // micro),
                f"times micro_batch_size: {per_step} sequences per optimizer step, of about "
                f"{total:,} in an epoch",
            ),
            ("num_epochs", epochs, epochs_why),
            ("learning_rate", 2e-4 if adapter else 2e-5, _rate_why(adapter)),
            ("lr_scheduler", "cosine", "falls to 0 at the end"),
            ("warmup_ratio", 0.05, "rises in the first steps"),
            ("bf16", "auto", _precision_why()),
            ("memory", self.budget[0] if self.budget else "auto", self._memory_why()),
            ("output_dir", _free_folder(self.rows.dataset.path), "a new folder"),
        ]
        before = [(key, value, why if key == "adapter" else "") for key, value in adapter.items()]
        if not adapter:
            reasons["base_model"] += f"; {why}"
        for key, value, reason in [*before, *chosen]:
            values[key], reasons[key] = value, reason
        return Draft(values, reasons, MemoryVerdict(None, None, ""))

    def _sequences(self, length: int) -> int:
        """Sequences of an epoch, as far as rows were read."""
        tokens = self.lengths.tokens
        kept = tokens if self._is_text() else tokens[tokens <= length]
        if not len(kept):
            return self.rows.count
        mean = float(kept.mean())
        share = len(kept) / len(tokens)
        return max(1, int(self.rows.count * share * mean / length * 1.05))

    def _held(self) -> tuple[int | float, str]:
        count = self.rows.count
        if count < 20:
            return 0, f"{count} rows are too few to hold some out: the loss is of training rows"
        if count < 400:
            return max(2, count // 10), "a tenth of the rows is held out, for validation"
        return 0.05, "5% of the rows are held out, for validation"

    def _epochs(self) -> tuple[int, str]:
        if not self.rows.complete:
            return 1, "there are many rows: once through them"
        if self.rows.count < 10_000:
            return (
                3,
                f"{self.rows.count:,} rows are few: three passes. Watch eval_loss: less may do",
            )
        return (
            (2, "two passes") if self.rows.count < 50_000 else (1, "there are many rows: one pass")
        )

    # --- reasons ---------------------------------------------------------------------------------

    def _length_why(self, length: int) -> str:
        if self._is_text():
            return "longer texts become several samples"
        over = float((self.lengths.tokens > length).mean())
        how = (
            "counted by the tokenizer"
            if self.lengths.counted
            else ("ESTIMATED from characters: the tokenizer is not on this disk")
        )
        said = (
            f"half of the rows have up to {self.lengths.at(50):,} tokens, 99% up to "
            f"{self.lengths.at(99):,} ({how})"
        )
        cut = f"; {over:.1%} are longer and are left out" if over else "; none is longer"
        return said + cut

    def _memory_why(self) -> str:
        if self.budget:
            return "the whole of what the process may use (--memory); planned at the first step"
        return "plans with the memory that is free when the run starts"


def _recipe(values: Values) -> Recipe:
    return check(values).recipe


def _rounded(length: int) -> int:
    return max(_LEAST, -(-length // _STEP) * _STEP)


def _rate_why(adapter: Values) -> str:
    return "usual for adapters" if adapter else "usual for all weights: ten times less than LoRA's"


def _precision_why() -> str:
    from ..model.precision import has_bfloat16

    has = "which this machine has" if has_bfloat16() else "which this machine lacks: float32 here"
    return f"bfloat16 where there are instructions for it, {has}"


def _free_folder(path: str) -> str:
    """A folder of this name that is not there yet."""
    stem = Path(path.replace(":", "-")).name.partition(".")[0] or "run"
    name, number = f"outputs/{stem}", 1
    while Path(name).exists():
        number += 1
        name = f"outputs/{stem}-{number}"
    return name
