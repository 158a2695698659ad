"""The objective of the preference methods: the loss of TRL's trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import RecipeError
from ..checkpoint.resume import Saved
from ..data.order import order_of
from ..rewards.judge import means
from ..trainer.objective import FloatLogits, Objective
from .reference import drop_idle_copy, read_reference, write_reference
from .rows import FillableExamples, features_in, tokens_of

Metrics = dict[str, list[float]]
"""What was measured since the last log, by name."""

_PENDING = "pending_metrics"


class Preferences(Objective):
    """The loss of TRL's trainer and its further figures, per row.

    ``float_logits``: whether the trainer reads logits that must be float32, by ``FloatLogits``.

    Attributes:
        factor: in several processes, what a loss is multiplied by so that a step's gradient is the
            mean over all its batches, although some processes may have had none left.
    """

    weighs_tokens = False
    not_plain = "the objective compares or rates answers: it is no cross entropy of labels"

    def __init__(self, float_logits: bool = False) -> None:
        self.float_logits = float_logits
        self.factor, self._counts = 1.0, True
        self._measured: tuple[Metrics, int] | None = None
        self._sizes: list[int] = []

    # --- the trainer and its rows ----------------------------------------------------------------

    @contextmanager
    def dtypes_left(self, model: Any) -> Iterator[None]:
        """Keep the dtypes of trained weights: TRL would round those next to 4-bit ones to bf16."""
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        yield
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                parameter.data = data

    def attach(self, trainer: Any) -> None:
        """Bind the trainer, once it is set up."""
        super().attach(trainer)
        drop_idle_copy(trainer.model)
        if trainer.world.several:  # of this trainer's own accelerator, which TRL asks for figures
            gather = UnevenGather(lambda: self._counts)
            trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = gather

    def order(self, rows: Any) -> Any:
        """The sampler of the rows to train on."""
        recipe, size = self.trainer.context.recipe, self.trainer._train_batch_size
        return order_of(rows, recipe, size, tokens_of)

    def fillable(self, rows: Any) -> Any:
        """The rows to train on, where those with an inverted index count for nothing."""
        return FillableExamples(rows)

    @property
    def _moving_reference(self) -> Any:
        """The reference model if it follows the trained one; else None."""
        moves = getattr(self.trainer.args, "sync_ref_model", False)
        return getattr(self.trainer, "ref_model", None) if moves else None

    def load_reference(self) -> None:
        """Restore a reference model that moves, before anything is measured."""
        resumed_from = self.trainer.checkpoints.resumed_from
        if self._moving_reference is not None and resumed_from is not None:
            read_reference(self._moving_reference, resumed_from)

    def restore(self, resumed: Saved | None) -> None:
        """Restore what was measured before the checkpoint and not yet logged."""
        pending = resumed.carried.get(_PENDING) if resumed is not None else None
        if isinstance(pending, Mapping):
            self.pending("train").update(pending["metrics"])
            if hasattr(self.trainer, "_total_train_tokens"):
                self.trainer._total_train_tokens = pending["tokens"]

    # --- a step ----------------------------------------------------------------------------------

    def weigh_batches(self, batches: Any) -> None:
        """Let the processes agree on how many batches the step has."""
        world = self.trainer.world
        if world.several:
            number = len(batches)
            whole = world.sums([sum(self.counts(batch) for batch in batches)])[0]
            self.factor = number * world.batch_ranks / max(1.0, whole)

    def counts(self, batch: Any) -> bool:
        """Whether a batch counts; one that only fills does not."""
        return bool(batch["trained"])

    def begin_batch(self, batch: Any) -> None:
        """Record whether the batch counts."""
        self._counts = self.counts(batch)

    @contextmanager
    def measured_once(self) -> Iterator[None]:
        """Around each try to train a batch: a failed one leaves nothing measured."""
        measured = self.pending("train")
        lengths = {name: len(values) for name, values in measured.items()}
        tokens = getattr(self.trainer, "_total_train_tokens", None)
        try:
            yield
        except Exception:
            for name, values in measured.items():
                del values[lengths.get(name, 0) :]
            if tokens is not None:
                self.trainer._total_train_tokens = tokens
            raise

    def loss(
        self, compute: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The method's loss; a batch that only fills counts for nothing."""
        called = FloatLogits(model) if self.float_logits else model
        return self.weighed(model, compute(called, batch, *args, **kwargs))

    def weighed(self, model: Any, loss: Any) -> Any:
        """A process's loss, as a part of the step's mean."""
        if not (self.trainer.world.several and model.training):
            return loss
        return loss * (self.factor if self._counts else 0.0)

    def end_step(self) -> None:
        """Record what is measured and not yet logged."""
        tokens = int(getattr(self.trainer, "_total_train_tokens", 0))
        self._measured = copy.deepcopy(dict(self.pending("train"))), tokens

    def pending(self, mode: str) -> Metrics:
        """What the method has measured since the last log, in ``"train"`` or ``"eval"``."""
        all_metrics = vars(self.trainer).get("_metrics")
        if all_metrics is None:
            all_metrics = vars(self.trainer)["_stored_metrics"]
        metrics: Metrics = all_metrics[mode]
        return metrics

    # --- validation ------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context around a validation and its log, in which the mode is not training."""
        model: Any = self.trainer.model
        training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(training)

    def figures(self) -> dict[str, float]:
        """The mean loss per row, ``eval_loss``, and what the method measures besides it.

        Several datasets also have ``eval_NAME_loss`` each. A collective.
        """
        sums: dict[str, tuple[float, float]] = {}
        self._sizes = []
        with self.evaluating(), torch.no_grad():
            for name in self.trainer.context.validation:
                sums[name] = self._sum(name)
            measured = self.pending("eval")
            by_name = means(measured, self._sizes)
            by_name.pop("num_tokens", None)  # those of training so far
            figures = {f"eval_{k.removeprefix('eval_')}": value for k, value in by_name.items()}
            measured.clear()
        total, rows = (sum(part) for part in zip(*sums.values(), strict=True))
        if len(sums) > 1:
            figures |= {f"eval_{name}_loss": a / b for name, (a, b) in sums.items()}
        return {"eval_loss": total / rows, **figures}

    def _sum(self, name: str) -> tuple[float, float]:
        """The summed losses of the rows of a dataset, and their number."""
        trainer = self.trainer
        batches = copy.copy(trainer.context.validation[name])
        # as the trainer has them, which may have added the reference's part
        if isinstance(trainer.eval_dataset, Mapping):
            batches.packs = trainer.eval_dataset[name]
        total = rows = 0.0
        for turn, tensors in enumerate(batches):
            batch: Any = trainer._prepare_inputs(tensors)
            batch.pop("tokens")
            counts = self._counts = bool(batch.pop("trained"))
            with trainer.compute_loss_context_manager():
                loss = float(self.evaluated_loss(batch))
            number = batches.rows(turn) if counts else 0
            self._sizes.append(int(trainer.world.sums([number])[0]))
            total, rows = total + loss * number, rows + number
        sums = trainer.world.sums([total, rows])
        return sums[0], sums[1]

    def evaluated_loss(self, batch: Any) -> Any:
        """The loss of a batch that is not trained; its figures go to ``eval``."""
        return self.trainer.compute_loss(self.trainer.model, batch)

    def require_judged(self, figures: Mapping[str, float]) -> None:
        """Raise RecipeError unless a validation had the figure that judges it."""
        judged = self.trainer.args.metric_for_best_model
        if judged is not None and f"eval_{judged.removeprefix('eval_')}" not in figures:
            raise RecipeError(
                f"metric_for_best_model: these validation rows have no {judged}; they have "
                f"{', '.join(figures)}"
            )

    def probe(self) -> dict[str, Any]:
        """A batch of one row, to compare models on."""
        row = self.trainer.train_dataset[0]
        batch: dict[str, Any] = self.trainer.data_collator([row])
        if row.get("pictures"):
            return batch  # features belong to all of its tokens
        ids = next(value for name, value in batch.items() if name.endswith("input_ids"))
        return {"input_ids": ids[:1]}

    # --- checkpoints -----------------------------------------------------------------------------

    def carried(self) -> dict[str, Any]:
        """What was measured and not yet logged after the last whole step."""
        if self._measured is None:
            return {}
        metrics, tokens = self._measured
        logged = self.trainer._globalstep_last_logged == self.trainer.state.global_step
        return {_PENDING: {"metrics": {} if logged else metrics, "tokens": tokens}}

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """A context around writing a checkpoint, which adds a reference model that moves."""
        yield
        if self._moving_reference is not None and self.trainer.world.main:
            write_reference(self._moving_reference, folder)


class Odds(Preferences):
    """The objective of ORPO and CPO, whose trainers of TRL measure everything as training."""

    def evaluated_loss(self, batch: Any) -> Any:
        """The loss; by default it would be measured as training's."""
        trainer = self.trainer
        loss, measured = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="eval")
        trainer.store_metrics(measured, train_eval="eval")
        return loss

    def probe(self) -> dict[str, Any]:
        """A batch of one row, to compare models on; both answers where it has images."""
        batch = self.trainer.data_collator([self.trainer.train_dataset[0]])
        if not (features := features_in(batch)):
            return super().probe()
        names = ("input_ids", "attention_mask")
        tokens = self.trainer.concatenated_inputs(batch)
        return {**{name: tokens[f"concatenated_{name}"] for name in names}, **features}


class UnevenGather:
    """A replacement of accelerate's ``gather``, which needs the same number of rows everywhere.

    The last batch of an epoch may have fewer rows, and a process may have none left: it then takes
    part with nothing. ``counts`` says whether this process's batch counts.
    """

    def __init__(self, counts: Callable[[], bool]) -> None:
        self.counts = counts

    def __call__(self, values: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows of all processes, concatenated; single values become rows.

        ``values`` is a tensor, or tensors in tuples, lists and dicts; ``args`` and
        ``kwargs`` have no effect.
        """
        if isinstance(values, Tensor):
            return self._rows(values)
        if isinstance(values, dict):
            return {name: self(value) for name, value in values.items()}
        if isinstance(values, list | tuple):
            return type(values)(self(value) for value in values)
        return values

    def _rows(self, values: Tensor) -> Tensor:
        row = values.detach().reshape(1, *values.shape[1:]) if values.ndim == 0 else values.detach()
        if not self.counts():
            row = row[:0]
        size = torch.tensor([len(row)], device=row.device)
        sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, size)
        numbers = [int(s) for s in sizes]
        padded = row.new_zeros(max(numbers), *row.shape[1:])
        padded[: len(row)] = row
        parts = [torch.empty_like(padded) for _ in numbers]
        dist.all_gather(parts, padded)
        return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])
