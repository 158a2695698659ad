"""Checkpoints in small: of the same type as one on the hub, with random weights and a tokenizer."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto as auto

from fusewright.train.chat_templates import ALIASES, TEMPLATES, TOKENIZER_TEMPLATES

from ...models import special
from ...models.architectures import shrink

VOCAB, POSITIONS = 512, 512


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is.

    Attributes:
        model_type: as its config.json has it; None: there is no twin of it.
        text_type: of its language model, where that is not the default one.
        guess: whether the type is only likely.
        stored: the format of its weights, where they are not plain.
        parts: keys of its configuration that are not the default ones.
        why_not: why there is no twin.
    """

    model_type: str | None
    text_type: str | None = None
    guess: bool = False
    stored: str | None = None
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    why_not: str | None = None

    def __str__(self) -> str:
        text = f"{self.model_type}+{self.text_type}" if self.text_type else str(self.model_type)
        return f"{text}?" if self.guess else text


@functools.cache
def _table() -> dict[str, Any]:
    text = (Path(__file__).parent / "checkpoints.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def kind_of(name: str) -> Kind:
    """What the checkpoint ``name`` is: by the table, else by a registered type in its name."""
    table = _table()
    stored = table["stored"].get(name)
    if name in table["foreign"]:
        return Kind(None, stored=stored, why_not=table["foreign"][name])
    for types, names in table["types"].items():
        if name in names:
            model_type, _, text_type = types.partition("+")
            guess, parts = name in table["guesses"], table["parts"].get(name, {})
            return Kind(model_type, text_type or None, guess, stored, parts)
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    fits = [t for t in CONFIG_MAPPING if re.sub(r"[^a-z0-9]", "", t) in plain]
    if not fits:
        return Kind(None, why_not="its type is not known")
    return Kind(max(fits, key=len), guess=True)


def make_checkpoint(kind: Kind, tokenizer: Any, folder: Path) -> str:
    """Write a small model of ``kind`` and ``tokenizer`` into ``folder``; return its class's name.

    Weights are in bfloat16, as those of most checkpoints are.
    """
    with tiny_sizes():
        config = shrink(CONFIG_MAPPING[kind.model_type]())
        if kind.text_type:
            config.text_config = shrink(CONFIG_MAPPING[kind.text_type]())
    for part, values in kind.parts.items():
        for key, value in values.items():
            setattr(getattr(config, part) if part else config, key, value)
    mappings = (
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    )  # fmt: skip
    model_class = next(m[type(config)] for m in mappings if type(config) in m)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # zeros would hide what a part does
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    if kind.stored == "nf4":
        _store_nf4(model_class, folder)
    tokenizer.save_pretrained(folder)
    return str(model_class.__name__)


def _store_nf4(model_class: Any, folder: Path) -> None:
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = model_class.from_pretrained(folder, quantization_config=settings)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder)


@contextlib.contextmanager
def tiny_sizes() -> Iterator[None]:
    """Room for a tokenizer's vocabulary and for whole rows in the small models."""
    before = dict(special.SIZES)
    # bitsandbytes' 4-bit product on a CPU wants widths that are divisible by 32
    larger = {special.VOCAB: VOCAB, special.POSITIONS: POSITIONS, 112: 128}
    special.SIZES.update({name: larger.get(size, size) for name, size in before.items()})
    try:
        yield
    finally:
        special.SIZES.update(before)


# --- tokenizers ----------------------------------------------------------------------------------

_FIRST = ["<pad>", "<s>", "</s>", "<unk>"]
_MARK = re.compile(r"<[^<>\s'\"{}]{1,40}>|\[/?[A-Z_]{2,20}\]")
_SENTENCE_PIECE = ("LlamaTokenizer", "CodeLlamaTokenizer")


def make_tokenizer(recipe: Mapping[str, Any], texts: list[str]) -> Any:
    """A small tokenizer that is trained on ``texts`` and knows the tokens that ``recipe`` names.

    It is of the kind that the recipe's ``tokenizer_type`` reads, with a chat template.
    """
    name, end = str(recipe.get("chat_template")), (recipe.get("eot_tokens") or ["<|im_end|>"])[0]
    begin = TOKENIZER_TEMPLATES.get(name, ("<|im_start|>",))[0]  # by which its kind is known
    written = TEMPLATES.get(ALIASES.get(name, name), "")
    marks = sorted({*_MARK.findall(written), *_named(recipe), begin, end} - set(_FIRST))
    first = [*_FIRST, *marks]
    if recipe.get("tokenizer_type") in _SENTENCE_PIECE:
        tokenizer = _sentence_piece(first, texts)
    else:
        tokenizer = _byte_level(first, texts)
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = _template(begin, end)
    return tokenizer


def _named(recipe: Mapping[str, Any]) -> set[str]:
    special_tokens, tokens = recipe.get("special_tokens") or {}, recipe.get("tokens") or []
    values = [*special_tokens.values(), *(recipe.get("eot_tokens") or ())]
    values += tokens.values() if isinstance(tokens, dict) else tokens
    return {text for text in values if isinstance(text, str) and text}


def _template(begin: str, end: str) -> str:
    return (
        f"{{% for m in messages %}}{{{{ '{begin}' + m['role'] + '\n' }}}}"
        "{% if m['thinking'] is defined and m['thinking'] %}"
        "{{ '<think>' + m['thinking'] + '</think>' }}{% endif %}"
        f"{{{{ m['content'] + '{end}\n' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{begin}assistant\n' }}}}{{% endif %}}"
    )


def _byte_level(first: list[str], texts: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(first) + len(alphabet) + 60
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos, unk = _FIRST
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )


def _sentence_piece(first: list[str], texts: list[str]) -> Any:
    from json import loads

    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 16, special_tokens=[*first, *data], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token=_FIRST[0])


def class_named(name: str) -> Any:
    """A class of transformers."""
    return getattr(importlib.import_module("transformers"), name)
