"""Chat templates by name, for tokenizers without one, or recipes that set another one.

They write what the models of that name were trained on. They have no generation marks, because
other programs that read a saved template do not know them; masks come without (``data.turns``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RecipeError, did_you_mean

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
    "alternate: user, assistant, user, assistant, ...') }}{% endif %}"
)
_SYSTEM_APART = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% set asked = namespace(first=0, last=(turns | length - 1) // 2 * 2) %}"
)


def _mistral(begin: str, end: str, answer: str, place: str) -> str:
    """The ``[INST]`` family; the system message is in the question at ``place`` (first, last)."""
    return (
        f"{_SYSTEM_APART}{{{{ bos_token }}}}{{% for message in turns %}}{_ALTERNATE}"
        f"{{% if message['role'] == 'user' %}}{{{{ '{begin}' }}}}"
        f"{{% if loop.index0 == asked.{place} and system is defined %}}"
        "{{ system + '\\n\\n' }}{% endif %}"
        f"{{{{ message['content'] + '{end}' }}}}"
        f"{{% elif message['role'] == 'assistant' %}}"
        f"{{{{ '{answer}' + message['content'] + eos_token }}}}"
        "{% else %}{{ raise_exception('only user and assistant roles, and a system message at the "
        "beginning') }}{% endif %}{% endfor %}"
    )


TEMPLATES: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral_v1": _mistral(" [INST] ", " [/INST]", " ", "first"),
    "mistral_v2v3": _mistral("[INST] ", "[/INST]", " ", "last"),
    "mistral_v3_tekken": _mistral("[INST]", "[/INST]", "", "last"),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        f"{{% for message in messages %}}{_ALTERNATE}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "phi_3": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\\n' + message['content'] + '<|end|>\\n<|assistant|>\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>\\n' }}"
        "{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}
"""The templates, as Jinja."""

ALIASES = {"inst": "mistral_v1", "mistral": "mistral_v1", "gemma2": "gemma", "phi3": "phi_3"}
"""Aliases of the same templates."""

_CHATML, _COHERE, _GEMMA = ("<|im_start|>",), ("<|START_OF_TURN_TOKEN|>",), ("<start_of_turn>",)

TOKENIZER_TEMPLATES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qwen_25", "qwen3", "qwen3_5", "qwen2_vl", "falcon_h1"), _CHATML),
    **dict.fromkeys(("cohere", "aya"), _COHERE),
    **dict.fromkeys(("command_a", "command_a_tool_use", "command_a_rag"), _COHERE),
    **dict.fromkeys(("gemma3", "gemma3n"), _GEMMA),
    **dict.fromkeys(("gemma4", "gemma4_unified"), ("<|turn>",)),
    **dict.fromkeys(("exaone", "exaone4"), ("[|assistant|]",)),
    "nemotron_h": ("<|im_start|>", "<SPECIAL_11>"),
    "deepseek_v2": ("<｜User｜>", "User: "),
    "deepseek_v3": ("<｜User｜>",),
    "jamba": ("<|bom|>",),
    "llama3_2_vision": ("<|start_header_id|>",),
    "llama4": ("<|header_start|>",),
    "llava": ("USER:",),
    "metharme": ("<|model|>",),
    "mistral_v7_tekken": ("[SYSTEM_PROMPT]",),
    "phi_35": ("<|user|>",),
    "phi_4": ("<|im_sep|>",),
    "pixtral": ("[INST]",),
}
"""Names of templates that the tokenizers of these models bring: the tokenizer's own is taken. One
of the marks is in it."""

_FALLBACK = "tokenizer_default_fallback_"


def find_template(name: str | None, jinja: str | None, tokenizer: Any) -> Any:
    """The chat template of the keys ``chat_template`` and ``chat_template_jinja``.

    ``jinja`` is Jinja text, or the path of a file with it.

    Returns:
        Jinja text; the tokenizer's own (text, or several by name); or None, where it has none.

    Raises:
        RecipeError: there is no template of this name, or no file at this path.
    """
    default = getattr(tokenizer, "chat_template", None) or None
    if jinja and name in (None, "jinja"):
        return _jinja(jinja)
    if name is None or name == "tokenizer_default":
        return default
    if name == "jinja":
        raise RecipeError("chat_template: jinja needs chat_template_jinja, the template itself")
    if name.startswith(_FALLBACK):
        return default or _named(name.removeprefix(_FALLBACK))
    return _checked(name, default) if name in TOKENIZER_TEMPLATES else _named(name)


def unknown_template(name: str) -> str | None:
    """The problem with a value of ``chat_template``, or None."""
    name = name.removeprefix(_FALLBACK)
    known = sorted([*TEMPLATES, *ALIASES, *TOKENIZER_TEMPLATES])
    if name in known or name in ("tokenizer_default", "jinja"):
        return None
    hint = did_you_mean(name, known) or f"there are {', '.join(known)}."
    return (
        f"there is no template {name!r} here; {hint} Leave chat_template out to take the "
        "tokenizer's own, or write it out in chat_template_jinja"
    )


def _checked(name: str, template: Any) -> Any:
    """The tokenizer's template; RecipeError if there is none, or one of another kind."""
    if template is None:
        raise RecipeError(
            f"chat_template: {name} is what the tokenizers of these models bring, and this one "
            "brings no template: name another in tokenizer_config, such as that of the instruct "
            "model, or write the template out in chat_template_jinja"
        )
    if not any(mark in str(template) for mark in TOKENIZER_TEMPLATES[name]):
        raise RecipeError(
            f"chat_template: {name}: the tokenizer's own template is of another kind (it has no "
            f"{TOKENIZER_TEMPLATES[name][0]}): leave chat_template out to take it, or write the "
            "one that you want out in chat_template_jinja"
        )
    return template


def _named(name: str) -> str:
    if name in TOKENIZER_TEMPLATES:  # as a fallback, for a tokenizer without a template
        return str(_checked(name, None))
    template = TEMPLATES.get(ALIASES.get(name, name))
    if template is None:
        raise RecipeError(f"chat_template: {unknown_template(name)}")
    return template


def _jinja(text: str) -> str:
    if "{" in text or "\n" in text:
        return text
    path = Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"chat_template_jinja: {text} cannot be read: {error}") from None
