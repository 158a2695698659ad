"""Every type of adapter that PEFT has, on a tiny model, in eager and optimized: what is fused.

    python -m tests.models.adapters [NAME ...]

writes ``docs/adapters.md`` (with names, it prints their lines); ``test_adapters.py`` holds them.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import Tensor

from fusewright import optimize
from fusewright.report import Report
from tests.explained import explain

from .quantized import quantize

SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16,
}  # fmt: skip
BF16 = torch.bfloat16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = SIZES["num_hidden_layers"]


@dataclass(frozen=True)
class Adapter:
    """One type of adapter with its settings.

    Attributes:
        kind: the name of the type in PEFT's ``PeftType``.
        options: of its configuration, but for ``target_modules``.
        linears: how many linears carry a formula of the adapter; 0 where none has its own.
        targets: of the adapter; None where the type takes none.
        quantized: whether the linears are in 4 bits, computing in bf16.
        dtype: of the weights.
        prepare: what else makes the model, from the one with the adapter.
        random: whether forward draws numbers that depend on the dtype: no fp64 oracle.
        needs: the package that PEFT needs for it.
        saved: how many LoRAs are saved first, for a type that mixes saved ones.
        call: further arguments of the model's call, of a batch's ids.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    linears: int = 14
    targets: Any = "all-linear"
    quantized: bool = False
    dtype: torch.dtype = torch.float32
    prepare: Callable[[Any], Any] = lambda model: model
    random: bool = False
    needs: str = ""
    saved: int = 0
    call: Callable[[Tensor], dict[str, Any]] = lambda ids: {}


def _several(**options: Any) -> Callable[[Any], Any]:
    def prepare(model: Any) -> Any:
        config = peft.LoraConfig(r=4, target_modules="all-linear", **options)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        return model

    return prepare


def _frozen(part: str) -> Callable[[Any], Any]:
    def prepare(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)
        return model

    return prepare


def _prompt(**options: Any) -> dict[str, Any]:
    return {"options": {"num_virtual_tokens": 4} | options, "linears": 0, "targets": None}


_VIRTUAL = {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}
_LM = {"linears": 15, "targets": [*LINEARS, "lm_head"]}

TABLE: dict[str, Adapter] = {
    "LoRA": Adapter("LORA"),
    "LoRA, dropout": Adapter("LORA", {"lora_dropout": 0.2}),
    "LoRA, biases": Adapter("LORA", {"lora_bias": True}),
    "rsLoRA": Adapter("LORA", {"use_rslora": True}),
    "PiSSA": Adapter("LORA", {"init_lora_weights": "pissa"}),
    "OLoRA": Adapter("LORA", {"init_lora_weights": "olora"}),
    "LoRA-FA": Adapter("LORA", prepare=_frozen("lora_A")),
    "LoRA, bf16 weights": Adapter("LORA", dtype=BF16),
    "LoRA over 4 bits": Adapter("LORA", quantized=True, dtype=BF16),
    "DoRA": Adapter("LORA", {"use_dora": True}),
    "DoRA, dropout": Adapter("LORA", {"use_dora": True, "lora_dropout": 0.2}),
    "DoRA over 4 bits": Adapter("LORA", {"use_dora": True}, quantized=True, dtype=BF16),
    "two LoRAs": Adapter("LORA", prepare=_several()),
    "two LoRAs, a dropout each": Adapter(
        "LORA", {"lora_dropout": 0.2}, prepare=_several(lora_dropout=0.3)
    ),
    "LoRA and DoRA": Adapter("LORA", prepare=_several(use_dora=True)),
    "LoRA, head too": Adapter("LORA", **_LM),
    "LoRA, embeddings too": Adapter("LORA", targets=[*LINEARS, "embed_tokens"]),
    "LoRA, trained tokens": Adapter("LORA", {"trainable_token_indices": [5, 9]}),
    "LoRA, trained norms": Adapter("LORA", {"modules_to_save": ["input_layernorm"]}),
    "LoRA, one layer twice": Adapter(
        "LORA", {"layer_replication": [[0, 2], [1, 2]]}, linears=21
    ),
    "aLoRA": Adapter("LORA", {"alora_invocation_tokens": [5, 6]}),
    "VeLoRA": Adapter("LORA", {"velora_config": ("VeloraConfig", {"num_groups": 4})}),
    "KaSA": Adapter("LORA", {"kasa_config": ("KasaConfig", {})}),
    "BD-LoRA": Adapter(
        "LORA",
        {"use_bdlora": ("BdLoraConfig", {
            "target_modules_bd_a": ["o_proj", "down_proj"],
            "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
            "nblocks": 2,
        })},
    ),
    "MonteCLoRA": Adapter("LORA", {"monteclora_config": ("MontecloraConfig", {})}, random=True),
    "AdaLoRA": Adapter("ADALORA", {"total_step": 100}),
    "VeRA": Adapter("VERA", {"r": 16}),
    "VeRA, dropout": Adapter("VERA", {"r": 16, "vera_dropout": 0.2}),
    "PVeRA": Adapter("PVERA", {"r": 16}, random=True),
    "HiRA": Adapter("HIRA", {"r": 8}),
    "HiRA, dropout": Adapter("HIRA", {"r": 8, "hira_dropout": 0.2}),
    "LoHa": Adapter("LOHA"),
    "LoKr": Adapter("LOKR"),
    "RandLoRA": Adapter("RANDLORA", {"r": 16}),
    "VB-LoRA": Adapter("VBLORA", {"num_vectors": 16, "vector_length": 32}),
    "Uni-LoRA": Adapter("UNILORA"),
    "TinyLoRA": Adapter("TINYLORA"),
    "X-LoRA": Adapter(
        "XLORA", {"hidden_size": 64, "xlora_size": 16, "xlora_dropout_p": 0.0}, targets=None,
        saved=2,
    ),
    "GraLoRA": Adapter("GRALORA", {"r": 8}),
    "GraLoRA, hybrid": Adapter("GRALORA", {"r": 8, "hybrid_r": 4}),
    "Lily": Adapter("LILY", {"r": 8}),
    "DeLoRA": Adapter("DELORA"),
    "DEFT": Adapter("DEFT"),
    "DEFT, PaRa": Adapter("DEFT", {"para": True}),
    "AdaMSS": Adapter("ADAMSS", {"r": 16, "num_subspaces": 2}, needs="sklearn"),
    "FRoD": Adapter("FROD", {"progressbar": False}),
    "GLoRA": Adapter("GLORA"),
    "GLoRA, vectors": Adapter(
        "GLORA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
    ),
    "PEANuT": Adapter("PEANUT", {"r": 8}),
    "PEANuT, deeper": Adapter("PEANUT", {"r": 8, "depth": 2}),
    "Poly": Adapter("POLY", call=lambda ids: {"task_ids": torch.zeros(len(ids), dtype=torch.long)}),
    "OFT": Adapter("OFT", {"oft_block_size": 16}),
    "OFT, exact": Adapter("OFT", {"oft_block_size": 16, "use_cayley_neumann": False}),
    "OFT over 4 bits": Adapter("OFT", {"oft_block_size": 16}, quantized=True, dtype=BF16),
    "BOFT": Adapter("BOFT", {"boft_block_size": 4}),
    "HRA": Adapter("HRA"),
    "PSOFT": Adapter("PSOFT", {"r": 8}),
    "MiSS": Adapter("MISS", {"r": 8}),
    "MiSS, dropout": Adapter("MISS", {"r": 8, "miss_dropout": 0.2}),
    "MiSS, Bat": Adapter("MISS", {"r": 8, "init_weights": "bat"}),
    "C3A": Adapter("C3A", {"block_size": 16}),
    "RoAd": Adapter("ROAD", {"group_size": 16}),
    "FourierFT": Adapter("FOURIERFT", {"n_frequency": 50}),
    "WaveFT": Adapter("WAVEFT", {"n_frequency": 50}),
    "SHiRA": Adapter("SHIRA", {"r": 2}),
    "supertuning": Adapter("SUPERTUNING"),
    "OSF": Adapter("OSF", {"effective_rank": 8}),
    "IA3": Adapter(
        "IA3", {"feedforward_modules": ["down_proj"]},
        targets=["k_proj", "v_proj", "down_proj"], linears=6,
    ),
    "BEFT": Adapter("BEFT", targets=["v_proj"], linears=2),
    "LN tuning": Adapter(
        "LN_TUNING", linears=0,
        targets=["input_layernorm", "post_attention_layernorm", "norm"],
    ),
    "trainable tokens": Adapter(
        "TRAINABLE_TOKENS", {"token_indices": [5, 9]}, linears=0,
        targets=["embed_tokens"],
    ),
    "adaption prompt": Adapter(
        "ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 1}, linears=0, targets=None
    ),
    "prompt tuning": Adapter("PROMPT_TUNING", **_prompt()),
    "multitask prompt tuning": Adapter(
        "MULTITASK_PROMPT_TUNING", **_prompt(num_tasks=2),
        call=lambda ids: {"task_ids": torch.zeros(len(ids), dtype=torch.long)},
    ),
    "P-tuning": Adapter("P_TUNING", **_prompt(encoder_hidden_size=32)),
    "prefix tuning": Adapter("PREFIX_TUNING", **_prompt()),
    "CPT": Adapter("CPT", **_prompt(**_VIRTUAL, num_virtual_tokens=2)),
    "Cartridge": Adapter("CARTRIDGE", **_prompt()),
    "SHADOW": Adapter("SHADOW", linears=0, targets=None),
}  # fmt: skip


def build(adapter: Adapter) -> Any:
    """The tiny model with the adapter, none of whose trained parameters is zero."""
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, use_cache=False)
    ).to(adapter.dtype)
    with TemporaryDirectory() as folder:
        return _adapted(model, adapter, Path(folder))


def _adapted(model: Any, adapter: Adapter, folder: Path) -> Any:
    if adapter.quantized:
        model = quantize(model, compute=BF16)
    classes = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    make = classes[peft.PeftType[adapter.kind]]
    options = {
        key: getattr(peft.tuners.lora.config, value[0])(**value[1])
        if isinstance(value, tuple)
        else value
        for key, value in adapter.options.items()
    }
    for i in range(adapter.saved):
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(folder / str(i))
    if adapter.saved:
        options["adapters"] = {str(i): str(folder / str(i)) for i in range(adapter.saved)}
    if adapter.targets is not None:
        options["target_modules"] = adapter.targets
    model = adapter.prepare(peft.get_peft_model(model, make(**options, task_type="CAUSAL_LM")))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.05 * noise.to(parameter.dtype))
    return model.train()


def step(model: Any, adapter: Adapter, seed: int) -> dict[str, Tensor]:
    """The loss and every gradient of one step."""
    model.zero_grad()
    torch.manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 21))
    loss = model(input_ids=ids, labels=ids, **adapter.call(ids)).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def optimized(adapter: Adapter) -> tuple[Any, Report]:
    """The model after ``optimize`` and one step, and the report of what was rewritten."""
    model = optimize(build(adapter), codegen="eager")
    step(model, adapter, 0)
    return model, explain(model)


def verdict(adapter: Adapter, report: Report) -> tuple[str, str]:
    """``"fused"``, ``"partly"`` or ``"not"``, and what the report says of the rest."""
    counts = report.by_rule()
    gaps = [f"{s.rule}: {s.reason}" for s in report.gaps()]
    remarks = [b.reason for b in report.bypasses if not b.reason.startswith("attention")]
    left = {r for r in remarks if re.match(r"\w+: ", r) and r.split(":")[0] in _RULES}
    lost = [r for r in remarks if r not in left and "made alike" not in r]
    whole = counts.get("lora_linear", 0) >= adapter.linears and bool(
        counts.get("linear_cross_entropy")
    )
    if counts.get("glu", 0) < LAYERS:
        word = "not"
    else:
        word = "fused" if whole and not gaps and not lost else "partly"
    said = (_short(r) for r in (*gaps, *lost, *left))
    return word, "; ".join(sorted(dict.fromkeys(said)))


_RULES = ("lora_linear", "mlp_block", "qkv_block")


def _short(reason: str) -> str:
    reason = reason.split("; the nearest spelling")[0].split(" Explanation:")[0]
    return re.sub(r"\b(\w+?)_\d+\b", r"\1", reason).replace("|", "/").strip()


def line(name: str, report: Report | None) -> str:
    """The line of the table; None for a report of a package that is missing."""
    adapter = TABLE[name]
    if report is None:
        return f"| {name} | {adapter.kind} | | | not tried: needs `{adapter.needs}` |"
    word, why = verdict(adapter, report)
    count = f"{report.by_rule().get('lora_linear', 0)} of {adapter.linears}"
    return f"| {name} | {adapter.kind} | {word} | {count if adapter.linears else ''} | {why} |"


def run(name: str) -> Report | None:
    """The report of one line, or None where its package is missing."""
    needs = TABLE[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        return None
    torch._dynamo.reset()
    return optimized(TABLE[name])[1]


PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
_HEAD = """# Adapters: LoRA, DoRA and all other types of PEFT

An adapter is `W x + f(x; small)`. The rules know formulas, not types. A product of a narrow value
with a small matrix, with scales, biases and dropout around it, is added up within the product of
`W`. A matrix of the weight's size that an adapter makes is added to the weight: one product in
place of two. The norm of DoRA is taken without making `W + B A`. This table tries every type of
PEFT {version} on a tiny model of two layers with seven projections each.

- *fused*: every adapted projection became an op, and so did everything else in the model;
- *partly*: the blocks run as ops, but for what the last column says, which runs as it was;
- *not*: the blocks could not be captured; what is outside of them, or a part, is rewritten.

The last column is what `explain(model)` says. Written by `python -m tests.models.adapters`;
`tests/models/test_adapters.py` holds each line, and the loss and every gradient to the error budget
of eager PEFT (1.5 times its distance from fp64).

DoRA's linears stay apart from `mlp_block` and `qkv_block`, which would have to keep the sum of both
products for the gradient of the magnitude; LoRA's MLP gains 7% by the block on a CPU.

| adapter | PEFT's type | | projections | what is not fused |
|---|---|---|---|---|
"""


def main() -> None:
    """Write the page, or print the lines of some names."""
    names = sys.argv[1:]
    lines = []
    for name in names or TABLE:
        lines.append(line(name, run(name)))
        print(lines[-1], flush=True)
    if not names:
        PAGE.write_text(_HEAD.format(version=peft.__version__) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
