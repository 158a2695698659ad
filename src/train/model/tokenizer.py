"""Loads the tokenizer of a recipe, with its tokens and its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..chat_templates import find_template
from ..recipe.locate import locate
from ..recipe.preferences import head_of
from ..recipe.recipe import Recipe

_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<unk>")
"""Tokens that vocabularies have for padding, or that no text contains."""


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the tokenizer of ``base_model``, or of ``tokenizer_config``, and set it up.

    It gets the recipe's ``special_tokens``, ``tokens``, ``added_tokens_overrides`` and chat
    template, and a token to pad with; see ``pad_token``. Raises a RecipeError if there is none, it
    cannot be read, or it cannot be set up as the recipe says.
    """
    from .from_pretrained import class_by_name, pretrained  # slow to import

    name = recipe.tokenizer_config or recipe.base_model
    # always passed: where it is missing, transformers asks on the terminal
    options: dict[str, Any] = {"trust_remote_code": recipe.consent.trust_remote_code}
    if not recipe.tokenizer_use_fast:
        options["use_fast"] = False
    if recipe.tokenizer_legacy is not None:
        options["legacy"] = recipe.tokenizer_legacy
    if recipe.revision_of_model and name == recipe.base_model and not Path(name).exists():
        options["revision"] = recipe.revision_of_model
    if recipe.tokenizer_use_mistral_common:
        options["mistral_format"] = False  # as a fast tokenizer, which tells where tokens come from
    factory = class_by_name(
        recipe.tokenizer_type, "AutoTokenizer", "PreTrainedTokenizerBase", "tokenizer_type"
    )
    key = "tokenizer_config" if recipe.tokenizer_config else "base_model"
    tokenizer = pretrained(factory, name, kind="tokenizer", key=key, **options)
    if recipe.tokenizer_use_mistral_common:
        _complete_from_tekken(tokenizer, name, options.get("revision"))
    _override(tokenizer, recipe)
    _add(tokenizer, recipe)
    _choose_pad(tokenizer)
    template = find_template(recipe.chat_template, recipe.chat_template_jinja, tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


_OF_TEKKEN = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def _complete_from_tekken(tokenizer: Any, name: str, revision: str | None) -> None:
    """Set up a tokenizer of a ``tekken.json`` as the package mistral-common does.

    transformers has made a fast tokenizer of the file, with the same tokens; the chat template is
    the one that mistral-common writes for the file's version. Raises a RecipeError if there is no
    such file, or no template for its version.
    """
    from mistral_common.integrations.chat_templates import chat_templates
    from transformers.integrations.mistral.tokenizer import resolve_mistral_format

    key = "tokenizer_use_mistral_common"
    source = locate(name, [Path.cwd()]).name
    try:
        _, file = resolve_mistral_format(source, mistral_format=True, revision=revision)
    except OSError:
        raise RecipeError(f"{key}: {name} has no tekken.json: leave the key out") from None
    try:
        tokenizer.chat_template = chat_templates.convert_tokenizer_to_chat_template(file)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise RecipeError(f"{key}: there is no chat template for {file}: {error}") from error
    missing = {k: v for k, v in _OF_TEKKEN.items() if getattr(tokenizer, k) is None}
    tokenizer.add_special_tokens({k: v for k, v in missing.items() if v in tokenizer.get_vocab()})
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()


def _override(tokenizer: Any, recipe: Recipe) -> None:
    if not recipe.added_tokens_overrides:
        return
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in state["added_tokens"]}
    vocabulary = state["model"].get("vocab")
    for number, text in recipe.added_tokens_overrides.items():
        if number not in added:
            raise RecipeError(
                f"added_tokens_overrides: {number} is not an added token of the tokenizer; those "
                f"have the ids {min(added, default=0)} to {max(added, default=0)}"
            )
        old = added[number]["content"]
        added[number]["content"] = text
        if isinstance(vocabulary, dict) and old in vocabulary:
            vocabulary[text] = vocabulary.pop(old)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _add(tokenizer: Any, recipe: Recipe) -> None:
    special = recipe.special_tokens.model_dump(exclude_none=True) if recipe.special_tokens else {}
    extra = special.pop("additional_special_tokens", None)
    if special:
        tokenizer.add_special_tokens(special)
    if extra:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": extra}, replace_extra_special_tokens=False
        )
    if recipe.tokens:
        from tokenizers import AddedToken

        tokenizer.add_tokens(
            [AddedToken(t, rstrip=False, lstrip=False, normalized=False) for t in recipe.tokens]
        )


def _choose_pad(tokenizer: Any) -> None:
    """Take a token of the vocabulary to pad with; the end-of-text token only if there is no other.

    Padding is never trained (``data.packing``), so that this cannot untrain the end of a text. A
    separate pad token keeps other programs from masking the end of text by its id.
    """
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    pad = next((t for t in _PADS if t in vocabulary and t != tokenizer.eos_token), None)
    tokenizer.pad_token = pad or tokenizer.eos_token


def pad_token(tokenizer: Any) -> int:
    """The id of the tokenizer's pad token, or of another that surely exists."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def set_padding(config: Any, recipe: Recipe) -> None:
    """Tell a classifier which token fills up batches: it reads a text at the last other token.

    ``config`` is changed in place; that of a language model is left as it is.
    """
    if not head_of(recipe).classifies:
        return
    token = pad_token(load_tokenizer(recipe))
    for part in (config, config.get_text_config()):
        part.pad_token_id = token


# --- prompts of a trained model ------------------------------------------------------------------


Message = dict[str, Any]
"""``role`` and ``content``: text, or parts that are texts and images."""

_CONVERSATIONS = ("chat_template", "sharegpt", "prompt_completion")
"""The types of rows that ``default_system_message`` is added to."""


@dataclass(frozen=True)
class ChatPrompt:
    """What prompts have besides the user's words.

    Attributes:
        variables: what the chat template reads: ``chat_template_kwargs``.
        system: the system text of prompts that have none, or None: ``default_system_message``.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> ChatPrompt:
        """The prompts that ``recipe`` trains, as in ``run.json``; keys may be missing or odd."""
        variables, system = (
            recipe.get(key) for key in ("chat_template_kwargs", "default_system_message")
        )
        if not (isinstance(system, str) and system and _adds_system(recipe)):
            system = None
        return cls(variables if isinstance(variables, Mapping) else {}, system)

    def question(self, text: str) -> list[Message]:
        """The conversation that begins with the user's ``text``."""
        return with_system([{"role": "user", "content": text}], self.system)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """``messages`` with a system text before them, unless they have one."""
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _adds_system(recipe: Mapping[str, Any]) -> bool:
    for key in ("datasets", "pretraining_dataset"):
        rows = recipe.get(key)
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, Mapping) and not row.get("drop_system_message"):
                kind = str(row.get("type", "chat_template"))
                if kind.removesuffix(".load").removesuffix(".default") in _CONVERSATIONS:
                    return True
    return False
