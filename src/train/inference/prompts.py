"""Prompts: of the command line, of standard input, and of files, which may name images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ...errors import DataError, RecipeError
from ..data.chat.template import Chat, texts_of
from ..data.formats.conversation import Conversation
from ..data.formats.fields import IMAGE_FIELDS
from ..data.images.picture import TEXT_ONLY, Gallery, NoImages
from ..json_text import BadJsonError, parse_json
from ..model.tokenizer import Message, with_system
from ..printable import odd_character
from ..recipe.recipe import Dataset

_KEYS = ("role", "content")
_LISTS = ("prompt", "messages", "conversations", "conversation")


def user_message(text: str, images: Sequence[str] = ()) -> Message:
    """The user's ``text``, below images by their paths."""
    if not images:
        return {"role": "user", "content": text}
    shown = [{"type": "image", "path": path} for path in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def has_images(messages: Sequence[Message]) -> bool:
    """Whether a conversation has images: contents with parts that are no text."""
    contents = [c for m in messages if isinstance(c := m.get("content"), list)]
    return any(part.get("type", "text") != "text" for content in contents for part in content)


def text_of(message: Message) -> str:
    """The content of a message as text, with the names of images."""
    content = message["content"]
    if isinstance(content, str):
        return content
    shown = [f"<image: {Path(p['path']).name}>" for p in content if p.get("path")]
    return " ".join([*shown, *texts_of(message)])


def read_prompts(
    path: Path, system: str | None = None, gallery: Gallery | NoImages = TEXT_ONLY
) -> list[list[Message]]:
    """Read a file of prompts.

    A ``.jsonl`` has on each line a text, ``{"prompt": ...}``, ``{"messages": [...]}``, or a row of
    training data with images, which ``gallery`` opens; any other file has a prompt on each line.
    Blank lines are skipped. ``system`` is for prompts without one.

    Raises:
        DataError: it cannot be read, a line has another form, or an image cannot be read; the
            message has file and line.
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
        _messages(line, f"{path}, line {number}", gallery)
        if path.suffix == ".jsonl"
        else [user_message(line)]
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


def _messages(line: str, where: str, gallery: Gallery | NoImages) -> list[Message]:
    try:
        row: Any = parse_json(line)
    except BadJsonError as error:
        column = f" (column {error.column})" if error.column else ""
        raise DataError(f"{where}: {error}{column}") from None
    fields = row if isinstance(row, dict) else {}
    turns = next((fields[name] for name in _LISTS if name in fields), row)
    if isinstance(turns, str):
        turns = [user_message(turns)]
    turns = turns if isinstance(turns, list) else []
    plain = all(
        isinstance(t, dict) and all(isinstance(t.get(k), str) for k in _KEYS) for t in turns
    )
    with_images = any(fields.get(name) for name in IMAGE_FIELDS)
    as_trained = any(
        isinstance(t, dict) and ("from" in t or isinstance(t.get("content"), list)) for t in turns
    )
    if not turns or not (plain or with_images or as_trained):
        raise DataError(
            f'{where}: must be a text, {{"prompt": "..."}} or {{"messages": [{{"role": "user", '
            '"content": "..."}]}'
        )
    if not plain or with_images:
        reader = Conversation(Dataset(path=where), gallery=gallery)
        turns = _named(reader.chat(turns, fields, where))
    if turns[-1]["role"] == "assistant":  # a row of training data: its question is answered again
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{where}: it ends with an answer, so there is nothing to answer")
    return [{key: turn[key] for key in _KEYS} for turn in turns]


def _named(chat: Chat) -> list[Message]:
    """The messages of a conversation, whose parts name the images."""
    paths = iter(picture.path for picture in chat.pictures)
    messages = []
    for message in chat.messages:
        content = message.get("content", "")
        if isinstance(content, list):
            content = [
                {"type": "image", "path": next(paths)} if part["type"] == "image" else part
                for part in content
            ]
        messages.append({**message, "content": content})
    return messages
