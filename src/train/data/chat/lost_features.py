"""Detects parts of a conversation that a chat template silently leaves out.

A template is free to ignore whatever it does not know: one without support for ``tool_calls``
writes an empty turn in their place. So each kind of conversation is tried once: a part of it is
changed, and where the text stays the same, that part is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ....errors import DataError
from .template import Chat, Messages, Template

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
"""Keys of a message with what the assistant thinks before it answers."""

_SIGN = "\ue020"
"""A character that occurs in no text."""

_MOST = 4096
"""Kinds of conversations that are remembered."""

_REMEDIES = {
    "thinking": "name the key that the template reads in template_thinking_key",
    "system": "leave it out with drop_system_message: true (and without default_system_message)",
}


class Features:
    """Checks that a template writes what the rows have.

    ``thinking`` is the message's key of thoughts, in addition to the usual ones.
    """

    def __init__(self, template: Template, thinking: str = THOUGHTS[0]) -> None:
        self.template = template
        self.thoughts = tuple(dict.fromkeys((thinking, *THOUGHTS)))
        self._whole: set[Any] = set()

    def require(self, chat: Chat) -> None:
        """Raise a DataError that names what the template leaves out of a conversation."""
        if chat.tools is None and all(map(_is_plain, chat.messages)):
            return
        kind = (bool(chat.tools), *(self._kind(message) for message in chat.messages))
        if kind in self._whole:
            return
        missing = list(dict.fromkeys(self._lost(chat)))
        if missing:
            raise DataError(self._message(chat, missing))
        if len(self._whole) >= _MOST:
            self._whole.clear()
        self._whole.add(kind)

    def _kind(self, message: Mapping[str, Any]) -> tuple[Any, ...]:
        """What decides, as far as one can tell, which parts of a message are written."""
        calls = message.get("tool_calls") or ()
        keys = frozenset(key for key, value in message.items() if value)
        return message["role"], keys, len(calls), *(bool(_function(c)[1]) for c in calls)

    def _lost(self, chat: Chat) -> Iterator[tuple[str, str]]:
        """The parts that leave no trace: the name, and which remedy there is."""
        messages, tools = chat.messages, chat.tools
        text = self.template.render(messages, tools, where=chat.where)

        def same(changed: Messages, with_tools: Any = tools, as_was: str = text) -> bool:
            try:
                return self.template.render(changed, with_tools) == as_was
            except DataError:  # it was looked at, and found wrong
                return False

        if tools and same(messages, [_renamed(tool) for tool in tools]):
            yield "tools", ""
        for i, message in enumerate(messages):
            for name, remedy, changed in self._changes(message):
                current, as_was = messages, text
                if remedy == "thinking":  # which many drop, on purpose, once the answer is given
                    current = messages[: i + 1]
                    as_was = self._through(chat, i, text)
                if same([*current[:i], changed, *current[i + 1 :]], tools, as_was):
                    yield name, remedy

    def _through(self, chat: Chat, i: int, text: str) -> str:
        try:
            return self.template.render(chat.messages[: i + 1], chat.tools)
        except DataError:
            return text

    def _changes(self, message: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Copies of a message with one part changed, for each part that must be seen."""
        role, calls = message["role"], message.get("tool_calls") or []
        if message.get("content") and (role not in ("user", "assistant") or calls):
            what = "the text beside tool_calls" if calls else f"the content of {role!r} messages"
            more = _SIGN if isinstance(message["content"], str) else [_part(_SIGN)]
            changed = {**message, "content": message["content"] + more}
            yield what, "system" if role == "system" else "", changed
        for k, call in enumerate(calls):
            name, arguments = _function(call)
            for part, what in (("name", "tool_calls"), ("arguments", "arguments of tool_calls")):
                value = name if part == "name" else arguments
                if value:
                    other = _with(call, part, _altered(value))
                    yield what, "", {**message, "tool_calls": [*calls[:k], other, *calls[k + 1 :]]}
        legacy = message.get("function_call")
        if isinstance(legacy, Mapping) and legacy.get("name"):
            changed = {**legacy, "name": _altered(legacy["name"])}
            yield "function_call", "", {**message, "function_call": changed}
        thoughts = [k for k in self.thoughts if isinstance(message.get(k), str) and message[k]]
        if thoughts and role == "assistant":
            changed = {k: message[k] + _SIGN for k in thoughts}
            yield " and ".join(thoughts), "thinking", {**message, **changed}

    def _message(self, chat: Chat, lost: list[tuple[str, str]]) -> str:
        names = ", ".join(name for name, _ in lost)
        remedies = [_REMEDIES[remedy] for _, remedy in lost if remedy]
        others = "use a chat_template that writes it, or remove it from the rows"
        return (
            f"{chat.where}: the chat template leaves out what this row has: {names}; "
            f"{', or '.join([others, *dict.fromkeys(remedies)])}"
        )


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _is_plain(message: Mapping[str, Any]) -> bool:
    return len(message) == 2 and message["role"] in ("user", "assistant")


def _function(call: Mapping[str, Any]) -> tuple[Any, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        return None, None
    return function.get("name"), function.get("arguments")


def _with(call: Mapping[str, Any], part: str, value: Any) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], part: value}}
    return {**call, part: value}


def _renamed(tool: Mapping[str, Any]) -> dict[str, Any]:
    name = tool.get("function", tool).get("name") if isinstance(tool, Mapping) else None
    return _with(tool, "name", f"{name}{_SIGN}")


def _altered(value: Any) -> Any:
    """A value of the same form with other texts in it, and other numbers as texts."""
    if isinstance(value, Mapping):
        return {key: _altered(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_altered(inner) for inner in value]
    return f"{value}{_SIGN}"
