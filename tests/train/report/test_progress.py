"""The display of a training's progress, in terminals of several widths and in a log."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from fusewright.train.processes.signals import Interrupts
from fusewright.train.report.format import (
    Smooth,
    change,
    duration,
    memory,
    millions,
    resumption,
    rows_message,
)
from fusewright.train.report.progress import ProgressCallback
from fusewright.train.report.result import RunResult
from fusewright.train.report.throughput import ThroughputMeter


class Screen:
    """A terminal (or a log) that the callback writes to, and the trainer's side of the talk."""

    def __init__(
        self, width: int, terminal: bool, total: int = 20, every: int = 1, written: bool = False
    ) -> None:
        self.out = io.StringIO()
        console = Console(file=self.out, width=width, force_terminal=terminal, color_system=None)
        self.meter = ThroughputMeter(flops=2e6, peak=1e9)
        self.interrupts = Interrupts()
        self.display = ProgressCallback(
            self.meter, self.interrupts, console, total, lambda: 3300.0, written
        )
        self.every = every
        self.state = SimpleNamespace(global_step=0, epoch=0.0)
        self.control = SimpleNamespace(should_training_stop=False, should_log=False)

    def tell(self, event: str, **more: Any) -> None:
        getattr(self.display, event)(None, self.state, self.control, **more)

    def step(self, loss: float = 1.5) -> None:
        self.meter.start_step()
        self.meter.add(120, 90)
        self.meter.end_step()
        self.meter.seconds[-1] = 0.5
        self.state.global_step += 1
        self.state.epoch += 0.1
        self.control.should_log = self.state.global_step % self.every == 0
        self.tell("on_step_end")
        if self.control.should_log:
            self.tell("on_log", logs={"loss": loss, "learning_rate": 2e-4, "grad_norm": 1.0})

    def frame(self) -> list[str]:
        """What the bar looks like now."""
        assert self.display.bar is not None
        self.out.truncate(self.out.seek(0))
        self.display.console.print(self.display.bar.get_renderable())
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.out.getvalue()).replace("\r", "")
        return [line.rstrip() for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("width", [30, 50, 80, 100, 140])
def test_the_bar_fits_the_terminal(width: int) -> None:
    screen = Screen(width, terminal=True)
    with closing(screen.display):
        screen.tell("on_train_begin")
        for loss in (2.0, 1.0, 1.5):
            screen.step(loss)
        bar, figures = screen.frame()[:2]
    assert len(bar) <= width
    assert len(figures) <= width - 2  # a ^C has room behind it
    assert "3/20" in bar
    assert "loss 1.500" in figures
    shown = {  # (0.81 x 2.0 + 0.9 x 1.0 + 1.5) / 2.71 = 1.483
        30: [],
        50: ["trained tokens/s", "3.2 GiB"],
        80: ["average 1.48", "lr 2.0e-04", "trained tokens/s", "3.2 GiB"],
        100: ["average 1.48", "lr 2.0e-04", "MFU ", "epoch 0.30"],
        140: ["average 1.483 · ", "lr 2.0e-04", "MFU ", "epoch 0.30"],
    }[width]
    assert [words for words in shown if words not in figures] == []
    if width >= 80:
        assert " left" in bar


def test_the_figures_are_right() -> None:
    screen = Screen(140, terminal=True)
    with closing(screen.display):
        screen.tell("on_train_begin")
        screen.step()
        screen.step()
        screen.tell("on_log", logs={"loss": 1.5})
        figures = screen.frame()[1]
    # 90 trained tokens in half a second; 240 tokens/s x 2e6 operations of 1e9
    assert "180 trained tokens/s" in figures
    assert "MFU 48%" in figures


def test_what_others_say_stands_above_the_bar() -> None:
    screen = Screen(100, terminal=True)
    with closing(screen.display):
        screen.tell("on_train_begin")
        screen.step()
        print("mind the gap", file=sys.stderr)  # as the warnings module does
        print("from somewhere else")
        screen.tell("on_log", logs={"eval_loss": 1.25})
        screen.tell("on_log", logs={"eval_loss": 1.0})
        screen.tell("on_log", logs={"eval_test_1_loss": 0.5})
        screen.display.saved(1)
        text = screen.out.getvalue()
    for words in (
        "mind the gap",
        "from somewhere else",
        "step 1: validation loss 1.250\n",
        "step 1: validation loss 1.000 (-0.250)\n",
        "step 1: validation loss of test_1 0.500\n",
        "step 1: saved checkpoint-1\n",
    ):
        assert words in text


def test_the_terminal_is_given_back_after_an_error() -> None:
    def fail() -> None:
        with closing(screen.display):
            screen.tell("on_train_begin")
            assert sys.stdout is not before
            raise RuntimeError

    screen, before = Screen(100, terminal=True), sys.stdout
    with pytest.raises(RuntimeError):
        fail()
    assert sys.stdout is before
    assert screen.out.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_signal_is_told_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    screen = Screen(100, terminal=True)
    with screen.interrupts, closing(screen.display):
        screen.tell("on_train_begin")
        screen.step()
        assert not screen.control.should_training_stop
        with screen.interrupts.deferring_signals():
            os.kill(os.getpid(), signal.SIGINT)
        assert Interrupts.STOPPING in screen.frame()  # at once, not when the step has ended
    assert capfd.readouterr().err == ""  # nothing was written over the display


def test_the_display_neither_times_nor_ends_the_loop() -> None:
    for terminal in (True, False):
        screen = Screen(100, terminal)
        with screen.interrupts, closing(screen.display):
            screen.tell("on_train_begin")
            screen.step()
            with screen.interrupts.deferring_signals():
                os.kill(os.getpid(), signal.SIGINT)
            for event in ("on_step_begin", "on_substep_end", "on_step_end", "on_epoch_end"):
                screen.tell(event)
        assert screen.meter.seconds == [0.5]
        assert not screen.control.should_training_stop


def test_without_a_display_the_signal_writes_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    screen = Screen(100, terminal=True)
    with closing(screen.display):
        screen.tell("on_train_begin")
    with screen.interrupts, screen.interrupts.deferring_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert Interrupts.STOPPING in capfd.readouterr().err


def test_a_worker_of_a_data_loader_does_not_repeat_the_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches it, too: a fork has the handler of the process that it comes from."""
    here, interrupts = os.getpid(), Interrupts()
    with interrupts, interrupts.deferring_signals():
        monkeypatch.setattr("os.getpid", lambda: here + 1)
        os.kill(here, signal.SIGINT)
        assert interrupts.signal == signal.SIGINT
    assert capfd.readouterr().err == ""


def lines(screen: Screen, steps: int) -> list[str]:
    with closing(screen.display):
        screen.tell("on_train_begin")
        for _ in range(steps):
            screen.step()
    return screen.out.getvalue().splitlines()


def test_a_log_gets_the_first_line_and_every_tenth() -> None:
    said = lines(Screen(80, terminal=False, total=30), 30)
    assert [int(re.findall(r"step (\d+)/30", line)[0]) for line in said] == [1, *range(3, 31, 3)]
    assert all("\x1b" not in line for line in said)
    for words in ("loss 1.500", "lr 2.0e-04", "180 trained tokens/s", "3.2 GiB", "ETA 0 s"):
        assert words in said[-1]
    assert max(map(len, said)) <= 80  # a terminal that shows the log wraps none


def test_a_log_gets_a_line_for_each_loss_where_the_recipe_says_how_often() -> None:
    for every, steps in ((1, [*range(1, 41)]), (7, [1, 7, 14, 21, 28, 35, 40])):
        screen = Screen(80, terminal=False, total=40, every=every, written=True)
        said = lines(screen, 40)
        assert [int(re.findall(r"step (\d+)/40", line)[0]) for line in said] == steps
        assert all("loss 1.500" in line for line in said[1:])


def test_a_log_gets_its_lines_when_losses_are_logged_at_other_steps() -> None:
    said = lines(Screen(80, terminal=False, total=20, every=7), 20)
    steps = [int(re.findall(r"step (\d+)/20", line)[0]) for line in said]
    assert steps == [1, *range(2, 21, 2)]
    assert "loss" not in said[0]  # none was logged yet
    assert "loss 1.500" in said[-1]


def test_a_quiet_console_stays_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    progress = ProgressCallback(
        ThroughputMeter(), Interrupts(), Console(quiet=True, force_terminal=True), 3
    )
    state, control = SimpleNamespace(global_step=1, epoch=0.1), SimpleNamespace(should_log=True)
    control.should_training_stop = False
    with closing(progress):
        progress.on_train_begin(None, state, control)
        progress.on_step_begin(None, state, control)
        progress.on_step_end(None, state, control)
        progress.on_log(None, state, control, logs={"loss": 1.0})
    assert capfd.readouterr() == ("", "")


def test_a_loss_that_is_not_a_number_is_shown_and_not_averaged() -> None:
    smooth = Smooth()
    for value in (2.0, float("nan"), float("inf"), 2.0):
        smooth.add(value)
    assert smooth.value == pytest.approx(2.0)
    screen = Screen(140, terminal=True)
    with closing(screen.display):
        screen.tell("on_train_begin")
        screen.step(2.0)
        screen.step(float("nan"))
        assert "loss nan · average 2.000" in screen.frame()[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (61, "1:01"), (3605, "1:00:05"), (200000, "2d 07h"),
     (float("nan"), "-"), (float("inf"), "-")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stopped_run_says_what_its_recipe_needs_to_resume() -> None:
    needs = " with resume_from_checkpoint: true"
    for recipe, said in (
        ({}, needs), ({"auto_resume_from_checkpoints": True}, ""),
        ({"resume_from_checkpoint": True}, ""), ({"resume_from_checkpoint": "out/a"}, needs),
        ({"auto_resume_from_checkpoints": True, "resume_from_checkpoint": "out/a"}, needs),
        ({"auto_resume_from_checkpoints": True, "overwrite_output_dir": True},
         " without overwrite_output_dir"),
    ):  # fmt: skip
        assert resumption(recipe) == said
        result = RunResult(
            Path("out"), recipe, status="interrupted", signal=2, steps=1, checkpoint="c"
        )
        line = list(result.ending(False))[-1]
        assert line == f"c is complete: the same recipe resumes from it{said}"
    result = RunResult(Path("out"), {"save_only_model": True}, status="interrupted", checkpoint="c")
    assert list(result.ending(False))[-1] == "c cannot be resumed from: save_only_model: true"


def test_a_run_that_is_stopped_after_its_last_step_was_trained() -> None:
    """What is left is an answer or a validation, not training."""
    result = RunResult(
        Path("out"), {"resume_from_checkpoint": True}, status="interrupted", signal=2, steps=4,
        steps_planned=4, checkpoint="c",
    )  # fmt: skip
    assert list(result.ending(True)) == [
        "\nAll 4 steps are done; the adapter of that step is in out",
        "Stopped by Ctrl-C, in what follows training.",
        "c is complete: the same recipe does the rest",
    ]


def test_one_batch_more_or_less_is_no_training_loss() -> None:
    result = RunResult(Path("out"), {})
    result.history = [{"loss": loss} for loss in (9.0, 1.0, *[4.0] * 16, 2.0, 0.0)]
    rows = dict(result._rows())
    assert rows["training loss"] == "5.000 → 1.000 (means of 2 logged values)"


def test_a_resumed_run_says_how_long_each_process_compiled() -> None:
    meter = ThroughputMeter([9.0, 1.0, 7.0, 1.0], [1] * 4, [1] * 4, [0, 2])
    result = RunResult(Path("out"), {}, resumed_from=2, seconds={"data": 1.0, "training": 19.0})
    result.measure(meter, [])
    rows = dict(result._rows())
    assert rows["speed"].endswith("first step 9.0 s, first after resuming 7.0 s")
    assert rows["time"] == "20 s before and after resuming: data 1, training 19"


def test_no_time_is_told_from_steps_that_compile() -> None:
    """Of a run that resumes behind its first step, both steps have compiled."""
    screen = Screen(200, terminal=False, total=10)
    screen.meter.load_state_dict({"seconds": [90.0], "tokens": [120], "trained": [90]})
    screen.state.global_step = 1
    screen.tell("on_train_begin")
    for number, told in ((2, False), (3, True)):
        screen.step()
        line = screen.out.getvalue().splitlines()[-1]
        assert line.lstrip().startswith(f"step {number}/10")
        assert ("ETA" in line, "trained tokens/s" in line) == (told, told)


def test_a_result_fits_a_notebook() -> None:
    recipe = dict.fromkeys((f"key_{i}" for i in range(500)), None)
    result = RunResult(Path("out & more"), recipe, steps=3, steps_planned=4, loss_first=2.0)
    result.loss_last = 1.25
    result.history = [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.25}]
    assert repr(result) == "<RunResult: finished, 3 of 4 steps, loss 1.250, out & more>"
    table = ElementTree.fromstring(result._repr_html_())  # well formed
    rows = {row[0].text: row[1].text for row in table}
    assert rows["status"] == "finished"
    said = "2.000 → 1.250 (first and last logged value)"
    assert (rows["training loss"], rows["results"]) == (said, "out & more")
    assert "key_1" not in result._repr_html_()


def test_prompts_are_not_called_trained() -> None:
    counts = {"rows": 3, "train_sequences": 3, "train_tokens": 9, "train_trained_tokens": 0}
    assert rows_message(counts) == "data: 3 rows, 0 for validation; 3 sequences, 9 tokens"
    counts["train_trained_tokens"] = 5
    assert rows_message(counts).endswith("9 tokens, 5 trained")


def test_a_loss_that_is_almost_zero_has_no_sign() -> None:
    screen = Screen(140, terminal=False)
    screen.step(loss=-0.0001)
    assert "loss 0.000" in screen.out.getvalue()


def test_amounts() -> None:
    assert (memory(870.4), memory(3300)) == ("870 MiB", "3.2 GiB")
    assert change(3.5484, 2.5486) == "-0.999"  # of 3.548 and 2.549, as they are shown
    assert (millions(870), millions(4884480), millions(7.24e9)) == ("870", "4.88M", "7.24B")


def test_rates_and_the_time_left_leave_the_first_step_out() -> None:
    log, bar = Screen(100, terminal=False, total=20), Screen(100, terminal=True)
    for screen in (log, bar):
        screen.tell("on_train_begin")
        screen.step()
    assert "step 1/20" in log.out.getvalue()
    for text in (log.out.getvalue(), " ".join(bar.frame())):
        assert not [w for w in ("ETA", "left", "tokens/s", "MFU") if w in text]
    for screen in (log, bar):
        screen.step()
    assert "trained tokens/s" in log.out.getvalue()
    assert "ETA" in log.out.getvalue()
    assert " left" in " ".join(bar.frame())
    bar.display.close()


@pytest.mark.parametrize(("quiet", "lines"), [(0.0, 4), (3600.0, 0)])
def test_a_long_validation_says_how_far_it_is(
    quiet: float, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.train.trainer import evaluation as validation

    class Model:
        training, device = True, "cpu"

        def train(self, mode: bool = True) -> None:
            self.training = mode

        def eval(self) -> None:
            self.train(False)

        def __call__(self, **batch: torch.Tensor) -> Any:
            assert not self.training
            return SimpleNamespace(loss=torch.tensor(float(batch["labels"][0, 0])))

    monkeypatch.setattr(validation, "QUIET", quiet)
    rows = [{"labels": torch.full((1, 3), n)} for n in range(5)]
    model, said = Model(), []
    found = validation.validate(model, {"one": rows[:3], "two": rows[3:]}, said.append)
    assert found == {"eval_loss": 2.0, "eval_one_loss": 1.0, "eval_two_loss": 3.5}
    assert said == [f"  validated {n} of 5 batches" for n in range(1, 1 + lines)]
    assert model.training
