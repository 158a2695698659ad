"""Questions to the model before and after training, and saving the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..compiler.bypass import A_CACHE
from ..report import Report
from .checkpoint import save_model
from .checkpoint.files import CheckpointWriteError
from .checkpoint.rng_state import same_draws
from .consent import Consent
from .data.images.picture import thumbnail
from .data.images.reading import sample_picture
from .inference import generate
from .processes.signals import Interrupts
from .processing import Processing
from .recipe.recipe import Recipe
from .report.result import RunLog, RunResult
from .trainer.context import Context
from .trainer.engine import EngineMixin
from .trainer.watchdog import NonFiniteStepError


def asked_about(recipe: Recipe, processing: Processing) -> dict[str, str] | None:
    """The image that the recipe's question is about, for the report; None: there is none.

    Raises a RecipeError or a DataError if the model reads none, or it cannot be read.
    """
    picture = sample_picture(recipe, processing)
    if picture is None:
        return None
    return {"name": Path(picture.path).name, "thumbnail": thumbnail(picture, "sample_image")}


def answer_before(model: Any, context: Context, result: RunResult, run_log: RunLog) -> None:
    """Answer the recipe's question, unless the resumed run has done so."""
    recipe, question = context.recipe, context.recipe.sample_prompt
    if not question or result.sample is not None:
        return

    def answer() -> str:
        return generate.answer(model, context.tokenizer, question, recipe, context.answering)

    run_log.say(f"answering: {question}")
    with run_log.timed("answer before"):
        # sharded weights are fetched by all processes
        text = answer() if context.on_ready else context.world.share(answer)
    result.sample = {"question": question, "before": text}
    run_log.say(f"answer before training: {text}")


def validate_before(
    context: Context, result: RunResult, run_log: RunLog, figures: Callable[[], dict[str, float]]
) -> None:
    """Validate by ``figures``, unless the resumed run has, or the recipe does not want it."""
    if context.recipe.eval_on_start is False:
        return
    if not context.validation or result.validated("before") is not None:
        return
    run_log.say("validating")
    with run_log.timed("validation before"):
        result.validate("before", figures())
    for name in dict.fromkeys((result.figure, result.judged)):
        if (value := result.figures_before.get(f"eval_{name}")) is not None:
            run_log.say(f"validation {name} before: {value:z.3f}")


def save(trainer: EngineMixin, result: RunResult) -> None:
    """Write what was trained; if the disk is full, the result says so."""
    world = trainer.context.world
    state = trainer.sharding.whole_state()  # which all processes bring together
    tokenizer, folder = trainer.context.tokenizer, result.output_dir

    def write() -> str | None:
        try:
            save_model.save_whole(trainer.model, tokenizer, folder, state, trainer.context.recipe)
        except CheckpointWriteError as error:
            return str(error)
        return None

    failed = world.share(write)
    if failed is not None:
        result.end("disk full", failed)
        result.problems.append({"part": "saving", "error": failed})


def save_batch(
    bad: NonFiniteStepError, trainer: EngineMixin, result: RunResult, run_log: RunLog
) -> None:
    """Save the rows of a step that ended training, for inspection."""
    with run_log.guarded("saving the batch"):
        text = bad.save(result.output_dir, trainer.context.tokenizer)
        result.end("nan", f"{bad}; its rows are in {text}")


def examine(trainer: EngineMixin, result: RunResult, run_log: RunLog) -> None:
    """Explain the model; if training finished, validate, check the saved adapter, and answer.

    If a part fails, the others still run. Of several processes, all take part in what needs sharded
    weights; the rest is rank 0's.
    """
    model: Any = trainer.model
    context, world = trainer.context, trainer.context.world
    recipe = context.recipe
    result.completions = trainer.objective.completions
    if recipe.optimize:
        report: Report | None = None
        with run_log.guarded("explaining"):
            from ..compiler.pipeline import explain

            report = explain(model)
            result.optimize = report.to_dict()
            run_log.say(str(report) if recipe.verbose else summary(report))
        if world.several:
            with run_log.guarded("comparing the ranks"):  # also with one that could not explain
                sites = None if report is None else statuses(report)
                for line in differences(world.gather(sites)):
                    run_log.say(line)
    if result.status != "finished":
        return
    result.best_step = best_step(trainer)
    if result.best_step is not None:
        run_log.say(f"the best checkpoint, of step {result.best_step}, was loaded")
    if context.validation:
        with run_log.guarded("validation after"):
            figures = None if recipe.load_best_model_at_end else _validated_last(result)
            if figures is None:
                run_log.say("validating again")
                figures = trainer.figures()
            result.validate("after", figures)
    if trainer.sharding.shards:
        if result.sample:
            with run_log.guarded("answer after"), same_draws(recipe.seed):
                _answer(model, context, result, run_log)
        if recipe.adapter:
            run_log.say(
                "adapter check skipped: the weights of the base are sharded; fusewright eval "
                f"{result.output_dir} loads the adapter as anybody would"
            )
        return
    if world.main:
        _examine_alone(trainer, result, run_log)


def best_step(trainer: EngineMixin) -> int | None:
    """The step of the checkpoint that the loop has loaded at its end; None: it kept the last."""
    best = trainer.state.best_model_checkpoint
    if not trainer.args.load_best_model_at_end or best is None:
        return None
    step = int(Path(best).name.rpartition("-")[2])
    return None if step == trainer.state.global_step else step


def _examine_alone(trainer: EngineMixin, result: RunResult, run_log: RunLog) -> None:
    """Check the saved adapter, and answer."""
    model: Any = trainer.model
    context, recipe = trainer.context, trainer.context.recipe
    unchecked = save_model.uncheckable(model) if recipe.adapter else None
    if unchecked is not None:
        run_log.say(f"adapter check skipped: {unchecked}")
    elif recipe.adapter:
        with run_log.guarded("adapter check"):
            run_log.say("checking the saved adapter")
            model, check = save_model.check_adapter(
                model, recipe, result.output_dir, trainer.objective.probe(),
                trainer.accelerator.autocast(),
            )  # fmt: skip
            result.adapter_check = asdict(check)
    if result.sample:
        with run_log.guarded("answer after"):
            _answer(model, context, result, run_log)


def _answer(model: Any, context: Context, result: RunResult, run_log: RunLog) -> None:
    assert result.sample is not None
    question = result.sample["question"]
    run_log.say("answering again")
    answered = generate.answer(
        model, context.tokenizer, question, context.recipe, context.answering
    )
    result.sample["after"] = answered


Statuses = dict[str, str]
"""``module: rule`` -> the status of each of its sites, with the reason where it has one."""

_SHOWN = 3
"""Most sites that are named for a rank."""


def statuses(report: Report) -> Statuses:
    """The sites without their figures, which should be the same on all ranks."""
    result: Statuses = {}
    for s in report.sites:
        name, text = f"{s.module}: {s.rule}", f"{s.status} ({s.reason})" if s.reason else s.status
        result[name] = f"{result[name]}, {text}" if name in result else text
    return result


def differences(ranks: Sequence[Statuses | None]) -> list[str]:
    """What differs from rank 0, a line for each rank; None: its sites could not be explained."""
    lines, first = [], ranks[0]
    for rank, sites_of_rank in enumerate(ranks):
        if sites_of_rank is None or first is None:
            lines += [f"rank {rank} cannot say what was rewritten"] if sites_of_rank is None else []
            continue
        differing = [
            k for k in sorted(sites_of_rank | first) if sites_of_rank.get(k) != first.get(k)
        ]
        sites = [
            f"{k} {sites_of_rank.get(k, 'not found')} in place of {first.get(k, 'not found')}"
            for k in differing[:_SHOWN]
        ]
        more = f"; and at {len(differing) - _SHOWN} more places" if differing[_SHOWN:] else ""
        if sites:
            lines.append(f"rank {rank} has other rewrites than rank 0: {'; '.join(sites)}{more}")
    return lines


def _validated_last(result: RunResult) -> dict[str, float] | None:
    validations = {h["step"]: h for h in result.history if f"eval_{result.figure}" in h}
    return validations.get(result.steps)


def summary(report: Report) -> str:
    """The optimize report in a line."""
    # calls with a cache are those that answer a prompt: training itself makes none
    others = [b for b in report.bypasses if not b.faster and b.reason != A_CACHE]
    number = len(report.gaps()) + len(others)
    left = f"; {number} left as before: report.html says why" if number else ""
    return f"optimized: {report.headline()}{left} (--verbose: the whole table)"


def write(result: RunResult, run_log: RunLog) -> None:
    """Write the summary files of a run: the plot, the page, the model card, and ``run.json``.

    If one cannot be written, the others still are.
    """
    from .report import model_card as card
    from .report import page

    folder = result.output_dir
    result.complete()
    with run_log.guarded("plot"):
        save_model.plot(result.history, folder / "loss.png", result.figure)
    with run_log.guarded("report page"):
        page.write(result, folder)
    with run_log.guarded("model card"):
        card.write(result, folder)
    with run_log.guarded("run.json"):
        result.write()


def hand_over(result: RunResult, recipe: Recipe, run_log: RunLog) -> None:
    """Say how vLLM serves what was trained, if that writes texts."""
    from .serve import vllm_line

    with run_log.guarded("the command for vLLM"):
        line = vllm_line(result.output_dir, Consent(recipe.trust_remote_code))
        if line is not None:
            run_log.say(line)


def publish(
    trainer: EngineMixin, result: RunResult, run_log: RunLog, interrupts: Interrupts
) -> None:
    """Upload what is there, if the recipe wants that, and record the outcome in ``run.json``."""
    if not (trainer.args.push_to_hub and result.steps):
        return
    with run_log.guarded("push to the hub"):
        if interrupts.signal is not None and result.signal is None:
            raise RuntimeError("a signal came while the last files were written")
        _upload(trainer)
    with run_log.guarded("run.json"):
        result.write()


def _upload(trainer: EngineMixin) -> None:
    """Upload the run's folder, without checkpoints, to the hub."""
    from huggingface_hub import upload_folder

    upload_folder(
        repo_id=str(trainer.hub_model_id), folder_path=str(trainer.args.output_dir),
        revision=trainer.args.hub_revision, token=trainer.args.hub_token,
        ignore_patterns=["checkpoint-*", ".*"], commit_message="End of training",
    )  # fmt: skip
