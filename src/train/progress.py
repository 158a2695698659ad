"""The progress of training in the terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from .meter import Meter
from .signals import Interrupts


class Watch(TrainerCallback):
    """Times the steps, shows them, and ends the loop when a signal came."""

    def __init__(self, meter: Meter, interrupts: Interrupts, console: Console, total: int) -> None:
        self.meter, self.interrupts, self.console, self.total = meter, interrupts, console, total
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
            speed_estimate_period=600,  # seconds: a step may take many
        )
        self.task: TaskID | None = None
        self.begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if self.console.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.total, loss="-", rate="-")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """End the loop when a signal came."""
        control.should_training_stop |= self.interrupts.signal is not None
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop the clock."""
        self.meter.seconds.append(time.perf_counter() - self.begun)
        if self.task is not None:
            rate = f"{self.meter.rate(self.meter.tokens, last=10):,.0f}"
            self.bar.update(self.task, completed=state.global_step, rate=rate)
        control.should_training_stop |= self.interrupts.signal is not None
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the loss."""
        logs = kwargs.get("logs") or {}
        step, every = state.global_step, max(1, self.total // 10)
        if "eval_loss" in logs:
            self.console.print(f"  step {step}: validation loss {logs['eval_loss']:.3f}")
        if "loss" not in logs:
            return
        loss = f"{float(logs['loss']):.3f}"
        if self.task is not None:
            self.bar.update(self.task, loss=loss)
        elif step == 1 or step % every == 0 or step == self.total:
            rate = self.meter.rate(self.meter.tokens, last=10)
            left = self.meter.median_step() * (self.total - step)
            self.console.print(
                f"  step {step}/{self.total}  loss {loss}  {rate:,.0f} tokens/s  ETA {left:.0f} s"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.bar.stop()
