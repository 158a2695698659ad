"""Checkpoints in small that read images: with a processor, whose files a recipe's run loads."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fusewright.errors import RecipeError

from ...models.architectures import shrink
from ...train.images import families
from ...train.images.families import FAMILIES, WIDTH, text_config, tokenizer
from .checkpoint import Kind, tiny_sizes
from .rows import image

Make = Callable[[], tuple[Any, Any]]


def make_image_checkpoint(kind: Kind, folder: Path) -> str:
    """Write a small model of ``kind`` and its processor into ``folder``; return the class's name.

    Weights are in bfloat16. Raises a RecipeError if there is none of this kind.
    """
    make = MAKERS.get(str(kind).rstrip("?"))
    if make is None:
        raise RecipeError(f"no small processor of {kind} has been made")
    torch.manual_seed(0)
    model, processor = make()
    with torch.no_grad():  # zeros would hide what a part does
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    if size > model.get_input_embeddings().num_embeddings:  # the type's own class adds some
        model.resize_token_embeddings(size)
        model.save_pretrained(folder)
    return type(model).__name__


def inputs_with_image(folder: Path) -> dict[str, Tensor]:
    """The inputs of a question about an image, as the checkpoint's processor makes them."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    picture = Image.open(io.BytesIO(image(0)))
    return dict(processor(text=[text], images=[[picture]], return_tensors="pt"))


# --- families beside those of the engine's own tests ----------------------------------------------


def _with_text(family: str, text_type: str) -> tuple[Any, Any]:
    """A family's model with a language model of another type."""
    model, processor = FAMILIES[family].make()
    config = model.config
    with tiny_sizes():
        config.text_config = shrink(transformers.CONFIG_MAPPING[text_type]())
    config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    return type(model)(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    model, processor = FAMILIES["qwen2_5_vl"].make()
    config = model.config
    named = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    words = processor.tokenizer
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    made = transformers.Qwen2VLConfig(
        text_config=text_config(words, rope_parameters=rope),
        vision_config={
            "depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2, "num_heads": 4,
            "patch_size": 4, "spatial_merge_size": 2,
        },
        tie_word_embeddings=False, **{name: getattr(config, name) for name in named},
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(made), transformers.Qwen2VLProcessor(
        processor.image_processor, words, processor.video_processor,
        chat_template=words.chat_template,
    )  # fmt: skip


def _qwen3_5_moe() -> tuple[Any, Any]:
    model, processor = FAMILIES["qwen3_5"].make()
    plain = model.config.text_config.to_dict()
    plain.pop("model_type")
    config = transformers.Qwen3_5MoeConfig(
        text_config={**plain, "num_experts": 4, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        vision_config=families._QWEN3_VISION, **families._qwen_ids(processor.tokenizer),
    )  # fmt: skip
    return transformers.Qwen3_5MoeForConditionalGeneration(config), processor


def _pixtral() -> tuple[Any, Any]:
    _, other = FAMILIES["mistral3"].make()
    words = other.tokenizer
    config = transformers.LlavaConfig(
        text_config={"model_type": "mistral", **text_config(words)},
        vision_config={
            "model_type": "pixtral", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 4,
        },
        image_token_index=words.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    processor = transformers.PixtralProcessor(
        other.image_processor, words, patch_size=4, chat_template=words.chat_template
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _lfm2_vl() -> tuple[Any, Any]:
    tiles = [f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)]
    words = tokenizer(
        ["<|im_start|>", "<|im_end|>", "<|img_thumbnail|>", *tiles],
        families.CHATML.replace("IMAGE", "<image>"), image_token="<image>",
        image_start_token="<|image_start|>", image_end_token="<|image_end|>",
    )  # fmt: skip
    with tiny_sizes():
        text = shrink(transformers.Lfm2Config())
    text.pad_token_id = words.pad_token_id
    config = transformers.Lfm2VlConfig(
        text_config=text.to_dict(),
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
            "patch_size": 4, "num_patches": 256, "vision_use_head": False,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"), projector_hidden_size=WIDTH,
    )  # fmt: skip
    images = transformers.Lfm2VlImageProcessor(
        downsample_factor=2, encoder_patch_size=4, tile_size=32, min_image_tokens=4,
        max_image_tokens=16, max_num_patches=64, do_image_splitting=False,
    )  # fmt: skip
    processor = transformers.Lfm2VlProcessor(images, words, chat_template=words.chat_template)
    return transformers.Lfm2VlForConditionalGeneration(config), processor


def _paddleocr_vl() -> tuple[Any, Any]:
    marks = ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>"]
    placeholder = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    words = tokenizer(
        ["<|im_start|>", "<|im_end|>", *marks], families.CHATML.replace("IMAGE", placeholder),
        image_token="<|IMAGE_PLACEHOLDER|>",
    )  # fmt: skip
    begin, end, video = words.convert_tokens_to_ids(marks)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = transformers.PaddleOCRVLConfig(
        text_config=text_config(words, rope_parameters=rope),
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 4, "spatial_merge_size": 2,
        },
        image_token_id=words.convert_tokens_to_ids("<|IMAGE_PLACEHOLDER|>"), video_token_id=video,
        vision_start_token_id=begin, vision_end_token_id=end, tie_word_embeddings=False,
    )  # fmt: skip
    images = transformers.PaddleOCRVLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    )
    processor = transformers.PaddleOCRVLProcessor(images, words, chat_template=words.chat_template)
    return transformers.PaddleOCRVLForConditionalGeneration(config), processor


def _gemma4_unified() -> tuple[Any, Any]:
    model, other = FAMILIES["gemma4"].make()
    words, plain = other.tokenizer, model.config
    named = ("image_token_id", "boi_token_id", "eoi_token_id", "audio_token_id", "boa_token_id",
             "eoa_token_index", "video_token_id")  # fmt: skip
    config = transformers.Gemma4UnifiedConfig(
        text_config=text_config(
            words, global_head_dim=16, sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={
            "patch_size": 2, "pooling_kernel_size": 3, "mm_embed_dim": WIDTH,
            "mm_posemb_size": 64, "output_proj_dims": WIDTH,
        },
        **{name: getattr(plain, name) for name in named},
    )  # fmt: skip
    processor = transformers.Gemma4UnifiedProcessor(
        transformers.Gemma4UnifiedAudioFeatureExtractor(),
        transformers.Gemma4UnifiedImageProcessor(
            patch_size=2, pooling_kernel_size=3, max_soft_tokens=70
        ),
        words,
        transformers.Gemma4UnifiedVideoProcessor(patch_size=2, pooling_kernel_size=3),
        chat_template=words.chat_template, image_seq_length=70,
    )  # fmt: skip
    return transformers.Gemma4UnifiedForConditionalGeneration(config), processor


def _gemma3n() -> tuple[Any, Any]:
    with torch.device("meta"):  # for what it needs beside transformers
        transformers.Gemma3nForConditionalGeneration(transformers.Gemma3nConfig())
    raise RecipeError("no small processor of gemma3n has been made")


def _voxtral() -> tuple[Any, Any]:
    raise RecipeError("rows with sound are not read")


MAKERS: dict[str, Make] = {
    **{name: family.make for name, family in FAMILIES.items()},
    "gemma3n": _gemma3n,
    "gemma4_unified": _gemma4_unified,
    "lfm2_vl": _lfm2_vl,
    "llava+mistral": _pixtral,
    "mistral3+ministral3": lambda: _with_text("mistral3", "ministral3"),
    "mistral3+mistral4": lambda: _with_text("mistral3", "mistral4"),
    "paddleocr_vl": _paddleocr_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_5_moe": _qwen3_5_moe,
    "voxtral": _voxtral,
}
"""What makes a model with its processor, by the kind of a checkpoint."""
