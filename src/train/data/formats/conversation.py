"""Rows with a conversation: a list of messages, with the names of OpenAI, ShareGPT or others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ....errors import DataError
from ...json_text import BadJsonError, parse_json
from ...recipe.recipe import Dataset
from ..chat.template import Chat, Detail
from ..images.expansion import number
from ..images.picture import TEXT_ONLY, Gallery, NoImages, Picture, is_encoded, is_pil
from .fields import IMAGE_FIELDS, fields_of, kind, need

ROLES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bot"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response"),
}
"""The roles, and their names in rows."""

_IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|bmp|tiff?)$", re.IGNORECASE)

IMAGE_MARK = "<image>"
"""Stands in a text for an image of the row's list, in ShareGPT's rows and LLaMA-Factory's."""

_OF_PART = ("image", "image_url", "path", "url", "base64", "bytes")
"""Fields of a part that name or hold its image; the first two are types of parts, too."""

_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (("role", "content"), ("from", "value"))
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")


class Conversation:
    """Reads rows of the types ``chat_template`` and ``sharegpt``.

    Args:
        template: the chat template; roles that it names need no mapping.
        default_system: the system message of conversations that have none, or None.
        gallery: where images are, or why rows with images are refused.
    """

    def __init__(
        self,
        dataset: Dataset,
        template: str = "",
        default_system: str | None = None,
        gallery: Gallery | NoImages = TEXT_ONLY,
    ) -> None:
        self.gallery = gallery
        self.dataset, self.template, self.default_system = dataset, template, default_system
        mapping = dataset.roles or ROLES
        self.roles: dict[str, str] = {role: role for role in (*ROLES, *mapping)}
        self.roles |= {name: role for role, names in mapping.items() for name in names}
        self.mappings = dict(dataset.message_property_mappings)
        for key, name in (
            ("role", dataset.message_field_role),
            ("content", dataset.message_field_content),
        ):
            if name:
                self.mappings.setdefault(key, name)
        fields = list(self.mappings.values())
        self._plain = not dataset.split_thinking and len({*fields}) == len(fields)
        self._flags = (dataset.message_field_training, dataset.message_field_training_detail)
        self.thinking = dataset.template_thinking_key or "reasoning_content"

    def read(self, row: Any, where: str) -> Chat:
        """The conversation of a row; raises a DataError if it is missing or a message is wrong."""
        field = self._field(fields_of(row, where, self.dataset.field_messages, IMAGE_FIELDS))
        turns = need(row, field, where)
        if not isinstance(turns, list | tuple) or not turns:
            raise DataError(f"{where}: the field {field!r} must be a list of messages")
        chat = self.chat(list(turns), row, where)
        if chat.train is None and all(
            m["role"] not in self.dataset.roles_to_train for m in chat.messages
        ):
            trained = " or ".join(map(repr, self.dataset.roles_to_train))
            roles = ", ".join(dict.fromkeys(m["role"] for m in chat.messages))
            raise DataError(f"{where}: no message has the role {trained} (only {roles})")
        return chat

    def chat(self, turns: list[Any], row: Mapping[str, Any], where: str) -> Chat:
        """Make a conversation of a row's messages."""
        messages = self.messages(turns, where)
        pictures = self._pictures(messages, row, where)
        train: list[bool | list[Detail] | None] = [None] * len(messages)
        if any(self._flags):
            train = [self._training(t, i, where) for i, t in enumerate(turns, start=1)]
        self._system(messages, train, row, where)
        flagged = any(flag is not None for flag in train)
        tools = self._tools(row, where)
        return Chat(where, messages, tools, train if flagged else None, pictures)

    def messages(self, turns: list[Any], where: str) -> list[dict[str, Any]]:
        """Messages with the templates' names of roles; raises a DataError for a wrong one."""
        pair = self._pair(turns[0])
        return [self._message(t, i, where, pair) for i, t in enumerate(turns, start=1)]

    def _field(self, row: Mapping[str, Any]) -> str:
        field: str = self.dataset.field_messages or "messages"
        if field in row or field != "messages":
            return field
        return next((name for name in _LISTS if name in row), "messages")

    def _pair(self, first: Any) -> tuple[str, str]:
        role, content = self.mappings.get("role"), self.mappings.get("content")
        guess = _PAIRS[0]
        if isinstance(first, dict) and "role" not in first and "from" in first:
            guess = _PAIRS[1]
        return role or guess[0], content or guess[1]

    def _message(self, turn: Any, i: int, where: str, pair: tuple[str, str]) -> dict[str, Any]:
        if not isinstance(turn, dict):
            raise DataError(
                f"{where}: message {i} must be an object with the fields {pair[0]!r} and "
                f"{pair[1]!r}, not {kind(turn)}"
            )
        content = turn.get(pair[1])
        if self._plain and len(turn) == 2 and isinstance(content, str):  # nearly all are so
            return {"role": self._role(turn, i, where, pair[0]), "content": content}
        used = {*pair, *self.mappings.values()}
        message: dict[str, Any] = {"role": self._role(turn, i, where, pair[0])}
        rest = {k: v for k, v in turn.items() if v is not None and k not in used | set(self._flags)}
        content = _content(content, f"{where}: message {i}", pair[1])
        if content is None and not (rest.get("tool_calls") or rest.get("function_call")):
            raise DataError(f"{where}: message {i} needs the field {pair[1]!r}, with text in it")
        if content is not None:
            message["content"] = content
        elif "tool_calls" in rest:
            message["content"] = ""
        for key, name in self.mappings.items():
            if key not in ("role", "content") and turn.get(name) is not None:
                message[key] = turn[name]
        for key, value in rest.items():
            message.setdefault(self.thinking if key == self.dataset.field_thinking else key, value)
        if message.get("tool_calls"):
            message["tool_calls"] = _calls(message["tool_calls"], f"{where}: message {i}")
        if self.dataset.split_thinking and message["role"] == "assistant":
            self._split(message)
        return message

    def _role(self, turn: Mapping[str, Any], i: int, where: str, field: str) -> str:
        name = turn.get(field)
        if not isinstance(name, str):
            raise DataError(f"{where}: message {i} needs the field {field!r}, with text in it")
        if name not in self.roles:
            if f"'{name}'" in self.template or f'"{name}"' in self.template:
                return name
            roles = ", ".join(self.roles)
            raise DataError(
                f"{where}: message {i} has the role {name!r}, which is not one of {roles}; map it "
                f"with roles: {{assistant: [{name}]}}, or whichever role it is"
            )
        return self.roles[name]

    def _training(self, turn: Any, i: int, where: str) -> bool | list[Detail] | None:
        flag, name = self._flags
        detail = turn.get(name) if name else None
        value = turn.get(flag) if flag else None
        if value is not None and not (isinstance(value, bool) or value in (0, 1)):
            raise DataError(
                f"{where}: message {i}, field {flag!r}: must be true or false, not {value!r}"
            )
        if value is not None and not value:
            return False
        if detail is None:
            return None if value is None else True
        good = isinstance(detail, list) and all(
            isinstance(d, dict)
            and isinstance(d.get("begin_offset"), int)
            and isinstance(d.get("end_offset"), int)
            and isinstance(d.get("train"), bool)
            for d in detail
        )
        if not good:
            raise DataError(
                f"{where}: message {i}, field {name!r}: must be a list of "
                "{begin_offset, end_offset, train}"
            )
        return list(detail)

    def _system(
        self,
        messages: list[dict[str, Any]],
        train: list[bool | list[Detail] | None],
        row: Mapping[str, Any],
        where: str,
    ) -> None:
        if self.dataset.drop_system_message:
            if messages[0]["role"] == "system":
                del messages[0], train[0]
            if not messages:
                raise DataError(f"{where}: nothing is left without the system message")
            return
        if messages[0]["role"] == "system":
            return
        field = self.dataset.field_system or "system"
        text = row.get(field)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: the field {field!r} must be text, not {kind(text)}")
        text = text or self.default_system
        if text:
            messages.insert(0, {"role": "system", "content": text})
            train.insert(0, None)

    def _tools(self, row: Mapping[str, Any], where: str) -> Any:
        field = self.dataset.field_tools or "tools"
        tools = row.get(field)
        if isinstance(tools, str):
            tools = _json(tools, f"{where}: the field {field!r}") if tools.strip() else None
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
            raise DataError(f"{where}: the field {field!r} must be a list of JSON schemas")
        for tool in tools:
            function = tool.get("function", {})
            if isinstance(function, dict) and isinstance(function.get("parameters"), str):
                place = f"{where}: the parameters in {field!r}"
                function["parameters"] = _json(function["parameters"], place)
        return _without_nulls(tools)

    def _pictures(
        self, messages: list[dict[str, Any]], row: Mapping[str, Any], where: str
    ) -> tuple[Picture, ...]:
        """The images of a row, in the order of the parts that they belong to.

        A part names its own, or takes the next one of the row's list; ``<image>`` in a text is such
        a part. A list without any belongs before the first question, as in TRL. The messages are
        left with parts that name none, as templates expect them.
        """
        waiting = _listed(row, where)
        count = len(waiting)
        if count or (isinstance(self.gallery, Gallery) and row.keys() & set(IMAGE_FIELDS)):
            for message in messages:
                content = message.get("content")
                if isinstance(content, str) and IMAGE_MARK in content:
                    message["content"] = _marked_parts(content)
        in_parts = [m for m in messages if isinstance(m.get("content"), list)]
        asked = next((m for m in messages if m["role"] == "user"), None)
        if waiting and not in_parts and asked is not None:
            text = {"type": "text", "text": asked.get("content") or ""}
            asked["content"] = [{"type": "image"}] * count + [text]
            in_parts = [asked]
        pictures: list[Picture] = []
        wanted = 0
        for message in in_parts:
            parts = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append(part)
                    continue
                gallery = self._gallery(where)
                value: Any = {k: part[k] for k in _OF_PART if part.get(k) is not None}
                if not value:
                    wanted += 1
                    value = waiting.pop(0) if waiting else None
                if value is not None:
                    at = f"{where}: image {len(pictures) + 1}"
                    pictures.append(gallery.picture(value, at))
                parts.append({"type": "image"})
            message["content"] = parts
        if waiting:
            self._gallery(where)
        if not count and not pictures and isinstance(self.gallery, Gallery):
            _require_no_other_field(self.gallery, any(map(_has_mark, messages)), row, where)
        if wanted != count:
            raise DataError(
                f"{where}: the row has {number(count, 'image')}, and its messages have "
                f"{number(wanted, 'place')} for them (parts of type image without a path, or "
                f"{IMAGE_MARK} in a text): add what is missing, or remove what is too much"
            )
        return tuple(pictures)

    def _gallery(self, where: str) -> Gallery:
        if isinstance(self.gallery, NoImages):
            raise DataError(f"{where}: the row has an image, and {self.gallery.why}")
        return self.gallery

    def _split(self, message: dict[str, Any]) -> None:
        """Move marked thoughts out of an answer."""
        content = message.get("content") or ""
        for begin, end in _THOUGHTS:
            if begin not in content or end not in content:
                continue
            thought, _, rest = content.partition(begin)[2].partition(end)
            message[self.thinking] = thought.strip()
            rest = rest.lstrip()
            if _SOLUTION[0] in rest and _SOLUTION[1] in rest:
                rest = rest.partition(_SOLUTION[0])[2].partition(_SOLUTION[1])[0].strip()
            message["content"] = rest
            return


def _has_mark(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return message["role"] == "user" and isinstance(content, str) and IMAGE_MARK in content


def _require_no_other_field(
    gallery: Gallery, is_marked: bool, row: Mapping[str, Any], where: str
) -> None:
    """Raise a DataError if a field of another name seems to hold the image of a row without any.

    What may be text, such as where a row comes from, is no image by its name alone: there is such a
    file, or a message ``is_marked`` as one about an image.
    """
    for name, value in row.items():
        if name in IMAGE_FIELDS:
            continue
        held = value[0] if isinstance(value, list) and value else value
        held = (held.get("bytes") or held.get("path")) if isinstance(held, Mapping) else held
        if isinstance(held, str) and _IMAGE_FILE.search(held):
            is_image = is_marked or gallery.has(held)
        else:
            is_image = is_pil(held) or (isinstance(held, bytes) and is_encoded(held))
        if is_image:
            asked = f"a message has {IMAGE_MARK}, and " if is_marked else ""
            raise DataError(
                f"{where}: {asked}the row's field {name!r}, which seems to hold an image, is not "
                "read: name it 'images', or remove it"
            )


def _listed(row: Mapping[str, Any], where: str) -> list[Any]:
    """The images of a row beside its messages."""
    fields = [name for name in IMAGE_FIELDS if row.get(name)]
    if len(fields) > 1:
        raise DataError(
            f"{where}: the row has both {fields[0]!r} and {fields[1]!r}: remove one of them"
        )
    held = row[fields[0]] if fields else []
    images = list(held) if isinstance(held, list | tuple) else [held]
    if None in images:
        raise DataError(
            f"{where}: image {images.index(None) + 1} of {fields[0]!r} is null: name its path, or "
            "leave the row out"
        )
    return images


def _content(value: Any, place: str, field: str) -> str | list[Any] | None:
    """A content as text, where it is nothing else (parts of text are joined), or as parts."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(p, dict) for p in value):
        parts = [_part(p) for p in value]
        kinds = {p["type"] for p in parts}
        if odd := sorted(kinds - {"text", "image"}):
            raise DataError(
                f"{place} has a part of type {odd[0]!r} in {field!r}; only text and images are "
                "trained: leave such rows out, or save frames of it as images"
            )
        if all(isinstance(p.get("text"), str) for p in parts if p["type"] == "text"):
            return parts if "image" in kinds else "".join(p["text"] for p in parts)
    raise DataError(f"{place} needs the field {field!r}, with text in it, not {kind(value)}")


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part without the nulls that tables fill in, its type as ``text``, ``image`` or another."""
    plain = {k: v for k, v in part.items() if v is not None}
    guess = next((name for name in _OF_PART if name in plain), "text")
    named = plain.get("type", "text" if "text" in plain else guess)
    return {**plain, "type": "image" if named in _OF_PART else str(named)}


def _marked_parts(text: str) -> list[dict[str, Any]]:
    """The parts of a text in which ``<image>`` stands for an image."""
    parts: list[dict[str, Any]] = []
    for k, piece in enumerate(text.split(IMAGE_MARK)):
        if k:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _calls(calls: Any, place: str) -> list[Any]:
    """Tool calls whose arguments are objects, as templates expect them."""
    if isinstance(calls, str):
        calls = _json(calls, f"{place}: the field 'tool_calls'")
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise DataError(f"{place}: the field 'tool_calls' must be a list of calls")
    plain: list[Any] = _without_nulls(calls)
    for call in plain:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _json(
                function["arguments"], f"{place}: the arguments of a call"
            )
    return plain


def _json(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except BadJsonError as error:
        raise DataError(error.of(place)) from None


def _without_nulls(value: Any) -> Any:
    """Remove the nulls that Arrow fills in for fields that only other rows have."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
