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
QWEN3_5 = (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "<think>\n{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{% endif %}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GEMMA4 = (
    "{{ bos_token }}{% for m in messages %}<|turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|image|>{% else %}{{ c.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}[IMG]{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}[/INST]{% else %}"
    "{{ m.content if m.content is string else m.content[0].text }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
IDEFICS = (
    "START{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% elif c.type == 'image' %}"
    "<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""It writes contents of parts only."""

SMOL = IDEFICS.replace("START", "<|im_start|>").replace(
    "{% if m.content[0].type == 'image' %}",
    "{% if m.content is string %}: {{ m.content }}{% elif m.content[0].type == 'image' %}",
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""The header of the next turn ends an answer; the real one leaves the last answer open."""

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
        **_qwen_ids(words),
    )  # fmt: skip
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32
    )
    videos = transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    processor = transformers.Qwen2_5_VLProcessor(
        images, words, videos, chat_template=words.chat_template
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen_ids(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = dict(zip(_QWEN_MARKS, words.convert_tokens_to_ids(_QWEN_MARKS), strict=True))
    return {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "tie_word_embeddings": False,
    }  # fmt: skip


_QWEN3_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 4,
    "out_hidden_size": WIDTH, "patch_size": 4, "spatial_merge_size": 2,
    "num_position_embeddings": 64,
}  # fmt: skip
_MROPE: dict[str, Any] = {
    "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    "rope_theta": 10000.0,
}  # fmt: skip


def _qwen3_processor(words: PreTrainedTokenizerFast) -> Any:
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32
    )
    videos = transformers.Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
    return transformers.Qwen3VLProcessor(images, words, videos, chat_template=words.chat_template)


def _qwen3_vl() -> tuple[Any, Any]:
    words = _qwen_words()
    config = transformers.Qwen3VLConfig(
        text_config=text_config(words, rope_parameters=_MROPE),
        vision_config={**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
        **_qwen_ids(words),
    )
    return transformers.Qwen3VLForConditionalGeneration(config), _qwen3_processor(words)


def _qwen3_5() -> tuple[Any, Any]:
    # transformers' class for it adds the last one where it is missing
    words = tokenizer([*_CHAT_ENDS, *_QWEN_MARKS, "<|endoftext|>"], QWEN3_5)
    text = text_config(
        words, rope_parameters={**_MROPE, "partial_rotary_factor": 1.0}, partial_rotary_factor=1.0,
        layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=_QWEN3_VISION, **_qwen_ids(words)
    )
    return transformers.Qwen3_5ForConditionalGeneration(config), _qwen3_processor(words)


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


def _gemma4() -> tuple[Any, Any]:
    words = tokenizer(
        ["<|turn>", "<turn|>", "<|video|>"], GEMMA4, image_token="<|image|>", boi_token="<|image>",
        eoi_token="<image|>", audio_token="<|audio|>", boa_token="<|audio>", eoa_token="<audio|>",
    )  # fmt: skip
    named = ["<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>"]
    soft, begin, end, audio, begin_audio, end_audio, video = words.convert_tokens_to_ids(named)
    config = transformers.Gemma4Config(
        text_config=text_config(
            words, global_head_dim=16, sliding_window=64, use_bidirectional_attention="vision",
            layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=len(words), hidden_size_per_layer_input=4,
        ),
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 2,
            "pooling_kernel_size": 3, "position_embedding_size": 256,
        },
        image_token_id=soft, boi_token_id=begin, eoi_token_id=end, audio_token_id=audio,
        boa_token_id=begin_audio, eoa_token_index=end_audio, video_token_id=video,
    )  # fmt: skip
    images = transformers.Gemma4ImageProcessor(
        patch_size=2, pooling_kernel_size=3, max_soft_tokens=70
    )
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(), images, words,
        transformers.Gemma4VideoProcessor(patch_size=2, pooling_kernel_size=3),
        chat_template=words.chat_template, image_seq_length=70,
    )  # fmt: skip
    return transformers.Gemma4ForConditionalGeneration(config), processor


def _mistral3() -> tuple[Any, Any]:
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    words = tokenizer([*marks, "[IMG]", "[IMG_BREAK]", "[IMG_END]"], MISTRAL)
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **text_config(words)},
        vision_config={
            "model_type": "pixtral", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4,
        },
        image_token_index=words.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = transformers.PixtralImageProcessor(
        size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}
    )
    processor = transformers.PixtralProcessor(
        images, words, patch_size=4, spatial_merge_size=2, chat_template=words.chat_template
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    words = tokenizer(
        _CHAT_ENDS, CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"), start_image_token="<img>",
        end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(words)},
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": [32, 32], "patch_size": [8, 8],
        },
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, max_patches=4)
    processor = transformers.InternVLProcessor(
        images, words, transformers.InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4, chat_template=words.chat_template,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config), processor


_TILES = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
_IDEFICS_VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_IDEFICS_SIZES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def _smolvlm() -> tuple[Any, Any]:
    words = tokenizer(
        ["<|im_start|>", *_TILES], SMOL, image_token="<image>",
        fake_image_token="<fake_token_around_image>", end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )  # fmt: skip
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **text_config(words)},
        vision_config=_IDEFICS_VISION, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**_IDEFICS_SIZES), words,
        transformers.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=words.chat_template,
    )  # fmt: skip
    return transformers.SmolVLMForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    template = IDEFICS.replace("START", "{{ bos_token }}")
    words = tokenizer([*marks, *_TILES], template)
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **text_config(words)},
        vision_config=_IDEFICS_VISION, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(**_IDEFICS_SIZES), words, image_seq_len=4,
        chat_template=template,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _glm4v() -> tuple[Any, Any]:
    roles = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    of_images = ["<|image|>", "<|begin_of_image|>", "<|end_of_image|>"]
    of_videos = ["<|video|>", "<|begin_of_video|>", "<|end_of_video|>"]
    words = tokenizer([*roles, *of_images, *of_videos], GLM)
    image, begin_image, end_image = words.convert_tokens_to_ids(of_images)
    video, begin_video, end_video = words.convert_tokens_to_ids(of_videos)
    config = transformers.Glm4vConfig(
        text_config=text_config(
            words, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1],
                             "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        vision_config={
            "depth": 2, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 4,
            "out_hidden_size": WIDTH, "image_size": 32, "patch_size": 4, "spatial_merge_size": 2,
        },
        image_token_id=image, image_start_token_id=begin_image, image_end_token_id=end_image,
        video_token_id=video, video_start_token_id=begin_video, video_end_token_id=end_video,
    )  # fmt: skip
    images = transformers.Glm4vImageProcessor(
        patch_size=4, merge_size=2,
        size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 32 * 32},
    )  # fmt: skip
    videos = transformers.Glm4vVideoProcessor(patch_size=4, merge_size=2)
    processor = transformers.Glm4vProcessor(
        images, words, videos, chat_template=words.chat_template
    )
    return transformers.Glm4vForConditionalGeneration(config), processor


FAMILIES = {
    name: Family(name, make)
    for name, make in {
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "qwen3_5": _qwen3_5,
        "gemma3": _gemma3,
        "gemma4": _gemma4,
        "mistral3": _mistral3,
        "llava": _llava,
        "internvl": _internvl,
        "smolvlm": _smolvlm,
        "idefics3": _idefics3,
        "glm4v": _glm4v,
    }.items()
}
