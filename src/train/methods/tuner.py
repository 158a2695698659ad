"""What the trainers of all methods have in common, before TRL's own of a method."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...errors import RecipeError
from ..checkpoint.resume import Saved
from ..data.order import order_of
from ..rewards.judge import means
from ..trainer.trainer import FineTuner
from .gathering import UnevenGather
from .reference import drop_idle_copy, read_reference, write_reference
from .rows import FillableExamples, tokens_of

Metrics = dict[str, list[float]]
"""What was measured since the last log, by name."""

_PENDING = "pending_metrics"


class MethodTuner(FineTuner):
    """The loop, checkpoints and validation of ``FineTuner``, with the loss of another trainer.

    Classes of methods inherit from this one and then from TRL's trainer, which thus is what
    ``super()`` means here: it computes the loss and what is measured beside it.

    Attributes:
        factor: in several processes, what a loss is multiplied by so that a step's gradient is the
            mean over all its batches, although some processes may have had none left.

    Args:
        kwargs: those of ``FineTuner`` and of TRL's trainer.
    """

    _weighs_tokens = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.factor, self._counts = 1.0, True
        with kept_dtypes(kwargs["model"]):
            super().__init__(*args, **kwargs)
        drop_idle_copy(self.model)
        if self.world.several:  # of this trainer's own accelerator, which TRL asks for its figures
            gather = UnevenGather(lambda: self._counts)
            self.accelerator.gather = self.accelerator.gather_for_metrics = gather
        self._measured: tuple[Metrics, int] | None = None
        self._sizes: list[int] = []

    def _send_telemetry(self) -> None:
        """Nothing: TRL would tell the hub what is trained."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # its rows are tokenized; TRL would do that, too

    # --- a step ----------------------------------------------------------------------------------

    def _fillable(self, packs: Any) -> Any:
        return FillableExamples(packs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset or self.train_dataset
        return order_of(rows, self.context.recipe, self._train_batch_size, tokens_of)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; the processes agree on how many batches the step has."""
        found = super().get_batch_samples(*args, **kwargs)
        if self.world.several:
            number = len(found[0])
            counting = sum(self._trains(batch) for batch in found[0])
            whole = self.world.sums([counting])[0]
            self.factor = number * self.world.batch_ranks / max(1.0, whole)
        return found

    def _trains(self, batch: Any) -> bool:
        """Whether a batch counts; one that only takes part does not."""
        return bool(batch["trained"])

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch."""
        self._counts = self._trains(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def try_step(self, *args: Any, **kwargs: Any) -> Any:
        """One try of ``training_step``; of one that fails, nothing is measured."""
        measured = self.pending("train")
        lengths = {name: len(values) for name, values in measured.items()}
        tokens = getattr(self, "_total_train_tokens", None)
        try:
            return super().try_step(*args, **kwargs)
        except Exception:
            for name, values in measured.items():
                del values[lengths.get(name, 0) :]
            if tokens is not None:
                self._total_train_tokens = tokens
            raise

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The method's own; of a batch that only takes part, nothing counts."""
        loss = super().compute_loss(self._called(model), inputs, *args, **kwargs)
        return self._weighed(model, loss)

    def _called(self, model: Any) -> Any:
        """What computes the outputs of ``model``."""
        return model

    def _weighed(self, model: Any, loss: Any) -> Any:
        if not (self.world.several and model.training):
            return loss
        return loss * (self.factor if self._counts else 0.0)

    def on_step_end(self) -> None:
        """Record what a checkpoint would need if the next step does not finish."""
        super().on_step_end()
        tokens = int(getattr(self, "_total_train_tokens", 0))
        self._measured = copy.deepcopy(dict(self.pending("train"))), tokens

    # --- a reference model that moves ------------------------------------------------------------

    @property
    def _moving_reference(self) -> Any:
        """The reference model if it follows the trained one; else None."""
        moves = getattr(self.args, "sync_ref_model", False)
        return getattr(self, "ref_model", None) if moves else None

    def _write_checkpoint(self, part: Path) -> None:
        super()._write_checkpoint(part)
        if self._moving_reference is not None and self.world.main:
            write_reference(self._moving_reference, part)

    def load_checkpoint(self, folder: Path) -> None:
        """Load a checkpoint after which nothing is left to train, and its reference model."""
        super().load_checkpoint(folder)
        self._restore_reference()

    def _restore_reference(self) -> None:
        if self._moving_reference is not None and self.resumed_from is not None:
            read_reference(self._moving_reference, self.resumed_from)

    # --- what is measured ------------------------------------------------------------------------

    def pending(self, mode: str) -> Metrics:
        """What the method has measured since the last log, in ``"train"`` or ``"eval"``."""
        own = self.__dict__.get("_metrics")
        if own is None:
            own = self.__dict__["_stored_metrics"]
        found: Metrics = own[mode]
        return found

    def _saved(self) -> Saved:
        saved = super()._saved()
        if self._measured is None:
            return saved
        metrics, tokens = self._measured
        logged = self._globalstep_last_logged == self.state.global_step
        kept = {"metrics": {} if logged else metrics, "tokens": tokens}
        return replace(saved, carried={**saved.carried, _PENDING: kept})

    def start(self) -> None:
        """Restore what was measured before the checkpoint and not yet logged."""
        self._restore_reference()
        super().start()
        kept = self._resumed.carried.get(_PENDING) if self._resumed is not None else None
        if isinstance(kept, Mapping):
            self.pending("train").update(kept["metrics"])
            if hasattr(self, "_total_train_tokens"):
                self._total_train_tokens = kept["tokens"]

    # --- validation ------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The figures of the validation rows; the mode says that they are not training's."""
        with self._evaluating():
            found = super().evaluate(*args, **kwargs)
        judged = self.args.metric_for_best_model
        if judged is not None and f"eval_{judged.removeprefix('eval_')}" not in found:
            raise RecipeError(
                f"metric_for_best_model: these validation rows have no {judged}; they have "
                f"{', '.join(found)}"
            )
        return found

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        model: Any = self.model
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(training)

    def figures(self) -> dict[str, float]:
        """The mean loss per row, ``eval_loss``, and what the method measures beside it.

        Several datasets also have ``eval_NAME_loss`` each. With several processes, a collective.
        """
        sums: dict[str, tuple[float, float]] = {}
        self._sizes = []
        with self._evaluating(), torch.no_grad():
            for name in self.context.validation:
                sums[name] = self._sum(name)
            measured = self.pending("eval")
            by_name = means(measured, self._sizes)
            by_name.pop("num_tokens", None)  # those of training so far
            found = {f"eval_{k.removeprefix('eval_')}": value for k, value in by_name.items()}
            measured.clear()
        total, rows = (sum(part) for part in zip(*sums.values(), strict=True))
        if len(sums) > 1:
            found |= {f"eval_{name}_loss": a / b for name, (a, b) in sums.items()}
        return {"eval_loss": total / rows, **found}

    def _sum(self, name: str) -> tuple[float, float]:
        """The losses of the rows of a dataset, added up, and their number."""
        batches = copy.copy(self.context.validation[name])
        batches.packs = self.validation_rows(name)
        total = rows = 0.0
        for turn, made in enumerate(batches):
            batch: Any = self._prepare_inputs(made)
            batch.pop("tokens")
            counts = self._counts = bool(batch.pop("trained"))
            with self.compute_loss_context_manager():
                loss = float(self.evaluated_loss(batch))
            number = batches.rows(turn) if counts else 0
            self._sizes.append(int(self.world.sums([number])[0]))
            total, rows = total + loss * number, rows + number
        both = self.world.sums([total, rows])
        return both[0], both[1]

    def validation_rows(self, name: str) -> Any:
        """The rows of a dataset to validate on, with what the trainer has added to them."""
        rows: Any = self.eval_dataset
        return rows[name] if isinstance(rows, Mapping) else self.context.validation[name].packs

    def evaluated_loss(self, batch: Any) -> Any:
        """The loss of a batch that is not trained; what is measured goes to ``eval``."""
        return self.compute_loss(self.model, batch)

    def probe(self) -> dict[str, Any]:
        """A batch of one row, to compare models on."""
        rows: Any = self.train_dataset
        batch = self.data_collator([rows[0]])
        ids = next(value for name, value in batch.items() if name.endswith("input_ids"))
        return {"input_ids": ids[:1]}


@contextmanager
def kept_dtypes(model: Any) -> Iterator[None]:
    """Keep the trained weights as they are: TRL would round those beside 4-bit weights to bfloat16.

    Args:
        model: whose trained weights are kept.
    """
    trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, data in trained:
        if parameter.dtype != data.dtype:
            parameter.data = data
