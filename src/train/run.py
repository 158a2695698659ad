"""One training run, from the recipe to the report."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import DataError, RewardError
from ..kernels import choice
from ..optim.flat import FlatOptimizer
from . import finish
from .checkpoint import output_folder, resume
from .checkpoint.files import checkpoints
from .checkpoint.lock import held
from .checkpoint.rng_state import same_draws
from .checkpoint.write import require_shared
from .data.chat.stops import unknown_stops
from .data.prepare import prepare_once
from .data.readers.limits import require_contrast, warnings
from .methods.task import task_of
from .model.adapters import parameters
from .model.load import quiet
from .model.positions import require_reach
from .model.precision import half_autocast, precision_warning
from .model.processor import load_processing
from .preflight import require_startable
from .processes.mesh import is_sharded, processes_message
from .processes.signals import Interrupts, Stopped
from .processes.world import World, joined
from .processing import Processing
from .recipe.recipe import Recipe
from .recipe.status import messages
from .report.environment import machine, memory, rss_mb, versions
from .report.format import parameter_counts, rows_message
from .report.result import RunLog, RunResult
from .requirements import notices, require_known_names, tracking
from .terminal import Terminal
from .trainer.build import make_context
from .trainer.context import Context
from .trainer.engine import EngineMixin
from .trainer.evaluation import validate
from .trainer.ready import optimize_model, ready_model
from .trainer.schedule import try_schedule
from .trainer.watchdog import NonFiniteStepError


class TrainingRun:
    """One run of one recipe. ``run`` does its parts in the order in which they are below.

    - everything that can be wrong with the recipe and the rows is found before weights are loaded;
    - validation before and after, and one question answered before and after;
    - the model is optimized in place, trained by transformers' Trainer, and restored;
    - the saved adapter is loaded again by plain PEFT and compared;
    - it resumes from a checkpoint bit for bit, as if it had not been stopped;
    - Ctrl-C, SIGTERM, SIGHUP, a full disk and a NaN loss end it in order, with the weights of the
      last complete step and a checkpoint to resume from;
    - once something was trained, no later failure can lose it.

    Who owns what:

    - ``TrainingRun``: the order, and ``RunResult``, which it fills;
    - ``EngineMixin``: the loop, and why it ended; ``Checkpoints``: which of them is the best;
    - ``FlowCallback``, between its steps: it ends the loop when a signal came;
    - ``Interrupts``: that signal; ``ThroughputMeter``: the clock and the counts of the steps;
    - ``finish``: the last validation, where the loop has not made it;
    - ``ProgressCallback``: nothing; it shows what the others know.

    Of several processes, each does all of it with its share of the batches, and rank 0 alone
    prints and writes.

    The recipe is checked, with absolute paths.
    """

    def __init__(self, recipe: Recipe, console: Console, world: World | None = None) -> None:
        self.recipe, self.world = recipe, world or World()
        self.console = console
        self.folder = Path(recipe.output_dir)
        self.task = task_of(recipe)
        self.sequences: Any = ()
        self.resumed: resume.Resumed | None = None
        self._cleared = False  # whether the folder is this run's alone
        self.result = RunResult(
            output_dir=self.folder,
            recipe=recipe.recorded(),
            versions=versions(),
            machine=machine(),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            figure=self.task.figure,
        )
        self.run_log = RunLog(self.result, console)

    def run(self) -> RunResult:
        """Do all of it, in order.

        Raises:
            RecipeError: the recipe cannot be run.
            DataError: a dataset cannot be used.
            Stopped: a signal came before the first step was done, or a second one came.
        """
        if not self.world.main:
            return self._run()
        output_folder.require_run_folder(self.folder)
        with held(self.folder, self.run_log.say):
            return self._run()

    def _run(self) -> RunResult:
        self._may_start()
        with Interrupts(self.world) as interrupts, quiet(), tracking(self.recipe):
            with self.run_log.timed("data"):
                processing = load_processing(self.recipe)
                prepared = self._prepare(processing)
            with self.run_log.timed("load"):
                model = self._model(processing.tokenizer)
            context = self._context(model, processing, prepared, interrupts)
            self._before(model, context)
            saved = self.resumed.saved if self.resumed else None
            trainer = self.task.trainer(context, model, self.sequences, saved, self._clear)
            with interrupts.deferring_signals():  # without a gap: what is trained must be saved
                self._train(trainer, interrupts)
                self._save(trainer, interrupts)
            try:
                self._measure(trainer)
                finish.examine(trainer, self.result, self.run_log)
            except Stopped as stopped:  # what was trained has been saved
                self.result.interrupt(stopped.signal)
            self._finish(trainer, interrupts)
        return self.result

    def _finish(self, trainer: EngineMixin, interrupts: Interrupts) -> None:
        """Let rank 0 write and print the summary."""
        with interrupts.deferring_signals(interrupts.WRITING):
            if self.world.main:
                finish.write(self.result, self.run_log)
            self.world.wait_for_main()  # a signal goes to all, and must not end the others before
            interrupts.agree()
        if self.world.main:
            finish.publish(trainer, self.result, self.run_log, interrupts)
            self.result.print(self.console)
            for line in self.result.ending(self.recipe.adapter is not None):
                self.run_log.say(line)
            if self.result.status == "finished":
                finish.hand_over(self.result, self.recipe, self.run_log)

    # --- in the order of `run` -------------------------------------------------------------------

    def _may_start(self) -> None:
        """Check the folder and the packages; find the checkpoint to resume from, if any."""
        recipe, world = self.recipe, self.world
        world.share(lambda: require_startable(recipe, world.batch_ranks))
        require_shared(world, self.folder)
        text = precision_warning(recipe.precision()), processes_message(recipe.strategy(), world)
        require_known_names(recipe)
        others = notices(recipe)
        for line in filter(None, (world.unread, *messages(recipe), *others, *text)):
            self.run_log.say(line)
        checkpoint = world.share(lambda: str(resume.find(recipe) or ""))
        start = Path(checkpoint) if checkpoint else None
        if start is not None:
            saved = resume.load(start, recipe, world.batch_ranks)
            choice.adopt(saved.choices)
            self.resumed = resume.Resumed(start, saved)
            self.result.resume(saved.step, saved.carried)
            self.run_log.say(f"resuming from {start}")

    def _prepare(self, processing: Processing) -> Any:
        """The rows as samples, and those as sequences to train on."""
        recipe, world = self.recipe, self.world
        self.result.sample_image = world.share(lambda: finish.asked_about(recipe, processing))
        day = world.share(lambda: self.result.started[:10])
        prepared = prepare_once(recipe, processing, self.console, day, world)
        if self.resumed is not None:
            resume.require_same_data(self.resumed, prepared.fingerprint)
        self.sequences = self.task.sequences(prepared)
        # say now what does not go together
        args = self.task.arguments(self.sequences, world)
        try_schedule(recipe, args)
        self.task.require_figure(args, prepared.validation)
        self.result.data = data = dict(prepared.counts)
        if not recipe.streams():
            data["train_sequences"] = len(self.sequences)
        require_contrast(data, prepared.first)
        for line in (rows_message(data), *warnings(data, prepared.first)):
            self.run_log.say(line)
        require_reach(recipe, prepared, self.run_log.say)
        return prepared

    def _model(self, tokenizer: Any) -> Any:
        recipe, result = self.recipe, self.result
        on_cpu = is_sharded(recipe.strategy(), self.world)
        model = ready_model(recipe, tokenizer, self.run_log.say, on_cpu)
        trained, total = parameters(model)
        result.parameters = {"trained": trained, "total": total}
        variables = recipe.chat_template_kwargs or {}
        result.stop_tokens = unknown_stops(model, tokenizer, variables)
        result.dtype, result.loaded_rss_mb = str(model.dtype).removeprefix("torch."), rss_mb()
        sizes = parameter_counts(trained, total, recipe.adapter is not None)
        self.run_log.say(f"model: {recipe.base_model}, {result.dtype} on {model.device}")
        self.run_log.say(f"parameters: {sizes}")
        return model

    def _context(
        self, model: Any, processing: Processing, prepared: Any, interrupts: Interrupts
    ) -> Context:
        context = make_context(
            self.task, model, processing, prepared, interrupts, self.console, self.run_log.carried
        )
        context.timed = self.run_log.timed
        for name, batches in context.validation.items():
            self.result.data[f"{name}_sequences"] = len(batches.packs)
        return context

    def _before(self, model: Any, context: Context) -> None:
        """Optimize; answer and validate, once the model is as its processes have it."""
        recipe = self.recipe
        shards = is_sharded(recipe.strategy(), self.world)
        if not shards:
            finish.answer_before(model, context, self.result, self.run_log)
        optimize_model(model, recipe)
        result, log = self.result, self.run_log
        validates = functools.partial(finish.validate_before, context, result, log)
        if not shards and self.task.validates_first:
            loss = self.task.loss
            with half_autocast(recipe.precision(), model.device):
                validates(
                    lambda: validate(model, context.validation, context.say, self.world, loss)
                )
            return

        def on_ready(trainer: EngineMixin) -> None:
            if shards:
                with same_draws(recipe.seed):
                    finish.answer_before(trainer.model, context, result, log)
            validates(trainer.figures)

        context.on_ready = on_ready

    def _train(self, trainer: EngineMixin, interrupts: Interrupts) -> None:
        result = self.result
        result.steps_planned = trainer.args.max_steps
        with self.run_log.timed("training"):
            self._steps(trainer)
        interrupts.agree()  # on a signal that came after the last step
        result.steps = trainer.state.global_step
        if trainer.audit is not None and trainer.audit.audit is not None:
            result.audit = trainer.audit.audit.to_dict()
        optimizer = getattr(trainer.optimizer, "optimizer", None)  # what accelerate has wrapped
        if isinstance(optimizer, FlatOptimizer):
            self.run_log.say(f"optimizer: {optimizer.summary()}")
        if interrupts.signal is not None:
            if not result.steps:
                raise Stopped(interrupts.signal)
            result.interrupt(interrupts.signal)

    def _steps(self, trainer: EngineMixin) -> None:
        recipe, result, resumed = self.recipe, self.result, self.resumed
        done = resumed.saved.step if resumed else 0
        if resumed is not None and (over := trainer.nothing_left(resumed.folder)):
            self.run_log.say(f"{over}; saving the result")
            trainer.load_checkpoint(resumed.folder)
            result.end(trainer.ended(), trainer.reason())
            return
        remaining = result.steps_planned - done
        self.run_log.say(f"training for {remaining} step{'s' * (remaining != 1)}{_first(recipe)}")
        start = resumed.folder if resumed else None
        try:
            with resume.without_code(start):
                trainer.train(resume_from_checkpoint=str(start) if start else None)
            result.end(trainer.ended(), trainer.reason())
        except NonFiniteStepError as error:
            bad = error.of_all(self.world)
            result.end("nan", str(bad))
            self._clear()
            trainer.abandon()
            if self.world.main:
                finish.save_batch(bad, trainer, result, self.run_log)
        except (DataError, RewardError):  # a row of a stream, or a function that has failed
            trainer.checkpoints.save_now()
            raise

    def _clear(self) -> None:
        """Remove what an earlier run left, once the first step is complete."""
        # This cannot be undone, and much can still be refused before that, such as too small a
        # memory budget. A NaN loss in the first step also leaves a batch and a report.
        if not self._cleared:
            self._cleared = True
            here = self.resumed is not None and self.resumed.folder.parent == self.folder
            self.world.share(lambda: output_folder.clear_output(self.folder, here))

    def _save(self, trainer: EngineMixin, interrupts: Interrupts) -> None:
        self._clear()
        if not self.result.steps:
            return
        with self.run_log.timed("saving"):
            finish.save(trainer, self.result)
        interrupts.agree()  # on a signal that came meanwhile
        if interrupts.signal is not None and self.result.signal is None:
            self.result.interrupt(interrupts.signal)

    def _measure(self, trainer: EngineMixin) -> None:
        result = self.result
        if self.recipe.streams() and not self.recipe.dataloader_num_workers:
            result.data.update(self.sequences.counts)  # else other processes have counted
            self.run_log.say(rows_message(result.data))
        result.measure(trainer.context.meter, trainer.state.log_history)
        result.ranks = self.world.gather(memory()) if self.world.several else []
        result.checkpoint = next(map(str, checkpoints(self.folder)[-1:]), None)


def _first(recipe: Recipe) -> str:
    """What the first step of a process takes longer for; empty: nothing."""
    if not recipe.optimize:
        return ""
    audited = ", and is audited" if recipe.audit else ""
    return f"; the first one compiles{audited}, which can take minutes"


def run(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Run ``recipe``, as ``fusewright.train.train`` does."""
    with joined(recipe.ddp_timeout) as world:
        strategy = recipe.strategy()
        strategy.require_world(world.size)
        world.share_batches(strategy.group)
        if console is None:
            console = Terminal(quiet=not world.main)
        return TrainingRun(recipe, console, world).run()
