"""Writes the Modelfile by which Ollama takes a GGUF file, its template in Ollama's language.

A chat template of Jinja becomes one of Go's ``text/template`` where it only puts text before and
after each message; whether it does is tried on conversations.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ..data.chat.stops import render_chat, stop_tokens
from ..model.tokenizer import ChatPrompt, Message
from .gguf_file import field
from .options import require_ollama

_MARK = "\u2063{}\u2063"  # invisible separators, which no template writes or strips
_TRIALS = (
    ("user",), ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user"),
)  # fmt: skip


@dataclass(frozen=True)
class TemplateTurns:
    """What a chat template writes around messages.

    Attributes:
        start: before the first message, unless that is a system message.
        around: before and after a message, by its role.
        answer: before the next answer.
    """

    start: str
    around: Mapping[str, tuple[str, str]]
    answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation."""
        text = "" if messages[0]["role"] == "system" else self.start
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def go(self) -> str:
        """The template in Ollama's language."""
        start = f"{{{{ if not .System }}}}{_go(self.start)}{{{{ end }}}}" if self.start else ""
        cases = [
            f'if eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}{{{{ '
            for role, (before, after) in self.around.items()
        ]
        messages = "{{ range .Messages }}{{ " + "else ".join(cases) + "end }}{{ end }}"
        return start + messages + _go(self.answer)


def _go(text: str) -> str:
    """Text as a template writes it; braces would begin an action, quotes end the Modelfile's."""
    return re.sub(r'\{\{|"""', lambda m: f"{{{{ {json.dumps(m[0])} }}}}", text)


def turns(tokenizer: Any, variables: Mapping[str, Any], without: str = "") -> TemplateTurns | None:
    """What the tokenizer's chat template writes around messages; None: it does more than that.

    ``without`` is what the engine puts before a prompt by itself.
    """

    def render(roles: Sequence[str], prompt: bool = False) -> str:
        text = render_chat(tokenizer, _conversation(roles), variables, prompt)
        return text.removeprefix(without)

    def pieces(*roles: str) -> list[str]:
        text = render(roles)
        for message in _conversation(roles):
            if text.count(message["content"]) != 1:
                raise ValueError("the template changes what is said, or repeats it")
            text = text.replace(message["content"], "\0")
        return text.split("\0")

    try:
        first, user_then_assistant, assistant_end = pieces("user", "assistant")
        _, _, assistant_then_user, user_end = pieces("user", "assistant", "user")
        user = assistant_then_user.removeprefix(assistant_end), user_end
        around = {
            "user": user,
            "assistant": (user_then_assistant.removeprefix(user_end), assistant_end),
        }
        roles: tuple[tuple[str, ...], ...] = _TRIALS
        with contextlib.suppress(ValueError):  # some templates know no system message
            before, after, _ = pieces("system", "user")
            around["system"] = before, after.removesuffix(user[0])
            roles = (*_TRIALS, *(("system", *trial) for trial in _TRIALS))
        plain = render(("user",))
        answer = render(("user",), True).removeprefix(plain)
        found = TemplateTurns(first.removesuffix(user[0]), around, answer)
        right = all(found.render(_conversation(r)) == render(r, True) for r in roles)
    except ValueError:  # it refuses a conversation
        return None
    return found if right else None


def _conversation(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]


def write_modelfile(folder: Path, gguf: Path, model: Any, tokenizer: Any, chat: ChatPrompt) -> str:
    """Write ``Modelfile`` beside a GGUF file; returns what is to be said about it, or nothing.

    ``model`` has the generation settings: its own sampling is Ollama's default then.
    """
    adds = bool(field(gguf, "tokenizer.ggml.add_bos_token"))
    found = None
    if tokenizer.chat_template is not None:
        found = turns(tokenizer, chat.variables, (tokenizer.bos_token or "") if adds else "")
    lines = [f"FROM ./{gguf.name}"]
    if found is not None:
        lines.append(f'TEMPLATE """{found.go()}"""')
    if chat.system and '"""' not in chat.system:
        lines.append(f'SYSTEM """{chat.system}"""')
    settings = getattr(model, "generation_config", None)
    if settings is not None and settings.do_sample:
        for ours, theirs in _SETTINGS.items():
            if (value := getattr(settings, ours, None)) is not None:
                lines.append(f"PARAMETER {theirs} {value}")
    stops = map(tokenizer.decode, stop_tokens(model, tokenizer, chat.variables))
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if '"""' in (chat.system or ""):
        return "the system prompt has three quotes, which a Modelfile cannot hold: it has no SYSTEM"
    if found is None and tokenizer.chat_template is not None:
        return (
            "the chat template does more than to put text around messages, so the Modelfile has no "
            "TEMPLATE: Ollama looks for one of its own that is like it; compare its prompts"
        )
    return ""


_SETTINGS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
             "repetition_penalty": "repeat_penalty"}  # fmt: skip


def create(folder: Path, name: str) -> None:
    """Run ``ollama create``; raises a RecipeError if it is not installed or fails."""
    program = require_ollama()
    ended = subprocess.run([program, "create", name, "-f", "Modelfile"], cwd=folder, check=False)
    if ended.returncode:
        raise ModelError(f"ollama create {name} ended with {ended.returncode}")
