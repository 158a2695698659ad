"""The keys of the model and of its tokenizer: where they are, and what is changed in them."""

from __future__ import annotations

from typing import Any

from .base import Keys, key


class SpecialTokens(Keys):
    """``special_tokens``: the tokens that play a part, by the part that they play."""

    bos_token: str | None = None
    """The token at the beginning of a text. Unset: the tokenizer's own."""

    eos_token: str | None = None
    """The token at the end of a text and of an answer. Unset: the tokenizer's own."""

    pad_token: str | None = None
    """The padding token. Unset: the tokenizer's own, or one that no text contains."""

    unk_token: str | None = None
    """The token for what is not in the vocabulary. Unset: the tokenizer's own."""

    additional_special_tokens: list[str] | None = None
    """Further tokens that are never split. Unset: the tokenizer's own."""


class ModelKeys(Keys):
    """Where the model and the tokenizer come from."""

    base_model: str
    """A Hugging Face id, a folder, a ``.gguf`` file, or ``package:NAME`` for the model that an
    installed Python package ships."""

    base_model_config: str | None = None
    """Where the model's configuration is loaded from, like ``base_model``. Unset: with the
    weights."""

    revision_of_model: str | None = key(aliases=["model_revision"])
    """Branch, tag or commit of ``base_model`` on the hub. Unset: its main branch."""

    model_type: str | None = key(aliases=["type_of_model"])
    """The class of transformers that loads the model, e.g. ``LlamaForCausalLM``. Unset, or
    ``AutoModelForCausalLM``: the class that the model's configuration names, also where that is a
    multimodal one."""

    language_model_only: bool = False
    """Of a checkpoint with towers for images or sound, load the language model alone, which is all
    that text trains: it takes less memory. What is saved has the towers of the base all the same.
    False: they are loaded, and frozen."""

    cls_model_config: str | None = None
    """The class of transformers that reads the configuration, e.g. ``LlamaConfig``. Unset:
    ``AutoConfig``."""

    trust_remote_code: bool = False
    """The model or its tokenizer needs Python code that comes with it. It is run only with
    ``--trust-remote-code`` on the command line; otherwise transformers' own classes are used."""

    overrides_of_model_config: dict[str, Any] | None = key(aliases=["model_config"])
    """Values of the model's configuration that are set before it is built, e.g.
    ``{rope_theta: 1000000}``. Unset: none."""

    overrides_of_model_kwargs: dict[str, Any] | None = key(aliases=["model_kwargs"])
    """Further arguments for transformers' ``from_pretrained``. Unset: none."""

    # --- tokenizer -------------------------------------------------------------------------------

    tokenizer_config: str | None = None
    """Where the tokenizer is loaded from, like ``base_model``. Unset: with the model."""

    tokenizer_type: str | None = None
    """The class of transformers that loads the tokenizer. Unset: ``AutoTokenizer``."""

    tokenizer_use_fast: bool = True
    """Use the fast tokenizer (in Rust). Masks by offsets need it."""

    tokenizer_legacy: bool | None = None
    """The ``legacy`` argument of old Llama tokenizers. Unset: the tokenizer's own choice."""

    special_tokens: SpecialTokens | None = None
    """Tokens that replace the tokenizer's own ``bos_token``, ``eos_token``, ``pad_token`` and so
    on. Unset: none are replaced."""

    tokens: list[str] | None = None
    """Tokens to add to the vocabulary; with keys and values: the old spelling of
    ``special_tokens``. Unset: none."""

    added_tokens_overrides: dict[int, str] | None = None
    """New texts for reserved tokens of the vocabulary, by their ids. Unset: none."""

    resize_token_embeddings_to_32x: bool = False
    """Round the number of embedding rows up to a multiple of 32 when it grows."""

    mean_resizing_embeddings: bool = False
    """Initialize new embedding rows with the mean of the old ones. False: randomly."""

    shrink_embeddings: bool = False
    """Remove embedding rows that belong to no token of the tokenizer."""

    chat_template: str | None = None
    """The chat template: ``tokenizer_default``, a name such as ``chatml`` or ``llama3``,
    ``tokenizer_default_fallback_NAME``, or ``jinja``. Names of templates that only the tokenizers
    of some models bring, such as ``qwen3``, take the tokenizer's own. Unset: the same."""

    chat_template_jinja: str | None = None
    """The template itself, as Jinja text or as the path of a file. Unset: see
    ``chat_template``."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the template, e.g. ``{enable_thinking: false}``, in training and in generation.
    Unset: none."""

    default_system_message: str | None = None
    """The system message of chats (and of questions to the trained model) that have none, for
    templates that use one. Unset: the template's own."""

    tokenizer_use_mistral_common: bool = False
    """Take tokens and chats from a ``tekken.json``, as the package ``mistral-common`` writes them.
    It must be installed."""
