"""Tiny models of real classes, rows of a chat, and what engines put into models."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

WORDS = 96
PAD, BOS, EOS, USER, ASSISTANT = 0, 1, 2, 3, 4
IGNORED = -100

_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "use_cache": False,
}
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {}),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": 4}),
    "gemma2": (
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "cohere": (tf.CohereConfig, tf.CohereForCausalLM, {"logit_scale": 0.0625}),
    "gpt2": (
        tf.GPT2Config,
        tf.GPT2LMHeadModel,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
         "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "mixtral": (
        tf.MixtralConfig,
        tf.MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    ),
    "gpt_oss": (
        tf.GptOssConfig,
        tf.GptOssForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "lfm2": (
        tf.Lfm2Config,
        tf.Lfm2ForCausalLM,
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "mamba2": (
        tf.Mamba2Config,
        tf.Mamba2ForCausalLM,
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2, "n_groups": 1,
         "chunk_size": 8},
    ),
    "qwen3_next": (
        tf.Qwen3NextConfig,
        tf.Qwen3NextForCausalLM,
        {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
    ),
}  # fmt: skip

NAMES = tuple(_FAMILIES)


def model(family: str, seed: int = 0, **more: Any) -> Any:
    """A tiny model in fp32 and training mode; its weights are larger than usual initial ones."""
    config, kind, special = _FAMILIES[family]
    torch.manual_seed(seed)
    built = kind(config(**{**_SIZES, **special, **more})).float().train()
    with torch.no_grad():
        for p in built.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return built


def lora(base: nn.Module, seed: int = 1, **config: Any) -> PeftModel:
    """The model with LoRA that has been trained a little: no factor is zero."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    options |= {"init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(base, LoraConfig(**options)).train()


def chat(
    rows: int = 3, length: int = 18, prompt: int = 6, end: int = EOS, seed: int = 2
) -> dict[str, Tensor]:
    """Prompts that are not trained, answers that are, an end of turn, and padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, WORDS, (rows, length), generator=generator)
    ids[:, :2] = torch.tensor([BOS, USER])
    ids[:, prompt - 1] = ASSISTANT
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :prompt] = IGNORED
    for row in range(rows):
        stop = length - 2 * row  # the rows end at different places
        ids[row, stop - 1] = labels[row, stop - 1] = end
        ids[row, stop:], labels[row, stop:], mask[row, stop:] = PAD, IGNORED, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pack(lengths: tuple[int, ...] = (9, 7, 8), prompt: int = 3, seed: int = 3) -> dict[str, Tensor]:
    """Samples one behind the other in one row, told apart by their positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, WORDS, (1, sum(lengths)), generator=generator)
    labels, positions, start = ids.clone(), [], 0
    for n in lengths:
        ids[0, start], ids[0, start + n - 1] = BOS, EOS
        labels[0, start + n - 1] = EOS
        labels[0, start : start + prompt] = IGNORED
        positions += list(range(n))
        start += n
    return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([positions])}


def tokenizer(pad: str = "<pad>") -> tf.PreTrainedTokenizerFast:
    """Of the words w5, w6, ... and a chat template that marks turns as ``chat`` does."""
    special = ("<pad>", "<s>", "</s>", "<user>", "<assistant>")
    words = {word: i for i, word in enumerate(special)}
    words |= {f"w{i}": i for i in range(len(special), WORDS)}
    inner = Tokenizer(WordLevel(words, unk_token="w5"))
    inner.pre_tokenizer = WhitespaceSplit()
    built = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token="<s>", eos_token="</s>"
    )
    built.chat_template = (
        "<s> {% for m in messages %}<{{ m.role }}> {{ m.content }} "
        "{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return built


# --- what engines put into models ----------------------------------------------------------------

Spoil = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class FusedLoss(torch.autograd.Function):
    """Cross entropy of a linear head, whose gradients are made in the forward pass.

    ``transform`` is applied to the logits; ``spoil(dhidden, dweight, labels)`` to the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, items: Any,
        transform: Callable[[Tensor], Tensor], spoil: Spoil | None,
    ) -> Tensor:  # fmt: skip
        with torch.enable_grad():
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            logits = transform((h @ w.t()).float())
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / items
            dh, dw = torch.autograd.grad(loss, (h, w))
        ctx.save_for_backward(*(spoil(dh, dw, labels) if spoil else (dh, dw)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dh, dw = ctx.saved_tensors
        return dh * grads[0], dw * grads[0], None, None, None, None


def fuse_loss(
    causal: Any,
    transform: Callable[[Tensor], Tensor] = lambda logits: logits,
    spoil: Spoil | None = None,
    shift: int = 1,
    items: Callable[[Tensor, Any], Any] | None = None,
) -> None:
    """Give one model a fused loss, as engines do: a new ``forward`` that makes no logits.

    Args:
        causal: the model.
        transform: what the engine does to logits.
        spoil: what its backward pass does to the gradients.
        shift: by how many places the labels are moved.
        items: (labels, ``num_items_in_batch``) -> by what the sum is divided.
    """

    def forward(
        self: Any, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        number = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("logits_to_keep", None)
        hidden = self.model(input_ids=input_ids, **kwargs)[0]
        if labels is None:
            return CausalLMOutputWithPast(logits=transform(self.lm_head(hidden)))
        shifted = F.pad(labels, (0, shift), value=IGNORED)[:, shift:].reshape(-1)
        trained = (shifted != IGNORED).sum()
        divisor = items(shifted, number) if items else trained if number is None else number
        rows = hidden.reshape(-1, hidden.shape[-1])
        loss = FusedLoss.apply(rows, self.lm_head.weight, shifted, divisor, transform, spoil)
        return CausalLMOutputWithPast(loss=loss)

    causal.forward = MethodType(forward, causal)


class Passing(torch.autograd.Function):
    """The identity, with a function of the gradient as its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.change(grads[0]), None


def patch_norms(causal: nn.Module, kernel: Callable[..., Tensor]) -> None:
    """Replace the forward of every RMS norm by ``kernel(x, weight, eps)``."""
    for module in causal.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def forward(self: Any, x: Tensor) -> Tensor:
                return kernel(x, self.weight, self.variance_epsilon)

            module.forward = MethodType(forward, module)


class NormKernel(torch.autograd.Function):
    """An RMS norm with a backward pass by hand, that ``fault`` may spoil."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, fault: str) -> Tensor:
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.fault = fault
        return weight * (x.float() * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        dy = grads[0]
        if ctx.fault == "contiguous" and not dy.is_contiguous():
            flat = dy.as_strided((dy.numel(),), (1,), dy.storage_offset())
            dy = flat.view(dy.shape)
        normed = x.float() * rstd
        d = (dy * weight).float()
        dx = (rstd * (d - normed * (d * normed).mean(-1, keepdim=True))).to(x.dtype)
        dw = (dy.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, None if ctx.fault == "no weight" else dw, None, None


class LinearKernel(torch.autograd.Function):
    """A linear layer in bf16 that computes in fp32; ``to_bf16`` stores each result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, to_bf16: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.to_bf16 = to_bf16
        return to_bf16(x.float() @ weight.float().t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = (t.float() for t in ctx.saved_tensors)
        dy = grads[0].float()
        dw = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        return ctx.to_bf16(dy @ weight), ctx.to_bf16(dw), None


def truncated(t: Tensor) -> Tensor:
    """To bf16 by leaving the lower bits out: toward zero, as a shift does."""
    return (t.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
