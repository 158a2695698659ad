"""Letting a loaded model answer: prompts, stop tokens, batches, a stream that can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ...errors import ModelError, RecipeError
from ..data.chat.stops import render_chat, stop_tokens
from ..model.chat_prompt import ChatPrompt, Message
from ..model.tokenizer import pad_token
from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: None or 0 takes the likeliest token each time; otherwise tokens are drawn.
        top_p: draw only from the likeliest tokens that have this probability together.
        top_k: draw only from this many.
        seed: of the draws.
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
    """What the model wrote.

    Attributes:
        text: without special tokens.
        tokens: how many it took, the one that ends it included.
        finish: ``"stop"`` when the model ended it, ``"length"`` when the limit did.
    """

    text: str
    tokens: int
    finish: str


class TextGenerator:
    """A model that answers; the model is not changed.

    Args:
        model: in evaluation mode, plain or with an adapter.
        tokenizer: its tokenizer. Without a chat template prompts are continued as they are.
        sampling: how tokens are chosen.
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

        Args:
            messages: a conversation that ends with the user; without a chat template their
                contents are joined by line breaks.

        Raises:
            ModelError: the chat template refuses the conversation, or it leaves no room to answer.
        """
        if self.chats:
            ids = self.tokenizer(self._render(messages), add_special_tokens=False)
        else:
            ids = self.tokenizer("\n".join(m["content"] for m in messages))
        found: list[int] = ids["input_ids"] or [pad_token(self.tokenizer)]
        if self.room(found) < 1:
            raise ModelError(
                f"the prompt has {len(found):,} tokens, but the model accepts at most "
                f"{_positions(self.model):,}"
            )
        return found

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens the model can write after ``prompt``."""
        limit = _positions(self.model)
        longest = self.sampling.max_new_tokens
        return longest if limit is None else min(longest, limit - len(prompt))

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Answer several prompts at once.

        Args:
            prompts: token ids, of any lengths.
        """
        pad, width = pad_token(self.tokenizer), max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self._generate(ids, mask, min(map(self.room, prompts)))
        return [self._answer(row) for row in out[:, width:].tolist()]

    def stream(self, prompt: Sequence[int]) -> Generator[str, None, None]:
        """Yield the answer to one prompt piece by piece.

        Closing the iterator, or an exception in it such as Ctrl-C, ends the model's work, too.
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
        """Prompts (B, T) and their mask in, prompts and answers (B, T + N) out."""
        asked = self.sampling
        choice: dict[str, Any] = {"do_sample": bool(asked.temperature)}
        if asked.temperature:
            choice |= {
                "temperature": asked.temperature,
                "top_p": 1.0 if asked.top_p is None else asked.top_p,
                "top_k": asked.top_k or 0,  # 0: all
            }
            torch.manual_seed(asked.seed)  # only here: a run's own draws stay as they are
        make: Any = GenerationConfig
        config = make(
            max_new_tokens=longest,
            eos_token_id=self.stops or None,
            pad_token_id=pad_token(self.tokenizer),
            use_cache=True,
            **choice,
        )
        criteria = StoppingCriteriaList([_Asked(stop)] if stop else [])
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
        written = ids if end is None else ids[:end]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        count = len(ids) if end is None else end + 1
        return Answer(text.strip(), count, "length" if end is None else "stop")

    def _render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, with the header of the next answer.

        Raises:
            ModelError: the chat template refuses the conversation.
        """
        try:
            return render_chat(self.tokenizer, messages, self.variables, prompt=True)
        except ValueError as error:
            raise ModelError(f"the chat template refuses this conversation: {error}") from None


def answer(model: Any, tokenizer: Any, question: str, recipe: Recipe) -> str:
    """Let a model answer as ``fusewright generate`` will: greedily, and asked as in training.

    Args:
        model: in any mode, which it keeps.
        tokenizer: its tokenizer.
        question: the user's words.
        recipe: with the longest answer, and what prompts have besides the question.

    Raises:
        ModelError: the chat template refuses the question, or it leaves no room to answer.
    """
    prompt = ChatPrompt.of(recipe.model_dump(mode="json"))
    sampling = Sampling(max_new_tokens=recipe.sample_max_tokens)
    generator = TextGenerator(model, tokenizer, sampling, prompt.variables)
    training = model.training
    model.eval()
    try:
        return generator.answers([generator.prompt(prompt.question(question))])[0].text
    finally:
        model.train(training)


class _Asked(StoppingCriteria):
    """Ends the answer when somebody asks for it."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


def _positions(model: Any) -> int | None:
    """How many tokens the model takes at most, where its configuration says so."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
