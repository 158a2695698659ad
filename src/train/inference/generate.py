"""``fusewright generate`` and ``chat``: a model's answers to prompts, and in a conversation."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
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

from ...errors import FusewrightError, ModelError, RecipeError
from ..data.chat.encoder import standing_for
from ..data.chat.stops import render_chat, stop_tokens, template_of
from ..data.chat.template import Chat
from ..data.formats.conversation import Conversation
from ..data.images.expansion import Expander
from ..data.images.features import Featurizer, written
from ..data.images.picture import TEXT_ONLY, Gallery, NoImages, Picture
from ..data.images.reading import featurizer_of, no_images
from ..data.sample import IGNORED, Sample
from ..model.load import quiet
from ..model.precision import half_autocast
from ..model.tokenizer import ChatPrompt, Message, pad_token, with_system
from ..printable import shown, shown_json
from ..recipe.recipe import Dataset, Recipe
from ..terminal import announce
from .load_run import load_to_answer
from .prompts import has_images, text_of, user_message
from .run_folder import RunFolder
from .run_recipe import recipe_for


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

    Each conversation ends with what the model shall answer; images are parts of contents, such as
    ``{"type": "image", "path": "cat.png"}``. With a temperature every batch begins from the seed of
    ``sampling``. ``as_json`` prints one object per line, with ``messages``, ``answer``, ``tokens``,
    ``finish``.

    Raises:
        ModelError: the run cannot be loaded, a conversation cannot be rendered, or it has images,
            and the model reads none.
        RecipeError: the base of the run cannot be loaded.
        DataError: an image cannot be read.
    """
    out = out or sys.stdout
    with quiet():
        writer = _writer(run, sampling, any(map(has_images, conversations)))
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


def _writer(run: RunFolder, sampling: Sampling, images: bool) -> TextGenerator:
    """What writes the answers of ``run``; ``images``: there are some, so that it must read them."""
    model, processing = load_to_answer(run, images)
    recipe = recipe_for(run)
    featurizer = featurizer_of(recipe, processing)
    return TextGenerator(
        model, processing.tokenizer, sampling, ChatPrompt.of(run.recipe).variables,
        featurizer or no_images(processing), recipe.consent.allow_image_urls,
    )  # fmt: skip


def _stream(writer: TextGenerator, prompt: Sample, out: TextIO) -> None:
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
        text = f"> {text_of(messages[-1])}\n{answer.text}\n\n"
        out.write(shown(text) if out.isatty() else text)
    out.flush()


# --- answers -------------------------------------------------------------------------------------


_PROMPT = "the prompt"
"""Where the images of a conversation are, in messages."""


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
        images: what makes features of images, or why prompts may have none.
        may_download: whether images that are addresses of the web are asked for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        variables: Mapping[str, Any] | None = None,
        images: Featurizer | NoImages = TEXT_ONLY,
        may_download: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.images, self.may_download = images, may_download
        self.expander: Expander | None = None
        if isinstance(images, Featurizer):
            try:
                self.expander = Expander(images.processor, images.options)
            except RecipeError as error:
                self.images = NoImages(str(error))
        self.variables = dict(variables or {})
        self.chats = bool(getattr(tokenizer, "chat_template", None))
        self.stops = stop_tokens(model, tokenizer, self.variables)

    def prompt(self, messages: Sequence[Message]) -> Sample:
        """The tokens that the model continues.

        ``messages`` end with the user's; without a chat template their contents are joined by line
        breaks.

        Raises:
            ModelError: the chat template refuses them, they leave no room to answer, or they have
                images, and the model reads none.
            DataError: an image cannot be read, or a text has what stands for one.
        """
        chat = self._read(messages)
        extra, expanded, marks = "", None, ("", "")
        if self.chats:
            text = self._render(chat.messages)
            if self.expander is not None and chat.pictures:
                extra = written(text, chat.pictures, _PROMPT)
                expanded = self.expander.expand(text, chat.pictures, _PROMPT)
                text = expanded.text
                template = template_of(self.tokenizer, self.variables)
                marks = template.around_image(self.expander.token)
            encoded = self.tokenizer(text, add_special_tokens=False)
        else:
            encoded = self.tokenizer("\n".join(m["content"] for m in chat.messages))
        if self.expander is not None:
            spans = [] if expanded is None else standing_for(expanded, encoded[0], marks)
            self.expander.require_text(encoded["input_ids"], spans, _PROMPT)
        tokens: list[int] = encoded["input_ids"] or [pad_token(self.tokenizer)]
        if self.room(tokens) < 1:
            raise ModelError(
                f"the prompt has {len(tokens):,} tokens, but the model accepts at most "
                f"{_positions(self.model):,}"
            )
        return Sample(tokens, [IGNORED] * len(tokens), extra)

    def _read(self, messages: Sequence[Message]) -> Chat:
        """The conversation with the images of its parts."""
        if not any(isinstance(m.get("content"), list) for m in messages):
            return Chat(_PROMPT, list(messages))
        gallery = self._gallery(_PROMPT) if has_images(messages) else TEXT_ONLY
        if has_images(messages) and not self.chats:
            raise ModelError(
                f"{_PROMPT} has an image, and the model has no chat template that says where it "
                "belongs"
            )
        source = str(self.tokenizer.chat_template)
        reader = Conversation(Dataset(path=_PROMPT), source, None, gallery)
        return reader.chat(list(messages), {}, _PROMPT)

    def picture(self, image: str | Path, where: str) -> Picture:
        """Open an image that a user names; raises a ModelError or a DataError if it cannot."""
        return self._gallery(where).picture(image, where)

    def _gallery(self, where: str) -> Gallery:
        if isinstance(self.images, NoImages):
            raise ModelError(f"{where} has an image, and {self.images.why}")
        copies = Path(self._copies.name)
        return Gallery(None, copies, self.images.resizing, self.may_download)

    @functools.cached_property
    def _copies(self) -> tempfile.TemporaryDirectory[str]:
        """The folder of images that messages hold as bytes."""
        return tempfile.TemporaryDirectory(prefix="fusewright-images-")

    def room(self, prompt: Sequence[int]) -> int:
        """The number of tokens that the model can write after ``prompt``."""
        limit = _positions(self.model)
        longest = self.sampling.max_new_tokens
        return longest if limit is None else min(longest, limit - len(prompt))

    def answers(self, prompts: Sequence[Sample]) -> list[Answer]:
        """Answer several prompts at once."""
        longest = min(self.room(p.input_ids) for p in prompts)
        width = max(len(p.input_ids) for p in prompts)
        out = self._generate(prompts, width, longest)
        return [self._answer(row) for row in out[:, width:].tolist()]

    def stream(self, prompt: Sample) -> Generator[str, None, None]:
        """Yield the answer to one prompt piece by piece.

        Closing the iterator, or an exception in it such as Ctrl-C, also ends the model's work.
        """
        width = len(prompt.input_ids)
        longest = self.room(prompt.input_ids)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self._generate([prompt], width, longest, streamer, stop)
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
        prompts: Sequence[Sample],
        width: int,
        longest: int,
        streamer: Any = None,
        stop: threading.Event | None = None,
    ) -> torch.Tensor:
        """Continue prompts, which get ``width`` tokens; with them, the result is (B, T + N)."""
        pad, rows = pad_token(self.tokenizer), [p.input_ids for p in prompts]
        inputs = {
            "input_ids": torch.tensor([[pad] * (width - len(r)) + r for r in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        }
        if isinstance(self.images, Featurizer):
            inputs |= self.images.features([[p] for p in prompts], inputs, left=True)
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
            pad_token_id=pad,
            use_cache=True,
            **choice,
        )
        criteria = StoppingCriteriaList([_StopEvent(stop)] if stop else [])
        out: torch.Tensor = self.model.generate(
            **{name: value.to(self.model.device) for name, value in inputs.items()},
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


def answer(
    model: Any,
    tokenizer: Any,
    question: str,
    recipe: Recipe,
    images: Featurizer | None = None,
) -> str:
    """Answer greedily, with prompts as in training, as ``fusewright generate`` will.

    The model keeps its mode; ``recipe`` has the longest answer, the parts of a prompt and an image,
    if the question is about one, of which ``images`` makes features.

    Raises:
        ModelError: the chat template refuses the question, or it leaves no room to answer.
        DataError: the image cannot be read.
    """
    asking = ChatPrompt.of(recipe.model_dump(mode="json"))
    sampling = Sampling(max_new_tokens=recipe.sample_max_tokens)
    generator = TextGenerator(model, tokenizer, sampling, asking.variables, images or TEXT_ONLY)
    about = [recipe.sample_image] if recipe.sample_image else []
    messages = with_system([user_message(question, about)], asking.system)
    training = model.training
    model.eval()
    try:
        with half_autocast(recipe.precision(), model.device):
            return generator.answers([generator.prompt(messages)])[0].text
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
/image PATH      show an image, about which the next line asks
/reset           clear the conversation
/system TEXT     set the system prompt; without TEXT: remove it
/save FILE       append the conversation to FILE as a row of training data (JSONL)
/exit, /quit     leave (or Ctrl-D)
Ctrl-C           stop an answer"""


class ChatSession:
    """A conversation; in a terminal the lines of ``stdin`` can be edited.

    ``images`` are those that the first line asks about.
    """

    def __init__(
        self,
        writer: TextGenerator,
        system: str | None = None,
        stdin: TextIO | None = None,
        stdout: TextIO | None = None,
        images: Sequence[str] = (),
    ) -> None:
        self.writer, self.system, self.images = writer, system, list(images)
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
                if line is None or line.split()[:1] in (["/exit"], ["/quit"]):
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
        except FusewrightError as error:
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
        message = user_message(question, self.images)
        conversation = [*self.turns, message]
        prompt = self._fitting(conversation)
        self.images = []
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

    def _fitting(self, messages: list[Message]) -> Sample:
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
            self.turns, self.images = [], []
            self._say("[conversation cleared]")
        elif name == "/image" and rest:
            self._show(rest)
        elif name == "/system":
            self._set_system(rest or None)
        elif name == "/save" and rest:
            self._save(Path(rest).expanduser())
        elif name == "/help":
            self._say(HELP)
        else:
            self._say(f"{name} is not a command, or its argument is missing:\n{HELP}")

    def _show(self, path: str) -> None:
        """Keep an image for the next line."""
        picture = self.writer.picture(Path(path).expanduser(), "/image")
        self.images.append(picture.path)
        width, height = picture.size
        self._say(f"[{Path(picture.path).name}, {width} x {height}: ask about it]")

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


def chat(
    run: RunFolder,
    sampling: Sampling,
    system: str | None = None,
    images: Sequence[str] = (),
) -> None:
    """Chat with the model of ``run`` on standard input and output.

    ``system`` is by default the text that the run was trained with, if any; an empty one: none.
    ``images`` are paths of those that the first line asks about.

    Raises:
        ModelError: the run cannot be loaded, or there are images, and its model reads none.
        RecipeError: the base of the run cannot be loaded.
    """
    if system is None:
        system = ChatPrompt.of(run.recipe).system
    with quiet():
        writer = _writer(run, sampling, bool(images))
        ChatSession(writer, system, images=images).run()
