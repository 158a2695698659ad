"""The engines that ``train_step.py`` compares: each makes a loaded model train its own way.

An engine is a function from the model, as Transformers and PEFT built it, and the job to what is
called in the training loop: ``trained(input_ids=ids, labels=ids).loss``. Its imports and its own
preparation count towards the first step. ``fusewright:MEMORY`` is ``fusewright`` with a memory
setting of its own, so that several can run side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workload import Job


class EngineUnavailableError(Exception):
    """The engine is not installed, or cannot run on this device."""


def eager(model: Any, job: Job) -> Any:
    """Transformers and PEFT as they are, with PyTorch's fused attention (SDPA)."""
    return model


def eager_checkpointed(model: Any, job: Job) -> Any:
    """The same with Transformers' gradient checkpointing at each block."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compile_whole(model: Any, job: Job) -> Any:
    """``torch.compile`` over the whole model, with its defaults."""
    import torch

    return torch.compile(model)


def compile_regional(model: Any, job: Job) -> Any:
    """``torch.compile`` over each repeated block: Accelerate's ``compile_regions``."""
    from accelerate.utils import compile_regions

    return compile_regions(model)


def fusewright(model: Any, job: Job) -> Any:
    """``fusewright.optimize``, with the job's memory setting."""
    from fusewright import optimize

    return optimize(model, memory=job.memory)


def fusewright_graphs(model: Any, job: Job) -> Any:
    """The same with Inductor's CUDA graphs."""
    from fusewright import optimize

    return optimize(model, memory=job.memory, cuda_graphs=True)


def trl(model: Any, job: Job) -> Any:
    """The loss of TRL's ``SFTTrainer`` on packed batches."""
    try:
        import trl  # noqa: F401  2026-11-25: only asked whether it is there
    except ImportError as error:
        raise EngineUnavailableError("trl is not installed") from error
    from trl_step import SFTLoss

    return SFTLoss(model, job)


def liger(model: Any, job: Job) -> Any:
    """Liger-Kernel's patches, on this one instance."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise EngineUnavailableError("liger-kernel is not installed") from error
    _need_gpu(model, "liger-kernel has Triton kernels only, which need a GPU")
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    _apply_liger_kernel_to_instance(model=causal_lm)
    return model


def unsloth(model: Any, job: Job) -> Any:
    """Unsloth's patches of Llama and its LoRA layers; not tried here, for want of a GPU."""
    _need_gpu(model, "unsloth has Triton kernels only, which need a GPU")
    if job.method == "full":
        raise EngineUnavailableError("unsloth patches LoRA layers: use --method lora")
    try:
        from unsloth.models.llama import FastLlamaModel
    except ImportError as error:
        raise EngineUnavailableError("unsloth is not installed") from error
    FastLlamaModel.pre_patch()
    return FastLlamaModel.patch_peft_model(model, use_gradient_checkpointing=job.checkpointing)


def _need_gpu(model: Any, reason: str) -> None:
    if next(model.parameters()).device.type != "cuda":
        raise EngineUnavailableError(reason)


ENGINES: dict[str, Callable[[Any, Job], Any]] = {
    "eager": eager,
    "hf": eager,
    "hf+gc": eager_checkpointed,
    "compile": compile_whole,
    "compile-regional": compile_regional,
    "trl": trl,
    "fusewright": fusewright,
    "fusewright-graphs": fusewright_graphs,
    "liger": liger,
    "unsloth": unsloth,
}


def known(name: str) -> bool:
    """Return True if ``name`` is an engine, or ours with a memory setting."""
    base, colon, memory = name.partition(":")
    return base in ENGINES and (not colon or (base == "fusewright" and bool(memory)))


def is_ours(name: str) -> bool:
    """Whether ``name`` is one of fusewright's own."""
    return name.partition(":")[0] in ("fusewright", "fusewright-graphs")


def prepare(model: Any, job: Job) -> Any:
    """Make ``model`` train the way of the job's engine."""
    base, _, memory = job.engine.partition(":")
    return ENGINES[base](model, dataclasses.replace(job, memory=memory or job.memory))
