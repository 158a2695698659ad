"""``fusewright chat``: a conversation with a run, in the terminal or over a pipe."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TextIO

from ...errors import ModelError
from ..model.chat_prompt import ChatPrompt, Message, with_system
from ..model.load import quiet
from ..printable import shown
from .generation import Sampling, TextGenerator
from .load_run import load_run
from .run_folder import RunFolder

HELP = """\
/reset           clear the conversation
/system TEXT     set the system prompt; without TEXT: remove it
/save FILE       append the conversation to FILE as a row of training data (JSONL)
/exit            quit (or Ctrl-D)
Ctrl-C           stop an answer"""


class ChatSession:
    """A conversation.

    Args:
        writer: who answers.
        system: the system text, or None.
        stdin: where the user's lines come from. In a terminal they can be edited.
        stdout: where answers go.
    """

    def __init__(
        self,
        writer: TextGenerator,
        system: str | None = None,
        stdin: TextIO | None = None,
        stdout: TextIO | None = None,
    ) -> None:
        self.writer, self.system = writer, system
        self.stdin, self.stdout = stdin or sys.stdin, stdout or sys.stdout
        self.terminal = self.stdin.isatty() and self.stdout.isatty()
        self.turns: list[Message] = []

    def run(self) -> None:
        """Answer line by line until the end of the input, or ``/exit``."""
        if self.terminal:
            with contextlib.suppress(ImportError):  # not on every system; then without history
                import readline  # noqa: F401  # 2026-11-25: importing it is what makes input() use it
            self._say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.")
        if not self.writer.chats:
            self._say(
                "The model has no chat template: each line is continued on its own, without a "
                "history."
            )
        while True:
            try:
                line = self._line()
                if line is None or line.split()[:1] == ["/exit"]:
                    return
                self._react(line)
            except KeyboardInterrupt:  # nothing to stop: say how to leave
                if not self.terminal:
                    raise
                self._say("\n/exit or Ctrl-D ends.")

    def _react(self, line: str) -> None:
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        except ModelError as error:
            self._say(f"fusewright: {error}")

    def _line(self) -> str | None:
        """The next line, or None at the end."""
        if self.terminal:
            try:
                return input("> ").strip()
            except EOFError:
                self._say("")
                return None
        line = self.stdin.readline()
        return line.strip() if line else None

    def _answer(self, question: str) -> None:
        """Stream the answer; what Ctrl-C left of it stays in the conversation."""
        asked = [*self.turns, {"role": "user", "content": question}]
        prompt = self._fitting(asked)
        said: list[str] = []
        try:
            with contextlib.closing(self.writer.stream(prompt)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    self.stdout.write(shown(piece) if self.terminal else piece)
                    self.stdout.flush()
        except KeyboardInterrupt:
            self._say(" [stopped]", end="")
        self._say("")
        if self.writer.chats:
            answer = "".join(said).strip()
            self.turns += [asked[-1], {"role": "assistant", "content": answer}]

    def _fitting(self, asked: list[Message]) -> list[int]:
        """The tokens of the conversation; its oldest turns go where it has grown too long."""
        forgotten = 0
        while True:
            try:
                prompt = self.writer.prompt(with_system(asked[forgotten:], self.system))
            except ModelError:
                if forgotten + 2 >= len(asked):
                    raise
            else:
                break
            forgotten += 2
        if forgotten:
            del self.turns[:forgotten]
            self._say(f"[the oldest {forgotten // 2} turns no longer fit and are dropped]")
        return prompt

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.turns = []
            self._say("[conversation cleared]")
        elif name == "/system":
            self._set_system(rest or None)
        elif name == "/save" and rest:
            self._save(Path(rest).expanduser())
        elif name == "/help":
            self._say(HELP)
        else:
            self._say(f"{name} is not a command, or its argument is missing:\n{HELP}")

    def _set_system(self, text: str | None) -> None:
        """Take ``text`` if the chat template can say it."""
        trial: list[Message] = [{"role": "user", "content": "hello"}]
        if self.writer.chats:
            self.writer.prompt(with_system(trial, text))
        self.system = text
        self._say("[set]" if text else "[no system prompt]")

    def _save(self, path: Path) -> None:
        if not self.turns:
            self._say("[nothing to save yet]")
            return
        row = {"messages": with_system(self.turns, self.system)}
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            self._say(f"[{path} cannot be written: {error.strerror}]")
            return
        self._say(f"[appended to {path}]")

    def _say(self, text: str, end: str = "\n") -> None:
        self.stdout.write(shown(text) + end)
        self.stdout.flush()


def chat(run: RunFolder, sampling: Sampling, system: str | None = None) -> None:
    """Chat with the model of ``run`` on standard input and output.

    Args:
        run: from ``open_run``.
        sampling: how tokens are chosen.
        system: the system text; None: the one that the run was trained with, if any; empty: none.

    Raises:
        ModelError: the run cannot be loaded.
        RecipeError: the base of the run cannot be loaded.
    """
    trained = ChatPrompt.of(run.recipe)
    with quiet():
        writer = TextGenerator(*load_run(run), sampling, trained.variables)
        ChatSession(writer, trained.system if system is None else system).run()
