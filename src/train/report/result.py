"""The figures of a run: ``run.json``, the summary on the console, and ``RunResult``."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...report import html_table
from ..output_files import write_atomically
from ..recipe.secret_values import hide, scrub
from ..terminal import say
from .environment import memory, peak_rss_mb
from .format import change, finite, loss_ends, rate, resumption
from .throughput import ThroughputMeter

Status = Literal["finished", "interrupted", "nan", "watchdog", "disk full"]
Figure = Literal["loss", "reward"]
_CARRIED = (
    "val_loss_before", "val_reward_before", "figures_before", "sample", "started", "seconds",
)  # fmt: skip
"""The figures that a resumed run cannot compute again."""


@dataclass(repr=False)
class RunResult:
    """The results of a run.

    Attributes:
        output_dir: the folder with the adapter (or model), ``loss.png`` and ``run.json``.
        status: how it ended. ``"interrupted"``: by a signal; ``"nan"``: a loss or a gradient was
            NaN or infinite; ``"watchdog"``: the loss stayed too high; ``"disk full"``: a checkpoint
            could not be written. The weights are those of the last complete step that was saved.
        signal: its number, of an interrupted run.
        reason: why it ended before the last step, in words.
        checkpoint: the last one, from which a run can resume, or None.
        resumed_from: the step of the checkpoint that it resumed from, or None.
        problems: failures after training, each with ``part`` and ``error``; they cost no weights.
        recipe: every key with the value that was used; secrets are hidden.
        data: the numbers of rows, samples, sequences and tokens, and of what was left out.
        parameters: the numbers of trained parameters, and of all.
        dtype: of the model's weights.
        stop_tokens: those that end an answer, where the base's generation settings lack one.
        steps: optimizer steps done.
        steps_planned: optimizer steps the recipe asks for.
        tokens: tokens that went through training, padding not counted.
        trained_tokens: those of them that have a label.
        tokens_per_s: of training, without the first step, also that of a resumed run.
        trained_tokens_per_s: the same for tokens with a label.
        first_step_s: seconds of the first step, which compiles.
        resumed_step_s: those of the first step after the run was resumed last, or None.
        median_step_s: seconds of the median step, the same left out.
        loss_first: training loss of the first logged step.
        loss_last: training loss of the last logged step.
        val_loss_before: validation loss per trained token before the first step.
        val_loss_after: the same after the last step.
        val_reward_before: mean reward of the completions of validation prompts before the first
            step, for methods that learn from rewards.
        val_reward_after: the same after the last step.
        figures_before: all figures of the validation before the first step, by their names
            (``eval_loss``, ``eval_rewards/accuracies``).
        figures_after: the same after the last step.
        best_step: the step of the checkpoint that was loaded at the end because it was the best
            one, where that is not the last step; or None.
        figure: the figure by which validations judge the run, ``loss`` or ``reward``.
        completions: some of those that were generated in training, first and last, each with
            ``step``, ``prompt``, ``completion``, ``rewards`` by name and ``advantage``.
        sample: ``question``, and the answers ``before`` and ``after``.
        sample_image: the ``name`` of the image that the question is about, and a ``thumbnail`` as a
            data URL.
        peak_rss_mb: largest resident memory of the process, in MiB.
        loaded_rss_mb: resident memory once the model was loaded, in MiB.
        peak_cuda_mb: largest GPU memory allocated, in MiB.
        ranks: of several processes, the peak memory of each, in MiB: ``rss_mb``, ``cuda_mb``.
        adapter_check: ``exact`` and ``optimized_difference``, see ``export.AdapterCheck``.
        optimize: the optimize report as data, or None when ``optimize: false``.
        audit: the findings about the training itself, as ``Audit.to_dict`` has them, or None when
            ``audit: false``.
        seconds: of each part of the run, those before it was resumed included.
        history: the logged entries. With ``step`` and ``epoch``: ``loss``, ``learning_rate``,
            ``grad_norm``, ``trained_tokens_per_s``, ``rss_mb`` (and ``cuda_mb``), ``time`` (seconds
            of training until then), and the figures of a method; or ``eval_loss`` (and
            ``eval_NAME_loss`` of several datasets) or ``eval_reward``, and a method's other figures
            with ``eval_`` before them.
        versions: of Python and the libraries.
        machine: processor, cores, GPU.
        started: date and time, UTC.
    """

    output_dir: Path
    recipe: dict[str, Any]
    status: Status = "finished"
    signal: int | None = None
    reason: str | None = None
    checkpoint: str | None = None
    resumed_from: int | None = None
    problems: list[dict[str, str]] = field(default_factory=list)
    data: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    dtype: str | None = None
    stop_tokens: list[int] = field(default_factory=list)
    steps: int = 0
    steps_planned: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    tokens_per_s: float = 0.0
    trained_tokens_per_s: float = 0.0
    first_step_s: float = 0.0
    resumed_step_s: float | None = None
    median_step_s: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    val_loss_before: float | None = None
    val_loss_after: float | None = None
    val_reward_before: float | None = None
    val_reward_after: float | None = None
    figures_before: dict[str, float] = field(default_factory=dict)
    figures_after: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    figure: Figure = "loss"
    completions: list[dict[str, Any]] = field(default_factory=list)
    sample: dict[str, str] | None = None
    sample_image: dict[str, str] | None = None
    peak_rss_mb: float = 0.0
    loaded_rss_mb: float = 0.0
    peak_cuda_mb: float | None = None
    ranks: list[dict[str, float]] = field(default_factory=list)
    adapter_check: dict[str, Any] | None = None
    optimize: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    started: str = ""

    def __post_init__(self) -> None:
        # here, and not where it is written: page and card are made of it as well
        self.recipe = hide(self.recipe)

    @property
    def exit_code(self) -> int:
        """The exit code of the command.

        0: finished. 128 + n: stopped by signal n. 1: it ended early by itself, or the saved adapter
        is not what was trained.
        """
        if self.signal is not None:
            return 128 + self.signal
        broken = self.adapter_check is not None and not self.adapter_check["exact"]
        return int(broken or self.status != "finished")

    def carried(self) -> dict[str, Any]:
        """The figures that a checkpoint keeps for a run that resumes from it."""
        figures = {name: getattr(self, name) for name in _CARRIED}
        return {**figures, "seconds": dict(self.seconds)}

    def resume(self, step: int, carried: dict[str, Any]) -> None:
        """Begin at a checkpoint's step, with its ``carried`` figures; unknown ones are ignored."""
        self.resumed_from = step
        for name in _CARRIED:
            setattr(self, name, carried.get(name, getattr(self, name)))

    def end(self, status: Status, reason: str | None = None) -> None:
        """Record how training ended, and for which reason."""
        self.status, self.reason = status, reason

    def interrupt(self, signal: int) -> None:
        """Record a signal: the rest of the run is skipped."""
        self.signal = signal
        if self.status == "finished":
            self.status = "interrupted"

    def measure(self, meter: ThroughputMeter, log: Sequence[dict[str, Any]]) -> None:
        """Take the figures of training from the meter and the trainer's log."""
        self.tokens, self.trained_tokens = sum(meter.tokens), sum(meter.trained)
        self.tokens_per_s = meter.rate(meter.tokens)
        self.trained_tokens_per_s = meter.rate(meter.trained)
        if meter.seconds:
            self.first_step_s, self.median_step_s = meter.seconds[0], meter.median_step()
            self.resumed_step_s = meter.resumed_step()
        validated = f"eval_{self.figure}"
        self.history = [entry for entry in log if "loss" in entry or validated in entry]
        losses = [entry["loss"] for entry in self.history if "loss" in entry]
        if losses:
            self.loss_first, self.loss_last = losses[0], losses[-1]

    def validated(self, when: Literal["before", "after"]) -> float | None:
        """The figure of a validation that judges the run, if there was one."""
        value: float | None = getattr(self, f"val_{self.figure}_{when}")
        return value

    def validate(self, when: Literal["before", "after"], figures: Mapping[str, float]) -> None:
        """Take that figure from a validation, and keep the others."""
        setattr(self, f"val_{self.figure}_{when}", figures[f"eval_{self.figure}"])
        others = {name: value for name, value in figures.items() if name.startswith("eval_")}
        setattr(self, f"figures_{when}", others)

    @property
    def judged(self) -> str:
        """The figure that decides which checkpoint is the best."""
        metric = self.recipe.get("metric_for_best_model") or self.figure
        return str(metric).removeprefix("eval_")

    def complete(self) -> None:
        """Take the figures of the end: both validations as entries, and the peak memory."""
        name = f"eval_{self.figure}"
        logged = {entry["step"] for entry in self.history if name in entry}
        for step, value, others in (
            (0, self.validated("before"), self.figures_before),
            (self.steps, self.validated("after"), self.figures_after),
        ):
            if value is not None and step not in logged:
                self.history.append({"step": step, **others, name: value})
        self.history.sort(key=lambda entry: entry["step"])
        self.peak_rss_mb = peak_rss_mb()
        if self.ranks:
            self.ranks[0] = memory()  # the others' are those at the end of training
        if torch.cuda.is_available():
            self.peak_cuda_mb = torch.cuda.max_memory_allocated() / 2**20

    def ending(self, adapter: bool) -> Iterator[str]:
        """The messages at the end of a run that ended early; ``adapter``: it trained one."""
        if self.status == "finished":
            if self.reason:
                yield f"\nEnded at step {self.steps} of {self.steps_planned}: {self.reason}."
            return
        whole = self.status == "interrupted" and 0 < self.steps_planned <= self.steps
        where = f"Stopped at step {self.steps} of {self.steps_planned}"
        if whole:
            where = f"All {self.steps} steps are done"
        yield f"\n{where}; {self._outcome(adapter)}"
        names = {1: "SIGHUP", 2: "Ctrl-C", 15: "SIGTERM"}
        by = names.get(self.signal or 0, f"signal {self.signal}")
        yield {
            "nan": f"NaN or infinite value: {self.reason}. No weight was changed by that step",
            "watchdog": "The loss stayed above loss_watchdog_threshold",
            "disk full": f"The last checkpoint could not be written: {self.reason}",
            "interrupted": f"Stopped by {by}" + whole * ", in what follows training",
        }[self.status] + "."
        if self.checkpoint and self.recipe.get("save_only_model"):
            yield f"{self.checkpoint} cannot be resumed from: save_only_model: true"
        elif self.checkpoint:
            does = "does the rest" if whole else "resumes from it"
            yield (
                f"{self.checkpoint} is complete: the same recipe {does}{resumption(self.recipe)}"
            )

    def _outcome(self, adapter: bool) -> str:
        kind = "adapter" if adapter else "model"
        if not self.steps:
            return "nothing was trained"
        if any(problem["part"] == "saving" for problem in self.problems):
            return f"the {kind} of that step could not be saved"
        return f"the {kind} of that step is in {self.output_dir}"

    def write(self) -> None:
        """Write ``run.json``, whole or not at all."""
        content = {**asdict(self), "output_dir": str(self.output_dir)}
        text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.output_dir / "run.json", text + "\n")

    def __repr__(self) -> str:
        loss = "" if self.loss_last is None else f", loss {self.loss_last:z.3f}"
        steps = f"{self.steps} of {self.steps_planned} steps"
        return f"<RunResult: {self.status}, {steps}{loss}, {self.output_dir}>"

    def _repr_html_(self) -> str:
        """What a notebook shows of it: the summary that the command ends with."""
        return html_table([("status", self.status), *self._rows()], head=False)

    def print(self, console: Console) -> None:
        """Print the summary."""
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, value in self._rows():
            table.add_row(name, Text(value))
        console.print()
        console.print(table)

    def _rows(self) -> list[tuple[str, str]]:
        rows = {"steps": f"{self.steps} of {self.steps_planned}"}
        if self.best_step is not None:
            rows["steps"] += f"; the best checkpoint, of step {self.best_step}, was loaded"
        for name in dict.fromkeys((self.figure, self.judged)):
            both = self.figures_before, self.figures_after
            before, after = (figures.get(f"eval_{name}") for figures in both)
            if before is not None and after is not None:
                text = f"{before:z.3f} → {after:z.3f} ({change(before, after)})"
                rows[f"validation {name}"] = text
        rewards = [entry["reward"] for entry in self.history if entry.get("reward") is not None]
        if self.figure == "reward" and rewards:
            rows["training reward"] = f"{rewards[0]:z.3f} → {rewards[-1]:z.3f}"
        ends = loss_ends(entry["loss"] for entry in self.history if "loss" in entry)
        if ends is not None:
            first, last, of = ends
            rows["training loss"] = f"{first:z.3f} → {last:z.3f} ({of})"
        if self.tokens_per_s:  # of a run that resumed at its end there are no steps
            rows["speed"] = (
                f"{rate(self.tokens_per_s)} tokens/s ({rate(self.trained_tokens_per_s)} trained), "
                f"first step {self.first_step_s:.1f} s"
            )
            if self.resumed_step_s is not None:
                rows["speed"] += f", first after resuming {self.resumed_step_s:.1f} s"
        peaks = f"{self.peak_rss_mb:,.0f} MiB peak ({self.loaded_rss_mb:,.0f} MiB once loaded)"
        if self.peak_cuda_mb is not None:
            peaks += f", GPU {self.peak_cuda_mb:,.0f} MiB peak"
        rows["memory"] = peaks
        if self.ranks:
            each = [f"{rank.get('cuda_mb', rank['rss_mb']):,.0f}" for rank in self.ranks]
            rows["memory by rank"] = f"{', '.join(each)} MiB peak"
        if self.adapter_check is not None:
            same = "plain PEFT gives the same logits"
            broken = "BROKEN: plain PEFT gives other logits than the trained model"
            rows["saved adapter"] = same if self.adapter_check["exact"] else broken
        if self.sample_image is not None:
            rows["image"] = self.sample_image["name"]
        rows |= self.sample or {}
        whole = "" if self.resumed_from is None else " before and after resuming"
        rows["time"] = f"{sum(self.seconds.values()):.0f} s{whole}: " + self._times()
        rows["results"] = str(self.output_dir)
        return list(rows.items())

    def _times(self) -> str:
        return ", ".join(f"{name} {s:.0f}" for name, s in self.seconds.items() if s >= 0.5)


# --- the log -------------------------------------------------------------------------------------


class RunLog:
    """Prints, and records times and failures in the result."""

    def __init__(self, result: RunResult, console: Console) -> None:
        self.result, self.console = result, console
        self._parts: list[str] = []  # those that have begun: time counts for the innermost
        self._counted = 0.0  # until when it was counted

    def carried(self) -> dict[str, Any]:
        """The figures that a checkpoint keeps for a run that resumes from it."""
        self._count()
        return self.result.carried()

    def _count(self) -> None:
        before, self._counted = self._counted, time.perf_counter()
        for part in self._parts[-1:]:
            seconds = self.result.seconds.get(part, 0.0)
            self.result.seconds[part] = seconds + self._counted - before

    def say(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to those of ``part``, without those of parts in it."""
        self._count()
        self._parts.append(part)
        try:
            yield
        except Exception as error:
            error.add_note(f"at {part}")  # for the last line, if nobody foresaw it
            raise
        finally:
            self._count()
            self._parts.pop()

    @contextlib.contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """After training: a failure in the block is reported and recorded; the run continues."""
        try:
            with self.timed(part):
                yield
        except Exception as error:  # a signal is none of these
            why = scrub(f"{type(error).__name__}: {error}")
            self.result.problems.append({"part": part, "error": why})
            self.say(f"{part} failed; the run continues without it: {why}")
