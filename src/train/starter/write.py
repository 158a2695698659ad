"""The recipe as YAML, with a comment above each choice that says why."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from ..printable import shown
from .choose import Draft

_GROUPS = {
    "adapter": "What is trained",
    "datasets": "The rows",
    "sequence_len": "Sequences and batches",
    "num_epochs": "Optimization",
    "bf16": "The machine",
    "output_dir": "The results",
}
"""The key that a group begins with -> its title."""

_WIDTH = 96


def to_yaml(draft: Draft, head: Sequence[str]) -> str:
    """The text of the file.

    Args:
        draft: the keys with their reasons.
        head: what is said first, a paragraph each.
    """
    lines = [line for paragraph in head for line in _comment(paragraph)]
    for key, value in draft.values.items():
        if key in _GROUPS:
            lines += ["", f"# --- {_GROUPS[key]} ---"]
        elif draft.why.get(key):
            lines.append("")
        lines += _comment(draft.why.get(key, ""))
        lines += _entry(key, value)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    """Lines of a comment; nothing in the text can end it."""
    return textwrap.wrap(
        shown(text).replace("\n", " "), _WIDTH, initial_indent="# ", subsequent_indent="# ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _entry(key: str, value: Any) -> list[str]:
    if isinstance(value, float):  # YAML reads 2e-05 as text, and 2.0e-5 as a number
        return [f"{key}: {value:.6f}".rstrip("0")]
    text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return text.rstrip("\n").splitlines()
