"""Ordinary ways of setting a model up, each trained in eager and optimized: what is rewritten.

    python -m tests.models.setups

writes ``docs/setups.md``; ``test_setups.py`` holds each of its lines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from fusewright import optimize
from fusewright.report import Report
from tests.explained import explain

from .quantized import quantize

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DENSE = ("Llama", "Qwen3")
EXPERTS, DELTA = ("Qwen3Moe",), ("Qwen3Next",)
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16,
}  # fmt: skip
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 48}
"""All experts are chosen: which ones a token goes to must not hang on a rounding."""
MORE_SIZES = {
    "Qwen3Moe": _ROUTED,
    "Qwen3Next": {
        **_ROUTED, "shared_expert_intermediate_size": 48, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
RULES = (
    "rms_norm", "add_rms_norm", "rms_norm_linear", "rope", "glu", "lora_linear", "quant_linear",
    "mlp_block", "qkv_block", "moe_experts", "gated_delta_rule", "linear_cross_entropy",
)  # fmt: skip
"""The columns. ``attention`` is left to the processor: it decides whether ours is the faster."""


@dataclass(frozen=True)
class Setup:
    """One way of setting a model up.

    Attributes:
        title: as the table names it.
        dtype: of the weights.
        quantized: whether the linears are in 4 bits, computing in bf16.
        kbit: whether PEFT prepares it; ``None`` for not, else whether with checkpointing.
        lora: options of PEFT's adapters on all linears; None for full fine-tuning.
        autocast: the dtype to which the forward pass is lowered, or None.
        prepare: what else makes the model.
        wrap: how it is run; the same numbers but for rounding.
        late: whether it is wrapped after ``optimize`` and a step, not before.
        lost: why it has fewer or other rewrites than LoRA in fp32; empty where it does not.
        families: the models it is tried on.
    """

    title: str
    dtype: torch.dtype = F32
    quantized: bool = False
    kbit: bool | None = None
    lora: dict[str, Any] | None = field(default_factory=dict)
    autocast: torch.dtype | None = None
    prepare: Callable[[Any], object] = lambda model: None
    wrap: Callable[[Any], Any] = lambda model: model
    late: bool = False
    lost: str = ""
    families: tuple[str, ...] = DENSE


def _two_adapters(dropout: float = 0.0) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])

    return prepare


def _checkpointed(reentrant: bool) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    return wrap


def _accelerated(model: Any) -> Any:
    """As a Trainer with ``bf16=True`` has it: autocast around forward, fp32 results."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)


_DROPOUT: dict[str, Any] = {"lora_dropout": 0.1}
_OWN_INPUTS = "with dropout, each adapter has an input of its own: no blocks"
_DORA: dict[str, Any] = {"lora": {"use_dora": True}}
_NO_ADAPTERS = "no adapters on q, k and v to fuse: a norm and they are one `rms_norm_linear`"
_STACKS: dict[str, Any] = {
    "lora": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "families": EXPERTS,
}  # fmt: skip
_DELTA: dict[str, Any] = {**_STACKS, "families": DELTA}
_PARTS = "PEFT clears a cache in each layer: no block in a checkpoint is captured as a whole"
_REENTRANT = "a layer that is a reentrant checkpoint runs as it was; its parts are captured"
_NO_MLP = "a linear with a magnitude is in no `mlp_block`: gate and up are a `qkv_block`"
SETUPS = {
    "fp32": Setup("LoRA, fp32"),
    "full": Setup("full fine-tuning, fp32", lora=None, lost=_NO_ADAPTERS),
    "bf16": Setup("LoRA, bf16 weights, fp32 adapters", BF16),
    "autocast": Setup("LoRA, autocast to bf16 over fp32 weights", autocast=BF16),
    "autocast-fp16": Setup("LoRA, autocast to fp16 over fp32 weights", autocast=F16),
    "autocast-bf16": Setup("LoRA, autocast to bf16 over bf16 weights", BF16, autocast=BF16),
    "autocast-full": Setup(
        "full fine-tuning, autocast to bf16 over fp32 weights", lora=None, autocast=BF16,
        lost=_NO_ADAPTERS,
    ),
    "accelerate": Setup("LoRA, fp32, `Accelerator(mixed_precision='bf16')`", wrap=_accelerated),
    "accelerate-late": Setup(
        "LoRA, fp32, the same `Accelerator` after `optimize`", wrap=_accelerated, late=True
    ),
    "checkpointing": Setup("LoRA, fp32, gradient checkpointing", wrap=_checkpointed(False)),
    "reentrant": Setup(
        "LoRA, fp32, reentrant checkpointing", wrap=_checkpointed(True), lost=_REENTRANT
    ),
    "two-adapters": Setup("two active adapters, fp32", prepare=_two_adapters()),
    "dropout": Setup("LoRA with dropout, fp32", lora=_DROPOUT, lost=_OWN_INPUTS),
    "two-adapters-dropout": Setup(
        "two active adapters with dropout, fp32", lora=_DROPOUT, prepare=_two_adapters(0.1),
        lost=_OWN_INPUTS,
    ),
    "dora": Setup("DoRA, fp32", **_DORA, lost=_NO_MLP),
    "dora-checkpointing": Setup(
        "DoRA, fp32, gradient checkpointing", **_DORA, wrap=_checkpointed(False), lost=_PARTS
    ),
    "dora-bf16": Setup("DoRA, bf16 weights, fp32 adapters", BF16, **_DORA, lost=_NO_MLP),
    "dora-autocast": Setup(
        "DoRA, autocast to bf16 over fp32 weights", **_DORA, autocast=BF16, lost=_NO_MLP
    ),
    "qlora": Setup("QLoRA, bf16", BF16, True),
    "kbit": Setup("QLoRA, kbit-prepared", BF16, True, kbit=False),
    "kbit-autocast": Setup("QLoRA, kbit-prepared, autocast to bf16", BF16, True, False,
                           autocast=BF16),
    "kbit-checkpointing": Setup("QLoRA, kbit-prepared with checkpointing, autocast to bf16", BF16,
                                True, True, autocast=BF16),
    "qdora": Setup("DoRA over 4 bits, bf16", BF16, True, **_DORA, lost=_NO_MLP),
    "experts": Setup("LoRA, experts too, fp32", **_STACKS),
    "experts-bf16": Setup("LoRA, experts too, bf16 weights, fp32 adapters", BF16, **_STACKS),
    "experts-autocast": Setup(
        "LoRA, experts too, autocast to bf16 over fp32 weights", **_STACKS, autocast=BF16
    ),
    "experts-checkpointing": Setup(
        "LoRA, experts too, fp32, gradient checkpointing", **_STACKS, wrap=_checkpointed(False)
    ),
    "delta": Setup("LoRA, experts too, fp32", **_DELTA),
    "delta-autocast": Setup(
        "LoRA, experts too, autocast to bf16 over fp32 weights", **_DELTA, autocast=BF16
    ),
    "delta-checkpointing": Setup(
        "LoRA, experts too, fp32, gradient checkpointing", **_DELTA, wrap=_checkpointed(False)
    ),
    "delta-full": Setup("full fine-tuning, fp32", lora=None, families=DELTA),
}  # fmt: skip


def unwrapped(setup: Setup) -> Setup:
    """The same numbers, run as they are."""
    return replace(setup, wrap=lambda model: model)


def build(family: str, setup: Setup) -> Any:
    """The tiny model, ready for training."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, **MORE_SIZES.get(family, {}), tie_word_embeddings=False
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(setup.dtype)
    if setup.quantized:
        model = quantize(model, compute=BF16)
    if setup.kbit is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=setup.kbit,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
    if setup.lora is not None:
        options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **setup.lora}
        model = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))
    setup.prepare(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return setup.wrap(model).train()


def exact(family: str, setup: Setup) -> Any:
    """The model in fp64: quantized weights become what they stand for; nothing is lowered."""
    kbit = None if setup.kbit is None else False
    model = build(family, replace(unwrapped(setup), kbit=kbit))
    model.set_experts_implementation("eager")  # torch's grouped product takes no fp64
    return in_double(model)


def in_double(model: Any) -> Any:
    """The model in fp64, its quantized weights dequantized."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer._parameters.get("weight"), "quant_state"):
                setattr(parent, name, _dequantized(layer))
    return model.double()


def _dequantized(layer: Any) -> nn.Linear:
    import bitsandbytes.functional as bnb

    weight = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(BF16)
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def step(model: Any, setup: Setup, seed: int, lowered: bool = True) -> dict[str, Tensor]:
    """The loss and every gradient of one step; ``lowered`` is off for the fp64 oracle."""
    model.zero_grad()
    torch.manual_seed(seed)  # of dropout
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 21), generator=generator)
    around: AbstractContextManager[Any] = nullcontext()
    if setup.autocast is not None and lowered:
        around = torch.autocast("cpu", setup.autocast)
    with around:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def optimized(family: str, setup: Setup) -> tuple[Any, Report]:
    """The model after ``optimize`` and one step, and the report of what was rewritten."""
    made = build(family, unwrapped(setup) if setup.late else setup)
    model = optimize(made, codegen="eager")
    step(model, setup, 0)
    if setup.late:
        model = setup.wrap(model)
        step(model, setup, 0)
    return model, explain(model)


_NODE = re.compile(r" \(\w+\)")


def line(family: str, setup: Setup, report: Report) -> str:
    """The line of the table."""
    counts = report.by_rule()
    cells = [str(counts.get(rule) or "") for rule in RULES]
    missed = [s for s in report.gaps() if s.rule != "attention"]
    # without the names of nodes, which differ between versions of transformers
    gaps = sorted({f"{s.rule}: {_NODE.sub('', s.reason)}" for s in missed})
    why = "; ".join([*([setup.lost] if setup.lost else []), *gaps])
    return f"| {setup.title} | {family} | {' | '.join(cells)} | {why} |"


_HEAD = """# Set-ups

What is rewritten in a tiny model with two layers, in the ordinary ways of setting one up for
training. Written by `python -m tests.models.setups`; `tests/models/test_setups.py` holds each line,
and that the loss and every gradient stay within the error budget, judged over several draws of
tokens and weights: at most 1.5 times as far from fp64 as in eager, plus one unit of rounding of the
result's own dtype (fp32, here).

`attention` is not among the columns: whether ours is the faster one depends on the processor.
"""


def main() -> None:
    """Write the page."""
    os.environ.setdefault("FUSEWRIGHT_SMALL", "optimize")  # as in the tests
    lines = [
        _HEAD,
        f"| set-up | model | {' | '.join(f'`{r}`' for r in RULES)} | what differs from the first |",
        "|---" * (len(RULES) + 3) + "|",
    ]
    for setup in SETUPS.values():
        for family in setup.families:
            torch._dynamo.reset()
            _, report = optimized(family, setup)
            lines.append(line(family, setup, report))
    page = Path(__file__).parents[2] / "docs" / "setups.md"
    page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
