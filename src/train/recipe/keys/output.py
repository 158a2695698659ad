"""The keys of what comes out: the folder, checkpoints, validation, and the hub."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from .base import METHOD, VALIDATION, Float, Int, Keys, key, not_applicable


def _no(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare no as false


Interval = Annotated[Literal["no", "steps", "epoch", "best"], BeforeValidator(_no)]


Metrics = Literal["perplexity", "sacrebleu", "comet", "ter", "chrf"]


_NO_ROWS = "needs val_set_size or test_datasets: there are no rows to validate on"
_NO_PERPLEXITY = "validation has the figures of the method, without perplexity"


_UPLOADS = "not with {key}, which uploads a checkpoint at the step that saves it"


class DynamicCheckpointKeys(Keys):
    """``dynamic_checkpoint``: a checkpoint whenever a file appears."""

    enabled: bool = False
    """Look for the file."""

    check_interval: Int = key(10, gt=0)
    """Steps between two looks."""

    trigger_file_path: str | None = None
    """The name of the file in ``output_dir``; it is removed once the checkpoint is asked for.
    Unset: ``axolotl_checkpoint.save``."""


class OutputKeys(Keys):
    """What is saved, validated and logged, and when."""

    resumable = True

    output_dir: str = "./model-out"
    """Folder of the results, relative to the current folder: a new one, an empty one, or that of an
    earlier run."""

    overwrite_output_dir: bool = False
    """Replace the run in ``output_dir``; without this, an existing run is an error."""

    resume_from_checkpoint: str | bool | None = None
    """A folder ``checkpoint-N`` to resume from, in the current folder, next to the recipe or in
    ``output_dir``; true: the last one in ``output_dir``. With more ``max_steps`` or ``num_epochs``
    it is trained further. Unset: start from the beginning."""

    auto_resume_from_checkpoints: bool = False
    """Resume from the last checkpoint in ``output_dir``, if there is one."""

    # --- checkpoints -----------------------------------------------------------------------------

    save_strategy: Interval | None = None
    """When checkpoints are made: ``no``, by ``steps``, after each ``epoch``, or when a validation
    is the ``best``. Unset: ``steps`` if ``save_steps`` or ``saves_per_epoch`` is set, else
    ``no``."""

    save_steps: Int | Float | None = key(gt=0)
    """Optimizer steps between two checkpoints; below 1: as a fraction of all steps. Unset: none,
    only the result is saved."""

    saves_per_epoch: Int | None = key(
        gt=0,
        excludes={
            "save_steps": "set this or save_steps, not both (--saves_per_epoch null unsets it)"
        },
    )
    """Checkpoints per epoch. Unset: see ``save_steps``."""

    save_total_limit: Int | None = key(gt=0)
    """Checkpoints that are kept. Unset: all."""

    save_only_model: bool = False
    """Save no optimizer state; such a checkpoint cannot be resumed from."""

    save_first_step: bool = False
    """Make a checkpoint after the first step, to see that it works."""

    async_save: bool = key(
        False,
        excludes={
            "relora": "not with {key}, whose checkpoints have the sum of all adapters",
            "wandb_log_model: checkpoint or hf_mlflow_log_artifacts": _UPLOADS,
        },
    )
    """Copy what a checkpoint has to host memory, and write it while the next steps run. It takes
    that memory (``fusewright plan`` counts it), and one process."""

    dynamic_checkpoint: DynamicCheckpointKeys | None = not_applicable(
        "what it holds has a status of its own"
    )
    """Make a checkpoint whenever a file appears. Unset: no."""

    # --- validation ------------------------------------------------------------------------------

    eval_strategy: Interval | None = key(aliases=["evaluation_strategy"])
    """When validation is done: ``no``, by ``steps``, or after each ``epoch``. Unset: ``steps`` if
    ``eval_steps`` or ``evals_per_epoch`` is set; before and after training anyway."""

    eval_steps: Int | Float | None = key(gt=0, needs={"val_set_size or test_datasets": _NO_ROWS})
    """Optimizer steps between two validations; below 1: as a fraction of all steps. Unset: before
    the first and after the last step."""

    evals_per_epoch: Int | None = key(ge=0, excludes=["eval_steps"], read_with=VALIDATION)
    """Validations per epoch. Unset: see ``eval_steps``."""

    eval_delay: Float | None = key(ge=0)
    """Steps or epochs (as ``eval_strategy``) before the first validation. Unset: none."""

    eval_on_start: bool | None = key(read_with=VALIDATION)
    """Validate before the first step. Unset: yes."""

    load_best_model_at_end: bool = key(False, read_with=VALIDATION)
    """Load the best checkpoint at the end."""

    metric_for_best_model: str | None = None
    """The figure that decides which checkpoint is the best. Unset: ``eval_loss``, and
    ``eval_reward`` where completions are judged."""

    greater_is_better: bool | None = None
    """Whether higher is better. Unset: not for losses, perplexities, divergences, and
    shares of completions that are cut off or rewarded alike."""

    eval_max_new_tokens: Int | None = not_applicable(
        "only eval_table_size reads it", aliases=["eval_table_max_new_tokens"]
    )
    """Longest prediction in that table, in tokens. Unset: 128."""

    do_causal_lm_eval: bool | None = key(
        needs={"eval_causal_lm_metrics": "needs eval_causal_lm_metrics: [perplexity]"},
        excludes={
            "kd_trainer": "validation has the loss of distillation, which has no "
            "perplexity: leave it out"
        },
        unread_with={METHOD: _NO_PERPLEXITY},
    )
    """Compute ``eval_causal_lm_metrics`` at each validation. Unset: no."""

    eval_causal_lm_metrics: list[Metrics] | None = key(
        values={
            name: ("not yet available", "evaluate generated text with a tool of its own")
            for name in ("sacrebleu", "comet", "ter", "chrf")
        },
        read_with=["do_causal_lm_eval"],
        unread_with={METHOD: _NO_PERPLEXITY},
    )
    """Which: ``perplexity`` is that of the trained tokens. Unset: all that Axolotl has, of which
    only this one can be had: it must be set."""

    # --- log -------------------------------------------------------------------------------------

    logging_steps: Int | Float = key(1, gt=0)
    """Optimizer steps between two entries of the loss curve; below 1: as a fraction of all
    steps. If it is written, a log file gets a line for each; else at every tenth of the steps."""

    logging_first_step: bool = True
    """Log the first step, too."""

    log_on_each_node: bool = True
    """Let every machine of a run log, not only the first."""

    logging_nan_inf_filter: bool = False
    """Log the mean of the losses so far in place of a NaN or infinite one. Such a step ends the
    run anyway, except where loss scaling (``fp16``) skips it."""

    # --- hub -------------------------------------------------------------------------------------

    hub_model_id: str | None = None
    """The model on the hub that the result is pushed to. Unset: it is not pushed."""

    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None = None
    """When it is pushed. Unset: ``every_save``."""

    hub_revision: str | None = None
    """The branch that is pushed to. Unset: the main branch."""

    hub_private_repo: bool | None = None
    """Make the model private when it is new. Unset: the account's default."""

    hub_always_push: bool = False
    """Push even while the push before is not done."""
