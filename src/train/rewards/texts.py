"""Completions to look at: some of those that were generated, with their rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..printable import printable
from .built_in import text_of

FEW = 4
"""Completions of a generation that are shown, where the recipe does not say."""

_LONGEST = 2_000
"""Characters of a text that are kept."""

Shown = dict[str, Any]
"""``step``, ``prompt``, ``completion``, ``rewards`` by their names, and ``advantage``."""


def shown(generated: Mapping[str, Any], step: int, each: int, most: int | None) -> list[Shown]:
    """Some completions of a generation, of as many prompts as there are.

    Args:
        generated: ``prompt``, ``completion`` and ``advantages`` of each, and ``rewards`` by name.
        step: which they are for.
        each: completions of each prompt.
        most: how many to show; None: a few.
    """
    prompts, completions = list(generated["prompt"]), list(generated["completion"])
    advantages = list(generated["advantages"])
    rewards = {name: list(values) for name, values in generated["rewards"].items()}
    order = sorted(range(len(prompts)), key=lambda i: (i % each, i))[: most or FEW]
    return [
        {
            "step": step,
            "prompt": _cut(_prompt(prompts[i])),
            "completion": _cut(text_of(completions[i])),
            "rewards": {name: values[i] for name, values in rewards.items()},
            "advantage": advantages[i],
        }
        for i in sorted(order)
    ]


def _prompt(prompt: Any) -> str:
    """The text of a prompt; messages with their roles before them."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role', '')}: {m.get('content') or ''}" for m in prompt)


def _cut(text: str) -> str:
    """The beginning of a text; a model also writes characters that no JSON may hold."""
    return printable(text if len(text) <= _LONGEST else text[:_LONGEST] + " …")
