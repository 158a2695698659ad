"""What PEFT's tests load from the hub, made here: random models, a tokenizer and a few quotes.

A model has the architecture that the name on the hub says. Where the hub cannot be reached, tests
would otherwise wait for it and fail.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import torch

_SIZES = {
    "vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_ARCHITECTURES = {
    "opt": ("OPTForCausalLM", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000}),
    "gptj": (
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 1000},
    ),
    "llama": ("LlamaForCausalLM", _SIZES),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", _GROUPED),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "llama4": (
        "Llama4ForCausalLM",
        {**_GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4},
    ),
    "gptoss": ("GptOssForCausalLM", {**_GROUPED, "head_dim": 8, "num_local_experts": 4}),
}
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_NAMES = "|".join(sorted(_ARCHITECTURES, key=len, reverse=True))
_TINY = re.compile(rf"^[\w-]+/(?:tiny-.*?)?({_NAMES})")
"""The name of a small model on the hub, and the architecture in it."""
_QUOTES = "ybelkada/english_quotes_copy"


def install(folder: pathlib.Path) -> None:
    """Redirect ``from_pretrained`` and ``load_dataset``; models are saved in ``folder``."""
    import datasets
    import transformers

    def local(name: Any) -> Any:
        found = _TINY.search(str(name).lower())
        return name if found is None else str(_made(folder, found[1]))

    def redirect(kind: Any) -> None:
        original = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            return original(cls, *map(local, args[:1]), *args[1:], **kwargs)

        kind.from_pretrained = classmethod(from_pretrained)

    for kind in (
        transformers.AutoModelForCausalLM,
        transformers.AutoConfig,
        transformers.PreTrainedModel,
        transformers.PreTrainedConfig,
    ):
        redirect(kind)
    tokenizer, load = transformers.AutoTokenizer.from_pretrained, datasets.load_dataset
    transformers.AutoTokenizer.from_pretrained = lambda name, *args, **kwargs: tokenizer(
        local(name), *args, **kwargs
    )
    datasets.load_dataset = lambda name, *args, **kwargs: (
        _quotes() if name == _QUOTES else load(name, *args, **kwargs)
    )


def _made(folder: pathlib.Path, architecture: str) -> pathlib.Path:
    """The folder of a random model of ``architecture`` and its tokenizer."""
    import transformers

    path = folder / architecture
    if not (path / "tokenizer.json").exists():
        name, sizes = _ARCHITECTURES[architecture]
        kind = getattr(transformers, name)
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        kind(kind.config_class(**sizes, **special)).save_pretrained(path)
        _tokenizer().save_pretrained(path)
    return path


def _tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def _quotes() -> Any:
    from datasets import Dataset, DatasetDict

    rows = [f"Whoever has counted to {n} can count to {n + 1}." for n in range(40)]
    return DatasetDict({"train": Dataset.from_dict({"quote": rows})})
