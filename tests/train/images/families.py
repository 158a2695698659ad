"""Tiny checkpoints of families that read images: model, processor, tokenizer, chat template.

Each is saved as its real ones are, with transformers' own processor, so that a recipe trains it.
Texts are tokenized by bytes; images have a few dozen pixels, and stand for a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WIDTH = 32
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endif %}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How a tiny checkpoint is made."""

    name: str
    make: Callable[[], tuple[Any, Any]]
    """Returns the model, in float32, and its processor with tokenizer and template."""

    def save(self, folder: Path) -> Path:
        """Write the checkpoint; returns the folder."""
        torch.manual_seed(0)
        model, processor = self.make()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder


def tokenizer(specials: list[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    """Bytes, and special tokens; ``named``: those with a name, such as ``image_token``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=named,
    )  # fmt: skip
    made.add_special_tokens({"extra_special_tokens": specials}, replace_extra_special_tokens=False)
    made.chat_template = template
    return made


def text_config(words: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Two layers of a language model."""
    return {
        "vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 2048, "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, **more,
    }  # fmt: skip


_CHAT_ENDS = ["<|im_start|>", "<|im_end|>"]
_QWEN_MARKS = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]


def _qwen_words() -> PreTrainedTokenizerFast:
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return tokenizer([*_CHAT_ENDS, *_QWEN_MARKS], template)


def _qwen2_5_vl() -> tuple[Any, Any]:
    words = _qwen_words()
    ids = dict(zip(_QWEN_MARKS, words.convert_tokens_to_ids(_QWEN_MARKS), strict=True))
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config(
            words, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1],
                                    "rope_theta": 10000.0},
        ),
        vision_config={
            "depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 4,
            "out_hidden_size": WIDTH, "patch_size": 4, "spatial_merge_size": 2,
            "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32
    )
    videos = transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    processor = transformers.Qwen2_5_VLProcessor(
        images, words, videos, chat_template=words.chat_template
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    words = tokenizer(
        ["<start_of_turn>", "<end_of_turn>"], GEMMA, image_token="<image_soft_token>",
        boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    named = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    soft, begin, end = words.convert_tokens_to_ids(named)
    config = transformers.Gemma3Config(
        text_config=text_config(words, sliding_window=64, query_pre_attn_scalar=8),
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
        mm_tokens_per_image=4, image_token_index=soft, boi_token_index=begin, eoi_token_index=end,
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(
        images, words, chat_template=words.chat_template, image_seq_length=4
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def _llava() -> tuple[Any, Any]:
    words = tokenizer(["<image>"], VICUNA)
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text_config(words)},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
            "projection_dim": WIDTH,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=16,
        vision_feature_select_strategy="default", vision_feature_layer=-2,
    )  # fmt: skip
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = transformers.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=words.chat_template,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


FAMILIES = {
    name: Family(name, make)
    for name, make in {
        "qwen2_5_vl": _qwen2_5_vl,
        "gemma3": _gemma3,
        "llava": _llava,
    }.items()
}
