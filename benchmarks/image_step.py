"""Training steps on images, eager and optimized: full steps of one small model, in turn.

    python benchmarks/image_step.py --model qwen2_5_vl --dtype float32 --threads 2 --json FILE

The model has random weights in a published one's shape, made smaller (``MODELS``). LoRA of rank 16
is on all linear layers of the language model; the tower is frozen. Eager is plain transformers and
PEFT. Both sides step in turn on the same batches of random images with questions and answers, as
the family's own processor makes them; answers alone are trained. Time and memory as in ``moe.py``.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

import torch
from torch import Tensor

from environment import ROOT
from moe import adapted, arguments, in_turn, run

WIDE, HEADS = 512, 8


def _qwen2_5_vl(side: int) -> tuple[Any, Any]:
    """8 layers of Qwen2.5-VL's at a width of 512, and 4 of its tower at 320."""
    import transformers

    from tests.train.images import families

    words = families._qwen_words()
    marks = families._QWEN_MARKS
    ids = dict(zip(marks, words.convert_tokens_to_ids(marks), strict=True))
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **families.text_config(words, rope_parameters=rope), "vocab_size": 32768,
            "hidden_size": WIDE, "intermediate_size": 4 * WIDE, "num_hidden_layers": 8,
            "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": WIDE // HEADS,
        },
        vision_config={
            "depth": 4, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 4,
            "out_hidden_size": WIDE, "patch_size": 14, "spatial_merge_size": 2,
            "window_size": 112, "fullatt_block_indexes": [3],
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    images = transformers.Qwen2VLImageProcessor(
        patch_size=14, merge_size=2, min_pixels=side * side, max_pixels=side * side
    )
    videos = transformers.Qwen2VLVideoProcessor(patch_size=14, merge_size=2)
    processor = transformers.Qwen2_5_VLProcessor(
        images, words, videos, chat_template=words.chat_template
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _gemma3(side: int) -> tuple[Any, Any]:
    """8 layers of Gemma 3's at a width of 512, and 4 of its tower at 384."""
    import transformers

    from tests.train.images import families

    _, processor = families.FAMILIES["gemma3"].make()
    words = processor.tokenizer
    named = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    soft, begin, end = words.convert_tokens_to_ids(named)
    sizes = families.text_config(words, sliding_window=256, query_pre_attn_scalar=WIDE // HEADS)
    config = transformers.Gemma3Config(
        text_config={
            **sizes, "vocab_size": 32768, "hidden_size": WIDE, "intermediate_size": 4 * WIDE,
            "num_hidden_layers": 8, "num_attention_heads": HEADS, "num_key_value_heads": 2,
            "head_dim": WIDE // HEADS,
        },
        vision_config={
            "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4,
            "num_attention_heads": 6, "image_size": side, "patch_size": 14,
        },
        mm_tokens_per_image=64, image_token_index=soft, boi_token_index=begin, eoi_token_index=end,
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessor(size={"height": side, "width": side})
    processor = transformers.Gemma3Processor(
        images, words, chat_template=words.chat_template, image_seq_length=64
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


MODELS = {"qwen2_5_vl": _qwen2_5_vl, "gemma3": _gemma3}


def batches(
    processor: Any, count: int, rows: int, side: int, words: int
) -> list[dict[str, Tensor]]:
    """Batches of rows with an image each; the last quarter of the words is trained."""
    from PIL import Image

    drawn = random.Random(0)
    made = []
    for _ in range(count):
        texts, images = [], []
        for _ in range(rows):
            said = " ".join(drawn.choice(["red", "blue", "left", "seen"]) for _ in range(words))
            parts = [{"type": "image"}, {"type": "text", "text": said}]
            texts.append(
                processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
            )
            images.append([Image.frombytes("RGB", (side, side), drawn.randbytes(3 * side * side))])
        inputs = dict(
            processor(text=texts, images=images, padding=True, padding_side="right",
                      return_tensors="pt")
        )  # fmt: skip
        labels = inputs["input_ids"].clone()
        labels[:, : labels.shape[1] * 3 // 4] = -100
        labels[inputs["attention_mask"] == 0] = -100
        made.append({**inputs, "labels": labels})
    return made


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Step both models in turn; return the figures."""
    torch.manual_seed(0)
    model, processor = MODELS[args.model](args.side)
    model.config.get_text_config().use_cache = False
    named = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    model = adapted(model.to(getattr(torch, args.dtype)).train(), target_modules=named)
    data = batches(processor, args.warmup + args.steps, args.batch, args.side, args.words)
    return {"tokens_of_a_row": data[0]["input_ids"].shape[1], **in_turn(model, data, args)}


if __name__ == "__main__":
    parser = arguments(__doc__, tuple(MODELS))
    parser.add_argument("--side", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--words", type=int, default=40, help="of a row; each has 4 or 5 tokens")
    sys.path.insert(0, str(ROOT))  # the processors are those of the tests
    run(parser, measure)
