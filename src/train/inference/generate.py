"""``fusewright generate``: answers to one prompt, or to a file of them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TextIO

from ..model.chat_prompt import ChatPrompt, Message
from ..model.load import quiet
from ..printable import shown, shown_json
from ..terminal import announce
from .generation import Answer, Sampling, TextGenerator
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

    Args:
        run: from ``open_run``.
        conversations: each ends with what the model shall answer.
        sampling: how tokens are chosen. With a temperature every batch begins from its seed.
        batch_size: conversations that are answered at once.
        as_json: print one object per line, with ``messages``, ``answer``, ``tokens``, ``finish``.
        out: where to print; None for standard output.

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
    """``pieces`` without the white space that begins and ends their text."""
    held = None
    for piece in pieces:
        text = piece.lstrip() if held is None else held + piece
        if not text:
            continue
        kept = text.rstrip()
        held = text[len(kept) :]
        if kept:
            yield kept


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
