"""Conversations over a pipe and in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusewright.train.inference.generate import ChatSession, Sampling, TextGenerator

from ..commands import fusewright
from ..conftest import CHATML, make_tokenizer
from .test_generate import OTHER, Scripted

WORD = make_tokenizer().decode([OTHER, OTHER])


class Recording(Scripted):
    """Keeps the prompts that it is given."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(script)
        self.prompts: list[str] = []

    def generate(self, input_ids: Any, **options: Any) -> Any:
        self.prompts.append(make_tokenizer().decode(input_ids[0]))
        return super().generate(input_ids, **options)


def conversation(
    *lines: str, template: str | None = CHATML, system: str | None = None
) -> tuple[list[str], str]:
    """The prompts that a model gets for ``lines``, and what is printed."""
    model, out = Recording([OTHER, OTHER, 2]), io.StringIO()
    writer = TextGenerator(model, make_tokenizer(template), Sampling(8))
    ChatSession(writer, system, io.StringIO("".join(f"{line}\n" for line in lines)), out).run()
    return model.prompts, out.getvalue()


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


ASKS = "<|im_start|>assistant\n"


def test_every_turn_sees_the_ones_before() -> None:
    prompts, said = conversation("one", "two")
    first = turn("user", "one")
    assert prompts == [first + ASKS, first + turn("assistant", WORD) + turn("user", "two") + ASKS]
    assert said == f"{WORD}\n{WORD}\n"


def test_reset_forgets_and_keeps_the_system_text() -> None:
    prompts, said = conversation("one", "/reset", "two", system="S")
    assert prompts[1] == turn("system", "S") + turn("user", "two") + ASKS
    assert "[conversation cleared]" in said


def test_system_is_set_and_taken_away() -> None:
    prompts, _ = conversation("/system Be terse.", "one", "/reset", "/system", "two")
    assert prompts == [
        turn("system", "Be terse.") + turn("user", "one") + ASKS,
        turn("user", "two") + ASKS,
    ]


def test_a_system_text_that_the_template_refuses_is_not_kept() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    prompts, said = conversation("/system S", "one", template=strict + CHATML)
    assert "fusewright: the chat template refuses this conversation: no system" in said
    assert prompts == [turn("user", "one") + ASKS]


def test_save_appends_a_row_that_can_be_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    _, said = conversation(
        f"/save {file}", "one", f"/save {file}", "/reset", "two", f"/save {file}", system="S"
    )
    assert said.startswith("[nothing to save yet]")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": question},
                {"role": "assistant", "content": WORD},
            ]
        }
        for question in ("one", "two")
    ]
    _, said = conversation("one", f"/save {tmp_path}")
    assert "cannot be written: Is a directory" in said


def test_exit_and_what_is_no_command() -> None:
    prompts, said = conversation("/nonsense", "/save", "", "/exit", "one")
    assert prompts == []
    assert "/nonsense is not a command" in said
    assert "/save is not a command, or its argument is missing" in said
    assert "/reset " in said
    assert conversation("/quit", "one")[0] == []


def test_the_oldest_turns_go_when_there_is_no_room() -> None:
    long = "x" * 150
    prompts, said = conversation(*[f"{i}{long}" for i in range(4)])
    assert "0xxx" in prompts[0]
    assert "0xxx" not in prompts[3]
    assert "2xxx" in prompts[3]
    assert "[the oldest 1 turns no longer fit and are dropped]" in said


def test_a_line_that_alone_is_too_long_is_said_so_and_forgotten() -> None:
    prompts, said = conversation("x" * 600, "one")
    assert "accepts at most 512" in said
    assert prompts == [turn("user", "one") + ASKS]


def test_without_a_chat_template_each_line_is_continued() -> None:
    prompts, said = conversation("one", "two", template=None)
    assert prompts == ["one", "two"]
    assert said.startswith("The model has no chat template")


def test_over_a_pipe(trained: Path) -> None:
    lines = "What is 3?\n/reset\nWhat is 7?\n"
    done = fusewright("chat", trained, "--max_new_tokens", "6", stdin=lines)
    assert done.exit_code == 0, done.output
    alone = [
        fusewright("generate", trained, question, "--max_new_tokens", "6").stdout.strip()
        for question in ("What is 3?", "What is 7?")
    ]
    assert [line.strip() for line in done.stdout.splitlines()] == [
        alone[0],
        "[conversation cleared]",
        alone[1],
    ]


class Terminal:
    """``fusewright chat`` in a pseudo-terminal."""

    def __init__(self, *arguments: str | Path) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "fusewright.cli", "chat", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment,
            preexec_fn=lambda: self._lead(slave),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    @staticmethod
    def _lead(slave: int) -> None:
        """Make the pseudo-terminal the one whose Ctrl-C the process gets."""
        import fcntl
        import termios

        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it is ignored where tests run in background
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, poke: str = "", seconds: float = 120) -> str:
        """What was printed until ``pattern``, which is taken out of what was seen.

        ``poke`` is typed again and again: Python misses a Ctrl-C in the instant between its prompt
        and its waiting for a key, and a terminal forgets what was typed before a Ctrl-C that comes
        late.
        """
        end = time.monotonic() + seconds
        poked = 0.0
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if poke and time.monotonic() > poked + 2:
                self.type(poke)
                poked = time.monotonic()
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self.master, 4096).decode(errors="replace")
                except OSError:  # the other end was closed
                    assert re.search(pattern, self.seen), f"ended after {self.seen!r}"
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before


@pytest.fixture
def terminal(trained: Path) -> Iterator[Terminal]:
    # almost never the same token twice, so that an answer is long
    started = Terminal(trained, "--max_new_tokens", "450", "--temperature", "50")
    yield started
    started.process.kill()
    started.process.wait()
    os.close(started.master)


@pytest.mark.long
def test_ctrl_c_stops_an_answer_and_not_the_program(terminal: Terminal) -> None:
    assert "Ctrl-C stops an answer" in terminal.wait_for("> ")
    terminal.type("What is 3?\n")
    terminal.wait_for(r"What is 3\?\r\n.")  # echo, and the answer begins
    terminal.wait_for(r"\[stopped\]\r\n> ", poke="\x03")
    terminal.wait_for(r"/exit or Ctrl-D ends\.\r\n> ", poke="\x03")  # there is nothing to stop
    terminal.wait_for(r"\[conversation cleared\]\r\n> ", poke="/reset\n")
    terminal.type("/exit\n")
    assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.seen


@pytest.mark.long
def test_ctrl_d_ends(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
