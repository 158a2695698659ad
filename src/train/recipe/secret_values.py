"""Keeping a recipe's secrets out of what a run leaves behind: its folder may be published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
"""The replacement of a secret."""

_SECRET = re.compile(
    r"(?:api|access|private)[_-]?key|passw(?:or)?d|passphrase|secret|credential|authorization"
    r"|token$",
    re.IGNORECASE,
)
_OF_A_VOCABULARY = re.compile(
    r"(?:bos|eos|pad|unk|sep|cls|mask|eot|eom|[be]o[iav]|image|audio|video)_token$", re.IGNORECASE
)
"""Names that end in ``token`` and mean a piece of text."""

_OPEN = frozenset({"chat_template_kwargs", "special_tokens"})
"""Keys with pieces of text under any name: ``user_token``, say."""

_ACCOUNT = re.compile(r"^([a-z][a-z0-9+.-]*://)[^/\s]+(@[^/@\s]*(?:/\S*)?)$", re.IGNORECASE)
"""An address with a user and a password (or a token) in it."""


_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|AKIA[0-9A-Z]{16})\b"
)
"""Patterns of secrets of well-known services, anywhere in a text."""

_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+:[^/\s@]+@", re.IGNORECASE)
"""An address with a user and a password within a text."""


def scrub(text: str) -> str:
    """A text, such as a library's error, without what looks like a secret."""
    return _LOGIN.sub(rf"\1{HIDDEN}@", _TOKEN.sub(HIDDEN, text))


def hide(value: Any, secret: bool = False) -> Any:
    """A recipe, or a part of one at any depth, as plain data without its secrets.

    Only text is hidden: ``hf_use_auth_token: true`` tells nothing. ``secret``: the value belongs to
    a key that is a secret.
    """
    if isinstance(value, Mapping):
        return {
            key: inner if key in _OPEN else hide(inner, secret or _is_secret(str(key)))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [hide(inner, secret) for inner in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if secret and value else scrub(_ACCOUNT.sub(rf"\1{HIDDEN}\2", value))


def without_hidden(value: Any) -> Any:
    """A recipe as a run has left it, without the keys that ``hide`` has emptied.

    Its readers then fall back on the environment, such as the token of ``hf auth login``.
    """
    if isinstance(value, Mapping):
        return {key: without_hidden(inner) for key, inner in value.items() if inner != HIDDEN}
    if isinstance(value, list):
        return [without_hidden(inner) for inner in value if inner != HIDDEN]
    return value


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and not _OF_A_VOCABULARY.search(name)
