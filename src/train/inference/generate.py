"""``fusewright generate``: answers to one prompt, or to a file of them."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ...errors import DataError, ModelError, RecipeError
from ..data.chat.stops import render_chat, stop_tokens
from ..json_text import BadJsonError, parse_json
from ..model.load import quiet
from ..model.precision import half_autocast
from ..model.tokenizer import ChatPrompt, Message, pad_token, with_system
from ..printable import odd_character, shown, shown_json
from ..recipe.recipe import Recipe
from ..terminal import announce
from .load_run import load_run
from .run_folder import RunFolder


def generate(
    run: RunFolder,
    conversations: Sequence[list[Message]],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    as_json: bool = False,
    out: TextIO | None = None,
) -> None:
    """Answer ``conversations`` with the model of ``run`` and print the answers, in order.

    Each conversation ends with what the model shall answer. With a temperature every batch begins
    from the seed of ``sampling``. ``as_json`` prints one object per line, with ``messages``,
    ``answer``, ``tokens``, ``finish``.

    Raises:
        ModelError: the run cannot be loaded, or a conversation cannot be rendered.
        RecipeError: the base of the run cannot be loaded.
    """
    out = out or sys.stdout
    with quiet():
        writer = TextGenerator(*load_run(run), sampling, ChatPrompt.of(run.recipe).variables)
        prompts = [writer.prompt(messages) for messages in conversations]
        if len(prompts) == 1 and not as_json:
            _stream(writer, prompts[0], out)
            return
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            announce(f"answering prompts {begin + 1} to {begin + len(batch)} of {len(prompts)}")
            answers = writer.answers(batch)
            for messages, answer in zip(conversations[begin:], answers, strict=False):
                _print(messages, answer, as_json, out)


def _stream(writer: TextGenerator, prompt: list[int], out: TextIO) -> None:
    with contextlib.closing(writer.stream(prompt)) as pieces:
        for piece in _stripped(pieces):
            out.write(shown(piece) if out.isatty() else piece)
            out.flush()
    out.write("\n")
    out.flush()


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """``pieces`` without the white space at the beginning and the end of their text."""
    pending = None
    for piece in pieces:
        text = piece.lstrip() if pending is None else pending + piece
        if not text:
            continue
        visible = text.rstrip()
        pending = text[len(visible) :]
        if visible:
            yield visible


def _print(messages: list[Message], answer: Answer, as_json: bool, out: TextIO) -> None:
    if as_json:
        entry = asdict(answer)
        row = {"messages": messages, "answer": entry.pop("text"), **entry}
        plain = not (getattr(out, "encoding", None) or "utf-8").lower().startswith("utf")
        out.write(shown_json(json.dumps(row, ensure_ascii=plain)) + "\n")
    else:
        text = f"> {messages[-1]['content']}\n{answer.text}\n\n"
        out.write(shown(text) if out.isatty() else text)
    out.flush()


# --- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: None or 0 takes the likeliest token each time; otherwise tokens are drawn.
        top_p: draw only from the likeliest tokens that have this probability together.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature and (self.top_p is not None or self.top_k is not None):
            raise RecipeError("top_p and top_k need a temperature: without one, decoding is greedy")


@dataclass(frozen=True)
class Answer:
    """An answer of the model.

    Attributes:
        text: without special tokens.
        tokens: their number, the one that ends the answer included.
        finish: ``"stop"`` when the model ended it, ``"length"`` when the limit did.
    """

    text: str
    tokens: int
    finish: str


class TextGenerator:
    """A model that answers; the model is not changed.

    Args:
        tokenizer: its tokenizer. Without a chat template prompts are continued as they are.
        variables: what the chat template reads besides the messages.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.variables = dict(variables or {})
        self.chats = bool(getattr(tokenizer, "chat_template", None))
        self.stops = stop_tokens(model, tokenizer, self.variables)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that the model continues.

        ``messages`` end with the user's; without a chat template their contents are joined by line
        breaks. Raises a ModelError if the chat template refuses them, or they leave no room to
        answer.
        """
        if self.chats:
            ids = self.tokenizer(self._render(messages), add_special_tokens=False)
        else:
            ids = self.tokenizer("\n".join(m["content"] for m in messages))
        tokens: list[int] = ids["input_ids"] or [pad_token(self.tokenizer)]
        if self.room(tokens) < 1:
            raise ModelError(
                f"the prompt has {len(tokens):,} tokens, but the model accepts at most "
                f"{_positions(self.model):,}"
            )
        return tokens

    def room(self, prompt: Sequence[int]) -> int:
        """The number of tokens that the model can write after ``prompt``."""
        limit = _positions(self.model)
        longest = self.sampling.max_new_tokens
        return longest if limit is None else min(longest, limit - len(prompt))

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Answer several prompts at once."""
        pad, width = pad_token(self.tokenizer), max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self._generate(ids, mask, min(map(self.room, prompts)))
        return [self._answer(row) for row in out[:, width:].tolist()]

    def stream(self, prompt: Sequence[int]) -> Generator[str, None, None]:
        """Yield the answer to one prompt piece by piece.

        Closing the iterator, or an exception in it such as Ctrl-C, also ends the model's work.
        """
        ids = torch.tensor([list(prompt)])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self._generate(ids, torch.ones_like(ids), self.room(prompt), streamer, stop)
            except BaseException as error:  # raised where the answer is read
                failed.append(error)
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            thread.join()
        if failed:
            raise failed[0]

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        longest: int,
        streamer: Any = None,
        stop: threading.Event | None = None,
    ) -> torch.Tensor:
        """Continue prompts (B, T) with their mask; the result, with the prompts, is (B, T + N)."""
        sampling = self.sampling
        choice: dict[str, Any] = {"do_sample": bool(sampling.temperature)}
        if sampling.temperature:
            choice |= {
                "temperature": sampling.temperature,
                "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
                "top_k": sampling.top_k or 0,  # 0: all
            }
            torch.manual_seed(sampling.seed)  # only here: a run's own draws stay as they are
        make: Any = GenerationConfig
        config = make(
            max_new_tokens=longest,
            eos_token_id=self.stops or None,
            pad_token_id=pad_token(self.tokenizer),
            use_cache=True,
            **choice,
        )
        criteria = StoppingCriteriaList([_StopEvent(stop)] if stop else [])
        out: torch.Tensor = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=config,
            stopping_criteria=criteria,
            streamer=streamer,
        )
        return out

    def _answer(self, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.stops), None)
        text_ids = ids if end is None else ids[:end]
        text = self.tokenizer.decode(text_ids, skip_special_tokens=True)
        count = len(ids) if end is None else end + 1
        return Answer(text.strip(), count, "length" if end is None else "stop")

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return render_chat(self.tokenizer, messages, self.variables, prompt=True)
        except ValueError as error:
            raise ModelError(f"the chat template refuses this conversation: {error}") from None


def answer(model: Any, tokenizer: Any, question: str, recipe: Recipe) -> str:
    """Answer greedily, with prompts as in training, as ``fusewright generate`` will.

    The model keeps its mode; ``recipe`` has the longest answer and the parts of a prompt. Raises a
    ModelError if the chat template refuses the question, or it leaves no room to answer.
    """
    prompt = ChatPrompt.of(recipe.model_dump(mode="json"))
    sampling = Sampling(max_new_tokens=recipe.sample_max_tokens)
    generator = TextGenerator(model, tokenizer, sampling, prompt.variables)
    training = model.training
    model.eval()
    try:
        with half_autocast(recipe.precision(), model.device):
            return generator.answers([generator.prompt(prompt.question(question))])[0].text
    finally:
        model.train(training)


class _StopEvent(StoppingCriteria):
    """Ends the answer when the event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


def _positions(model: Any) -> int | None:
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


# --- fusewright chat -----------------------------------------------------------------------------


HELP = """\
/reset           clear the conversation
/system TEXT     set the system prompt; without TEXT: remove it
/save FILE       append the conversation to FILE as a row of training data (JSONL)
/exit            quit (or Ctrl-D)
Ctrl-C           stop an answer"""


class ChatSession:
    """A conversation; in a terminal the lines of ``stdin`` can be edited."""

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
        conversation = [*self.turns, {"role": "user", "content": question}]
        prompt = self._fitting(conversation)
        chunks: list[str] = []
        try:
            with contextlib.closing(self.writer.stream(prompt)) as pieces:
                for piece in pieces:
                    chunks.append(piece)
                    self.stdout.write(shown(piece) if self.terminal else piece)
                    self.stdout.flush()
        except KeyboardInterrupt:
            self._say(" [stopped]", end="")
        self._say("")
        if self.writer.chats:
            answer = "".join(chunks).strip()
            self.turns += [conversation[-1], {"role": "assistant", "content": answer}]

    def _fitting(self, messages: list[Message]) -> list[int]:
        """The tokens of the conversation; its oldest turns are dropped when it is too long."""
        forgotten = 0
        while True:
            try:
                prompt = self.writer.prompt(with_system(messages[forgotten:], self.system))
            except ModelError:
                if forgotten + 2 >= len(messages):
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
        """Take ``text`` if the chat template has a system text."""
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

    ``system`` is by default the text that the run was trained with, if any; an empty one: none.

    Raises:
        ModelError: the run cannot be loaded.
        RecipeError: the base of the run cannot be loaded.
    """
    trained = ChatPrompt.of(run.recipe)
    with quiet():
        writer = TextGenerator(*load_run(run), sampling, trained.variables)
        ChatSession(writer, trained.system if system is None else system).run()


# --- prompts -------------------------------------------------------------------------------------


_KEYS = ("role", "content")


def read_prompts(path: Path, system: str | None = None) -> list[list[Message]]:
    """Read a file of prompts.

    A ``.jsonl`` has on each line a text, ``{"prompt": ...}`` or ``{"messages": [...]}``; any other
    file has a prompt on each line. Blank lines are skipped. ``system`` is for prompts without one.

    Raises:
        DataError: it cannot be read, or a line has another form; the message has file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: cannot be read: byte {error.start + 1} is not UTF-8; save it as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    entries = [
        _messages(line, path, number) if path.suffix == ".jsonl" else [_user(line)]
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not entries:
        raise DataError(f"{path}: the file has no prompts")
    return [with_system(messages, system) for messages in entries]


def read_prompt(prompt: str | None, stdin: TextIO) -> str:
    """The prompt of the command line, or of ``stdin`` when it is ``-`` or left out of a pipe.

    Raises a RecipeError if there is none.
    """
    if prompt == "-" or (prompt is None and not stdin.isatty()):
        try:
            prompt = stdin.read().strip()
        except UnicodeDecodeError:
            raise RecipeError("standard input is not UTF-8: save the prompt as UTF-8") from None
    if not prompt:
        raise RecipeError("there is no prompt: write one, or - to read it from standard input")
    if (problem := odd_character(prompt)) is not None:
        raise RecipeError(f"the prompt {problem}: write it as UTF-8")
    return prompt


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _messages(line: str, path: Path, number: int) -> list[Message]:
    where = f"{path}, line {number}"
    try:
        row: Any = parse_json(line)
    except BadJsonError as error:
        column = f" (column {error.column})" if error.column else ""
        raise DataError(f"{where}: {error}{column}") from None
    if isinstance(row, dict):
        row = row.get("prompt", row.get("messages"))
    if isinstance(row, str):
        return [_user(row)]
    turns = row if isinstance(row, list) else []
    right = (isinstance(t, dict) and all(isinstance(t.get(k), str) for k in _KEYS) for t in turns)
    if not turns or not all(right):
        raise DataError(
            f'{where}: must be a text, {{"prompt": "..."}} or {{"messages": [{{"role": "user", '
            '"content": "..."}]}'
        )
    if turns[-1]["role"] == "assistant":  # a row of training data: its question is answered again
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{where}: it ends with an answer, so there is nothing to answer")
    return [{key: turn[key] for key in _KEYS} for turn in turns]
