"""Heads of models in which a tower or an encoder stands beside the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from fusewright.compiler.regions import find
from tests.explained import explain

from ..models.architectures import shrink
from ..models.tiny import Stack, assert_equal_losses, pair
from ..versions import transformers_before
from .test_flat_models import Block

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
_GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 200, (2, 13), generator=_GENERATOR)
PIXELS = torch.randn(2, 3, 16, 16, generator=_GENERATOR)
BOXES = torch.rand(2, 13, 4, generator=_GENERATOR)

HEADS = {
    "blip": ("text_decoder", [("bert",)]),
    "blip-2": ("language_model", [("model",)]),
    "instructblip": ("language_model", [("model",)]),
    "instructblipvideo": ("language_model", [("model",)]),
    "kosmos-2": ("text_model", [("model",)]),
    "kosmos-2.5": ("text_model", [("model",)]),
    "llama4": ("language_model", [("model",)]),
    "pix2struct": ("decoder", [("layer",)]),
    "qwen2_5_omni": ("thinker", [("model",)]),
    "udop": ("", [("encoder",), ("decoder",)]),
    "vision-encoder-decoder": ("decoder", [("bert",)]),
    "pi0": None,  # its loss is the error of actions
}


@pytest.mark.long("qwen2_5_omni", "kosmos-2", "kosmos-2.5")
@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_where_the_logits_are_made(name: str) -> None:
    of, old = CONFIG_MAPPING[name], transformers_before("5.24")
    if name == "vision-encoder-decoder" and old:
        pytest.skip("before transformers 5.24 its configuration has no defaults")
    with torch.device("meta"):
        model = MODEL_FOR_MULTIMODAL_LM_MAPPING[of](shrink(of()))
    heads = [(r.path, list(r.outside)) for r in find(model) if r.kind == "head"]
    expected = HEADS[name]
    if name == "qwen2_5_omni" and old:  # the forward with the head calls the towers itself
        expected = ("thinker", [("audio_tower",), ("visual",), ("model",)])
    assert heads == ([] if expected is None else [expected])


TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    image_size=16, patch_size=8,
)  # fmt: skip
TEXT = dict(vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


def _blip() -> nn.Module:
    text = dict(
        TEXT, encoder_hidden_size=32, num_attention_heads=4, max_position_embeddings=64,
        bos_token_id=1, sep_token_id=2, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return tf.BlipForConditionalGeneration(tf.BlipConfig(text_config=text, vision_config=TOWER))


def _blip_2() -> nn.Module:
    config = shrink(CONFIG_MAPPING["blip-2"]())
    config.vision_config.image_size, config.vision_config.patch_size = 16, 8
    config.num_query_tokens, config.image_token_index = 4, 210
    return tf.Blip2ForConditionalGeneration(config)


def _udop() -> nn.Module:
    config = shrink(CONFIG_MAPPING["udop"]())
    config.image_size, config.patch_size, config.decoder_start_token_id = 16, 8, 0
    return tf.UdopForConditionalGeneration(config)


def _vision_encoder_decoder() -> nn.Module:
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tf.ViTConfig(**TOWER, **off), tf.BertConfig(**TEXT, num_attention_heads=4, **off)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.VisionEncoderDecoderModel(config)


class Siblings(nn.Module):
    """A tower, an encoder and a decoder that a loop of the model's own runs, and one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(211, 16), nn.Linear(16, 211, bias=False)
        self.tower = Stack(Block("tensor") for _ in range(2))
        self.blocks = nn.ModuleList(Block("tensor") for _ in range(2))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        context = self.tower(x.flip(1))
        for block in self.blocks:
            x = block(x, context)
        logits = self.lm_head(x)
        if labels is None:
            return (logits,)
        return nn.functional.cross_entropy(logits.view(-1, 211), labels.view(-1)), logits


IMAGE_IDS = torch.cat([torch.full((2, 4), 210), IDS[:, 4:]], 1)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "blip": (_blip, {"input_ids": IDS, "pixel_values": PIXELS}),
    "blip-2": (_blip_2, {"input_ids": IMAGE_IDS, "pixel_values": PIXELS}),
    "udop": (_udop, {"input_ids": IDS, "bbox": BOXES}),
    "vision-encoder-decoder": (_vision_encoder_decoder, {"pixel_values": PIXELS}),
    "siblings": (Siblings, {"input_ids": IDS}),
}


@pytest.mark.long(*(name for name in CASES if name != "siblings"))
@pytest.mark.parametrize("name", CASES)
def test_steps_are_equal_and_the_loss_needs_no_logits(name: str) -> None:
    make, inputs = CASES[name]
    ours, eager = pair(make)

    def loss_of(model: nn.Module) -> Tensor:
        outputs = model(**inputs, labels=IDS)
        return outputs[0] if isinstance(outputs, tuple) else outputs.loss

    for _ in range(2):
        assert_equal_losses(ours, eager, loss_of)
    report = explain(ours)
    in_tiles = report.by_rule().get("linear_cross_entropy", 0) or "cross entropy" in str(report)
    assert in_tiles
    assert not [s for s in report.sites if s.status == "missed"]
    # without labels the logits are eager's
    with torch.no_grad():
        more = {"decoder_input_ids": IDS} if name in ("udop", "vision-encoder-decoder") else {}
        mine, theirs = (m.eval()(**inputs, **more) for m in (ours, eager))
    a, b = (o[0] if isinstance(o, tuple) else o.logits for o in (mine, theirs))
    torch.testing.assert_close(a + 0, b, rtol=1e-4, atol=1e-5)
