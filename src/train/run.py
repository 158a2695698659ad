"""One training run, from the recipe to the report."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import DataError
from ..optim.flat import FlatOptimizer
from . import finish as ending
from .checkpoint import output_folder as output
from .checkpoint import resume
from .checkpoint import save_model as export
from .checkpoint.files import checkpoints
from .checkpoint.lock import held
from .data import prepare
from .data.readers.limits import warnings
from .model.adapters import parameters
from .model.load import quiet
from .model.positions import require_reach
from .model.precision import precision_warning
from .model.tokenizer import load_tokenizer
from .preflight import require_startable
from .recipe.recipe import Recipe
from .recipe.status import messages
from .report import result as report
from .report.result import RunResult
from .report.run_log import RunLog
from .report.throughput import ThroughputMeter, flops_per_token, peak_flops
from .requirements import tracking
from .terminal import Terminal
from .trainer.arguments import arguments_for
from .trainer.batches import training_batch, training_sequences, typical_context, validation_batches
from .trainer.build import make_trainer
from .trainer.context import Context
from .trainer.evaluation import validate
from .trainer.ready import ready_model
from .trainer.schedule import try_schedule
from .trainer.signals import Interrupts, Stopped
from .trainer.trainer import FineTuner
from .trainer.watchdog import NonFiniteStepError


class TrainingRun:
    """One run of one recipe.

    - everything that can be wrong with the recipe and the rows is found before weights are loaded;
    - validation before and after, and one question answered before and after;
    - the model is optimized in place, trained by transformers' Trainer, and restored;
    - the saved adapter is loaded again by plain PEFT and compared;
    - it resumes from a checkpoint bit for bit, as if it had not been stopped;
    - Ctrl-C, SIGTERM, SIGHUP, a full disk and a NaN loss end it in order, with the weights of the
      last complete step and a checkpoint to resume from;
    - once something was trained, no later failure can lose it.

    Args:
        recipe: checked, with absolute paths.
        console: where to print.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe = recipe
        self.console = console
        self.folder = Path(recipe.output_dir)
        self.sequences: Any = ()
        self.start: Path | None = None
        self.in_place = False  # whether that is a checkpoint of this run's folder
        self._cleared = False  # whether the folder is this run's alone
        self.saved: resume.Saved | None = None
        self.result = RunResult(
            output_dir=self.folder,
            recipe=recipe.recorded(),
            versions=report.versions(),
            machine=report.machine(),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self.run_log = RunLog(self.result, console)

    def run(self) -> RunResult:
        """Do all of it, in order.

        Raises:
            RecipeError: the recipe cannot be run.
            DataError: a dataset cannot be used.
            Stopped: a signal came before the first step was done, or a second one came.
        """
        output.require_own(self.folder)
        with held(self.folder, self.run_log.say):
            return self._run()

    def _run(self) -> RunResult:
        self._may_start()
        with Interrupts() as interrupts, quiet(), tracking(self.recipe):
            with self.run_log.timed("data"):
                tokenizer = load_tokenizer(self.recipe)
                prepared = self._prepare(tokenizer)
            with self.run_log.timed("load"):
                model = self._model(tokenizer)
            context = self._context(model, tokenizer, prepared, interrupts)
            self._before(model, context)
            trainer = make_trainer(context, model, self.sequences, self.saved, self._clear)
            self._train(trainer, interrupts)
            try:
                self._after(trainer.model, context)
            except Stopped as stopped:  # what was trained has been saved
                self.result.status, self.result.signal = "interrupted", stopped.signal
            with interrupts.deferring_signals(interrupts.WRITING):
                ending.write(self.result, self.run_log)
            ending.publish(trainer, self.result, self.run_log, interrupts)
            self.result.print(self.console)
            for line in self.result.ending(self.recipe.adapter is not None):
                self.run_log.say(line)
        return self.result

    # --- in the order of `run` -------------------------------------------------------------------

    def _may_start(self) -> None:
        """Find the checkpoint to resume from, if any; check the folder and the packages."""
        recipe = self.recipe
        require_startable(recipe)
        self.start = resume.find(recipe)
        self.in_place = self.start is not None and self.start.parent == self.folder
        for line in (*messages(recipe), precision_warning(recipe.precision())):
            if line is not None:
                self.run_log.say(line)
        if self.start is not None:
            self.saved = resume.load(self.start, recipe)
            self.result.resumed_from = self.saved.step
            for name, value in self.saved.carried.items():
                setattr(self.result, name, value)
            self.run_log.say(f"resuming from {self.start}")

    def _prepare(self, tokenizer: Any) -> Any:
        """The rows as samples, and those as sequences to train on."""
        recipe = self.recipe
        prepared = prepare(recipe, tokenizer, self.console, day=self.result.started[:10])
        if self.saved is not None and self.start is not None:
            resume.require_same_data(self.start, self.saved, prepared.fingerprint)
        self.sequences = training_sequences(prepared, recipe)
        # says now what does not go together
        try_schedule(recipe, arguments_for(recipe, self.sequences))
        self.result.data = data = dict(prepared.counts)
        if not recipe.streams():
            data["train_sequences"] = len(self.sequences)
        for line in (report.rows_message(data), *warnings(data)):
            self.run_log.say(line)
        require_reach(recipe, prepared, self.run_log.say)
        return prepared

    def _model(self, tokenizer: Any) -> Any:
        """The model with its adapters, seeded and checked."""
        recipe = self.recipe
        model = ready_model(recipe, tokenizer, self.run_log.say)
        trained, total = parameters(model)
        self.result.parameters = {"trained": trained, "total": total}
        self.result.dtype = str(model.dtype).removeprefix("torch.")
        self.result.loaded_rss_mb = report.rss_mb()
        self.run_log.say(
            f"model: {recipe.base_model}, {total / 1e6:,.1f}M parameters "
            f"({trained / 1e6:,.2f}M trained), {model.dtype} on {model.device}"
        )
        return model

    def _context(
        self, model: Any, tokenizer: Any, prepared: Any, interrupts: Interrupts
    ) -> Context:
        recipe = self.recipe
        meter = ThroughputMeter(
            flops=flops_per_token(model, typical_context(prepared, recipe)),
            peak=peak_flops(model.device, model.dtype),
        )
        sets = validation_batches(prepared, recipe, export.pad_token(tokenizer))
        for name, batches in sets.items():
            self.result.data[f"{name}_sequences"] = len(batches.packs)
        return Context(
            recipe, tokenizer, self.console, interrupts, meter,
            validation=sets, data=prepared.fingerprint, carried=self._carried,
        )  # fmt: skip

    def _carried(self) -> dict[str, Any]:
        """The figures that a resumed run cannot compute again."""
        names = ("val_loss_before", "sample", "started", "seconds")
        return {name: getattr(self.result, name) for name in names}

    def _before(self, model: Any, context: Context) -> None:
        """Answer and validate, unless the resumed run has done so; and optimize."""
        recipe = self.recipe
        if recipe.sample_prompt and self.result.sample is None:
            self.run_log.say(f"answering: {recipe.sample_prompt}")
            with self.run_log.timed("answer before"):
                text = export.answer(model, context.tokenizer, recipe.sample_prompt, recipe)
            self.result.sample = {"question": recipe.sample_prompt, "before": text}
            self.run_log.say(f"answer before training: {text}")
        if recipe.optimize:
            from ..compiler.pipeline import optimize

            optimize(model, codegen=recipe.codegen, memory=recipe.memory, strict=recipe.strict)
        if context.validation and self.result.val_loss_before is None:
            self.run_log.say("validating")
            with self.run_log.timed("validation before"):
                validated = validate(model, context.validation, self.run_log.say)
                self.result.val_loss_before = validated["eval_loss"]
            self.run_log.say(f"validation loss before: {self.result.val_loss_before:.3f}")

    def _clear(self) -> None:
        """Remove what an earlier run left, once the first step is complete.

        This cannot be undone, and much can still be refused before that, such as a memory budget
        that is too small for any plan. A NaN loss in the first step also leaves a batch and a
        report.
        """
        if not self._cleared:
            self._cleared = True
            output.clear_output(self.folder, self.in_place)

    def _train(self, trainer: FineTuner, interrupts: Interrupts) -> None:
        """Train, and save the result."""
        result = self.result
        result.steps_planned = trainer.args.max_steps
        with self.run_log.timed("training"), interrupts.deferring_signals():
            self._steps(trainer)
        result.steps = trainer.state.global_step
        optimizer = getattr(trainer.optimizer, "optimizer", None)  # what accelerate has wrapped
        if isinstance(optimizer, FlatOptimizer):
            self.run_log.say(f"optimizer: {optimizer.summary()}")
        if interrupts.signal is not None:
            if not result.steps:
                raise Stopped(interrupts.signal)
            result.signal = interrupts.signal
        self._clear()
        if result.steps:
            with self.run_log.timed("saving"), interrupts.deferring_signals():
                ending.save(trainer, result)
            if interrupts.signal is not None and result.signal is None:
                result.signal = interrupts.signal  # what is left to do is left undone
                if result.status == "finished":
                    result.status = "interrupted"
        if self.recipe.streams() and not self.recipe.dataloader_num_workers:
            result.data.update(self.sequences.counts)  # else other processes have counted
            self.run_log.say(report.rows_message(result.data))
        result.measure(trainer.context.meter, trainer.state.log_history)
        there = checkpoints(self.folder)
        result.checkpoint = str(there[-1]) if there else None

    def _steps(self, trainer: FineTuner) -> None:
        """Train until the last step, or until something ends it."""
        recipe, result = self.recipe, self.result
        if self.saved is not None and self.saved.step >= result.steps_planned:
            assert self.start is not None
            self.run_log.say("all steps are done; saving the result")
            trainer.load_checkpoint(self.start)
            return
        first = "; the first one compiles, which can take a minute" if recipe.optimize else ""
        done = self.saved.step if self.saved else 0
        self.run_log.say(f"training for {result.steps_planned - done} steps{first}")
        try:
            with resume.without_code(self.start):
                trainer.train(resume_from_checkpoint=str(self.start) if self.start else None)
            result.status = trainer.ended()
            result.reason = trainer.write_error
        except NonFiniteStepError as bad:
            result.status, result.reason = "nan", str(bad)
            self._clear()
            trainer.abandon()
            with self.run_log.guarded("saving the batch"):
                text = bad.save(self.folder, trainer.context.tokenizer)
                result.reason += f"; its rows are in {text}"
        except DataError:  # a row of a stream, which nobody had read before
            trainer.save_now()
            raise

    def _after(self, model: Any, context: Context) -> None:
        """Explain, validate, check the saved adapter, answer."""
        recipe, result = self.recipe, self.result
        if recipe.optimize:
            with self.run_log.guarded("explaining"):
                from ..compiler.pipeline import explain

                found = explain(model)
                result.optimize = found.to_dict()
                self.run_log.say(str(found))
        if result.status != "finished":
            return
        if context.validation:
            with self.run_log.guarded("validation after"):
                self.run_log.say("validating again")
                validated = validate(model, context.validation, self.run_log.say)
                result.val_loss_after = validated["eval_loss"]
        unchecked = export.uncheckable(model) if recipe.adapter else None
        if unchecked is not None:
            self.run_log.say(f"adapter check: left out, for {unchecked}")
        elif recipe.adapter:
            with self.run_log.guarded("adapter check"):
                one = [next(iter(self.sequences))]
                probe = training_batch(one, recipe, export.pad_token(context.tokenizer))
                model, check = export.check_adapter(model, recipe, self.folder, probe)
                result.adapter_check = asdict(check)
        if result.sample:
            with self.run_log.guarded("answer after"):
                result.sample["after"] = export.answer(
                    model, context.tokenizer, result.sample["question"], recipe
                )


def run(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Run ``recipe``; see ``fusewright.train.train``."""
    return TrainingRun(recipe, console or Terminal()).run()
