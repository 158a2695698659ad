"""Models by the shape of their real configurations, one layer deep: 20 steps of LoRA as in eager.

Yi-6B, Falcon-7B and Mamba-130m, each with its own widths, heads and vocabulary: what only real
sizes show, such as rows of 64,000 logits and 71 heads on one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fusewright import optimize
from tests.explained import explain

STEPS = 20
TOLERANCE = 1e-4
"""Relative, of each step's loss in fp32; the adapters have been trained apart by then."""


@dataclass(frozen=True)
class Named:
    """A real model: its class, its configuration but for the depth, and what must be rewritten."""

    model: type[nn.Module]
    config: tf.PretrainedConfig
    targets: list[str]
    counts: dict[str, int]


_SHORT = {"num_hidden_layers": 1, "use_cache": False}

MODELS: dict[str, Named] = {
    "yi-6b": Named(
        tf.LlamaForCausalLM,
        tf.LlamaConfig(
            vocab_size=64000,
            hidden_size=4096,
            intermediate_size=11008,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0},
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **_SHORT,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        {
            "rms_norm": 3, "add_rms_norm": 1, "rope": 1, "glu": 1, "lora_linear": 7,
            "mlp_block": 1, "qkv_block": 1, "linear_cross_entropy": 1,
        },
    ),
    "falcon-7b": Named(
        tf.FalconForCausalLM,
        tf.FalconConfig(
            vocab_size=65024,
            hidden_size=4544,
            num_attention_heads=71,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            alibi=False,
            bias=False,
            bos_token_id=11,
            eos_token_id=11,
            **_SHORT,
        ),
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        {
            "layer_norm": 2, "rope": 1, "lora_linear": 4, "qkv_block": 1,
            "linear_cross_entropy": 1,
        },
    ),
    "mamba-130m": Named(
        tf.MambaForCausalLM,
        tf.MambaConfig(
            vocab_size=50280,
            hidden_size=768,
            state_size=16,
            expand=2,
            conv_kernel=4,
            time_step_rank=48,
            residual_in_fp32=True,
            **_SHORT,
        ),
        ["in_proj", "x_proj"],
        {"rms_norm": 2, "selective_scan": 1, "lora_linear": 2, "linear_cross_entropy": 1},
    ),
}  # fmt: skip


# more than a minute of one core each, against twenty seconds
_CASES = [pytest.param(n, marks=() if n == "mamba-130m" else pytest.mark.zoo) for n in MODELS]


@pytest.fixture(params=_CASES)
def named(request: pytest.FixtureRequest) -> Iterator[Named]:
    yield MODELS[request.param]
    torch._dynamo.reset()


def _train(model: nn.Module, batches: list[Tensor]) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses = []
    for ids in batches:
        labels = ids.clone()
        labels[:, :4] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.long("mamba-130m")
def test_a_real_shape_trains_with_lora_as_in_eager(named: Named) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=named.targets)
    model = get_peft_model(named.model(copy.deepcopy(named.config)), lora).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    vocabulary = named.config.vocab_size
    # four batches over and over, so that there is something to learn
    batches = [torch.randint(12, vocabulary, (1, 32), generator=generator) for _ in range(4)] * 5
    expected = _train(model, batches)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(before[name])
    losses = _train(optimize(model, codegen="eager"), batches)
    report = explain(model)
    assert report.by_rule() == named.counts, str(report)
    assert not [s for s in report.sites if s.status == "refused"], str(report)
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    assert sum(losses[-4:]) < sum(losses[:4])
