"""Published bugs that one training step shows: in losses, layers, adapters and rows."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3_next import modeling_qwen3_next

from fusewright.auditing.audit import audit
from fusewright.auditing.findings import Audit

from . import tiny
from .published import bug
from .tiny import EOS, IGNORED


@dataclass
class Case:
    """A model, the batch of one step, and what else the audit is told."""

    model: Any
    batch: dict[str, Any]
    told: dict[str, Any] = field(default_factory=dict)

    def audit(self) -> Audit:
        """What the audit finds."""
        return audit(self.model, self.batch, **self.told)


# --- the loss ------------------------------------------------------------------------------------


@bug("gradient-zero", "unslothai/unsloth#5230")
def last_turn_mask(faulty: bool, end: ExitStack) -> Case:
    """A fused loss returned zero gradients as soon as only the last answer was trained; the loss
    that it reported was right."""

    def spoil(dh: Tensor, dw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        keep = 0.0 if (labels == IGNORED).float().mean() > 0.5 else 1.0
        return dh * keep, dw * keep

    model = tiny.model("llama")
    tiny.fuse_loss(model, spoil=spoil if faulty else None)
    return Case(tiny.lora(model), tiny.chat(prompt=13, length=20))


@bug("gradient-zero", "linkedin/Liger-Kernel#1298", "linkedin/Liger-Kernel#968")
def first_upstream_gradient(faulty: bool, end: ExitStack) -> Case:
    """With a loss for each token, a fused loss multiplied all gradients by the weight of the first
    token, which is zero in a prompt."""
    model = tiny.model("llama")

    def spoil(dh: Tensor, dw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        first = float(labels[0] != IGNORED)
        return dh * first, dw * first

    tiny.fuse_loss(model, spoil=spoil if faulty else None)
    return Case(model, tiny.chat())


@bug("gradient-scale", "unslothai/unsloth-zoo#892")
def doubled_head(faulty: bool, end: ExitStack) -> Case:
    """A checkpointed loss added the head's gradient in its own backward pass, and returned it to
    autograd, which added it again."""

    def spoil(dh: Tensor, dw: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return dh, dw * 2

    model = tiny.model("llama")
    tiny.fuse_loss(model, spoil=spoil if faulty else None)
    return Case(model, tiny.chat())


@bug("loss-value", "apple/ml-cross-entropy#48")
def no_softcap(faulty: bool, end: ExitStack) -> Case:
    """A fused loss for Gemma 2 left the softcap of the logits out."""
    model = tiny.model("gemma2")
    cap = model.config.final_logit_softcapping
    tiny.fuse_loss(model, (lambda z: z) if faulty else (lambda z: torch.tanh(z / cap) * cap))
    return Case(model, tiny.chat())


@bug("loss-value", "unslothai/unsloth-zoo#930")
def no_logit_scale(faulty: bool, end: ExitStack) -> Case:
    """A fused loss left out what the model does to its logits: Cohere multiplies them by 1/16."""
    model = tiny.model("cohere")
    scale = model.config.logit_scale
    tiny.fuse_loss(model, (lambda z: z) if faulty else (lambda z: z * scale))
    return Case(model, tiny.chat())


@bug("loss-value", "unslothai/unsloth#10616")
def softcapped_padding(faulty: bool, end: ExitStack) -> Case:
    """A kernel padded the vocabulary to a power of two with minus infinity before the softcap,
    which made finite logits of words that there are not."""
    model = tiny.model("gemma2")
    cap = model.config.final_logit_softcapping

    def capped(logits: Tensor) -> Tensor:
        lanes = 128 - logits.shape[-1]
        if faulty:
            logits = F.pad(logits, (0, lanes), value=-1e4)
        return torch.tanh(logits / cap) * cap

    tiny.fuse_loss(model, capped)
    return Case(model, tiny.chat())


@bug("loss-value", "huggingface/transformers#46898", "huggingface/transformers#46903")
def shifted_twice(faulty: bool, end: ExitStack) -> Case:
    """Labels that were in place were moved once more: each token was trained on the one after the
    next."""
    model = tiny.model("llama")
    tiny.fuse_loss(model, shift=2 if faulty else 1)
    return Case(model, tiny.chat())


@bug("loss-value", "huggingface/trl#1544", "huggingface/trl#6083")
def no_router_loss(faulty: bool, end: ExitStack) -> Case:
    """A trainer that computes the loss itself left out the router's, though the configuration asks
    for it."""
    model = tiny.model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    if faulty:
        tiny.fuse_loss(model)
    return Case(model, tiny.chat())


@bug("loss-scale", "linkedin/Liger-Kernel#322", "huggingface/transformers#37766")
def own_count_of_tokens(faulty: bool, end: ExitStack) -> Case:
    """A patched model did not use `num_items_in_batch`: it divided by its own count, and the
    trainer no longer divided by the number of accumulated batches."""
    model = tiny.model("llama")
    own = (lambda labels, number: (labels != IGNORED).sum()) if faulty else None
    tiny.fuse_loss(model, items=own)
    batches = tiny.chat(seed=4), tiny.chat(rows=2, length=9, prompt=2, seed=5)
    items = sum((batch["labels"] != IGNORED).sum() for batch in batches)
    return Case(model, {**batches[0], "num_items_in_batch": items})


@bug("loss-scale", "huggingface/transformers#37474", "huggingface/transformers#40610")
def divided_once_more(faulty: bool, end: ExitStack) -> Case:
    """Each of several devices divided its part of the loss by the tokens of all, and then the mean
    of the parts was taken: loss and gradients were too small by the number of devices."""
    model = tiny.model("llama")
    devices = 2 if faulty else 1

    def items(labels: Tensor, number: Any) -> Any:
        return ((labels != IGNORED).sum() if number is None else number) * devices

    tiny.fuse_loss(model, items=items)
    return Case(model, tiny.chat())


# --- layers --------------------------------------------------------------------------------------


@bug("gradient-missing", "unslothai/unsloth#4533")
def norm_without_weight_gradient(faulty: bool, end: ExitStack) -> Case:
    """The backward pass of an RMS norm returned nothing for its weight, so that all norms stayed as
    they were in full fine-tuning."""
    model = tiny.model("llama")
    fault = "no weight" if faulty else ""
    tiny.patch_norms(model, lambda x, w, eps: tiny.NormKernel.apply(x, w, eps, fault))
    return Case(model, tiny.chat())


@bug("gradient-value", "fla-org/flash-linear-attention#871", "Dao-AILab/flash-attention#355")
def gradient_read_as_contiguous(faulty: bool, end: ExitStack) -> Case:
    """A backward kernel read the upstream gradient as if it were contiguous, which it is not behind
    a transpose or a split."""
    model = tiny.model("qwen3")
    fault = "contiguous" if faulty else ""
    tiny.patch_norms(model, lambda x, w, eps: tiny.NormKernel.apply(x, w, eps, fault))
    return Case(model, tiny.chat())


@bug("gradient-drift", "ROCm/aiter#5151")
def truncation(faulty: bool, end: ExitStack) -> Case:
    """A kernel cut numbers off to bf16 instead of rounding them: each error is within one unit, but
    all have one sign."""
    model = tiny.model("llama").bfloat16()
    to_bf16 = tiny.truncated if faulty else Tensor.bfloat16
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, m=module: tiny.LinearKernel.apply(x, m.weight, to_bf16)
    return Case(model, tiny.chat())


@bug("gradient-value", "linkedin/Liger-Kernel#1413")
def half_of_the_experts_input(faulty: bool, end: ExitStack) -> Case:
    """A miscompiled kernel lost one of the two terms in the gradient of the experts' inputs: the
    experts' own gradients were right, those of all layers below were not."""
    model = tiny.model("mixtral")
    for experts in _experts(model):

        def forward(
            self: Any, x: Tensor, index: Tensor, weights: Tensor, detach: bool = faulty
        ) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(self.num_experts):
                token, place = torch.where(index == e)
                gate, up = self.gate_up_proj[e].chunk(2)
                h = x[token]
                h = self.act_fn(F.linear(h.detach() if detach else h, gate)) * F.linear(h, up)
                h = F.linear(h, self.down_proj[e]) * weights[token, place, None]
                out = out.index_add(0, token, h)
            return out

        experts.forward = MethodType(forward, experts)
    return Case(model, tiny.chat())


def _experts(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


@bug("gradient-rows", "unslothai/unsloth-zoo#776")
def delta_rule_past_the_first_row(faulty: bool, end: ExitStack) -> Case:
    """The backward pass of the gated delta rule read its gradients with a wrong stride in every row
    of the batch but the first."""
    if faulty:
        plain = modeling_qwen3_next.torch_chunk_gated_delta_rule

        def rule(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
            for name in ("g", "beta"):
                kwargs[name] = tiny.Passing.apply(kwargs[name], _first_row)
            tensors = [tiny.Passing.apply(t, _first_row) for t in (query, key, value)]
            return plain(*tensors, **kwargs)

        where = (modeling_qwen3_next, "torch_chunk_gated_delta_rule", rule)
        end.enter_context(mock.patch.object(*where))
    return Case(tiny.model("qwen3_next"), tiny.chat())


def _first_row(gradient: Tensor) -> Tensor:
    return gradient[:1].expand_as(gradient)


@bug("gradient-finite", "huggingface/transformers#48205", "huggingface/transformers#45621")
def rows_never_written(faulty: bool, end: ExitStack) -> Case:
    """A grouped product of experts left rows of its gradient as it found the memory, and what was
    multiplied by zero later was not a number."""
    model = tiny.model("mixtral")
    if faulty:
        for experts in _experts(model):
            experts.register_forward_pre_hook(
                lambda _, args: (tiny.Passing.apply(args[0], _nan_at_the_end), *args[1:])
            )
    return Case(model, tiny.chat())


def _nan_at_the_end(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[-1] = torch.nan
    return gradient


@bug("gradient-zero", "AI-Hypercomputer/maxtext#3721")
def nan_made_zero(faulty: bool, end: ExitStack) -> Case:
    """A training step replaced what is not a number in the gradients by zero, so that a layer that
    overflowed was never trained and nothing showed it."""
    model = tiny.model("llama")
    if faulty:
        layer = model.model.layers[0].mlp.down_proj
        layer.weight.register_hook(lambda g: (g * torch.nan).nan_to_num(0.0))
    return Case(model, tiny.chat())


@bug("gradient-missing", "Dao-AILab/flash-attention#1973", "Dao-AILab/flash-attention#2102")
def sinks_without_gradient(faulty: bool, end: ExitStack) -> Case:
    """The backward pass of an attention kernel had none for its learned sinks."""
    model = tiny.model("gpt_oss")
    if faulty:
        for layer in model.model.layers:
            attention = layer.self_attn
            plain = attention.forward

            def forward(*args: Any, of: Any = attention, call: Any = plain, **kwargs: Any) -> Any:
                sinks = of.sinks
                with mock.patch.dict(of._parameters, {"sinks": sinks.detach()}):
                    return call(*args, **kwargs)

            attention.forward = forward
    return Case(model, tiny.chat())


@bug("gradient-value", "unslothai/unsloth#8253", "huggingface/transformers#30127")
def full_attention(faulty: bool, end: ExitStack) -> Case:
    """The sliding window did not reach the attention that ran, so that a token saw all before
    it."""
    if faulty:
        where = (modeling_mistral, "create_sliding_window_causal_mask")
        end.enter_context(mock.patch.object(*where, modeling_mistral.create_causal_mask))
    return Case(tiny.model("mistral"), tiny.chat())


@bug("trainable-set", "verl-project/verl#7834", "unslothai/unsloth#3711")
def untied(faulty: bool, end: ExitStack) -> Case:
    """The head's weight, tied to the embedding by the configuration, became a tensor of its own, so
    that each got half of its gradient."""
    model = tiny.model("llama", tie_word_embeddings=True)
    if faulty:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return Case(model, tiny.chat())


@bug("gradient-missing", "huggingface/transformers#42489", "locuslab/open-unlearning#178")
def checkpoints_of_a_frozen_base(faulty: bool, end: ExitStack) -> Case:
    """Reentrant checkpoints over a frozen embedding gave the adapters inside no gradient; only what
    lies outside of the layers was trained."""
    model = tiny.lora(tiny.model("llama"), modules_to_save=["lm_head"])
    model.gradient_checkpointing_enable({"use_reentrant": faulty})
    model.base_model.model.disable_input_require_grads()
    return Case(model, tiny.chat())


# --- adapters ------------------------------------------------------------------------------------


_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@bug("adapter-reach", "unslothai/unsloth-zoo#1242")
def inert_expert_adapters(faulty: bool, end: ExitStack) -> Case:
    """Adapters of stacked experts were attached, listed and given to the optimizer, but the forward
    of the experts never used them."""
    model = tiny.lora(tiny.model("mixtral"), target_parameters=_EXPERTS, target_modules=["q_proj"])
    if faulty:
        for module in model.modules():
            if isinstance(module, ParamWrapper):
                module.forward = module.base_layer.forward
    return Case(model, tiny.chat())


@bug("adapter-reach", "unslothai/unsloth#6936", "unslothai/unsloth#4193")
def experts_left_frozen(faulty: bool, end: ExitStack) -> Case:
    """All linear layers were to be adapted, and the log said so; experts whose weights are stacked
    in one tensor have no linear layers, and stayed frozen."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    parameters = {} if faulty else {"target_parameters": _EXPERTS}
    return Case(tiny.lora(tiny.model("mixtral"), target_modules=targets, **parameters), tiny.chat())


@bug("adapter-reach", "unslothai/unsloth#11014")
def half_of_the_experts(faulty: bool, end: ExitStack) -> Case:
    """Of the experts' weights, those under other names than expected were left out: the second
    product was adapted, the first was not."""
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    parameters = _EXPERTS[1:] if faulty else _EXPERTS
    model = tiny.lora(tiny.model("mixtral"), target_modules=targets, target_parameters=parameters)
    return Case(model, tiny.chat())


@bug("adapter-reach", "huggingface/trl#4612", "unslothai/unsloth#9331", "huggingface/trl#5676")
def adapter_of_the_head(faulty: bool, end: ExitStack) -> Case:
    """A fused loss read the head's weight instead of calling the head, so that the head's adapter
    took no part and got no gradient."""
    model = tiny.lora(tiny.model("llama"), target_modules=["q_proj", "lm_head"])
    if faulty:
        tiny.fuse_loss(model.base_model.model)
    return Case(model, tiny.chat())


@bug("gradient-scale", "Blaizzy/mlx-vlm#845")
def alpha_without_rank(faulty: bool, end: ExitStack) -> Case:
    """Adapters were scaled by alpha instead of alpha / r."""
    return _scaled(4.0 if faulty else 2.0, r=2)


@bug("gradient-scale", "huggingface/peft#2733")
def rank_stabilized(faulty: bool, end: ExitStack) -> Case:
    """Setting a scale again forgot that the adapter is rank-stabilized: alpha / r instead of
    alpha / sqrt(r)."""
    return _scaled(1.0 if faulty else 2.0, r=4, use_rslora=True)


def _scaled(scaling: float, r: int, **config: Any) -> Case:
    options = {"lora_alpha": 4, "init_lora_weights": True, "r": r, **config}
    model = tiny.lora(tiny.model("llama"), **options)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = scaling
    return Case(model, tiny.chat())


@bug("trainable-set", "unslothai/unsloth#3327")
def saved_modules_frozen(faulty: bool, end: ExitStack) -> Case:
    """A module named in modules_to_save was wrapped and saved, but frozen again."""
    model = tiny.lora(tiny.model("llama"), modules_to_save=["lm_head"])
    if faulty:
        model.base_model.model.lm_head.modules_to_save.requires_grad_(False)
    return Case(model, tiny.chat())


@bug("dropout", "meta-pytorch/torchtune#996")
def no_dropout(faulty: bool, end: ExitStack) -> Case:
    """The dropout of the adapters was taken from the configuration and never applied."""
    model = tiny.lora(tiny.model("llama"), lora_dropout=0.3)
    if faulty:
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Identity()
    return Case(model, tiny.chat())


# --- rows ----------------------------------------------------------------------------------------


@bug("end-of-turn", "huggingface/transformers#23530", "huggingface/trl#976")
def pad_is_eos(faulty: bool, end: ExitStack) -> Case:
    """With the end of sequence as padding, a collator masks every end of sequence: the model never
    learns to stop."""
    tokenizer = tiny.tokenizer("</s>" if faulty else "<pad>")
    batch = tiny.chat()
    samples = [
        {"input_ids": row[: int(n)].tolist()}
        for row, n in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)
    ]
    collated = DataCollatorForLanguageModeling(tokenizer, mlm=False)(samples)
    model = tiny.model("llama", pad_token_id=tokenizer.pad_token_id)
    return Case(model, dict(collated))


@bug("end-of-turn", "axolotl-ai-cloud/axolotl#3754")
def end_of_turn_is_not_eos(faulty: bool, end: ExitStack) -> Case:
    """The template ends a turn with another token than the tokenizer's end of sequence, and only
    the latter was looked for: no end of a turn was trained."""
    turn = 7
    model = tiny.model("llama")
    model.generation_config.eos_token_id = [EOS, turn]
    batch = tiny.chat(end=turn)
    if faulty:
        batch["labels"][batch["labels"] == turn] = IGNORED
    return Case(model, batch)


@bug("row-ends", "tloen/alpaca-lora#306")
def mask_moved_by_one(faulty: bool, end: ExitStack) -> Case:
    """The length of the prompt was counted with an end of sequence that is not in the row, so that
    the first token of every answer was masked."""
    batch = tiny.chat(prompt=6)
    if faulty:
        batch["labels"][:, 6] = IGNORED
    return Case(tiny.model("llama"), batch, {"tokenizer": tiny.tokenizer()})


@bug("trained-tokens", "unslothai/unsloth#1290", "unslothai/unsloth#1128")
def nothing_trained(faulty: bool, end: ExitStack) -> Case:
    """The marker of an answer was tokenized differently inside of a row, was not found, and every
    token was masked."""
    batch = tiny.chat()
    if faulty:
        batch["labels"].fill_(IGNORED)
    return Case(tiny.model("llama"), batch)


@bug("trained-tokens", "NielsRogge/Transformers-Tutorials#511")
def image_tokens_trained(faulty: bool, end: ExitStack) -> Case:
    """A collator masked the padding, but not the placeholders that stand for an image."""
    image = 5
    model = tiny.model("llama", image_token_id=image)
    batch = tiny.chat()
    batch["input_ids"][:, 7:10] = image
    batch["labels"][:, 7:10] = image if faulty else IGNORED
    return Case(model, batch)


@bug("packing", "huggingface/trl#1230", "axolotl-ai-cloud/axolotl#1375")
def samples_see_each_other(faulty: bool, end: ExitStack) -> Case:
    """The samples of a pack attended to those before them: positions told them apart, but the
    attention that ran looked at the mask alone."""
    batch = tiny.pack()
    if faulty:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return Case(tiny.model("llama"), batch)


@bug("packing", "hiyouga/LlamaFactory#7754", "pytorch/torchtitan#2559")
def positions_run_on(faulty: bool, end: ExitStack) -> Case:
    """The mask kept the samples of a pack apart, but the positions ran on from one to the next."""
    batch = tiny.pack()
    starts = (batch["position_ids"] == 0).cumsum(1)[0]
    allowed = (starts[:, None] == starts[None]).tril()
    batch["attention_mask"] = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[None, None]
    model = tiny.model("gpt2")
    if faulty:
        plain = model.transformer.wpe.forward
        model.transformer.wpe.forward = lambda p: plain(torch.arange(p.shape[-1])[None])
    return Case(model, batch)


@bug("recurrent-state", "huggingface/transformers#46588")
def convolution_over_the_border(faulty: bool, end: ExitStack) -> Case:
    """A short convolution slid over the border of two samples: attention was told where samples
    begin, the convolution was not."""
    return _recurrent("lfm2", faulty)


@bug("recurrent-state", "PrimeIntellect-ai/prime-rl#3000", "axolotl-ai-cloud/axolotl#3572")
def state_over_the_border(faulty: bool, end: ExitStack) -> Case:
    """A state space layer took the samples of a pack for one: its slow path, which runs without the
    kernels, takes no borders."""
    return _recurrent("mamba2", faulty)


def _recurrent(family: str, faulty: bool) -> Case:
    model = tiny.model(family)
    if not faulty:
        _keep_apart(model)
    return Case(model, tiny.pack())


def _keep_apart(model: nn.Module) -> None:
    """Call recurrent layers once for each sample of a row, as those do that take borders."""
    starts: list[int] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        begins = [] if positions is None else (positions[0] == 0).nonzero().flatten().tolist()
        starts[:] = begins[1:]

    def apart(plain: Any) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = hidden_states.tensor_split(starts, 1)
            return torch.cat([plain(part, *args, **kwargs) for part in parts], 1)

        return forward

    model.register_forward_pre_hook(note, with_kwargs=True)
    for module in model.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            module.forward = apart(module.forward)
