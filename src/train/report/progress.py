"""The progress of training: a live bar in a terminal, lines of text elsewhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback

from ..processes.signals import Interrupts
from ..terminal import say
from .format import Smooth, change, duration, memory, rate
from .throughput import ThroughputMeter

RECENT = 10
"""Steps over which rates and the remaining time are averaged."""
QUIET = 600.0
"""Seconds after which a log gets a line, however long a tenth of the steps may take."""

Fields = list[tuple[int, str]]
"""``(importance, text)`` of figures from left to right; 0 is the highest."""

_COLUMNS = 80
"""Of a line in a log, so that no terminal wraps it."""


def _fitting(fields: Fields, room: int, between: str) -> str:
    """As many of the figures as there is room for, the least important ones left out first."""
    visible = list(fields)
    while len(visible) > 1 and len(between.join(text for _, text in visible)) > room:
        visible.remove(max(visible, key=lambda f: f[0]))
    return between.join(text for _, text in visible)


class MetricsLine:
    """The second line of the display: as many of its fields as the terminal has room for.

    Attributes:
        fields: the least important ones are left out first.
        interrupts: after a signal, a further line shows what happens now.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        self.fields: Fields = []
        self.interrupts = interrupts

    def update(self, fields: Fields) -> None:
        """Replace the fields."""
        self.fields = fields

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - 2  # for the ^C that a terminal echoes: it must not wrap
        yield Text(_fitting(self.fields, room, " · "), no_wrap=True, overflow="ellipsis")
        if self.interrupts.signal is not None:
            yield Text(Interrupts.STOPPING, style="bold yellow")


class _Bar(Progress):
    """Rich's progress bar with our line of figures below it."""

    def __init__(self, figures: MetricsLine, *columns: ProgressColumn, **options: Any) -> None:
        self.figures = figures  # first: rich renders once when it is set up
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterator[RenderableType]:
        if self.tasks:
            yield self.make_tasks_table(self.tasks)
            yield self.figures


class _Clock(ProgressColumn):
    """Time since the start of training, and time left; it ticks between the steps, too."""

    def __init__(self, left: Callable[[], str]) -> None:
        super().__init__(table_column=Column(no_wrap=True, justify="right"))
        self.left = left

    def render(self, task: Task) -> Text:
        return Text(duration(task.elapsed or 0.0) + self.left())


class ProgressCallback(TrainerCallback):
    """Shows how the steps go; it times none of them, and changes nothing.

    In a terminal: a bar with the remaining time, and below it the loss (the last one, and an
    average of the last twenty or so), the learning rate, trained tokens per second, the share of
    the device's peak, the memory and the epoch. Elsewhere: a line at the first step and at every
    tenth of all, or wherever a loss is logged. Validations and checkpoints have their own lines.
    Output and warnings of others appear above the bar. ``close`` releases the terminal.

    Args:
        interrupts: whose signals the bar shows.
        total: optimizer steps of the whole run.
        used: returns the memory in use, in MiB; None: it is not shown.
        every_log: a log gets a line for each loss that is logged, for the recipe says how often.
    """

    def __init__(
        self,
        meter: ThroughputMeter,
        interrupts: Interrupts,
        console: Console,
        total: int,
        used: Callable[[], float] | None = None,
        every_log: bool = False,
    ) -> None:
        self.every_log = every_log
        self.meter, self.interrupts, self.console, self.total = meter, interrupts, console, total
        self.used = used
        self.figures = MetricsLine(interrupts)
        self.smooth = Smooth()
        self.last = math.nan
        self.rate: float | None = None
        self.reward: float | None = None
        self.mib: float | None = None
        self.validated: dict[str, float] = {}
        self.bar: _Bar | None = None
        self.task: TaskID | None = None
        self.display = contextlib.ExitStack()
        self.printed = 0.0
        self.due = False
        self.step = 0

    # --- the terminal ----------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the bar as it is, and release the terminal."""
        self.display.close()
        self.bar = None

    def say(self, text: str) -> None:
        """Print a line; in a terminal, above the bar."""
        say(self.console, text)

    def _open(self, done: int) -> None:
        self.bar = _Bar(
            self.figures,
            TextColumn("training"),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(),
            _Clock(self._time_left),
            console=self.console,
            refresh_per_second=2,
            expand=True,
        )
        self.task = self.bar.add_task("training", total=self.total, completed=done)
        self.display.enter_context(self.bar)
        self.display.enter_context(self.interrupts.shown_elsewhere())

    def _show(self, state: Any) -> None:
        if self.bar is None or self.task is None:
            return
        self.figures.update(self._fields(state))
        self.bar.update(self.task, completed=self.step)

    def _time_left(self) -> str:
        return f", {duration(self._left(self.step))} left" if self._is_timed() else ""

    def _fields(self, state: Any) -> Fields:
        """The figures so far."""
        fields: Fields = []
        if self.meter.compiles:
            fields.append((0, "the first step takes longer than the others"))
        if self.reward is not None:
            fields.append((0, f"reward {self.reward:z.3f}"))
        if self.smooth.weight:
            fields.append((0, f"loss {self.last:z.3f}"))
        if self.smooth.weight and f"{self.last:z.3f}" != f"{self.smooth.value:z.3f}":
            fields.append((4, f"average {self.smooth.value:z.3f}"))
        if self.rate is not None:
            fields.append((3, f"lr {self.rate:.1e}"))
        if self._is_timed():
            trained = self.meter.rate(self.meter.trained, last=RECENT)
            fields.append((1, f"{rate(trained)} trained tokens/s"))
        share = self.meter.utilization(last=RECENT) if self._is_timed() else None
        if share is not None:
            fields.append((5, f"MFU {share:.0%}" if share >= 0.1 else f"MFU {share:.1%}"))
        if self.mib is not None:
            fields.append((2, memory(self.mib)))
        if state.epoch is not None and self.meter.seconds:
            fields.append((6, f"epoch {state.epoch:.2f}"))
        return fields

    def _is_timed(self) -> bool:
        """Whether a typical step was timed: not the first one of a process, which compiles."""
        return self.meter.tells or self.step >= self.total

    def _left(self, step: int) -> float:
        return self.meter.median_step(last=RECENT) * max(0, self.total - step)

    def _line(self, state: Any) -> None:
        self.due, self.printed = False, time.perf_counter()
        fields = [(0, f"  step {state.global_step}/{self.total}"), *self._fields(state)]
        if self._is_timed():
            fields.append((0, f"ETA {duration(self._left(state.global_step))}"))
        self.say(_fitting(fields, _COLUMNS, "  "))

    def saved(self, step: int) -> None:
        """Report a written checkpoint: Trainer's ``on_save`` comes after a failure, too."""
        self.say(f"  step {step}: saved checkpoint-{step}")

    # --- callbacks -------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the display."""
        self.printed = time.perf_counter()
        self.step = state.global_step
        if self.console.is_terminal and not self.console.quiet:
            self._open(state.global_step)
            self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, or print a line where one is due."""
        if self.used is not None:
            self.mib = self.used()
        step, interval = state.global_step, max(1, self.total // 10)
        self.step = step
        self._show(state)
        late = time.perf_counter() - self.printed > QUIET
        often = control.should_log if self.every_log else step % interval == 0
        self.due = self.bar is None and (step in (1, self.total) or often or late)
        if self.due and not control.should_log:  # else the line waits for this step's loss
            self._line(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the figures from the log."""
        logs = kwargs.get("logs") or {}
        judged = (
            f"eval_{(getattr(args, 'metric_for_best_model', None) or '').removeprefix('eval_')}"
        )
        for key, value in logs.items():
            whole = key.startswith("eval_") and key.endswith(("loss", "_reward"))
            if (whole or key == judged) and value is not None:
                figure = key.rpartition("_")[2] if whole else key.removeprefix("eval_")
                self._validation(state.global_step, key, figure, float(value))
        if "loss" not in logs:
            return
        self.last = float(logs["loss"])
        self.smooth.add(self.last)
        self.reward = logs.get("reward", self.reward)
        self.rate = logs.get("learning_rate", self.rate)
        self._show(state)
        if self.due:
            self._line(state)

    def _validation(self, step: int, key: str, figure: str, value: float) -> None:
        name = key.removeprefix("eval_").removesuffix(figure).strip("_")
        text = f"  step {step}: validation {figure}{f' of {name}' if name else ''} {value:z.3f}"
        if key in self.validated:
            text += f" ({change(self.validated[key], value)})"
        self.validated[key] = value
        self.say(text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the display."""
        self.close()
