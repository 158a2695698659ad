"""The tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ....errors import FusewrightError
from ...output_files import GENERATION_SETTINGS, write_generation_settings
from .template import REFUSALS, Template, in_parts

_ANSWER = "zebra"
_TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _ANSWER}]


def render_chat(
    tokenizer: Any, messages: Sequence[Any], variables: Mapping[str, Any], prompt: bool
) -> str:
    """The text of a conversation; raises a ValueError if the template refuses it.

    ``variables`` are what the template reads besides the messages; ``prompt`` appends the header of
    the next answer.
    """
    from jinja2 import TemplateError

    options = {**variables, "tokenize": False, "add_generation_prompt": prompt}
    try:
        if template_of(tokenizer, variables).in_parts:
            messages = list(map(in_parts, messages))
        text: str = tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, FusewrightError, *REFUSALS) as error:
        raise ValueError(str(error)) from None
    return text


def template_of(tokenizer: Any, variables: Mapping[str, Any]) -> Template:
    """The chat template of a tokenizer; of several, the default one."""
    return Template(tokenizer.get_chat_template(), {**tokenizer.special_tokens_map, **variables})


def stop_tokens(model: Any, tokenizer: Any, variables: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer: those of model and tokenizer, and the template's own."""
    configured = _configured(model)
    tokens = configured if isinstance(configured, list) else [configured]
    tokens = [*tokens, tokenizer.eos_token_id, _end_of_turn(tokenizer, variables)]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def unknown_stops(model: Any, tokenizer: Any, variables: Mapping[str, Any]) -> list[int]:
    """``stop_tokens``, where the model's generation settings lack one of them; else none."""
    stops, configured = stop_tokens(model, tokenizer, variables), _configured(model)
    return [] if stops in (configured, [configured]) else stops


def _configured(model: Any) -> Any:
    return getattr(getattr(model, "generation_config", None), "eos_token_id", None)


def write_stops(folder: Path, tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Let the generation settings of a saved model end answers where its chat template ends turns.

    Else other tools write on behind an answer, where the base has another end of its texts.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION_SETTINGS).is_file():
        return
    config = GenerationConfig.from_pretrained(str(folder))
    stops = unknown_stops(SimpleNamespace(generation_config=config), tokenizer, variables)
    if stops:
        config.eos_token_id = stops
        write_generation_settings(config, folder)


def _end_of_turn(tokenizer: Any, variables: Mapping[str, Any]) -> int | None:
    """The first special token that the chat template writes after an answer, or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        _, answer, after = render_chat(tokenizer, _TURNS, variables, False).rpartition(_ANSWER)
    except ValueError:  # whoever asks the model says so, with the conversation that it refuses
        return None
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if answer else []
    return next((token for token in ids if token in special), None)
